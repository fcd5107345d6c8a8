"""PASCAL-Context, 59 classes on VOC 2010's pictures; label 0 is background and, as in the paper, ignored.

Label maps are read in three forms: trainval_merged.json, from which PyTorch-Encoding makes its train.pth and val.pth
(these are not needed); SegmentationClassContext/, the PNGs that mmsegmentation makes from it; and the
59_context_labels/ of the data set's authors, who number the classes in another order, told by their 59_labels.txt.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from model.layouts.split import (
    CLASSES,
    DataError,
    LabelRule,
    Layout,
    Split,
    first_with,
    no_test_labels,
    read_classes,
    read_grey,
    read_ids,
    read_text,
    require,
)
from model.losses import IGNORE

TITLE = "PASCAL-Context"
SOURCE = "VOCtrainval_03-May-2010.tar (http://host.robots.ox.ac.uk/pascal/VOC/voc2010)"
LABEL_SOURCE = (
    "the PASCAL in Detail challenge (trainval_merged.json), mmsegmentation's conversion of it "
    "(SegmentationClassContext/) or https://cs.stanford.edu/~roozbeh/pascal-context (59_context_labels/)"
)
ANNOTATIONS, CONVERTED, ORIGINAL = "trainval_merged.json", "SegmentationClassContext", "59_context_labels"
# Of the 459 categories of the full annotation, those of classes 0, 1, 2, ...
CATEGORIES = (
    2, 9, 18, 19, 22, 23, 25, 31, 33, 34, 44, 45, 46, 59, 65, 68, 72, 80, 85, 98, 104, 105, 113, 115, 144, 158, 159,
    162, 187, 189, 207, 220, 232, 258, 259, 260, 284, 295, 296, 308, 324, 326, 347, 349, 354, 355, 360, 366, 368, 397,
    415, 416, 420, 424, 427, 440, 445, 454, 458,
)  # fmt: skip
CATEGORY_RULE = LabelRule(
    {0: IGNORE} | {category: index for index, category in enumerate(CATEGORIES)},
    "0 (background, ignored) or one of the 59 categories",
)
CONVERTED_RULE = LabelRule({0: IGNORE} | {raw: raw - 1 for raw in range(1, 60)}, "0 (background, ignored) or 1..59")
# What the data set's authors call otherwise.
OTHER_NAMES = {"diningtable": "table", "bedcloth": "bedclothes", "clothes": "cloth"}


def base(root: Path) -> Path | None:
    return first_with(root, ("", "VOC2010", "VOCdevkit/VOC2010"), ANNOTATIONS, CONVERTED, ORIGINAL)


def list_split(root: Path, split: str) -> Split:
    no_test_labels(TITLE, split)
    folder = base(root)
    if folder is None:
        place = root if root.name == "VOC2010" else root / "VOCdevkit" / "VOC2010"
        raise DataError(f"{TITLE}: no label maps in {place}; they come with {LABEL_SOURCE}")
    require(TITLE, folder / "JPEGImages", "the pictures", SOURCE)
    names, palette = read_classes(CLASSES / "context.json")
    read_label: Callable[[Path], numpy.ndarray] = read_grey
    if (folder / CONVERTED).is_dir():
        ids, rule = read_ids(folder / "ImageSets" / "SegmentationContext" / f"{split}.txt"), CONVERTED_RULE
        labels = [folder / CONVERTED / f"{name}.png" for name in ids]
    elif (folder / ANNOTATIONS).is_file():
        annotations = read_annotations(folder / ANNOTATIONS, split)
        ids, rule, read_label = list(annotations.sizes), CATEGORY_RULE, annotations.read
        labels = [folder / ANNOTATIONS / name for name in ids]
    else:
        require(TITLE, folder / "59_labels.txt", "the classes' order in 59_context_labels/", LABEL_SOURCE)
        rule = original_rule(folder / "59_labels.txt", names)
        ids = read_ids(folder / "ImageSets" / "Main" / f"{split}.txt")
        labels = [folder / ORIGINAL / f"{name}.png" for name in ids]
    pictures = [folder / "JPEGImages" / f"{name}.jpg" for name in ids]
    return Split(names, palette, ids, list(zip(pictures, labels, strict=True)), rule, read_label)


def original_rule(path: Path, names: list[str]) -> LabelRule:
    """The rule of lines such as "1: aeroplane". Raises DataError unless they name the 59 classes."""
    classes = {0: IGNORE}
    for line in read_text(path).splitlines():
        number, _, name = (part.strip() for part in line.partition(":"))
        name = OTHER_NAMES.get(name, name)
        if number.isdecimal() and name in names:
            classes[int(number)] = names.index(name)
    missing = [name for index, name in enumerate(names) if index not in classes.values()]
    if missing:
        raise DataError(f'{path}: expected a line "number: name" for each of the 59 classes, {", ".join(missing)} lack')
    return LabelRule(classes, "0 (background, ignored) or 1..59")


@dataclass(frozen=True)
class Annotations:
    """sizes: (height, width) by picture ID; segments: its (category, COCO run lengths), later ones on top."""

    sizes: dict[str, tuple[int, int]]
    segments: dict[str, list[tuple[int, dict[str, Any]]]]

    def read(self, path: Path) -> numpy.ndarray:
        """Raw labels int32 (H, W), category ids, of trainval_merged.json/ID."""
        try:
            from pycocotools import mask as run_lengths
        except ImportError as error:
            raise DataError(
                f"{path}: run lengths need pycocotools (pip install pycocotools); "
                f"the PNG forms, {CONVERTED} and {ORIGINAL}, do without"
            ) from error
        raw = numpy.zeros(self.sizes[path.name], numpy.int32)
        for category, segment in self.segments.get(path.name, []):
            try:
                raw[run_lengths.decode(segment).astype(bool)] = category
            except (TypeError, ValueError, IndexError, KeyError) as error:
                raise DataError(f"{path}: not a readable label map: {error}") from error
        return raw


def read_annotations(path: Path, split: str) -> Annotations:
    """One split of a trainval_merged.json. Raises DataError."""
    try:
        document = json.loads(path.read_bytes())
        images = [image for image in document["images"] if image["phase"] == split]
        names = {image["image_id"]: Path(image["file_name"]).stem for image in images}
        sizes = {names[image["image_id"]]: (int(image["height"]), int(image["width"])) for image in images}
        segments: dict[str, list[tuple[int, dict[str, Any]]]] = {}
        for segment in document["annos_segmentation"]:
            if segment["image_id"] in names:
                entry = (int(segment["category_id"]), segment["segmentation"])
                segments.setdefault(names[segment["image_id"]], []).append(entry)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: expected images (image_id, file_name, phase, height, width) and annos_segmentation "
            f"(image_id, category_id, segmentation): {error!r}"
        ) from error
    if not sizes:
        raise DataError(f"{path}: no picture of phase {split}")
    return Annotations(sizes, segments)


CONTEXT = Layout("context", TITLE, lambda root: base(root) is not None, list_split)
