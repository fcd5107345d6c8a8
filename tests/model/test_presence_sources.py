"""The study of who knows presence: each source's scores are what its name says, the command writes what it finds."""

import json

import pytest
import torch
from folders import write_scenes

from benchmarks import presence_sources
from model.checkpoint import Checkpoint, save_checkpoint
from model.config import ModelConfig
from model.encnet import EncNet


def test_sources():
    head, surest = torch.tensor([[2.0, -1.0]]), torch.tensor([[0.0, 3.0]])
    found = presence_sources.sources(head, surest)
    assert found["presence head"].tolist() == [pytest.approx([0.8808, 0.2689], abs=1e-4)]
    assert found["surest pixel"].tolist() == [pytest.approx([0.5, 0.9526], abs=1e-4)]
    assert found["both"].tolist() == [pytest.approx([0.7311, 0.7311], abs=1e-4)]


def test_the_command_writes_its_result(tmp_path, monkeypatch, capsys):
    config = ModelConfig(num_classes=3, backbone="resnet18", channels=8, codewords=2, auxiliary=False)
    with torch.device("meta"):
        state = EncNet(config).state_dict()
    weights = {key: torch.zeros((), dtype=value.dtype).expand(value.shape) for key, value in state.items()}
    weights["head.presence.bias"] = torch.tensor([9.0, 9.0, 9.0])
    weights["head.classifier.bias"] = torch.tensor([9.0, 0.0, 0.0])
    checkpoint = Checkpoint(config, weights, ["a", "b", "c"], [[1, 2, 3]] * 3, base_size=48)
    save_checkpoint(tmp_path / "net.pt", checkpoint)
    data, output = write_scenes(tmp_path / "data"), tmp_path / "results" / "found.json"
    words = ["x", str(tmp_path / "net.pt"), "--data", str(data), "--output", str(output)]
    monkeypatch.setattr("sys.argv", words)
    presence_sources.main()
    found = json.loads(output.read_text())["sources"]
    assert found.keys() == {"presence head", "surest pixel", "both"}
    assert found["presence head"]["ece"] < 0.01, "every picture has every class"
    assert found["surest pixel"]["ece"] == pytest.approx(2 / 3, abs=0.01), "no pixel is sure of the last two"
    assert "test: " in capsys.readouterr().out

    monkeypatch.setattr("sys.argv", [*words[:3], str(tmp_path / "none")])
    with pytest.raises(SystemExit):
        presence_sources.main()
    assert "no such data folder" in capsys.readouterr().err
