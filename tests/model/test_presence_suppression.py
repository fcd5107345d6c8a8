"""The study of presence and mask: the rules do what their names say, and the command writes what it finds."""

import json

import pytest
import torch
from folders import write_scenes

from benchmarks import presence_suppression
from benchmarks.presence_suppression import chosen, rules, without
from model.calibration import Calibration
from model.checkpoint import Checkpoint, save_checkpoint
from model.config import ModelConfig
from model.encnet import EncNet

PROBABILITIES = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.7, 0.1]])


def test_absent_classes_lose_their_pixels_to_the_next_likeliest():
    assert without(PROBABILITIES, torch.tensor([False, False, False])).tolist() == [0, 1]
    assert without(PROBABILITIES, torch.tensor([True, False, False])).tolist() == [1, 1]
    assert without(PROBABILITIES, torch.tensor([True, True, False])).tolist() == [2, 2]
    assert without(PROBABILITIES, torch.tensor([True, True, True])).tolist() == [0, 1], "as without the rule"


def test_rules():
    presence = {"as trained": torch.tensor([0.015, 0.9, 0.9])}
    masks = rules(PROBABILITIES, presence, truth=torch.tensor([0, 2], dtype=torch.uint8))
    assert masks["none"].tolist() == [0, 1]
    assert masks["oracle"].tolist() == [0, 0]
    assert masks["remove 0.01, as trained"].tolist() == [0, 1]
    assert masks["remove 0.02, as trained"].tolist() == [1, 1]
    assert masks["weight 1, as trained"].tolist() == [1, 1]
    assert masks["weight 0.05, as trained"].tolist() == [0, 1]


def test_the_rule_is_chosen_by_its_family():
    val = {"none": {"mIoU": 60.0}, "remove 0.1, x": {"mIoU": 61.0}, "remove 0.2, x": {"mIoU": 62.0}}
    assert chosen(val, "remove") == "remove 0.2, x"


@pytest.mark.parametrize("calibration", [None, Calibration((1.0, 1.0, 1.0), (0.0, 0.0, -9.0), "platt", 2)])
def test_the_command_writes_its_result(tmp_path, monkeypatch, capsys, calibration):
    config = ModelConfig(num_classes=3, backbone="resnet18", channels=8, codewords=2, auxiliary=False)
    with torch.device("meta"):
        state = EncNet(config).state_dict()
    weights = {key: torch.zeros((), dtype=value.dtype).expand(value.shape) for key, value in state.items()}
    weights["head.classifier.bias"] = torch.tensor([0.0, 1.0, 2.0])
    checkpoint = Checkpoint(config, weights, ["a", "b", "c"], [[1, 2, 3]] * 3, base_size=48, calibration=calibration)
    save_checkpoint(tmp_path / "net.pt", checkpoint)
    data = write_scenes(tmp_path / "data")
    output = tmp_path / "results" / "found.json"
    monkeypatch.setattr("sys.argv", ["x", str(tmp_path / "net.pt"), "--data", str(data), "--output", str(output)])
    presence_suppression.main()
    result = json.loads(output.read_text())
    kinds = {rule.split(", ")[1] for rule in result["val"] if ", " in rule}
    assert kinds == ({"as trained", "calibrated"} if calibration else {"as trained"})
    assert result["test"]["oracle"] == result["test"]["none"], "every picture has every class"
    assert result["chosen_on_val"]["remove"]["val_gain"] >= 0
    assert "chosen on val" in capsys.readouterr().out
