"""The project's own layout: images/ID.jpg|png, labels/ID.png, splits/SPLIT.txt and classes.json."""

from pathlib import Path

from model.layouts.split import DataError, LabelRule, Layout, Split, identity, read_classes, read_ids, require
from model.losses import IGNORE

CLEAN = "labels_clean"
CLEAN_SOURCE = "the labels of Malisiewicz and Efros (BMVC 2007), converted as the official ones are"


def list_split(root: Path, split: str, labels: str = "labels") -> Split:
    classes, palette = read_classes(root / "classes.json")
    if len(classes) > IGNORE:
        raise DataError(
            f"{root / 'classes.json'}: at most {IGNORE} classes fit a label map whose {IGNORE} means ignore, "
            f"found {len(classes)}"
        )
    ids = read_ids(root / "splits" / f"{split}.txt")
    pairs = []
    for identifier in ids:
        candidates = [root / "images" / f"{identifier}{suffix}" for suffix in (".jpg", ".png", ".jpeg")]
        picture = next((path for path in candidates if path.is_file()), candidates[0])
        pairs.append((picture, root / labels / f"{identifier}.png"))
    last = len(classes) - 1
    rule = LabelRule(identity(len(classes), IGNORE), f"0..{last} or {IGNORE} (ignore)")
    return Split(classes, palette, ids, pairs, rule)


def list_clean_split(root: Path, split: str) -> Split:
    require("MSRC-21", root / CLEAN, "label maps ID.png", CLEAN_SOURCE)
    return list_split(root, split, CLEAN)


FOLDER = Layout("folder", "the project's own layout", lambda root: (root / "classes.json").is_file(), list_split)
MSRC21_CLEAN = Layout("msrc21-clean", "MSRC-21 with labels_clean/", lambda root: False, list_clean_split)
