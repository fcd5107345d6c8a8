"""Far more clients than the server has room for: who is let in is in time, who is not is told at once.

    python -m benchmarks.overload [--clients 300] [--seconds 60] [--url URL]

Every client sends a photo, waits for the answer, and sends the next; refused with 429 or 503 it waits as long as
Retry-After says, and up to half as long again, as clients should. The time that a request may take is one of
TIMEOUTS_MS. Meanwhile /livez and /metrics are asked ten times a second. All clients are tasks of one process, which
shares the machine with the server: latencies hold what that costs.
"""

import asyncio
import json
import random
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.command import conclude, option_parser
from benchmarks.pictures import photo
from benchmarks.server import serving
from benchmarks.wire import address, request_bytes

TIMEOUTS_MS = (5_000, 10_000, 30_000)
SLACK_MS = 1_000  # beyond its time, for an answer to be made, sent and read on a machine that is busy
REFUSAL_MS = 50  # median within which a refusal is to be there
POLLED = ("/livez", "/metrics")

_POLL_SECONDS = 0.1
_IDLE_SECONDS = 3  # a server closes connections that idle for longer, uvicorn after five seconds
_DELIBERATE = {503: ("starting", "draining", "model_failed", "device_failed"), 504: ("deadline_passed",)}


@dataclass
class Load:
    """What the clients met: latencies in milliseconds by status, and by polled path; what should not have been."""

    latencies: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    polled: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    faults: Counter[str] = field(default_factory=Counter)
    late: list[float] = field(default_factory=list)  # milliseconds beyond their time, of answers 200

    @property
    def statuses(self) -> dict[int, int]:
        """How many answers had which status."""
        return {status: len(self.latencies[status]) for status in sorted(self.latencies)}


class _Connection:
    """A connection that is opened when it is needed, and kept."""

    def __init__(self, place: tuple[str, int]) -> None:
        self._place = place
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, raw: bytes) -> tuple[int, dict[bytes, bytes], bytes]:
        """Status, headers in lower case, and body. Raises OSError and asyncio.IncompleteReadError."""
        if self._streams is None:
            self._streams = await asyncio.open_connection(*self._place)
        reader, writer = self._streams
        try:
            writer.write(raw)
            await writer.drain()
            head = await reader.readuntil(b"\r\n\r\n")
            first, *lines = head[:-4].split(b"\r\n")
            headers = {name.lower(): value for name, _, value in (line.partition(b": ") for line in lines)}
            body = await reader.readexactly(int(headers[b"content-length"]))
        except BaseException:
            self.close()
            raise
        if headers.get(b"connection", b"").lower() == b"close":
            self.close()
        return int(first.split()[1]), headers, body

    def close(self) -> None:
        """Close; the next request opens it anew."""
        if self._streams is not None:
            self._streams[1].close()
        self._streams = None


async def overload(
    url: str, pictures: Sequence[bytes], clients: int, seconds: float, timeouts_ms: Sequence[int], query: str = ""
) -> Load:
    """Load a server and poll it meanwhile; requests begun in time are waited for."""
    load = Load()
    place = address(url)
    end = time.perf_counter() + seconds

    async def client(number: int) -> None:
        rng = random.Random(number)
        connection = _Connection(place)
        while time.perf_counter() < end:
            timeout_ms = rng.choice(timeouts_ms)
            target = f"/segment?timeout_ms={timeout_ms}{query}"
            raw = request_bytes("POST", target, [("Content-Type", "image/jpeg")], rng.choice(pictures))
            begun = time.perf_counter()
            try:
                status, headers, body = await connection.ask(raw)
            except (OSError, asyncio.IncompleteReadError) as error:
                load.faults[f"no answer: {type(error).__name__}"] += 1
                await asyncio.sleep(1)
                continue
            taken_ms = (time.perf_counter() - begun) * 1000
            load.latencies[status].append(taken_ms)
            if status == 200:
                load.late += [taken_ms - timeout_ms] if taken_ms > timeout_ms else []
            elif status in (429, *_DELIBERATE):
                code = json.loads(body)["error"]["code"]
                if code not in _DELIBERATE.get(status, ("overloaded",)):
                    load.faults[f"{status} {code}"] += 1
                if status != 504:
                    pause = float(headers.get(b"retry-after", b"0"))
                    load.faults["no Retry-After"] += pause < 1
                    pause = max(pause, 1) * rng.uniform(1, 1.5)
                    if pause > _IDLE_SECONDS:
                        connection.close()
                    await asyncio.sleep(min(pause, max(0.0, end - time.perf_counter())))
            else:
                load.faults[f"status {status}"] += 1
        connection.close()

    async def poller(path: str) -> None:
        connection = _Connection(place)
        raw = request_bytes("GET", path)
        while time.perf_counter() < end:
            begun = time.perf_counter()
            try:
                status, _, _ = await connection.ask(raw)
                load.faults[f"{path} {status}"] += status != 200
                load.polled[path].append((time.perf_counter() - begun) * 1000)
            except (OSError, asyncio.IncompleteReadError) as error:
                load.faults[f"{path}: {type(error).__name__}"] += 1
            await asyncio.sleep(_POLL_SECONDS)
        connection.close()

    await asyncio.gather(*(client(number) for number in range(clients)), *(poller(path) for path in POLLED))
    load.faults = +load.faults
    return load


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """How many, p50, p90, p99 and the largest, in milliseconds."""
    if not values:
        return {"count": 0}
    ranks = {f"p{rank}": round(float(np.percentile(values, rank)), 1) for rank in (50, 90, 99)}
    return {"count": len(values), **ranks, "max": round(max(values), 1)}


def result_of(load: Load, seconds: float) -> dict[str, Any]:
    """The figures, and which promises are kept."""
    late = max(load.late, default=0.0)
    refusals = percentiles(load.latencies.get(429, []))
    return {
        "promises": {
            "no status but 200, 429 and deliberate 503 and 504": not load.faults,
            f"answers 200 within their time and {SLACK_MS} ms": late <= SLACK_MS,
            f"429 within {REFUSAL_MS} ms at the median": refusals.get("p50", 0.0) < REFUSAL_MS,
            "/livez and /metrics always answered within a second": all(
                load.polled[path] and max(load.polled[path]) < 1000 for path in POLLED
            ),
        },
        "answers_per_second": round(len(load.latencies.get(200, [])) / seconds, 2),
        "beyond_their_time": {"answers": len(load.late), "max_ms": round(late, 1)},
        "latency_ms": {str(status): percentiles(load.latencies[status]) for status in load.statuses},
        "polled_ms": {path: percentiles(load.polled[path]) for path in POLLED},
        "faults": dict(load.faults),
    }


def main() -> None:
    parser = option_parser("overload", __doc__)
    parser.add_argument(
        "--clients", type=int, default=300, metavar="N", help="clients at a time (default: %(default)s)"
    )
    parser.add_argument("--seconds", type=float, default=60, metavar="N", help="of load (default: %(default)s)")
    parser.add_argument("--url", help="a running server; without it, one is started with the embedded model")
    options = parser.parse_args()
    pictures = [photo(640, 480), photo(480, 360)]
    with serving(options.url) as server:
        asyncio.run(overload(server.url, pictures, 1, 3, TIMEOUTS_MS))  # so that costs are known, as after any start
        load = asyncio.run(overload(server.url, pictures, options.clients, options.seconds, TIMEOUTS_MS))
        alive = server.is_alive()
    result = result_of(load, options.seconds)
    result["promises"]["the process lives"] = alive
    console = Console()
    rows = [*((f"status {status}", row) for status, row in result["latency_ms"].items()), *result["polled_ms"].items()]
    drawn = Table("", "answers", "p50 ms", "p90 ms", "p99 ms", "max ms", box=None, header_style="bold")
    for name, row in rows:
        drawn.add_row(name, *(str(value) for value in row.values()))
    console.print(drawn)
    command = f"python -m benchmarks.overload --clients {options.clients} --seconds {options.seconds:g}"
    conclude("overload.json", command, result)


if __name__ == "__main__":
    main()
