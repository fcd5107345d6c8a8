"""EncNet: a dilated ResNet, the Context Encoding Module, and the heads (paper, figure 2)."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import ModelConfig
from model.encoding import Encoding
from model.resnet import ResNet, Stages


class Outputs(NamedTuple):
    """What the network answers for a batch; the last two are None in evaluation or when not configured.

    logits: (B, C, H, W) at the input's size; presence_logits: (B, C);
    aux_logits: (B, C, H, W) of the FCN head on stage 3; stage3_presence_logits: (B, C) of the second SE-loss.
    """

    logits: Tensor
    presence_logits: Tensor
    aux_logits: Tensor | None = None
    stage3_presence_logits: Tensor | None = None


class ConvNormReLU(nn.Module):
    """Convolution without bias, batch norm, ReLU: (B, inputs, H, W) -> (B, outputs, H, W)."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class SceneEncoding(nn.Module):
    """Features (B, inputs, H, W) -> one vector per scene (B, channels), float32: project, encode, norm, ReLU, mean."""

    def __init__(self, inputs: int, channels: int, codewords: int, reference_positions: float = 0.0) -> None:
        super().__init__()
        self.project = ConvNormReLU(inputs, channels, 1)
        self.encoding = Encoding(channels, codewords, reference_positions)
        self.code_norm = nn.BatchNorm1d(codewords)

    def forward(self, x: Tensor) -> Tensor:
        codes = self.encoding(self.project(x))
        with torch.autocast(x.device.type, enabled=False):
            return F.relu(self.code_norm(codes)).mean(1)


class ContextEncoding(SceneEncoding):
    """The Context Encoding Module: the scene's encoding gates the channels of x. It fits any (B, channels, H, W)."""

    def __init__(self, channels: int, codewords: int, reference_positions: float = 0.0) -> None:
        super().__init__(channels, channels, codewords, reference_positions)
        self.gate = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Returns the gated features relu(x + gamma x), (B, channels, H, W), and the scene's encoding (B, channels)."""
        scene = super().forward(x)
        return raise_channels(x, torch.sigmoid(self.gate(scene))), scene


def raise_channels(x: Tensor, gamma: Tensor) -> Tensor:
    """relu(x + gamma x) of features (B, D, H, W) and gates (B, D) in 0..1."""
    return F.relu(x + x * gamma[:, :, None, None].to(x.dtype))


class Detail(nn.Module):
    """Refine gated features at stride 4 with stage 1, as the decoder of DeepLabV3+ does (Chen et al., ECCV 2018).

    (B, inputs, h, w) and stage 1's (B, stage1, H, W) -> (B, channels, H, W).
    """

    def __init__(self, stage1: int, inputs: int, channels: int, align_corners: bool) -> None:
        super().__init__()
        self.align_corners = align_corners
        self.reduce = ConvNormReLU(stage1, channels // 2, 1)
        self.fuse = ConvNormReLU(inputs + channels // 2, channels, 3)

    def forward(self, gated: Tensor, c1: Tensor) -> Tensor:
        upsampled = resize(gated, c1.shape[-2:], self.align_corners)
        return self.fuse(torch.cat([upsampled, self.reduce(c1)], 1))


class EncHead(nn.Module):
    """Stages -> class logits (B, C, h, w) at the head's own stride, and presence logits (B, C)."""

    def __init__(self, config: ModelConfig, widths: list[int]) -> None:
        super().__init__()
        channels = config.channels
        self.align_corners = config.align_corners
        self.bottleneck = ConvNormReLU(widths[3], channels, 3)
        self.lateral = (
            nn.ModuleList(ConvNormReLU(width, channels, 1) for width in widths[1:3]) if config.lateral else None
        )
        self.fusion = ConvNormReLU(3 * channels, channels, 3) if config.lateral else None
        self.context = (
            ContextEncoding(channels, config.codewords, config.reference_positions) if config.encoding else None
        )
        self.presence = nn.Linear(channels, config.num_classes) if config.encoding else None
        self.detail = Detail(widths[0], channels, config.detail, config.align_corners) if config.detail else None
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Conv2d(config.detail or channels, config.num_classes, 1)
        self.upsample_to_c2 = config.output_stride > 8

    def join(self, stages: Stages) -> Tensor:
        """The features (B, D, H, W) that the Context Encoding Module gates."""
        features = self.bottleneck(stages.c4)
        if self.lateral is not None and self.fusion is not None:
            parts = [features, *(connect(c) for connect, c in zip(self.lateral, (stages.c2, stages.c3), strict=True))]
            if self.upsample_to_c2:
                size = stages.c2.shape[-2:]
                parts = [
                    resize(parts[0], size, self.align_corners),
                    parts[1],
                    resize(parts[2], size, self.align_corners),
                ]
            features = self.fusion(torch.cat(parts, 1))
        return features

    def classify(self, gated: Tensor, stages: Stages) -> Tensor:
        """Gated features (B, D, H, W) -> class logits at the head's own stride."""
        if self.detail is not None:
            gated = self.detail(gated, stages.c1)
        return self.classifier(self.dropout(gated))

    def forward(self, stages: Stages) -> tuple[Tensor, Tensor]:
        features = self.join(stages)
        if self.context is None or self.presence is None:
            logits = self.classify(features, stages)
            return logits, surest_pixel(logits)
        gated, scene = self.context(features)
        return self.classify(gated, stages), self.presence(scene)


def surest_pixel(logits: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C): for each class the log-odds of the pixel that is surest of it."""
    return torch.logit(logits.float().softmax(1).amax((2, 3)), eps=1e-6)


class FCNHead(nn.Module):
    """3x3 convolution to a quarter of the channels and a pixel classifier (Long et al., CVPR 2015).

    (B, inputs, h, w) -> class logits (B, C, h, w).
    """

    def __init__(self, inputs: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.bottleneck = ConvNormReLU(inputs, inputs // 4, 3)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Conv2d(inputs // 4, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.dropout(self.bottleneck(x)))


class StagePresence(nn.Module):
    """The second SE-loss of the paper: a scene encoding with a presence head of its own on stage 3.

    (B, inputs, h, w) -> presence logits (B, C).
    """

    def __init__(self, inputs: int, config: ModelConfig) -> None:
        super().__init__()
        self.scene = SceneEncoding(inputs, config.channels, config.codewords, config.reference_positions)
        self.presence = nn.Linear(config.channels, config.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.presence(self.scene(x))


class EncNet(nn.Module):
    """The whole network (paper, figure 2); `config` is all that is needed to build it again."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = ResNet(config.backbone, config.output_stride, config.drop_path)
        widths = self.backbone.widths
        self.head = EncHead(config, widths)
        self.aux = FCNHead(widths[2], config.num_classes, config.dropout) if config.auxiliary else None
        self.stage3 = StagePresence(widths[2], config) if config.stage3_presence else None

    def forward(self, image: Tensor) -> Outputs:
        """image: (B, 3, H, W) float, normalised RGB, at least 1x1 pixels."""
        size = image.shape[-2:]
        stages = self.backbone(image)
        logits, presence_logits = self.head(stages)
        aux_logits = stage3_logits = None
        if self.training and self.aux is not None:
            aux_logits = self._to_pixels(self.aux(stages.c3), size)
        if self.training and self.stage3 is not None:
            stage3_logits = self.stage3(stages.c3)
        return Outputs(self._to_pixels(logits, size), presence_logits, aux_logits, stage3_logits)

    def _to_pixels(self, logits: Tensor, size: torch.Size) -> Tensor:
        """Float32 and contiguous before the resize: softmax over channels is slow and imprecise otherwise."""
        return resize(logits.float().contiguous(), size, self.config.align_corners)


def resize(x: Tensor, size: torch.Size | tuple[int, int], align_corners: bool) -> Tensor:
    """Bilinear resize of (B, C, h, w) to (B, C, *size)."""
    return F.interpolate(x, size=list(size), mode="bilinear", align_corners=align_corners)
