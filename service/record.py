"""The record of an output folder, presence.jsonl: which pictures are done, into which files, and what is in them.

A line is appended for a picture once its files are complete. Before they are written, another one takes back what was
said of the picture and names the files: so the record never vouches for files that are not there, and knows, whenever a
run is killed, which of those that are there are its own.
"""

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Sequence
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


@dataclass(frozen=True)
class Begun:
    """What the record knows of a picture that is not done: the files that it may have, of this or an earlier run."""

    name: str
    files: Sequence[str]


class Record:
    """The record of an output folder: what is done, on disk at once and never half.

    Opened by `open_record`, which sees to it that there is one at a time. Raises OSError where the folder cannot be
    written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.done: dict[str, Done] = {}  # by source, oldest first
        self.begun: dict[str, Begun] = {}
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
            source, facts, begun = entry["source"], entry.get("done"), entry.get("begun")
            self.done.pop(source, None)
            self.begun.pop(source, None)
            if begun is not None:
                self.begun[source] = Begun(**begun)
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

    def names(self) -> dict[str, str]:
        """Under which name each picture has, or may have, its files."""
        done = {source: picture.name for source, picture in self.done.items()}
        return done | {source: picture.name for source, picture in self.begun.items()}

    def files(self, source: str) -> set[str]:
        """The files that a picture has, or may have."""
        known = self.done.get(source) or self.begun.get(source)
        return set(known.files) if known else set()

    def take_back(self, source: str, name: str, files: Iterable[str]) -> set[str]:
        """A picture is not done any more, and these files are about to be written for it; returns those it had.

        One that is there and is not among those is not taken for the picture's before the picture is done.
        """
        before = self.files(source)
        new = {file for file in files if not os.path.lexists(self.folder / file)}
        self.add({"source": source, "begun": {"name": name, "files": sorted(before | new)}})
        return before

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
        begun = {
            source: {"name": picture.name, "files": there}
            for source, picture in self.begun.items()
            if (there := [name for name in picture.files if os.path.lexists(self.folder / name)])
        }
        if self._lines != len(self.done) + len(begun):
            with whole(self._path) as file:
                file.writelines(map(self.line, self.done))
                file.writelines(json_line({"source": source, "begun": facts}) for source, facts in begun.items())

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
