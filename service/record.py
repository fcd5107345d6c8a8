"""The record of an output folder, presence.jsonl: which pictures are done, into which files, and what is in them.

A line is appended for a picture once its files are complete. A picture's line is taken back before its files are
replaced, so the record never speaks of files that are not there.
"""

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.files import whole
from service.folders import MASK_SUFFIX

RECORD = "presence.jsonl"

Entry = dict[str, Any]


class OutputBusy(Exception):
    """Another run is writing to the output folder."""


@dataclass(frozen=True)
class Done:
    """What the record knows of a picture without reading its line, which is `length` bytes from `offset` on."""

    name: str
    picture_bytes: int
    changed_ns: int
    made_with: dict[str, Any]
    files: dict[str, int]
    offset: int
    length: int


class Record:
    """The record of an output folder: what is done, on disk at once and never half.

    Opened by `open_record`, which sees to it that there is one at a time. Raises OSError where the folder cannot be
    written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.done: dict[str, Done] = {}  # by source, oldest first
        self._path = folder / RECORD
        self._lines = 0
        self._file = self._path.open("a+b")
        self._read()

    def _read(self) -> None:
        """Take in the lines of earlier runs; the last one about a picture counts, and one cut short does not."""
        self._file.seek(0)
        offset, line = 0, b"\n"
        for line in self._file:
            self._take(line, offset)
            offset += len(line)
        if not line.endswith(b"\n"):
            self._append(b"\n")

    def _take(self, line: bytes, offset: int) -> None:
        self._lines += 1
        try:
            entry = json.loads(line)
            source, facts = entry["source"], entry.get("done")
            self.done.pop(source, None)
            if facts is not None:
                name = entry["mask"].removesuffix(MASK_SUFFIX)
                self.done[source] = Done(name, **facts, offset=offset, length=len(line))
        except (ValueError, TypeError, KeyError, AttributeError):
            return

    def _append(self, line: bytes) -> int:
        """Where the line begins."""
        offset = self._file.seek(0, os.SEEK_END)
        self._file.write(line)
        self._file.flush()
        return offset

    def add(self, entry: Entry) -> None:
        """Record a picture whose files are complete."""
        line = json_line(entry)
        self._take(line, self._append(line))

    def take_back(self, source: str) -> set[str]:
        """Forget a picture, before its files are replaced; the names of those it had."""
        done = self.done.get(source)
        if done is None:
            return set()
        self.add({"source": source})
        return set(done.files)

    def replace(self, before: Iterable[str], entry: Entry) -> None:
        """Record a picture whose files are complete, and remove those of `before` that it no longer has."""
        for name in set(before) - set(entry["done"]["files"]):
            (self.folder / name).unlink(missing_ok=True)
        self.add(entry)

    def is_complete(self, source: str) -> bool:
        """Whether the outputs of a recorded picture are there, with the sizes they were written with."""
        try:
            return all((self.folder / name).stat().st_size == size for name, size in self.done[source].files.items())
        except OSError:
            return False

    def line(self, source: str) -> bytes:
        """The whole line about a picture, as JSON."""
        done = self.done[source]
        self._file.seek(done.offset)
        return self._file.read(done.length)

    def compact(self) -> None:
        """Drop the lines that no longer count."""
        if self._lines != len(self.done):
            with whole(self._path) as file:
                file.writelines(map(self.line, self.done))

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()


@contextmanager
def open_record(folder: Path) -> Iterator[Record]:
    """The record of an output folder, which is made if needed.

    Raises OutputBusy where another run has it open, and OSError where it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        _lock(lock, folder)
        record = Record(folder)
        try:
            yield record
            record.compact()
        finally:
            record.close()
    finally:
        os.close(lock)


def _lock(folder_descriptor: int, folder: Path) -> None:
    """Held until the descriptor is closed, also by the death of the process."""
    try:
        fcntl.flock(folder_descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OutputBusy(f"another run is writing to {folder}; wait for it, or choose another --output") from None
    except OSError:
        return  # a file system without locks


def json_line(value: Any) -> bytes:
    """The value as one line of JSON, in UTF-8."""
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"
