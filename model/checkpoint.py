"""Checkpoint files: one .pt with weights and everything needed to use them, always read with `weights_only=True`."""

import hashlib
import os
import platform
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from model.config import ModelConfig
from model.encnet import EncNet

FORMAT = "encnet-serve/1"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class CheckpointError(ValueError):
    """A file that is no usable checkpoint; the message says what is wrong with it."""


@dataclass
class Checkpoint:
    """What a checkpoint file holds.

    weights: state dict of `EncNet(config)`; classes: C names; palette: C [r, g, b] in 0..255;
    mean, std: of RGB in 0..1; base_size: long side in pixels at scale 1; scales, flip: default views of inference;
    step: optimizer steps taken; training: optimizer and random state for `--resume`, else None;
    source: the format the weights were published in; sha256: of the file they were read from, "" when made here.
    """

    config: ModelConfig
    weights: dict[str, Tensor]
    classes: list[str]
    palette: list[list[int]]
    base_size: int
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    name: str = "encnet"
    licence: str = ""
    description: str = ""
    step: int = 0
    training: dict[str, Any] | None = None
    versions: dict[str, str] = field(default_factory=dict)
    source: str = FORMAT
    sha256: str = ""


def library_versions() -> dict[str, str]:
    return {"torch": str(torch.__version__), "numpy": numpy.__version__, "python": platform.python_version()}


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write atomically: a reader or a killed writer never sees half a file."""
    document = {
        "format": FORMAT,
        "config": checkpoint.config.to_dict(),
        "weights": checkpoint.weights,
        "classes": list(checkpoint.classes),
        "palette": [list(colour) for colour in checkpoint.palette],
        "base_size": checkpoint.base_size,
        "mean": list(checkpoint.mean),
        "std": list(checkpoint.std),
        "scales": list(checkpoint.scales),
        "flip": checkpoint.flip,
        "name": checkpoint.name,
        "licence": checkpoint.licence,
        "description": checkpoint.description,
        "step": checkpoint.step,
        "training": checkpoint.training,
        "versions": library_versions(),
    }
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(document, file)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint of this project.

    Raises CheckpointError for a file that is missing, truncated, not a checkpoint, or incomplete.
    """
    document = read_pickle(path)
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a checkpoint of this project")
    values = {key: value for key, value in document.items() if key != "format"}
    try:
        config = ModelConfig.from_dict(values.pop("config"))
        checkpoint = Checkpoint(config=config, **values)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: incomplete checkpoint: {error}") from error
    checkpoint.mean, checkpoint.std = tuple(checkpoint.mean), tuple(checkpoint.std)
    checkpoint.scales = tuple(checkpoint.scales)
    checkpoint.sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return checkpoint


def read_pickle(path: Path) -> Any:
    """The object in a .pt / .pth file, tensors on the CPU; code in the file is never run."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path}: not readable as a PyTorch checkpoint (truncated, or no checkpoint): {reason}") from error


def build_model(checkpoint: Checkpoint) -> EncNet:
    """The network with the checkpoint's weights, in evaluation mode.

    Raises CheckpointError that lists missing and left-over keys and wrong shapes.
    """
    model = EncNet(checkpoint.config)
    expected = model.state_dict()
    missing = sorted(k for k in expected if k not in checkpoint.weights and not k.endswith("num_batches_tracked"))
    left_over = sorted(k for k in checkpoint.weights if k not in expected)
    shapes = sorted(
        f"{key}: expected {tuple(expected[key].shape)}, got {tuple(value.shape)}"
        for key, value in checkpoint.weights.items()
        if key in expected and expected[key].shape != value.shape
    )
    problems = [
        f"{title}: {', '.join(items)}"
        for title, items in (("missing keys", missing), ("left-over keys", left_over), ("wrong shapes", shapes))
        if items
    ]
    if problems:
        raise CheckpointError("the weights do not fit the configuration; " + "; ".join(problems))
    model.load_state_dict(checkpoint.weights, strict=False)
    return model.eval()
