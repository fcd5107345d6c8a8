"""The paper's classifier for CIFAR-10 (table 6): a 14-layer ResNet whose blocks are gated by their encodings.

A variant is named by its codewords and the channels of its first stage: the paper's are 16k64d and 32k128d.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.checkpoint import library_versions
from model.encoding import Encoding, encode
from model.files import replacing
from model.resnet import conv3x3
from model.weights import CheckpointError, check_state, read_pickle

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
REDUCTION = 4
FORMAT = "encnet-serve-cifar/1"
FIELD_TYPES: dict[str, type | tuple[type, ...]] = {
    "variant": str,
    "weights": dict,
    "step": int,
    "training": (dict, NoneType),
}


class DropEncoding(nn.Module):
    """Encoding without learned smoothing factors; (B, D, H, W) -> (B, K, D), float32.

    Training draws every codeword's scale anew from U(-1, 0) at each call, which regularises; evaluation takes the mean.
    """

    def __init__(self, channels: int, codewords: int) -> None:
        super().__init__()
        self.codewords = Encoding(channels, codewords).codewords

    def forward(self, x: Tensor) -> Tensor:
        scale = self.codewords.new_full((len(self.codewords),), -0.5)
        return encode(x, self.codewords, scale.uniform_(-1, 0) if self.training else scale, 0.0)


class EncodedGate(nn.Module):
    """x (B, C, H, W) times a gate for each channel, predicted from the encoding of a C / 4 channel projection of x."""

    def __init__(self, channels: int, codewords: int) -> None:
        super().__init__()
        inner = channels // REDUCTION
        self.project = nn.Conv2d(channels, inner, 1)
        self.norm = nn.BatchNorm2d(inner)
        self.encoding = DropEncoding(inner, codewords)
        self.gate = nn.Linear(codewords * inner, channels)

    def forward(self, x: Tensor) -> Tensor:
        codes = self.encoding(F.relu(self.norm(self.project(x))))
        gate = torch.sigmoid(self.gate(F.normalize(codes.flatten(1))))
        return x * gate[:, :, None, None].to(x.dtype)


class Block(nn.Module):
    """Two 3x3 convolutions, the gate, and the shortcut: a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int, codewords: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(inputs, outputs, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = conv3x3(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.gate = EncodedGate(outputs, codewords)
        changes = stride != 1 or inputs != outputs
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride=stride) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        residual = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(self.gate(residual) + self.shortcut(x))


class CifarEncNet(nn.Module):
    """Pictures (B, 3, 32, 32), normalised -> class logits (B, 10). Raises ValueError for a variant it cannot read."""

    def __init__(self, variant: str) -> None:
        super().__init__()
        match = re.fullmatch(r"([1-9]\d*)k([1-9]\d*)d", variant)
        if not match or int(match[2]) % REDUCTION:
            raise ValueError(
                f"variant must be codewords and channels, a multiple of {REDUCTION}, as in 16k64d, got {variant!r}"
            )
        codewords, width = int(match[1]), int(match[2])
        self.conv = conv3x3(3, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(
            Block(width, width, 1, codewords),
            Block(width, width, 1, codewords),
            Block(width, 2 * width, 2, codewords),
            Block(2 * width, 2 * width, 1, codewords),
            Block(2 * width, 4 * width, 2, codewords),
            Block(4 * width, 4 * width, 1, codewords),
        )
        self.bn2 = nn.BatchNorm2d(4 * width)
        self.classifier = nn.Linear(4 * width, len(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.bn1(self.conv(x))))
        return self.classifier(F.relu(self.bn2(x)).mean((2, 3)))


@dataclass
class CifarCheckpoint:
    """weights: state dict of `CifarEncNet(variant)`; training: what `--resume` needs, else None."""

    variant: str
    weights: dict[str, Tensor]
    step: int
    training: dict[str, Any] | None = None


def save_cifar(path: Path, checkpoint: CifarCheckpoint) -> None:
    """Write atomically."""
    with replacing(path) as file:
        torch.save({"format": FORMAT, "versions": library_versions(), **vars(checkpoint)}, file)


def load_cifar(path: Path) -> CifarCheckpoint:
    """Raises CheckpointError, saying why, for a file that is missing, damaged or not of a CIFAR-10 classifier."""
    document = read_pickle(path)
    if not isinstance(document, Mapping) or document.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a checkpoint of a CIFAR-10 classifier (format {FORMAT!r})")
    wrong = [key for key, kind in FIELD_TYPES.items() if not isinstance(document.get(key), kind)]
    if wrong:
        raise CheckpointError(f"{path}: fields that are missing or of a wrong type: {', '.join(wrong)}")
    checkpoint = CifarCheckpoint(**{key: document[key] for key in FIELD_TYPES})
    try:
        with torch.device("meta"):
            expected = CifarEncNet(checkpoint.variant).state_dict()
        check_state(expected, checkpoint.weights)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return checkpoint
