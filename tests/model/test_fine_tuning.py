"""Frozen parts stay as they are, thaw when stated, and learn at the rates stated; resumed or on two processes alike."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model import train
from model.checkpoint import load_checkpoint
from model.config import ModelConfig
from model.encnet import EncNet
from model.fine_tuning import PARTS, backbone_parts, frozen_parts
from model.recipe import Recipe, RecipeError
from model.resnet import ResNet
from model.run import Run, make_optimizer
from tests.model.folders import write_scenes

ROOT = Path(__file__).parents[2]
EPOCH = 3  # steps
TINY = [
    "backbone=resnet18", "channels=16", "codewords=4", "batch=2", "crop=32", "base_size=48", "epochs=3",
    "optimizer=adamw", "learning_rate=0.002", "head_rate=2.0", "weight_decay=0.1", "save_every=2", "evaluate_every=1",
    "log_every=1", "workers=0", "reference_positions=16",
]  # fmt: skip


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Data and backbone weights, as words of the command line."""
    folder = tmp_path_factory.mktemp("fine_tuning")
    torch.manual_seed(5)
    torch.save(ResNet("resnet18").state_dict(), folder / "resnet18.pth")
    return ["--data", str(write_scenes(folder / "scenes")), "--backbone-weights", str(folder / "resnet18.pth")]


class Stop(Exception):
    pass


@pytest.fixture
def watched(monkeypatch):
    """Which parts' parameters and running statistics each step changed; `stop_at` ends a run before that step."""

    class Watch:
        stop_at = -1
        changed: dict[int, list[str]] = {}  # noqa: RUF012

    step = Run.train_step

    def snapshot(run):
        parts = backbone_parts(run.network.backbone) | {"head": [run.network.head]}
        return {
            (part, kind): [value.clone() for module in modules for value in values(module)]
            for part, modules in parts.items()
            for kind, values in (("weights", torch.nn.Module.parameters), ("statistics", torch.nn.Module.buffers))
        }

    def train_step(run, images, masks):
        if run.step == Watch.stop_at:
            raise Stop
        before, number = snapshot(run), run.step
        losses = step(run, images, masks)
        after = snapshot(run)
        changed = {key for key in before if not all(map(torch.equal, before[key], after[key]))}
        weights, statistics = ([part for part, what in changed if what == kind] for kind in ("weights", "statistics"))
        assert sorted(weights) == sorted(statistics), "weights and statistics change together or not at all"
        Watch.changed[number] = sorted(weights)
        return losses

    Watch.changed = {}
    monkeypatch.setattr(Run, "train_step", train_step)
    return Watch


def test_frozen_parts_keep_weights_and_statistics(given, watched, tmp_path):
    assert train.main([*given, "--out", str(tmp_path / "run"), *TINY, "freeze=stem, stage2", "ema=0.9"]) == 0
    assert watched.changed == {step: ["head", "stage1", "stage3", "stage4"] for step in range(3 * EPOCH)}
    theirs, ours = torch.load(given[3]), load_checkpoint(tmp_path / "run" / "final.pt").weights
    same = {key for key in theirs if torch.equal(theirs[key], ours[f"backbone.{key}"])}
    assert same == {key for key in theirs if key.startswith(("conv1.", "bn1.", "layer2."))}


def test_thawing_is_gradual_and_resumes_exactly(given, watched, tmp_path, capsys):
    recipe = [*TINY, "freeze=stem", "unfreeze_every=1", "layer_decay=0.5", "dropout=0.3", "precision=bf16", "ema=0.9"]
    assert train.main([*given, "--out", str(tmp_path / "whole"), *recipe]) == 0
    by_epoch = [["head"], ["head", "stage4"], ["head", "stage3", "stage4"]]
    expected = {step: by_epoch[step // EPOCH] for step in range(3 * EPOCH)}
    assert watched.changed == expected
    printed = capsys.readouterr().out
    assert "epoch 1: frozen are stem, stage1, stage2, stage3, stage4" in printed
    assert "epoch 3: frozen are stem, stage1, stage2\n" in printed

    watched.changed, watched.stop_at = {}, 5
    with pytest.raises(Stop):
        train.main([*given, "--out", str(tmp_path / "stopped"), *recipe])
    assert load_checkpoint(tmp_path / "stopped" / "last.pt").step == 4, "in the middle of the second epoch"
    watched.stop_at = -1
    assert train.main([*given[:2], "--out", str(tmp_path / "stopped"), "--resume"]) == 0
    assert watched.changed == expected
    whole, resumed = (load_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "stopped"))
    assert all(torch.equal(whole.weights[key], resumed.weights[key]) for key in whole.weights)
    for key, value in whole.training["model"].items():
        assert torch.equal(value, resumed.training["model"][key]), key


def test_two_processes_thaw_as_one_does(given, tmp_path):
    options = [
        *TINY,
        "optimizer=sgd",
        "learning_rate=0.01",
        "unfreeze_every=1",
        "freeze=stem",
        "dropout=0.0",
        "evaluate_every=3",
    ]
    assert train.main([*given, "--out", str(tmp_path / "1"), *options]) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "model.train"]
    command += [*given, "--out", str(tmp_path / "2"), *options]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stdout + process.stderr
    one, two = (load_checkpoint(tmp_path / name / "final.pt").weights for name in ("1", "2"))
    theirs = torch.load(given[3])
    for key in ("layer4.1.conv2.weight", "layer3.1.conv2.weight"):
        learned = one[f"backbone.{key}"] - theirs[key]
        assert (one[f"backbone.{key}"] - two[f"backbone.{key}"]).abs().max() < 0.05 * learned.abs().max(), key


def test_every_parameter_learns_at_its_stated_rate():
    network = EncNet(ModelConfig(3, "resnet18", channels=8, codewords=2))
    recipe = Recipe(backbone="resnet18", learning_rate=0.08, layer_decay=0.5, head_rate=10.0)
    groups = make_optimizer(network, recipe).param_groups
    rates = {id(parameter): group["base_rate"] for group in groups for parameter in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(rates) == len(list(network.parameters()))
    expected = {"conv1": 0.005, "bn1": 0.005, "layer1": 0.01, "layer2": 0.02, "layer3": 0.04, "layer4": 0.08}
    for name, parameter in network.named_parameters():
        module, part = name.split(".")[:2]
        assert rates[id(parameter)] == pytest.approx(expected[part] if module == "backbone" else 0.8), name


def test_without_decay_the_groups_are_backbone_and_head():
    network = EncNet(ModelConfig(3, "resnet18", channels=8, codewords=2))
    backbone, head = make_optimizer(network, Recipe(backbone="resnet18")).param_groups
    assert backbone["params"] == list(network.backbone.parameters()) and backbone["base_rate"] == 0.01
    assert len(backbone["params"]) + len(head["params"]) == len(list(network.parameters()))
    assert head["base_rate"] == pytest.approx(0.1)


def test_schedule_of_thawing():
    assert [frozen_parts("", 0, epoch) for epoch in (0, 9)] == [[], []]
    assert frozen_parts("stage1,stem", 0, 5) == ["stem", "stage1"]
    assert [len(frozen_parts("", 2, epoch)) for epoch in range(12)] == [5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0]
    assert frozen_parts("", 2, 3) == list(PARTS[:4]), "stage4 is the first to thaw"
    assert frozen_parts("stage4", 2, 100) == ["stage4"], "what is frozen by name never thaws"


def test_freezing_random_weights_is_refused(given, tmp_path, capsys):
    for option in ("freeze=stem", "unfreeze_every=2"):
        assert train.main([*given[:2], "--out", str(tmp_path / "run"), *TINY, option]) == 2
        assert "would keep random weights; give --backbone-weights or --initial" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"freeze": "stem,layer1"}, "freeze must name parts out of stem, stage1, stage2, stage3, stage4"),
        ({"layer_decay": 0.0}, r"layer_decay must be in \(0, 1\], got 0.0"),
        ({"layer_decay": 1.5}, r"layer_decay must be in \(0, 1\], got 1.5"),
        ({"unfreeze_every": -1}, "unfreeze_every must not be negative, got -1"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(RecipeError, match=message):
        Recipe(**options)
