"""The service side by side with other servers and with no server at all.

    pip install -r benchmarks/requirements-peers.txt     # in an environment of its own
    make kernels && python -m benchmarks.servers

Every server runs the same decoder, model and encoder (benchmarks/peers/) and must give the same bytes; one that is not
installed is left out and named. Each round starts, checks, measures and stops one after another, so that a drift of the
machine hits all alike. The load comes from this process, on the same cores, by the functions of `service bench`.

The bare loops have no HTTP: `all cores` is one session with a thread for each core, one picture after another;
`side by side` is a session of one thread, run by a thread for each core. Neither decodes or encodes. The bare path
decodes, infers and encodes one picture after another on all cores: what a lone request cannot be quicker than. It takes
turns of a few seconds with the one client of each server, whose difference to it is what that server adds.

Throughput is answers over the seconds until the last of them; latencies of all rounds are pooled.
"""

import argparse
import http.client
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from benchmarks.command import ROOT, STREET, add_output, commit, hardware, option_parser, processor, write_json
from benchmarks.peers.segmenter import THREADS, Segmenter
from service import bench
from service.engine import Engine
from service.images import decode
from service.settings import EMBEDDED_MODEL

OURS = "encnet"
CORES = os.cpu_count() or 1
START_SECONDS = 120.0
STOP_SECONDS = 20.0
WARM_SECONDS = 1.5
TURNS = 4


@dataclass(frozen=True)
class Server:
    """A server to measure: `{port}` in its command is the port to listen on, `threads` those of one inference."""

    name: str
    package: str
    command: tuple[str, ...]
    how: str
    threads: int = 1
    path: str = "/segment"


_PEERS = "benchmarks.peers"
_UVICORN = ("uvicorn", f"{_PEERS}.plain_fastapi:app", "--port", "{port}", "--no-access-log", "--log-level", "warning")
SERVERS = (
    Server(OURS, "fastapi", ("service", "serve", "--port", "{port}"), "defaults", 0, "/segment?format=png"),
    Server("fastapi", "fastapi", _UVICORN, "def endpoint, one session of one thread"),
    Server("fastapi-wide", "fastapi", _UVICORN, "def endpoint, one session of all cores", 0),
    Server("litserve", "litserve", (f"{_PEERS}.litserve_app", "{port}"), "2 workers of one thread"),
    Server(
        "bentoml",
        "bentoml",
        ("bentoml", "serve", f"{_PEERS}.bentoml_app:Segmentation", "--host", "127.0.0.1", "--port", "{port}"),
        "2 workers of one thread",
    ),
    Server(
        "mosec",
        "mosec",
        (f"{_PEERS}.mosec_app", "--address", "127.0.0.1", "--port", "{port}", "--timeout", "60000"),
        "2 workers of one thread",
    ),
    Server("ray", "ray", (f"{_PEERS}.ray_app", "{port}"), "2 replicas of one thread"),
)


@dataclass
class Figures:
    """What was measured of one server at one number of clients, over all rounds; latencies in milliseconds."""

    answers: int = 0
    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return self.answers / self.seconds

    def percentile(self, rank: float) -> float:
        return float(np.percentile(self.latencies, rank))


class BenchmarkError(Exception):
    """A server cannot be measured; the message says why."""


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@contextmanager
def running(server: Server, model: Path, log: Path) -> Iterator[int]:
    """The server in processes of its own; yields its port. What it says goes to the log."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "ENCNET_MODEL": str(model),
        "ENCNET_LOG_LEVEL": "warning",
        THREADS: str(server.threads),
        "PYTHONPATH": str(ROOT),
        "BENTOML_DO_NOT_TRACK": "True",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    command = [sys.executable, "-m", *(word.format(port=port) for word in server.command)]
    with log.open("a") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield port
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            print(f"  {server.name} does not end on SIGTERM", flush=True)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # workers that outlive their parent
        process.wait()


def wait_until_right(target: bench.Target, picture: bytes, wanted: bytes) -> None:
    """Return once the server gives the wanted bytes. Raises BenchmarkError where it gives others or none in time."""
    until = time.monotonic() + START_SECONDS
    said = "nothing"
    while time.monotonic() < until:
        try:
            connection = target.connect()
            connection.request("POST", target.path, picture, {"Content-Type": "application/octet-stream"})
            response = connection.getresponse()
            body = response.read()
        except (OSError, http.client.HTTPException) as error:
            said = str(error)
        else:
            if response.status == 200 and body == wanted:
                return
            said = f"status {response.status}, {len(body)} bytes where {len(wanted)} are right: {body[:200]!r}"
            if response.status == 200:
                break
        time.sleep(0.2)
    raise BenchmarkError(f"it does not answer as it should: {said}")


def measure(target: bench.Target, picture: bytes, wanted: bytes, clients: int, seconds: float, into: Figures) -> None:
    begun = time.perf_counter()
    level = bench.measure(target, [picture], clients, seconds, lambda passed: None)
    took = time.perf_counter() - begun
    answers = len(level.latencies[200])
    if level.errors or level.statuses != {200: answers} or level.received_bytes != answers * len(wanted):
        raise BenchmarkError(f"at {clients} clients: {level.statuses} {dict(level.errors)}")
    into.answers += answers
    into.seconds += took
    into.latencies += level.latencies[200]


def bare_loop(engines: Sequence[Engine], pixels: np.ndarray, seconds: float, into: Figures) -> None:
    """One thread for each engine (which may be the same), each running one picture after another."""
    end = time.perf_counter() + seconds

    def loop(engine: Engine) -> tuple[list[float], float]:
        times = []
        while (begun := time.perf_counter()) < end:
            engine.segment(pixels)
            times.append((time.perf_counter() - begun) * 1000)
        return times, time.perf_counter()

    begun = time.perf_counter()
    with ThreadPoolExecutor(len(engines)) as pool:
        loops = list(pool.map(loop, engines))
    into.latencies += [one for times, _ in loops for one in times]
    into.answers += sum(len(times) for times, _ in loops)
    into.seconds += statistics.mean(ended for _, ended in loops) - begun


def bare_path(segmenter: Segmenter, picture: bytes, seconds: float, into: Figures) -> None:
    begun = time.perf_counter()
    while time.perf_counter() < begun + seconds:
        started = time.perf_counter()
        segmenter(picture)
        into.latencies.append((time.perf_counter() - started) * 1000)
        into.answers += 1
    into.seconds += time.perf_counter() - begun


def measure_alone(
    target: bench.Target,
    segmenter: Segmenter,
    picture: bytes,
    wanted: bytes,
    seconds: float,
    into: Figures,
    path: Figures,
) -> None:
    """One client for so long, and as long the bare path, in turns: a drift of the machine hits both alike."""
    for _ in range(TURNS):
        bare_path(segmenter, picture, seconds / TURNS, path)
        measure(target, picture, wanted, 1, seconds / TURNS, into)


def line(name: str, *figures: str) -> str:
    return f"{name:24}" + "".join(f"{text:>15}" for text in figures)


def parse() -> argparse.Namespace:
    parser = option_parser("servers", __doc__)
    parser.add_argument(
        "--duration", type=float, default=8, metavar="SECONDS", help="for each number of clients (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds", type=int, default=3, metavar="N", help="times that each server is measured (default: %(default)s)"
    )
    parser.add_argument(
        "--concurrency", default="1,16", metavar="N,N", help="numbers of clients (default: %(default)s)"
    )
    parser.add_argument(
        "--only", metavar="NAME,NAME", help=f"some of {', '.join(server.name for server in SERVERS)} (default: all)"
    )
    parser.add_argument(
        "--model", type=Path, default=EMBEDDED_MODEL, metavar="FILE.onnx", help="default: the embedded model"
    )
    parser.add_argument("--image", type=Path, default=STREET, metavar="FILE", help="default: examples/street.jpg")
    add_output(parser, "servers.json")
    parser.add_argument(
        "--log", type=Path, default=Path(os.devnull), metavar="FILE", help="what the servers say (default: nowhere)"
    )
    options = parser.parse_args()
    known = [server.name for server in SERVERS]
    options.only = options.only.split(",") if options.only else known
    if unknown := set(options.only) - set(known):
        parser.error(f"--only: there is no {', '.join(sorted(unknown))}; choose from {', '.join(known)}")
    return options


def main() -> None:
    options = parse()
    concurrency = bench.read_concurrency(options.concurrency)
    versions = {server.name: version(server.package) for server in SERVERS if server.name in options.only}
    servers = [server for server in SERVERS if versions.get(server.name)]
    if not servers:
        sys.exit("none of these servers is installed here; pip install -r benchmarks/requirements-peers.txt")
    faults = {name: "not installed" for name, found in versions.items() if not found}

    os.environ["ENCNET_MODEL"] = str(options.model.resolve())
    os.environ[THREADS] = "0"
    segmenter = Segmenter()
    picture = options.image.read_bytes()
    wanted = segmenter(picture)
    pixels = decode(picture, max_bytes=len(picture), max_pixels=segmenter.settings.max_pixels).pixels
    narrow = Engine(options.model, "cpu", 1)
    narrow.warm_up()

    bare = {name: Figures() for name in ("all cores", "side by side")}
    served: dict[str, dict[int, Figures]] = {server.name: defaultdict(Figures) for server in servers}
    paths = {server.name: Figures() for server in servers}
    for turn in range(options.rounds):
        bare_loop([segmenter.engine], pixels, options.duration, bare["all cores"])
        bare_loop([narrow] * CORES, pixels, options.duration, bare["side by side"])
        print(f"round {turn + 1}: bare", *(f"{name} {one.rate:.2f}/s" for name, one in bare.items()), flush=True)
        for server in servers[turn % len(servers) :] + servers[: turn % len(servers)]:
            if server.name in faults:
                continue
            try:
                with running(server, options.model.resolve(), options.log) as port:
                    target = bench.Target("127.0.0.1", port, False, server.path, {}, timeout=60)
                    wait_until_right(target, picture, wanted)
                    bench.measure(target, [picture], 2 * CORES, WARM_SECONDS, lambda passed: None)
                    for clients in concurrency:
                        into = served[server.name][clients]
                        if clients == 1:
                            path = paths[server.name]
                            measure_alone(target, segmenter, picture, wanted, options.duration, into, path)
                        else:
                            measure(target, picture, wanted, clients, options.duration, into)
            except BenchmarkError as error:
                faults[server.name] = str(error)
            rates = (f"{clients} clients {one.rate:.2f}/s" for clients, one in served[server.name].items())
            print(f"  {server.name}:", faults.get(server.name) or ", ".join(rates), flush=True)

    report = summary(bare, {name: found for name, found in served.items() if name not in faults}, paths, concurrency)
    result = {
        "command": f"python -m benchmarks.servers --duration {options.duration:g} --rounds {options.rounds} "
        f"--concurrency {options.concurrency}",
        "commit": commit(),
        "hardware": f"{hardware()}, {processor()}",
        "model": segmenter.engine.metadata.name,
        "picture": {"bytes": len(picture), "width": pixels.shape[1], "height": pixels.shape[0]},
        "versions": {"python": platform.python_version(), "onnxruntime": onnxruntime.__version__}
        | {server.package: versions[server.name] for server in servers},
        "not measured": faults,
        "set-up": {server.name: server.how for server in servers},
        "answers are the same bytes": True,
        **report,
    }
    write_json(options.output, result)


def summary(
    bare: dict[str, Figures],
    served: dict[str, dict[int, Figures]],
    paths: dict[str, Figures],
    concurrency: Sequence[int],
) -> dict[str, Any]:
    """The figures for JSON, printed as a table on the way; ratios are to ours where that was measured."""
    rows: dict[str, Any] = {}
    for clients in concurrency:
        ours = served.get(OURS, {}).get(clients)
        print(f"\n{clients} clients")
        print(line("", "answers/s", "x ours", "p50 ms", "p99 ms", "p99 x ours", "p50 - path ms"))
        for name, levels in served.items():
            found = levels[clients]
            row = {
                "answers": found.answers,
                "answers_per_second": round(found.rate, 3),
                "p50_ms": round(found.percentile(50), 2),
                "p99_ms": round(found.percentile(99), 2),
            }
            if ours:
                row["rate_to_ours"] = round(found.rate / ours.rate, 3)
                row["p99_to_ours"] = round(found.percentile(99) / ours.percentile(99), 3)
            if clients == 1:
                path_ms = paths[name].percentile(50)
                row |= {"path_p50_ms": round(path_ms, 2), "added_ms": round(found.percentile(50) - path_ms, 2)}
            rows.setdefault(name, {})[str(clients)] = row
            columns = ("answers_per_second", "rate_to_ours", "p50_ms", "p99_ms", "p99_to_ours", "added_ms")
            print(line(name, *(str(row.get(column, "-")) for column in columns)))
    loops = {name: {"answers_per_second": round(one.rate, 3)} for name, one in bare.items()}
    most = served.get(OURS, {}).get(max(concurrency))
    for name, one in bare.items():
        if most:
            loops[name]["ours_to_this"] = round(most.rate / one.rate, 3)
        print(line(f"bare: {name}", f"{one.rate:.3f}", *([f"ours {most.rate / one.rate:.3f}x"] if most else [])))
    return {"bare": loops, "servers": rows}


if __name__ == "__main__":
    main()
