"""Segmentation metrics as pure functions on counts."""

import numpy
from torch import Tensor

from model.losses import IGNORE


def confusion(mask: Tensor, truth: Tensor, num_classes: int) -> numpy.ndarray:
    """(C, C) int64 counts, rows truth, columns prediction, over the pixels whose truth is not 255."""
    labelled = truth != IGNORE
    pairs = truth[labelled].long() * num_classes + mask[labelled].long()
    return pairs.bincount(minlength=num_classes**2).view(num_classes, num_classes).cpu().numpy()


def intersection_over_union(counts: numpy.ndarray) -> numpy.ndarray:
    """IoU per class from summed confusion counts; NaN for a class in neither truth nor prediction."""
    intersection = numpy.diag(counts).astype(float)
    union = counts.sum(0) + counts.sum(1) - intersection
    return numpy.divide(intersection, union, out=numpy.full(len(counts), numpy.nan), where=union > 0)


def mean_iou(counts: numpy.ndarray) -> float:
    """Mean over the classes that occur in truth or prediction, 0..1."""
    iou = intersection_over_union(counts)
    return float(numpy.nanmean(iou)) if not numpy.isnan(iou).all() else 0.0


def pixel_accuracy(counts: numpy.ndarray) -> float:
    """Correct over labelled pixels, 0..1."""
    return float(numpy.diag(counts).sum() / max(counts.sum(), 1))
