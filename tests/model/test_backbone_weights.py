"""Published ResNet weights against a ResNet written here as functions, under the names each library gives its keys."""

import re
import socket
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from model import train
from model.backbone_weights import read_backbone_weights
from model.checkpoint import Checkpoint, CheckpointError, load_checkpoint, save_checkpoint
from model.config import ModelConfig
from model.encnet import EncNet
from model.foreign import distinct_palette
from model.resnet import ResNet
from tests.model.folders import write_scenes

IMAGE = torch.randn(1, 3, 33, 41, generator=torch.Generator().manual_seed(0)).double()
DEPTHS = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}
DILATIONS = ((1, 1, 1), (2, 1, 1), (1, 1, 2), (1, 2, 4))  # stride, dilation of the first block, of the others
TINY = [
    "backbone=resnet18", "channels=16", "codewords=4", "batch=2", "crop=32", "base_size=48", "epochs=1",
    "learning_rate=1e-12", "weight_decay=0.0", "workers=0", "ema=0.9",
]  # fmt: skip


class Made(dict):
    """A state dict that draws a random tensor the first time it is asked for it."""

    def __init__(self) -> None:
        self.random = torch.Generator().manual_seed(1)

    def draw(self, key: str, shape: tuple[int, ...], low: float, high: float) -> Tensor:
        if key not in self:
            self[key] = torch.rand(shape, generator=self.random) * (high - low) + low
        return self[key].double()

    def conv(self, x: Tensor, key: str, outputs: int, kernel: int, stride: int = 1, dilation: int = 1) -> Tensor:
        bound = (6 / (x.shape[1] * kernel**2)) ** 0.5
        weight = self.draw(f"{key}.weight", (outputs, x.shape[1], kernel, kernel), -bound, bound)
        return F.conv2d(x, weight, stride=stride, padding=dilation * (kernel // 2), dilation=dilation)

    def norm(self, x: Tensor, key: str) -> Tensor:
        self.setdefault(f"{key}.num_batches_tracked", torch.tensor(7))
        mean = self.draw(f"{key}.running_mean", (x.shape[1],), -0.2, 0.2)
        variance = self.draw(f"{key}.running_var", (x.shape[1],), 0.5, 1.5)
        weight = self.draw(f"{key}.weight", (x.shape[1],), 0.2, 0.8)
        return F.batch_norm(x, mean, variance, weight, self.draw(f"{key}.bias", (x.shape[1],), -0.2, 0.2))


def stages(state: Made, depth: int, stem: tuple[int, ...], names: tuple[str, str], prefix: str = "") -> list[Tensor]:
    """The features of a dilated ResNet, stride 8, by the paper; names: of the stem's convolutions and of its norm."""
    convolution, norm = prefix + names[0], prefix + names[1]
    if len(stem) == 1:
        x = state.conv(IMAGE, convolution, stem[0], 7, stride=2)
    else:
        x = state.conv(IMAGE, f"{convolution}.0", stem[0], 3, stride=2)
        x = state.conv(F.relu(state.norm(x, f"{convolution}.1")), f"{convolution}.3", stem[1], 3)
        x = state.conv(F.relu(state.norm(x, f"{convolution}.4")), f"{convolution}.6", stem[2], 3)
    x = F.max_pool2d(F.relu(state.norm(x, norm)), 3, stride=2, padding=1)
    features = []
    for number, (blocks, (stride, first_dilation, dilation)) in enumerate(zip(DEPTHS[depth], DILATIONS, strict=True)):
        width = 64 * 2**number
        outputs = width if depth == 18 else 4 * width
        for index in range(blocks):
            key = f"{prefix}layer{number + 1}.{index}"
            step, spread = (stride, first_dilation) if index == 0 else (1, dilation)
            if depth == 18:
                y = F.relu(state.norm(state.conv(x, f"{key}.conv1", width, 3, step, spread), f"{key}.bn1"))
                y = state.norm(state.conv(y, f"{key}.conv2", width, 3, 1, dilation), f"{key}.bn2")
            else:
                y = F.relu(state.norm(state.conv(x, f"{key}.conv1", width, 1), f"{key}.bn1"))
                y = F.relu(state.norm(state.conv(y, f"{key}.conv2", width, 3, step, spread), f"{key}.bn2"))
                y = state.norm(state.conv(y, f"{key}.conv3", outputs, 1), f"{key}.bn3")
            if step != 1 or x.shape[1] != outputs:
                x = state.norm(state.conv(x, f"{key}.downsample.0", outputs, 1, step), f"{key}.downsample.1")
            x = F.relu(x + y)
        features.append(x)
    return features


OURS, STEM = ("conv1", "bn1"), ("stem", "stem.7")
FORMS = {
    "torchvision": ("resnet50", 50, (64,), OURS, "", ["fc.weight", "fc.bias"], lambda state: state),
    "torchvision-training": ("resnet18", 18, (64,), OURS, "", ["fc.bias"], lambda state: {"model": state, "epoch": 9}),
    "torchvision-fcn": ("resnet50", 50, (64,), OURS, "backbone.", ["classifier.4.weight"], lambda state: state),
    "timm-50c": ("resnet50c", 50, (32, 32, 64), OURS, "", ["fc.weight", "fc.bias"], lambda state: state),
    "timm-18s": ("resnet18s", 18, (64, 64, 128), OURS, "", [], lambda state: {"state_dict": state, "epoch": 9}),
    "PyTorch-Encoding": (
        "resnet50s", 50, (64, 64, 128), OURS, "", ["fc.bias"],
        lambda state: {"state_dict": {f"module.{key}": value for key, value in state.items()}},
    ),
    "PyTorch-Encoding-whole": (
        "resnet50s", 50, (64, 64, 128), OURS, "pretrained.", ["pretrained.fc.weight", "head.conv5.0.weight"],
        lambda state: {"state_dict": state, "best_pred": 0.5},
    ),
    "OpenMMLab-V1c": ("resnet50c", 50, (32, 32, 64), STEM, "", [], lambda state: {"meta": {}, "state_dict": state}),
    "mmsegmentation": (
        "resnet50s", 50, (64, 64, 128), STEM, "backbone.",
        ["decode_head.conv_seg.weight", "auxiliary_head.conv_seg.bias"],
        lambda state: {"meta": {"iter": 5}, "state_dict": state},
    ),
    "mmpretrain": ("resnet18", 18, (64,), OURS, "backbone.", ["head.fc.weight"], lambda state: {"state_dict": state}),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_published_weights_compute_what_they_computed(tmp_path, form):
    backbone, depth, stem, names, prefix, heads, wrap = FORMS[form]
    state = Made()
    expected = stages(state, depth, stem, names, prefix)
    state.update({key: torch.zeros(3) for key in heads})
    torch.save(wrap(dict(state)), tmp_path / "weights.pth")

    found = read_backbone_weights(tmp_path / "weights.pth", backbone)
    (tmp_path / "weights.pth").unlink()
    network = ResNet(backbone)
    network.load_state_dict(found.weights)
    with torch.no_grad():
        computed = network.double().eval()(IMAGE)
    for ours, theirs in zip(computed, expected, strict=True):
        assert theirs.std() > 0.01, "a reference that says something"
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert found.left_out == heads
    assert found.weights["layer3.1.bn2.num_batches_tracked"] == 7


def made_18(**changes: Tensor | None) -> dict[str, Tensor]:
    """A ResNet-18's weights by torchvision's names, with keys changed or (None) removed."""
    state = dict(ResNet("resnet18").state_dict(), **changes)
    return {key: value for key, value in state.items() if value is not None}


@pytest.fixture(scope="module")
def resnet18(tmp_path_factory):
    torch.manual_seed(5)
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(made_18(**{"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}), path)
    return path


def test_safetensors_hold_the_same(tmp_path, resnet18):
    save_file(torch.load(resnet18), tmp_path / "model.safetensors")
    one, two = (read_backbone_weights(path, "resnet18").weights for path in (resnet18, tmp_path / "model.safetensors"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_safetensors_that_cannot_be_read_are_explained(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    with pytest.raises(CheckpointError, match="no such file"):
        read_backbone_weights(path, "resnet18")
    path.write_bytes(b"\x00" * 30)
    with pytest.raises(CheckpointError, match="not readable as safetensors: "):
        read_backbone_weights(path, "resnet18")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(CheckpointError, match="needs the safetensors package: pip install safetensors"):
        read_backbone_weights(path, "resnet18")


def test_the_backbone_of_an_own_checkpoint(tmp_path):
    config = ModelConfig(3, "resnet18c", channels=8, codewords=2)
    weights = EncNet(config).state_dict()
    save_checkpoint(tmp_path / "final.pt", Checkpoint(config, weights, ["a", "b", "c"], distinct_palette(3), 48))
    found = read_backbone_weights(tmp_path / "final.pt", "resnet18c").weights
    assert {f"backbone.{key}" for key in found} == {key for key in weights if key.startswith("backbone.")}
    assert all(torch.equal(value, weights[f"backbone.{key}"]) for key, value in found.items())


def test_counters_of_old_files_may_be_missing(tmp_path):
    state = {key: value for key, value in made_18().items() if not key.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "old.pth")
    ResNet("resnet18").load_state_dict(read_backbone_weights(tmp_path / "old.pth", "resnet18").weights)


def expanded(name: str, openmmlab: bool = False) -> dict[str, Tensor]:
    """Weights of the right shapes in next to no memory."""
    with torch.device("meta"):
        state = ResNet(name).state_dict()
    if openmmlab:
        state = {re.sub(r"^bn1\.", "stem.7.", re.sub(r"^conv1\.", "stem.", key)): v for key, v in state.items()}
    return {key: torch.zeros((), dtype=value.dtype).expand(value.shape) for key, value in state.items()}


@pytest.mark.parametrize(
    ("document", "wanted", "message"),
    [
        (
            expanded("resnet50"),
            "resnet50s",
            "the file is a ResNet-50 with a 7x7 stem, and backbone=resnet50s is a ResNet-50 with a 64-64-128 stem; "
            "use backbone=resnet50",
        ),
        (
            expanded("resnet34c", openmmlab=True),
            "resnet18c",
            "the file is a ResNet-34 with a 32-32-64 stem, and backbone=resnet18c is a ResNet-18 with a 32-32-64 stem; "
            "use backbone=resnet34c",
        ),
        (
            {**expanded("resnet50"), **{f"layer3.{n}.conv1.weight": torch.zeros(1) for n in range(6, 36)}},
            "resnet50",
            "a backbone of (3, 4, 36, 3) Bottleneck blocks is none of ResNet-18, ResNet-34, ResNet-50, ResNet-101",
        ),
        (
            {**expanded("resnet50"), "layer1.0.downsample.2.weight": torch.zeros(256)},
            "resnet50",
            "shortcuts with average pooling (resnet50d, ResNetV1d) are not supported",
        ),
        (
            {**expanded("resnet18"), "layer1.0.se.conv.weight": torch.zeros(1)},
            "resnet18",
            "left-over keys: layer1.0.se.conv.weight",
        ),
        (
            {"backbone." + k: v for k, v in expanded("resnet18").items() if k != "layer2.1.bn1.bias"},
            "resnet18",
            "missing keys: backbone.layer2.1.bn1.bias",
        ),
        (
            {"module." + k: v for k, v in expanded("resnet18c").items() if k != "conv1.3.weight"},
            "resnet18c",
            "a stem of 32-64 channels is neither a 7x7 convolution nor one of 64-64-128, 32-32-64",
        ),
        (
            {"backbone." + k: v for k, v in expanded("resnet18c", openmmlab=True).items() if k != "stem.7.bias"}
            | {"ema.decay": torch.zeros(())},
            "resnet18c",
            "missing keys: backbone.stem.7.bias; left-over keys: ema.decay",
        ),
        (
            {**expanded("resnet50"), "layer1.0.conv2.weight": torch.zeros(64, 2, 3, 3)},
            "resnet50",
            "wrong shapes: layer1.0.conv2.weight (expected (64, 64, 3, 3), got (64, 2, 3, 3))",
        ),
        (
            {**expanded("resnet18"), "bn1.bias": torch.full((64,), torch.nan)},
            "resnet18",
            "NaN or infinite: bn1.bias",
        ),
        (
            {"patch_embed.proj.weight": torch.zeros(1), "blocks.0.norm1.weight": torch.zeros(1)},
            "resnet18",
            "not a ResNet's weights; its first keys are patch_embed.proj.weight, blocks.0.norm1.weight",
        ),
        ([1, 2], "resnet18", "holds a list, not a state dict"),
        ({"state_dict": {}, "epoch": 3}, "resnet18", "its state_dict is empty"),
        ({"epoch": 3}, "resnet18", "not a state dict: no tensors under epoch"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)  # fmt: skip
def test_a_file_that_does_not_fit_is_told_apart(tmp_path, document, wanted, message):
    torch.save(document, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError) as error:
        read_backbone_weights(tmp_path / "weights.pth", wanted)
    assert message in str(error.value) and "weights.pth: " in str(error.value)


def test_a_run_starts_from_backbone_weights(tmp_path, capsys, resnet18):
    scenes = write_scenes(tmp_path / "scenes")
    given = ["--data", str(scenes), "--out", str(tmp_path / "run"), "--backbone-weights", str(resnet18)]
    assert train.main([*given, *TINY]) == 0
    assert "the backbone starts from weights of a resnet18, without fc.weight, fc.bias" in capsys.readouterr().out
    theirs = torch.load(resnet18)
    final = load_checkpoint(tmp_path / "run" / "final.pt").weights
    last = load_checkpoint(tmp_path / "run" / "last.pt").training["model"]
    for name in ("conv1.weight", "layer1.0.bn1.bias", "layer4.1.conv2.weight"):
        for weights in (final, last):
            torch.testing.assert_close(weights[f"backbone.{name}"], theirs[name], rtol=0, atol=1e-8)


def test_contradicting_starts_are_refused_before_anything_is_written(tmp_path, capsys, resnet18):
    scenes = write_scenes(tmp_path / "scenes")
    out = tmp_path / "run"
    given = ["--data", str(scenes), "--out", str(out), "--backbone-weights", str(resnet18)]

    assert train.main([*given, *TINY, "backbone=resnet34"]) == 2
    assert "use backbone=resnet18" in capsys.readouterr().err
    assert train.main([*given, *TINY, "--initial", str(resnet18)]) == 2
    assert "--initial brings a backbone of its own, and --backbone-weights another" in capsys.readouterr().err
    assert not out.exists()
    out.mkdir()
    (out / "last.pt").write_bytes(b"")
    assert train.main([*given, "--resume"]) == 2
    assert "--resume brings a backbone of its own, and --backbone-weights another" in capsys.readouterr().err


def test_building_a_network_needs_no_net(monkeypatch):
    def refuse(*arguments: object) -> None:
        raise AssertionError("a constructor opened a socket")

    monkeypatch.setattr(socket, "socket", refuse)
    for name in ("resnet18", "resnet50s", "resnet101c"):
        with torch.device("meta"):
            EncNet(ModelConfig(3, name))
