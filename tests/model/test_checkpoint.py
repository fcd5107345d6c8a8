"""Checkpoint files: what goes in comes out, and what is wrong with a file is said."""

import collections
import fractions
import hashlib
import pickle
import shlex
import subprocess
import sys

import pytest
import torch

from model.calibration import Calibration
from model.checkpoint import (
    FORMAT,
    Checkpoint,
    CheckpointError,
    build_model,
    load_checkpoint,
    save_checkpoint,
)
from model.config import ModelConfig
from model.encnet import EncNet
from model.weights import read_pickle

CONFIG = ModelConfig(num_classes=2, backbone="resnet18", channels=8, codewords=3, auxiliary=False)


def small_checkpoint(**values) -> Checkpoint:
    """Every weight is one number repeated, so that a file takes next to no space."""
    with torch.device("meta"):
        state = EncNet(CONFIG).state_dict()
    weights = {
        key: torch.tensor(number / 100).to(value.dtype).expand(value.shape)
        for number, (key, value) in enumerate(state.items())
    }
    return Checkpoint(CONFIG, weights, ["road", "sky"], [[1, 2, 3], [4, 5, 6]], base_size=480, **values)


def document(path) -> dict:
    return torch.load(path, weights_only=True)


@pytest.fixture
def path(tmp_path):
    save_checkpoint(tmp_path / "net.pt", small_checkpoint())
    return tmp_path / "net.pt"


def test_everything_comes_back(tmp_path):
    checkpoint = small_checkpoint(
        mean=(0.1, 0.2, 0.3),
        std=(0.4, 0.5, 0.6),
        scales=(0.5, 1.0),
        flip=True,
        name="tiny",
        licence="CC0",
        description="made up",
        step=7,
        training={"optimizer": {"state": {0: {"momentum": torch.ones(2)}}}},
        calibration=Calibration((1.0, 2.0), (0.0, -1.0), "platt", 11),
    )
    path = tmp_path / "net.pt"
    save_checkpoint(path, checkpoint)
    loaded = load_checkpoint(path)
    assert loaded.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert set(loaded.versions) == {"torch", "numpy", "python"}
    assert loaded.weights.keys() == checkpoint.weights.keys()
    assert all(torch.equal(loaded.weights[key], value) for key, value in checkpoint.weights.items())
    for name in (
        "config",
        "classes",
        "palette",
        "base_size",
        "mean",
        "std",
        "scales",
        "flip",
        "name",
        "licence",
        "calibration",
    ):
        assert getattr(loaded, name) == getattr(checkpoint, name)
    assert (loaded.description, loaded.step, loaded.source) == ("made up", 7, FORMAT)
    assert torch.equal(loaded.training["optimizer"]["state"][0]["momentum"], torch.ones(2))
    model = build_model(loaded)
    assert not model.training
    assert all(torch.equal(value, checkpoint.weights[key]) for key, value in model.state_dict().items())


def test_without_a_calibration_the_file_is_as_it_was_before_there_were_any(path):
    assert "calibration" not in document(path)
    assert load_checkpoint(path).calibration is None


def test_versions_are_those_the_weights_were_made_with(tmp_path):
    save_checkpoint(tmp_path / "net.pt", small_checkpoint(versions={"torch": "1.0"}))
    assert load_checkpoint(tmp_path / "net.pt").versions == {"torch": "1.0"}


def test_a_failed_save_leaves_the_old_file_and_no_other(path, monkeypatch):
    before = path.read_bytes()
    monkeypatch.setattr(torch, "save", lambda document, file: file.write(b"half") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_checkpoint(path, small_checkpoint())
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_file(path, share):
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(CheckpointError, match=r"net\.pt: not readable as a PyTorch checkpoint \(truncated"):
        load_checkpoint(path)


def test_files_that_are_no_checkpoints(tmp_path):
    path = tmp_path / "odd.pt"
    with pytest.raises(CheckpointError, match="no such file"):
        load_checkpoint(path)
    path.write_text("hello")
    with pytest.raises(CheckpointError, match="not readable"):
        load_checkpoint(path)
    path.write_bytes(pickle.dumps({"a": 1}, protocol=2))
    with pytest.raises(CheckpointError, match=r"odd\.pt"):
        load_checkpoint(path)
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="holds a list, not a checkpoint"):
        load_checkpoint(path)


class Trap:
    """Unpickling one would make a file."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return open, (self.target, "w")


def test_code_in_a_file_is_never_run(tmp_path):
    torch.save({"state_dict": {}, "trap": Trap(str(tmp_path / "sprung"))}, tmp_path / "trap.pt")
    with pytest.raises(CheckpointError, match=r"trap\.pt"):
        load_checkpoint(tmp_path / "trap.pt")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("zip_file", [True, False])
def test_a_refused_class_is_named_with_a_way_out(tmp_path, zip_file):
    weights = collections.OrderedDict(a=torch.zeros(1))
    path = tmp_path / "theirs.pth"
    odd = {"state_dict": weights, "log": fractions.Fraction(1)}
    torch.save(odd, path, _use_new_zipfile_serialization=zip_file)
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(path)
    assert "class fractions.Fraction" in str(error.value)
    assert f"torch.load('{path}', map_location='cpu', weights_only=False)" in str(error.value)
    assert "\n" not in str(error.value)


def test_the_way_out_works_for_a_whole_module(tmp_path):
    path = tmp_path / "theirs.pth"
    torch.save(torch.nn.Linear(1, 1), path)
    with pytest.raises(CheckpointError, match="--classes") as error:
        load_checkpoint(path)
    _, option, code = shlex.split(str(error.value).partition("--classes: ")[2])
    assert subprocess.run([sys.executable, option, code], cwd=tmp_path, timeout=120).returncode == 0
    assert set(read_pickle(tmp_path / "weights.pth")["state_dict"]) == {"weight", "bias"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"classes": None}, "fields of a wrong type: classes (a NoneType)"),
        ({"base_size": "480", "flip": 1}, "fields of a wrong type: base_size (a str), flip (a int)"),
        ({"colour": 1}, "left-over fields: colour"),
        ({"classes": ["road"]}, "classes must be 2 names, found 1"),
        ({"palette": [[1, 2, 3], [4, 5, 256]]}, "palette must be 2 colours"),
        ({"base_size": 0, "std": [1.0, 0.0, 1.0]}, "base_size must be 1 to 16384 pixels, found 0; std must be three"),
        ({"mean": [0.5]}, "mean must be three numbers, found 0.5"),
        ({"mean": ["a", "b", "c"]}, "mean must be three numbers, found a, b, c"),
        ({"std": ["1", "1", "1"]}, "std must be three positive numbers"),
        ({"std": [1.0, float("inf"), 1.0]}, "std must be three positive numbers"),
        ({"mean": [10**400, 0.0, 0.0]}, "mean must be three numbers"),
        ({"mean": [0.0, -1e300, 0.0]}, "mean must be three numbers"),
        ({"scales": ["1"]}, "scales must be positive numbers"),
        ({"scales": [10**400]}, "scales must be positive numbers"),
        ({"classes": [1, 2]}, "classes must be names, as text"),
        ({"classes": ["road", "road"]}, "classes must be names, as text, none empty and none twice"),
        ({"classes": ["road", ""]}, "classes must be names, as text, none empty and none twice"),
        ({"classes": ["road", "\ud800"]}, "classes must be names, as text"),
        ({"name": "\ud800"}, "name, licence and description must be text that UTF-8 can hold"),
        ({"base_size": 16385}, "base_size must be 1 to 16384 pixels, found 16385"),
        ({7: 1, "colour": 1}, "left-over fields: 7, colour"),
        ({"config": {"num_classes": 2, 7: 1, "colour": 1}}, "unknown model option 7, colour"),
        ({"config": {"num_classes": 2, "channels": "16"}}, "model options of a wrong type: channels ('16')"),
        ({"config": {"num_classes": 2, "encoding": 1}}, "model options of a wrong type: encoding (1)"),
        ({"weights": {7: torch.zeros(2)}}, "left-over keys: 7"),
        ({"weights": {"a": torch.eye(2).to_sparse()}}, "no dense tensors of real numbers: a"),
        ({"scales": []}, "scales must be positive numbers"),
        ({"format": "encnet-serve/2"}, "'encnet-serve/2' was written by a newer version; this one reads"),
        ({"format": "other"}, "unknown format 'other'"),
        ({"config": {"num_classes": 2, "colour": 1}}, "unknown model option colour"),
        ({"config": {"backbone": "resnet18"}}, "lacks num_classes"),
        ({"config": {"num_classes": 2, "backbone": "vgg"}}, "backbone must be one of"),
        ({"weights": {"a": 1}}, "no dense tensors of real numbers: a"),
        ({"calibration": [1.0]}, "fields of a wrong type: calibration (a list)"),
        ({"calibration": {"scale": [1.0]}}, "calibration: must have scale, bias, method, pictures, found scale"),
        (
            {"calibration": {"scale": [1.0], "bias": [0.0], "method": "platt", "pictures": 1}},
            "calibration: scale must be 2 numbers, found 1",
        ),
        (
            {"calibration": {"scale": [1.0, -1.0], "bias": [0.0, 0.0], "method": "platt", "pictures": 1}},
            "calibration: scale must be finite numbers above 0",
        ),
    ],
)
def test_wrong_fields_are_listed(path, changes, said):
    torch.save({**document(path), **changes}, path)
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(path)
    assert str(path) in str(error.value)
    assert said in str(error.value)


def test_missing_fields_are_listed(path):
    torch.save({key: value for key, value in document(path).items() if key not in ("mean", "palette")}, path)
    with pytest.raises(CheckpointError, match="missing fields: palette, mean"):
        load_checkpoint(path)


def test_weights_that_do_not_fit_are_listed(path):
    changed = document(path)
    del changed["weights"]["head.classifier.bias"]
    changed["weights"]["head.odd"] = torch.zeros(1)
    changed["weights"]["head.presence.bias"] = torch.zeros(7)
    changed["weights"]["backbone.bn1.bias"] = torch.full((64,), torch.inf)
    torch.save(changed, path)
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(path)
    for said in (
        "missing keys: head.classifier.bias",
        "left-over keys: head.odd",
        "wrong shapes: head.presence.bias (expected (2,), got (7,))",
        "NaN or infinite: backbone.bn1.bias",
    ):
        assert said in str(error.value)


@pytest.mark.parametrize(
    "odd",
    [
        torch.zeros(64, dtype=torch.complex64),
        torch.zeros(64, dtype=torch.float8_e4m3fn),
        torch.zeros(64, device="meta"),
        torch.zeros(64).to_sparse(),
    ],
    ids=["complex", "float8", "meta", "sparse"],
)
def test_weights_that_are_no_dense_real_numbers_are_listed(path, odd):
    changed = document(path)
    changed["weights"]["backbone.bn1.bias"] = odd
    torch.save(changed, path)
    with pytest.raises(CheckpointError, match=r"no dense tensors of real numbers: backbone\.bn1\.bias$"):
        load_checkpoint(path)


def test_a_long_list_ends_in_a_count(path):
    changed = document(path)
    changed["weights"] = {}
    torch.save(changed, path)
    with pytest.raises(CheckpointError, match=r"missing keys: backbone\.conv1\.weight, .* and \d+ more$"):
        load_checkpoint(path)


def test_counters_of_batch_norm_may_be_missing():
    checkpoint = small_checkpoint()
    checkpoint.weights = {k: v for k, v in checkpoint.weights.items() if not k.endswith("num_batches_tracked")}
    assert build_model(checkpoint).backbone.bn1.num_batches_tracked == 0


def test_a_checkpoint_made_by_hand_is_checked_when_built():
    checkpoint = small_checkpoint()
    del checkpoint.weights["head.presence.bias"]
    with pytest.raises(CheckpointError, match=r"missing keys: head\.presence\.bias"):
        build_model(checkpoint)
