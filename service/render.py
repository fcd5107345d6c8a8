"""A label map as a picture: the indexed PNG that explains itself, and the overlay for the eye."""

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from service.errors import InputError

_LEVEL = 1  # of zlib, the fastest; with Z_RLE half the time of level 6 and a smaller file, as masks are flat
_RUN_LENGTH = 3  # zlib calls it Z_RLE
_JPEG_QUALITY = 90
_JPEG_SIDE = 65_500  # libjpeg's limit; the format's own is 65535


def mask_png(
    mask: np.ndarray, classes: Sequence[str], palette: Sequence[Sequence[int]], texts: Mapping[str, Any]
) -> bytes:
    """Label map -> PNG whose pixel values are class ids.

    `mask` uint8 (H, W) becomes an indexed PNG with the `palette` ((r, g, b) of 0..255 in id order); uint16, for models
    above 255 classes, a 16-bit grey one. The dtype's largest value is no class: where an indexed PNG has it, its colour
    is black and transparent. Text chunks carry the rest: `classes` (names in id order) and `palette` as JSON, and
    `texts`, strings as they are and other values as JSON.
    """
    chunks = PngInfo()
    for key, value in {**texts, "classes": classes, "palette": palette}.items():
        chunks.add_itxt(key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), zip=False)
    image = Image.fromarray(mask)
    transparency = {}
    if mask.dtype == np.uint8:
        colours = [channel for colour in palette for channel in colour]
        if (mask == 255).any():
            colours += [0] * (3 * 256 - len(colours))  # Pillow would take fewer bits per pixel for a shorter palette
            transparency = {"transparency": b"\xff" * 255 + b"\0"}
        image.putpalette(colours)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=chunks, compress_level=_LEVEL, compress_type=_RUN_LENGTH, **transparency)
    return buffer.getvalue()


def class_png(where: np.ndarray) -> bytes:
    """bool (H, W) -> grey PNG, 255 where it is true."""
    buffer = io.BytesIO()
    image = Image.fromarray(where.view(np.uint8) * np.uint8(255))
    image.save(buffer, "PNG", compress_level=_LEVEL, compress_type=_RUN_LENGTH)
    return buffer.getvalue()


def overlay_picture(
    pixels: np.ndarray,
    mask: np.ndarray,
    palette: Sequence[Sequence[int]],
    opacity: float = 0.5,
    file_format: Literal["JPEG", "PNG"] = "JPEG",
) -> bytes:
    """The picture with the classes' colours blended over it, as a picture file.

    `pixels` uint8 (H, W, 3), `mask` uint8 or uint16 (H, W), `opacity` of the colours 0..1. Where the mask has its
    dtype's largest value, which is no class, the picture stays as it is.

    Raises InputError with code unsupported for a picture longer than a JPEG can be.
    """
    height, width = mask.shape
    if file_format == "JPEG" and max(width, height) > _JPEG_SIDE:
        raise InputError(
            "unsupported",
            f"an overlay as JPEG has at most {_JPEG_SIDE} pixels a side, and the picture is {width} x {height}; "
            "reduce it (max_side), do without the overlay, or ask for it as PNG (Accept: image/png)",
        )
    other = np.iinfo(mask.dtype).max
    colours = np.zeros((other + 1, 3), np.uint8)
    colours[: len(palette)] = palette
    picture = Image.fromarray(pixels)
    blended = Image.blend(picture, Image.fromarray(colours[mask]), opacity)
    untouched = mask == other
    if untouched.any():
        blended.paste(picture, mask=Image.fromarray(untouched))
    buffer = io.BytesIO()
    blended.save(buffer, file_format, quality=_JPEG_QUALITY, compress_level=_LEVEL)
    return buffer.getvalue()
