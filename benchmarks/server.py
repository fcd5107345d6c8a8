"""A real `python -m service serve` in a process of its own."""

import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.command import ROOT

_START_SECONDS = 120
_STOP_SECONDS = 60
_LISTENS = re.compile(r"listens on (http://\S+)")


@dataclass(frozen=True)
class Server:
    """A running server: its URL, and its process and log where it was started here."""

    url: str
    process: "subprocess.Popen[bytes] | None" = None
    log: Path | None = None

    def is_alive(self) -> bool:
        """Whether the process that was started still runs; a server that was only given a URL for counts as alive."""
        return self.process is None or self.process.poll() is None

    def tracebacks(self) -> int:
        """How many tracebacks its log has."""
        return self.log.read_text(errors="replace").count("Traceback (most recent call last)") if self.log else 0

    def resident_bytes(self) -> int:
        """Resident memory, as the server itself tells it."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            found = re.search(r"^process_resident_memory_bytes (\S+)", answer.read().decode(), re.MULTILINE)
        if not found:
            raise RuntimeError(f"{self.url}/metrics does not tell resident memory")
        return int(float(found[1]))


@contextmanager
def serving(url: str | None = None, *arguments: str, **environment: str) -> Iterator[Server]:
    """The server at `url`, or one started for the occasion with these `serve` arguments and ENCNET_ settings.

    Raises RuntimeError where it does not start, with the end of its log.
    """
    if url:
        yield Server(url.rstrip("/"))
        return
    clean = {name: value for name, value in os.environ.items() if not name.startswith("ENCNET_")}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "service", "serve", "--port", "0", *arguments],
                cwd=ROOT,
                env={**clean, "PYTHONUNBUFFERED": "1", **environment},
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            yield Server(_address(process, log), process, log)
        finally:
            process.terminate()
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _address(process: "subprocess.Popen[bytes]", log: Path) -> str:
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        if found := _LISTENS.search(log.read_text(errors="replace")):
            return found[1].rstrip("/")
        time.sleep(0.05)
    raise RuntimeError(f"the server did not start:\n{log.read_text(errors='replace')[-2000:]}")
