"""PASCAL VOC 2012, 20 objects and background, by itself and with SBD's further training pictures.

Raw labels are the indices of palette pictures; 255 is the border around objects and is ignored. (PyTorch-Encoding's
loader lets the border and the padding count as background, or trains on SBD's copy of val: not here.)
"""

from pathlib import Path

import numpy

from model.layouts.split import (
    CLASSES,
    DataError,
    LabelRule,
    Layout,
    Split,
    first_with,
    identity,
    no_test_labels,
    read_classes,
    read_grey,
    read_ids,
    require,
)
from model.losses import IGNORE

TITLE, AUG_TITLE = "PASCAL VOC 2012", "PASCAL VOC 2012 + SBD"
SOURCE = "VOCtrainval_11-May-2012.tar (http://host.robots.ox.ac.uk/pascal/VOC/voc2012)"
SBD_SOURCE = "SBD's benchmark.tgz, in benchmark_RELEASE/ or VOCaug/ (or a folder VOC2012/SegmentationClassAug of PNGs)"
SBD_PLACES = (
    "benchmark_RELEASE/dataset",
    "VOCdevkit/benchmark_RELEASE/dataset",
    "VOCaug/dataset",
    "VOCdevkit/VOCaug/dataset",
)
RULE = LabelRule(identity(21, IGNORE), "0..20 or 255 (border)")


def base(root: Path) -> Path | None:
    inside = first_with(root, ("VOC2012", "VOCdevkit/VOC2012"), "")
    return root if inside is None and root.resolve().name == "VOC2012" else inside


def read_label(path: Path) -> numpy.ndarray:
    """Raw labels int32 (H, W) of a PNG or of SBD's .mat. Raises DataError."""
    return read_sbd(path) if path.suffix == ".mat" else read_grey(path)


def read_sbd(path: Path) -> numpy.ndarray:
    """GTcls.Segmentation of SBD's cls/ID.mat, int32 (H, W)."""
    if not path.is_file():
        raise DataError(f"{path}: no such label map")
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise DataError(
            f"{path}: SBD's .mat label maps need scipy (pip install scipy); "
            "the PNG form, VOC2012/SegmentationClassAug, does without"
        ) from error
    try:
        return numpy.asarray(loadmat(path)["GTcls"]["Segmentation"][0, 0]).astype(numpy.int32)
    except Exception as error:  # loadmat has no base class for what it raises on a damaged file
        raise DataError(f"{path}: not a readable label map of SBD (GTcls.Segmentation): {error}") from error


def lists(root: Path, title: str) -> tuple[Path, list[str], list[str]]:
    """VOC2012's folder and the IDs of its train and val lists."""
    folder = base(root) or root / "VOC2012"
    require(title, folder, "JPEGImages/, SegmentationClass/ and ImageSets/Segmentation/", SOURCE)
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        require(title, folder / name, "the pictures, label maps and lists of VOC 2012", SOURCE)
    train, val = (read_ids(folder / "ImageSets" / "Segmentation" / f"{split}.txt") for split in ("train", "val"))
    return folder, train, val


def list_split(root: Path, split: str) -> Split:
    no_test_labels(TITLE, split)
    folder, train, val = lists(root, TITLE)
    ids = {"train": train, "val": val}[split]
    pairs = [(folder / "JPEGImages" / f"{name}.jpg", folder / "SegmentationClass" / f"{name}.png") for name in ids]
    return Split(*read_classes(CLASSES / "voc.json"), ids, pairs, RULE)


def further_labels(root: Path, folder: Path) -> dict[str, Path]:
    """SBD's label maps by ID: PNGs of SegmentationClassAug where there are any, else the .mat files of cls/."""
    pngs = {path.stem: path for path in (folder / "SegmentationClassAug").glob("*.png")}
    if pngs:
        return pngs
    sbd = first_with(root, SBD_PLACES, "cls", "train.txt")
    if sbd is None:
        raise DataError(f"{AUG_TITLE}: no label maps of SBD in {root}; they come with {SBD_SOURCE}")
    for name, holds in (("cls", "SBD's label maps ID.mat"), ("train.txt", "IDs"), ("val.txt", "IDs")):
        require(AUG_TITLE, sbd / name, holds, SBD_SOURCE)
    ids = [*read_ids(sbd / "train.txt"), *read_ids(sbd / "val.txt")]
    return {name: sbd / "cls" / f"{name}.mat" for name in ids}


def list_aug_split(root: Path, split: str) -> Split:
    """val is VOC's. train is VOC's train with its own labels and all of SBD but VOC's val: 10,582 pictures."""
    if split != "train":
        return list_split(root, split)
    folder, train, val = lists(root, AUG_TITLE)
    labels = further_labels(root, folder) | {name: folder / "SegmentationClass" / f"{name}.png" for name in train}
    ids = sorted(labels.keys() - set(val))
    pairs = [(folder / "JPEGImages" / f"{name}.jpg", labels[name]) for name in ids]
    return Split(*read_classes(CLASSES / "voc.json"), ids, pairs, RULE, read_label)


VOC = Layout("voc", TITLE, lambda root: base(root) is not None, list_split)
VOC_AUG = Layout("voc-aug", AUG_TITLE, lambda root: False, list_aug_split)
