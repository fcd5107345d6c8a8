"""Time, size and memory of each answer format: `python -m benchmarks.formats > benchmarks/results/formats.json`.

Masks of 1024 x 1024 and 12 classes: smooth regions as networks draw them, the same with a tenth of the pixels replaced
at random, and nothing but noise; and one of 4096 x 4096. Times are the thread's CPU time, the lesser of two calls, so
that they mean something on a busy machine. Memory is the peak of what NumPy and Python allocate in a call,
its result included; Pillow's own is not counted.
"""

import io
import json
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.command import hardware
from service.encoders import npz, rle
from service.polygons import polygons
from service.render import mask_png, overlay_picture

CLASSES = [f"class {index}" for index in range(12)]
PALETTE = [(20 * index, 255 - 20 * index, 128) for index in range(12)]


def masks() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    scores = [
        np.asarray(Image.fromarray(rng.random((12, 12), np.float32)).resize((1024, 1024), Image.Resampling.BICUBIC))
        for _ in CLASSES
    ]
    smooth = np.argmax(scores, axis=0).astype(np.uint8)
    noise = rng.integers(0, 12, smooth.shape, np.uint8)
    salted = np.where(rng.random(smooth.shape) < 0.1, noise, smooth)
    large = np.asarray(Image.fromarray(smooth).resize((4096, 4096), Image.Resampling.NEAREST))
    return {"smooth": smooth, "salted": salted, "noise": noise, "smooth 16 MP": large}


def png_by_zlib(mask: np.ndarray, level: int, strategy: int) -> bytes:
    image = Image.fromarray(mask)
    image.putpalette([channel for colour in PALETTE for channel in colour])
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=level, compress_type=strategy)
    return buffer.getvalue()


def encoders(mask: np.ndarray) -> dict[str, Callable[[], bytes]]:
    pixels = np.random.default_rng(1).integers(0, 256, (*mask.shape, 3), np.uint8)
    return {
        "png": lambda: mask_png(mask, CLASSES, PALETTE, {}),
        "png, zlib level 1, default strategy": lambda: png_by_zlib(mask, 1, 0),
        "png, zlib level 6, default strategy": lambda: png_by_zlib(mask, 6, 0),
        "overlay": lambda: overlay_picture(pixels, mask, PALETTE),
        "rle": lambda: json.dumps(rle(mask, CLASSES)).encode(),
        "polygons": lambda: polygons(mask, CLASSES, {}),
    }


def npz_of_a_megapixel() -> Callable[[], bytes]:
    """Probabilities are random, which is the worst case for zlib."""
    mask = np.zeros((1024, 1024), np.uint8)
    probabilities = np.random.default_rng(2).random((len(CLASSES), *mask.shape), np.float32)
    return lambda: npz(mask, probabilities, np.zeros(len(CLASSES), np.float32), CLASSES)


def measure(call: Callable[[], bytes]) -> dict[str, float]:
    times = []
    for _ in range(2):
        started = time.thread_time()
        size = len(call())
        times.append(time.thread_time() - started)
    tracemalloc.start()
    call()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {"ms": round(min(times) * 1000, 1), "kB": round(size / 1000, 1), "peak_MB": round(peak / 1e6, 1)}


if __name__ == "__main__":
    report: dict[str, Any] = {
        "command": "python -m benchmarks.formats",
        "hardware": hardware(),
        "masks": {
            name: {format: measure(call) for format, call in encoders(mask).items()} for name, mask in masks().items()
        },
        "npz": measure(npz_of_a_megapixel()),
    }
    print(json.dumps(report, indent=1))
