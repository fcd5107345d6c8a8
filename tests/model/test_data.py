"""Every rule of a data set on disk: broken, it is an error that names the file and the rule."""

import json

import numpy
import pytest
from PIL import Image, PngImagePlugin

from model.data import DataError, open_dataset, problems, read_classes
from model.inspect import read_picture
from service.images import decode

CLASSES = [{"id": 0, "name": "sky", "color": [0, 0, 255]}, {"id": 1, "name": "road", "color": [90, 90, 90]}]


def write_folder(root, size=(8, 6), ids=("a", "b")):
    for name in ("images", "labels", "splits"):
        (root / name).mkdir(parents=True, exist_ok=True)
    (root / "classes.json").write_text(json.dumps({"classes": CLASSES}))
    label = numpy.zeros((size[1], size[0]), numpy.uint8)
    label[0], label[1] = 1, 255
    for identifier in ids:
        Image.new("RGB", size, (10, 20, 30)).save(root / "images" / f"{identifier}.png")
        Image.fromarray(label).save(root / "labels" / f"{identifier}.png")
    for split in ("train", "val"):
        (root / "splits" / f"{split}.txt").write_text("\n".join(ids) + "\n")
    return root


def only_problem(root):
    (problem,) = [p for p in problems(open_dataset(root, "train")) if p]
    return problem


def test_folder_layout(tmp_path):
    data = open_dataset(write_folder(tmp_path), "train")
    image, mask = data.load(0)
    assert data.classes == ["sky", "road"] and data.palette == [[0, 0, 255], [90, 90, 90]] and data.ids == ["a", "b"]
    assert image.shape == (6, 8, 3) and image.dtype == numpy.uint8 and tuple(image[0, 0]) == (10, 20, 30)
    assert mask.dtype == numpy.uint8 and mask[:3, 0].tolist() == [1, 255, 0]
    assert list(problems(data)) == [None, None]


def test_camvid_tutorial_layout(tmp_path):
    for name in ("train", "trainannot"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "train" / "x_1.png")
    Image.fromarray(numpy.array([[0, 10], [11, 3]], numpy.uint8).repeat(2, 0).repeat(2, 1)).save(
        tmp_path / "trainannot" / "x_1.png"
    )
    (tmp_path / "train.txt").write_text("/SegNet/CamVid/train/x_1.png /SegNet/CamVid/trainannot/x_1.png\n")
    data = open_dataset(tmp_path, "train")
    _, mask = data.load(0)
    assert len(data.classes) == 11 and data.ids == ["x_1"]
    assert mask[::2, ::2].tolist() == [[0, 10], [255, 3]], "11 is void"


def test_a_label_out_of_range(tmp_path):
    write_folder(tmp_path)
    Image.fromarray(numpy.full((6, 8), 2, numpy.uint8)).save(tmp_path / "labels" / "b.png")
    assert "labels/b.png: labels must be 0..1 or 255 (ignore), found 2" in only_problem(tmp_path)


def test_a_picture_without_its_label(tmp_path):
    (write_folder(tmp_path) / "labels" / "a.png").unlink()
    assert "labels/a.png: no such label map" in only_problem(tmp_path)


def test_a_label_without_its_picture(tmp_path):
    (write_folder(tmp_path) / "images" / "a.png").unlink()
    assert "images/a.jpg: no such picture" in only_problem(tmp_path)


def test_sizes_that_differ(tmp_path):
    write_folder(tmp_path)
    Image.new("L", (8, 7)).save(tmp_path / "labels" / "a.png")
    assert "labels/a.png: a label map must have its picture's size, 8x6, this one is 8x7" in only_problem(tmp_path)


@pytest.mark.parametrize("keep", [0, 20])
def test_an_unreadable_file(tmp_path, keep):
    path = write_folder(tmp_path) / "images" / "b.png"
    path.write_bytes(path.read_bytes()[:keep])
    assert "images/b.png: not a readable picture" in only_problem(tmp_path)


def test_a_picture_of_more_pixels_than_pillow_opens(tmp_path, monkeypatch):
    write_folder(tmp_path)
    Image.new("1", (20, 10)).save(tmp_path / "images" / "b.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64)
    assert "images/b.png: not a readable picture: Image size (200 pixels)" in only_problem(tmp_path)


def test_a_colour_label_map(tmp_path):
    write_folder(tmp_path)
    Image.new("RGB", (8, 6)).save(tmp_path / "labels" / "a.png")
    assert "labels/a.png: a label map must have one channel, this one is RGB" in only_problem(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("classes.json", '{"classes": [{"id": 1, "name": "a", "color": [0, 0, 0]}]}', "ids must be 0, 1, 2"),
        ("classes.json", '{"classes": [{"id": 0, "name": "a", "color": [0, 0, 999]}]}', "whole numbers in 0..255"),
        ("classes.json", '{"classes": [{"id": 0, "name": "a", "color": [1e999, 0, 0]}]}', "whole numbers in 0..255"),
        ("classes.json", '{"classes": [{"id": 0, "name": "a", "color": [1.9, 0, 0]}]}', "whole numbers in 0..255"),
        ("classes.json", '{"classes": [{"id": 0, "name": null, "color": [0, 0, 0]}]}', "a text that is not empty"),
        ("classes.json", '{"classes": [{"id": 0, "name": ["x"], "color": [0, 0, 0]}]}', "a text that is not empty"),
        ("classes.json", '{"classes": [{"id": 0, "name": "", "color": [0, 0, 0]}]}', "a text that is not empty"),
        ("classes.json", "not json", "expected"),
        ("splits/train.txt", "", "the split is empty"),
        ("splits/train.txt", "a\nb\na\n", "a split has every picture once, found a more than once"),
        (
            "classes.json",
            '{"classes": [{"id": 0, "name": "a", "color": [0, 0, 0]}, {"id": 1, "name": "a", "color": [9, 0, 0]}]}',
            "every class needs a name of its own, found a more than once",
        ),
        ("classes.json", '{"classes": [{"id": 0.0, "name": "a", "color": [0, 0, 0]}]}', r"found \[0\.0\]"),
        ("classes.json", '{"classes": [{"id": false, "name": "a", "color": [0, 0, 0]}]}', r"found \[False\]"),
    ],
)
def test_broken_lists(tmp_path, name, content, words):
    (write_folder(tmp_path) / name).write_text(content)
    with pytest.raises(DataError, match=words):
        open_dataset(tmp_path, "train")


@pytest.mark.parametrize("name", ["classes.json", "splits/train.txt"])
def test_lists_are_utf_8_with_or_without_a_mark(tmp_path, name):
    path = write_folder(tmp_path) / name
    content = path.read_bytes()
    path.write_bytes(b"\xef\xbb\xbf" + content)
    assert open_dataset(tmp_path, "train").ids == ["a", "b"]
    path.write_bytes(content + "ü".encode("latin-1"))
    with pytest.raises(DataError, match=f"{name}: not readable as UTF-8 text"):
        open_dataset(tmp_path, "train")


def test_a_split_in_which_nothing_is_labelled(tmp_path):
    write_folder(tmp_path)
    for identifier in ("a", "b"):
        Image.new("L", (8, 6), 255).save(tmp_path / "labels" / f"{identifier}.png")
    assert "no label map of the train split has a pixel of a class" in only_problem(tmp_path)


def test_pictures_are_read_as_the_service_reads_them(tmp_path):
    path = write_folder(tmp_path) / "images" / "a.png"
    wide = numpy.linspace(0, 65535, 48).round().astype(numpy.uint16).reshape(6, 8)
    Image.fromarray(wide).save(path)
    grey = open_dataset(tmp_path, "train").load(0)[0]
    assert grey.shape == (6, 8, 3) and numpy.array_equal(grey[..., 0], (wide / 257).round())
    Image.new("RGBA", (8, 6), (200, 0, 0, 0)).save(path)
    assert (open_dataset(tmp_path, "train").load(0)[0] == 255).all()
    palette = Image.fromarray(numpy.arange(48, dtype=numpy.uint8).reshape(6, 8)).convert("P")
    pictures = [(Image.fromarray(wide), int(wide[2, 3])), (palette, 7), (palette.convert("L"), 7), (palette, None)]
    for picture, transparent in pictures:
        picture.save(path, **({} if transparent is None else {"transparency": transparent}))
        served = decode(path.read_bytes(), max_bytes=10**6, max_pixels=10**6).pixels
        assert numpy.array_equal(open_dataset(tmp_path, "train").load(0)[0], served)
    Image.new("F", (8, 6)).save(path, "TIFF")
    assert "images/a.png: not a readable picture: pictures with pixel mode F are not supported" in only_problem(
        tmp_path
    )


def test_a_turned_picture_has_the_orientation_of_its_labels(tmp_path):
    path = write_folder(tmp_path) / "images" / "a.png"
    pixels = numpy.arange(6 * 8 * 3, dtype=numpy.uint8).reshape(6, 8, 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(path, exif=exif)
    assert numpy.array_equal(open_dataset(tmp_path, "train").load(0)[0], pixels)
    Image.fromarray(numpy.rot90(pixels)).save(path, exif=exif)
    assert numpy.array_equal(open_dataset(tmp_path, "train").load(0)[0], pixels)


def test_a_damaged_exif_block_denies_no_picture(tmp_path):
    """One whose orientation can be read, but not all the rest, and one that cannot be read at all."""
    path = write_folder(tmp_path) / "images" / "a.png"
    pixels = numpy.arange(6 * 8 * 3, dtype=numpy.uint8).reshape(6, 8, 3)
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = 6, 72.0
    block = exif.tobytes().replace(b"\x01\x1a\0\5", b"\x01\x03\0\5")
    Image.fromarray(numpy.rot90(pixels)).save(path, exif=block)
    assert numpy.array_equal(open_dataset(tmp_path, "train").load(0)[0], pixels)
    assert numpy.array_equal(read_picture(path), pixels)
    for block in (b"Exif\0\0II*\0", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0garbage"):
        Image.fromarray(pixels).save(path, exif=block)
        assert numpy.array_equal(read_picture(path), pixels)


def test_a_damaged_file_is_a_problem_whatever_its_reader_raises(tmp_path, monkeypatch):
    """Pillow's reader of AVIF raises RuntimeError."""
    write_folder(tmp_path, ids=("a",))

    def load(image):
        raise RuntimeError("Failed to decode frame 0")

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
    assert "images/a.png: not a readable picture: Failed to decode frame 0" in only_problem(tmp_path)


def test_what_is_no_data_set(tmp_path):
    with pytest.raises(DataError, match=r"not a data set; expected classes\.json"):
        open_dataset(tmp_path, "train")
    with pytest.raises(DataError, match="no such data folder"):
        open_dataset(tmp_path / "absent", "train")
    with pytest.raises(DataError, match="unknown split 'eval'; splits are train, val, test"):
        open_dataset(tmp_path, "eval")
    with pytest.raises(DataError, match="no such split file"):
        open_dataset(write_folder(tmp_path), "test")


def test_classes_are_read_in_the_order_of_their_ids(tmp_path):
    (tmp_path / "c.json").write_text(json.dumps({"classes": CLASSES[::-1]}))
    assert read_classes(tmp_path / "c.json") == (["sky", "road"], [[0, 0, 255], [90, 90, 90]])
    with pytest.raises(DataError, match=r"absent\.json: no such file$"):
        read_classes(tmp_path / "absent.json")
    (tmp_path / "half.json").write_text(json.dumps({"classes": [{**CLASSES[0], "id": 0, "name": "\ud800"}]}))
    with pytest.raises(DataError, match=r"a name must be a text that is not empty, found others at ids \[0\]"):
        read_classes(tmp_path / "half.json")


def test_names_may_be_more_than_a_label_map_holds(tmp_path):
    path = write_folder(tmp_path) / "classes.json"
    entries = [{"id": index, "name": f"class {index}", "color": [0, 0, 0]} for index in range(256)]
    path.write_text(json.dumps({"classes": entries}))
    assert len(read_classes(path)[0]) == 256
    with pytest.raises(DataError, match="at most 255 classes fit a label map whose 255 means ignore, found 256"):
        open_dataset(tmp_path, "train")
