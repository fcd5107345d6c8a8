"""Run a model over the pictures' sizes to come: what the first picture of a size pays for, and what the second."""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from service.engine import Engine


@dataclass(frozen=True)
class Times:
    """Milliseconds of the first and of the second picture of one size."""

    first_ms: float
    second_ms: float


def read_size(text: str, max_pixels: int) -> tuple[int, int]:
    """(width, height) from a text as 640x480. Raises ValueError, with a sentence, for another or too large a size."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text.strip().lower())
    if not found:
        raise ValueError(f"--size is WIDTHxHEIGHT in pixels as in 640x480, not {text!r}")
    width, height = int(found[1]), int(found[2])
    if width * height > max_pixels:
        raise ValueError(f"--size {text} is {width * height} pixels, more than the {max_pixels} allowed")
    return width, height


def usual_sizes(base_size: int) -> list[tuple[int, int]]:
    """(width, height) of a landscape, a portrait and a square picture with the model's own long side."""
    short = base_size * 3 // 4
    return [(base_size, short), (short, base_size), (base_size, base_size)]


def warm(engine: Engine, size: tuple[int, int], scales: Sequence[float] | None, flip: bool | None) -> Times:
    """Segment two pictures of noise of `size` (width, height)."""
    width, height = size
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    times = []
    for _ in range(2):
        started = time.perf_counter()
        engine.segment(noise, scales, flip)
        times.append((time.perf_counter() - started) * 1000)
    return Times(*times)
