"""Foreign checkpoints against a reference network written out here, under the foreign key names."""

import fractions
import shlex
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from model.checkpoint import CheckpointError, build_model, load_checkpoint
from model.config import ModelConfig
from model.encnet import EncNet
from model.foreign import (
    MMSEGMENTATION,
    PYTORCH_ENCODING,
    described_classes,
    distinct_palette,
    inverse,
    read_foreign,
    rename,
    renaming,
)

CLASSES, CHANNELS, CODEWORDS = 5, 16, 4

PE_KEYS = {
    "stem": "pretrained.conv1{}",
    "stem_norm": "pretrained.bn1",
    "layer": "pretrained.layer{}.{}",
    "bottleneck": ("head.conv5.0", "head.conv5.1"),
    "lateral": (("head.connect.0.0", "head.connect.0.1"), ("head.connect.1.0", "head.connect.1.1")),
    "fusion": ("head.fusion.0", "head.fusion.1"),
    "project": ("head.encmodule.encoding.0", "head.encmodule.encoding.1"),
    "encoding": "head.encmodule.encoding.3",
    "code_norm": "head.encmodule.encoding.4",
    "gate": "head.encmodule.fc.0",
    "presence": "head.encmodule.selayer",
    "classifier": "head.conv6.1",
    "aux": ("auxlayer.conv5.0", "auxlayer.conv5.1"),
    "aux_classifier": "auxlayer.conv5.4",
}
MM_KEYS = {
    "stem": "backbone.stem{}",
    "stem_norm": "backbone.stem.7",
    "layer": "backbone.layer{}.{}",
    "bottleneck": ("decode_head.bottleneck.conv", "decode_head.bottleneck.bn"),
    "lateral": (
        ("decode_head.lateral_convs.0.conv", "decode_head.lateral_convs.0.bn"),
        ("decode_head.lateral_convs.1.conv", "decode_head.lateral_convs.1.bn"),
    ),
    "fusion": ("decode_head.fusion.conv", "decode_head.fusion.bn"),
    "project": ("decode_head.enc_module.encoding_project.conv", "decode_head.enc_module.encoding_project.bn"),
    "encoding": "decode_head.enc_module.encoding.0",
    "code_norm": "decode_head.enc_module.encoding.1",
    "gate": "decode_head.enc_module.fc.0",
    "presence": "decode_head.se_layer",
    "classifier": "decode_head.conv_seg",
    "aux": ("auxiliary_head.convs.0.conv", "auxiliary_head.convs.0.bn"),
    "aux_classifier": "auxiliary_head.conv_seg",
}
MM_PLAIN_KEYS = {**MM_KEYS, "stem": "backbone.conv1{}", "stem_norm": "backbone.bn1"}


class Weights(dict):
    """A foreign state dict that draws a random parameter the first time it is asked for it."""

    def __init__(self, seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed)

    def get_or_draw(self, key: str, shape: tuple[int, ...], low: float, high: float) -> Tensor:
        if key not in self:
            self[key] = torch.rand(shape, generator=self.random) * (high - low) + low
        return self[key].double()

    def conv(self, x: Tensor, key: str, outputs: int, kernel: int, stride: int = 1, dilation: int = 1) -> Tensor:
        bound = (6 / (x.shape[1] * kernel**2)) ** 0.5
        weight = self.get_or_draw(f"{key}.weight", (outputs, x.shape[1], kernel, kernel), -bound, bound)
        return F.conv2d(x, weight, stride=stride, padding=dilation * (kernel // 2), dilation=dilation)

    def norm(self, x: Tensor, key: str, gain: float = 1.0) -> Tensor:
        mean = self.get_or_draw(f"{key}.running_mean", (x.shape[1],), -0.2, 0.2)
        variance = self.get_or_draw(f"{key}.running_var", (x.shape[1],), 0.5, 1.5)
        weight = self.get_or_draw(f"{key}.weight", (x.shape[1],), 0.5 * gain, 1.5 * gain)
        bias = self.get_or_draw(f"{key}.bias", (x.shape[1],), -0.2, 0.2)
        return F.batch_norm(x, mean, variance, weight, bias, eps=1e-5)

    def linear(self, x: Tensor, key: str, outputs: int, spatial: tuple[int, ...] = ()) -> Tensor:
        weight = self.get_or_draw(f"{key}.weight", (outputs, x.shape[1], *spatial), -1, 1)
        bias = self.get_or_draw(f"{key}.bias", (outputs,), -1, 1)
        return F.conv2d(x, weight, bias) if spatial else F.linear(x, weight, bias)

    def conv_norm_relu(self, x: Tensor, keys: tuple[str, str], outputs: int, kernel: int) -> Tensor:
        return F.relu(self.norm(self.conv(x, keys[0], outputs, kernel), keys[1]))


# Number, blocks, width, stride, and the dilation of the first block and of the others, stage by stage.
STAGES = {
    8: ((1, 3, 64, 1, 1, 1), (2, 4, 128, 2, 1, 1), (3, 6, 256, 1, 1, 2), (4, 3, 512, 1, 2, 4)),
    16: ((1, 3, 64, 1, 1, 1), (2, 4, 128, 2, 1, 1), (3, 6, 256, 2, 1, 1), (4, 3, 512, 1, 1, 2)),
}


def reference(
    weights: Weights,
    keys: dict,
    image: Tensor,
    stem: tuple[int, ...],
    lateral: bool,
    align_corners: bool,
    output_stride: int = 8,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, presence logits and auxiliary logits of EncNet-50, layer by layer, float64."""
    w = weights
    if len(stem) == 1:
        x = F.conv2d(
            image, w.get_or_draw(keys["stem"].format("") + ".weight", (64, 3, 7, 7), -0.2, 0.2), stride=2, padding=3
        )
    else:
        x = w.conv(image, keys["stem"].format(".0"), stem[0], 3, stride=2)
        x = w.conv(F.relu(w.norm(x, keys["stem"].format(".1"))), keys["stem"].format(".3"), stem[1], 3)
        x = w.conv(F.relu(w.norm(x, keys["stem"].format(".4"))), keys["stem"].format(".6"), stem[2], 3)
    x = F.max_pool2d(F.relu(w.norm(x, keys["stem_norm"])), 3, stride=2, padding=1)

    stages = []
    for number, blocks, width, stride, first_dilation, dilation in STAGES[output_stride]:
        for index in range(blocks):
            key = keys["layer"].format(number, index)
            first = index == 0
            y = F.relu(w.norm(w.conv(x, f"{key}.conv1", width, 1), f"{key}.bn1"))
            y = w.conv(y, f"{key}.conv2", width, 3, stride if first else 1, first_dilation if first else dilation)
            y = w.conv(F.relu(w.norm(y, f"{key}.bn2")), f"{key}.conv3", 4 * width, 1)
            y = w.norm(y, f"{key}.bn3", gain=0.2)
            if first:
                x = w.norm(w.conv(x, f"{key}.downsample.0", 4 * width, 1, stride), f"{key}.downsample.1")
            x = F.relu(x + y)
        stages.append(x)

    features = w.conv_norm_relu(stages[3], keys["bottleneck"], CHANNELS, 3)
    if lateral:
        c2 = w.conv_norm_relu(stages[1], keys["lateral"][0], CHANNELS, 1)
        c3 = w.conv_norm_relu(stages[2], keys["lateral"][1], CHANNELS, 1)
        features = w.conv_norm_relu(torch.cat([features, c2, c3], 1), keys["fusion"], CHANNELS, 3)

    positions = w.conv_norm_relu(features, keys["project"], CHANNELS, 1).flatten(2).transpose(1, 2)
    codewords = w.get_or_draw(f"{keys['encoding']}.codewords", (CODEWORDS, CHANNELS), -0.5, 0.5)
    scale = w.get_or_draw(f"{keys['encoding']}.scale", (CODEWORDS,), -1, 0)
    residuals = positions[:, :, None] - codewords  # (B, N, K, D), spelt out as in equation 1
    assignment = (scale * residuals.square().sum(-1)).softmax(2)
    encoded = (assignment[..., None] * residuals).sum(1)
    scene = F.relu(w.norm(encoded, keys["code_norm"])).mean(1)
    gate = torch.sigmoid(w.linear(scene, keys["gate"], CHANNELS))
    gated = F.relu(features + features * gate[:, :, None, None])
    logits = w.linear(gated, keys["classifier"], CLASSES, (1, 1))
    auxiliary = w.linear(w.conv_norm_relu(stages[2], keys["aux"], 256, 3), keys["aux_classifier"], CLASSES, (1, 1))
    logits, auxiliary = (
        F.interpolate(x, size=image.shape[-2:], mode="bilinear", align_corners=align_corners)
        for x in (logits, auxiliary)
    )
    return logits, w.linear(scene, keys["presence"], CLASSES), auxiliary


def zeros(config: ModelConfig, source: str) -> dict[str, Tensor]:
    """A state dict in a foreign format with all the shapes of a network and next to no memory: every value is 0."""
    with torch.device("meta"):
        state = EncNet(config).state_dict()
    table = inverse(renaming(source, deep_stem="backbone.conv1.0.weight" in state))
    return {rename(key, table): torch.zeros((), dtype=value.dtype).expand(value.shape) for key, value in state.items()}


CONFIG = ModelConfig(num_classes=CLASSES, channels=CHANNELS, codewords=CODEWORDS)


def save(path: Path, document: object) -> Path:
    torch.save(document, path)
    return path


@pytest.mark.parametrize("lateral", [False, True], ids=["plain", "lateral"])
@pytest.mark.parametrize(
    ("source", "keys", "stem", "backbone"),
    [
        (PYTORCH_ENCODING, PE_KEYS, (64, 64, 128), "resnet50s"),
        (PYTORCH_ENCODING, PE_KEYS, (64,), "resnet50"),
        (MMSEGMENTATION, MM_KEYS, (32, 32, 64), "resnet50c"),
        (MMSEGMENTATION, MM_PLAIN_KEYS, (64,), "resnet50"),
    ],
    ids=["pe-50s", "pe-50", "mm-50c", "mm-50"],
)
def test_the_same_logits_as_the_reference_network(tmp_path, source, keys, stem, backbone, lateral):
    aligned = source == PYTORCH_ENCODING
    image = torch.randn(1, 3, 33, 41, generator=torch.Generator().manual_seed(1)).double()
    state = Weights(seed=2)
    logits, presence, auxiliary = reference(state, keys, image, stem, lateral, aligned)
    assert 1 < logits.std() < 1000  # a reference that says something
    prefix = "module." if lateral else ""
    path = save(
        tmp_path / "theirs.pth",
        {"epoch": 3, "state_dict": {prefix + k: v for k, v in state.items()}, "optimizer": {"state": {}}},
    )
    checkpoint = load_checkpoint(path)
    path.unlink()
    assert checkpoint.source == source
    assert checkpoint.config == ModelConfig(
        CLASSES, backbone, 8, CHANNELS, CODEWORDS, lateral=lateral, align_corners=aligned, reference_positions=0
    )
    model = build_model(checkpoint).double()
    with torch.no_grad():
        outputs = model(image)
        aux = model._to_pixels(model.aux(model.backbone(image).c3), image.shape[-2:])
    tolerance = {"rtol": 1e-5, "atol": 1e-5 * logits.abs().max().item()}
    torch.testing.assert_close(outputs.logits.double(), logits, **tolerance)
    torch.testing.assert_close(outputs.presence_logits, presence, **tolerance)
    torch.testing.assert_close(aux.double(), auxiliary, **tolerance)


BOTTLENECKS = ("resnet50", "resnet50s", "resnet50c", "resnet101s")


@pytest.mark.parametrize(
    ("source", "backbone"),
    [(source, backbone) for source in (PYTORCH_ENCODING, MMSEGMENTATION) for backbone in BOTTLENECKS]
    + [(PYTORCH_ENCODING, "resnet18"), (PYTORCH_ENCODING, "resnet34")],
)
@pytest.mark.parametrize("lateral", [False, True])
def test_every_key_is_renamed_there_and_back(source, backbone, lateral):
    config = ModelConfig(150, backbone, lateral=lateral, align_corners=source == PYTORCH_ENCODING)
    theirs = zeros(config, source)
    found = read_foreign(theirs)
    assert (found.source, found.config, found.unknown) == (source, config, [])
    with torch.device("meta"):
        assert set(found.weights) == set(EncNet(config).state_dict())
    back = inverse(found.table)
    assert {rename(key, back) for key in found.weights} == set(theirs)


@pytest.mark.parametrize("backbone", ["resnet18", "resnet34"])
def test_mmsegmentations_basic_blocks_are_refused_as_they_dilate_otherwise(backbone):
    with pytest.raises(ValueError, match="dilates only the first convolution of a block"):
        read_foreign(zeros(ModelConfig(150, backbone), MMSEGMENTATION))


def test_authors_encnet_50s_with_lateral_connections_has_381_keys():
    assert len(zeros(ModelConfig(59, "resnet50s", lateral=True), PYTORCH_ENCODING)) == 381


def test_a_file_without_auxiliary_head_and_counters(tmp_path):
    state = zeros(CONFIG, PYTORCH_ENCODING)
    state = {k: v for k, v in state.items() if "num_batches_tracked" not in k and not k.startswith("auxlayer.")}
    state["pretrained.fc.weight"] = torch.zeros(1000, 2048)
    checkpoint = load_checkpoint(save(tmp_path / "bare.pth", state))
    assert not checkpoint.config.auxiliary
    assert (checkpoint.base_size, checkpoint.name) == (520, "bare")
    assert checkpoint.classes == [f"class {index}" for index in range(CLASSES)]
    build_model(checkpoint)


def test_mmsegmentation_says_its_classes_and_leaves_numpy_scalars(tmp_path):
    names, palette = ("a", "b", "c", "d", "e"), [[i, i, i] for i in range(CLASSES)]
    meta = {"CLASSES": names, "PALETTE": palette, "iter": 80000, "seed": numpy.int64(3), "lr": numpy.float32(0.1)}
    document = {"meta": meta, "state_dict": zeros(CONFIG, MMSEGMENTATION), "optimizer": {"history": numpy.zeros(3)}}
    checkpoint = load_checkpoint(save(tmp_path / "mm.pth", document))
    assert (checkpoint.classes, checkpoint.palette) == (list(names), palette)
    assert (checkpoint.step, checkpoint.base_size) == (80000, 512)


MM_TEXT = """norm_cfg = dict(type='SyncBN', requires_grad=True)
model = dict(
    type='EncoderDecoder',
    decode_head=dict(type='EncHead', {head}loss_decode=dict(type='CrossEntropyLoss')),
    auxiliary_head=dict(type='FCNHead', align_corners=False),
    test_cfg=dict(mode='slide', crop_size=(769, 769)))
"""
ALIGNED, APART = MM_TEXT.format(head="align_corners=True, "), MM_TEXT.format(head="align_corners=False, ")


@pytest.mark.parametrize(
    ("meta", "aligned", "why"),
    [
        ({"config": ALIGNED}, True, ""),
        ({"config": APART}, False, ""),
        ({"cfg": ALIGNED}, True, ""),
        ({"config": 'model = {"decode_head": {"align_corners": True, **more}}'}, True, ""),
        ({}, False, "the file does not say"),
        ({"config": MM_TEXT.format(head="")}, False, "the file does not say"),
        ({"config": MM_TEXT.format(head="align_corners=aligned, ")}, False, "the file does not say"),
        ({"config": "decode_head=dict(align_corners=True"}, False, "the file does not say"),
        ({"config": "# decode_head=dict(align_corners=True)"}, False, "the file does not say"),
        ({"config": "-" * 1_000_000 + "1"}, False, "the file does not say"),
        ({"config": "1" + "+1" * 100_000}, False, "the file does not say"),
        ({"config": "\ud800"}, False, "the file does not say"),
        ({"config": {"model": 1}}, False, "the file does not say"),
        ({"config": ALIGNED + APART}, False, "the configuration in the file says both"),
    ],
)
def test_mmsegmentations_configuration_says_whether_corners_are_aligned(meta, aligned, why):
    found = read_foreign({"meta": meta, "state_dict": zeros(CONFIG, MMSEGMENTATION)})
    assert found.config.align_corners is aligned
    assert found.assumed == (
        why and f"align_corners=False is assumed, as mmsegmentation has it, but for 769x769: {why}"
    )


def test_a_configuration_is_never_run(tmp_path):
    config = f"open({str(tmp_path / 'ran')!r}, 'w')\n{ALIGNED}"
    assert read_foreign({"meta": {"config": config}, "state_dict": zeros(CONFIG, MMSEGMENTATION)}).config.align_corners
    assert not list(tmp_path.iterdir())


MM_NETWORK = """img_norm_cfg = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
model = dict(
    type='EncoderDecoder',
    backbone=dict(type='ResNetV1c', depth=50, {backbone}style='pytorch'),
    decode_head=dict(type='EncHead', align_corners=False))
optimizer = dict(type='SGD', paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=0.1))))
train_pipeline = [dict(type='Normalize', {normalize}to_rgb={rgb})]
"""
DILATED = "dilations=(1, 1, 2, 4), strides=(1, 2, 1, 1), contract_dilation=True, "
LESS_DILATED = "dilations=(1, 1, 1, 2), strides=[1, 2, 2, 1], contract_dilation=True, "
IMAGENET = "mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], "


def configured(backbone=DILATED, normalize=IMAGENET, rgb=True, lateral=False):
    config = MM_NETWORK.format(backbone=backbone, normalize=normalize, rgb=rgb)
    network = ModelConfig(num_classes=CLASSES, channels=CHANNELS, codewords=CODEWORDS, lateral=lateral)
    return {"meta": {"config": config}, "state_dict": zeros(network, MMSEGMENTATION)}


@pytest.mark.parametrize(("backbone", "output_stride"), [(DILATED, 8), (LESS_DILATED, 16)], ids=["8", "16"])
def test_mmsegmentations_configuration_says_the_output_stride(tmp_path, backbone, output_stride):
    image = torch.randn(1, 3, 65, 81, generator=torch.Generator().manual_seed(1)).double()
    state = Weights(seed=2)
    logits, _, _ = reference(state, MM_KEYS, image, (32, 32, 64), False, False, output_stride)
    document = {**configured(backbone), "state_dict": dict(state)}
    model = build_model(load_checkpoint(save(tmp_path / "theirs.pth", document))).double()
    with torch.no_grad():
        found = model(image).logits.double()
    torch.testing.assert_close(found, logits, rtol=1e-5, atol=1e-5 * logits.abs().max().item())


@pytest.mark.parametrize(
    ("document", "said"),
    [
        (
            configured(""),
            r"strides=\[1, 2, 2, 2\], dilations=\[1, 1, 1, 1\], .* networks here",
        ),
        (configured(DILATED.replace("True", "False")), "contract_dilation=False, style='pytorch', .* networks here"),
        (configured(DILATED + "multi_grid=(1, 2, 4), "), r"multi_grid=\[1, 2, 4\], as its configuration says"),
        (configured(LESS_DILATED, lateral=True), "lateral connections at output stride 16, as its configuration says"),
        (configured(rgb=False), "reads pictures in BGR, as its configuration says"),
        (configured(normalize="mean=[1, 2, 3], std=[4, 5, 6], "), "normalises pictures in several ways"),
    ],
    ids=["not dilated", "not contracted", "multi-grid", "lateral at 16", "BGR", "several normalisations"],
)
def test_mmsegmentations_networks_that_compute_something_else_are_refused(tmp_path, document, said):
    with pytest.raises(CheckpointError, match=said):
        load_checkpoint(save(tmp_path / "other.pth", document))


def test_what_its_meta_says_is_kept_on_the_way_out_of_a_refused_file(tmp_path):
    """Every file that its version 1 leaves holds a log of a class of its own."""
    document = {**configured(LESS_DILATED), "message_hub": fractions.Fraction(1), "optimizer": fractions.Fraction(2)}
    document["meta"]["dataset_meta"] = {"classes": ("a", "b", "c", "d", "e"), "palette": [[1, 2, 3]] * CLASSES}
    with pytest.raises(CheckpointError, match="--classes") as error:
        load_checkpoint(save(tmp_path / "theirs.pth", document))
    _, option, code = shlex.split(str(error.value).partition("--classes: ")[2])
    assert subprocess.run([sys.executable, option, code], cwd=tmp_path, timeout=120).returncode == 0
    checkpoint = load_checkpoint(tmp_path / "weights.pth")
    assert (checkpoint.config.output_stride, checkpoint.assumed) == (16, "")
    assert (checkpoint.classes, checkpoint.palette) == (list("abcde"), [[1, 2, 3]] * CLASSES)


def test_mmsegmentations_configuration_says_how_pictures_are_normalised(tmp_path):
    checkpoint = load_checkpoint(save(tmp_path / "usual.pth", configured()))
    assert (checkpoint.mean, checkpoint.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    theirs = "data_preprocessor = dict(mean=[0.0, 51, 255], std=[255, 127.5, 1], bgr_to_rgb=True, size=(512, 512))"
    document = {"meta": {"cfg": theirs}, "state_dict": zeros(CONFIG, MMSEGMENTATION)}
    checkpoint = load_checkpoint(save(tmp_path / "theirs.pth", document))
    assert (checkpoint.mean, checkpoint.std) == ((0, 0.2, 1), (1, 0.5, 0.00392156863))
    for nothing in ("dict(mean=None, std=None)", "dict(mean=[1], std=[1])", "dict(mean=m, std=[1, 0, 1])"):
        document["meta"]["cfg"] = f"data_preprocessor = {nothing}"
        checkpoint = load_checkpoint(save(tmp_path / "nothing.pth", document))
        assert checkpoint.mean == (0.485, 0.456, 0.406)


def test_the_authors_networks_align_corners_whatever_a_configuration_says(tmp_path):
    document = {"meta": {"config": APART}, "state_dict": zeros(CONFIG, PYTORCH_ENCODING)}
    checkpoint = load_checkpoint(save(tmp_path / "theirs.pth", document))
    assert checkpoint.config.align_corners
    assert checkpoint.assumed == "align_corners=True is assumed, as PyTorch-Encoding has it: the file does not say"


def test_classes_of_the_newer_meta_and_classes_that_do_not_fit():
    new = {"dataset_meta": {"classes": ("a", "b"), "palette": [(1, 2, 3), (4, 5, 6)]}}
    assert described_classes(new, 2) == (["a", "b"], [[1, 2, 3], [4, 5, 6]])
    assert described_classes(new, 3) == (["class 0", "class 1", "class 2"], distinct_palette(3))
    assert described_classes({"CLASSES": ("a",), "PALETTE": None}, 1) == (["a"], distinct_palette(1))
    for names in (("a", "a"), ("a", ""), ("a", None)):
        assert described_classes({"CLASSES": names}, 2) == (["class 0", "class 1"], distinct_palette(2))


@pytest.mark.parametrize("kind", [numpy.array, lambda colours: [[numpy.int64(v) for v in c] for c in colours]])
def test_colours_may_be_numpys(kind):
    names, colours = ["a", "b"], [[1, 2, 3], [4, 5, 6]]
    new = {"dataset_meta": {"classes": numpy.array(names), "palette": kind(colours)}}
    assert described_classes(new, 2) == (names, colours)
    assert described_classes({"CLASSES": names, "PALETTE": kind(colours)}, 2) == (names, colours)


def test_palette_follows_the_voc_formula():
    assert distinct_palette(5) == [[128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 128], [128, 0, 128]]
    assert len({tuple(colour) for colour in distinct_palette(255)}) == 255


@pytest.mark.parametrize(
    ("source", "removed", "added", "said"),
    [
        (PYTORCH_ENCODING, "pretrained.bn1.bias", None, ["missing keys: pretrained.bn1.bias"]),
        (MMSEGMENTATION, "backbone.stem.7.bias", None, ["missing keys: backbone.stem.7.bias"]),
        (MMSEGMENTATION, "decode_head.se_layer.weight", None, ["mmsegmentation", "decode_head.se_layer.weight"]),
        (MMSEGMENTATION, None, "decode_head.extra.weight", ["left-over keys: decode_head.extra.weight"]),
        (PYTORCH_ENCODING, None, "pretrained.layer1.9.bn1.odd", ["(4, 4, 6, 3)", "ResNet-50"]),
        (PYTORCH_ENCODING, None, "pretrained.layer1.0.odd", ["left-over keys: pretrained.layer1.0.odd"]),
        (MMSEGMENTATION, None, "backbone.layer1.0.downsample.2.weight", ["average pooling", "downsample.2.weight"]),
    ],
)
def test_keys_missing_or_left_over_are_listed_by_the_files_own_names(tmp_path, source, removed, added, said):
    state = zeros(CONFIG, source)
    if removed:
        del state[removed]
    if added:
        state[added] = torch.zeros(1)
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(save(tmp_path / "theirs.pth", {"state_dict": state}))
    assert all(part in str(error.value) for part in [str(tmp_path), *said])


def test_wrong_shapes_and_nan_are_named(tmp_path):
    state = zeros(CONFIG, PYTORCH_ENCODING)
    state["head.fusion.0.weight"] = state.pop("head.conv5.1.weight")
    state["head.conv5.1.bias"] = torch.zeros(3)
    state["head.conv6.1.bias"] = torch.full((CLASSES,), torch.nan)
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(save(tmp_path / "theirs.pth", state))
    assert "missing keys: head.conv5.1.weight" in str(error.value)
    assert "left-over keys: head.fusion.0.weight" in str(error.value)
    assert "wrong shapes: head.conv5.1.bias (expected (16,), got (3,))" in str(error.value)
    assert "NaN or infinite: head.conv6.1.bias" in str(error.value)


@pytest.mark.parametrize("key", ["head.conv6.1.weight", "pretrained.conv1.0.weight"])
def test_a_number_in_the_place_of_a_tensor(tmp_path, key):
    state = {**zeros(CONFIG, PYTORCH_ENCODING), key: torch.tensor(1.0)}
    with pytest.raises(CheckpointError, match=f"single numbers where tensors belong: {key}"):
        load_checkpoint(save(tmp_path / "theirs.pth", state))


def test_sparse_weights_are_named(tmp_path):
    state = zeros(CONFIG, PYTORCH_ENCODING)
    state["head.conv6.1.bias"] = state["head.conv6.1.bias"].to_sparse()
    with pytest.raises(CheckpointError, match=r"no dense tensors of real numbers: head\.conv6\.1\.bias"):
        load_checkpoint(save(tmp_path / "theirs.pth", state))


def test_an_unknown_stem(tmp_path):
    state = zeros(CONFIG, PYTORCH_ENCODING)
    state["pretrained.conv1.0.weight"] = torch.zeros(48, 3, 3, 3)
    with pytest.raises(CheckpointError, match="48-64-128 channels is neither"):
        load_checkpoint(save(tmp_path / "theirs.pth", state))


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({"conv1.weight": torch.zeros(1), "fc.bias": torch.zeros(1)}, "first keys are conv1.weight, fc.bias"),
        ({"state_dict": {}}, "empty"),
        ({"state_dict": [1]}, "no dict"),
        ({"epoch": 3, "model": {}}, "no tensors under epoch, model"),
        ({"pretrained.conv1.weight": torch.zeros(1)}, "not of an EncNet"),
    ],
)
def test_what_looks_like_neither(tmp_path, document, said):
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(save(tmp_path / "odd.pth", document))
    assert said in str(error.value)
