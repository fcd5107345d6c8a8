"""What reference_positions gives at sizes that the network was not trained at.

    python -m benchmarks.reference_positions WITH.pt WITHOUT.pt --data camvid

Two networks of one recipe, trained at one crop, with the factor and without it, on whole pictures from half to twice
their usual size. A plot lies beside the figures.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.command import add_output, commit, option_parser, write_json
from model.arguments import DeviceError, add_device, at_least_one, choose_device, scales
from model.checkpoint import CheckpointError, build_model, load_checkpoint
from model.data import SPLITS, DataError, open_dataset
from model.evaluation import EvaluationError, Options, evaluate, totals
from model.files import replacing
from model.pictures import in_memory

SCALES = (0.5, 0.625, 0.75, 0.875, 1.0, 1.25, 1.5, 1.75, 2.0)
FIGURES = {"miou": "mIoU %", "pixel_accuracy": "pixel accuracy %", "presence_map": "presence mAP %"}


def rows_of(path: Path, arguments: argparse.Namespace) -> tuple[float, str, list[dict[str, float]]]:
    """The checkpoint's reference_positions and digest, and a row of figures for every scale."""
    device = choose_device(arguments.device)
    checkpoint = load_checkpoint(path)
    data = in_memory(open_dataset(arguments.data, arguments.split))
    model = build_model(checkpoint).to(device)
    rows = []
    for scale in arguments.scales:
        options = Options(split=arguments.split, scales=(scale,), base_size=checkpoint.base_size, batch=arguments.batch)
        found = totals(evaluate(checkpoint, model, data, options, device))
        rows.append({"scale": scale, **{key: float(found[key]) for key in FIGURES}})
        print(f"{path}: scale {scale:g}, " + ", ".join(f"{FIGURES[k]} {100 * rows[-1][k]:.2f}" for k in FIGURES))
    return checkpoint.config.reference_positions, checkpoint.sha256, rows


def plot(document: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    figure.suptitle(f"{document['data']}, {document['split']} split: whole pictures at other sizes than the crop's")
    for axes, (key, label) in zip(figure.subplots(1, len(FIGURES)), FIGURES.items(), strict=True):
        for name in ("with", "without"):
            rows = document[name]["rows"]
            values = [100 * row[key] for row in rows]
            axes.plot([row["scale"] for row in rows], values, "o-", label=f"{name} the factor")
        axes.set_xlabel("scale")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def main(arguments: list[str] | None = None) -> int:
    parser = option_parser("reference_positions", __doc__)
    parser.add_argument("with_factor", type=Path, metavar="WITH", help="checkpoint with reference_positions")
    parser.add_argument("without_factor", type=Path, metavar="WITHOUT", help="checkpoint with reference_positions=0")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="the data set's folder")
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
    options = parser.parse_args(arguments)
    document: dict[str, Any] = {
        "command": "python -m benchmarks.reference_positions",
        "commit": commit(),
        "data": options.data.resolve().name,
        "split": options.split,
    }
    try:
        for name, path in (("with", options.with_factor), ("without", options.without_factor)):
            if (load_checkpoint(path).config.reference_positions > 0) != (name == "with"):
                raise EvaluationError(f"{path}: must be trained {name} reference_positions")
        for name, path in (("with", options.with_factor), ("without", options.without_factor)):
            factor, digest, rows = rows_of(path, options)
            document[name] = {"reference_positions": factor, "sha256": digest, "rows": rows}
        write_json(options.output, document)
        with replacing(options.output.with_suffix(".png")) as file:
            plot(document).savefig(file, format="png", dpi=110)
    except (EvaluationError, DeviceError, CheckpointError, DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"written: {options.output}, {options.output.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
