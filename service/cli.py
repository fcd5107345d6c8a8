"""The command line: `serve` over HTTP, `segment` pictures without it, `bench` a server, `warm` a model."""

import importlib
import os
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from pydantic import ValidationError

from service import __version__, batch, bench, warm
from service.engine import Engine, ModelError
from service.errors import InputError, first_line
from service.files import check_writable, whole
from service.folders import entry_error, find_pictures
from service.models import Models
from service.options import Options, option_pairs, parse_options
from service.record import Entry, OutputBusy, Record, open_record
from service.settings import Settings, ignored_names, settings_table

if TYPE_CHECKING:
    from rich.progress import Progress

WIDE = 160  # columns of a table that goes into a file or a pipe

cli = typer.Typer(
    help="Scene segmentation with EncNet: which class is where, and which classes are in the scene.\n\n"
    "Settings come from ENCNET_... environment variables too; an option given here wins.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

ModelOption = Annotated[
    Path | None, typer.Option(help="The .onnx file, from `python -m export`. Default: the embedded CamVid model.")
]
DeviceOption = Annotated[str | None, typer.Option(help="auto, cpu or cuda. Default: auto, the GPU where there is one.")]
ScalesOption = Annotated[
    str, typer.Option(help="Scales to average, as in 0.75,1,1.25. Default: the model's own.", show_default=False)
]
FlipOption = Annotated[
    bool | None,
    typer.Option("--flip/--no-flip", help="Average with the mirrored picture. Default: the model's own."),
]
ThreadsOption = Annotated[
    int | None, typer.Option(help="Threads for one inference on the CPU. Default: 0, one per core.")
]
AddressOption = Annotated[
    str | None,
    typer.Option(
        help="Ray cluster to use, as in 10.0.0.7:6379; auto: the one that this machine is part of. "
        "Default: one of this machine's own, for as long as the command runs."
    ),
]
CpusOption = Annotated[float, typer.Option(help="CPUs that Ray sets aside for each process with a model.")]
GpusOption = Annotated[
    float, typer.Option(help="GPUs that Ray sets aside for each process with a model; 0.5 is half of one.")
]


def _tell_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"EncNet Serve {__version__}")
        raise typer.Exit


@cli.callback()
def _every_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of `python -m service`."""
    warnings.filterwarnings("ignore", module=r"PIL\.")  # what is wrong with a picture goes to whoever sent it
    cli(prog_name="python -m service")


_SETTINGS = "Settings, from the environment or from a file encnet.env:\n\n" + "\n\n".join(
    f"{name}{f' [{default}]' if default else ''}: {meaning}" for name, default, meaning in settings_table()
)
_SETTINGS += "\n\nENCNET_KERNELS: `off` leaves the compiled kernel aside; from the environment only."


@cli.command(epilog=_SETTINGS)
def serve(
    model: ModelOption = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on. Default: 127.0.0.1, this machine only.")
    ] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 takes a free one. Default: 8000.")] = None,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    supervise: Annotated[
        bool, typer.Option("--supervise", help="Run the server in a process of its own, and start another if it dies.")
    ] = False,
    listen_fd: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Serve a model over HTTP.

    SIGTERM and Ctrl-C finish what is in flight, while new work gets 503; SIGHUP loads the model files anew.

    Examples:

        python -m service serve

        python -m service serve --model my.onnx --port 9000

        ENCNET_MAX_PIXELS=4000000 python -m service serve --host 0.0.0.0

        ENCNET_MODELS=night=night.onnx ENCNET_LOG_FORMAT=json python -m service serve --supervise
    """
    from service import logs, server, supervisor

    settings = _settings(model=model, host=host, port=port, device=device, threads=threads)
    if listen_fd is None:  # else the supervisor has said it
        _warn_of_ignored_names()
    try:
        with server.listen(settings) if listen_fd is None else socket.socket(fileno=listen_fd) as listener:
            if supervise:
                logs.set_up(settings.log_format, settings.log_level)
                command = [sys.executable, "-m", "service", *(word for word in sys.argv[1:] if word != "--supervise")]
                raise typer.Exit(supervisor.supervise(command, listener))
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn raises the signal again at its end
            server.run(settings, listener, lambda models: typer.echo(_ready_text(models, listener.getsockname()[1])))
    except (server.CannotListen, ModelError) as error:
        _fail(str(error))
    except KeyboardInterrupt:
        return


@cli.command("cluster", epilog=_SETTINGS)
def serve_on_cluster(
    model: ModelOption = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on, on each node. Default: 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on, on each node. Default: 8000.")] = None,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    address: AddressOption = None,
    min_replicas: Annotated[int, typer.Option(help="Fewest replicas.")] = 1,
    max_replicas: Annotated[
        int | None, typer.Option(help="Most replicas. Default: as many as the cluster has room for.")
    ] = None,
    ongoing_requests: Annotated[
        float, typer.Option(help="Requests, running and waiting, that each replica should have on average.")
    ] = 2.0,
    cpus: CpusOption = 1.0,
    gpus: GpusOption = 0.0,
    stop: Annotated[bool, typer.Option("--stop", help="Drain what is deployed at --address, and remove it.")] = False,
) -> None:
    """Serve a model on a Ray cluster, with more or fewer replicas as the load is.

    Without --address it serves in the foreground, on this machine; SIGTERM and Ctrl-C finish what is in flight, while
    new work gets 503, and SIGHUP loads the model files anew, replica by replica. With --address it deploys and ends;
    done again, with another model or other options, it brings the replicas up to date one after another, without
    losing a request: all options and settings are taken anew, and what is left out is the default again. Every node
    needs the model files, this code and service/requirements-cluster.txt.

    Examples:

        python -m service cluster --max-replicas 4

        python -m service cluster --address auto --host 0.0.0.0 --gpus 0.5

        python -m service cluster --address auto --host 0.0.0.0 --gpus 0.5 --model new.onnx

        python -m service cluster --address auto --stop
    """
    from service import server

    settings = _settings(model=model, host=host, port=port, device=device, threads=threads)
    _warn_of_ignored_names()
    cluster = _needs_ray("cluster")
    layout = _layout(
        min_replicas=min_replicas, max_replicas=max_replicas, ongoing_requests=ongoing_requests, cpus=cpus, gpus=gpus
    )
    if stop and not address:
        _fail("--stop needs the --address of the cluster that the service is to be removed from", code=2)

    def tell(text: str) -> None:
        typer.echo(text, err=True)

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a container's first process would not be ended by it
    try:
        if not stop:
            engines = [Engine(path, "cpu", 1) for path in (settings.model, *settings.models.values())]
        if not address:
            with server.listen(settings) as listener:
                settings = settings.model_copy(update={"port": listener.getsockname()[1]})
        with cluster.connected(address, layout):
            if stop:
                cluster.stop(settings)
                return
            running = cluster.deploy(settings, layout, tell)
            typer.echo(_banner(settings, engines, _replicas_text(running, layout)))
            if not address:
                cluster.stay(settings, layout, tell)
    except (cluster.ClusterError, server.CannotListen, ModelError) as error:
        _fail(str(error))
    except KeyboardInterrupt:
        if address:
            _fail("stopped before it was done", code=130)


@cli.command()
def segment(
    images: Annotated[
        list[str],
        typer.Argument(metavar="IMAGE", help="Picture files, or folders of them; with --cluster also s3:// and gs://."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write to; made if needed.")] = Path(
        "segmented"
    ),
    recursive: Annotated[
        bool, typer.Option("--recursive", "-r", help="Take the pictures in subfolders too, into subfolders alike.")
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Segment again what was done before in the same way, and replace files that others made.",
        ),
    ] = False,
    model: ModelOption = None,
    scales: ScalesOption = "",
    flip: FlipOption = None,
    max_side: Annotated[int | None, typer.Option(help="Reduce each picture first until no side is longer.")] = None,
    window: Annotated[
        int | None, typer.Option(help="Segment large pictures in windows of this many pixels a side, and average.")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(help="Pixels from window to window. Default: two thirds of one.")
    ] = None,
    overlay: Annotated[
        bool, typer.Option("--overlay/--no-overlay", help="Also write the picture with the mask on it.")
    ] = True,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    cluster: Annotated[bool, typer.Option("--cluster", help="Let a Ray cluster do the work.")] = False,
    address: AddressOption = None,
    cpus: CpusOption = 1.0,
    gpus: GpusOption = 0.0,
) -> None:
    """Segment pictures and write masks, overlays and tables of which classes are present.

    For NAME.jpg this writes NAME.mask.png (pixel value = class id), NAME.overlay.jpg, an entry in presence.json and a
    row for each class in presence.csv. Where two pictures share a NAME, the files are called after the whole file name,
    numbered if that is shared too. A picture that cannot be used, or would replace a file that this command did not
    make, is reported, the others go on, and the exit code is 1.

    Stopped at any point, even by kill -9, the same command goes on from there: what is done, with this model, these
    options and the picture unchanged, is not done again. presence.jsonl keeps the record, a line for each picture.

    With --cluster the pictures are shared out among the processes of a Ray cluster, whose nodes must all have the
    output folder, and the pictures, unless they are in a bucket; --cpus, --gpus and --address are for it alone.

    Examples:

        python -m service segment street.jpg

        python -m service segment photos/ --recursive --output masks --no-overlay

        python -m service segment street.jpg --model my.onnx --scales 0.75,1,1.25 --flip

        python -m service segment s3://photos/2026 --recursive --output /shared/masks --cluster --address auto
    """
    settings = _settings(model=model, device=device, threads=threads)
    _warn_of_ignored_names()
    options = _options(settings, scales=scales, flip=flip, max_side=max_side, window=window, stride=stride)
    segment_pictures: Callable[..., Iterator[tuple[batch.Job, Entry | InputError]]] = batch.segment_pictures
    if cluster:
        segment_pictures = partial(_segment_on_cluster, address=address, layout=_layout(cpus=cpus, gpus=gpus))
    elif address or gpus or cpus != 1:
        _fail("--address, --cpus and --gpus are for --cluster", code=2)
    urls = [image for image in images if "://" in image]
    if urls and not cluster:
        _fail(f"{urls[0]} is in a bucket, which takes --cluster to be read", code=2)
    pictures, errors = find_pictures([Path(image) for image in images if image not in urls], recursive)
    if urls:
        in_buckets, more_errors = _needs_ray("bucket").find_in_buckets(urls, recursive)
        pictures, errors = pictures + in_buckets, errors + more_errors
    for problem in errors:
        _report(problem)
    if not pictures:
        _fail("no pictures to segment")
    inputs = len(pictures) + len(errors)
    run = batch.Run(_load(settings), settings, options, overlay, overwrite)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a container's first process would not be ended by it
    try:
        with open_record(output) as record:
            jobs = batch.plan(pictures, record)
            todo = [job for job in jobs if overwrite or not batch.is_current(job, run, record)]
            if len(todo) < len(jobs):
                kept = f"{len(jobs) - len(todo)} of {len(jobs)} pictures were done before"
                typer.echo(f"{kept}; --overwrite segments them again", err=True)
            outcomes = segment_pictures(todo, run, record)
            errors += _tell_outcomes(outcomes, len(jobs) - len(todo), len(jobs), output)
            others = batch.write_tables(jobs, run, record, errors)
    except OutputBusy as error:
        _fail(str(error))
    except BrokenPipeError:
        _fail("stopped, as nobody reads what is printed; the same command goes on from here")
    except OSError as error:
        _fail(f"cannot write to {output}: {error.strerror or error}")
    except KeyboardInterrupt:
        _fail("stopped; the same command goes on from here", code=130)
    if others:
        typer.echo(
            f"{others} more in {output} were made with another model or other options, and are left out of "
            f"{batch.DOCUMENT} and {batch.TABLE}",
            err=True,
        )
    if errors:
        _fail(f"{len(errors)} of {inputs} inputs failed")


def _tell_outcomes(
    outcomes: Iterable[tuple[batch.Job, Entry | InputError]], done: int, total: int, output: Path
) -> list[dict[str, str]]:
    """Let each picture be segmented, telling of it and of the progress; returns the errors."""
    errors = []
    with _progress() as progress:
        bar = progress.add_task("segmenting", total=total, completed=done)
        for job, outcome in outcomes:
            if isinstance(outcome, InputError):
                errors.append(entry_error(job.file, outcome.code, outcome.message))
                _report(errors[-1])
            else:
                present = ", ".join(row["class"] for row in outcome["presence"] if row["present"])
                typer.echo(f"{outcome['file']} -> {output / outcome['mask']}: {present or 'no class is present'}")
            progress.advance(bar)
    return errors


def _segment_on_cluster(
    jobs: Sequence[batch.Job], run: batch.Run, record: Record, address: str | None, layout: Any
) -> Iterator[tuple[batch.Job, Entry | InputError]]:
    """As batch.segment_pictures; what is wrong with the cluster is told in a sentence."""
    cluster, batch_cluster = _needs_ray("cluster"), _needs_ray("batch_cluster")
    if not jobs:
        return
    try:
        with cluster.connected(address, layout):
            yield from batch_cluster.segment_pictures(jobs, run, record, layout)
    except cluster.ClusterError as error:
        _fail(str(error))


def _needs_ray(module: str) -> Any:
    """A module of the service that needs Ray, which the rest does without."""
    try:
        return importlib.import_module(f"service.{module}")
    except ImportError as error:
        _fail(f"{error.name} is not installed; pip install -r service/requirements-cluster.txt")


def _layout(**given: Any) -> Any:
    try:
        return _needs_ray("cluster").Layout(**given)
    except ValidationError as error:
        _fail("; ".join(_faults(error)), code=2)


def _progress() -> "Progress":
    """A bar on stderr where that is a terminal, below the lines that are printed meanwhile."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        redirect_stdout=sys.stdout.isatty(),
    )


@cli.command("bench")
def load_server(
    url: Annotated[
        str, typer.Argument(help="Where the server is, with options in the query if it needs others than these.")
    ] = "http://127.0.0.1:8000",
    concurrency: Annotated[
        str, typer.Option(help="Numbers of clients, each measured in turn.", metavar="N,N,...")
    ] = "1,4,16",
    duration: Annotated[float, typer.Option(min=0.1, help="Seconds for each number of clients.")] = 10,
    image: Annotated[
        Path | None,
        typer.Option(help="Picture file to send, or a folder of them. Default: a synthetic one of 640x480."),
    ] = None,
    scales: ScalesOption = "",
    flip: FlipOption = None,
    header: Annotated[
        list[str] | None, typer.Option("--header", "-H", help="Header to send, as in 'Authorization: Bearer KEY'.")
    ] = None,
    timeout: Annotated[float, typer.Option(min=0.1, max=86_400, help="Seconds to wait for an answer.")] = 60,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="File for the figures, in more detail.", show_default=False)
    ] = None,
) -> None:
    """Load a running server and print its throughput and the percentiles of its latency.

    So many clients send pictures for so long, each its next one as soon as the last is answered. Throughput counts the
    answers 200 within the time, latency is theirs from the first byte sent to the last received, and answers with
    another status and requests without any answer stand in columns of their own.

    Examples:

        python -m service bench

        python -m service bench http://10.0.0.7:8000 --image photos/ --concurrency 1,16,64 --duration 30

        python -m service bench 'http://127.0.0.1:8000/segment?format=png' --scales 0.75,1,1.25 --flip --json bench.json
    """
    from service.connections import raise_descriptor_limit

    given = {"scales": scales, "flip": "" if flip is None else str(flip).lower()}
    try:
        clients = bench.read_concurrency(concurrency)
        headers = bench.read_headers(header or [])
        target = bench.read_target(url, {name: text for name, text in given.items() if text}, headers, timeout)
        found = bench.read_pictures(image)
        pictures = list(found.values())
        if json_file:
            check_writable(json_file)
    except bench.BenchError as error:
        _fail(str(error), code=2)
    except OSError as error:
        _fail(f"cannot write {json_file}: {error.strerror or error}")
    levels: list[bench.Level] = []
    try:
        raise_descriptor_limit()
        bench.try_once(target, pictures[0], next(iter(found)))
        with _progress() as progress:
            bar = progress.add_task("measuring", total=len(clients) * duration)

            def tick(seconds: float) -> None:
                progress.update(bar, completed=len(levels) * duration + seconds)

            for number in clients:
                progress.update(bar, description=f"{number} clients")
                levels.append(bench.measure(target, pictures, number, duration, tick))
    except bench.BenchError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        _fail("stopped", code=130)
    from rich.console import Console

    console = Console()
    console.print(bench.table(levels), width=console.width if console.is_terminal else WIDE)
    if json_file:
        _write(json_file, bench.document(url, target, pictures, levels))
    if not any(level.latency() for level in levels):
        _fail("no picture was answered")


@cli.command("warm")
def warm_model(
    model: ModelOption = None,
    size: Annotated[
        list[str] | None,
        typer.Option(metavar="WIDTHxHEIGHT", help="Size of a picture to come; may be given several times."),
    ] = None,
    scales: ScalesOption = "",
    flip: FlipOption = None,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Load a model and run it, printing what the first and the second picture of each size take.

    For building a container image: that the model, the runtime and the device work together is known before anyone
    waits, and what they keep on disk (the driver's compiled kernels, the file cache) is filled. The difference between
    the two times is what `serve` would let its first picture of that size wait. Without --size these are a landscape, a
    portrait and a square at the model's own long side.

    Examples:

        python -m service warm

        python -m service warm --model my.onnx --size 1920x1080 --size 640x480 --scales 0.75,1,1.25 --flip
    """
    settings = _settings(model=model, device=device, threads=threads)
    _warn_of_ignored_names()
    options = _options(settings, scales=scales, flip=flip)
    try:
        sizes = [warm.read_size(text, settings.max_pixels) for text in size or []]
    except ValueError as error:
        _fail(str(error), code=2)
    started = time.perf_counter()
    engine = _load(settings)
    metadata = engine.metadata
    typer.echo(
        f"{metadata.name}, {len(metadata.classes)} classes, on {engine.device}: "
        f"loaded in {time.perf_counter() - started:.2f} s"
    )
    typer.echo(f"{'picture':>12} {'first ms':>10} {'second ms':>10}")
    for width, height in sizes or warm.usual_sizes(metadata.base_size):
        try:
            times = warm.warm(engine, (width, height), options.scales, options.flip)
        except Exception as error:  # ONNX Runtime's own exceptions share no base class of their own
            _fail(f"the model failed on a picture of {width}x{height}: {first_line(error)}")
        typer.echo(f"{f'{width}x{height}':>12} {times.first_ms:10.1f} {times.second_ms:10.1f}")


def _report(error: dict[str, str]) -> None:
    typer.echo(f"{error['file']}: {error['message']}", err=True)


def _fail(message: str, code: int = 1) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(code)


def _options(settings: Settings, **given: str | int | None) -> Options:
    """The options of a segmentation, as a request would give them."""
    try:
        return parse_options(option_pairs(given.items()), settings)
    except InputError as error:
        _fail(error.message, code=2)


def _write(path: Path, text: str) -> None:
    try:
        with whole(path) as file:
            file.write(text.encode())
    except OSError as error:
        _fail(f"cannot write {path}: {error.strerror or error}")


def _settings(**given: Any) -> Settings:
    """Settings of the environment, with the options given on the command line over them."""
    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})
    except UnicodeDecodeError:
        _fail("the settings file encnet.env is not text in UTF-8; save it as that", 2)
    except OSError as error:
        _fail(f"the settings file encnet.env cannot be read by user {os.geteuid()}: {error.strerror}", 2)
    except ValidationError as error:
        _fail(
            "; ".join(_faults(error, lambda name: name if given.get(name) is not None else f"ENCNET_{name.upper()}")), 2
        )


def _warn_of_ignored_names() -> None:
    for sentence in ignored_names():
        typer.echo(f"warning: {sentence}", err=True)


def _faults(error: ValidationError, where: Callable[[str], str] = str) -> list[str]:
    """What is wrong, with the name under which it was given."""
    faults = []
    for fault in error.errors(include_url=False):
        name, text = ".".join(map(str, fault["loc"])), str(fault["msg"]).removeprefix("Value error, ")
        faults.append(f"{where(name)}: {text}" if name else text)
    return faults


def _load(settings: Settings) -> Engine:
    try:
        engine = Engine(settings.model, settings.device, settings.threads, settings.gpu_memory_limit)
    except ModelError as error:
        _fail(str(error))
    return engine


def _ready_text(models: Models, port: int) -> str:
    settings = models.settings.model_copy(update={"port": port})
    return _banner(settings, [models.pipeline(served.name).engine for served in models.all])


def _banner(settings: Settings, engines: Sequence[Engine], replicas: str = "") -> str:
    everywhere = settings.host in ("0.0.0.0", "::")
    host = "127.0.0.1" if everywhere else f"[{settings.host}]" if ":" in settings.host else settings.host
    url = f"http://{host}:{settings.port}"
    lines = [f"\nEncNet Serve listens on {url}{' and every other interface' if everywhere else ''}"]
    if replicas:
        lines.append(f"  replicas {replicas}")
    for name, engine in zip((settings.model.stem, *settings.models), engines, strict=True):
        asked_as = f"{name}: " if len(engines) > 1 else ""  # the name under which a request asks for it
        classes = len(engine.metadata.classes)
        on = "" if replicas else f", on {engine.device}"
        lines.append(f"  model    {asked_as}{engine.metadata.name}, {classes} classes{on} ({engine.path})")
    key = "-H 'Authorization: Bearer KEY' " if settings.api_keys else ""
    lines += [
        f"  try      curl {key}-F image=@examples/street.jpg {url}/segment",
        f"           curl {key}-F image=@examples/street.jpg '{url}/segment?format=png' -o mask.png",
        f"  open     {url} (the page), {url}/docs (the API)\n",
    ]
    return "\n".join(lines)


def _replicas_text(running: int, layout: Any) -> str:
    most = layout.max_replicas or "as many as there is room for"
    by_load = "" if most == layout.min_replicas else f" now, from {layout.min_replicas} to {most} by the load"
    return f"{running}{by_load}, each with {layout.takes}"
