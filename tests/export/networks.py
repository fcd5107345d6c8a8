"""Small networks with seeded weights whose logits are of order 10, and their checkpoints."""

import functools
from typing import Any

import numpy
import onnx
import torch

from export.core import core_model
from model.checkpoint import Checkpoint
from model.config import ModelConfig
from model.encnet import EncNet

CLASSES = 5
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def small_network(seed: int = 0, **options: Any) -> EncNet:
    """An EncNet in evaluation mode: norms are off the identity, and logits reach 10 on a standard normal picture."""
    config = ModelConfig(**{"num_classes": CLASSES, "backbone": "resnet18", "channels": 16, "codewords": 4, **options})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = EncNet(config).eval()
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
                module.weight.data.uniform_(0.6, 1.2)
                module.bias.data.uniform_(-0.2, 0.2)
                module.running_mean.uniform_(-0.2, 0.2)
                module.running_var.uniform_(0.7, 1.5)
        with torch.inference_mode():
            picture = torch.randn(1, 3, 64, 64)
            for head, output in ((network.head.classifier, "logits"), (network.head.presence, "presence_logits")):
                head.bias.data.zero_()
                head.weight.data *= 10 / getattr(network(picture), output).abs().max()
                head.bias.data.uniform_(-1, 1)
    return network


@functools.cache
def exported_network(**options: Any) -> tuple[EncNet, onnx.ModelProto]:
    """A small network and its graph, translated once for all tests (a translation takes seconds): not to be changed."""
    network = small_network(**options)
    return network, core_model(network)


def copy_of(model: onnx.ModelProto) -> onnx.ModelProto:
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    return copied


def small_checkpoint(network: EncNet, **changes: Any) -> Checkpoint:
    classes = network.config.num_classes
    values = {
        "config": network.config,
        "weights": network.state_dict(),
        "classes": [f"class {index}" for index in range(classes)],
        "palette": [[index % 256, 20, 255 - index % 256] for index in range(classes)],
        "base_size": 64,
        "mean": MEAN,
        "std": STD,
        "scales": (0.5, 1.0),
        "flip": True,
        "name": "small",
    }
    return Checkpoint(**{**values, **changes})


def pictures(batch: int, height: int, width: int) -> numpy.ndarray:
    """uint8 (N, H, W, 3), the same every time: coarse patches with noise."""
    random = numpy.random.default_rng(batch * 1_000_000 + height * 1000 + width)
    patches = random.integers(0, 256, (batch, 1 + height // 8, 1 + width // 8, 3))
    pixels = patches.repeat(8, axis=1).repeat(8, axis=2)[:, :height, :width] + random.integers(
        -20, 21, (batch, height, width, 3)
    )
    return pixels.clip(0, 255).astype(numpy.uint8)
