"""Score a checkpoint on a data set: `python -m model.evaluate CHECKPOINT --data DIR`."""

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from model.arguments import DeviceError, add_device, at_least_one, choose_device, scales
from model.checkpoint import FORMAT, Checkpoint, CheckpointError, build_model, library_versions, load_checkpoint
from model.data import SPLITS, DataError, SegmentationData, leave_out, open_dataset
from model.encnet import EncNet
from model.figures import Sample, contact_sheet
from model.files import replacing
from model.foreign import listing
from model.layouts import LAYOUTS
from model.losses import presence_targets
from model.metrics import (
    BINS,
    average_precision,
    class_accuracy,
    confusion,
    expected_calibration_error,
    f1,
    intersection_over_union,
    mean_defined,
    mean_iou,
    mean_iou_authors,
    pixel_accuracy,
)
from model.predict import predict
from model.windows import MERGES, predict_windows

PRESENCE_THRESHOLD = 0.5
SHEET_PICTURES = 8
LEAST_SIDE = 8  # pixels, of views and windows
WAITING_BATCHES = 4  # most batches of pictures that wait for others of their size

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


class EvaluationError(ValueError):
    """Options that do not fit each other, the checkpoint or the data; the message says which."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is computed; base_size and crop in pixels, limit in pictures (0: all of the split), without: their IDs.

    protocol: "whole" or "windows"; merge: one of MERGES; crop: side of a window, not used by "whole";
    batch: most pictures of one size to run together, under the protocol "whole"; precision: "fp32" or "bf16".
    """

    split: str
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    protocol: str = "whole"
    merge: str = "softmax"
    crop: int = 480
    base_size: int
    limit: int = 0
    without: tuple[str, ...] = ()
    batch: int = 1
    precision: str = "fp32"


@dataclass(frozen=True)
class Evaluation:
    """counts: (C, C) confusion; scores: (P, C) presence in 0..1; present: (P, C) bool, its truth; seconds elapsed."""

    counts: numpy.ndarray
    scores: numpy.ndarray
    present: numpy.ndarray
    samples: list[Sample]
    seconds: float


def check_classes(checkpoint: Checkpoint, data: SegmentationData) -> None:
    """Raise EvaluationError when checkpoint and data set have different numbers of classes."""
    classes = checkpoint.config.num_classes
    if classes != len(data.classes):
        raise EvaluationError(f"the checkpoint has {classes} classes, the data set {len(data.classes)}")


def evaluate(
    checkpoint: Checkpoint,
    model: EncNet,
    data: SegmentationData,
    options: Options,
    device: torch.device,
    advance: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Run the model, which is on `device`, over the split; `advance` is called after each picture.

    Raises EvaluationError when checkpoint and data set have different numbers of classes, DataError for a broken file.
    """
    check_classes(checkpoint, data)
    classes = checkpoint.config.num_classes
    pictures = min(options.limit or len(data), len(data))
    shown = set(numpy.linspace(0, pictures - 1, min(SHEET_PICTURES, pictures)).round().astype(int).tolist())
    counts = numpy.zeros((classes, classes), dtype=numpy.int64)
    scores = numpy.zeros((pictures, classes))
    present = numpy.zeros((pictures, classes), dtype=bool)
    samples: dict[int, Sample] = {}
    start = time.perf_counter()
    for batch in _batches(data, pictures, options.batch if options.protocol == "whole" else 1):
        indexes, images, truths = zip(*batch, strict=True)
        targets = torch.from_numpy(numpy.stack(truths)).to(device)
        views = torch.from_numpy(numpy.stack(images)).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16"):
            label_scores, presence = _predict(checkpoint, model, views, options)
        masks = label_scores.argmax(1)
        counts += confusion(masks, targets, classes)
        rows = list(indexes)
        scores[rows] = presence.float().cpu().numpy()
        present[rows] = presence_targets(targets, classes).cpu().numpy() > 0
        for mask, (index, image, truth) in zip(masks, batch, strict=True):
            if index in shown:
                labels = mask.cpu().numpy().astype(numpy.uint8)
                samples[index] = Sample(data.ids[index], image, truth, labels, scores[index], present[index])
            advance()
    ordered = [samples[index] for index in sorted(samples)]
    return Evaluation(counts, scores, present, ordered, time.perf_counter() - start)


def _batches(
    data: SegmentationData, pictures: int, batch: int
) -> Iterator[list[tuple[int, numpy.ndarray, numpy.ndarray]]]:
    """Index, picture and labels of pictures of one size, at most `batch` at a time.

    At most WAITING_BATCHES * batch pictures are held back; the largest group goes first.
    """
    waiting: dict[tuple[int, ...], list[tuple[int, numpy.ndarray, numpy.ndarray]]] = {}
    for index in range(pictures):
        image, truth = data.load(index)
        same = waiting.setdefault(truth.shape, [])
        same.append((index, image, truth))
        if len(same) == batch:
            yield waiting.pop(truth.shape)
        elif sum(map(len, waiting.values())) > WAITING_BATCHES * batch:
            yield waiting.pop(max(waiting, key=lambda shape: len(waiting[shape])))
    yield from waiting.values()


def _predict(
    checkpoint: Checkpoint, model: EncNet, image: torch.Tensor, options: Options
) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, C, H, W) scores and (N, C) presence of pictures (N, H, W, 3)."""
    views: dict[str, Any] = {
        "mean": checkpoint.mean,
        "std": checkpoint.std,
        "base_size": options.base_size,
        "scales": options.scales,
        "flip": options.flip,
        "calibration": checkpoint.calibration,
    }
    if options.protocol == "windows":
        return predict_windows(model, image, crop=options.crop, merge=options.merge, **views)
    return predict(model, image, **views)


def totals(evaluation: Evaluation) -> dict[str, float | int]:
    """Figures over all classes, rates in 0..1. Means leave out the classes for which a figure is not defined."""
    presence_ap, presence_f1, presence_ece = _presence_figures(evaluation)
    pictures = len(evaluation.scores)
    return {
        "miou": mean_iou(evaluation.counts),
        "miou_authors": mean_iou_authors(evaluation.counts),
        "pixel_accuracy": pixel_accuracy(evaluation.counts),
        "class_accuracy": mean_defined(class_accuracy(evaluation.counts)),
        "presence_map": mean_defined(presence_ap),
        "presence_macro_f1": mean_defined(presence_f1),
        "presence_ece": mean_defined(presence_ece),
        "pictures": pictures,
        "seconds": round(evaluation.seconds, 3),
        "pictures_per_second": round(pictures / evaluation.seconds, 3),
    }


def class_rows(evaluation: Evaluation, names: Sequence[str]) -> list[dict[str, Any]]:
    """Figures per class, rates in 0..1; None where one is not defined (see model/metrics.py)."""
    presence_ap, presence_f1, presence_ece = _presence_figures(evaluation)
    iou, accuracy = intersection_over_union(evaluation.counts), class_accuracy(evaluation.counts)
    return [
        {
            "name": name,
            "iou": _defined(iou[index]),
            "accuracy": _defined(accuracy[index]),
            "presence_ap": _defined(presence_ap[index]),
            "presence_f1": _defined(presence_f1[index]),
            "presence_ece": float(presence_ece[index]),
            "pictures": int(evaluation.present[:, index].sum()),
            "pixels": int(evaluation.counts[index].sum()),
        }
        for index, name in enumerate(names)
    ]


def _presence_figures(evaluation: Evaluation) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
    """Average precision, F1 and expected calibration error of every class, each (C,)."""
    columns = list(zip(evaluation.scores.T, evaluation.present.T, strict=True))
    return (
        numpy.array([average_precision(scores, present) for scores, present in columns]),
        numpy.array([f1(scores, present, PRESENCE_THRESHOLD) for scores, present in columns]),
        numpy.array([expected_calibration_error(scores, present) for scores, present in columns]),
    )


def _defined(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


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
        description="Score a checkpoint on a data set: mIoU, pixel accuracy, and per class IoU, accuracy, average "
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
    root.add_argument("--crop", type=_pixels, metavar="N", help=f"side of a window in pixels (default: {Options.crop})")
    root.add_argument(
        "--base-size",
        type=_pixels,
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


def _pixels(text: str) -> int:
    if not text.isdecimal() or int(text) < LEAST_SIDE:
        raise argparse.ArgumentTypeError(f"expected a whole number of pixels, at least {LEAST_SIDE}, got {text!r}")
    return int(text)


def print_differing_names(checkpoint: Checkpoint, names: Sequence[str], notes: Console) -> None:
    """Say where a checkpoint of this project and a data set with as many classes name them differently."""
    if checkpoint.source == FORMAT and len(checkpoint.classes) == len(names):
        pairs = zip(checkpoint.classes, names, strict=True)
        differing = [f"{ours} / {theirs}" for ours, theirs in pairs if ours != theirs]
        if differing:
            text = f"note: the checkpoint and the data set name classes differently: {listing(differing, 8)}"
            notes.print(text, markup=False, emoji=False, soft_wrap=True)


def run(arguments: argparse.Namespace, console: Console, notes: Console) -> None:
    """Load, evaluate, write the two files, print the tables; `notes` takes progress and remarks."""
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
    model = build_model(checkpoint).to(device)
    columns = (TextColumn("evaluating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=notes) as progress:
        task = progress.add_task("", total=min(options.limit or len(data), len(data)))
        evaluation = evaluate(checkpoint, model, data, options, device, lambda: progress.advance(task))

    document = report(checkpoint, arguments.checkpoint, data, options, device, evaluation)
    with replacing(output / "evaluation.json") as file:
        file.write(json.dumps(document, indent=1, allow_nan=False).encode() + b"\n")
    figures = document["totals"]
    views = f"{options.protocol}, {options.merge}, scales {', '.join(f'{scale:g}' for scale in options.scales)}"
    sheet = contact_sheet(
        evaluation.samples,
        data.classes,
        data.palette,
        f"{checkpoint.name} on {document['data']['folder']}, {options.split} split",
        f"mIoU {100 * figures['miou']:.1f} %, pixel accuracy {100 * figures['pixel_accuracy']:.1f} %, presence mAP "
        f"{100 * figures['presence_map']:.1f} % over {figures['pictures']} pictures ({views}"
        f"{', mirrored' if options.flip else ''})",
    )
    with replacing(output / "contact_sheet.png") as file:
        sheet.save(file, "PNG")
    from model.reliability import reliability_diagram  # matplotlib, which training does not need

    diagram = reliability_diagram(
        evaluation.scores,
        evaluation.present,
        data.classes,
        f"Presence of {checkpoint.name} on {document['data']['folder']}, {options.split} split: "
        f"mean ECE {100 * figures['presence_ece']:.1f} %",
    )
    with replacing(output / "reliability.png") as file:
        diagram.savefig(file, format="png")
    for table in tables(document):
        console.print(table)
    names = ("evaluation.json", "contact_sheet.png", "reliability.png")
    console.print(f"written: {', '.join(str(output / name) for name in names)}", markup=False, soft_wrap=True)


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 2 after a sentence on standard error for a mistake in options, checkpoint or data."""
    arguments = parser().parse_args(argv)
    try:
        run(arguments, Console(), Console(stderr=True))
    except (EvaluationError, DeviceError, CheckpointError, DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
