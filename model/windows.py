"""Sliding windows: the evaluation of the paper's authors (`MultiEvalModule` of PyTorch-Encoding), step by step.

At every scale the picture is resized, padded with black to at least one window, cut into windows that overlap by a
third, and the windows' answers are averaged where they overlap; the scales' answers are added up at the picture's size.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from model.calibration import Calibration
from model.encnet import EncNet
from model.predict import normalise, presence_scores, view_size

MERGES = ("softmax", "exp_sum")
AUTHORS_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


class WindowScores(NamedTuple):
    """scores: (1, C, H, W) at the picture's own size, the higher the likelier; presence: (1, C) in 0..1.

    With the merge "softmax" the scores are probabilities (float32); with "exp_sum" they have no unit (float64).
    """

    scores: Tensor
    presence: Tensor


def window_spans(side: int, crop: int) -> list[tuple[int, int]]:
    """Start and end of every window along a side of at least `crop` pixels; the last one may be shorter than `crop`."""
    stride = int(crop * 2 / 3)
    count = math.ceil((side - crop) / stride) + 1
    return [(index * stride, min(index * stride + crop, side)) for index in range(count)]


@torch.inference_mode()
def predict_windows(
    model: EncNet,
    image: Tensor,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    base_size: int,
    crop: int,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    merge: str = "softmax",
    calibration: Calibration | None = None,
) -> WindowScores:
    """The network on windows of `crop` x `crop` pixels of one picture, (1, H, W, 3) uint8 RGB on the model's device.

    merge "exp_sum" is the authors' own: a window's score is exp(logits + logits of its mirror image), which is
    unnormalised, so that a confident window outweighs its neighbours. It overflows float32 where the sum passes 88 and
    is therefore computed in float64 (to 709). "softmax" averages probabilities instead, over mirrors, windows, scales.

    Presence has no counterpart in the authors' protocol: it is the mean of all the windows' (calibrated) sigmoids, and
    a window sees only its part of the scene.
    """
    if not scales:
        raise ValueError("scales must name at least one scale")
    pixels = normalise(image, mean, std)
    black = normalise(torch.zeros_like(image[:1, :1, :1]), mean, std)
    height, width = pixels.shape[-2:]
    total = torch.zeros((), device=image.device)
    presence_logits: list[Tensor] = []
    for scale in scales:
        size = view_size(height, width, base_size, scale)
        view = F.interpolate(pixels, size=size, mode="bilinear", align_corners=True)
        score, found = score_view(model, view, crop, black, flip, merge)
        total = total + F.interpolate(score, size=(height, width), mode="bilinear", align_corners=True)
        presence_logits.extend(found)
    if merge == "softmax":
        total = total / len(scales)
    return WindowScores(total, presence_scores(torch.stack(presence_logits), calibration).mean(0))


def score_view(
    model: EncNet, view: Tensor, crop: int, black: Tensor, flip: bool, merge: str
) -> tuple[Tensor, list[Tensor]]:
    """Scores (1, C, h, w) of a normalised picture (1, 3, h, w), and the presence logits (1, C) of every pass."""
    padded = pad(view, crop, black)
    dtype = torch.float64 if merge == "exp_sum" else torch.float32
    scores = torch.zeros(1, model.config.num_classes, *padded.shape[-2:], dtype=dtype, device=view.device)
    counts = torch.zeros(padded.shape[-2:], dtype=dtype, device=view.device)
    presence_logits: list[Tensor] = []
    for top, bottom in window_spans(padded.shape[-2], crop):
        for left, right in window_spans(padded.shape[-1], crop):
            window = pad(padded[..., top:bottom, left:right], crop, black)
            score, found = score_window(model, window, flip, merge)
            scores[..., top:bottom, left:right] += score[..., : bottom - top, : right - left]
            counts[top:bottom, left:right] += 1
            presence_logits.extend(found)
    height, width = view.shape[-2:]
    return (scores / counts)[..., :height, :width], presence_logits


def score_window(model: EncNet, window: Tensor, flip: bool, merge: str) -> tuple[Tensor, list[Tensor]]:
    """Scores (1, C, crop, crop) of a window, and the presence logits (1, C) of its one or (with flip) two passes."""
    outputs = [model(window)]
    logits = [outputs[0].logits]
    if flip:
        outputs.append(model(window.flip(-1)))
        logits.append(outputs[1].logits.flip(-1))
    views = torch.stack(logits)
    presence = [output.presence_logits for output in outputs]
    if merge == "exp_sum":
        return views.double().sum(0).exp(), presence
    return views.float().softmax(2).mean(0), presence


def pad(x: Tensor, crop: int, fill: Tensor) -> Tensor:
    """(1, 3, h, w) padded at the bottom and the right to at least `crop` x `crop` with `fill`, (1, 3, 1, 1)."""
    height, width = x.shape[-2:]
    padded = fill.expand(1, -1, max(height, crop), max(width, crop)).clone()
    padded[..., :height, :width] = x
    return padded
