"""What a request costs before it is run: pixels to go through, and the seconds that those have taken so far."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FORGETTING = 0.98  # weight of what was seen one run earlier, so that the prediction follows the machine
_PRIOR = 1e-3  # weight of the first guess, in runs
_FIRST_GUESS = np.array([1.0, 0.1])  # microseconds for a pixel of the network, and for a merged one


@dataclass(frozen=True)
class Work:
    """Pixels over all views: those that enter the network, and those at the picture's own size that are merged."""

    network: int
    merged: int

    @property
    def cost(self) -> int:
        """The number that admission counts in."""
        return self.network + self.merged


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """First pixels of the windows along one side: a step of `stride`, the last one flush with the end."""
    if length <= window:
        return [0]
    return [*range(0, length - window, stride), length - window]


def _windows(length: int, window: int, stride: int) -> int:
    """How many `window_starts` there are."""
    return 1 if length <= window else len(range(0, length - window, stride)) + 1


def work_of(
    width: int,
    height: int,
    base_size: int,
    scales: Sequence[float],
    flip: bool,
    window: int | None = None,
    stride: int | None = None,
) -> Work:
    """The work of one picture of width x height pixels; the arguments are those of Engine.segment."""
    pictures = 1
    if window:
        step = stride or window
        pictures = _windows(width, window, step) * _windows(height, window, step)
        width, height = min(width, window), min(height, window)
    long, short = max(width, height), min(width, height)
    network = sum(math.ceil(base_size * scale) * max(1, round(base_size * scale * short / long)) for scale in scales)
    mirrored = 2 if flip else 1
    return Work(pictures * mirrored * network, pictures * mirrored * len(scales) * width * height)


class CostModel:
    """Seconds of a run, fitted to the runs seen: microseconds for each kind of pixel, by least squares that forget.

    Not thread-safe: one thread observes and predicts.
    """

    def __init__(self) -> None:
        self._moments = np.eye(2) * _PRIOR
        self._products = self._moments @ _FIRST_GUESS
        self._rates = _FIRST_GUESS

    def predict(self, work: Work) -> float:
        """Seconds that a run of this work takes."""
        return float(self._rates @ self._features(work) / 1e6)

    def observe(self, work: Work, seconds: float) -> None:
        """Learn from a run. Runs count by their relative error, so that large ones do not drown small ones."""
        features = self._features(work)
        weight = 1 / features.sum() ** 2
        self._moments = FORGETTING * self._moments + weight * np.outer(features, features)
        self._products = FORGETTING * self._products + weight * features * seconds * 1e6
        self._rates = np.maximum(np.linalg.lstsq(self._moments, self._products, rcond=None)[0], 0)

    @staticmethod
    def _features(work: Work) -> np.ndarray:
        return np.array([work.network, work.merged], float)
