"""What a file says about itself: `metadata_props`, from which everything downstream reads."""

import json

import onnx
import torch

from model.checkpoint import Checkpoint
from model.predict import SIZE_TOLERANCE

FORMAT = "encnet-serve/1"
PRODUCER, PRODUCER_VERSION = "encnet-serve", "0.1.0"
RESIZE = (
    "bilinear, half-pixel centres, antialiased where it shrinks, edges renormalised; "
    f"long side ceil(base_size * scale - {SIZE_TOLERANCE}), short side floor(short * new_long / long + 1/2), at least 1"
)


def properties(checkpoint: Checkpoint, *, whole: bool, fp16: bool) -> dict[str, str]:
    """Every value as text; lists as JSON, booleans as "true" and "false"."""
    config = checkpoint.config
    values = {
        "format": FORMAT,
        "graph": "whole" if whole else "core",
        "name": checkpoint.name,
        "classes": json.dumps(list(checkpoint.classes), ensure_ascii=False),
        "palette": json.dumps([list(colour) for colour in checkpoint.palette]),
        "mean": json.dumps(list(checkpoint.mean)),
        "std": json.dumps(list(checkpoint.std)),
        "base_size": str(checkpoint.base_size),
        "scales": json.dumps([float(scale) for scale in checkpoint.scales]),
        "flip": json.dumps(bool(checkpoint.flip)),
        "resize": RESIZE,
        "align_corners": json.dumps(config.align_corners),
        "reference_positions": f"{config.reference_positions:g}",
        "checkpoint_sha256": checkpoint.sha256,
        "checkpoint_format": checkpoint.source,
        "backbone": config.backbone,
        "precision": "float16" if fp16 else "float32",
        "torch": str(torch.__version__),
        "onnx": onnx.__version__,
    }
    if checkpoint.licence:
        values["licence"] = checkpoint.licence
    if checkpoint.description:
        values["description"] = checkpoint.description
    if checkpoint.calibration:
        values["presence_scale"] = json.dumps(list(checkpoint.calibration.scale))
        values["presence_bias"] = json.dumps(list(checkpoint.calibration.bias))
        values["presence_method"] = checkpoint.calibration.method
    return values


def describe(model: onnx.ModelProto, values: dict[str, str]) -> None:
    """Write the properties and the producer into a model, in place of what was there."""
    onnx.helper.set_model_props(model, values)
    model.producer_name, model.producer_version = PRODUCER, PRODUCER_VERSION
