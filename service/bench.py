"""Load a running server and measure it: so many clients, each sending its next request when the last is answered.

The load generator shares the machine with the server when both run on one, so it has to be cheap: it is threads of the
standard library's http.client, which cost less CPU a request than clients on asyncio do.

A closed loop waits for a slow server instead of piling up requests as the world does: its percentiles are those of
that many polite clients. A client that is refused (429, 503) asks again at once.
"""

import http.client
import io
import json
import re
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import numpy as np
from PIL import Image
from rich.table import Table

from service.folders import find_pictures

PERCENTILES = (50, 90, 99)
SYNTHETIC_SIZE = (640, 480)

MAX_CLIENTS = 2000  # each is a thread and a socket

_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_HEADER_VALUE = re.compile(r"[\t -~\x80-\xff]*")  # http.client sends Latin-1
_PATH = re.compile(r"[!-~]+")
_PAUSE_AFTER_ERROR = 0.05  # seconds, so that a dead server is not met with a busy loop
_TICK = 0.1  # seconds between two moves of the progress bar


class BenchError(Exception):
    """The server cannot be measured; the message is one sentence that says why."""


@dataclass(frozen=True)
class Target:
    """Where every request goes and what it carries beside the picture; `timeout` in seconds."""

    host: str
    port: int | None
    tls: bool
    path: str
    headers: Mapping[str, str]
    timeout: float

    def connect(self) -> http.client.HTTPConnection:
        """A connection that opens with its first request."""
        kind = http.client.HTTPSConnection if self.tls else http.client.HTTPConnection
        return kind(self.host, self.port, timeout=self.timeout)


@dataclass
class Level:
    """What a number of clients met. Latencies are in milliseconds, from sending to the last byte of the answer.

    `in_time` counts the answers 200 that came within `seconds`; requests begun within it are waited for, and are in
    all other figures. `errors` are requests without any answer, by the reason.
    """

    clients: int
    seconds: float
    in_time: int = 0
    latencies: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    errors: Counter[str] = field(default_factory=Counter)
    sent_bytes: int = 0
    received_bytes: int = 0

    @property
    def rate(self) -> float:
        """Answers 200 a second."""
        return self.in_time / self.seconds

    @property
    def statuses(self) -> dict[int, int]:
        """How many answers had which status."""
        return {status: len(self.latencies[status]) for status in sorted(self.latencies)}

    def latency(self, status: int = 200) -> dict[str, float]:
        """p50, p90, p99, mean and max of the answers with a status; empty where there are none."""
        values = self.latencies.get(status)
        if not values:
            return {}
        named = {f"p{rank}": float(np.percentile(values, rank)) for rank in PERCENTILES}
        return {**named, "mean": float(np.mean(values)), "max": max(values)}

    def as_dict(self) -> dict[str, Any]:
        """The level for JSON."""
        return {
            "clients": self.clients,
            "seconds": self.seconds,
            "answers_per_second": self.rate,
            "statuses": {str(status): number for status, number in self.statuses.items()},
            "errors": dict(self.errors),
            "latency_ms": {str(status): self.latency(status) for status in self.statuses},
            "sent_bytes": self.sent_bytes,
            "received_bytes": self.received_bytes,
        }


def read_target(url: str, options: Mapping[str, str], headers: Mapping[str, str], timeout: float) -> Target:
    """The target that a URL names; without a path it is /segment. `options` are added to the URL's own query.

    Raises BenchError for what is no http:// or https:// URL.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
        (host or "").encode("idna")  # as the connection will
    except UnicodeError:
        raise BenchError(f"{url} is not a URL: the name of its host is too long or not a name") from None
    except ValueError as error:
        raise BenchError(f"{url} is not a URL: {error}") from None
    if parts.scheme not in ("http", "https") or not host:
        raise BenchError(f"{url} is not a URL of a server; it looks like http://127.0.0.1:8000")
    query = "&".join(part for part in (parts.query, urlencode(options)) if part)
    path = (parts.path.rstrip("/") or "/segment") + (f"?{query}" if query else "")
    if not _PATH.fullmatch(path) or " " in host:
        raise BenchError(f"{url} is not a URL: spaces and characters beyond ASCII are written as in %20 and %C3%A9")
    return Target(host, port, parts.scheme == "https", path, headers, timeout)


def read_concurrency(text: str) -> list[int]:
    """Numbers of clients, as in 1,4,16. Raises BenchError for what is not from 1 to MAX_CLIENTS."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = [0]
    if not all(1 <= number <= MAX_CLIENTS for number in numbers):
        raise BenchError(f"--concurrency is numbers from 1 to {MAX_CLIENTS} as in 1,4,16, not {text!r}")
    return numbers


def read_headers(lines: Sequence[str]) -> dict[str, str]:
    """Headers, each as in "Name: value". Raises BenchError for what has no name, or a value that cannot be sent."""
    headers = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not (colon and _HEADER_NAME.fullmatch(name)):
            raise BenchError(f"--header is as in 'Authorization: Bearer KEY', not {line!r}")
        if not _HEADER_VALUE.fullmatch(value):
            raise BenchError(f"--header {name} is one line of Latin-1 characters, not {value.strip()!r}")
        headers[name] = value.strip()
    return headers


def read_pictures(path: Path | None) -> dict[str, bytes]:
    """The picture files to send in turn, by name: a file, those directly inside a folder, or without either a synthetic
    one, which has no name.

    Raises BenchError where there is none.
    """
    if path is None:
        return {"": _synthetic_picture()}
    found, errors = find_pictures([path])
    if errors:
        raise BenchError(f"{path}: {errors[0]['message']}")
    try:
        return {str(picture.file): picture.file.read_bytes() for picture in found}
    except OSError as error:
        raise BenchError(f"{error.filename} cannot be read: {error.strerror}") from None


def _synthetic_picture() -> bytes:
    """A JPEG of smooth colours, the same every time."""
    width, height = SYNTHETIC_SIZE
    coarse = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def try_once(target: Target, picture: bytes, name: str) -> None:
    """One request, so that a wrong address or a refused picture is a sentence and not a table of failures.

    name: the picture's, for that sentence; empty for the synthetic one.

    Raises BenchError unless the server answers 200 or says that it is busy.
    """
    place = f"{target.host}:{target.port or (443 if target.tls else 80)}"
    try:
        status, body = _ask(target.connect(), target, picture)
    except TimeoutError:
        raise BenchError(f"{place} did not answer within {target.timeout:g} s") from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        hint = "`python -m service serve` starts a server"
        raise BenchError(f"no server answers at {place}: {reason.lower()}; {hint}") from None
    if status not in (200, 429, 503):
        sent = f" with {name}" if name else ""
        raise BenchError(f"POST {target.path}{sent} is answered {status}: {_said(body)}")


def _said(body: bytes) -> str:
    """The message of an error, or the beginning of a body that is not the service's."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return " ".join(body[:200].decode(errors="replace").split())


def measure(
    target: Target, pictures: Sequence[bytes], clients: int, seconds: float, tick: Callable[[float], None]
) -> Level:
    """Load the server with so many clients for so many seconds; `tick` is told how many seconds have passed.

    Connections are opened before the clock starts. Raises BenchError where there can be no more threads.
    """
    level = Level(clients, seconds)
    merging = threading.Lock()
    start = threading.Barrier(clients + 1)
    turn = count()

    def client() -> None:
        mine = Level(clients, seconds)
        connection = target.connect()
        with suppress(OSError):
            connection.connect()
        start.wait()
        end = time.perf_counter() + seconds
        while (asked := time.perf_counter()) < end:
            picture = pictures[next(turn) % len(pictures)]
            try:
                status, body = _ask(connection, target, picture)
            except (OSError, http.client.HTTPException) as error:
                mine.errors[_reason(error)] += 1
                connection.close()
                time.sleep(_PAUSE_AFTER_ERROR)
                continue
            answered = time.perf_counter()
            mine.latencies[status].append((answered - asked) * 1000)
            mine.in_time += status == HTTPStatus.OK and answered <= end
            mine.sent_bytes += len(picture)
            mine.received_bytes += len(body)
        connection.close()
        with merging:
            _merge(level, mine)

    threads = [threading.Thread(target=client, daemon=True) for _ in range(clients)]
    for number, thread in enumerate(threads):
        try:
            thread.start()
        except RuntimeError:
            raise BenchError(f"this machine has room for {number} clients, not for {clients}; ask for fewer") from None
    start.wait()
    begun = time.perf_counter()
    for thread in threads:
        while thread.is_alive():
            thread.join(_TICK)
            tick(min(time.perf_counter() - begun, seconds))
    return level


def _ask(connection: http.client.HTTPConnection, target: Target, picture: bytes) -> tuple[int, bytes]:
    """Status and body of one answer."""
    connection.request("POST", target.path, picture, {"Content-Type": "application/octet-stream", **target.headers})
    response = connection.getresponse()
    return response.status, response.read()


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "timed out"
    if isinstance(error, ConnectionRefusedError):
        return "refused"
    if isinstance(error, (ConnectionError, http.client.RemoteDisconnected)):
        return "cut off"
    return type(error).__name__


def _merge(level: Level, other: Level) -> None:
    level.in_time += other.in_time
    level.sent_bytes += other.sent_bytes
    level.received_bytes += other.received_bytes
    level.errors.update(other.errors)
    for status, values in other.latencies.items():
        level.latencies[status] += values


def table(levels: Sequence[Level]) -> Table:
    """A row for each level; a status other than 200, or a kind of error, has a column where it was met."""
    statuses = sorted({200} | {status for level in levels for status in level.statuses})
    errors = sorted({reason for level in levels for reason in level.errors})
    ranks = [f"p{rank}" for rank in PERCENTILES] + ["max"]
    names = ["clients", "answers/s", *(f"{rank} ms" for rank in ranks), *map(str, statuses), *errors, "KB/answer"]
    drawn = Table(*names, box=None, header_style="bold")
    for column in drawn.columns:
        column.justify = "right"
    for level in levels:
        latency, answers = level.latency(), sum(level.statuses.values())
        drawn.add_row(
            str(level.clients),
            f"{level.rate:.1f}",
            *(f"{latency[rank]:.1f}" if latency else "-" for rank in ranks),
            *(str(level.statuses.get(status, 0)) for status in statuses),
            *(str(level.errors[reason]) for reason in errors),
            f"{level.received_bytes / answers / 1000:.1f}" if answers else "-",
        )
    return drawn


def document(url: str, target: Target, pictures: Sequence[bytes], levels: Sequence[Level]) -> str:
    """The figures as JSON."""
    facts = {
        "url": url,
        "path": target.path,
        "pictures": len(pictures),
        "picture_bytes": sum(map(len, pictures)) / len(pictures),
        "levels": [level.as_dict() for level in levels],
    }
    return json.dumps(facts, indent=1) + "\n"
