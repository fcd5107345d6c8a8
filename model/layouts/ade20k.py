"""ADE20K as the Scene Parsing Challenge of 2016 packs it: 150 classes; raw label 0 is "other" and ignored."""

from pathlib import Path

from model.layouts.split import (
    CLASSES,
    LabelRule,
    Layout,
    Split,
    first_with,
    listed_folders,
    no_test_labels,
    read_classes,
)
from model.losses import IGNORE

TITLE = "ADE20K"
SOURCE = "ADEChallengeData2016.zip (http://sceneparsing.csail.mit.edu)"
FOLDERS = {"train": "training", "val": "validation"}
MARKERS = tuple(f"{kind}/{folder}" for kind in ("images", "annotations") for folder in FOLDERS.values())
RULE = LabelRule({0: IGNORE} | {raw: raw - 1 for raw in range(1, 151)}, "0 (other, ignored) or 1..150")


def base(root: Path) -> Path | None:
    return first_with(root, ("", "ADEChallengeData2016"), *MARKERS)


def list_split(root: Path, split: str) -> Split:
    no_test_labels(TITLE, split)
    folder = base(root) or root / "ADEChallengeData2016"
    pictures, labels = (folder / kind / FOLDERS[split] for kind in ("images", "annotations"))
    ids, pairs = listed_folders(TITLE, SOURCE, pictures, labels, ".jpg", ".png")
    return Split(*read_classes(CLASSES / "ade20k.json"), ids, pairs, RULE)


ADE20K = Layout("ade20k", TITLE, lambda root: base(root) is not None, list_split)
