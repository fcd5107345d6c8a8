"""What reference_positions gives at sizes that the network was not trained at.

    python -m benchmarks.reference_positions CHECKPOINT --data DIR

One network on whole pictures from half to twice their usual size, with the factor N_ref / N and with the plain sum. Its
N_ref must be the number of positions in the crops that it was trained on, as in every recipe here that has one: then
the factor was 1 in training, a run with the plain sum would have had the same weights, bit for bit
(tests/model/test_train.py), and no second run is needed. A plot lies beside the figures.
"""

import argparse
import dataclasses
import sys
from functools import partial
from typing import Any

from matplotlib.figure import Figure

from benchmarks.command import add_checkpoint, add_output, commit, option_parser, write_json
from model.arguments import DeviceError, add_device, at_least_one, choose_device, scales
from model.checkpoint import Checkpoint, CheckpointError, build_model, load_checkpoint
from model.command import finish
from model.data import SPLITS, DataError, open_dataset
from model.evaluation import EvaluationError, Options, evaluate, totals
from model.files import replacing
from model.pictures import in_memory

SCALES = (0.5, 0.625, 0.75, 0.875, 1.0, 1.25, 1.5, 1.75, 2.0)
FIGURES = {
    "miou": "mIoU %",
    "pixel_accuracy": "pixel accuracy %",
    "presence_map": "presence mAP %",
    "presence_ece": "presence ECE %",
}


def rows_of(checkpoint: Checkpoint, label: str, arguments: argparse.Namespace) -> list[dict[str, float]]:
    """A row of figures for every scale."""
    device = choose_device(arguments.device)
    data = in_memory(open_dataset(arguments.data, arguments.split))
    model = build_model(checkpoint).to(device)
    rows = []
    for scale in arguments.scales:
        options = Options(split=arguments.split, scales=(scale,), base_size=checkpoint.base_size, batch=arguments.batch)
        found = totals(evaluate(checkpoint, model, data, options, device))
        rows.append({"scale": scale, **{key: float(found[key]) for key in FIGURES}})
        print(f"{label}: scale {scale:g}, " + ", ".join(f"{FIGURES[k]} {100 * rows[-1][k]:.2f}" for k in FIGURES))
    return rows


def plot(document: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(14, 3.8), layout="constrained")
    figure.suptitle(f"{document['data']}, {document['split']} split: whole pictures at other sizes than the crop's")
    for axes, (key, label) in zip(figure.subplots(1, len(FIGURES)), FIGURES.items(), strict=True):
        for name in ("with", "without"):
            rows = document[name]
            values = [100 * row[key] for row in rows]
            axes.plot([row["scale"] for row in rows], values, "o-", label=f"{name} the factor")
        axes.set_xlabel("scale")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def study(options: argparse.Namespace) -> None:
    """Evaluate, write the figures and the plot. Raises EvaluationError, DeviceError, CheckpointError and DataError."""
    checkpoint = load_checkpoint(options.checkpoint)
    if not checkpoint.config.reference_positions:
        raise EvaluationError(f"{options.checkpoint}: no reference_positions to compare; train with (crop / 8)^2")
    plain_sum = dataclasses.replace(checkpoint.config, reference_positions=0.0)
    document: dict[str, Any] = {
        "command": "python -m benchmarks.reference_positions",
        "commit": commit(),
        "data": options.data.resolve().name,
        "split": options.split,
        "sha256": checkpoint.sha256,
        "base_size": checkpoint.base_size,
        "reference_positions": checkpoint.config.reference_positions,
        "with": rows_of(checkpoint, "with the factor", options),
        "without": rows_of(dataclasses.replace(checkpoint, config=plain_sum), "without", options),
    }
    write_json(options.output, document)
    with replacing(options.output.with_suffix(".png")) as file:
        plot(document).savefig(file, format="png", dpi=110)
    print(f"written: {options.output}, {options.output.with_suffix('.png')}")


def main(arguments: list[str] | None = None) -> int:
    parser = option_parser("reference_positions", __doc__)
    add_checkpoint(parser)
    parser.add_argument("--split", choices=SPLITS, default="test", help="default: %(default)s")
    parser.add_argument(
        "--scales",
        type=scales,
        default=SCALES,
        metavar="S,S,...",
        help=f"default: {','.join(f'{scale:g}' for scale in SCALES)}",
    )
    parser.add_argument(
        "--batch",
        type=at_least_one,
        default=1,
        metavar="N",
        help="most pictures of one size to run together (default: %(default)s)",
    )
    add_device(parser)
    add_output(parser, "reference-positions.json")
    work = partial(study, parser.parse_args(arguments))
    return finish(work, EvaluationError, DeviceError, CheckpointError, DataError)


if __name__ == "__main__":
    sys.exit(main())
