"""Segmentation and presence metrics as pure functions on counts and scores; every rate is in 0..1."""

from typing import NamedTuple

import numpy
from torch import Tensor

from model.losses import IGNORE

BINS = 15
PRESENCE_THRESHOLD = 0.5  # a class counts as present from this score on


def confusion(mask: Tensor, truth: Tensor, num_classes: int) -> numpy.ndarray:
    """(C, C) int64 counts, rows truth, columns prediction, over the pixels whose truth is not 255."""
    labelled = truth != IGNORE
    pairs = truth[labelled].long() * num_classes + mask[labelled].long()
    return pairs.bincount(minlength=num_classes**2).view(num_classes, num_classes).cpu().numpy()


def intersection_over_union(counts: numpy.ndarray) -> numpy.ndarray:
    """IoU per class from summed confusion counts; NaN for a class in neither truth nor prediction."""
    intersection = numpy.diag(counts).astype(float)
    return _ratio(intersection, counts.sum(0) + counts.sum(1) - intersection)


def class_accuracy(counts: numpy.ndarray) -> numpy.ndarray:
    """Share of each class's labelled pixels that were found; NaN for a class without any."""
    return _ratio(numpy.diag(counts), counts.sum(1))


def mean_iou(counts: numpy.ndarray) -> float:
    """Mean over the classes that occur in truth or prediction."""
    return mean_defined(intersection_over_union(counts))


def mean_iou_authors(counts: numpy.ndarray) -> float:
    """Mean over all classes, one that occurs nowhere counting 0, as PyTorch-Encoding has it."""
    return float(numpy.nan_to_num(intersection_over_union(counts)).mean())


def pixel_accuracy(counts: numpy.ndarray) -> float:
    """Correct over labelled pixels."""
    return float(numpy.diag(counts).sum() / max(counts.sum(), 1))


def average_precision(scores: numpy.ndarray, present: numpy.ndarray) -> float:
    """Sum over thresholds of precision times the gain in recall, as scikit-learn defines it (no interpolation).

    scores: (P,) float, one per picture; present: (P,) bool. Equal scores are one threshold. NaN when the class is in no
    picture; 1 when it is in all of them, whatever the scores.
    """
    if not present.any():
        return float("nan")
    order = numpy.argsort(-scores, kind="stable")
    last_of_ties = numpy.append(numpy.diff(scores[order]) != 0, True)
    hits = numpy.cumsum(present[order])[last_of_ties]
    retrieved = numpy.flatnonzero(last_of_ties) + 1
    gains = numpy.diff(hits, prepend=0) / present.sum()
    return float((hits / retrieved * gains).sum())


def f1(scores: numpy.ndarray, present: numpy.ndarray, threshold: float = PRESENCE_THRESHOLD) -> float:
    """Harmonic mean of precision and recall of `scores >= threshold`; NaN for a class neither present nor predicted."""
    predicted = scores >= threshold
    either = predicted.sum() + present.sum()
    return float(2 * (predicted & present).sum() / either) if either else float("nan")


class Reliability(NamedTuple):
    """Scores in bins of equal width over 0..1: pictures in each bin, their mean score, the share that has the class.

    All (B,); the last two are NaN for an empty bin.
    """

    counts: numpy.ndarray
    scores: numpy.ndarray
    frequencies: numpy.ndarray


def reliability(scores: numpy.ndarray, present: numpy.ndarray, bins: int = BINS) -> Reliability:
    """scores: (P,) in 0..1; present: (P,) bool. A bin has its lower edge, the last one 1 as well."""
    places = numpy.minimum((scores * bins).astype(int), bins - 1)
    counts = numpy.bincount(places, minlength=bins)
    totals = (numpy.bincount(places, weights=values, minlength=bins) for values in (scores, present))
    return Reliability(counts, *(_ratio(total, counts) for total in totals))


def expected_calibration_error(scores: numpy.ndarray, present: numpy.ndarray, bins: int = BINS) -> float:
    """Mean over the pictures of |mean score - share that has the class| of the picture's bin.

    Bins of equal width (Naeini, Cooper, Hauskrecht, AAAI 2015), 15 of them (Guo et al., ICML 2017); the score is that
    of "the class is present", so that scores near 0 are judged as well as those near 1.
    """
    found = reliability(scores, present, bins)
    return float(numpy.nansum(found.counts * numpy.abs(found.scores - found.frequencies)) / len(scores))


def negative_log_likelihood(scores: numpy.ndarray, present: numpy.ndarray) -> float:
    """Mean of -log(probability given to the truth), in nats; scores are kept 1e-12 away from 0 and 1."""
    likelihoods = numpy.where(present, scores, 1 - scores)
    return float(-numpy.log(likelihoods.clip(1e-12, 1)).mean())


def mean_defined(values: numpy.ndarray) -> float:
    """Mean of the values that are not NaN; 0 when there are none."""
    return float(numpy.nanmean(values)) if not numpy.isnan(values).all() else 0.0


def _ratio(part: numpy.ndarray, whole: numpy.ndarray) -> numpy.ndarray:
    return numpy.divide(part, whole, out=numpy.full(len(whole), numpy.nan), where=whole > 0)
