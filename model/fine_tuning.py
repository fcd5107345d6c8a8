"""Which parts of a pretrained backbone learn, from which epoch on, and how fast."""

from collections.abc import Collection
from typing import Any

from torch import nn

from model.encnet import EncNet
from model.resnet import ResNet

PARTS = ("stem", "stage1", "stage2", "stage3", "stage4")


def part_names(text: str) -> list[str]:
    """The names in "stem, stage1"; none in ""."""
    return [name.strip() for name in text.split(",") if name.strip()]


def backbone_parts(backbone: ResNet) -> dict[str, list[nn.Module]]:
    """The modules with parameters, by part, in the order of PARTS."""
    stages = {f"stage{number}": [backbone.get_submodule(f"layer{number}")] for number in (1, 2, 3, 4)}
    return {"stem": [backbone.conv1, backbone.bn1], **stages}


def frozen_parts(freeze: str, unfreeze_every: int, epoch: int) -> list[str]:
    """The parts that are not trained in an epoch, 0-based, for the recipe's options of these names.

    Gradual unfreezing (Howard and Ruder, "Universal Language Model Fine-tuning", ACL 2018, section 3.3): after every
    `unfreeze_every` epochs one more part is trained, from stage4 down. Parts in `freeze` never are.
    """
    waiting = PARTS[: max(len(PARTS) - epoch // unfreeze_every, 0)] if unfreeze_every else ()
    return [part for part in PARTS if part in waiting or part in part_names(freeze)]


def hold(backbone: ResNet, frozen: Collection[str]) -> None:
    """Frozen parts get no gradients, and their batch norms use their running statistics and keep them; others learn."""
    for part, modules in backbone_parts(backbone).items():
        for module in modules:
            module.requires_grad_(part not in frozen)
            module.train(part not in frozen)


def parameter_groups(
    network: EncNet, learning_rate: float, layer_decay: float, head_rate: float, unfreeze_every: int
) -> list[dict[str, Any]]:
    """The optimizer's groups, each with its base_rate: the backbone from the stem on, then everything else.

    stage4 has learning_rate, each part before it layer_decay times the rate of the part after it (Clark et al.,
    "ELECTRA", ICLR 2020, appendix A), the rest learning_rate * head_rate. The backbone is one group where its parts
    have one rate and start together: torch's fused SGD wants all parameters of a group to have momentum, or none.
    """
    backbone = list(network.backbone.parameters())
    groups = [{"params": backbone, "base_rate": learning_rate}]
    if layer_decay != 1 or unfreeze_every:
        groups = [
            {
                "params": [parameter for module in modules for parameter in module.parameters()],
                "base_rate": learning_rate * layer_decay**distance,
            }
            for distance, modules in zip((4, 3, 2, 1, 0), backbone_parts(network.backbone).values(), strict=True)
        ]
    inside = set(backbone)
    rest = [parameter for parameter in network.parameters() if parameter not in inside]
    return [*groups, {"params": rest, "base_rate": learning_rate * head_rate}]
