"""Inference in PyTorch, whole pictures at several scales: the readable twin of the exported graph."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from model.calibration import Calibration
from model.encnet import EncNet

SIZE_TOLERANCE = 1e-3


class Prediction(NamedTuple):
    """probabilities: (N, C, H, W) at the pictures' own size; presence: (N, C); both float32 in 0..1."""

    probabilities: Tensor
    presence: Tensor


def view_size(height: int, width: int, base_size: int, scale: float) -> tuple[int, int]:
    """Size (height, width) of a view: the long side becomes ceil(base_size * scale), the short side keeps the aspect.

    Rounding is the authors': floor(short * long' / long + 1/2), at least 1 pixel. The scale is taken as the float32
    that the exported graph is given, and what exceeds a whole number by less than SIZE_TOLERANCE is that number: 0.7
    of 480 pixels are 336, though the float32 nearest to 0.7 gives a little more.
    """
    exact_scale = float(torch.tensor(scale, dtype=torch.float32))
    long_side = math.ceil(base_size * exact_scale - SIZE_TOLERANCE)
    longest = max(height, width)

    def view_side(side: int) -> int:
        return max(1, (2 * side * long_side + longest) // (2 * longest))

    return view_side(height), view_side(width)


def normalise(image: Tensor, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor) -> Tensor:
    """uint8 (N, H, W, 3) RGB -> float32 (N, 3, H, W), (x / 255 - mean) / std."""
    x = image.permute(0, 3, 1, 2).float() / 255
    centre, spread = (torch.as_tensor(values, dtype=x.dtype, device=x.device) for values in (mean, std))
    return (x - centre.view(1, 3, 1, 1)) / spread.view(1, 3, 1, 1)


def view_of(pixels: Tensor, base_size: int, scale: float) -> Tensor:
    """(N, 3, H, W) -> the view at that scale, resized bilinearly to `view_size`, antialiased when it shrinks."""
    height, width = pixels.shape[-2:]
    size = view_size(height, width, base_size, scale)
    if size == (height, width):
        return pixels
    return F.interpolate(pixels, size=size, mode="bilinear", align_corners=False, antialias=True)


def presence_scores(presence_logits: Tensor, calibration: Calibration | None) -> Tensor:
    """(N, C) logits -> presence in 0..1, float32."""
    logits = presence_logits.float()
    return (calibration.apply(logits) if calibration else logits).sigmoid()


@torch.inference_mode()
def predict(
    model: EncNet,
    image: Tensor,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    base_size: int,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    calibration: Calibration | None = None,
) -> Prediction:
    """Mean over the views of softmax (pixels) and sigmoid (presence, calibrated where there is a calibration).

    image: uint8 (N, H, W, 3) RGB on the model's device. Each view is `view_of` the picture; with `flip`, its mirror
    image too.
    """
    pixels = normalise(image, mean, std)
    height, width = pixels.shape[-2:]
    probabilities = presence = None
    for scale in scales:
        view = view_of(pixels, base_size, scale)
        for mirrored in (False, True) if flip else (False,):
            outputs = model(view.flip(-1) if mirrored else view)
            logits = outputs.logits.flip(-1) if mirrored else outputs.logits
            logits = F.interpolate(
                logits.float(), size=(height, width), mode="bilinear", align_corners=model.config.align_corners
            )
            views = len(scales) * (2 if flip else 1)
            softmax = logits.softmax(1) / views
            sigmoid = presence_scores(outputs.presence_logits, calibration) / views
            probabilities = softmax if probabilities is None else probabilities + softmax
            presence = sigmoid if presence is None else presence + sigmoid
    if probabilities is None or presence is None:
        raise ValueError("scales must name at least one scale")
    return Prediction(probabilities, presence)
