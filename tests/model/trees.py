"""Made-up trees in the layouts of the public data sets: pictures of one colour, label maps given as arrays."""

import json
from pathlib import Path

import numpy
from PIL import Image
from pycocotools import mask as run_lengths


def labels(*rows):
    """A label map of 40x32 pixels (W x H) whose upper left corner has these raw labels and the rest the first."""
    raw = numpy.full((32, 40), rows[0][0])
    for index, row in enumerate(rows):
        raw[index, : len(row)] = row
    return raw


def write_picture(path: Path, raw=None, size=(40, 32)):
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = size if raw is None else (raw.shape[1], raw.shape[0])
    Image.new("RGB", (width, height), (90, 120, 150)).save(path)


def write_grey(path: Path, raw):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(raw.astype(numpy.uint8)).save(path)


def write_list(path: Path, ids):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{identifier}\n" for identifier in ids))


def voc_colours():
    """PASCAL VOC's palette: the bits of the index, three at a time, go to red, green and blue from the top bit down."""
    colours = []
    for index in range(256):
        colour, rest = [0, 0, 0], index
        for bit in range(7, -1, -1):
            for channel in range(3):
                colour[channel] |= (rest >> channel & 1) << bit
            rest >>= 3
        colours.append(colour)
    return colours


def write_palette(path: Path, raw):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(raw.astype(numpy.uint8))
    image.putpalette([value for colour in voc_colours() for value in colour])
    image.save(path)


def write_ade20k(root: Path, raw):
    for folder, prefix in (("training", "ADE_train"), ("validation", "ADE_val")):
        for number in (1, 2):
            write_picture(root / "images" / folder / f"{prefix}_{number:08}.jpg", raw)
            write_grey(root / "annotations" / folder / f"{prefix}_{number:08}.png", raw)
    return root


def write_voc(root: Path, raw, train=("2007_000032", "2007_000039"), val=("2007_000033",)):
    """VOC2012/ below root."""
    folder = root / "VOC2012"
    for identifier in (*train, *val):
        write_picture(folder / "JPEGImages" / f"{identifier}.jpg", raw)
        write_palette(folder / "SegmentationClass" / f"{identifier}.png", raw)
    for split, ids in (("train", train), ("val", val)):
        write_list(folder / "ImageSets" / "Segmentation" / f"{split}.txt", ids)
    return root


def write_sbd(root: Path, raw, train, val):
    """benchmark_RELEASE/dataset below root; the pictures go where VOC2012 has them, as in the downloads."""
    from scipy.io import savemat

    dataset = root / "benchmark_RELEASE" / "dataset"
    (dataset / "cls").mkdir(parents=True)
    for identifier in (*train, *val):
        write_picture(root / "VOC2012" / "JPEGImages" / f"{identifier}.jpg", raw)
        segmentation = {"Boundaries": numpy.zeros((20, 1)), "Segmentation": raw.astype(numpy.uint8)}
        savemat(dataset / "cls" / f"{identifier}.mat", {"GTcls": segmentation})
    write_list(dataset / "train.txt", train)
    write_list(dataset / "val.txt", val)
    return root


def write_context_pngs(root: Path, raw):
    """VOC2010/ below root, as mmsegmentation converts it."""
    folder = root / "VOC2010"
    for split, identifier in (("train", "2008_000002"), ("val", "2008_000003")):
        write_picture(folder / "JPEGImages" / f"{identifier}.jpg", raw)
        write_grey(folder / "SegmentationClassContext" / f"{identifier}.png", raw)
        write_list(folder / "ImageSets" / "SegmentationContext" / f"{split}.txt", [identifier])
    return root


def write_context_json(root: Path, raw):
    """VOC2010/ below root, as PyTorch-Encoding reads it; raw has category ids, 0 where nothing is annotated."""
    folder = root / "VOC2010"
    images, segments = [], []
    for phase, identifier in (("train", "2008_000002"), ("val", "2008_000003")):
        write_picture(folder / "JPEGImages" / f"{identifier}.jpg", raw)
        number = int(identifier.replace("_", ""))
        height, width = raw.shape
        images.append(
            {"image_id": number, "file_name": f"{identifier}.jpg", "phase": phase, "height": height, "width": width}
        )
        for category in numpy.unique(raw[raw > 0]).tolist():
            lengths = run_lengths.encode(numpy.asfortranarray(raw == category, dtype=numpy.uint8))
            counts = {"size": lengths["size"], "counts": lengths["counts"].decode()}
            segments.append({"id": len(segments), "image_id": number, "category_id": category, "segmentation": counts})
    (folder / "trainval_merged.json").write_text(json.dumps({"images": images, "annos_segmentation": segments}))
    return root


def write_cityscapes(root: Path, raw, kind="labelIds"):
    for split, city in (("train", "aachen"), ("train", "ulm"), ("val", "lindau")):
        name = f"{city}_000000_000019"
        picture = root / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png"
        write_picture(picture, raw)
        write_grey(root / "gtFine" / split / city / f"{name}_gtFine_{kind}.png", raw)
    return root


def write_coco_stuff(root: Path, raw, pictures="images", maps="stuffthingmaps"):
    for split in ("train2017", "val2017"):
        for number in (9, 25):
            write_picture(root / pictures / split / f"{number:012}.jpg", raw)
            write_grey(root / maps / split / f"{number:012}.png", raw)
    return root


def write_camvid_full(root: Path, colours):
    """colours: uint8 (H, W, 3), the label picture of every frame."""
    for identifier in ("0001TP_006690", "0001TP_008550", "0006R0_f00930", "0016E5_07959", "Seq05VD_f00000"):
        write_picture(root / "701_StillsRaw_full" / f"{identifier}.png", colours)
        path = root / "LabeledApproved_full" / f"{identifier}_L.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(colours).save(path)
    return root
