"""CamVid's 11 classes: at 480x360 as SegNet's tutorial lays them out, and at 960x720 as the original download does."""

from pathlib import Path

from model.layouts.split import (
    BrokenList,
    DataError,
    LabelRule,
    Layout,
    Split,
    identity,
    listed_folders,
    read_colour,
    read_text,
    repeated,
)
from model.losses import IGNORE

SEGNET_TITLE, FULL_TITLE = "CamVid (SegNet)", "CamVid (original)"
SOURCE = (
    "701_StillsRaw_full.zip and LabeledApproved_full.zip (http://mi.eng.cam.ac.uk/research/projects/VideoRec/CamVid)"
)
PICTURES, LABELS = "701_StillsRaw_full", "LabeledApproved_full"
SEGNET_VOID = 11
CLASSES = (
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
NAMES = [name for name, _ in CLASSES]
PALETTE = [list(colour) for _, colour in CLASSES]
# The original's 32 classes by the class they become, as SegNet groups them; label_colors.txt of the download has the
# same names and colours.
ORIGINAL = {
    "sky": {"Sky": 0x808080},
    "building": {
        "Archway": 0xC00080,
        "Bridge": 0x008040,
        "Building": 0x800000,
        "Tunnel": 0x400040,
        "Wall": 0x40C000,
    },
    "pole": {"Column_Pole": 0xC0C080, "TrafficCone": 0x000040},
    "road": {"Road": 0x804080, "LaneMkgsDriv": 0x8000C0, "LaneMkgsNonDriv": 0xC00040},
    "pavement": {"Sidewalk": 0x0000C0, "ParkingBlock": 0x40C080, "RoadShoulder": 0x8080C0},
    "tree": {"Tree": 0x808000, "VegetationMisc": 0xC0C000},
    "sign_symbol": {"SignSymbol": 0xC08080, "Misc_Text": 0x808040, "TrafficLight": 0x004040},
    "fence": {"Fence": 0x404080},
    "car": {
        "Car": 0x400080,
        "SUVPickupTruck": 0x4080C0,
        "Truck_Bus": 0xC080C0,
        "Train": 0xC04080,
        "OtherMoving": 0x804040,
    },
    "pedestrian": {"Pedestrian": 0x404000, "Child": 0xC08040, "CartLuggagePram": 0x4000C0, "Animal": 0x408040},
    "bicyclist": {"Bicyclist": 0x0080C0, "MotorcycleScooter": 0xC000C0},
}
VOID = 0x000000


def show_colour(raw: int) -> str:
    return f"({raw >> 16}, {raw >> 8 & 255}, {raw & 255})"


SEGNET_RULE = LabelRule(identity(len(NAMES), SEGNET_VOID, IGNORE), "0..10, 11 (void) or 255 (ignore)")
ORIGINAL_RULE = LabelRule(
    {colour: NAMES.index(name) for name, parts in ORIGINAL.items() for colour in parts.values()} | {VOID: IGNORE},
    "the 32 colours of CamVid's label_colors.txt",
    show_colour,
)


def segnet_found(root: Path) -> bool:
    return any((root / f"{split}annot").is_dir() for split in ("train", "val", "test"))


def list_segnet_split(root: Path, split: str) -> Split:
    """`train.txt` lists "picture label" by paths of the tutorial's author; what counts is their last two parts."""
    listing = root / f"{split}.txt"
    if not listing.is_file():
        raise DataError(f'{listing}: no such split file ("picture label" per line)')
    pairs = []
    for number, line in enumerate(read_text(listing).splitlines(), start=1):
        fields = line.split()
        if not fields:
            continue
        if len(fields) != 2:
            raise BrokenList(f'{listing}: line {number} must be "picture label", found {line!r}')
        picture, label = (root.joinpath(*Path(field).parts[-2:]) for field in fields)
        pairs.append((picture, label))
    if not pairs:
        raise BrokenList(f"{listing}: the split is empty")
    if twice := repeated(str(picture) for picture, _ in pairs):
        raise BrokenList(f"{listing}: a split has every picture once, found {', '.join(twice)} more than once")
    return Split(NAMES, PALETTE, [picture.stem for picture, _ in pairs], pairs, SEGNET_RULE)


def split_of(identifier: str) -> str:
    """The split that SegNet's lists (367 / 101 / 233) put a frame of the original into, such as "0016E5_07959"."""
    sequence, _, frame = identifier.rpartition("_")
    number = int(frame.removeprefix("f")) if frame.removeprefix("f").isdecimal() else -1
    if sequence == "0001TP" and number >= 0:
        return "train" if number <= 8520 else "test"
    if sequence == "0016E5" and number >= 0:
        return "val" if 7959 <= number <= 8159 else "train"
    if sequence in ("0006R0", "Seq05VD") and number >= 0:
        return {"0006R0": "train", "Seq05VD": "test"}[sequence]
    raise DataError(
        f"{FULL_TITLE}: {identifier} is no frame of CamVid; expected 0001TP_*, 0006R0_f*, 0016E5_* or Seq05VD_f*"
    )


def full_found(root: Path) -> bool:
    return (root / PICTURES).is_dir() or (root / LABELS).is_dir()


def list_full_split(root: Path, split: str) -> Split:
    def keep(identifier: str) -> bool:
        return split_of(identifier) == split

    ids, pairs = listed_folders(FULL_TITLE, SOURCE, root / PICTURES, root / LABELS, ".png", "_L.png", keep)
    if not ids:
        raise DataError(f"{FULL_TITLE}: no frame of the {split} split in {root / PICTURES}; it comes with {SOURCE}")
    return Split(NAMES, PALETTE, ids, pairs, ORIGINAL_RULE, read_colour)


CAMVID_SEGNET = Layout("camvid-segnet", SEGNET_TITLE, segnet_found, list_segnet_split)
CAMVID_FULL = Layout("camvid-full", FULL_TITLE, full_found, list_full_split)
