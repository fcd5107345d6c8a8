"""`python -m model.evaluate` on three made-up pictures and a network whose answers are known beforehand."""

import hashlib
import json

import numpy
import pytest
import torch
from PIL import Image

from model import evaluate, evaluation
from model.calibration import Calibration
from model.checkpoint import Checkpoint, save_checkpoint
from model.config import ModelConfig
from model.data import AHEAD
from model.encnet import EncNet

CONFIG = ModelConfig(num_classes=3, backbone="resnet18", channels=8, codewords=2, auxiliary=False)
SIZES = [(24, 32), (33, 20), (16, 16)]


def make_checkpoint(path, config=CONFIG, classes=("road", "sky", "car"), **values):
    """All weights 0, so that the biases decide: every pixel is class 1, presence is sure of 0 and 1 and denies 2."""
    with torch.device("meta"):
        state = EncNet(config).state_dict()
    weights = {key: torch.zeros((), dtype=value.dtype).expand(value.shape) for key, value in state.items()}
    weights["head.classifier.bias"] = torch.tensor([0.0, 2.0, 1.0])
    weights["head.presence.bias"] = torch.tensor([3.0, 3.0, -3.0])
    palette = [[9, 9, 9], [99, 99, 99], [199, 199, 199]]
    save_checkpoint(path, Checkpoint(config, weights, list(classes), palette, base_size=32, **values))
    return path


@pytest.fixture
def checkpoint(tmp_path):
    return make_checkpoint(tmp_path / "net.pt", name="tiny", step=5)


@pytest.fixture
def data(tmp_path):
    """Truth: picture 0 is all class 1, picture 1 half class 0 and half 1, picture 2 class 1 and a row to ignore."""
    root = tmp_path / "made-up"
    for folder in ("images", "labels", "splits"):
        (root / folder).mkdir(parents=True)
    for index, (height, width) in enumerate(SIZES):
        Image.new("RGB", (width, height), (50 * index, 90, 120)).save(root / "images" / f"p{index}.png")
        truth = numpy.ones((height, width), dtype=numpy.uint8)
        if index == 1:
            truth[:, : width // 2] = 0
        if index == 2:
            truth[0] = 255
        Image.fromarray(truth).save(root / "labels" / f"p{index}.png")
    (root / "splits" / "test.txt").write_text("p0\np1\np2\n")
    classes = [{"id": i, "name": n, "color": [80 * i, 10, 200]} for i, n in enumerate(("road", "sky", "car"))]
    (root / "classes.json").write_text(json.dumps({"classes": classes}))
    return root


def run(*arguments) -> int:
    return evaluate.main([str(argument) for argument in arguments])


def read(folder) -> dict:
    with Image.open(folder / "contact_sheet.png") as sheet:
        assert sheet.format == "PNG"
    with Image.open(folder / "reliability.png") as diagram:
        assert diagram.format == "PNG"
    return json.loads((folder / "evaluation.json").read_text())


def test_every_figure_of_a_known_answer(checkpoint, data, tmp_path, capsys):
    assert run(checkpoint, "--data", data, "--device", "cpu") == 0
    document = read(tmp_path / "net.evaluation")
    road, sky = 33 * 10, 24 * 32 + 33 * 10 + 15 * 16
    totals = document["totals"]
    assert totals["pixel_accuracy"] == pytest.approx(sky / (sky + road))
    assert totals["miou"] == pytest.approx(sky / (sky + road) / 2)
    assert totals["miou_authors"] == pytest.approx(sky / (sky + road) / 3)
    assert totals["class_accuracy"] == pytest.approx(1 / 2)
    # road is in one of three pictures and all scores are equal: precision 1/3; sky is in all; car in none
    assert totals["presence_map"] == pytest.approx((1 / 3 + 1) / 2)
    assert totals["presence_macro_f1"] == pytest.approx((2 / (3 + 1) + 1) / 2)
    # constant scores: 0.95 for road and sky, 0.05 for car, which are in 1, 3 and 0 of 3 pictures
    high, low = 1 / (1 + numpy.exp(-3)), 1 / (1 + numpy.exp(3))
    assert totals["presence_ece"] == pytest.approx((high - 1 / 3 + 1 - high + low) / 3)
    assert totals["pictures"] == 3
    assert totals["pictures_per_second"] > 0
    names = [row.pop("name") for row in document["classes"]]
    assert names == ["road", "sky", "car"]
    assert document["classes"][0] == {
        "iou": 0,
        "accuracy": 0,
        "presence_ap": pytest.approx(1 / 3),
        "presence_f1": pytest.approx(1 / 2),
        "presence_ece": pytest.approx(high - 1 / 3),
        "pictures": 1,
        "pixels": road,
    }
    assert document["classes"][2] == {
        "iou": None,
        "accuracy": None,
        "presence_ap": None,
        "presence_f1": None,
        "presence_ece": pytest.approx(low),
        "pictures": 0,
        "pixels": 0,
    }
    assert document["confusion"] == [[0, road, 0], [0, sky, 0], [0, 0, 0]]
    assert document["checkpoint"]["sha256"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert document["checkpoint"]["step"] == 5
    assert document["options"]["base_size"] == 32
    printed = capsys.readouterr().out
    assert "mIoU" in printed
    assert "road" in printed
    assert "evaluation.json" in printed


@pytest.mark.parametrize("options", [(), ("--protocol", "windows", "--crop", 24)], ids=["whole", "windows"])
def test_presence_is_that_of_the_checkpoints_calibration(data, tmp_path, options):
    calibration = Calibration((0.5, 1.0, 1.0), (-1.5, 1.0, 0.0), "platt", 9)
    path = make_checkpoint(tmp_path / "net.pt", calibration=calibration)
    assert run(path, "--data", data, "--flip", "--scales", "0.5,1", *options) == 0
    document = read(tmp_path / "net.evaluation")
    assert document["checkpoint"]["calibration"] == calibration.to_dict()
    errors = [row["presence_ece"] for row in document["classes"]]
    assert errors == pytest.approx([1 / 2 - 1 / 3, 1 / (1 + numpy.exp(4)), 1 / (1 + numpy.exp(3))], abs=1e-6)


@pytest.mark.parametrize("merge", ["softmax", "exp_sum"])
def test_windows_of_several_scales_with_mirrors(checkpoint, data, tmp_path, merge):
    options = ("--protocol", "windows", "--merge", merge, "--crop", 24, "--scales", "0.5,1.25", "--flip")
    assert run(checkpoint, "--data", data, "--output", tmp_path / "out" / "here", *options) == 0
    document = read(tmp_path / "out" / "here")
    assert document["totals"]["pixel_accuracy"] == pytest.approx((768 + 330 + 240) / (768 + 660 + 240))
    assert document["options"]["scales"] == [0.5, 1.25]
    assert document["options"]["flip"] is True
    assert document["options"]["merge"] == merge


def test_batches_change_no_figure(checkpoint, data, tmp_path):
    """Three pictures of one size between others; more than a batch of them."""
    for index in (3, 4):
        for folder in ("images", "labels"):
            (data / folder / f"p{index}.png").write_bytes((data / folder / "p1.png").read_bytes())
    (data / "splits" / "test.txt").write_text("p1\np0\np3\np2\np4\n")
    documents = []
    for batch in (1, 2):
        assert run(checkpoint, "--data", data, "--batch", batch, "--output", tmp_path / str(batch)) == 0
        documents.append(read(tmp_path / str(batch)))
    one, two = documents
    assert one["classes"] == two["classes"] and one["confusion"] == two["confusion"]
    sheets = [(tmp_path / str(batch) / "contact_sheet.png").read_bytes() for batch in (1, 2)]
    assert sheets[0] == sheets[1], "pictures keep their order"
    assert run(checkpoint, "--data", data, "--batch", 2, "--precision", "bf16", "--output", tmp_path / "half") == 0
    assert read(tmp_path / "half")["options"]["precision"] == "bf16"


def test_few_pictures_wait_for_others_of_their_size():
    class Data:
        def load(self, index):
            loaded.append(index)
            size = (8, 8) if index % 6 == 0 else (9, 9 + index)
            return numpy.zeros((*size, 3), numpy.uint8), numpy.zeros(size, numpy.uint8)

    loaded, given = [], []
    for group in evaluation._batches(Data(), 60, 4):
        assert len({truth.shape for _, _, truth in group}) == 1 and len(group) <= 4
        assert len(loaded) - len(given) <= 4 * 4 + 1 + AHEAD
        given += [index for index, _, _ in group]
    assert sorted(given) == list(range(60))
    assert given[:3] == [0, 6, 12], "the largest group goes first"


def test_an_unusable_output_is_found_before_the_work(checkpoint, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "build_model", lambda checkpoint: pytest.fail("a model is built"))
    (tmp_path / "taken").touch()
    assert run(checkpoint, "--data", data, "--output", tmp_path / "taken") == 2
    assert capsys.readouterr().err == f"error: --output {tmp_path / 'taken'}: is a file, not a folder\n"
    assert run(checkpoint, "--data", data, "--output", "/proc/self") == 2
    assert "/proc/self: nothing can be written there: " in capsys.readouterr().err


def test_limit_and_base_size(checkpoint, data, tmp_path):
    assert run(checkpoint, "--data", data, "--limit", 1, "--base-size", 48, "--scales", "0.5,1") == 0
    document = read(tmp_path / "net.evaluation")
    assert document["totals"]["pictures"] == 1
    assert document["totals"]["miou"] == 1
    assert document["options"]["base_size"] == 48


def test_pictures_left_out_do_not_count(checkpoint, data, tmp_path, capsys):
    assert run(checkpoint, "--data", data, "--without", "p1,p2") == 0
    document = read(tmp_path / "net.evaluation")
    assert document["totals"]["pictures"] == document["data"]["pictures_in_split"] == 1
    assert document["totals"]["pixel_accuracy"] == 1 and document["options"]["without"] == ["p1", "p2"]
    assert run(checkpoint, "--data", data, "--without", "p1,p7") == 2
    assert "the test split has no picture p7" in capsys.readouterr().err
    assert run(checkpoint, "--data", data, "--without", "p0,p1,p2") == 2
    assert "nothing is left of the test split without its 3 pictures" in capsys.readouterr().err


def test_classes_named_differently_are_remarked(tmp_path, data, capsys):
    path = make_checkpoint(tmp_path / "other.pt", classes=("road", "heaven", "[car]"))
    assert run(path, "--data", data, "--limit", 1) == 0
    assert "heaven / sky, [car] / car" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--merge", "exp_sum"), "need --protocol windows"),
        (("--crop", 24), "need --protocol windows"),
        (("--device", "nonsense"), "--device nonsense: expected auto, cpu, cuda or cuda:N"),
        (("--device", "meta"), "--device meta: expected auto, cpu, cuda or cuda:N"),
        (("--device", "cuda:99"), "--device cuda:99: not available here"),
        (("--split", "val"), "val.txt"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(checkpoint, data, options, said, capsys):
    assert run(checkpoint, "--data", data, *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert said in error


def test_a_checkpoint_with_other_classes(tmp_path, data, capsys):
    config = ModelConfig(num_classes=4, backbone="resnet18", channels=8, codewords=2, auxiliary=False)
    with torch.device("meta"):
        state = EncNet(config).state_dict()
    weights = {key: torch.zeros((), dtype=value.dtype).expand(value.shape) for key, value in state.items()}
    checkpoint = Checkpoint(config, weights, list("abcd"), [[1, 1, 1]] * 4, base_size=32)
    save_checkpoint(tmp_path / "four.pt", checkpoint)
    assert run(tmp_path / "four.pt", "--data", data) == 2
    assert "the checkpoint has 4 classes, the data set 3" in capsys.readouterr().err
    assert not (tmp_path / "four.evaluation").exists()


@pytest.mark.parametrize(
    "options",
    [
        ("--scales", "1,x"),
        ("--scales", "0"),
        ("--scales", "1,1e9"),
        ("--scales", "nan"),
        ("--scales", ""),
        ("--crop", "3"),
        ("--base-size", "10000000"),
        ("--limit", "0"),
    ],
)
def test_options_that_make_no_sense(checkpoint, data, options, capsys):
    with pytest.raises(SystemExit) as stop:
        run(checkpoint, "--data", data, *options)
    assert stop.value.code == 2
    assert f"argument {options[0]}: expected" in capsys.readouterr().err


def test_help_shows_the_authors_protocol(capsys):
    with pytest.raises(SystemExit):
        run("--help")
    assert "--protocol windows --merge exp_sum" in capsys.readouterr().out
