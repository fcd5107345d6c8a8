"""Fit the calibration of presence and keep it in the checkpoint: `python -m model.calibrate CHECKPOINT --data DIR`."""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from model.arguments import DeviceError, add_device, choose_device
from model.calibration import FITS, METHODS, varying
from model.checkpoint import FORMAT, Checkpoint, CheckpointError, build_model, load_checkpoint, save_checkpoint
from model.command import finish
from model.data import SPLITS, DataError, SegmentationData, open_dataset
from model.encnet import EncNet
from model.evaluation import EvaluationError, check_classes
from model.files import check_writable
from model.layouts import LAYOUTS
from model.losses import presence_targets
from model.metrics import average_precision, expected_calibration_error, mean_defined, negative_log_likelihood
from model.predict import normalise, view_of
from model.wording import listing

FOLDS = 5

EPILOG = """examples:
  python -m model.calibrate runs/final.pt --data msrc21
  python -m model.calibrate runs/final.pt --data msrc21 --method platt --report-split test --out runs/final.pt

The logits are those of one view of each picture, at scale 1 and not mirrored. Without --report-split the figures come
from cross-validation: each fifth of the split, in its own order, is scored by what was fitted on the other four. What
is kept is fitted on the whole split; everything else in the checkpoint stays as it is.

Only classes that some pictures have and others have not can be fitted; the others follow the temperature.
"""


def presence_logits(
    checkpoint: Checkpoint,
    model: EncNet,
    data: SegmentationData,
    device: torch.device,
    advance: Callable[[], None] = lambda: None,
) -> tuple[Tensor, Tensor]:
    """(P, C) float64 logits of every picture's view at scale 1, and (P, C) bool, which classes are in its truth.

    The model is on `device`. Raises EvaluationError when checkpoint and data set have different numbers of classes,
    DataError for a broken file.
    """
    check_classes(checkpoint, data)
    classes = checkpoint.config.num_classes
    logits = torch.zeros(len(data), classes, dtype=torch.float64)
    present = torch.zeros(len(data), classes, dtype=torch.bool)
    with torch.inference_mode():
        for index in range(len(data)):
            image, truth = data.load(index)
            pixels = normalise(torch.from_numpy(image)[None].to(device), checkpoint.mean, checkpoint.std)
            logits[index] = model(view_of(pixels, checkpoint.base_size, 1.0)).presence_logits[0].cpu()
            present[index] = presence_targets(torch.from_numpy(truth)[None], classes)[0] > 0
            advance()
    return logits, present


def cross_validated(method: str, logits: Tensor, present: Tensor) -> numpy.ndarray:
    """(P, C) scores, each fold's calibrated by a fit on the others. Folds are runs of pictures: neighbours in a data
    set are often frames of one film, which random folds would have on both sides."""
    scores = torch.zeros_like(logits)
    for fold in torch.arange(len(logits)).tensor_split(min(FOLDS, len(logits))):
        others = torch.ones(len(logits), dtype=torch.bool).index_fill(0, fold, False)
        scores[fold] = FITS[method](logits[others], present[others]).apply(logits[fold]).sigmoid()
    return scores.numpy()


def figures(scores: numpy.ndarray, present: numpy.ndarray) -> dict[str, float]:
    """Means over the classes: expected calibration error and AP in 0..1, negative log likelihood in nats."""
    columns = list(zip(scores.T, present.T, strict=True))
    return {
        "ece": mean_defined(numpy.array([expected_calibration_error(s, p) for s, p in columns])),
        "nll": negative_log_likelihood(scores, present),
        "map": mean_defined(numpy.array([average_precision(s, p) for s, p in columns])),
    }


def comparison_table(rows: dict[str, dict[str, float]], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    for heading in ("presence", "mean ECE %", "NLL, nats", "mean AP %"):
        table.add_column(heading, justify="left" if heading == "presence" else "right")
    for name, row in rows.items():
        table.add_row(name, f"{100 * row['ece']:.2f}", f"{row['nll']:.4f}", f"{100 * row['map']:.2f}")
    return table


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(
        prog="python -m model.calibrate",
        description="Fit the calibration of presence on pictures that training has not seen, and keep it in the "
        "checkpoint.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    root.add_argument("checkpoint", type=Path, help="a checkpoint that `python -m model.evaluate` reads")
    root.add_argument("--data", type=Path, required=True, metavar="DIR", help="the data set's folder")
    held_out = [split for split in SPLITS if split != "train"]
    root.add_argument("--split", choices=held_out, default="val", help="pictures to fit on (default: %(default)s)")
    root.add_argument(
        "--method",
        choices=METHODS,
        default="temperature",
        help="one scale for all classes, or scale and bias for each (default: %(default)s)",
    )
    root.add_argument("--report-split", choices=held_out, help="figures from these pictures, not by cross-validation")
    root.add_argument(
        "--out",
        type=Path,
        metavar="FILE.pt",
        help="the file to write, which may be the checkpoint itself "
        "(default: beside the checkpoint, its name ending in .calibrated.pt)",
    )
    root.add_argument("--layout", choices=list(LAYOUTS), default="", metavar="NAME", help="as in model.evaluate")
    add_device(root)
    return root


def check_options(arguments: argparse.Namespace, source: str) -> Path:
    """The file to write. Raises EvaluationError before any work is done."""
    if arguments.report_split == arguments.split:
        raise EvaluationError(
            f"--report-split {arguments.split} is the split to fit on; name another, or none for cross-validation"
        )
    output: Path = arguments.out or arguments.checkpoint.with_suffix(".calibrated.pt")
    if not output.parent.is_dir():
        raise EvaluationError(f"--out {output}: the folder {output.parent} does not exist")
    if output.is_dir():
        raise EvaluationError(f"--out {output}: is a folder, not a file")
    if source != FORMAT and output.exists() and output.samefile(arguments.checkpoint):
        raise EvaluationError(f"--out {output}: would replace a checkpoint in {source}'s format by one in ours")
    check_writable(output.parent)
    return output


def run(arguments: argparse.Namespace, console: Console, notes: Console) -> None:
    """Fit, compare, write; `notes` takes progress and the warning."""
    device = choose_device(arguments.device)
    checkpoint = load_checkpoint(arguments.checkpoint)
    output = check_options(arguments, checkpoint.source)
    model = build_model(checkpoint).to(device)

    def collect(split: str) -> tuple[Tensor, Tensor]:
        data = open_dataset(arguments.data, split, arguments.layout)
        columns = (TextColumn(f"reading {split}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=notes) as progress:
            task = progress.add_task("", total=len(data))
            return presence_logits(checkpoint, model, data, device, lambda: progress.advance(task))

    logits, present = collect(arguments.split)
    known = varying(present)
    if not known.any():
        raise EvaluationError(
            f"the {arguments.split} split cannot tell how sure presence may be: each class is in all of its "
            f"{len(logits)} pictures or in none; a split whose pictures differ is needed"
        )
    if not known.all():
        names = listing([name for name, fits in zip(checkpoint.classes, known.tolist(), strict=True) if not fits], 8)
        text = f"note: in all pictures of {arguments.split} or in none, and left to the temperature: {names}"
        notes.print(text, markup=False, soft_wrap=True)
    fits = {method: FITS[method](logits, present) for method in METHODS}
    if arguments.report_split:
        judged, truth = collect(arguments.report_split)
        scores = {method: fit.apply(judged).sigmoid().numpy() for method, fit in fits.items()}
        title = f"fitted on {arguments.split}, figures of {arguments.report_split}"
    else:
        judged, truth = logits, present
        scores = {method: cross_validated(method, logits, present) for method in METHODS}
        title = f"figures of {arguments.split}, by cross-validation"
    rows = {
        name: figures(values, truth.numpy())
        for name, values in {"as trained": judged.sigmoid().numpy(), **scores}.items()
    }
    console.print(comparison_table(rows, f"{title}: {len(judged)} pictures"))

    before, after = rows["as trained"], rows[arguments.method]
    worse = [name for name, key in (("ECE", "ece"), ("NLL", "nll")) if after[key] > before[key]]
    if worse:
        notes.print(
            f"warning: {arguments.method} made presence worse ({' and '.join(worse)}); "
            "another method, or none, serves better",
            soft_wrap=True,
        )
    save_checkpoint(output, dataclasses.replace(checkpoint, calibration=fits[arguments.method]))
    note = f"written: {output}, {arguments.method} fitted on {len(logits)} pictures"
    console.print(note, markup=False, soft_wrap=True)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status; see `finish`."""
    arguments = parser().parse_args(argv)
    work = partial(run, arguments, Console(), Console(stderr=True))
    return finish(work, EvaluationError, DeviceError, CheckpointError, DataError)


if __name__ == "__main__":
    sys.exit(main())
