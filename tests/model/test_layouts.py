"""Public data sets in their own layouts: which pictures a split has, what every raw label becomes, what is missing."""

import json
import sys
from pathlib import Path

import numpy
import pytest
from PIL import Image

from model import evaluate, train
from model.data import DataError, leave_out, open_dataset, problems, repeats
from model.layouts import coco_stuff
from model.layouts.camvid import split_of
from model.layouts.split import CLASSES, read_classes
from tests.model import trees
from tests.model.trees import labels

SHARED = Path(__file__).parents[3] / "shared" / "data"


def corner(data, count, row=0, index=0):
    """The first labels of a row of the mask of a picture."""
    return data.load(index)[1][row, :count].tolist()


def test_ade20k(tmp_path):
    root = trees.write_ade20k(tmp_path / "ADEChallengeData2016", labels([0, 1, 2, 150]))
    for folder in (root, tmp_path):
        data = open_dataset(folder, "val")
        assert data.layout == "ade20k" and data.ids == ["ADE_val_00000001", "ADE_val_00000002"]
        assert corner(data, 4) == [255, 0, 1, 149], "0 is other and ignored; n is class n - 1"
        assert list(problems(data)) == [None, None]
    assert len(data.classes) == 150 and data.classes[0] == "wall" and data.classes[149] == "flag"
    assert len(open_dataset(root, "train")) == 2
    with pytest.raises(DataError, match="the labels of the test split are not public; use the val split"):
        open_dataset(root, "test")


def test_ade20k_labels_out_of_range(tmp_path):
    data = open_dataset(trees.write_ade20k(tmp_path, labels([0, 151])), "train")
    assert (
        "annotations/training/ADE_train_00000001.png: labels must be 0 (other, ignored) or 1..150, found 151"
        in next(problems(data))
    )


def test_voc(tmp_path):
    root = trees.write_voc(tmp_path, labels([0, 1, 15, 20, 255]))
    for folder in (root, root / "VOC2012"):
        data = open_dataset(folder, "train")
        assert data.layout == "voc" and data.ids == ["2007_000032", "2007_000039"]
        assert corner(data, 5) == [0, 1, 15, 20, 255], "indices of the palette picture; the border is ignored"
    assert open_dataset(root, "val").ids == ["2007_000033"]
    assert data.classes[0] == "background" and data.classes[15] == "person" and data.palette == trees.voc_colours()[:21]


def test_sbd_joins_the_train_split_without_voc_val(tmp_path):
    """2007_000033 is VOC's val and 2007_000032 VOC's train: SBD has both, with labels of its own (7)."""
    pytest.importorskip("scipy")
    trees.write_voc(tmp_path, labels([1, 255]))
    trees.write_sbd(tmp_path, labels([7]), train=["2007_000032", "2008_000015"], val=["2007_000033", "2008_000028"])
    data = open_dataset(tmp_path, "train", "voc-aug")
    assert data.ids == ["2007_000032", "2007_000039", "2008_000015", "2008_000028"]
    assert [corner(data, 2, index=index) for index in range(4)] == [[1, 255], [1, 255], [7, 7], [7, 7]]
    assert open_dataset(tmp_path, "val", "voc-aug").ids == ["2007_000033"]
    assert open_dataset(tmp_path, "train").layout == "voc", "SBD joins only where it is asked for"
    (tmp_path / "benchmark_RELEASE" / "dataset" / "cls" / "2008_000015.mat").write_bytes(b"damaged")
    found = [problem for problem in problems(data) if problem]
    assert len(found) == 1 and "cls/2008_000015.mat: not a readable label map of SBD" in found[0]


def test_sbd_as_pngs_needs_no_scipy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    trees.write_voc(tmp_path, labels([1]))
    for identifier in ("2007_000033", "2008_000015"):
        trees.write_picture(tmp_path / "VOC2012" / "JPEGImages" / f"{identifier}.jpg")
        trees.write_grey(tmp_path / "VOC2012" / "SegmentationClassAug" / f"{identifier}.png", labels([9, 255]))
    data = open_dataset(tmp_path, "train", "voc-aug")
    assert data.ids == ["2007_000032", "2007_000039", "2008_000015"]
    assert corner(data, 2, index=2) == [9, 255]


def test_sbd_without_scipy_or_files(tmp_path, monkeypatch):
    trees.write_voc(tmp_path, labels([1]))
    with pytest.raises(DataError, match=r"no label maps of SBD in .* they come with SBD's benchmark"):
        open_dataset(tmp_path, "train", "voc-aug")
    dataset = tmp_path / "VOCaug" / "dataset"
    trees.write_list(dataset / "train.txt", ["2008_000015"])
    with pytest.raises(DataError, match=r"VOCaug/dataset/cls is missing; it holds SBD's label maps ID.mat"):
        open_dataset(tmp_path, "train", "voc-aug")
    (dataset / "cls").mkdir()
    (dataset / "cls" / "2008_000015.mat").write_bytes(b"")
    trees.write_list(dataset / "val.txt", ["2007_000033"])
    trees.write_picture(tmp_path / "VOC2012" / "JPEGImages" / "2008_000015.jpg")
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    found = [problem for problem in problems(open_dataset(tmp_path, "train", "voc-aug")) if problem]
    assert len(found) == 1 and "need scipy (pip install scipy)" in found[0]


def test_context_as_converted_pngs(tmp_path):
    root = trees.write_context_pngs(tmp_path, labels([0, 1, 2, 59]))
    for folder in (root, root / "VOC2010"):
        data = open_dataset(folder, "train")
        assert data.layout == "context" and data.ids == ["2008_000002"]
        assert corner(data, 4) == [255, 0, 1, 58], "0 is background and ignored; n is class n - 1"
    assert len(data.classes) == 59 and data.classes[0] == "aeroplane" and data.classes[58] == "wood"
    assert open_dataset(root, "val").ids == ["2008_000003"]


# Of the 459 categories of the full annotation, those that the 59 classes are.
CONTEXT_CATEGORIES = {
    2: "aeroplane", 9: "bag", 18: "bed", 19: "bedclothes", 22: "bench", 23: "bicycle", 25: "bird", 31: "boat",
    33: "book", 34: "bottle", 44: "building", 45: "bus", 46: "cabinet", 59: "car", 65: "cat", 68: "ceiling",
    72: "chair", 80: "cloth", 85: "computer", 98: "cow", 104: "cup", 105: "curtain", 113: "dog", 115: "door",
    144: "fence", 158: "floor", 159: "flower", 162: "food", 187: "grass", 189: "ground", 207: "horse", 220: "keyboard",
    232: "light", 258: "motorbike", 259: "mountain", 260: "mouse", 284: "person", 295: "plate", 296: "platform",
    308: "pottedplant", 324: "road", 326: "rock", 347: "sheep", 349: "shelves", 354: "sidewalk", 355: "sign",
    360: "sky", 366: "snow", 368: "sofa", 397: "table", 415: "track", 416: "train", 420: "tree", 424: "truck",
    427: "tvmonitor", 440: "wall", 445: "water", 454: "window", 458: "wood",
}  # fmt: skip


def test_context_as_the_authors_read_it(tmp_path):
    raw = list(CONTEXT_CATEGORIES)
    data = open_dataset(trees.write_context_json(tmp_path, labels([0, *raw[:30]], raw[30:])), "val")
    assert data.ids == ["2008_000003"]
    background, *first = corner(data, 31)
    names = [data.classes[index] for index in [*first, *corner(data, 29, row=1)]]
    assert background == 255 and names == list(CONTEXT_CATEGORIES.values())
    assert data.load(0)[1].shape == (32, 40)


def test_context_without_pycocotools(tmp_path, monkeypatch):
    data = open_dataset(trees.write_context_json(tmp_path, labels([0, 2])), "train")
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    assert "run lengths need pycocotools (pip install pycocotools)" in next(problems(data))


def test_context_with_a_category_that_is_none_of_the_59(tmp_path):
    data = open_dataset(trees.write_context_json(tmp_path, labels([0, 3])), "train")
    assert "trainval_merged.json/2008_000002: labels must be 0 (background, ignored) or one of the 59" in next(
        problems(data)
    )


def test_context_in_the_order_of_the_data_sets_authors(tmp_path):
    folder = tmp_path / "VOC2010"
    names, _ = read_classes(CLASSES / "context.json")
    theirs = ["person", *(name for name in names if name != "person")]
    theirs[theirs.index("table")] = "diningtable"
    for split, identifier in (("train", "2008_000002"), ("val", "2008_000003")):
        trees.write_picture(folder / "JPEGImages" / f"{identifier}.jpg")
        trees.write_grey(folder / "59_context_labels" / f"{identifier}.png", labels([0, 1, 2]))
        trees.write_list(folder / "ImageSets" / "Main" / f"{split}.txt", [identifier])
    with pytest.raises(DataError, match=r"59_labels.txt is missing; it holds the classes' order"):
        open_dataset(tmp_path, "train")
    (folder / "59_labels.txt").write_text("".join(f"{i}: {name}\n" for i, name in enumerate(theirs, start=1)))
    data = open_dataset(tmp_path, "train")
    assert corner(data, 3) == [255, names.index("person"), names.index("aeroplane")]
    (folder / "59_labels.txt").write_text("1: person\n")
    with pytest.raises(DataError, match='expected a line "number: name" for each of the 59 classes, aeroplane'):
        open_dataset(tmp_path, "train")


CITYSCAPES_IDS = {
    7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light",
    20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car", 27: "truck",
    28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle",
}  # fmt: skip


def test_cityscapes_label_ids(tmp_path):
    """34 ids, and 255: the licence plate, whose id is -1."""
    data = open_dataset(trees.write_cityscapes(tmp_path, labels([*range(34), 255])), "train")
    assert data.layout == "cityscapes" and data.ids == ["aachen/aachen_000000_000019", "ulm/ulm_000000_000019"]
    assert data.classes == list(CITYSCAPES_IDS.values()), "in the order of the train ids"
    *found, plate = (data.classes[index] if index != 255 else None for index in corner(data, 35))
    assert found == [CITYSCAPES_IDS.get(raw) for raw in range(34)] and plate is None
    assert len(open_dataset(tmp_path, "val")) == 1
    with pytest.raises(DataError, match="not public"):
        open_dataset(tmp_path, "test")


def test_cityscapes_train_ids(tmp_path):
    data = open_dataset(trees.write_cityscapes(tmp_path, labels([255, 0, 18]), kind="labelTrainIds"), "train")
    assert corner(data, 3) == [255, 0, 18]
    trees.write_cityscapes(tmp_path, labels([7, 0, 33]))
    assert corner(open_dataset(tmp_path, "train"), 3) == [0, 255, 18], "label ids win where both are there"


@pytest.mark.parametrize(
    ("pictures", "maps"),
    [("images", "stuffthingmaps"), ("images", "annotations"), ("", "stuffthingmaps_trainval2017")],
)
def test_coco_stuff(tmp_path, pictures, maps):
    """Raw labels are category ids less 1: 0 person, 12 stop sign (11, street sign, is not in use), 181 wood."""
    root = trees.write_coco_stuff(tmp_path, labels([0, 10, 12, 89, 91, 181, 255]), pictures, maps)
    trees.write_grey(root / maps / "train2017" / "000000000009_labelTrainIds.png", labels([0]))
    data = open_dataset(root, "train")
    assert data.layout == "coco-stuff" and data.ids == ["000000000009", "000000000025"]
    mask = corner(data, 7)
    assert mask == [0, 10, 11, 79, 80, 170, 255]
    assert [data.classes[index] for index in mask[:-1]] == [
        "person", "fire hydrant", "stop sign", "toothbrush", "banner", "wood",
    ]  # fmt: skip
    assert len(data.classes) == 171


def test_coco_stuff_id_that_is_not_in_use(tmp_path):
    data = open_dataset(trees.write_coco_stuff(tmp_path, labels([0, 11, 182])), "val")
    assert "of which 11 are not in use) or 255 (unlabelled), found 11, 182" in next(problems(data))


def test_coco_stuff_ids_that_are_not_in_use():
    """Street sign, hat, shoe, eye glasses, plate, mirror, window, desk, door, blender, hair brush: ids less 1."""
    unused = {11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90}
    assert coco_stuff.RULE.classes.keys() == {*range(182), 255} - unused


# Every class of the original by its colour in label_colors.txt, with the class it becomes.
CAMVID_COLOURS = [
    ((64, 128, 64), "pedestrian"), ((192, 0, 128), "building"), ((0, 128, 192), "bicyclist"),
    ((0, 128, 64), "building"), ((128, 0, 0), "building"), ((64, 0, 128), "car"), ((64, 0, 192), "pedestrian"),
    ((192, 128, 64), "pedestrian"), ((192, 192, 128), "pole"), ((64, 64, 128), "fence"), ((128, 0, 192), "road"),
    ((192, 0, 64), "road"), ((128, 128, 64), "sign_symbol"), ((192, 0, 192), "bicyclist"), ((128, 64, 64), "car"),
    ((64, 192, 128), "pavement"), ((64, 64, 0), "pedestrian"), ((128, 64, 128), "road"),
    ((128, 128, 192), "pavement"), ((0, 0, 192), "pavement"), ((192, 128, 128), "sign_symbol"),
    ((128, 128, 128), "sky"), ((64, 128, 192), "car"), ((0, 0, 64), "pole"), ((0, 64, 64), "sign_symbol"),
    ((192, 64, 128), "car"), ((128, 128, 0), "tree"), ((192, 128, 192), "car"), ((64, 0, 64), "building"),
    ((192, 192, 0), "tree"), ((0, 0, 0), None), ((64, 192, 0), "building"),
]  # fmt: skip


def test_camvid_original(tmp_path):
    colours = numpy.zeros((32, 40, 3), numpy.uint8)
    colours[0, :32] = [colour for colour, _ in CAMVID_COLOURS]
    root = trees.write_camvid_full(tmp_path, colours)
    data = open_dataset(root, "train")
    assert data.layout == "camvid-full" and data.ids == ["0001TP_006690", "0006R0_f00930"]
    assert open_dataset(root, "val").ids == ["0016E5_07959"]
    assert open_dataset(root, "test").ids == ["0001TP_008550", "Seq05VD_f00000"]
    names = [data.classes[index] if index != 255 else None for index in corner(data, 32)]
    assert names == [name for _, name in CAMVID_COLOURS]
    colours[5, 5] = (1, 2, 3)
    Image.fromarray(colours).save(root / "LabeledApproved_full" / "0006R0_f00930_L.png")
    assert "labels must be the 32 colours of CamVid's label_colors.txt, found (1, 2, 3)" in list(problems(data))[1]


@pytest.mark.skipif(not SHARED.is_dir(), reason="CamVid is not beside this checkout (../shared/data/camvid)")
def test_the_split_by_frame_is_that_of_segnets_lists():
    for split in ("train", "val", "test"):
        ids = (SHARED / "camvid" / "splits" / f"{split}.txt").read_text().split()
        assert {split_of(identifier) for identifier in ids} == {split}


@pytest.mark.parametrize("identifier", ["0001TP_", "frame_000001", "0016E5_x", "0016E5"])
def test_what_is_no_frame_of_camvid(identifier):
    with pytest.raises(DataError, match="is no frame of CamVid"):
        split_of(identifier)


@pytest.mark.skipif(not SHARED.is_dir(), reason="MSRC-21 is not beside this checkout (../shared/data/msrc21)")
def test_msrc21_with_either_labels_and_its_pictures_in_two_splits():
    root = SHARED / "msrc21"
    splits = [open_dataset(root, split) for split in ("train", "val", "test")]
    assert [len(data) for data in splits] == [276, 59, 256] and len(splits[0].classes) == 21
    assert repeats(splits) == [
        "test picture 1_26_s is train picture 9_10_s, byte for byte",
        "test picture 1_27_s is val picture 9_15_s, byte for byte",
    ]
    assert len(leave_out(splits[2], ["1_26_s", "1_27_s"])) == 254
    official, clean = splits[1], open_dataset(root, "val", "msrc21-clean")
    assert clean.ids == official.ids and list(problems(clean)) == [None] * 59
    ignored = [sum((data.load(index)[1] == 255).sum() for index in range(5)) for data in (official, clean)]
    assert ignored[1] < ignored[0], "the clean labels are denser"


def test_clean_labels_that_are_not_there(tmp_path):
    trees.write_grey(tmp_path / "labels" / "1_1_s.png", labels([0]))
    with pytest.raises(DataError, match=r"MSRC-21: .*labels_clean is missing; it holds label maps ID.png"):
        open_dataset(tmp_path, "train", "msrc21-clean")


def test_pictures_left_out(tmp_path):
    data = open_dataset(trees.write_ade20k(tmp_path, labels([1])), "val")
    left = leave_out(data, ["ADE_val_00000001"])
    assert left.ids == ["ADE_val_00000002"] and left.pairs == data.pairs[1:]
    with pytest.raises(DataError, match="the val split has no picture ADE_val_3"):
        leave_out(data, ["ADE_val_3"])


def test_pictures_of_two_splits_are_told(tmp_path):
    root = trees.write_ade20k(tmp_path, labels([1]))
    for number in (1, 2):
        Image.new("RGB", (40, 32), (number, 0, 0)).save(root / "images" / "validation" / f"ADE_val_{number:08}.jpg")
    splits = [open_dataset(root, split) for split in ("train", "val")]
    assert repeats(splits) == [], "the train pictures are equal to each other, not to those of val"
    splits[1].pairs[0][0].write_bytes(splits[0].pairs[0][0].read_bytes())
    assert repeats(splits) == ["val picture ADE_val_00000001 is train picture ADE_train_00000001, byte for byte"]


@pytest.mark.parametrize(
    ("write", "missing", "message"),
    [
        (trees.write_ade20k, "annotations/training", "ADE20K: .*annotations/training is missing; it holds label maps"),
        (trees.write_ade20k, "images/training", "ADE20K: .*images/training is missing.*ADEChallengeData2016.zip"),
        (trees.write_voc, "VOC2012/SegmentationClass", "PASCAL VOC 2012: .*SegmentationClass is missing.*VOCtrainval"),
        (trees.write_voc, "VOC2012/ImageSets/Segmentation/train.txt", "train.txt: no such split file"),
        (trees.write_context_pngs, "VOC2010/JPEGImages", "PASCAL-Context: .*JPEGImages is missing.*VOCtrainval_03"),
        (trees.write_cityscapes, "gtFine", "Cityscapes: .*gtFine/train is missing.*gtFine_trainvaltest.zip"),
        (trees.write_cityscapes, "leftImg8bit/train", "Cityscapes: .*leftImg8bit/train is missing.*leftImg8bit_trainv"),
        (
            trees.write_coco_stuff,
            "stuffthingmaps",
            "COCO-Stuff: .*stuffthingmaps/train2017 is missing.*stuffthingmaps_",
        ),
        (trees.write_coco_stuff, "images/train2017", "COCO-Stuff: .*images/train2017 is missing.*train2017.zip"),
        (trees.write_context_json, "VOC2010/trainval_merged.json", "PASCAL-Context: no label maps in .*VOC2010"),
    ],
)
def test_what_is_missing_is_said_by_name(tmp_path, write, missing, message):
    root = write(tmp_path / "data", labels([1]))
    (name,) = {open_dataset(root, split).layout for split in ("train", "val")}
    (root / missing).rename(tmp_path / "moved")
    with pytest.raises(DataError, match=message):
        open_dataset(root, "train", name)


def test_camvid_original_without_its_labels(tmp_path):
    root = trees.write_camvid_full(tmp_path, numpy.zeros((32, 40, 3), numpy.uint8))
    (root / "LabeledApproved_full").rename(root / "moved")
    with pytest.raises(DataError, match=r"LabeledApproved_full is missing; it holds label maps \*_L.png"):
        open_dataset(root, "train")


def test_a_folder_without_pictures_of_the_expected_names(tmp_path):
    root = trees.write_cityscapes(tmp_path, labels([7]))
    for path in list((root / "gtFine" / "train").rglob("*.png")):
        path.rename(path.with_name(path.name.replace("gtFine_labelIds", "gtFine_color")))
    with pytest.raises(DataError, match=r"gtFine/train has no label maps \*_gtFine_labelIds.png"):
        open_dataset(root, "train")


@pytest.mark.parametrize("side", ["picture", "label map"])
def test_a_pair_that_lacks_a_side_is_named(tmp_path, side):
    root = trees.write_cityscapes(tmp_path, labels([7]))
    data = open_dataset(root, "train")
    data.pairs[0][side == "label map"].unlink()
    first, second = problems(open_dataset(root, "train"))
    assert f"no such {side}" in first and "aachen_000000_000019" in first and second is None


def test_a_folder_with_several_data_sets_needs_a_name(tmp_path):
    trees.write_voc(tmp_path, labels([1]))
    trees.write_context_pngs(tmp_path, labels([1]))
    with pytest.raises(DataError, match=r"several data sets, voc \(PASCAL VOC 2012\), context \(PASCAL-Context\)"):
        open_dataset(tmp_path, "train")
    assert open_dataset(tmp_path, "train", "context").layout == "context"
    with pytest.raises(DataError, match="unknown layout 'pascal'; layouts are folder, camvid-segnet"):
        open_dataset(tmp_path, "train", "pascal")


@pytest.mark.parametrize("path", sorted(CLASSES.glob("*.json")), ids=lambda path: path.stem)
def test_class_files_are_distinct_in_name_and_colour(path):
    names, palette = read_classes(path)
    assert len(set(names)) == len(names)
    shared = [name for name, colour in zip(names, palette, strict=True) if palette.count(colour) > 1]
    assert shared == (["road", "skyscraper"] if path.stem == "ade20k" else []), "ADE20K's palette has one colour twice"


TINY = [
    "backbone=resnet18", "channels=16", "codewords=4", "batch=1", "crop=32", "base_size=40", "epochs=1",
    "learning_rate=0.001", "workers=0", "rotation=0",
]  # fmt: skip


@pytest.mark.parametrize(
    ("write", "layout"), [(trees.write_voc, "voc"), (trees.write_cityscapes, "cityscapes")], ids=["voc", "cityscapes"]
)
def test_training_and_evaluation_in_a_public_layout(tmp_path, capsys, write, layout):
    root, out = write(tmp_path / "data", labels([7, 11, 8])), tmp_path / "run"
    assert train.main(["--data", str(root), "--out", str(out), *TINY, f"layout={layout}"]) == 0
    assert f"classes ({layout})" in capsys.readouterr().out
    folder = tmp_path / "evaluation"
    words = [str(out / "final.pt"), "--data", str(root), "--split", "val", "--output", str(folder), "--device", "cpu"]
    assert evaluate.main(words) == 0
    document = json.loads((folder / "evaluation.json").read_text())
    assert document["data"]["layout"] == layout and document["totals"]["pictures"] == 1
    assert evaluate.main([*words, "--layout", "context"]) == 2
    assert "PASCAL-Context: no label maps in" in capsys.readouterr().err


def test_check_data_names_what_a_public_data_set_lacks(tmp_path, capsys):
    root = trees.write_ade20k(tmp_path, labels([1]))
    assert train.main(["--data", str(root), "--check-data"]) == 0
    printed = capsys.readouterr().out
    assert "train: 2 pictures, 150 classes (ade20k)" in printed and "note: val picture" in printed
    (root / "annotations" / "validation").rename(root / "moved")
    assert train.main(["--data", str(root), "--check-data"]) == 1
    assert "annotations/validation is missing" in capsys.readouterr().out
    assert train.main(["--data", str(root), "--out", str(tmp_path / "run"), *TINY]) == 2
    assert not (tmp_path / "run").exists()
