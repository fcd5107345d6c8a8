"""A checkpoint over a split of a data set: confusion counts and presence scores, and the figures made of them."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch

from model.checkpoint import Checkpoint
from model.data import SegmentationData, read
from model.encnet import EncNet
from model.figures import Sample
from model.losses import presence_targets
from model.metrics import (
    average_precision,
    class_accuracy,
    confusion,
    expected_calibration_error,
    f1,
    intersection_over_union,
    mean_defined,
    mean_iou,
    mean_iou_authors,
    pixel_accuracy,
)
from model.predict import predict
from model.windows import predict_windows

SHEET_PICTURES = 8
WAITING_BATCHES = 4  # most batches of pictures that wait for others of their size


class EvaluationError(ValueError):
    """Options that do not fit each other, the checkpoint or the data; the message says which."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is computed; base_size and crop in pixels, limit in pictures (0: all of the split), without: their IDs.

    protocol: "whole" or "windows"; merge: one of MERGES; crop: side of a window, not used by "whole";
    batch: most pictures of one size to run together, under the protocol "whole"; precision: "fp32" or "bf16".
    """

    split: str
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    protocol: str = "whole"
    merge: str = "softmax"
    crop: int = 480
    base_size: int
    limit: int = 0
    without: tuple[str, ...] = ()
    batch: int = 1
    precision: str = "fp32"


@dataclass(frozen=True)
class Evaluation:
    """counts: (C, C) confusion; scores: (P, C) presence in 0..1; present: (P, C) bool, its truth; seconds elapsed."""

    counts: numpy.ndarray
    scores: numpy.ndarray
    present: numpy.ndarray
    samples: list[Sample]
    seconds: float


def check_classes(checkpoint: Checkpoint, data: SegmentationData) -> None:
    """Raise EvaluationError when checkpoint and data set have different numbers of classes."""
    classes = checkpoint.config.num_classes
    if classes != len(data.classes):
        raise EvaluationError(f"the checkpoint has {classes} classes, the data set {len(data.classes)}")


def evaluate(
    checkpoint: Checkpoint,
    model: EncNet,
    data: SegmentationData,
    options: Options,
    device: torch.device,
    advance: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Run the model, which is on `device`, over the split; `advance` is called after each picture.

    Raises EvaluationError when checkpoint and data set have different numbers of classes, DataError for a broken file.
    """
    check_classes(checkpoint, data)
    classes = checkpoint.config.num_classes
    pictures = min(options.limit or len(data), len(data))
    shown = set(numpy.linspace(0, pictures - 1, min(SHEET_PICTURES, pictures)).round().astype(int).tolist())
    counts = numpy.zeros((classes, classes), dtype=numpy.int64)
    scores = numpy.zeros((pictures, classes))
    present = numpy.zeros((pictures, classes), dtype=bool)
    samples: dict[int, Sample] = {}
    start = time.perf_counter()
    for batch in _batches(data, pictures, options.batch if options.protocol == "whole" else 1):
        indexes, images, truths = zip(*batch, strict=True)
        targets = torch.from_numpy(numpy.stack(truths)).to(device)
        views = torch.from_numpy(numpy.stack(images)).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16"):
            label_scores, presence = _predict(checkpoint, model, views, options)
        masks = label_scores.argmax(1)
        counts += confusion(masks, targets, classes)
        rows = list(indexes)
        scores[rows] = presence.float().cpu().numpy()
        present[rows] = presence_targets(targets, classes).cpu().numpy() > 0
        for mask, (index, image, truth) in zip(masks, batch, strict=True):
            if index in shown:
                labels = mask.cpu().numpy().astype(numpy.uint8)
                samples[index] = Sample(data.ids[index], image, truth, labels, scores[index], present[index])
            advance()
    ordered = [samples[index] for index in sorted(samples)]
    return Evaluation(counts, scores, present, ordered, time.perf_counter() - start)


def _batches(
    data: SegmentationData, pictures: int, batch: int
) -> Iterator[list[tuple[int, numpy.ndarray, numpy.ndarray]]]:
    """Index, picture and labels of pictures of one size, at most `batch` at a time.

    At most WAITING_BATCHES * batch pictures are held back, beside what `read` has ahead; the largest group goes first.
    """
    waiting: dict[tuple[int, ...], list[tuple[int, numpy.ndarray, numpy.ndarray]]] = {}
    for index, (image, truth) in enumerate(read(data, pictures)):
        same = waiting.setdefault(truth.shape, [])
        same.append((index, image, truth))
        if len(same) == batch:
            yield waiting.pop(truth.shape)
        elif sum(map(len, waiting.values())) > WAITING_BATCHES * batch:
            yield waiting.pop(max(waiting, key=lambda shape: len(waiting[shape])))
    yield from waiting.values()


def _predict(
    checkpoint: Checkpoint, model: EncNet, image: torch.Tensor, options: Options
) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, C, H, W) scores and (N, C) presence of pictures (N, H, W, 3)."""
    views: dict[str, Any] = {
        "mean": checkpoint.mean,
        "std": checkpoint.std,
        "base_size": options.base_size,
        "scales": options.scales,
        "flip": options.flip,
        "calibration": checkpoint.calibration,
    }
    if options.protocol == "windows":
        return predict_windows(model, image, crop=options.crop, merge=options.merge, **views)
    return predict(model, image, **views)


def totals(evaluation: Evaluation) -> dict[str, float | int]:
    """Figures over all classes, rates in 0..1. Means leave out the classes for which a figure is not defined."""
    presence_ap, presence_f1, presence_ece = _presence_figures(evaluation)
    pictures = len(evaluation.scores)
    return {
        "miou": mean_iou(evaluation.counts),
        "miou_authors": mean_iou_authors(evaluation.counts),
        "pixel_accuracy": pixel_accuracy(evaluation.counts),
        "class_accuracy": mean_defined(class_accuracy(evaluation.counts)),
        "presence_map": mean_defined(presence_ap),
        "presence_macro_f1": mean_defined(presence_f1),
        "presence_ece": mean_defined(presence_ece),
        "pictures": pictures,
        "seconds": round(evaluation.seconds, 3),
        "pictures_per_second": round(pictures / evaluation.seconds, 3),
    }


def class_rows(evaluation: Evaluation, names: Sequence[str]) -> list[dict[str, Any]]:
    """Figures per class, rates in 0..1; None where one is not defined (see model/metrics.py)."""
    presence_ap, presence_f1, presence_ece = _presence_figures(evaluation)
    iou, accuracy = intersection_over_union(evaluation.counts), class_accuracy(evaluation.counts)
    return [
        {
            "name": name,
            "iou": _defined(iou[index]),
            "accuracy": _defined(accuracy[index]),
            "presence_ap": _defined(presence_ap[index]),
            "presence_f1": _defined(presence_f1[index]),
            "presence_ece": float(presence_ece[index]),
            "pictures": int(evaluation.present[:, index].sum()),
            "pixels": int(evaluation.counts[index].sum()),
        }
        for index, name in enumerate(names)
    ]


def _presence_figures(evaluation: Evaluation) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
    """Average precision, F1 and expected calibration error of every class, each (C,)."""
    columns = list(zip(evaluation.scores.T, evaluation.present.T, strict=True))
    return (
        numpy.array([average_precision(scores, present) for scores, present in columns]),
        numpy.array([f1(scores, present) for scores, present in columns]),
        numpy.array([expected_calibration_error(scores, present) for scores, present in columns]),
    )


def _defined(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
