"""Score a checkpoint on a data set: `python -m model.evaluate CHECKPOINT --data DIR`."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from model.arguments import DeviceError, add_device, at_least_one, choose_device, pixels, scales
from model.checkpoint import FORMAT, Checkpoint, CheckpointError, build_model, library_versions, load_checkpoint
from model.command import finish
from model.data import SPLITS, DataError, SegmentationData, leave_out, open_dataset
from model.evaluation import Evaluation, EvaluationError, Options, check_classes, class_rows, evaluate, totals
from model.figures import contact_sheet
from model.files import check_writable, replacing
from model.layouts import LAYOUTS
from model.metrics import BINS, PRESENCE_THRESHOLD
from model.windows import MERGES
from model.wording import listing

EPILOG = """examples:
  one view of every test picture
    python -m model.evaluate runs/final.pt --data camvid

  six scales and their mirror images, whole pictures (what the exported file and the service compute)
    python -m model.evaluate runs/final.pt --data camvid --scales 0.5,0.75,1,1.25,1.5,1.75 --flip

  the protocol behind the authors' published numbers, on their own checkpoint
    python -m model.evaluate encnet_resnet50s_ade.pth --data ade20k --split val --protocol windows --merge exp_sum \\
        --scales 0.5,0.75,1,1.25,1.5,1.75 --flip --base-size 520 --crop 480

files: OUTPUT/evaluation.json has every figure, the options, versions and the checkpoint's SHA-256;
OUTPUT/contact_sheet.png shows pictures, truth, prediction and presence, OUTPUT/reliability.png how often a class is
there when its score says so.
"""


def report(
    checkpoint: Checkpoint,
    checkpoint_path: Path,
    data: SegmentationData,
    options: Options,
    device: torch.device,
    evaluation: Evaluation,
) -> dict[str, Any]:
    """The content of evaluation.json."""
    return {
        "checkpoint": {
            "file": checkpoint_path.name,
            "sha256": checkpoint.sha256,
            "name": checkpoint.name,
            "source": checkpoint.source,
            "step": checkpoint.step,
            "config": checkpoint.config.to_dict(),
            "calibration": checkpoint.calibration.to_dict() if checkpoint.calibration else None,
        },
        "data": {"folder": data.root.resolve().name, "layout": data.layout, "pictures_in_split": len(data)},
        "options": {**dataclasses.asdict(options), "device": str(device), "presence_threshold": PRESENCE_THRESHOLD},
        "versions": library_versions(),
        "totals": totals(evaluation),
        "classes": class_rows(evaluation, data.classes),
        "confusion": evaluation.counts.tolist(),
    }


def tables(document: dict[str, Any]) -> tuple[Table, Table]:
    """The report's rows per class, and its totals; rates in per cent."""
    per_class = Table(
        caption="– not defined: no picture has the class. AP is 100 for a class that every picture has.",
        caption_justify="left",
    )
    for heading in ("class", "IoU %", "accuracy %", "presence AP %", "F1 %", "ECE %", "pictures"):
        per_class.add_column(heading, justify="left" if heading == "class" else "right")
    for row in document["classes"]:
        rates = [row[key] for key in ("iou", "accuracy", "presence_ap", "presence_f1", "presence_ece")]
        cells = ["–" if rate is None else f"{100 * rate:.1f}" for rate in rates]
        per_class.add_row(Text(row["name"]), *cells, str(row["pictures"]))

    figures = document["totals"]
    overall = Table(show_header=False)
    overall.add_column()
    overall.add_column(justify="right")
    for label, key in (
        ("mIoU % (classes that occur)", "miou"),
        ("mIoU % (authors' rule: an absent class counts 0)", "miou_authors"),
        ("pixel accuracy %", "pixel_accuracy"),
        ("mean class accuracy %", "class_accuracy"),
        ("presence mean AP %", "presence_map"),
        (f"presence macro F1 % (threshold {PRESENCE_THRESHOLD})", "presence_macro_f1"),
        (f"presence mean ECE % ({BINS} bins)", "presence_ece"),
    ):
        overall.add_row(label, f"{100 * figures[key]:.2f}")
    overall.add_row("pictures", str(figures["pictures"]))
    overall.add_row("pictures per second, reading included", f"{figures['pictures_per_second']:.2f}")
    return per_class, overall


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(
        prog="python -m model.evaluate",
        description="Score a checkpoint on a data set: mIoU, pixel accuracy, and per class IoU, accuracy, average\n"
        "precision, F1 and expected calibration error of presence.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    root.add_argument(
        "checkpoint", type=Path, help="a checkpoint of this project, of PyTorch-Encoding or of mmsegmentation"
    )
    root.add_argument("--data", type=Path, required=True, metavar="DIR", help="the data set's folder")
    root.add_argument("--split", choices=SPLITS, default="test", help="default: %(default)s")
    root.add_argument(
        "--layout",
        choices=list(LAYOUTS),
        default="",
        metavar="NAME",
        help=f"how the data set lies on disk: {', '.join(LAYOUTS)} (default: recognised)",
    )
    root.add_argument(
        "--without",
        type=_identifiers,
        default=(),
        metavar="ID,ID,...",
        help="pictures to leave out, such as those that --check-data of model.train finds in the train split too",
    )
    root.add_argument(
        "--scales",
        type=scales,
        default=(1.0,),
        metavar="S,S,...",
        help="sizes of the views relative to the base size, comma-separated (default: 1.0)",
    )
    root.add_argument("--flip", action="store_true", help="add every view's mirror image")
    root.add_argument(
        "--protocol",
        choices=("whole", "windows"),
        default="whole",
        help="whole pictures, or windows of --crop pixels that overlap by a third (default: %(default)s)",
    )
    root.add_argument(
        "--merge",
        choices=MERGES,
        default="softmax",
        help="how views and windows become one answer: the mean of their probabilities, or, with --protocol windows, "
        "the authors' sum of exp(logits + mirrored logits) (default: %(default)s)",
    )
    root.add_argument("--crop", type=pixels, metavar="N", help=f"side of a window in pixels (default: {Options.crop})")
    root.add_argument(
        "--base-size",
        type=pixels,
        metavar="N",
        help="long side of a picture at scale 1, in pixels (default: the checkpoint's)",
    )
    root.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="where evaluation.json and the two figures go "
        "(default: beside the checkpoint, its name ending in .evaluation)",
    )
    add_device(root)
    root.add_argument(
        "--batch",
        type=at_least_one,
        default=1,
        metavar="N",
        help="most pictures of one size to run together with --protocol whole (default: %(default)s)",
    )
    root.add_argument(
        "--precision",
        choices=("fp32", "bf16"),
        default="fp32",
        help="of the network's arithmetic (default: %(default)s)",
    )
    root.add_argument(
        "--limit", type=at_least_one, default=0, metavar="N", help="score only the first N pictures (default: all)"
    )
    return root


def _identifiers(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def print_differing_names(checkpoint: Checkpoint, names: Sequence[str], notes: Console) -> None:
    """Say where a checkpoint of this project and a data set with as many classes name them differently."""
    if checkpoint.source == FORMAT and len(checkpoint.classes) == len(names):
        pairs = zip(checkpoint.classes, names, strict=True)
        differing = [f"{ours} / {theirs}" for ours, theirs in pairs if ours != theirs]
        if differing:
            text = f"note: the checkpoint and the data set name classes differently: {listing(differing, 8)}"
            notes.print(text, markup=False, emoji=False, soft_wrap=True)


def write_files(
    output: Path, document: dict[str, Any], data: SegmentationData, options: Options, evaluation: Evaluation
) -> list[Path]:
    """The report as evaluation.json, the contact sheet and the reliability diagram, in a folder; their paths."""
    written = [output / name for name in ("evaluation.json", "contact_sheet.png", "reliability.png")]
    name, figures = document["checkpoint"]["name"], document["totals"]
    place = f"{document['data']['folder']}, {options.split} split"
    with replacing(written[0]) as file:
        file.write(json.dumps(document, indent=1, allow_nan=False).encode() + b"\n")
    views = f"{options.protocol}, {options.merge}, scales {', '.join(f'{scale:g}' for scale in options.scales)}"
    sheet = contact_sheet(
        evaluation.samples,
        data.classes,
        data.palette,
        f"{name} on {place}",
        f"mIoU {100 * figures['miou']:.1f} %, pixel accuracy {100 * figures['pixel_accuracy']:.1f} %, presence mAP "
        f"{100 * figures['presence_map']:.1f} % over {figures['pictures']} pictures ({views}"
        f"{', mirrored' if options.flip else ''})",
    )
    with replacing(written[1]) as file:
        sheet.save(file, "PNG")
    from model.reliability import reliability_diagram  # matplotlib, which training does not need

    diagram = reliability_diagram(
        evaluation.scores,
        evaluation.present,
        data.classes,
        f"Presence of {name} on {place}: mean ECE {100 * figures['presence_ece']:.1f} %",
    )
    with replacing(written[2]) as file:
        diagram.savefig(file, format="png")
    return written


def run(arguments: argparse.Namespace, console: Console, notes: Console) -> None:
    """Load, evaluate, write the three files, print the tables; `notes` takes progress and remarks.

    Raises EvaluationError, DeviceError, CheckpointError, DataError and OSError.
    """
    if arguments.protocol == "whole" and (arguments.merge != "softmax" or arguments.crop is not None):
        raise EvaluationError("--merge exp_sum and --crop need --protocol windows")
    device = choose_device(arguments.device)
    checkpoint = load_checkpoint(arguments.checkpoint)
    data = leave_out(open_dataset(arguments.data, arguments.split, arguments.layout), arguments.without)
    print_differing_names(checkpoint, data.classes, notes)
    options = Options(
        split=arguments.split,
        scales=arguments.scales,
        flip=arguments.flip,
        protocol=arguments.protocol,
        merge=arguments.merge,
        crop=arguments.crop or Options.crop,
        base_size=arguments.base_size or checkpoint.base_size,
        limit=arguments.limit,
        without=arguments.without,
        batch=arguments.batch,
        precision=arguments.precision,
    )
    output = arguments.output or arguments.checkpoint.with_suffix(".evaluation")
    check_classes(checkpoint, data)
    if output.exists() and not output.is_dir():
        raise EvaluationError(f"--output {output}: is a file, not a folder")
    output.mkdir(parents=True, exist_ok=True)
    check_writable(output)
    model = build_model(checkpoint).to(device)
    columns = (TextColumn("evaluating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=notes) as progress:
        task = progress.add_task("", total=min(options.limit or len(data), len(data)))
        evaluation = evaluate(checkpoint, model, data, options, device, lambda: progress.advance(task))

    document = report(checkpoint, arguments.checkpoint, data, options, device, evaluation)
    written = write_files(output, document, data, options, evaluation)
    for table in tables(document):
        console.print(table)
    console.print(f"written: {', '.join(map(str, written))}", markup=False, soft_wrap=True)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status; see `finish`."""
    arguments = parser().parse_args(argv)
    work = partial(run, arguments, Console(), Console(stderr=True))
    return finish(work, EvaluationError, DeviceError, CheckpointError, DataError)


if __name__ == "__main__":
    sys.exit(main())
