"""Weights in files of at most 15 MB, and back: for places that take no large file.

    python -m benchmarks.split_weights split runs/mine/final.pt parts/
    python -m benchmarks.split_weights join parts/ final.pt

Beside the parts lies manifest.json with the name, size and SHA-256 of the whole and of every part.
"""

import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

from benchmarks.command import option_parser, write_json
from model.files import replacing

PART_BYTES = 15_000_000
MANIFEST = "manifest.json"
PART = re.compile(r"\.part\d{3,}$")


class PartsError(ValueError):
    """Parts that do not make the file they came from; the message says which and why."""


def entry(name: str, content: bytes) -> dict[str, Any]:
    return {"file": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def split(file: Path, folder: Path, part_bytes: int = PART_BYTES) -> list[Path]:
    """Write the file's parts and their manifest into the folder, instead of any parts that it has; the parts' paths."""
    content = file.read_bytes()
    folder.mkdir(parents=True, exist_ok=True)
    before = {path for path in folder.iterdir() if PART.search(path.name)}
    parts, entries = [], []
    for number, start in enumerate(range(0, max(len(content), 1), part_bytes)):
        part = folder / f"{file.name}.part{number:03}"
        with replacing(part) as target:
            target.write(content[start : start + part_bytes])
        parts.append(part)
        entries.append(entry(part.name, content[start : start + part_bytes]))
    write_json(folder / MANIFEST, entry(file.name, content) | {"parts": entries})
    for old in before.difference(parts):
        old.unlink()
    return parts


def join(folder: Path, file: Path) -> None:
    """Write the file that was split into the folder. Raises PartsError where a part is missing or not as it was."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        whole, parts = (manifest["file"], manifest["bytes"], manifest["sha256"]), manifest["parts"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PartsError(f"{folder / MANIFEST}: not the manifest of a split file: {error!r}") from error
    pieces = []
    for part in parts:
        path = folder / Path(part["file"]).name
        if not path.is_file():
            raise PartsError(f"{path}: this part is missing; there must be {len(parts)}")
        pieces.append(path.read_bytes())
        if entry(part["file"], pieces[-1]) != part:
            raise PartsError(f"{path}: this part is not as it was written: {part['bytes']} bytes, SHA-256 as listed")
    content = b"".join(pieces)
    if tuple(entry(whole[0], content).values()) != whole:
        raise PartsError(f"{folder}: the parts are as written, but do not make {whole[0]}")
    with replacing(file) as target:
        target.write(content)


def main(arguments: list[str] | None = None) -> int:
    parser = option_parser("split_weights", __doc__)
    parser.add_argument("verb", choices=("split", "join"))
    parser.add_argument("source", type=Path, help="a file to split, or a folder of parts")
    parser.add_argument("target", type=Path, help="the folder for the parts, or the file to make")
    options = parser.parse_args(arguments)
    try:
        if options.verb == "split":
            parts = split(options.source, options.target)
            print(f"{len(parts)} parts and {MANIFEST} in {options.target}")
        else:
            join(options.source, options.target)
            print(f"{options.target}: {options.target.stat().st_size} bytes, as they were")
    except (PartsError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
