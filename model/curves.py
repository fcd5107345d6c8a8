"""How a run went, as numbers and as a figure: curves.json and curves.png."""

import json
from pathlib import Path

from matplotlib.figure import Figure

from model.files import replacing

Curves = dict[str, list[dict[str, float]]]


def write_curves(folder: Path, name: str, curves: Curves) -> None:
    """curves: "training", rows of step and losses, and "validation", rows of step, miou and pixel_accuracy in 0..1."""
    with replacing(folder / "curves.json") as file:
        file.write(json.dumps(curves).encode() + b"\n")
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    losses, scores = figure.subplots(2, 1, sharex=True)
    losses.set_title(name, parse_math=False)
    labels = {"total": "total loss", "pixel": "pixels", "presence": "presence", "auxiliary": "auxiliary head"}
    for key, label in labels.items():
        rows = curves["training"]
        losses.plot([row["step"] for row in rows], [row[key] for row in rows], label=label, linewidth=1)
    for key, label in (("miou", "mIoU"), ("pixel_accuracy", "pixel accuracy")):
        rows = curves["validation"]
        scores.plot([row["step"] for row in rows], [100 * row[key] for row in rows], "o-", label=label, markersize=3)
    losses.set_ylabel("loss")
    scores.set_ylabel("validation split, %")
    scores.set_xlabel("step")
    for axes in (losses, scores):
        axes.grid(alpha=0.3)
        axes.legend()
    with replacing(folder / "curves.png") as file:
        figure.savefig(file, format="png", dpi=110)
