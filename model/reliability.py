"""The reliability diagram: how often a class is in a picture, against how often its score says so."""

from collections.abc import Sequence

import numpy
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from model.figures import BAR, FAINT, INK, TRACK, WRONG
from model.metrics import BINS, expected_calibration_error, reliability

MOST_CLASSES, COLUMNS = 12, 4


def reliability_diagram(scores: numpy.ndarray, present: numpy.ndarray, classes: Sequence[str], title: str) -> Figure:
    """scores: (P, C) in 0..1; present: (P, C) bool. All classes together, and the 12 with the largest errors alone.

    A point is a bin: its mean score and the share of its pictures that have the class, the larger the more pictures.
    On the diagonal scores hold what they say; above it they are too low, below too high.
    """
    errors = numpy.array([expected_calibration_error(s, p) for s, p in zip(scores.T, present.T, strict=True)])
    shown = sorted(numpy.argsort(-errors, kind="stable")[:MOST_CLASSES].tolist())
    rows = -(-len(shown) // COLUMNS)
    figure = Figure(figsize=(15, max(5.4, 0.9 + 2.4 * rows)), dpi=100, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", color=INK, fontsize=15, parse_math=False)
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(1, 2))[0]

    pooled, histogram = left.subplots(2, 1, height_ratios=(4, 1), sharex=True)
    _draw(pooled, scores.ravel(), present.ravel())
    pooled.set_title("all classes together", loc="left", color=INK, fontsize=12)
    pooled.set_ylabel("share of pictures that have the class", color=FAINT)
    histogram.hist(scores.ravel(), bins=numpy.linspace(0, 1, BINS + 1), color=BAR, log=True)
    histogram.set_xlabel("score of presence", color=FAINT)
    histogram.set_ylabel("scores", color=FAINT)
    histogram.tick_params(colors=FAINT)
    histogram.spines[["top", "right"]].set_visible(False)

    panels = right.subplots(rows, COLUMNS, sharex=True, sharey=True, squeeze=False).flat
    for panel, index in zip(panels, shown, strict=False):
        _draw(panel, scores[:, index], present[:, index])
        having = int(present[:, index].sum())
        panel.set_title(
            f"{classes[index][:24]}\nECE {100 * errors[index]:.1f} %, {having} of {len(scores)} pictures",
            loc="left",
            color=INK,
            fontsize=9,
            parse_math=False,
        )
    for panel in list(right.axes)[len(shown) :]:
        panel.set_axis_off()
    return figure


def _draw(panel: Axes, scores: numpy.ndarray, present: numpy.ndarray) -> None:
    found = reliability(scores, present)
    filled = found.counts > 0
    panel.plot((0, 1), (0, 1), color=FAINT, linewidth=1, linestyle="--")
    panel.vlines(found.scores[filled], found.scores[filled], found.frequencies[filled], color=WRONG, linewidth=1.2)
    sizes = 14 + 160 * found.counts[filled] / found.counts.sum()
    panel.scatter(
        found.scores[filled], found.frequencies[filled], sizes, color=BAR, edgecolors="white", zorder=3, clip_on=False
    )
    panel.set(xlim=(-0.04, 1.04), ylim=(-0.04, 1.04), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1), aspect="equal")
    panel.tick_params(colors=FAINT, labelsize=9)
    panel.grid(color=TRACK)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
