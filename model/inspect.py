"""What the Context Encoding Module sees in a picture, as one figure: `python -m model.inspect CHECKPOINT PICTURE`."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from matplotlib.figure import Figure, SubFigure
from torch import Tensor

from model.checkpoint import Checkpoint, CheckpointError, build_model, load_checkpoint
from model.command import finish
from model.encnet import EncHead, EncNet, raise_channels
from model.encoding import assignments
from model.figures import BAR, FAINT, INK, TRACK, colourise
from model.files import replacing
from model.layouts.split import DataError, read_image, to_rgb, upright
from model.predict import normalise, predict, view_of
from model.resnet import Stages

MOST_CODES, CODE_COLUMNS = 32, 8
MOST_CLASSES, MOST_CHANNELS = 14, 40
MOST_ASPECT = 4.0  # height over width of the room for a picture

EPILOG = """the figure
  picture, mask, presence    what `python -m model.evaluate` computes from one view at scale 1
  assignment maps            for each code the share of every position that it takes, and below its name the share of
                             the whole and the least and the most of one position; at each position the shares add up
                             to 1. The codes that take most come first, 32 at most.
  codewords                  the codes in the same order: the share of all positions, the norm of the codeword, and the
                             smoothing factor s_k of the paper (minus `scale` of the code): the larger, the sharper
  gates                      the gate of each channel (0 keeps it, 1 doubles it), and below what it does to each class:
                             how much it raises the class's mean logit over the picture, against the mean of all classes

example:
  python -m model.inspect runs/final.pt examples/street.jpg --out street.inspection.png
"""


class InspectError(ValueError):
    """A picture or an output that cannot be used; the message says why."""


@dataclass(frozen=True)
class Scene:
    """One picture as the network sees it.

    mask: int64 (H, W); presence: (C,) in 0..1; assignments: (K, h, w), which sum to 1 over the codes;
    gates: (D,) in 0..1; effects: (C, D), how much each channel's gate raises each class's logit, see `gate_effects`.
    """

    mask: numpy.ndarray
    presence: numpy.ndarray
    assignments: numpy.ndarray
    gates: numpy.ndarray
    effects: numpy.ndarray


def read_picture(path: Path) -> numpy.ndarray:
    """uint8 (H, W, 3) RGB, upright. Raises DataError as `read_image`, InspectError for a kind of pixel not read."""
    picture = upright(read_image(path, "picture"))
    try:
        return numpy.array(to_rgb(picture))
    except ValueError as error:
        raise InspectError(f"{path}: not a readable picture: {error}") from error


@torch.no_grad()
def look(model: EncNet, checkpoint: Checkpoint, image: numpy.ndarray) -> Scene:
    """The scene in a picture, uint8 (H, W, 3), seen once at scale 1; the model is in evaluation mode on the CPU.

    Raises InspectError for an FCN, which encodes no scene.
    """
    context = model.head.context
    if context is None:
        raise InspectError("the checkpoint is an FCN (encoding=false): it has no codewords and gates to look at")
    pixels = torch.from_numpy(image)[None]
    mean, std, base_size = checkpoint.mean, checkpoint.std, checkpoint.base_size
    answer = predict(model, pixels, mean=mean, std=std, base_size=base_size, calibration=checkpoint.calibration)
    stages = model.backbone(view_of(normalise(pixels, mean, std), base_size, 1.0))
    features = model.head.join(stages)
    projected = context.project(features)
    weights = assignments(projected, context.encoding.codewords, context.encoding.scale)
    _, scene = context(features)
    gates = torch.sigmoid(context.gate(scene))
    return Scene(
        mask=answer.probabilities[0].argmax(0).numpy(),
        presence=answer.presence[0].numpy(),
        assignments=weights[0].T.unflatten(1, projected.shape[-2:]).numpy(),
        gates=gates[0].numpy(),
        effects=gate_effects(model.head, features, gates, stages).numpy(),
    )


def gate_effects(head: EncHead, features: Tensor, gates: Tensor, stages: Stages) -> Tensor:
    """(C, D): how much the gate of each channel raises each class's mean logit over the picture, against all classes.

    features: (1, D, h, w), not yet gated; gates: (1, D). The gate times the derivative by it, which is exact where the
    classifier reads the gated features, and the first order where the refinement at stride 4 stands between them.
    """

    def mean_logits(gamma: Tensor) -> Tensor:
        logits = head.classify(raise_channels(features, gamma), stages).mean((0, 2, 3))
        return logits - logits.mean()

    with torch.enable_grad():
        derivative: Tensor = torch.autograd.functional.jacobian(mean_logits, gates)
    return derivative[:, 0] * gates


def inspection(scene: Scene, checkpoint: Checkpoint, image: numpy.ndarray, name: str) -> Figure:
    """The figure; `--help` says what is where."""
    shares = scene.assignments.mean((1, 2))
    codes = numpy.argsort(-shares, kind="stable")
    areas = numpy.bincount(scene.mask.ravel(), minlength=len(scene.presence)) / scene.mask.size
    classes = sorted(numpy.argsort(-(scene.presence + areas), kind="stable")[:MOST_CLASSES].tolist())
    rows = -(-min(len(codes), MOST_CODES) // CODE_COLUMNS)
    aspect = min(image.shape[0] / image.shape[1], MOST_ASPECT)
    heights = [5.6 * aspect + 1.0, rows * (2.0 * aspect + 0.45) + 0.6, 2.6, 0.27 * len(classes) + 2.6]

    figure = Figure(figsize=(17, sum(heights) + 0.6), dpi=100)
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.08)
    figure.suptitle(f"{name} seen by {checkpoint.name}", x=0.01, ha="left", color=INK, fontsize=18, parse_math=False)
    top, maps, codebook, gating = figure.subfigures(4, 1, squeeze=False, height_ratios=heights)[:, 0]
    _draw_answer(top, scene, checkpoint, image, classes, areas)
    _draw_assignments(maps, scene, codes[:MOST_CODES], shares)
    _draw_codebook(codebook, checkpoint, codes, shares)
    _draw_gates(gating, scene, checkpoint, classes)
    return figure


def _draw_answer(
    figure: SubFigure,
    scene: Scene,
    checkpoint: Checkpoint,
    image: numpy.ndarray,
    classes: Sequence[int],
    areas: numpy.ndarray,
) -> None:
    picture, mask, bars = figure.subplots(1, 3, width_ratios=(1.25, 1.25, 1))
    for panel, pixels, title in (
        (picture, image, "picture"),
        (mask, colourise(scene.mask, checkpoint.palette), "mask"),
    ):
        panel.imshow(pixels)
        panel.set_axis_off()
        panel.set_title(title, loc="left", color=INK, fontsize=13)
    places = numpy.arange(len(classes))
    colours = numpy.array([checkpoint.palette[index] for index in classes]) / 255
    bars.barh(places, [1] * len(classes), color=TRACK, height=0.7)
    bars.barh(places, scene.presence[list(classes)], color=colours, edgecolor=FAINT, linewidth=0.5, height=0.7)
    bars.axvline(0.5, color=INK, linewidth=0.8)
    bars.set_yticks(places, [checkpoint.classes[index][:24] for index in classes], color=INK, parse_math=False)
    for place, index in zip(places, classes, strict=True):
        text = f"{scene.presence[index]:.2f}   {100 * areas[index]:5.1f} %"
        bars.text(1.03, place, text, va="center", color=INK, fontsize=10)
    bars.set(xlim=(0, 1.4), xticks=(0, 0.5, 1), ylim=(len(classes) - 0.4, -0.6))
    bars.tick_params(axis="x", colors=FAINT)
    bars.tick_params(axis="y", length=0)
    bars.spines[:].set_visible(False)
    calibrated = "calibrated" if checkpoint.calibration else "not calibrated"
    bars.set_title(f"presence ({calibrated}) and share of the mask", loc="left", color=INK, fontsize=13)


def _draw_assignments(figure: SubFigure, scene: Scene, codes: numpy.ndarray, shares: numpy.ndarray) -> None:
    figure.suptitle(
        "assignment maps: the share of each position that goes to a code, each map from its least (black) to its most",
        x=0.01,
        ha="left",
        color=INK,
        fontsize=13,
    )
    panels = figure.subplots(-(-len(codes) // CODE_COLUMNS), CODE_COLUMNS, squeeze=False).ravel()
    for panel in panels:
        panel.set_axis_off()
    for panel, code in zip(panels, codes, strict=False):
        shown = scene.assignments[code]
        panel.imshow(shown, cmap="magma", interpolation="bilinear")
        text = f"code {code}: {100 * shares[code]:.1f} %\n{shown.min():.3f} to {shown.max():.3f}"
        panel.set_title(text, loc="left", color=INK, fontsize=9, pad=3)


def _draw_codebook(figure: SubFigure, checkpoint: Checkpoint, codes: numpy.ndarray, shares: numpy.ndarray) -> None:
    norms = checkpoint.weights["head.context.encoding.codewords"].float().norm(dim=1).numpy()[codes]
    factors = -checkpoint.weights["head.context.encoding.scale"].float().numpy()[codes]
    panels = figure.subplots(1, 3)
    places = numpy.arange(len(codes))
    for panel, values, title in (
        (panels[0], 100 * shares[codes], "share of all positions, %"),
        (panels[1], norms, "norm of the codeword"),
        (panels[2], factors, "smoothing factor"),
    ):
        panel.bar(places, values, color=BAR, width=0.75)
        panel.set_title(title, loc="left", color=INK, fontsize=13)
        panel.axhline(0, color=FAINT, linewidth=0.8)
        panel.set_xlim(-0.7, len(codes) - 0.3)
        step = -(-len(codes) // MOST_CODES)
        panel.set_xticks(places[::step], codes[::step].astype(str), fontsize=8, rotation=90)
        panel.set_xlabel("code", color=FAINT)
        panel.tick_params(colors=FAINT)
        panel.spines[["top", "right"]].set_visible(False)


def _draw_gates(figure: SubFigure, scene: Scene, checkpoint: Checkpoint, classes: Sequence[int]) -> None:
    effects = scene.effects[list(classes)]
    strongest = numpy.argsort(-numpy.abs(effects).max(0), kind="stable")[:MOST_CHANNELS]
    favoured = effects[:, strongest].argmax(0)
    channels = strongest[numpy.lexsort((-effects.max(0)[strongest], favoured))]
    bars, table = figure.subplots(2, 1, height_ratios=(1, 0.22 * len(classes) + 0.3), sharex=True)
    bars.bar(numpy.arange(len(channels)), scene.gates[channels], color=BAR, width=0.75)
    bars.axhline(scene.gates.mean(), color=FAINT, linewidth=1, linestyle="--")
    bars.set(ylim=(0, 1), yticks=(0, 0.5, 1))
    bars.set_title(
        f"gates of the {len(channels)} channels (of {len(scene.gates)}) that matter most, "
        f"dashed: mean of all, {scene.gates.mean():.2f}",
        loc="left",
        color=INK,
        fontsize=13,
    )
    bars.tick_params(colors=FAINT)
    bars.spines[["top", "right"]].set_visible(False)
    most = max(float(numpy.abs(effects).max()), 1e-6)
    drawn = table.imshow(effects[:, channels], cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto")
    names = [f"{checkpoint.classes[index][:24]}  {scene.effects[index].sum():+.2f}" for index in classes]
    table.set_yticks(numpy.arange(len(classes)), names, color=INK, parse_math=False)
    table.set_xticks(numpy.arange(len(channels)), channels.astype(str), fontsize=8, rotation=90)
    table.set_xlabel("channel", color=FAINT)
    table.tick_params(axis="x", colors=FAINT)
    table.tick_params(axis="y", length=0)
    table.spines[:].set_visible(False)
    table.set_title(
        "what each gate adds to a class's mean logit, against the mean of the classes; beside the name: all channels",
        loc="left",
        color=INK,
        fontsize=13,
    )
    figure.colorbar(drawn, ax=[bars, table], fraction=0.012, pad=0.005)


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(
        prog="python -m model.inspect",
        description="Draw what the Context Encoding Module sees in a picture: assignment maps, codewords, gates, "
        "presence.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    root.add_argument("checkpoint", type=Path, help="a checkpoint that `python -m model.evaluate` reads")
    root.add_argument("picture", type=Path, help="a picture file of any size")
    root.add_argument(
        "--out",
        type=Path,
        metavar="FILE.png",
        help="the file to write (default: in the working folder, the picture's name ending in .inspection.png)",
    )
    return root


def run(arguments: argparse.Namespace) -> Path:
    """Look, draw, write; the file written."""
    output: Path = arguments.out or Path(arguments.picture.stem + ".inspection.png")
    if output.suffix != ".png":
        raise InspectError(f"--out {output}: the name must end in .png")
    if not output.parent.is_dir():
        raise InspectError(f"--out {output}: the folder {output.parent} does not exist")
    image = read_picture(arguments.picture)
    checkpoint = load_checkpoint(arguments.checkpoint)
    scene = look(build_model(checkpoint), checkpoint, image)
    figure = inspection(scene, checkpoint, image, arguments.picture.name)
    with replacing(output) as file:
        figure.savefig(file, format="png")
    return output


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status; see `finish`."""
    arguments = parser().parse_args(argv)
    return finish(lambda: print(f"written: {run(arguments)}"), InspectError, CheckpointError, DataError)


if __name__ == "__main__":
    sys.exit(main())
