"""Cityscapes: 19 classes, from the label ids of the download (or from train ids made with the authors' scripts)."""

from pathlib import Path

from model.layouts.split import (
    CLASSES,
    LabelRule,
    Layout,
    Split,
    first_with,
    identity,
    listed_folders,
    no_test_labels,
    read_classes,
)
from model.losses import IGNORE

TITLE = "Cityscapes"
SOURCE = "leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip (https://www.cityscapes-dataset.com)"
# The label ids of train ids 0, 1, 2, ...
EVALUATED = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
# 255 is id -1, the licence plate, in a file of 8 bits.
LABEL_IDS = LabelRule(
    dict.fromkeys((*range(34), 255), IGNORE) | {label: index for index, label in enumerate(EVALUATED)},
    "label ids 0..33 or 255 (licence plate)",
)
TRAIN_IDS = LabelRule(identity(len(EVALUATED), 255), "train ids 0..18 or 255 (ignored)")


def base(root: Path) -> Path | None:
    return first_with(root, ("", "cityscapes"), "leftImg8bit", "gtFine")


def list_split(root: Path, split: str) -> Split:
    no_test_labels(TITLE, split)
    folder = base(root) or root
    pictures, labels = folder / "leftImg8bit" / split, folder / "gtFine" / split
    end, rule = "_gtFine_labelIds.png", LABEL_IDS
    if next(labels.rglob(f"*{end}"), None) is None and next(labels.rglob("*_gtFine_labelTrainIds.png"), None):
        end, rule = "_gtFine_labelTrainIds.png", TRAIN_IDS
    ids, pairs = listed_folders(TITLE, SOURCE, pictures, labels, "_leftImg8bit.png", end)
    return Split(*read_classes(CLASSES / "cityscapes.json"), ids, pairs, rule)


CITYSCAPES = Layout("cityscapes", TITLE, lambda root: base(root) is not None, list_split)
