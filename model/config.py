"""What defines a network: the part of a checkpoint from which the same modules can be built again."""

import dataclasses
from dataclasses import dataclass
from typing import Any

BACKBONES = tuple(f"resnet{depth}{stem}" for depth in (18, 34, 50, 101) for stem in ("", "s", "c"))


@dataclass(frozen=True)
class ModelConfig:
    """EncNet's architecture (paper, figure 2; defaults are those of the authors' EncNet-50s for ADE20K).

    num_classes: number of classes C of both heads.
    backbone: `resnet{18,34,50,101}` followed by nothing (7x7 stem), `s` (3x3 stem 64-64-128) or `c` (32-32-64).
    output_stride: 8 or 16, input pixels per feature position after the last stage.
    channels: D, the width of the head.
    codewords: K, the number of codewords.
    encoding: the Context Encoding Module with its presence head; without it the network is an FCN (the paper's
        baseline), which takes a class to be as present as its surest pixel is sure.
    lateral: fuse stages 2 and 3 into the head's features.
    detail: channels of a stride-4 refinement of the gated features with stage 1, before the classifier; 0 for none
        (ours, not the paper's: it recovers poles and signs, which stride 8 cannot draw).
    auxiliary: an FCN head on stage 3, used in training only.
    stage3_presence: the paper's second SE-loss, a scene encoding with a presence head on stage 3 (training only).
    dropout: probability of zeroing a feature before each pixel classifier.
    drop_path: largest probability of skipping a residual block for a picture in training, the last block's; blocks
        before it are skipped less often in proportion (stochastic depth).
    align_corners: how every bilinear resize inside the network maps positions.
    reference_positions: N_ref; the encoded sum is multiplied by N_ref / N. 0 keeps the plain sum.
    """

    num_classes: int
    backbone: str = "resnet50s"
    output_stride: int = 8
    channels: int = 512
    codewords: int = 32
    encoding: bool = True
    lateral: bool = False
    detail: int = 0
    auxiliary: bool = True
    stage3_presence: bool = False
    dropout: float = 0.1
    drop_path: float = 0.0
    align_corners: bool = True
    reference_positions: float = 0.0

    def __post_init__(self) -> None:
        rules = (
            (self.num_classes >= 1, f"num_classes must be at least 1, got {self.num_classes}"),
            (self.backbone in BACKBONES, f"backbone must be one of {', '.join(BACKBONES)}, got {self.backbone!r}"),
            (self.output_stride in (8, 16), f"output_stride must be 8 or 16, got {self.output_stride}"),
            (self.channels >= 1, f"channels must be at least 1, got {self.channels}"),
            (self.codewords >= 1, f"codewords must be at least 1, got {self.codewords}"),
            (self.encoding or not self.stage3_presence, "stage3_presence needs encoding"),
            (self.detail == 0 or self.detail >= 2, f"detail must be 0 or at least 2, got {self.detail}"),
            (0 <= self.dropout < 1, f"dropout must be in [0, 1), got {self.dropout}"),
            (0 <= self.drop_path < 1, f"drop_path must be in [0, 1), got {self.drop_path}"),
            (
                self.reference_positions >= 0,
                f"reference_positions must not be negative, got {self.reference_positions}",
            ),
        )
        broken = [message for holds, message in rules if not holds]
        if broken:
            raise ValueError("; ".join(broken))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelConfig":
        """The configuration stored in a checkpoint.

        Raises ValueError for an unknown or a missing field and one of a wrong type, by name.
        """
        known = {field.name: field.type for field in dataclasses.fields(cls)}
        unknown = sorted(str(key) for key in values if key not in known)
        if unknown:
            raise ValueError(f"unknown model option {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        if "num_classes" not in values:
            raise ValueError("the model configuration lacks num_classes")
        wrong = [
            f"{key} ({value!r})"
            for key, value in values.items()
            if type(value) is not known[key] and not (known[key] is float and type(value) is int)
        ]
        if wrong:
            raise ValueError(f"model options of a wrong type: {', '.join(wrong)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
