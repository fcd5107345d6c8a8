"""Folders of pictures -> masks, overlays and tables of presence. Killed at any point, a run goes on where it stopped.

An output folder holds

    NAME.mask.png, NAME.overlay.jpg   for each picture, in subfolders like those the pictures were found in
    presence.jsonl                    the record: one line for each picture, appended once its files are complete
    presence.json, presence.csv       the record as one document and as one table, made when a run ends

A picture is done when the record has it as it is now (size and time of change), made by the same model with the same
options, and its files have the sizes they were written with. Files appear whole or not at all, and a picture's line is
taken back before its files are replaced, so the record never speaks of files that are not there.

The table is long, a row for each picture and class: it takes models of any number of classes and all of a row's
figures, and it is what spreadsheets pivot and data frames group.
"""

import csv
import fcntl
import hashlib
import io
import json
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path, PurePath
from threading import Lock
from typing import IO, Any

from service.engine import Engine, Plan
from service.errors import InputError
from service.images import decode
from service.options import Options
from service.presence import presence_rows
from service.render import mask_png, overlay_picture
from service.settings import Settings

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".avif"}
MASK_SUFFIX = ".mask.png"
OVERLAY_SUFFIX = ".overlay.jpg"
RECORD, DOCUMENT, TABLE = "presence.jsonl", "presence.json", "presence.csv"
COLUMNS = ("file", "class", "id", "score", "present", "pixels", "fraction")

_LONGEST_NAME = 200  # bytes; a file system has 255, and what is being written is called .NAME-2.overlay.jpg.part
_WORKERS = 3  # one picture on the device, one being decoded, one being written
_ENTRY_KEYS = ("file", "mask", "overlay", "image", "presence", "infer_ms")

Entry = dict[str, Any]
File = Any  # a pathlib.Path, or a bucket.BucketFile, which has what is needed of one


class OutputBusy(Exception):
    """Another run is writing to the output folder."""


@dataclass(frozen=True)
class Found:
    """A picture file, and the folder it was found in, relative to the folder that was given."""

    file: File
    below: PurePath = Path()


@dataclass(frozen=True)
class Job:
    """A picture, the name of its outputs, and its place relative to the output folder, by which the record knows it.

    A picture in a bucket is known by its URL.
    """

    file: File
    name: str
    source: str


@dataclass(frozen=True)
class Run:
    """What is the same for all pictures of a run."""

    engine: Engine
    settings: Settings
    options: Options
    overlay: bool
    device: Lock = field(default_factory=Lock)

    @property
    def made_with(self) -> dict[str, Any]:
        """All that decides what is in the outputs of a picture, beside the picture."""
        plan = self.plan
        return {
            "model": self.engine.sha256,
            "threshold": self.settings.threshold,
            "scales": list(plan.scales),
            "flip": plan.flip,
            "window": plan.window,
            "stride": plan.stride,
            "max_side": self.options.max_side,
        }

    @property
    def plan(self) -> Plan:
        """How each picture is segmented."""
        options = self.options
        return self.engine.plan(options.scales, options.flip, window=options.window, stride=options.stride)


# ---- which pictures, and how their outputs are called


def find_pictures(paths: Sequence[Path], recursive: bool = False) -> tuple[list[Found], list[dict[str, str]]]:
    """Files as given and the pictures in folders, each once; and an error for each path that has none.

    In a folder, files are taken by their suffix; this program's own outputs and what is hidden are left out. Links to
    folders are not followed.
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
            found.setdefault(os.path.realpath(picture.file), picture)
    return list(found.values()), errors


def _pictures_in(folder: Path, recursive: bool, faults: list[OSError]) -> Iterator[Found]:
    for parent, folders, names in os.walk(folder, onerror=faults.append):
        folders[:] = sorted(name for name in folders if not name.startswith(".")) if recursive else []
        for file in (Path(parent, name) for name in sorted(names)):
            if is_picture_name(file) and (_is(file.is_file) or file.is_symlink()):  # one to nowhere is told of later
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


# ---- the record


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
        line = _json_line(entry)
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

    def is_current(self, job: Job, run: Run) -> bool:
        """Whether a picture need not be segmented again."""
        done = self.done.get(job.source)
        if done is None or done.made_with != run.made_with or not self.is_complete(job.source):
            return False
        try:
            state = job.file.stat()
        except OSError:
            return False
        is_unchanged = (done.picture_bytes, done.changed_ns) == (state.st_size, state.st_mtime_ns)
        return is_unchanged and (not run.overlay or job.name + OVERLAY_SUFFIX in done.files)

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


@contextmanager
def whole(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that takes its name only when it is complete; until then, or after a failure, nothing changes."""
    part = _part(path)
    try:
        with part.open("wb") as file:
            yield file
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _part(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def _json_line(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"


# ---- the run


def plan(pictures: Sequence[Found], record: Record) -> list[Job]:
    """A job for each picture: outputs that are recorded keep their names, the others take names that are free."""
    folder = os.path.realpath(record.folder)
    sources = [
        printable(os.path.relpath(os.path.realpath(file), folder) if isinstance(file, Path) else str(file))
        for file in (picture.file for picture in pictures)
    ]
    names = {source: done.name for source, done in record.done.items()}
    new = [index for index, source in enumerate(sources) if source not in names]
    for index, name in zip(new, output_names([pictures[index] for index in new], names.values()), strict=True):
        names[sources[index]] = name
    return [Job(picture.file, names[source], source) for picture, source in zip(pictures, sources, strict=True)]


def segment_pictures(jobs: Sequence[Job], run: Run, record: Record) -> Iterator[tuple[Job, Entry | InputError]]:
    """Segment, write and record picture after picture; yields each with its entry, or with what was wrong with it.

    One picture is on the device at a time, while others are decoded and written.
    """
    remove_parts(jobs, record.folder)
    earlier: dict[str, set[str]] = {}

    def taken_back() -> Iterator[Job]:
        for job in jobs:
            earlier[job.source] = record.take_back(job.source)
            yield job

    for job, outcome in write_pictures(taken_back(), run, record.folder):
        before = earlier.pop(job.source)
        if not isinstance(outcome, InputError):
            record.replace(before, outcome)
        yield job, outcome


def write_pictures(jobs: Iterable[Job], run: Run, folder: Path) -> Iterator[tuple[Job, Entry | InputError]]:
    """As `segment_pictures`, in the jobs' order, without a record; a job is taken when its turn comes."""
    waiting = iter(jobs)
    with ThreadPoolExecutor(_WORKERS) as pool:
        running: deque[tuple[Job, Future[Entry]]] = deque()
        try:
            while True:
                for job in islice(waiting, _WORKERS + 1 - len(running)):
                    running.append((job, pool.submit(_segment_one, job, run, folder)))
                if not running:
                    return
                job, future = running.popleft()
                try:
                    outcome: Entry | InputError = future.result()
                except InputError as error:
                    outcome = error
                except OSError:
                    raise
                except Exception as error:  # ONNX Runtime's own exceptions share no base class of their own
                    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                    outcome = InputError("model_failed", f"the model failed on this picture: {reason}")
                yield job, outcome
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _segment_one(job: Job, run: Run, folder: Path) -> Entry:
    data, done = _read(job.file, run.settings)
    limits = {"max_bytes": run.settings.max_bytes, "max_pixels": run.settings.max_pixels}
    picture = decode(data, **limits, max_side=run.options.max_side)
    engine = run.engine
    with run.device:
        (result,) = engine.run([picture.pixels], run.plan)
    rows = presence_rows(result.mask, result.presence, engine.metadata.classes, run.settings.threshold)
    metadata = engine.metadata
    texts = {"model": metadata.name, "model_sha256": engine.sha256, "presence": rows}
    outputs = {"mask": (job.name + MASK_SUFFIX, mask_png(result.mask, metadata.classes, metadata.palette, texts))}
    if run.overlay:
        blend = overlay_picture(picture.pixels, result.mask, metadata.palette)
        outputs["overlay"] = (job.name + OVERLAY_SUFFIX, blend)
    for name, content in outputs.values():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with whole(folder / name) as file:
            file.write(content)
    return {
        "file": printable(str(job.file)),
        **{kind: name for kind, (name, _) in outputs.items()},
        "image": {
            "width": picture.size[0],
            "height": picture.size[1],
            "exif_applied": picture.exif_applied,
            "mode": picture.mode,
        },
        "presence": rows,
        "infer_ms": result.infer_ms,
        "source": job.source,
        "done": {
            **done,
            "made_with": run.made_with,
            "files": {name: len(content) for name, content in outputs.values()},
        },
    }


def _read(file: File, settings: Settings) -> tuple[bytes, dict[str, int]]:
    """The picture file and its size and time of change; InputError where unreadable.

    At most one byte more than the limit is read, which is enough for `decode` to refuse.
    """
    try:
        state = file.stat()  # before it is read: what changes meanwhile is found changed the next time
        with file.open("rb") as stream:
            data = stream.read(settings.max_bytes + 1)
    except OSError as error:
        raise InputError("unreadable", f"the file cannot be read: {error.strerror or error}") from None
    return data, {"picture_bytes": state.st_size, "changed_ns": state.st_mtime_ns}


def remove_parts(jobs: Sequence[Job], folder: Path) -> None:
    """Remove what a killed run was writing."""
    for name in [RECORD, DOCUMENT, TABLE, *(job.name + end for job in jobs for end in (MASK_SUFFIX, OVERLAY_SUFFIX))]:
        _part(folder / name).unlink(missing_ok=True)


def write_tables(jobs: Sequence[Job], run: Run, record: Record, errors: Sequence[Mapping[str, str]]) -> int:
    """Write presence.json and presence.csv; returns how many recorded pictures are not in them, being made otherwise.

    In them is each picture in the record that was made like this run's, those of this run first; `errors` are of this
    run. A picture whose outputs are gone is dropped from the record.
    """
    for source in [source for source in record.done if not record.is_complete(source)]:
        record.take_back(source)
    made_with = run.made_with
    sources = dict.fromkeys([*(job.source for job in jobs), *record.done])
    covered = [source for source in sources if source in record.done and record.done[source].made_with == made_with]
    head = {
        "model": {"name": run.engine.metadata.name, "sha256": run.engine.sha256},
        "scales": made_with["scales"],
        "flip": made_with["flip"],
        "errors": errors,
    }
    with whole(record.folder / DOCUMENT) as document, whole(record.folder / TABLE) as table:
        text = io.TextIOWrapper(table, encoding="utf-8", newline="", write_through=True)
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(COLUMNS)
        document.write(_json_line(head)[:-2] + b', "images": [')
        for index, source in enumerate(covered):
            entry = json.loads(record.line(source))
            shown = {key: entry[key] for key in _ENTRY_KEYS if key in entry}
            document.write((b",\n" if index else b"\n") + _json_line(shown)[:-1])
            rows.writerows([entry["file"], *(row[column] for column in COLUMNS[1:])] for row in entry["presence"])
        document.write(b"\n]}\n")
        text.detach()
    return len(record.done.keys() - set(covered))
