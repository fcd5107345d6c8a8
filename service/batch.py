"""Folders of pictures -> masks, overlays and tables of presence. Killed at any point, a run goes on where it stopped.

An output folder holds

    NAME.mask.png, NAME.overlay.jpg   for each picture, in subfolders like those the pictures were found in
    presence.jsonl                    the record: one line for each picture, appended once its files are complete, and
                                      until a run ends another for each that was begun
    presence.json, presence.csv       the record as one document and as one table, made when a run ends

A picture is done when the record has it as it is now (size and time of change), made by the same model with the same
options, and its files have the sizes they were written with. Files appear whole or not at all. A file that the record
does not know is somebody else's: a picture that would replace it is refused, unless the run may overwrite.

The table is long, a row for each picture and class: it takes models of any number of classes and all of a row's
figures, and it is what spreadsheets pivot and data frames group.
"""

import csv
import io
import json
import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import Any

from service.engine import Engine, Plan
from service.errors import InputError, first_line
from service.files import part_of, whole
from service.folders import MASK_SUFFIX, OVERLAY_SUFFIX, File, Found, output_names, printable
from service.images import decode
from service.options import Options
from service.presence import presence_rows
from service.record import RECORD, Entry, Record, json_line
from service.render import mask_png, overlay_picture
from service.settings import Settings

DOCUMENT, TABLE = "presence.json", "presence.csv"
COLUMNS = ("file", "class", "id", "score", "present", "pixels", "fraction")

_WORKERS = 3  # one picture on the device, one being decoded, one being written
_ENTRY_KEYS = ("file", "mask", "overlay", "image", "presence", "infer_ms")


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
    overwrite: bool = False
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

    def outputs(self, job: Job) -> list[str]:
        """The files that are written for a picture."""
        return [job.name + end for end in ((MASK_SUFFIX, OVERLAY_SUFFIX) if self.overlay else (MASK_SUFFIX,))]

    @property
    def plan(self) -> Plan:
        """How each picture is segmented."""
        options = self.options
        return self.engine.plan(options.scales, options.flip, window=options.window, stride=options.stride)


def plan(pictures: Sequence[Found], record: Record) -> list[Job]:
    """A job for each picture: outputs in the record keep their names, the others take names that are free."""
    folder = os.path.realpath(record.folder)
    sources = [
        printable(os.path.relpath(os.path.realpath(file), folder) if isinstance(file, Path) else str(file))
        for file in (picture.file for picture in pictures)
    ]
    names = record.names()
    new = [index for index, source in enumerate(sources) if source not in names]
    for index, name in zip(new, output_names([pictures[index] for index in new], names.values()), strict=True):
        names[sources[index]] = name
    return [Job(picture.file, names[source], source) for picture, source in zip(pictures, sources, strict=True)]


def is_current(job: Job, run: Run, record: Record) -> bool:
    """Whether a picture need not be segmented again."""
    done = record.done.get(job.source)
    if done is None or done.made_with != run.made_with or not record.is_complete(job.source):
        return False
    try:
        state = job.file.stat()
    except OSError:
        return False
    is_unchanged = (done.picture_bytes, done.changed_ns) == (state.st_size, state.st_mtime_ns)
    return is_unchanged and (not run.overlay or job.name + OVERLAY_SUFFIX in done.files)


def segment_pictures(jobs: Sequence[Job], run: Run, record: Record) -> Iterator[tuple[Job, Entry | InputError]]:
    """Segment, write and record picture after picture; yields each with its entry, or with what was wrong with it.

    One picture is on the device at a time, while others are decoded and written.
    """
    remove_parts(jobs, record.folder)
    free = yield from refuse_to_replace(jobs, run, record)
    earlier: dict[str, set[str]] = {}

    def taken_back() -> Iterator[Job]:
        for job in free:
            earlier[job.source] = record.take_back(job.source, job.name, run.outputs(job))
            yield job

    for job, outcome in write_pictures(taken_back(), run, record.folder):
        before = earlier.pop(job.source)
        if not isinstance(outcome, InputError):
            record.replace(before, outcome)
        yield job, outcome


def refuse_to_replace(
    jobs: Iterable[Job], run: Run, record: Record
) -> Generator[tuple[Job, InputError], None, list[Job]]:
    """Yields the jobs that would replace files which the record does not know, each with what is wrong with that.

    Returns the others; all of them where the run may overwrite.
    """
    free = []
    for job in jobs:
        unknown = [name for name in run.outputs(job) if name not in record.files(job.source)]
        foreign = [name for name in unknown if os.path.lexists(record.folder / name)]
        if foreign and not run.overwrite:
            text = f"{foreign[0]} is there already, and not in the record of the output folder; --overwrite replaces it"
            yield job, InputError("not_ours", text)
        else:
            free.append(job)
    return free


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
                    outcome = InputError("model_failed", f"the model failed on this picture: {first_line(error)}")
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
        part_of(folder / name).unlink(missing_ok=True)


def write_tables(jobs: Sequence[Job], run: Run, record: Record, errors: Sequence[Mapping[str, str]]) -> int:
    """Write presence.json and presence.csv; returns how many recorded pictures are not in them, being made otherwise.

    In them is each picture in the record that was made like this run's, those of this run first; `errors` are of this
    run. A picture whose outputs are gone is dropped from the record.
    """
    for source in [source for source in record.done if not record.is_complete(source)]:
        record.take_back(source, record.done[source].name, ())
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
        document.write(json_line(head)[:-2] + b', "images": [')
        for index, source in enumerate(covered):
            entry = json.loads(record.line(source))
            shown = {key: entry[key] for key in _ENTRY_KEYS if key in entry}
            document.write((b",\n" if index else b"\n") + json_line(shown)[:-1])
            rows.writerows([entry["file"], *(row[column] for column in COLUMNS[1:])] for row in entry["presence"])
        document.write(b"\n]}\n")
        text.detach()
    return len(record.done.keys() - set(covered))
