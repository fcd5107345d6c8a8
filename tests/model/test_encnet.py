"""The network has the authors' layers: names, shapes, counts, initialisation."""

import itertools
import math

import pytest
import torch
from torch import nn

from model.config import BACKBONES, ModelConfig
from model.encnet import ContextEncoding, EncNet, surest_pixel
from model.resnet import ResNet, StochasticDepth


def parameters_in_millions(model):
    return round(sum(p.numel() for p in model.parameters()) / 1e6, 2)


@pytest.mark.parametrize(
    ("config", "millions"),
    [
        (ModelConfig(150), 36.16),
        (ModelConfig(59, lateral=True), 43.92),
        (ModelConfig(11), 35.99),
        (ModelConfig(150, "resnet101s"), 55.16),
        (ModelConfig(150, "resnet50"), 36.04),
    ],
)
def test_published_parameter_counts(config, millions):
    with torch.device("meta"):
        assert parameters_in_millions(EncNet(config)) == millions


@pytest.mark.parametrize(("name", "stride"), [*itertools.product(BACKBONES, (8, 16))])
def test_backbone_strides_and_widths(name, stride):
    with torch.device("meta"):
        backbone = ResNet(name, stride)
        stages = backbone(torch.empty(1, 3, 97, 65))
    expansion = 1 if "18" in name or "34" in name else 4
    widths = [64 * expansion, 128 * expansion, 256 * expansion, 512 * expansion]
    assert backbone.widths == widths
    sizes = [(25, 17), (13, 9), (13, 9), (13, 9)] if stride == 8 else [(25, 17), (13, 9), (7, 5), (7, 5)]
    assert [tuple(c.shape) for c in stages] == [(1, w, *size) for w, size in zip(widths, sizes, strict=True)]


def test_dilation_starts_in_the_second_block_of_a_stage():
    with torch.device("meta"):
        layer3, layer4 = (ResNet("resnet50", 8).get_submodule(name) for name in ("layer3", "layer4"))
        (basic,) = (ResNet("resnet18", 16).get_submodule("layer4"),)
    assert [block.conv2.dilation[0] for block in layer3] == [1, 2, 2, 2, 2, 2]
    assert [block.conv2.dilation[0] for block in layer4] == [2, 4, 4]
    assert [(block.conv1.dilation[0], block.conv2.dilation[0]) for block in basic] == [(1, 2), (2, 2)]


def test_backbone_initialisation():
    torch.manual_seed(0)
    backbone = ResNet("resnet18s", 8)
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            expected = math.sqrt(2 / (module.kernel_size[0] ** 2 * module.out_channels))
            assert float(module.weight.detach().std()) == pytest.approx(expected, rel=0.1)
        elif isinstance(module, nn.BatchNorm2d):
            assert bool((module.weight == 1).all()) and bool((module.bias == 0).all())


def tiny(**options):
    return EncNet(ModelConfig(5, "resnet18", channels=16, codewords=4, **options))


@pytest.mark.parametrize("stride", [8, 16])
@pytest.mark.parametrize("lateral", [False, True])
@pytest.mark.parametrize("detail", [0, 8])
@pytest.mark.parametrize("align_corners", [False, True])
def test_outputs_have_the_input_size(stride, lateral, detail, align_corners):
    model = tiny(output_stride=stride, lateral=lateral, detail=detail, align_corners=align_corners).eval()
    outputs = model(torch.randn(2, 3, 45, 61))
    assert outputs.logits.shape == (2, 5, 45, 61) and outputs.presence_logits.shape == (2, 5)
    assert outputs.aux_logits is None and outputs.stage3_presence_logits is None


def test_training_adds_the_auxiliary_outputs_that_were_configured():
    model, images = tiny(stage3_presence=True).train(), torch.randn(2, 3, 32, 32)
    outputs = model(images)
    assert outputs.aux_logits.shape == (2, 5, 32, 32) and outputs.stage3_presence_logits.shape == (2, 5)
    assert model.eval()(images)[2:] == (None, None)
    assert tiny(auxiliary=False).train()(torch.randn(2, 3, 32, 32)).aux_logits is None


def test_without_encoding_it_is_an_fcn_whose_presence_is_its_surest_pixel():
    model = tiny(encoding=False, detail=8, lateral=True).eval()
    assert not [name for name, _ in model.named_parameters() if "context" in name or "presence" in name]
    outputs = model(torch.randn(2, 3, 64, 96))
    assert outputs.logits.shape == (2, 5, 64, 96)
    logits = torch.tensor([[[[0.0, 5.0]], [[0.0, 1.0]], [[0.0, 1.0]]]])
    sure = 1 / (1 + 2 * math.exp(-4))
    expected = torch.tensor([[math.log(sure / (1 - sure)), math.log(1 / 2), math.log(1 / 2)]])
    torch.testing.assert_close(surest_pixel(logits), expected)
    beyond = surest_pixel(torch.tensor([[[[99.0]], [[-99.0]]]]))
    torch.testing.assert_close(beyond, torch.tensor([[1.0, -1.0]]) * math.log(1e6), atol=0.1, rtol=0)
    assert outputs.presence_logits.shape == (2, 5) and outputs.presence_logits.isfinite().all()


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_logits_of_half_precision_are_resized_in_single(kind):
    logits = torch.randn(1, 5, 3, 4, generator=torch.Generator().manual_seed(0)).to(kind)
    with torch.device("meta"):
        model = tiny()
    resized = model._to_pixels(logits, torch.Size((9, 7)))
    torch.testing.assert_close(resized, model._to_pixels(logits.float(), torch.Size((9, 7))))


def test_context_encoding_by_the_paper_formula():
    torch.manual_seed(0)
    module = ContextEncoding(6, 3).eval()
    x = torch.randn(2, 6, 4, 5)
    gated, scene = module(x)
    projected = torch.relu(module.project.bn(module.project.conv(x)))
    residuals = projected.flatten(2).transpose(1, 2).unsqueeze(2) - module.encoding.codewords
    weights = torch.softmax(module.encoding.scale * residuals.square().sum(-1), -1)
    codes = (weights.unsqueeze(-1) * residuals).sum(1)
    expected = torch.relu(codes / math.sqrt(1 + 1e-5)).mean(1)
    torch.testing.assert_close(scene, expected)
    gamma = torch.sigmoid(expected @ module.gate.weight.t() + module.gate.bias)[:, :, None, None]
    torch.testing.assert_close(gated, torch.relu(x * (1 + gamma)))


def test_stochastic_depth_skips_pictures_more_often_the_deeper_the_block():
    torch.manual_seed(0)
    backbone = tiny(drop_path=0.4).backbone
    probabilities = [module.probability for module in backbone.modules() if isinstance(module, StochasticDepth)]
    assert probabilities == pytest.approx([0.05 * index for index in range(1, 9)])
    layer, x = StochasticDepth(0.25), torch.ones(4000, 2, 3, 3)
    dropped = layer(x)
    assert dropped.unique().tolist() == [0, pytest.approx(4 / 3)]
    assert dropped.mean() == pytest.approx(1, abs=0.03)
    assert (dropped == dropped[:, :1, :1, :1]).all(), "whole pictures"
    assert torch.equal(layer.eval()(x), x)


def test_module_names_are_the_clean_names():
    names = {key.rsplit(".", 1)[0] for key in EncNet(ModelConfig(5, "resnet18", lateral=True)).state_dict()}
    for name in (
        "backbone.layer4.1.bn2",
        "head.bottleneck.conv",
        "head.lateral.0.conv",
        "head.lateral.1.bn",
        "head.fusion.conv",
        "head.context.project.bn",
        "head.context.encoding",
        "head.context.code_norm",
        "head.context.gate",
        "head.presence",
        "head.classifier",
        "aux.bottleneck.conv",
        "aux.classifier",
    ):
        assert name in names


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"backbone": "vgg16"}, "backbone must be one of resnet18"),
        ({"output_stride": 4}, "output_stride must be 8 or 16"),
        ({"codewords": 0}, "codewords must be at least 1"),
        ({"detail": 1}, "detail must be 0 or at least 2, got 1"),
        ({"detail": -2}, "detail must be 0 or at least 2, got -2"),
        ({"num_classes": 0}, "num_classes must be at least 1"),
        ({"encoding": False, "stage3_presence": True}, "stage3_presence needs encoding"),
    ],
)
def test_a_wrong_configuration_says_what_would_be_right(values, words):
    with pytest.raises(ValueError, match=words):
        ModelConfig(**{"num_classes": 5} | values)
