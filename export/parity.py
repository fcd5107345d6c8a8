"""ONNX Runtime against PyTorch, on made pictures of several sizes: do the file and the checkpoint agree?"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy
import onnxruntime
import torch
from torch.nn import functional as F

from export.errors import ExportError, ParityError
from model.checkpoint import Checkpoint
from model.encnet import EncNet
from model.predict import normalise, predict
from model.wording import first_line


@dataclass(frozen=True)
class Tolerance:
    """The largest errors allowed, absolute; `labels` is the least share of equal labels, see `equal_share`.

    logits: for logits of order 10 and below; for larger ones it grows in proportion.
    """

    logits: float
    probabilities: float
    presence: float
    labels: float


FLOAT32 = Tolerance(logits=1e-3, probabilities=1e-3, presence=1e-3, labels=0.999)
FLOAT16 = Tolerance(logits=0.1, probabilities=0.05, presence=0.02, labels=0.995)
TIE = 0.01  # of the standard deviation of the scores


@dataclass(frozen=True)
class Case:
    """What one comparison feeds; scales are empty for the network alone."""

    batch: int
    height: int
    width: int
    scales: tuple[float, ...] = ()
    flip: bool = False

    def __str__(self) -> str:
        views = f", scales {', '.join(f'{scale:g}' for scale in self.scales)}" if self.scales else ""
        return f"{self.batch} x {self.height}x{self.width}{views}{', mirrored' if self.flip else ''}"


CORE_CASES = (Case(1, 96, 128), Case(2, 75, 61), Case(1, 33, 160))
WHOLE_CASES = (
    Case(1, 96, 128, (1.0,)),
    Case(2, 75, 61, (0.5, 0.75), flip=True),
    Case(1, 40, 160, (0.25, 0.5, 0.7), flip=True),
)


@dataclass(frozen=True)
class Comparison:
    """The largest error of each output, what was allowed, and the share of equal labels (in 0..1)."""

    graph: str
    case: Case
    errors: dict[str, float]
    allowed: dict[str, float]
    equal_labels: float
    least_equal: float

    @property
    def agrees(self) -> bool:
        """False also where an error is not a number."""
        return all(error <= self.allowed[name] for name, error in self.errors.items()) and (
            self.equal_labels >= self.least_equal
        )


def picture(case: Case) -> torch.Tensor:
    """uint8 (N, H, W, 3): soft blobs with fine grain, the same every time."""
    generator = torch.Generator().manual_seed(case.height * 10_000 + case.width)
    coarse = torch.rand((case.batch, 3, 2 + case.height // 16, 2 + case.width // 16), generator=generator)
    blobs = F.interpolate(coarse, (case.height, case.width), mode="bilinear", align_corners=True)
    grain = torch.rand((case.batch, 3, case.height, case.width), generator=generator)
    return (255 * (0.9 * blobs + 0.1 * grain)).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def session_options(library: Path | None = None) -> onnxruntime.SessionOptions:
    """Errors only, as many threads as PyTorch has, and the compiled kernel where its library is given.

    Raises ExportError where the library does not load.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if library:
        try:
            options.register_custom_ops_library(str(library))
        except Exception as error:  # ONNX Runtime's own exceptions share no base class of their own
            raise ExportError(f"the compiled kernel {library} does not load: {first_line(error)}") from error
    return options


def session(model: bytes, library: Path | None = None) -> onnxruntime.InferenceSession:
    """The model on the CPU, of a stock ONNX Runtime or with the compiled kernel.

    Raises ExportError where ONNX Runtime does not take the model, and as `session_options` does.
    """
    options = session_options(library)
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's own exceptions share no base class of their own
        raise ExportError(f"ONNX Runtime cannot load the graph: {first_line(error)}") from error


def answers(
    runtime: onnxruntime.InferenceSession, names: Sequence[str], feeds: dict[str, numpy.ndarray]
) -> list[numpy.ndarray]:
    """The outputs of these names. Raises ExportError where ONNX Runtime cannot run the graph on these inputs."""
    try:
        return list(runtime.run(names, feeds))
    except Exception as error:  # ONNX Runtime's own exceptions share no base class of their own
        raise ExportError(f"ONNX Runtime cannot run the graph: {first_line(error)}") from error


def compare_core(
    model: bytes,
    network: EncNet,
    checkpoint: Checkpoint,
    tolerance: Tolerance,
    cases: Sequence[Case] = CORE_CASES,
) -> list[Comparison]:
    """The network graph, case by case. Raises ExportError as `session` and `answers` do."""
    runtime = session(model)
    comparisons = []
    for case in cases:
        image = normalise(picture(case), checkpoint.mean, checkpoint.std)
        with torch.inference_mode():
            expected = network(image)
        logits, presence_logits = answers(runtime, ["logits", "presence_logits"], {"image": image.numpy()})
        expected_logits, expected_presence = expected.logits.numpy(), expected.presence_logits.numpy()
        comparison = Comparison(
            "network",
            case,
            {
                "logits": largest_error(logits, expected_logits),
                "presence logits": largest_error(presence_logits, expected_presence),
            },
            {
                "logits": tolerance.logits * max(1.0, float(numpy.abs(expected_logits).max()) / 10),
                "presence logits": tolerance.logits * max(1.0, float(numpy.abs(expected_presence).max()) / 10),
            },
            equal_share(logits.argmax(1), expected_logits),
            tolerance.labels,
        )
        comparisons.append(comparison)
    return comparisons


def compare_whole(
    model: bytes,
    network: EncNet,
    checkpoint: Checkpoint,
    tolerance: Tolerance,
    cases: Sequence[Case] = WHOLE_CASES,
) -> list[Comparison]:
    """The whole graph against `model.predict.predict`, case by case. Raises ExportError as `compare_core` does."""
    runtime = session(model)
    comparisons = []
    for case in cases:
        image = picture(case)
        expected = predict(
            network,
            image,
            mean=checkpoint.mean,
            std=checkpoint.std,
            base_size=checkpoint.base_size,
            scales=case.scales,
            flip=case.flip,
            calibration=checkpoint.calibration,
        )
        feeds = {
            "image": image.numpy(),
            "scales": numpy.array(case.scales, numpy.float32),
            "flip": numpy.array(case.flip),
        }
        mask, presence, probabilities = answers(runtime, ["mask", "presence", "probabilities"], feeds)
        comparison = Comparison(
            "whole",
            case,
            {
                "probabilities": largest_error(probabilities, expected.probabilities.numpy()),
                "presence": largest_error(presence, expected.presence.numpy()),
            },
            {"probabilities": tolerance.probabilities, "presence": tolerance.presence},
            equal_share(mask, expected.probabilities.numpy()),
            tolerance.labels,
        )
        comparisons.append(comparison)
    return comparisons


def largest_error(found: numpy.ndarray, expected: numpy.ndarray) -> float:
    """NaN where either is not a number; infinite where the shapes differ."""
    if found.shape != expected.shape:
        return float("inf")
    return float(numpy.abs(found.astype(numpy.float64) - expected).max())


def equal_share(found: numpy.ndarray, scores: numpy.ndarray) -> float:
    """Share of the labels (N, H, W), 0..1, that are the best by the scores (N, C, H, W); 0 where the shapes differ.

    A class that is within TIE of the best counts as the best, too: of many classes that a network hardly tells apart,
    any rounding chooses another.
    """
    best = scores.max(1)
    if found.shape != best.shape:
        return 0.0
    chosen = numpy.take_along_axis(scores, found[:, None].astype(numpy.int64), 1)[:, 0]
    return float((chosen >= best - TIE * scores.std()).mean())


def check(comparisons: Sequence[Comparison]) -> None:
    """Raise ParityError that tells every comparison outside its tolerance."""
    complaints = []
    for comparison in comparisons:
        if comparison.agrees:
            continue
        errors = ", ".join(
            f"{name} differ by {error:.3g} (allowed {comparison.allowed[name]:.3g})"
            for name, error in comparison.errors.items()
        )
        labels = f"{comparison.equal_labels:.3%} equal labels (at least {comparison.least_equal:.1%})"
        complaints.append(f"{comparison.graph} graph, {comparison.case}: {errors}, {labels}")
    if complaints:
        raise ParityError("ONNX Runtime and PyTorch disagree, no file is written; " + "; ".join(complaints))
