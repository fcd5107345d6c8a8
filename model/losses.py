"""EncNet's training objective (paper section 3.2): pixels, presence (the SE-loss) and the auxiliary head."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from model.encnet import Outputs

IGNORE = 255


class Losses(NamedTuple):
    """Scalars: the weighted total, and its unweighted parts for the log."""

    total: Tensor
    pixel: Tensor
    presence: Tensor
    auxiliary: Tensor


def presence_targets(mask: Tensor, num_classes: int) -> Tensor:
    """(B, H, W) integer labels -> (B, C) float 0/1: which classes have at least one pixel. 255 counts for none."""
    counted = torch.where(mask == IGNORE, num_classes, mask).long().flatten(1)
    present = torch.zeros(mask.shape[0], num_classes + 1, device=mask.device)
    return present.scatter_(1, counted, 1.0)[:, :num_classes]


def encnet_loss(
    outputs: Outputs,
    mask: Tensor,
    *,
    presence_weight: float = 0.2,
    auxiliary_weight: float = 0.2,
    class_weights: Tensor | None = None,
) -> Losses:
    """Cross entropy over labelled pixels + weights times SE-loss(es) and auxiliary cross entropy.

    mask: (B, H, W) integer labels, 255 = ignore; class_weights: (C,) float or None. A batch without a single labelled
    pixel costs 0 (not NaN) for its pixels.
    """
    pixel = pixel_loss(outputs.logits, mask, class_weights)
    targets = presence_targets(mask, outputs.logits.shape[1])
    presence = F.binary_cross_entropy_with_logits(outputs.presence_logits.float(), targets)
    if outputs.stage3_presence_logits is not None:
        presence = presence + F.binary_cross_entropy_with_logits(outputs.stage3_presence_logits.float(), targets)
    auxiliary = torch.zeros_like(pixel)
    if outputs.aux_logits is not None:
        auxiliary = pixel_loss(outputs.aux_logits, mask, class_weights)
    return Losses(pixel + presence_weight * presence + auxiliary_weight * auxiliary, pixel, presence, auxiliary)


def pixel_loss(logits: Tensor, mask: Tensor, class_weights: Tensor | None) -> Tensor:
    """Mean (weighted) cross entropy in float32 over the pixels that are labelled.

    Under torch.distributed the mean is over the labelled pixels of all processes, scaled so that averaging the
    processes' gradients, as DDP does, gives the gradient of one process with the whole batch.
    """
    total = F.cross_entropy(logits.float(), mask.long(), class_weights, ignore_index=IGNORE, reduction="sum")
    labelled = mask != IGNORE
    if class_weights is None:
        weight = labelled.sum().float()
    else:
        weight = class_weights[torch.where(labelled, mask, 0).long()].mul(labelled).sum()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(weight)
        weight = weight / dist.get_world_size()
    return total / weight.clamp_min(torch.finfo(torch.float32).tiny)
