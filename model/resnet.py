"""Dilated ResNet backbones with timm's parameter names.

He et al., "Deep Residual Learning" (CVPR 2016); dilation as in Yu et al., "Dilated Residual Networks" (CVPR 2017),
the first block of a dilated stage keeping the dilation of the stage before it.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Stages(NamedTuple):
    """The four stages' features, (B, C_i, H / stride_i, W / stride_i), strides 4, 8 and the output stride twice."""

    c1: Tensor
    c2: Tensor
    c3: Tensor
    c4: Tensor


def conv3x3(inputs: int, outputs: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    """Without bias, and padded so that at stride 1 the size is kept."""
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=dilation, dilation=dilation, bias=False)


class StochasticDepth(nn.Module):
    """Zeroes a picture's residual with a probability in training, and makes up for it in the others.

    Huang et al., "Deep Networks with Stochastic Depth" (ECCV 2016).
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.probability:
            return x
        kept = torch.rand(x.shape[0], 1, 1, 1, device=x.device) >= self.probability
        return x * (kept / (1 - self.probability)).to(x.dtype)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions: the block of ResNet-18 and -34."""

    expansion = 1

    def __init__(
        self,
        inputs: int,
        width: int,
        stride: int,
        dilation: int,
        first_dilation: int,
        downsample: nn.Module | None,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.conv1 = conv3x3(inputs, width, stride, first_dilation)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width, dilation=dilation)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = downsample
        self.drop_path = StochasticDepth(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.drop_path(self.bn2(self.conv2(x))) + shortcut)


class Bottleneck(nn.Module):
    """1x1, 3x3 (carrying stride and the first dilation, its only one), 1x1: the block of ResNet-50 and -101."""

    expansion = 4

    def __init__(
        self,
        inputs: int,
        width: int,
        stride: int,
        dilation: int,
        first_dilation: int,
        downsample: nn.Module | None,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width, stride, first_dilation)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width * self.expansion)
        self.downsample = downsample
        self.drop_path = StochasticDepth(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return F.relu(self.drop_path(self.bn3(self.conv3(x))) + shortcut)


BLOCKS: dict[int, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
}
DEEP_STEM_WIDTHS = {"s": (64, 64, 128), "c": (32, 32, 64)}


class ResNet(nn.Module):
    """A ResNet without its classifier whose last stages trade stride for dilation.

    name: one of `model.config.BACKBONES`; output_stride: 8 or 16; drop_path: see `model.config.ModelConfig`.
    `widths` holds the channels of the four stages.
    """

    def __init__(self, name: str, output_stride: int = 8, drop_path: float = 0.0) -> None:
        super().__init__()
        digits = "".join(filter(str.isdigit, name))
        block, depths = BLOCKS[int(digits)]
        stem = DEEP_STEM_WIDTHS.get(name.removeprefix(f"resnet{digits}"))
        self.conv1: nn.Module
        if stem is None:
            self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
            channels = 64
        else:
            first, second, channels = stem
            self.conv1 = nn.Sequential(
                conv3x3(3, first, stride=2),
                nn.BatchNorm2d(first),
                nn.ReLU(),
                conv3x3(first, second),
                nn.BatchNorm2d(second),
                nn.ReLU(),
                conv3x3(second, channels),
            )
        self.bn1 = nn.BatchNorm2d(channels)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)

        stride_so_far, dilation, blocks_so_far = 4, 1, 0
        self.widths: list[int] = []
        for number, (width, depth, stage_stride) in enumerate(
            zip((64, 128, 256, 512), depths, (1, 2, 2, 2), strict=True), start=1
        ):
            stride, first_dilation = stage_stride, dilation
            if stride_so_far * stage_stride > output_stride:
                stride, dilation = 1, dilation * stage_stride
            stride_so_far *= stride
            blocks: list[nn.Module] = []
            for index in range(depth):
                outputs = width * block.expansion
                block_stride = stride if index == 0 else 1
                downsample = None
                if block_stride != 1 or channels != outputs:
                    downsample = nn.Sequential(
                        nn.Conv2d(channels, outputs, 1, stride=block_stride, bias=False), nn.BatchNorm2d(outputs)
                    )
                blocks_so_far += 1
                blocks.append(
                    block(
                        channels,
                        width,
                        block_stride,
                        dilation,
                        first_dilation if index == 0 else dilation,
                        downsample,
                        drop_path * blocks_so_far / sum(depths),
                    )
                )
                channels = outputs
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
            self.widths.append(channels)
        self._initialise()

    def _initialise(self) -> None:
        """Convolutions from N(0, sqrt(2 / (kh * kw * outputs))), norms to the identity."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, 0, math.sqrt(2 / fan_out))

    def forward(self, image: Tensor) -> Stages:
        """image: (B, 3, H, W) float, normalised RGB."""
        x = self.maxpool(F.relu(self.bn1(self.conv1(image))))
        c1 = self.get_submodule("layer1")(x)
        c2 = self.get_submodule("layer2")(c1)
        c3 = self.get_submodule("layer3")(c2)
        c4 = self.get_submodule("layer4")(c3)
        return Stages(c1, c2, c3, c4)
