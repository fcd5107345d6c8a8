"""The readable twin of model/augment.py's `crops`: one picture, one crop, in Pillow's words."""

import numpy
from PIL import Image, ImageEnhance

from model.augment import BRIGHTNESS, COLOUR, CONTRAST, Draw

ENHANCERS = {BRIGHTNESS: ImageEnhance.Brightness, CONTRAST: ImageEnhance.Contrast, COLOUR: ImageEnhance.Color}


def crop_of(
    image: numpy.ndarray, mask: numpy.ndarray, drawn: Draw, crop: int, fill: tuple[int, int, int]
) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Picture (H, W, 3) uint8 and mask (H, W) uint8 -> (crop, crop, 3), (crop, crop)."""
    size, affine = (crop, crop), Image.Transform.AFFINE
    picture = Image.fromarray(image).transform(size, affine, drawn.matrix, Image.Resampling.BILINEAR, fillcolor=fill)
    label = Image.fromarray(mask).transform(size, affine, drawn.matrix, Image.Resampling.NEAREST, fillcolor=255)
    for kind, amount in zip(drawn.order, drawn.amounts, strict=True):
        picture = ENHANCERS[kind](picture).enhance(amount)
    if drawn.curves is not None:
        picture = picture.point(drawn.curves.ravel().tolist())
    return numpy.asarray(picture), numpy.asarray(label)
