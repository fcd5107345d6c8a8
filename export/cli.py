"""`python -m export`: a checkpoint becomes one ONNX file, which is compared with PyTorch before it gets its name."""

import argparse
import dataclasses
import io
import math
import signal
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import BinaryIO

import onnx
from google.protobuf.message import DecodeError
from onnx.checker import ValidationError
from rich.console import Console
from rich.table import Table

from export import parity, triton
from export.compact import store_weights_in_half
from export.core import core_model
from export.errors import ExportError, ParityError
from export.metadata import describe, properties
from export.whole import whole_model
from model.arguments import pixels, scales
from model.checkpoint import FORMAT, Checkpoint, CheckpointError, build_model, load_checkpoint
from model.command import finish
from model.data import DataError, read_classes
from model.files import check_writable, replacing
from model.foreign import unnamed
from model.wording import first_line, is_text

EPILOG = """the file
  The whole graph (default) takes image uint8 (N, H, W, 3) RGB, scales float32 (S,) and flip bool (), and answers mask
  uint8 (N, H, W), presence float32 (N, C) and probabilities float32 (N, C, H, W): resizing, mirroring, the network
  and the merging of the views are inside. The network alone (--core) takes image float32 (N, 3, H, W), normalised,
  and answers logits float32 (N, C, H, W) and presence_logits float32 (N, C). A stock ONNX Runtime runs both.

examples:
  python -m export runs/final.pt --output street.onnx
  python -m export runs/final.pt --output street-half.onnx --fp16
  python -m export encnet_resnet50s_ade.pth --output ade.onnx --reference-positions 3600 \\
      --classes model/layouts/classes/ade20k.json
  python -m export runs/final.pt --output street.onnx --scales 0.5,0.75,1,1.25 --flip
  python -m export street.onnx --triton-repository models

The exit code is 0 when the file is written, 1 when ONNX Runtime and PyTorch disagree, or the graph for Triton and the
whole graph, 2 for input that cannot be exported, 130 when it is stopped. In these cases no file is left behind that did
not pass the comparison, and one that was there before stays as it was.
"""


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(
        prog="python -m export",
        description="Turn a checkpoint into one self-contained ONNX file, and compare ONNX Runtime with PyTorch on it.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    root.add_argument(
        "checkpoint",
        type=Path,
        help="a checkpoint of this project, of PyTorch-Encoding or of mmsegmentation; "
        "for --triton-repository also an .onnx file that this command wrote",
    )
    root.add_argument("-o", "--output", type=Path, metavar="FILE.onnx", help="the file to write")
    root.add_argument("--core", action="store_true", help="the network alone, without resizing and merging of views")
    precision = root.add_mutually_exclusive_group()
    precision.add_argument("--fp16", action="store_true", help="convolutions in float16: a file of half the size")
    precision.add_argument(
        "--compact",
        action="store_true",
        help="weights stored in float16, arithmetic in float32: a file of half the size, as fast as without on a CPU",
    )
    carried = root.add_argument_group("what the file says about itself (default: what the checkpoint says)")
    carried.add_argument("--name", help="the model's name")
    carried.add_argument("--classes", type=Path, metavar="classes.json", help="class names and colours from this file")
    carried.add_argument("--base-size", type=pixels, metavar="N", help="long side of a picture at scale 1, in pixels")
    carried.add_argument(
        "--scales",
        type=scales,
        metavar="S,S,...",
        help="default scales of the views, relative to the base size",
    )
    carried.add_argument(
        "--flip", action=argparse.BooleanOptionalAction, help="whether views are mirrored as well by default"
    )
    carried.add_argument(
        "--reference-positions",
        type=_positions,
        metavar="N",
        help="scale the scene encoding as if every picture had N feature positions, those of a training crop "
        "(480x480 pixels at stride 8: 3600); 0 for the plain sum",
    )
    carried.add_argument(
        "--align-corners",
        action=argparse.BooleanOptionalAction,
        help="whether the resizes of a published network map corner to corner, where its file does not tell "
        "(mmsegmentation's 769x769 ones do)",
    )
    repository = root.add_argument_group("for Triton, instead of --output or beside it")
    repository.add_argument(
        "--triton-repository",
        type=Path,
        metavar="DIR",
        help="put the model into this repository; where it has one of that name already, as its next version",
    )
    repository.add_argument(
        "--triton-mount",
        metavar="PATH",
        help="where Triton finds DIR, as in /models: then the compiled Encoding kernel goes along, named in the "
        "configuration by its full path; without, the same is computed by the body in the file",
    )
    return root


def _positions(text: str) -> float:
    try:
        positions = float(text)
    except ValueError:
        positions = -1
    if not 0 <= positions < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of positions, 0 or more, got {text!r}")
    return positions


def check_output(path: Path) -> None:
    """Raise ExportError, or OSError, for a place where no .onnx file can be written, before any work is done."""
    if path.suffix != ".onnx":
        raise ExportError(f"--output {path}: the name must end in .onnx")
    if path.is_dir():
        raise ExportError(f"--output {path}: is a folder, not a file")
    if not path.parent.is_dir():
        raise ExportError(f"--output {path}: the folder {path.parent} does not exist")
    check_writable(path.parent)


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raise ExportError for options that do not go together, and as `check_output` does."""
    if arguments.output is None and arguments.triton_repository is None:
        raise ExportError("nothing to write: name a file with --output, or a repository with --triton-repository")
    if arguments.output is not None:
        check_output(arguments.output)
    if arguments.triton_repository is None:
        if arguments.triton_mount is not None:
            raise ExportError("--triton-mount says where Triton finds the folder of --triton-repository; name that too")
        return
    triton.check_repository(arguments.triton_repository)
    if arguments.core:
        raise ExportError("a repository is made from the whole graph; leave out --core or --triton-repository")
    if arguments.triton_mount is not None and not arguments.triton_mount.startswith("/"):
        raise ExportError(f"--triton-mount {arguments.triton_mount}: Triton needs a full path, as in /models")


def with_options(checkpoint: Checkpoint, arguments: argparse.Namespace) -> Checkpoint:
    """The checkpoint with what the command line says differently.

    Raises ExportError when the number of class names does not fit, the model's name, which may be that of a file, is
    no text, the resize rule is not the one this project trained with, or --reference-positions would say something of
    an Encoding layer that an FCN has not; DataError for an unreadable classes file.
    """
    changes = {
        key: value for key in ("name", "base_size", "scales", "flip") if (value := getattr(arguments, key)) is not None
    }
    trained, aligned = checkpoint.config.align_corners, arguments.align_corners
    if checkpoint.source == FORMAT and aligned not in (None, trained):
        raise ExportError(
            f"{arguments.checkpoint}: was trained with align_corners={trained}, as it says itself; leave out "
            f"--{'' if aligned else 'no-'}align-corners, which is for published weights whose files do not tell"
        )
    if arguments.reference_positions is not None and not checkpoint.config.encoding:
        raise ExportError(
            f"{arguments.checkpoint}: is an FCN, without an Encoding layer; leave out --reference-positions"
        )
    config = {
        key: value for key in ("reference_positions", "align_corners") if (value := getattr(arguments, key)) is not None
    }
    changes["config"] = dataclasses.replace(checkpoint.config, **config)
    if arguments.classes is not None:
        changes["classes"], changes["palette"] = read_classes(arguments.classes)
        count, expected = len(changes["classes"]), checkpoint.config.num_classes
        if count != expected:
            raise ExportError(f"{arguments.classes}: names {count} classes, the checkpoint has {expected}")
    changed = dataclasses.replace(checkpoint, **changes)
    if not is_text(changed.name):
        raise ExportError(f"the model's name {changed.name!a} is no text in UTF-8; choose one with --name")
    return changed


def unsaid(checkpoint: Checkpoint, arguments: argparse.Namespace) -> list[str]:
    """A sentence on each thing that published weights leave open, and the command line too."""
    if checkpoint.source == FORMAT:
        return []
    notes = []
    if checkpoint.assumed and arguments.align_corners is None:
        other = "--no-align-corners" if checkpoint.config.align_corners else "--align-corners"
        notes.append(f"{checkpoint.assumed}; if not so, give {other}")
    if arguments.base_size is None:
        notes.append(
            f"a picture's long side has {checkpoint.base_size} pixels at scale 1, as is usual with {checkpoint.source};"
            " for a network trained on larger pictures, as of Cityscapes, give --base-size"
        )
    if arguments.classes is None and checkpoint.classes == unnamed(checkpoint.config.num_classes):
        notes.append("the file has no names for just these classes, which become class 0, class 1, ..; give --classes")
    return notes


FROM_A_CHECKPOINT = (
    "output",
    "fp16",
    "compact",
    "classes",
    "base_size",
    "scales",
    "flip",
    "reference_positions",
    "align_corners",
)


def read_exported(arguments: argparse.Namespace) -> onnx.ModelProto:
    """The .onnx file that stands in the place of a checkpoint.

    Raises ExportError for options that only a checkpoint has, and for a file that is no ONNX model or lacks weights.
    """
    source = arguments.checkpoint
    left_out = parser().parse_args([str(source)])
    given = [name for name in FROM_A_CHECKPOINT if getattr(arguments, name) != getattr(left_out, name)]
    if given:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ExportError(f"{source} is exported already: {options} can only be had from its checkpoint")
    try:
        return onnx.load(source)
    except DecodeError as error:
        raise ExportError(f"{source}: is no ONNX file") from error
    except (ValidationError, ValueError) as error:  # of weights in a file beside it
        raise ExportError(f"{source}: its weights cannot be read: {first_line(error)}") from error


def run(arguments: argparse.Namespace, console: Console, notes: Console) -> None:
    """Export what is asked for; `notes` takes progress."""
    check_arguments(arguments)
    if arguments.checkpoint.suffix == ".onnx":
        whole = read_exported(arguments)
        name = arguments.name
    else:
        whole = export_checkpoint(arguments, console, notes)
        name = None
    if arguments.triton_repository is None:
        return
    with notes.status("comparing the graph for Triton with the whole graph"):
        written = triton.write(
            whole, arguments.checkpoint, arguments.triton_repository, name=name, mount=arguments.triton_mount
        )
    said = "written" if written.new else "there already, the same graph"
    kept = "; config.pbtxt is kept as it was" if written.config_kept else ""
    console.print(f"{written.version}: {said}{kept}", markup=False, soft_wrap=True)
    if written.to_add:
        console.print(
            f"to use the compiled kernel, add to config.pbtxt: {written.to_add}", markup=False, soft_wrap=True
        )
    if written.instances:
        console.print(
            f"to use the compiled kernel, replace instance_group in config.pbtxt: {written.instances}",
            markup=False,
            soft_wrap=True,
        )


def export_checkpoint(arguments: argparse.Namespace, console: Console, notes: Console) -> onnx.ModelProto:
    """Translate the checkpoint, compare, and only then give the file its name, if there is to be one."""
    with notes.status("reading the checkpoint") as status:
        checkpoint = with_options(load_checkpoint(arguments.checkpoint), arguments)
        for note in unsaid(checkpoint, arguments):
            notes.print(f"note: {note}", markup=False, soft_wrap=True)
        network = build_model(checkpoint)
        if arguments.triton_repository is not None:
            triton.check_model(
                arguments.triton_repository, checkpoint.name, checkpoint.classes, mount=arguments.triton_mount
            )

        status.update(f"translating {checkpoint.config.backbone} to ONNX")
        core = core_model(network, fp16=arguments.fp16)
        if arguments.compact:
            store_weights_in_half(core.graph)
        describe(core, properties(checkpoint, whole=False, fp16=arguments.fp16))
        model = core
        if not arguments.core:
            model = whole_model(
                core,
                mean=checkpoint.mean,
                std=checkpoint.std,
                base_size=checkpoint.base_size,
                align_corners=checkpoint.config.align_corners,
                calibration=checkpoint.calibration,
            )
            describe(model, properties(checkpoint, whole=True, fp16=arguments.fp16))
        try:
            onnx.checker.check_model(model)
        except ValidationError as error:
            raise ExportError(f"the exported graph is not valid ONNX: {first_line(error)}") from error

        status.update("comparing ONNX Runtime with PyTorch")
        tolerance = parity.FLOAT16 if arguments.fp16 or arguments.compact else parity.FLOAT32
        data = model.SerializeToString()
        target: AbstractContextManager[BinaryIO] = (
            replacing(arguments.output) if arguments.output else nullcontext(io.BytesIO())
        )
        with target as file:
            file.write(data)
            file.flush()
            comparisons = parity.compare_core(core.SerializeToString(), network, checkpoint, tolerance)
            if not arguments.core:
                comparisons += parity.compare_whole(data, network, checkpoint, tolerance)
            console.print(table(comparisons))
            parity.check(comparisons)
    worst = max(error for comparison in comparisons for error in comparison.errors.values())
    equal = min(comparison.equal_labels for comparison in comparisons)
    console.print(
        f"{arguments.output or arguments.checkpoint}: {len(data) / 1e6:.1f} MB, largest error {worst:.2g}, "
        f"at least {equal:.3%} equal labels",
        markup=False,
        soft_wrap=True,
    )
    return model


def table(comparisons: Sequence[parity.Comparison]) -> Table:
    """One row per comparison: the largest error of each output beside what is allowed."""
    result = Table(title="ONNX Runtime and PyTorch")
    for column in ("graph", "pictures", "largest error (allowed)", "equal labels", ""):
        result.add_column(column, justify="right" if column == "equal labels" else "left")
    for comparison in comparisons:
        errors = "\n".join(
            f"{name} {error:.2g} ({comparison.allowed[name]:.2g})" for name, error in comparison.errors.items()
        )
        result.add_row(
            comparison.graph,
            str(comparison.case),
            errors,
            f"{comparison.equal_labels:.3%}",
            "ok" if comparison.agrees else "differs",
        )
    return result


def work(arguments: argparse.Namespace) -> int:
    """Export; 1, after a sentence on standard error, where the graphs disagree, else 0. Raises as `run` does."""
    try:
        run(arguments, Console(), Console(stderr=True))
    except ParityError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status; see `finish` and `work`."""
    arguments = parser().parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # the path of a file may be no text in UTF-8
    return finish(partial(work, arguments), ExportError, CheckpointError, DataError)
