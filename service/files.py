"""Files that appear whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EISDIR
from pathlib import Path
from typing import IO


@contextmanager
def whole(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that takes its name only when it is complete; until then, or after a failure, nothing changes."""
    part = part_of(path)
    try:
        with part.open("wb") as file:
            yield file
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Raise OSError where `whole` could not make this file: now, not after long work."""
    if path.is_dir():
        raise IsADirectoryError(EISDIR, os.strerror(EISDIR), str(path))
    part = part_of(path)
    part.open("wb").close()
    part.unlink()


def part_of(path: Path) -> Path:
    """What the file is called while it is being written."""
    return path.with_name(f".{path.name}.part")
