"""What a request costs before it is run: pixels to go through, and the seconds that those have taken so far."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

FORGETTING = 0.98  # weight of what was seen one run earlier, so that the prediction follows the machine
_SIZE_TOLERANCE = 0.001  # pixels, the graph's: 480 * 1.1 is 528, whatever a float makes of it
_PRIOR = 1e-3  # weight of the rates so far, in runs
_FEW_PIXELS = 1e6  # fewer tell little about a large mask: they take as long as many, nearly
_FIRST_GUESS = (1.0, 0.1)  # microseconds for a pixel of the network, and for a merged one


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
    network = sum(_view_pixels(long, short, base_size * scale) for scale in scales)
    mirrored = 2 if flip else 1
    return Work(pictures * mirrored * network, pictures * mirrored * len(scales) * width * height)


def _view_pixels(long: int, short: int, target: float) -> int:
    """Pixels of a view whose long side is to be `target`, by the rule of the graph (its metadata has it in words)."""
    view_long = max(1, math.ceil(target - _SIZE_TOLERANCE))
    return view_long * max(1, (2 * short * view_long + long) // (2 * long))


class EncodeTimes:
    """Seconds that writing an answer takes, by its format: for each pixel of the mask, as much as those so far took.

    Not thread-safe: one thread observes and predicts.
    """

    def __init__(self) -> None:
        self._seen: dict[str, tuple[float, float]] = {}  # seconds and pixels, those of long ago weighing less

    def predict(self, format_: str | None, pixels: int) -> float:
        """Seconds for a mask of so many pixels; 0 for a format that has not been seen."""
        seconds, seen = self._seen.get(format_ or "", (0.0, 0.0))
        return pixels * seconds / (seen + _FEW_PIXELS)

    def observe(self, format_: str, pixels: int, seconds: float) -> None:
        """Learn from an answer that was written."""
        before = self._seen.get(format_, (0.0, 0.0))
        self._seen[format_] = FORGETTING * before[0] + seconds, FORGETTING * before[1] + pixels


class CostModel:
    """Seconds of a run, fitted to the runs seen: microseconds for each kind of pixel, by least squares that forget.

    What the runs do not tell, as all of one shape tell no rate by itself, stays as it was.
    One thread at a time may observe; any may predict.
    """

    def __init__(self) -> None:
        self._rates = _FIRST_GUESS
        self._moments = [0.0] * 5  # sums over the runs, of the products that are `seen`

    def predict(self, work: Work) -> float:
        """Seconds that a run of this work takes."""
        network_rate, merged_rate = self._rates
        return (network_rate * work.network + merged_rate * work.merged) / 1e6

    def observe(self, work: Work, seconds: float) -> None:
        """Learn from a run. Runs count by their relative error, so that large ones do not drown small ones."""
        network, merged, cost = work.network / work.cost, work.merged / work.cost, seconds * 1e6 / work.cost
        seen = (network * network, network * merged, merged * merged, network * cost, merged * cost)
        self._moments = [FORGETTING * old + new for old, new in zip(self._moments, seen, strict=True)]
        nn, nm, mm, nc, mc = self._moments
        nn, mm = nn + _PRIOR, mm + _PRIOR
        nc, mc = nc + _PRIOR * self._rates[0], mc + _PRIOR * self._rates[1]
        determinant = nn * mm - nm * nm
        network_rate, merged_rate = (mm * nc - nm * mc) / determinant, (nn * mc - nm * nc) / determinant
        if network_rate < 0:  # no pixel takes less than no time: then the other kind takes it all
            network_rate, merged_rate = 0.0, mc / mm
        elif merged_rate < 0:
            network_rate, merged_rate = nc / nn, 0.0
        self._rates = network_rate, merged_rate
