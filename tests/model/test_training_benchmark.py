"""`python -m benchmarks.training` at the size of a test: every part and every contender is measured."""

import json

import pytest
import torch

from benchmarks import training
from model.encoding import Encoding


def test_every_part_and_contender_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "CLASSES", 5)
    file = tmp_path / "training.json"
    words = ["channels=16", "codewords=4", "crop=48", "base_size=64", "dropout=0.0"]
    assert training.main([*words, "--rounds", "2", "--pictures", "4", "--output", str(file)]) == 0
    found = json.loads(file.read_text())
    assert found["step_ms"].keys() == {"eager", "matmul", "broadcast"}
    losses = found["first_losses"]
    assert losses["matmul"] == pytest.approx(losses["eager"], abs=2e-3)
    assert losses["broadcast"] == pytest.approx(losses["eager"], abs=2e-3)
    assert found["times_faster_than"].keys() == {"matmul", "broadcast"}
    assert found["parts_ms"].keys() == {"data", "forward", "backward", "optimizer"}
    assert min(*found["step_ms"].values(), *found["parts_ms"].values(), found["matmul_tflops"]) > 0
    assert 1.5 < found["gflop"]["backward"] / found["gflop"]["forward"] < 2.5
    operations = sum(found["gflop"].values())  # two figures, each with one decimal
    share = operations / found["step_ms"]["eager"] / found["matmul_tflops"]
    assert found["share_of_matmul_rate"]["step"] == pytest.approx(share, abs=1e-3, rel=0.1 / operations)
    assert found["validation_pictures_per_second"] > 0 and found["training_pictures_per_second"] > 0
    assert not [key for key in found if key.startswith("not_run")]


def test_the_forms_of_encoding_agree():
    torch.manual_seed(0)
    layer, x = Encoding(16, 4), torch.randn(2, 16, 5, 7)
    for form in training.FORMS.values():
        torch.testing.assert_close(training.PlainEncoding(layer, form)(x), layer(x), rtol=1e-4, atol=1e-4)


def test_a_wrong_option_is_named(capsys):
    assert training.main(["backbones=resnet18"]) == 2
    assert "unknown option 'backbones'" in capsys.readouterr().err
