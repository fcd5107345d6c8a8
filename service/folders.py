"""Which pictures a run over folders takes, and how what it makes of each is called."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".avif"}
MASK_SUFFIX = ".mask.png"
OVERLAY_SUFFIX = ".overlay.jpg"

_LONGEST_NAME = 200  # bytes; a file system has 255, and what is being written is called .NAME-2.overlay.jpg.part

File = Any  # a pathlib.Path, or a bucket.BucketFile, which has what is needed of one


@dataclass(frozen=True)
class Found:
    """A picture file, and the folder it was found in, relative to the folder that was given."""

    file: File
    below: PurePath = Path()


def find_pictures(paths: Sequence[Path], recursive: bool = False) -> tuple[list[Found], list[dict[str, str]]]:
    """Files as given and the pictures in folders, each once; and an error for each path that has none.

    In a folder, files are taken by their suffix; this program's own outputs and what is hidden are left out. Links to
    folders are not followed. A pipe or a device is an error: whoever opens it may wait for ever.
    """
    found: dict[str, Found] = {}
    errors: list[dict[str, str]] = []
    for path in paths:
        if _is(path.is_dir):
            faults: list[OSError] = []
            inside = list(_pictures_in(path, recursive, faults))
            errors += [
                entry_error(Path(fault.filename), "unreadable", f"the folder cannot be read: {fault.strerror}")
                for fault in faults
            ]
            if not inside and not faults:
                hint = "" if recursive else "; --recursive looks in its subfolders too"
                errors.append(entry_error(path, "no_pictures", f"there are no pictures in this folder{hint}"))
        else:
            inside = [Found(path)]
        for picture in inside:
            if _is(picture.file.exists) and not picture.file.is_file():
                errors.append(entry_error(picture.file, "unreadable", "this is no file, but a pipe, socket or device"))
            else:
                found.setdefault(os.path.realpath(picture.file), picture)
    return list(found.values()), errors


def _pictures_in(folder: Path, recursive: bool, faults: list[OSError]) -> Iterator[Found]:
    for parent, folders, names in os.walk(folder, onerror=faults.append):
        folders[:] = sorted(name for name in folders if not name.startswith(".")) if recursive else []
        for file in (Path(parent, name) for name in sorted(names)):
            if is_picture_name(file):
                yield Found(file, file.parent.relative_to(folder))


def _is(kind: Callable[[], bool]) -> bool:
    try:
        return kind()
    except OSError:
        return False


def is_picture_name(path: PurePath) -> bool:
    """Whether a file is taken for a picture where a folder is given: by its suffix, unless it is an output of ours."""
    name = path.name.lower()
    return (
        path.suffix.lower() in IMAGE_SUFFIXES
        and not name.startswith(".")
        and not name.endswith((MASK_SUFFIX, OVERLAY_SUFFIX))
    )


def output_names(pictures: Sequence[Found], taken: Iterable[str] = ()) -> list[str]:
    """A name for each picture's outputs, no two alike nor among `taken`, even where the file system ignores case.

    It is the file's name without suffix, below the folder the picture was found in; where two pictures share that, it
    is the whole file name, numbered if that is shared too. A very long one is cut.
    """
    plain = [_below(picture, picture.file.stem) for picture in pictures]
    count = Counter(map(str.casefold, plain))
    earlier = {name.casefold() for name in taken}
    seen = set(earlier)
    names = []
    for picture, short in zip(pictures, plain, strict=True):
        is_free = count[short.casefold()] == 1 and short.casefold() not in earlier
        base = short if is_free else _below(picture, picture.file.name)
        name, number = base, 1
        while name.casefold() in seen:
            number += 1
            name = f"{base}-{number}"
        seen.add(name.casefold())
        names.append(name)
    return names


def _below(picture: Found, name: str) -> str:
    """The name below the picture's folder; one too long for the files called after it ends in a digest instead."""
    shown = printable(name)
    if len(shown.encode()) > _LONGEST_NAME:
        digest = hashlib.sha256(shown.encode()).hexdigest()[:8]
        shown = f"{shown.encode()[:_LONGEST_NAME].decode(errors='ignore')}-{digest}"
    return printable((picture.below / shown).as_posix())


def entry_error(path: File | str, code: str, message: str) -> dict[str, str]:
    """An entry of the document's `errors`."""
    return {"file": printable(str(path)), "code": code, "message": message}


def printable(name: str) -> str:
    """A file name as text that any file and terminal can hold, also where it is not valid UTF-8 on disk."""
    return name.encode(errors="backslashreplace").decode()
