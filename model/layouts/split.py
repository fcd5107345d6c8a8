"""What every layout yields: one split of a data set, its files and what its raw labels mean."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy
from PIL import ExifTags, Image

from model.losses import IGNORE
from model.wording import is_text

CLASSES = Path(__file__).parent / "classes"
TURNS = {  # by EXIF's orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class DataError(ValueError):
    """A data set that breaks a rule; the message names the file and the rule."""


class BrokenList(DataError):
    """A list of a split's pictures that is there, and breaks a rule."""


@dataclass(frozen=True)
class LabelRule:
    """What raw labels mean.

    classes: raw label -> class index 0..C-1, or 255 to ignore; every other raw label is an error.
    allowed: the raw labels, in words for that error; show: one raw label, likewise.
    """

    classes: Mapping[int, int]
    allowed: str
    show: Callable[[int], str] = str

    def __call__(self, raw: numpy.ndarray) -> numpy.ndarray:
        """Raw labels (H, W) of any integer type -> uint8 (H, W). Raises DataError, without the file's name."""
        keys = numpy.array(sorted(self.classes))
        targets = numpy.array([self.classes[key] for key in keys.tolist()], dtype=numpy.uint8)
        positions = numpy.searchsorted(keys, raw).clip(max=len(keys) - 1)
        wrong = numpy.unique(raw[keys[positions] != raw])
        if len(wrong):
            found = ", ".join(self.show(int(value)) for value in wrong[:10])
            raise DataError(f"labels must be {self.allowed}, found {found}")
        return targets[positions]


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, with or without a byte order mark. Raises DataError where it is none."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise BrokenList(f"{path}: not readable as UTF-8 text: {error}") from error


def read_image(path: Path, kind: str, pixels: bool = True) -> Image.Image:
    """The decoded file, or what its header says of it: without `pixels`.

    Raises DataError where there is none, or it is damaged or of no known format.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such {kind}")
    try:
        with Image.open(path) as image:
            if pixels:
                image.load()
            return image
    except Exception as error:  # Pillow's readers raise whatever a damaged file leads them to
        raise DataError(f"{path}: not a readable {kind}: {error}") from error


def upright(image: Image.Image) -> Image.Image:
    """The decoded picture turned as its EXIF block says, or as it is where that is unreadable: its pixels are not."""
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # as in `read_image`
        turn = None
    return image if turn is None else image.transpose(turn)


def to_rgb(image: Image.Image) -> Image.Image:
    """A decoded picture as the service reads it: 16 bits scaled to 8, what shines through composited on white.

    Raises ValueError for 32-bit integers and floats: nothing in the file says which value is white.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        wide = numpy.asarray(image).astype(numpy.uint32)
        grey = (wide * 255 + 32767) // 65535
        grey[wide == image.info.get("transparency", -1)] = 255
        return Image.fromarray(grey.astype(numpy.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"pictures with pixel mode {image.mode} are not supported; save it with 8 bits")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def read_grey(path: Path) -> numpy.ndarray:
    """Raw labels int32 (H, W) of a picture with one channel; the values of a palette picture, not its colours."""
    label = read_image(path, "label map")
    if label.mode not in ("L", "P", "1", "I", "I;16"):
        raise DataError(f"{path}: a label map must have one channel, this one is {label.mode}")
    return numpy.asarray(label).astype(numpy.int32)


def read_colour(path: Path) -> numpy.ndarray:
    """Raw labels int32 (H, W) of a picture whose colours are the labels: 0xRRGGBB."""
    red, green, blue = numpy.moveaxis(numpy.asarray(read_image(path, "label map").convert("RGB"), numpy.int32), 2, 0)
    return red << 16 | green << 8 | blue


@dataclass(frozen=True)
class Split:
    """One split as a layout lists it.

    ids: what to call each picture; pairs: (picture, label) paths; read_label: label path -> raw labels (H, W).
    """

    classes: list[str]
    palette: list[list[int]]
    ids: list[str]
    pairs: list[tuple[Path, Path]]
    rule: LabelRule
    read_label: Callable[[Path], numpy.ndarray] = read_grey


@dataclass(frozen=True)
class Layout:
    """A way to lay a data set out in folders.

    name: what --layout calls it; found: whether a folder looks like it (never, for layouts that must be named);
    list_split: (folder, split) -> Split, or DataError saying what is missing.
    """

    name: str
    title: str
    found: Callable[[Path], bool]
    list_split: Callable[[Path, str], Split]


def read_classes(path: Path) -> tuple[list[str], list[list[int]]]:
    """Names and colours from a classes.json: {"classes": [{"id": 0, "name": "sky", "color": [128, 128, 128]}, ...]}.

    Raises DataError when it is not such a file, the ids are not 0..C-1 or a class has no name of its own.
    """
    text = read_text(path)
    try:
        entries = sorted(json.loads(text)["classes"], key=lambda entry: entry["id"])
        names = [entry["name"] for entry in entries]
        palette = [list(entry["color"]) for entry in entries]
        ids = [entry["id"] for entry in entries]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f'{path}: expected {{"classes": [{{"id", "name", "color"}}, ...]}}: {error!r}') from error
    if ids != list(range(len(ids))) or not ids or any(type(number) is not int for number in ids):
        raise DataError(f"{path}: class ids must be 0, 1, 2, ... without gaps, found {ids[:20]}")
    if nameless := [index for index, name in enumerate(names) if not is_text(name) or not name.strip()]:
        raise DataError(f"{path}: a name must be a text that is not empty, found others at ids {nameless[:20]}")
    if twice := repeated(names):
        raise DataError(f"{path}: every class needs a name of its own, found {', '.join(twice)} more than once")
    if any(
        len(colour) != 3 or not all(type(value) is int and 0 <= value <= 255 for value in colour) for colour in palette
    ):
        raise DataError(f"{path}: a color must be three whole numbers in 0..255")
    return names, palette


def repeated(items: Iterable[str]) -> list[str]:
    """The items that occur more than once, 8 at most."""
    return [item for item, count in Counter(items).items() if count > 1][:8]


def read_ids(path: Path) -> list[str]:
    """Picture IDs, one a line; what follows a blank is left out. The list must exist, have one, and none twice."""
    if not path.is_file():
        raise DataError(f"{path}: no such split file (one picture ID per line)")
    ids = [line.split()[0] for line in read_text(path).splitlines() if line.strip()]
    if not ids:
        raise BrokenList(f"{path}: the split is empty")
    if twice := repeated(ids):
        raise BrokenList(f"{path}: a split has every picture once, found {', '.join(twice)} more than once")
    return ids


def first_with(root: Path, places: Iterable[str], *markers: str) -> Path | None:
    """The first of the places under `root` in which one of the markers exists."""
    folders = (root / place for place in places)
    return next((folder for folder in folders if any((folder / marker).exists() for marker in markers)), None)


def require(title: str, path: Path, holds: str, source: str) -> None:
    """Raise DataError unless the file or folder exists, saying what it holds and where it comes from."""
    if not path.exists():
        raise DataError(f"{title}: {path} is missing; it holds {holds} and comes with {source}")


def no_test_labels(title: str, split: str) -> None:
    """Raise DataError for a test split whose labels the benchmark's authors keep."""
    if split == "test":
        raise DataError(f"{title}: the labels of the test split are not public; use the val split")


def identity(count: int, *ignored: int) -> dict[int, int]:
    """Raw labels 0..count-1 are class indices, and `ignored` become 255."""
    return {label: label for label in range(count)} | dict.fromkeys(ignored, IGNORE)


def listed_folders(
    title: str,
    source: str,
    pictures: Path,
    labels: Path,
    picture_end: str,
    label_end: str,
    keep: Callable[[str], bool] = lambda name: True,
) -> tuple[list[str], list[tuple[Path, Path]]]:
    """IDs and pairs of two folders (and those below them) in which a picture and its label differ in their ends.

    A name that only one of the folders has is listed too, so that reading it says which file is missing. Only names
    that `keep` accepts are listed.
    """
    names = set()
    for folder, end, holds in ((pictures, picture_end, "pictures"), (labels, label_end, "label maps")):
        require(title, folder, f"{holds} *{end}", source)
        found = {path.relative_to(folder).as_posix().removesuffix(end) for path in folder.rglob(f"*{end}")}
        if not found:
            raise DataError(f"{title}: {folder} has no {holds} *{end}; they come with {source}")
        names |= found
    ids = sorted(filter(keep, names))
    return ids, [(pictures / f"{name}{picture_end}", labels / f"{name}{label_end}") for name in ids]
