"""The command line: `serve` over HTTP, or `segment` pictures without it."""

import json
import os
import signal
import socket
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from pydantic import ValidationError

from service.engine import Engine, ModelError
from service.errors import InputError
from service.images import decode
from service.models import Models
from service.options import Options, parse_options
from service.presence import presence_rows
from service.render import mask_png, overlay_jpeg
from service.settings import Settings

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".avif"}
MASK_SUFFIX = ".mask.png"
OVERLAY_SUFFIX = ".overlay.jpg"

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
ThreadsOption = Annotated[
    int | None, typer.Option(help="Threads for one inference on the CPU. Default: 0, one per core.")
]


def main() -> None:
    """Entry point of `python -m service`."""
    warnings.filterwarnings("ignore", module=r"PIL\.")  # what is wrong with a picture goes to whoever sent it
    cli(prog_name="python -m service")


@cli.command()
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


@cli.command()
def segment(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="Picture files, or folders of them.")],
    output: Annotated[Path, typer.Option(help="Folder to write to; made if needed.")] = Path("segmented"),
    model: ModelOption = None,
    scales: Annotated[
        str, typer.Option(help="Scales to average, as in 0.75,1,1.25. Default: the model's own.", show_default=False)
    ] = "",
    flip: Annotated[
        bool | None,
        typer.Option("--flip/--no-flip", help="Average with the mirrored picture. Default: the model's own."),
    ] = None,
    overlay: Annotated[
        bool, typer.Option("--overlay/--no-overlay", help="Also write the picture with the mask on it.")
    ] = True,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Segment pictures and write masks, overlays and one presence.json.

    For NAME.jpg this writes NAME.mask.png (pixel value = class id), NAME.overlay.jpg and an entry in presence.json.
    Where two pictures share a NAME, the files are called after the whole file name, numbered if that is shared too.
    In a folder the pictures directly inside are taken. A picture that cannot be used is reported, the others go on, and
    the exit code is 1.

    Examples:

        python -m service segment street.jpg

        python -m service segment photos/ --output masks --no-overlay

        python -m service segment street.jpg --model my.onnx --scales 0.75,1,1.25 --flip
    """
    settings = _settings(model=model, device=device, threads=threads)
    try:
        given = {"scales": scales, "flip": "" if flip is None else str(flip)}
        options = parse_options(given.items(), settings)
    except InputError as error:
        _fail(error.message, code=2)
    files, errors = find_pictures(images)
    for problem in errors:
        _report(problem)
    if not files:
        _fail("no pictures to segment")
    engine = _load(settings)
    try:
        output.mkdir(parents=True, exist_ok=True)
        entries, failed = _segment_files(files, output, engine, settings, options, overlay)
        errors += failed
        summary = {
            "model": {"name": engine.metadata.name, "sha256": engine.sha256},
            "scales": options.scales or engine.metadata.scales,
            "flip": engine.metadata.flip if options.flip is None else options.flip,
            "images": entries,
            "errors": errors,
        }
        write_whole(output / "presence.json", json.dumps(summary, indent=1, ensure_ascii=False).encode())
    except OSError as error:
        _fail(f"cannot write to {output}: {error.strerror or error}")
    if errors:
        _fail(f"{len(errors)} of {len(errors) + len(entries)} inputs failed")


def find_pictures(paths: Sequence[Path]) -> tuple[list[Path], list[dict[str, str]]]:
    """Files as given and the pictures directly inside folders, each once; and an error for each path that has none.

    In a folder, files are taken by their suffix and this program's own outputs are left out.
    """
    found: dict[Path, Path] = {}
    errors = []
    for path in paths:
        if path.is_dir():
            inside = [entry for entry in sorted(path.iterdir()) if _is_picture_name(entry) and entry.is_file()]
            if not inside:
                errors.append(_entry_error(path, "no_pictures", "there are no pictures in this folder"))
        else:
            inside = [path]
        for file in inside:
            found.setdefault(file.resolve(), file)
    return list(found.values()), errors


def output_names(files: Sequence[Path]) -> list[str]:
    """A name for each file's outputs, no two alike even where the file system ignores case."""
    stems = Counter(file.stem.casefold() for file in files)
    taken: set[str] = set()
    names = []
    for file in files:
        base = file.stem if stems[file.stem.casefold()] == 1 else file.name
        name, number = base, 1
        while name.casefold() in taken:
            number += 1
            name = f"{base}-{number}"
        taken.add(name.casefold())
        names.append(name)
    return names


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that it is there completely or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _segment_files(
    files: Sequence[Path], output: Path, engine: Engine, settings: Settings, options: Options, overlay: bool
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Segment each file and write its outputs; returns the entries and the errors for presence.json."""
    from rich.console import Console
    from rich.progress import Progress

    entries, errors = [], []
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, redirect_stdout=False) as progress:
        for file, name in progress.track(list(zip(files, output_names(files), strict=True)), description="segmenting"):
            try:
                picture = decode(_read(file, settings), max_bytes=settings.max_bytes, max_pixels=settings.max_pixels)
            except InputError as error:
                errors.append(_entry_error(file, error.code, error.message))
                _report(errors[-1])
                continue
            result = engine.segment(picture.pixels, options.scales, options.flip)
            rows = presence_rows(result.mask, result.presence, engine.metadata.classes, settings.threshold)
            entry: dict[str, Any] = {
                "file": str(file),
                "mask": name + MASK_SUFFIX,
                "image": {
                    "width": picture.width,
                    "height": picture.height,
                    "exif_applied": picture.exif_applied,
                    "mode": picture.mode,
                },
                "presence": rows,
                "infer_ms": result.infer_ms,
            }
            write_whole(output / entry["mask"], mask_png(result.mask, engine, rows))
            if overlay:
                entry["overlay"] = name + OVERLAY_SUFFIX
                write_whole(
                    output / entry["overlay"], overlay_jpeg(picture.pixels, result.mask, engine.metadata.palette)
                )
            entries.append(entry)
            present = ", ".join(row["class"] for row in rows if row["present"]) or "no class is present"
            typer.echo(f"{file} -> {output / entry['mask']}: {present}")
    return entries, errors


def _read(file: Path, settings: Settings) -> bytes:
    """At most one byte more than the limit, which is enough for `decode` to refuse; InputError where unreadable."""
    try:
        with file.open("rb") as stream:
            return stream.read(settings.max_bytes + 1)
    except OSError as error:
        raise InputError("unreadable", f"the file cannot be read: {error.strerror or error}") from None


def _is_picture_name(path: Path) -> bool:
    name = path.name.lower()
    return (
        path.suffix.lower() in IMAGE_SUFFIXES
        and not name.startswith(".")
        and not name.endswith((MASK_SUFFIX, OVERLAY_SUFFIX))
    )


def _entry_error(path: Path, code: str, message: str) -> dict[str, str]:
    return {"file": str(path), "code": code, "message": message}


def _report(error: dict[str, str]) -> None:
    typer.echo(f"{error['file']}: {error['message']}", err=True)


def _fail(message: str, code: int = 1) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(code)


def _settings(**given: Any) -> Settings:
    """Settings of the environment, with the options given on the command line over them."""
    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        faults = [
            f"{name if given.get(name) is not None else f'ENCNET_{name.upper()}'}: {fault['msg']}"
            for fault in error.errors(include_url=False)
            for name in [".".join(map(str, fault["loc"]))]
        ]
        _fail("; ".join(faults), code=2)


def _load(settings: Settings) -> Engine:
    try:
        engine = Engine(settings.model, settings.device, settings.threads)
    except ModelError as error:
        _fail(str(error))
    return engine


def _ready_text(models: Models, port: int) -> str:
    settings = models.settings
    everywhere = settings.host in ("0.0.0.0", "::")
    host = "127.0.0.1" if everywhere else f"[{settings.host}]" if ":" in settings.host else settings.host
    url = f"http://{host}:{port}"
    lines = [f"\nEncNet Serve listens on {url}{' and every other interface' if everywhere else ''}"]
    for served in models.all:
        engine = models.pipeline(served.name).engine
        classes = len(engine.metadata.classes)
        lines.append(f"  model    {engine.metadata.name}, {classes} classes, on {engine.device} ({served.path})")
    lines += [
        f"  try      curl -F image=@examples/street.jpg {url}/segment",
        f"           curl -F image=@examples/street.jpg '{url}/segment?format=png' -o mask.png",
        f"  docs     {url}/docs\n",
    ]
    return "\n".join(lines)
