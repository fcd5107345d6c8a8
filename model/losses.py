"""EncNet's training objective: pixels, presence (the paper's Semantic Encoding Loss) and the auxiliary head."""

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
    label_smoothing: float = 0.0,
    whole: Tensor | None = None,
) -> Losses:
    """Cross entropy over labelled pixels + weights times SE-loss(es) and auxiliary cross entropy.

    mask: (B, H, W) integer labels, 255 = ignore; class_weights: (C,) float or None; label_smoothing: share of a pixel's
    target that is spread over all classes. A batch without a single labelled pixel costs 0 (not NaN) for its pixels.
    whole: the masks of all the batch of which this is a part; the losses are then this part's share, and those of all
    parts add up to the batch's.
    """
    whole = mask if whole is None else whole
    weight = labelled_weight(whole, class_weights)
    pixel = pixel_loss(outputs.logits, mask, class_weights, weight, label_smoothing)
    targets = presence_targets(mask, outputs.logits.shape[1])
    presence = F.binary_cross_entropy_with_logits(outputs.presence_logits.float(), targets)
    if outputs.stage3_presence_logits is not None:
        presence = presence + F.binary_cross_entropy_with_logits(outputs.stage3_presence_logits.float(), targets)
    presence = presence * (len(mask) / len(whole))
    auxiliary = torch.zeros_like(pixel)
    if outputs.aux_logits is not None:
        auxiliary = pixel_loss(outputs.aux_logits, mask, class_weights, weight, label_smoothing)
    return Losses(pixel + presence_weight * presence + auxiliary_weight * auxiliary, pixel, presence, auxiliary)


def labelled_weight(mask: Tensor, class_weights: Tensor | None) -> Tensor:
    """Scalar: the labelled pixels of (B, H, W), each counting its class's weight.

    Under torch.distributed it is the mean over the processes, so that averaging their gradients, as DDP does, gives the
    gradient of one process with the whole batch.
    """
    labelled = mask != IGNORE
    if class_weights is None:
        weight = labelled.sum().float()
    else:
        weight = class_weights[torch.where(labelled, mask, 0).long()].mul(labelled).sum()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(weight)
        weight = weight / dist.get_world_size()
    return weight


def pixel_loss(
    logits: Tensor, mask: Tensor, class_weights: Tensor | None, weight: Tensor, label_smoothing: float
) -> Tensor:
    """(Weighted) cross entropy in float32, summed over the pixels that are labelled and divided by `weight`.

    A smoothed pixel counts its own class's weight: torch weighs the spread share by class, which would train every
    pixel towards the rarest one.
    """
    both = class_weights is not None and label_smoothing > 0
    total = F.cross_entropy(
        logits.float(),
        mask.long(),
        None if both else class_weights,
        ignore_index=IGNORE,
        reduction="none" if both else "sum",
        label_smoothing=label_smoothing,
    )
    if class_weights is not None and both:
        total = (total * class_weights[torch.where(mask == IGNORE, 0, mask).long()]).sum()
    return total / weight.clamp_min(torch.finfo(torch.float32).tiny)
