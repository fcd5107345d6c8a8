"""COCO-Stuff 164k: COCO 2017's pictures and the stuffthingmaps, 80 kinds of things and 91 of stuff.

A raw label is the category id less 1; 11 ids below 92 were never used, and the remaining 171 are counted through.
"""

from pathlib import Path

from model.layouts.split import (
    CLASSES,
    DataError,
    LabelRule,
    Layout,
    Split,
    first_with,
    listed_folders,
    read_classes,
)
from model.losses import IGNORE

TITLE = "COCO-Stuff"
SOURCE = "train2017.zip, val2017.zip (https://cocodataset.org) and stuffthingmaps_trainval2017.zip (COCO-Stuff)"
PICTURES = ("images", "")
LABELS = ("stuffthingmaps", "annotations", "stuffthingmaps_trainval2017")
UNUSED = {11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90}
USED = [raw for raw in range(182) if raw not in UNUSED]
RULE = LabelRule(
    {raw: index for index, raw in enumerate(USED)} | {255: IGNORE},
    "0..181 (category ids less 1, of which 11 are not in use) or 255 (unlabelled)",
)


def found(root: Path) -> bool:
    places = [*PICTURES, *LABELS]
    return first_with(root, places, "train2017", "val2017") is not None


def keep(name: str) -> bool:
    """Not the conversions that mmsegmentation leaves beside the label maps."""
    return not name.endswith("_labelTrainIds")


def list_split(root: Path, split: str) -> Split:
    if split == "test":
        raise DataError(f"{TITLE}: there is no labelled test split; use the val split")
    name = f"{split}2017"
    pictures = first_with(root, PICTURES, name) or root / "images"
    labels = first_with(root, LABELS, name) or root / "stuffthingmaps"
    ids, pairs = listed_folders(TITLE, SOURCE, pictures / name, labels / name, ".jpg", ".png", keep)
    return Split(*read_classes(CLASSES / "coco-stuff.json"), ids, pairs, RULE)


COCO_STUFF = Layout("coco-stuff", TITLE, found, list_split)
