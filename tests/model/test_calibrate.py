"""`python -m model.calibrate` on made-up pictures and a network whose presence logits are known beforehand."""

import dataclasses
import json

import numpy
import pytest
import torch
from PIL import Image

from model import calibrate
from model.calibration import Calibration
from model.checkpoint import Checkpoint, build_model, load_checkpoint, save_checkpoint
from model.config import ModelConfig
from model.encnet import EncNet
from model.foreign import PYTORCH_ENCODING, inverse, rename, renaming
from model.predict import predict

CONFIG = ModelConfig(num_classes=3, backbone="resnet18", channels=8, codewords=2, auxiliary=False)
LOGITS = [3.0, 4.0, -3.0]
PICTURES = 20


def make_checkpoint(**values) -> Checkpoint:
    """All weights 0, so that the biases decide: presence logits are LOGITS for every picture."""
    with torch.device("meta"):
        state = EncNet(CONFIG).state_dict()
    weights = {key: torch.zeros((), dtype=value.dtype).expand(value.shape) for key, value in state.items()}
    weights["head.presence.bias"] = torch.tensor(LOGITS)
    return Checkpoint(CONFIG, weights, ["road", "sky", "car"], [[9, 9, 9]] * 3, base_size=16, **values)


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "net.pt"
    save_checkpoint(path, make_checkpoint(step=7, training={"optimizer": {"rate": torch.ones(2)}}, flip=True))
    return path


def write_data(root, road_in, otherwise=2):
    """20 pictures of 8x8 for each split: road and sky in those that `road_in` names, one class alone in the others."""
    for folder in ("images", "labels", "splits"):
        (root / folder).mkdir(parents=True)
    for split, having in road_in.items():
        ids = [f"{split}{index}" for index in range(PICTURES)]
        for index, identifier in enumerate(ids):
            Image.new("RGB", (8, 8), (10 * index, 90, 120)).save(root / "images" / f"{identifier}.png")
            truth = numpy.full((8, 8), otherwise, dtype=numpy.uint8)
            if index in having:
                truth[:4], truth[4:] = 0, 1
            Image.fromarray(truth).save(root / "labels" / f"{identifier}.png")
        (root / "splits" / f"{split}.txt").write_text("\n".join(ids))
    classes = [{"id": i, "name": n, "color": [80 * i, 10, 200]} for i, n in enumerate(("road", "sky", "car"))]
    (root / "classes.json").write_text(json.dumps({"classes": classes}))
    return root


HALF, FEW, ALL = range(0, PICTURES, 2), range(0, PICTURES, 7), range(PICTURES)


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "data", {"val": HALF, "test": HALF})


def run(*arguments) -> int:
    return calibrate.main([str(argument) for argument in arguments])


def test_a_score_becomes_the_share_of_pictures_and_nothing_else_changes(checkpoint, data, tmp_path, capsys):
    """Each class is in half of the pictures, whose scores are 0.95, 0.98 and 0.05."""
    before = checkpoint.read_bytes()
    assert run(checkpoint, "--data", data, "--method", "platt") == 0
    assert checkpoint.read_bytes() == before
    old, new = load_checkpoint(checkpoint), load_checkpoint(tmp_path / "net.calibrated.pt")
    assert new.calibration is not None
    assert (new.calibration.method, new.calibration.pictures) == ("platt", PICTURES)
    score = new.calibration.apply(torch.tensor(LOGITS)).sigmoid()
    assert score.tolist() == pytest.approx([0.5] * 3, abs=0.06)
    assert new.weights.keys() == old.weights.keys()
    assert all(torch.equal(new.weights[key], value) for key, value in old.weights.items())
    assert torch.equal(new.training["optimizer"]["rate"], torch.ones(2))
    skipped = {"weights", "training", "calibration", "sha256"}
    for field in dataclasses.fields(Checkpoint):
        assert field.name in skipped or getattr(new, field.name) == getattr(old, field.name), field.name
    captured = capsys.readouterr()
    assert "as trained" in captured.out
    assert "by cross-validation: 20 pictures" in captured.out
    assert "net.calibrated.pt, platt fitted on 20 pictures" in captured.out
    assert "left to the temperature" not in captured.err
    assert "worse" not in captured.err


def test_the_calibrated_checkpoint_predicts_so(checkpoint, data, tmp_path):
    assert run(checkpoint, "--data", data) == 0
    new = load_checkpoint(tmp_path / "net.calibrated.pt")
    assert new.calibration.method == "temperature"
    assert len(set(new.calibration.scale)) == 1
    image = torch.zeros(1, 8, 8, 3, dtype=torch.uint8)
    options = {"mean": new.mean, "std": new.std, "base_size": 16, "scales": (1.0, 2.0), "flip": True}
    answer = predict(build_model(new), image, calibration=new.calibration, **options)
    expected = (torch.tensor(LOGITS) * new.calibration.scale[0]).sigmoid()
    torch.testing.assert_close(answer.presence[0], expected)
    plain = predict(build_model(new), image, **options)
    torch.testing.assert_close(plain.presence[0], torch.tensor(LOGITS).sigmoid())
    assert torch.equal(plain.probabilities, answer.probabilities)


def test_in_place_and_again(checkpoint, data):
    assert run(checkpoint, "--data", data, "--out", checkpoint, "--layout", "folder") == 0
    first = load_checkpoint(checkpoint)
    assert run(checkpoint, "--data", data, "--out", checkpoint) == 0
    assert load_checkpoint(checkpoint).calibration == first.calibration, "fitted on the logits, not on its own result"
    assert [path.name for path in checkpoint.parent.iterdir() if path.is_file()] == ["net.pt"]


def test_figures_of_another_split_and_a_warning_where_they_got_worse(checkpoint, tmp_path, capsys):
    """Fitted where road is in few pictures, judged where it is in all."""
    data = write_data(tmp_path / "moved", {"val": FEW, "test": ALL})
    assert run(checkpoint, "--data", data, "--method", "platt", "--report-split", "test") == 0
    captured = capsys.readouterr()
    assert "fitted on val, figures of test: 20 pictures" in captured.out
    assert "warning: platt made presence worse (ECE and NLL)" in captured.err
    assert (tmp_path / "net.calibrated.pt").is_file()


def test_classes_that_do_not_vary_are_named(checkpoint, tmp_path, capsys):
    data = write_data(tmp_path / "skies", {"val": HALF}, otherwise=1)
    assert run(checkpoint, "--data", data, "--method", "platt") == 0
    assert "left to the temperature: sky, car" in capsys.readouterr().err
    found = load_checkpoint(tmp_path / "net.calibrated.pt").calibration
    assert found.bias[0] != 0
    assert found.bias[1:] == (0, 0)


def test_folds_are_runs_of_pictures_scored_by_the_others():
    logits = torch.zeros(10, 1, dtype=torch.float64)
    present = torch.arange(10)[:, None] < 3
    scores = calibrate.cross_validated("platt", logits, present)[:, 0]
    assert scores[0] == scores[1] < scores[2] < scores[4] == scores[9], "the more of the others have it, the higher"
    assert scores[0] == pytest.approx(1 / 8, abs=0.1)
    assert scores[9] == pytest.approx(3 / 8, abs=0.1)


def test_figures_by_hand():
    scores, present = numpy.array([[0.9, 0.5], [0.9, 0.5]]), numpy.array([[True, False], [False, False]])
    found = calibrate.figures(scores, present)
    assert found["ece"] == pytest.approx((0.4 + 0.5) / 2)
    assert found["nll"] == pytest.approx(-numpy.log([0.9, 0.5, 0.1, 0.5]).mean())
    assert found["map"] == pytest.approx(1 / 2)


def refused(capsys, *arguments) -> str:
    assert run(*arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    return error


def test_a_mistake_is_one_sentence_and_exit_code_2(checkpoint, data, tmp_path, capsys):
    assert "is the split to fit on" in refused(capsys, checkpoint, "--data", data, "--report-split", "val")
    assert "/proc/self: nothing can be written there" in refused(
        capsys, checkpoint, "--data", data, "--out", "/proc/self/net.pt"
    )
    assert "does not exist" in refused(capsys, checkpoint, "--data", data, "--out", tmp_path / "no" / "net.pt")
    assert "is a folder" in refused(capsys, checkpoint, "--data", data, "--out", data)
    assert "no such file" in refused(capsys, tmp_path / "none.pt", "--data", data)
    assert "no such data folder" in refused(capsys, checkpoint, "--data", tmp_path / "none")
    (data / "splits" / "val.txt").write_text("val0\nval2")
    assert "each class is in all of its 2 pictures or in none" in refused(capsys, checkpoint, "--data", data)
    classes = [{"id": i, "name": f"{i}", "color": [1, 2, 3]} for i in range(4)]
    (data / "classes.json").write_text(json.dumps({"classes": classes}))
    assert "the checkpoint has 3 classes, the data set 4" in refused(capsys, checkpoint, "--data", data)
    assert not (tmp_path / "net.calibrated.pt").exists()


def test_the_train_split_is_no_choice(checkpoint, data, capsys):
    with pytest.raises(SystemExit):
        run(checkpoint, "--data", data, "--split", "train")
    assert "invalid choice: 'train'" in capsys.readouterr().err


def test_a_published_file_is_not_replaced(data, tmp_path, capsys):
    """A foreign checkpoint can be calibrated, into a file of our own format."""
    table = inverse(renaming(PYTORCH_ENCODING, deep_stem=False))
    theirs = {rename(key, table): value for key, value in make_checkpoint().weights.items()}
    path = tmp_path / "published.pth"
    torch.save({"state_dict": theirs}, path)
    for folder, name in (("images", "val0"), ("images", "val1"), ("labels", "val0"), ("labels", "val1")):
        with Image.open(data / folder / f"{name}.png") as square:
            narrow = square.resize((64, 8)).crop((0, 3, 64, 5))  # at this format's base size still a small view
        narrow.save(data / folder / f"{name}.png")
    (data / "splits" / "val.txt").write_text("val0\nval1")
    before = path.read_bytes()
    assert "would replace a checkpoint in PyTorch-Encoding's format" in refused(
        capsys, path, "--data", data, "--out", path
    )
    assert path.read_bytes() == before
    assert run(path, "--data", data) == 0
    converted = load_checkpoint(tmp_path / "published.calibrated.pt")
    assert isinstance(converted.calibration, Calibration)
    published = load_checkpoint(path).weights
    assert converted.weights.keys() == published.keys()
    assert all(torch.equal(value, published[key]) for key, value in converted.weights.items())
