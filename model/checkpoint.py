"""Checkpoint files: one .pt with weights and everything needed to use them, always read with `weights_only=True`.

Checkpoints in the formats of PyTorch-Encoding and mmsegmentation are read as well (model/foreign.py).
"""

import hashlib
import platform
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

import numpy
import torch
from torch import Tensor

from model.calibration import Calibration
from model.config import ModelConfig
from model.encnet import EncNet
from model.files import replacing
from model.foreign import are_names, inverse, is_palette, read_foreign, rename
from model.weights import CheckpointError, check_state, raise_for, read_pickle
from model.wording import is_text, listing

FORMAT = "encnet-serve/1"
MOST_BASE_SIZE = 16384
MOST_NUMBER = 1e6  # of means, deviations and scales
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass
class Checkpoint:
    """What a checkpoint file holds.

    weights: state dict of `EncNet(config)`; classes: C names; palette: C [r, g, b] in 0..255;
    mean, std: of RGB in 0..1; base_size: long side in pixels at scale 1; scales, flip: default views of inference;
    step: optimizer steps taken; training: optimizer and random state for `--resume`, else None;
    calibration: of presence, None where none was fitted; versions: of the libraries that made the weights;
    source: the format the weights were published in; assumed: what that leaves open, in a sentence, or "";
    sha256: of the file they were read from, "" when made here.
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
    calibration: Calibration | None = None
    source: str = FORMAT
    assumed: str = ""
    sha256: str = ""


def library_versions() -> dict[str, str]:
    """Of what decides how weights come out: torch, numpy and Python."""
    return {"torch": str(torch.__version__), "numpy": numpy.__version__, "python": platform.python_version()}


FIELD_TYPES: dict[str, type | tuple[type, ...]] = {
    "config": dict,
    "weights": dict,
    "classes": list,
    "palette": list,
    "base_size": int,
    "mean": list,
    "std": list,
    "scales": list,
    "flip": bool,
    "name": str,
    "licence": str,
    "description": str,
    "step": int,
    "training": (dict, NoneType),
    "versions": dict,
    "calibration": dict,
}
OPTIONAL = {"calibration"}


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
        "versions": checkpoint.versions or library_versions(),
    }
    if checkpoint.calibration:
        document["calibration"] = checkpoint.calibration.to_dict()
    with replacing(path) as file:
        torch.save(document, file)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint of this project, of PyTorch-Encoding or of mmsegmentation, told apart by its keys.

    What foreign weights do not say is assumed as model/foreign.py describes; `source` names the format, and `assumed`
    tells of what may be wrong. Classes are called "class 0".. where the file has no names.

    Raises CheckpointError for a file that is missing, truncated or no checkpoint, that lacks fields or weights or has
    some left over, or whose weights have wrong shapes or are not finite; the message lists what is wrong.
    """
    document = read_pickle(path)
    if not isinstance(document, Mapping):
        raise CheckpointError(f"{path}: holds a {type(document).__name__}, not a checkpoint")
    try:
        checkpoint = _native(document) if "format" in document else _foreign(document, name=path.stem)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    with path.open("rb") as file:
        checkpoint.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return checkpoint


def _native(document: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint in a document that `save_checkpoint` wrote; ValueError says what is wrong with it."""
    found = document["format"]
    if found != FORMAT:
        family, _, number = FORMAT.partition("/")
        match = re.fullmatch(rf"{family}/(\d+)", str(found))
        if match and int(match[1]) > int(number):
            raise ValueError(f"format {found!r} was written by a newer version; this one reads {FORMAT!r}")
        raise ValueError(f"unknown format {found!r}; this version reads {FORMAT!r}")
    values = {key: value for key, value in document.items() if key != "format"}
    missing = [key for key in FIELD_TYPES if key not in values and key not in OPTIONAL]
    left_over = sorted(str(key) for key in values if key not in FIELD_TYPES)
    wrong = [
        f"{key} (a {type(value).__name__})"
        for key, value in values.items()
        if key in FIELD_TYPES and not isinstance(value, FIELD_TYPES[key])
    ]
    raise_for(("missing fields", missing), ("left-over fields", left_over), ("fields of a wrong type", wrong))

    config = ModelConfig.from_dict(values.pop("config"))
    if "calibration" in values:
        values["calibration"] = Calibration.from_dict(values["calibration"], config.num_classes)
    checkpoint = Checkpoint(config=config, **values)
    checkpoint.mean, checkpoint.std = tuple(checkpoint.mean), tuple(checkpoint.std)
    checkpoint.scales = tuple(checkpoint.scales)
    classes = checkpoint.config.num_classes
    rules = (
        (len(checkpoint.classes) == classes, f"classes must be {classes} names, found {len(checkpoint.classes)}"),
        (are_names(checkpoint.classes), "classes must be names, as text, none empty and none twice"),
        (is_palette(checkpoint.palette, classes), f"palette must be {classes} colours of three numbers in 0..255"),
        (
            1 <= checkpoint.base_size <= MOST_BASE_SIZE,
            f"base_size must be 1 to {MOST_BASE_SIZE} pixels, found {checkpoint.base_size}",
        ),
        (
            len(checkpoint.mean) == 3 and all(map(_is_number, checkpoint.mean)),
            f"mean must be three numbers, found {listing(map(str, checkpoint.mean))}",
        ),
        (len(checkpoint.std) == 3 and all(map(is_positive, checkpoint.std)), "std must be three positive numbers"),
        (checkpoint.scales and all(map(is_positive, checkpoint.scales)), "scales must be positive numbers"),
        (
            all(map(is_text, (checkpoint.name, checkpoint.licence, checkpoint.description))),
            "name, licence and description must be text that UTF-8 can hold",
        ),
    )
    broken = [message for holds, message in rules if not holds]
    if broken:
        raise ValueError("; ".join(broken))
    checkpoint.palette = [[int(value) for value in colour] for colour in checkpoint.palette]
    check_weights(checkpoint.config, checkpoint.weights)
    return checkpoint


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= MOST_NUMBER


def is_positive(value: Any) -> bool:
    """Whether it is a number above 0, MOST_NUMBER at most."""
    return _is_number(value) and value > 0


def _foreign(document: Mapping[str, Any], name: str) -> Checkpoint:
    """The checkpoint in another project's document; ValueError says what is wrong with it, in that project's keys."""
    found = read_foreign(document)
    theirs = inverse(found.table)
    mean, std = found.normalisation or (IMAGENET_MEAN, IMAGENET_STD)
    check_weights(found.config, found.weights, found.unknown, lambda key: rename(key, theirs) or key)
    return Checkpoint(
        config=found.config,
        weights=found.weights,
        classes=found.classes,
        palette=found.palette,
        base_size=found.base_size,
        mean=mean,
        std=std,
        name=name,
        step=found.step,
        source=found.source,
        assumed=found.assumed,
    )


def build_model(checkpoint: Checkpoint) -> EncNet:
    """The network with the checkpoint's weights, in evaluation mode.

    Raises CheckpointError that lists missing and left-over keys, wrong shapes and weights that are not finite.
    """
    try:
        check_weights(checkpoint.config, checkpoint.weights)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    with torch.device("meta"):
        model = EncNet(checkpoint.config)
    counters = {key: torch.tensor(0) for key in model.state_dict() if key.endswith("num_batches_tracked")}
    model.to_empty(device="cpu").load_state_dict({**counters, **checkpoint.weights})
    return model.eval()


def check_weights(
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    unknown: Iterable[str] = (),
    name: Callable[[str], str] = str,
) -> None:
    """Raise ValueError unless the weights are exactly those of `EncNet(config)`, batch norms' counters aside.

    unknown: keys known to be left over; name: what to call one of our keys in the message.
    """
    with torch.device("meta"):
        expected = EncNet(config).state_dict()
    check_state(expected, weights, unknown, name)
