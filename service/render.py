"""A label map as a picture: the indexed PNG that explains itself, and the overlay for the eye."""

import io
import json
from collections.abc import Sequence

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from service.engine import Engine
from service.presence import PresenceRow

_FAST = 1  # zlib's fastest level: label maps are flat, so slower ones gain little
_RUN_LENGTH = 3  # zlib's Z_RLE strategy


def mask_png(mask: np.ndarray, engine: Engine, rows: Sequence[PresenceRow]) -> bytes:
    """Label map -> PNG whose pixel values are class ids.

    `mask` uint8 (H, W) becomes an indexed PNG with the model's palette; uint16, for models above 255 classes, a 16-bit
    grey one. Text chunks carry the rest: `model` and `model_sha256`, and as JSON `classes` (names in id order),
    `palette` ([r, g, b] in id order) and `presence` (the rows).
    """
    text = PngInfo()
    text.add_itxt("model", engine.metadata.name)
    text.add_itxt("model_sha256", engine.sha256)
    for key, value in {
        "classes": engine.metadata.classes,
        "palette": engine.metadata.palette,
        "presence": list(rows),
    }.items():
        text.add_itxt(key, json.dumps(value, ensure_ascii=False), zip=False)
    image = Image.fromarray(mask)
    if mask.dtype == np.uint8:
        image.putpalette([channel for colour in engine.metadata.palette for channel in colour])
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=text, compress_level=_FAST, compress_type=_RUN_LENGTH)
    return buffer.getvalue()


def overlay_jpeg(pixels: np.ndarray, mask: np.ndarray, palette: Sequence[Sequence[int]], opacity: float = 0.5) -> bytes:
    """The picture with the classes' colours blended over it, as JPEG.

    `pixels` uint8 (H, W, 3), `mask` uint8 or uint16 (H, W), `opacity` of the colours 0..1.
    """
    colours = np.asarray(palette, np.uint8)[mask]
    buffer = io.BytesIO()
    Image.blend(Image.fromarray(pixels), Image.fromarray(colours), opacity).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
