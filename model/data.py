"""Data sets on disk, whatever their layout: open a split, read its pairs, check them."""

import dataclasses
import hashlib
import os
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy

from model.layouts import layout_of
from model.layouts.split import DataError, LabelRule, read_classes, read_image, to_rgb, upright
from model.losses import IGNORE

__all__ = [
    "SPLITS",
    "DataError",
    "SegmentationData",
    "leave_out",
    "open_dataset",
    "problems",
    "read",
    "read_classes",
    "repeats",
]

SPLITS = ("train", "val", "test")
READERS, AHEAD = min(8, os.cpu_count() or 1), 16  # threads that decode, and pictures that wait for their turn


@dataclass(frozen=True)
class SegmentationData:
    """One split: pictures and label maps by path, read on demand.

    layout: the name of its layout; ids: what to call each picture; pairs: (picture, label) paths; rule and read_label:
    see model/layouts/split.py.
    """

    root: Path
    split: str
    layout: str
    classes: list[str]
    palette: list[list[int]]
    ids: list[str]
    pairs: list[tuple[Path, Path]]
    rule: LabelRule
    read_label: Callable[[Path], numpy.ndarray]

    def __len__(self) -> int:
        return len(self.pairs)

    def load(self, index: int) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Picture uint8 (H, W, 3) RGB and mask uint8 (H, W), values 0..C-1 and 255 = ignore.

        A picture that its EXIF block turns by a quarter is turned where the label map has the turned size.
        Raises DataError when either file is missing, unreadable, of another size, or has labels out of range.
        """
        image_path, label_path = self.pairs[index]
        stored = read_image(image_path, "picture")
        raw = self.read_label(label_path)
        height, width = raw.shape
        try:
            turned = (height, width) == stored.size != (width, height)
            image = to_rgb(upright(stored) if turned else stored)
        except ValueError as error:
            raise DataError(f"{image_path}: not a readable picture: {error}") from error
        if (width, height) != image.size:
            raise DataError(
                f"{label_path}: a label map must have its picture's size, "
                f"{image.width}x{image.height}, this one is {width}x{height}"
            )
        try:
            return numpy.array(image), self.rule(raw)
        except DataError as error:
            raise DataError(f"{label_path}: {error}") from error


def open_dataset(root: Path, split: str, layout: str = "") -> SegmentationData:
    """List one split of the data set under `root`, whose layout is recognised where it is not named.

    Raises DataError when the folder, its classes or the split are missing, naming what was looked for.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such data folder")
    if split not in SPLITS:
        raise DataError(f"unknown split {split!r}; splits are {', '.join(SPLITS)}")
    chosen = layout_of(root, layout)
    listed = chosen.list_split(root, split)
    return SegmentationData(root, split, chosen.name, **vars(listed))


def leave_out(data: SegmentationData, ids: Sequence[str]) -> SegmentationData:
    """The same split without these pictures. Raises DataError for an ID that it does not have, or if none is left."""
    unknown = [identifier for identifier in ids if identifier not in data.ids]
    if unknown:
        raise DataError(f"{data.root}: the {data.split} split has no picture {', '.join(unknown)}")
    kept = [index for index, identifier in enumerate(data.ids) if identifier not in ids]
    if not kept:
        raise DataError(f"{data.root}: nothing is left of the {data.split} split without its {len(data)} pictures")
    return dataclasses.replace(
        data, ids=[data.ids[index] for index in kept], pairs=[data.pairs[index] for index in kept]
    )


def read(data: SegmentationData, pictures: int) -> Iterator[tuple[numpy.ndarray, numpy.ndarray]]:
    """The first pictures with their labels, in order, a few of them decoded ahead by several threads.

    Raises DataError as `load` does.
    """
    indexes = iter(range(pictures))
    with ThreadPoolExecutor(READERS) as threads:
        waiting = deque(threads.submit(data.load, index) for index in islice(indexes, AHEAD))
        while waiting:
            sample = waiting.popleft().result()
            waiting.extend(threads.submit(data.load, index) for index in islice(indexes, 1))
            yield sample


def problems(data: SegmentationData) -> Iterator[str | None]:
    """Read every pair; yields per pair, in order, None or the sentence saying which file breaks which rule.

    One more sentence follows where no label map has a pixel that counts.
    """
    blank = []

    def problem(index: int) -> str | None:
        try:
            _, mask = data.load(index)
        except DataError as error:
            return str(error)
        if (mask == IGNORE).all():
            blank.append(index)
        return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(problem, range(len(data)))
    if len(blank) == len(data):
        yield f"{data.root}: no label map of the {data.split} split has a pixel of a class; all are ignored"


def repeats(splits: Sequence[SegmentationData]) -> list[str]:
    """A sentence for every picture file that is, byte for byte, one of an earlier split in the sequence."""
    by_size = defaultdict(list)
    for data in splits:
        for identifier, (picture, _) in zip(data.ids, data.pairs, strict=True):
            if picture.is_file():
                by_size[picture.stat().st_size].append((data.split, identifier, picture))
    sentences = []
    for group in by_size.values():
        if len({split for split, _, _ in group}) < 2:
            continue
        seen: dict[bytes, tuple[str, str]] = {}
        for split, identifier, picture in group:
            first = seen.setdefault(hashlib.sha256(picture.read_bytes()).digest(), (split, identifier))
            if first[0] != split:
                sentences.append(f"{split} picture {identifier} is {first[0]} picture {first[1]}, byte for byte")
    return sorted(sentences)
