"""Half an hour of everything at once: resident memory stays where it is after the warm-up.

    python -m benchmarks.soak [--minutes 30] [--url URL]

A few clients send pictures of every format and of many sizes with all kinds of options, batches, requests of the Open
Inference Protocol and of Hugging Face's clients, and questions about the service; a tenth of the requests is malformed,
and a tenth of the clients leaves before the answer. A seed decides the order. Memory is read every few seconds: the
median of the last tenth of the time may be 5 % above that of the tenth after the warm-up, which is the first fifth.
"""

import base64
import itertools
import json
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.progress import Progress

from benchmarks.command import conclude, option_parser
from benchmarks.malformed import TIMEOUT_MS, Stock, Tally, malformed, send, stock_for, table
from benchmarks.pictures import photo
from benchmarks.server import Server, serving
from benchmarks.wire import Request, form, request_bytes

GROWTH = 0.05
WARM_UP, WINDOW = 0.2, 0.1  # shares of the time

SIZES = ((32, 24), (120, 90), (240, 320), (480, 360), (640, 480), (1280, 720), (1600, 1200), (3000, 2000), (1000, 1))
LARGEST_SIDE = 2000  # of bombs that are decoded: no larger than the pictures

_FORMATS = ("json", "png", "overlay", "rle", "polygons", "npz", "multipart")
_SCALES = ("0.25", "0.25", "0.5", "0.25,0.5", "1")


def mixed(seed: int, stock: Stock, sizes: tuple[tuple[int, int], ...] = SIZES) -> Iterator[Request]:
    """Requests of all kinds without end, the same for the same seed and stock."""
    rng = random.Random(seed)
    pictures = {**stock.real, **{f"{width}x{height}": photo(width, height) for width, height in sizes}}
    bad = malformed(seed, stock)
    makers: dict[Callable[[], Request], int] = {
        lambda: _picture(rng, pictures): 50,
        lambda: _batch(rng, pictures): 8,
        lambda: _hugging_face(rng, pictures): 5,
        lambda: _infer(rng, stock): 12,
        lambda: next(bad): 10,
        lambda: replace(_picture(rng, pictures), name="departing", due=False, leaves_after=rng.uniform(0, 0.2)): 10,
        lambda: _question(rng, stock): 10,
    }
    while True:
        (maker,) = rng.choices(list(makers), list(makers.values()))
        yield maker()


def _picture(rng: random.Random, pictures: dict[str, bytes]) -> Request:
    options = {"scales": rng.choice(_SCALES), "format": rng.choice(_FORMATS)}
    if rng.random() < 0.2:
        options["flip"] = "true"
    if rng.random() < 0.2:
        options["max_side"] = str(rng.choice((64, 333, 800)))
    if rng.random() < 0.1:
        options |= {"window": "300", "scales": "0.25", "max_side": "900"}
    name, data = rng.choice(list(pictures.items()))
    if rng.random() < 0.5:
        content_type, body = form(list(options.items()), [("image", name, "image/png", data)])
        return Request("form", request_bytes("POST", "/segment", [("Content-Type", content_type)], body))
    query = "&".join(f"{option}={value}" for option, value in options.items())
    return Request("body", request_bytes("POST", f"/segment?{query}", [("Content-Type", "image/png")], data))


def _batch(rng: random.Random, pictures: dict[str, bytes]) -> Request:
    chosen = rng.choices(list(pictures.items()), k=rng.randrange(1, 6))
    content_type, body = form([("scales", "0.25")], [("image", name, "image/png", data) for name, data in chosen])
    return Request("batch", request_bytes("POST", "/segment/batch", [("Content-Type", content_type)], body))


def _hugging_face(rng: random.Random, pictures: dict[str, bytes]) -> Request:
    data = rng.choice(list(pictures.values()))
    if rng.random() < 0.5:
        return Request("hf", request_bytes("POST", "/hf", [("Content-Type", "image/png")], data))
    described = {"inputs": base64.b64encode(data).decode("ascii"), "parameters": {"threshold": 0.5}}
    return Request(
        "hf", request_bytes("POST", "/hf", [("Content-Type", "application/json")], json.dumps(described).encode())
    )


def _infer(rng: random.Random, stock: Stock) -> Request:
    count, height, width = rng.randrange(1, 4), rng.randrange(16, 300), rng.randrange(16, 300)
    pixels = rng.randbytes(count * height * width * 3)
    image = {
        "name": "image",
        "datatype": "UINT8",
        "shape": [count, height, width, 3],
        "parameters": {"binary_data_size": len(pixels)},
    }
    head = json.dumps({"inputs": [image], "parameters": {"scales": 0.25, "binary_data_output": rng.random() < 0.5}})
    headers = [("Inference-Header-Content-Length", str(len(head)))]
    headers += [("Accept-Encoding", "gzip")] if rng.random() < 0.3 else []
    return Request("v2", request_bytes("POST", f"/v2/models/{stock.model}/infer", headers, head.encode() + pixels))


def _question(rng: random.Random, stock: Stock) -> Request:
    path = rng.choice(("/", "/readyz", "/classes", "/models", "/openapi.json", "/nowhere", f"/v2/models/{stock.model}"))
    return Request("question", request_bytes("GET", path))


def run(
    server: Server, seconds: float, clients: int, requests: Iterator[Request], tick: Callable[[float], object]
) -> tuple[list[tuple[float, int]], Tally]:
    """Load the server for so long; (seconds, resident bytes) sampled meanwhile, and what came back."""
    started = time.monotonic()
    in_time = itertools.takewhile(lambda _: time.monotonic() < started + seconds, requests)
    tallies: list[Tally] = []
    load = threading.Thread(target=lambda: tallies.append(send(server.url, in_time, clients)), daemon=True)
    load.start()
    samples: list[tuple[float, int]] = []
    while load.is_alive() and server.is_alive():
        samples.append((time.monotonic() - started, server.resident_bytes()))
        tick(samples[-1][0])
        load.join(min(5.0, seconds / 100))
    load.join()
    return samples, tallies[0]


def growth(samples: list[tuple[float, int]], seconds: float) -> tuple[float, float]:
    """Median resident bytes after the warm-up and at the end."""
    windows = ((WARM_UP, WARM_UP + WINDOW), (1 - WINDOW, float("inf")))
    first, last = (
        statistics.median(size for at, size in samples if start * seconds <= at <= end * seconds)
        for start, end in windows
    )
    return first, last


def main() -> None:
    parser = option_parser("soak", __doc__)
    parser.add_argument("--minutes", type=float, default=30, metavar="N", help="of load (default: %(default)s)")
    parser.add_argument("--clients", type=int, default=4, metavar="N", help="requests at a time (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="decides the requests (default: %(default)s)")
    parser.add_argument("--url", help="a running server; without it, one is started with the embedded model")
    options = parser.parse_args()
    seconds = options.minutes * 60
    console = Console()
    with (
        serving(options.url, ENCNET_TIMEOUT_MS=str(TIMEOUT_MS)) as server,
        Progress(console=Console(stderr=True)) as progress,
    ):
        stock = stock_for(server.url, LARGEST_SIDE)
        bar = progress.add_task("loading", total=seconds)
        requests = mixed(options.seed, stock)
        samples, tally = run(
            server, seconds, options.clients, requests, lambda at: progress.update(bar, completed=min(at, seconds))
        )
        alive, tracebacks = server.is_alive(), server.tracebacks()
    first, last = growth(samples, seconds)
    result: dict[str, Any] = {
        "seconds": seconds,
        "clients": options.clients,
        "seed": options.seed,
        "requests": sum(tally.answers.values()),
        "promises": {
            f"memory grows by at most {GROWTH:.0%}": last <= first * (1 + GROWTH),
            "no answer was a 5xx or not well formed": not tally.failures,
            "the process lives": alive,
            "its log has no traceback": tracebacks == 0,
        },
        "memory_mb": {
            "after_warm_up": round(first / 2**20, 1),
            "at_the_end": round(last / 2**20, 1),
            "growth_percent": round(100 * (last / first - 1), 2),
            "most": round(max(size for _, size in samples) / 2**20, 1),
        },
        "answers": {f"{status} {code}": number for (status, code), number in sorted(tally.by_code().items())},
        "failures": [str(failure) for failure in tally.failures[:20]],
        "samples_mb": [[round(at), round(size / 2**20)] for at, size in samples[:: max(1, len(samples) // 60)]],
    }
    console.print(table(tally))
    console.print(f"memory {result['memory_mb']} MB")
    for failure in result["failures"]:
        console.print(failure, markup=False)
    command = f"python -m benchmarks.soak --minutes {options.minutes:g} --seed {options.seed}"
    conclude("soak.json", command, result)


if __name__ == "__main__":
    main()
