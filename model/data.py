"""Data sets on disk: the project's own folder layout, and CamVid as the SegNet tutorial lays it out."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy
from PIL import Image, UnidentifiedImageError

from model.losses import IGNORE

SPLITS = ("train", "val", "test")
CAMVID_VOID = 11
CAMVID_CLASSES = (
    ("sky", (128, 128, 128)),
    ("building", (128, 0, 0)),
    ("pole", (192, 192, 128)),
    ("road", (128, 64, 128)),
    ("pavement", (60, 40, 222)),
    ("tree", (128, 128, 0)),
    ("sign_symbol", (192, 128, 128)),
    ("fence", (64, 64, 128)),
    ("car", (64, 0, 128)),
    ("pedestrian", (64, 64, 0)),
    ("bicyclist", (0, 128, 192)),
)


class DataError(ValueError):
    """A data set that breaks a rule; the message names the file and the rule."""


@dataclass(frozen=True)
class SegmentationData:
    """One split: pictures and label maps by path, read on demand.

    ids: what to call each picture; pairs: (picture, label) paths; void: a raw label that means "ignore" besides 255.
    """

    root: Path
    split: str
    classes: list[str]
    palette: list[list[int]]
    ids: list[str]
    pairs: list[tuple[Path, Path]]
    void: int = IGNORE

    def __len__(self) -> int:
        return len(self.pairs)

    def load(self, index: int) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Picture uint8 (H, W, 3) RGB and mask uint8 (H, W), values 0..C-1 and 255 = ignore.

        Raises DataError when either file is missing, unreadable, of another size, or has labels out of range.
        """
        image_path, label_path = self.pairs[index]
        image = _read(image_path, "picture").convert("RGB")
        label = _read(label_path, "label map")
        if label.mode not in ("L", "P", "1", "I", "I;16"):
            raise DataError(f"{label_path}: a label map must have one channel, this one is {label.mode}")
        if label.size != image.size:
            raise DataError(
                f"{label_path}: a label map must have its picture's size, "
                f"{image.width}x{image.height}, this one is {label.width}x{label.height}"
            )
        raw = numpy.asarray(label).astype(numpy.int32)
        raw = numpy.where(raw == self.void, IGNORE, raw)
        wrong = numpy.unique(raw[((raw < 0) | (raw >= len(self.classes))) & (raw != IGNORE)])
        if len(wrong):
            raise DataError(
                f"{label_path}: labels must be 0..{len(self.classes) - 1} or {IGNORE} (ignore), "
                f"found {', '.join(str(value) for value in wrong[:10])}"
            )
        return numpy.array(image), raw.astype(numpy.uint8)


def _read(path: Path, kind: str) -> Image.Image:
    if not path.is_file():
        raise DataError(f"{path}: no such {kind}")
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{path}: not a readable {kind}: {error}") from error


def open_dataset(root: Path, split: str) -> SegmentationData:
    """Recognise the layout under `root` and list one split of it.

    Raises DataError when the folder, its classes or the split are missing, naming what was looked for.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such data folder")
    if split not in SPLITS:
        raise DataError(f"unknown split {split!r}; splits are {', '.join(SPLITS)}")
    if (root / "classes.json").is_file():
        return _open_folder(root, split)
    if (root / f"{split}annot").is_dir() or (root / "trainannot").is_dir():
        return _open_camvid_tutorial(root, split)
    raise DataError(
        f"{root}: not a data set; expected classes.json with images/, labels/ and splits/, "
        "or the CamVid tutorial's train.txt, train/ and trainannot/"
    )


def read_classes(path: Path) -> tuple[list[str], list[list[int]]]:
    """Names and colours from a classes.json: {"classes": [{"id": 0, "name": "sky", "color": [128, 128, 128]}, ...]}.

    Raises DataError when it is not such a file or the ids are not 0..C-1.
    """
    try:
        entries = sorted(json.loads(path.read_text(encoding="utf-8"))["classes"], key=lambda entry: entry["id"])
        names = [str(entry["name"]) for entry in entries]
        palette = [[int(value) for value in entry["color"]] for entry in entries]
        ids = [entry["id"] for entry in entries]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f'{path}: expected {{"classes": [{{"id", "name", "color"}}, ...]}}: {error!r}') from error
    if ids != list(range(len(ids))) or not ids:
        raise DataError(f"{path}: class ids must be 0, 1, 2, ... without gaps, found {ids[:20]}")
    if len(ids) > IGNORE:
        raise DataError(f"{path}: at most {IGNORE} classes fit a label map whose 255 means ignore, found {len(ids)}")
    if any(len(colour) != 3 or not all(0 <= value <= 255 for value in colour) for colour in palette):
        raise DataError(f"{path}: a color must be three numbers in 0..255")
    return names, palette


def _open_folder(root: Path, split: str) -> SegmentationData:
    classes, palette = read_classes(root / "classes.json")
    listing = root / "splits" / f"{split}.txt"
    if not listing.is_file():
        raise DataError(f"{listing}: no such split file (one picture ID per line)")
    ids = listing.read_text(encoding="utf-8").split()
    if not ids:
        raise DataError(f"{listing}: the split is empty")
    pairs = []
    for identifier in ids:
        candidates = [root / "images" / f"{identifier}{suffix}" for suffix in (".jpg", ".png", ".jpeg")]
        picture = next((path for path in candidates if path.is_file()), candidates[0])
        pairs.append((picture, root / "labels" / f"{identifier}.png"))
    return SegmentationData(root, split, classes, palette, ids, pairs)


def _open_camvid_tutorial(root: Path, split: str) -> SegmentationData:
    """`train.txt` lists "picture label" by paths of the tutorial's author; what counts is their last two parts."""
    listing = root / f"{split}.txt"
    if not listing.is_file():
        raise DataError(f'{listing}: no such split file ("picture label" per line)')
    pairs = []
    for number, line in enumerate(listing.read_text(encoding="utf-8").splitlines(), start=1):
        fields = line.split()
        if not fields:
            continue
        if len(fields) != 2:
            raise DataError(f'{listing}: line {number} must be "picture label", found {line!r}')
        picture, label = (root.joinpath(*Path(field).parts[-2:]) for field in fields)
        pairs.append((picture, label))
    if not pairs:
        raise DataError(f"{listing}: the split is empty")
    names = [name for name, _ in CAMVID_CLASSES]
    palette = [list(colour) for _, colour in CAMVID_CLASSES]
    return SegmentationData(root, split, names, palette, [p.stem for p, _ in pairs], pairs, void=CAMVID_VOID)


def problems(data: SegmentationData) -> Iterator[str | None]:
    """Read every pair; yields per pair None or the sentence saying which file breaks which rule."""
    for index in range(len(data)):
        try:
            data.load(index)
        except DataError as error:
            yield str(error)
        else:
            yield None
