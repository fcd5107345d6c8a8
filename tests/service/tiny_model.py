"""A tiny whole-inference model, small enough to check its answers by hand.

Four classes, decided by colour alone: black, red, green, blue. Per pixel the logits are a 1x1 convolution of the
picture scaled to 0..1:

    black 0.5 - (r + g + b) / 4      red r - (g + b) / 2      green g - (r + b) / 2      blue b - (r + g) / 2

all times GAIN, averaged over the views. A view at scale s is the picture resampled (nearest) to s times its size, at
least one pixel, and back, so that scales below 1 lose detail; its mirrored twin is resampled from the other side.
Presence of a class is the sigmoid of its largest logit.
"""

import io
import json

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

GAIN = 10.0
CLASSES = ["black", "red", "green", "blue"]
PALETTE = [[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255]]
WEIGHT = GAIN * np.array(
    [[-0.25, -0.25, -0.25], [1.0, -0.5, -0.5], [-0.5, 1.0, -0.5], [-0.5, -0.5, 1.0]],
    np.float32,
)
BIAS = GAIN * np.array([0.5, 0.0, 0.0, 0.0], np.float32)

METADATA = {
    "format": "encnet-serve/1",
    "graph": "whole",
    "name": "encnet-tiny",
    "classes": json.dumps(CLASSES),
    "palette": json.dumps(PALETTE),
    "mean": "[0.0, 0.0, 0.0]",
    "std": "[1.0, 1.0, 1.0]",
    "base_size": "64",
    "scales": "[1.0]",
    "flip": "false",
    "resize": "nearest",
    "align_corners": "false",
    "reference_positions": "0",
    "checkpoint_sha256": "0" * 64,
}


def _loop_body() -> onnx.GraphProto:
    """One scale: add this view's logits, and its mirrored twin's where flip is on, to the running sum."""

    def resample(picture: str, name: str) -> list[onnx.NodeProto]:
        options = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        return [
            helper.make_node("Resize", [picture, "", "factors"], [f"{name}_small"], **options),
            helper.make_node("Resize", [f"{name}_small", "", "", "shape"], [name], **options),
        ]

    nodes = [
        helper.make_node("Gather", ["scales", "i"], ["scale"]),
        helper.make_node("Unsqueeze", ["scale", "axis0"], ["scale1"]),
        helper.make_node("Max", ["scale1", "least_factors"], ["two_factors"]),
        helper.make_node("Concat", ["ones2", "two_factors"], ["factors"], axis=0),
        *resample("pixels", "plain"),
        *resample("mirrored", "twin"),
        helper.make_node("Slice", ["twin", "minus1", "end", "axis3", "minus1"], ["twin_back"]),
        helper.make_node("Add", ["plain", "twin_back"], ["both"]),
        helper.make_node("Mul", ["both", "half"], ["both_mean"]),
        helper.make_node("Where", ["flip", "both_mean", "plain"], ["view"]),
        helper.make_node("Conv", ["view", "weight", "bias"], ["view_logits"]),
        helper.make_node("Add", ["sum_in", "view_logits"], ["sum_out"]),
        helper.make_node("Identity", ["go_on"], ["go_on_out"]),
    ]
    return helper.make_graph(
        nodes,
        "one_scale",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("sum_in", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("go_on_out", TensorProto.BOOL, []),
            helper.make_tensor_value_info("sum_out", TensorProto.FLOAT, None),
        ],
    )


def tiny_model(classes: int = len(CLASSES)) -> onnx.ModelProto:
    """The model described at the top of this file; with more classes than four, the others are never chosen."""
    extra = classes - len(CLASSES)
    weight = np.concatenate([WEIGHT, np.zeros((extra, 3), np.float32)])
    bias = np.concatenate([BIAS, np.full(extra, -GAIN, np.float32)])
    mask_type = TensorProto.UINT16 if classes > 255 else TensorProto.UINT8
    constants = {
        "weight": weight[:, :, None, None],
        "bias": bias,
        "white": np.float32(255),
        "half": np.float32(0.5),
        "zero": np.float32(0),
        "ones2": np.ones(2, np.float32),
        "axis0": np.array([0], np.int64),
        "two": np.array([2], np.int64),
        "axis3": np.array([3], np.int64),
        "four": np.array([4], np.int64),
        "minus1": np.array([-1], np.int64),
        "end": np.array([np.iinfo(np.int64).min], np.int64),
        "true": np.bool_(True),
    }
    nodes = [
        helper.make_node("Cast", ["image"], ["float_image"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["float_image", "white"], ["unit_image"]),
        helper.make_node("Transpose", ["unit_image"], ["pixels"], perm=[0, 3, 1, 2]),
        helper.make_node("Shape", ["pixels"], ["shape"]),
        helper.make_node("Slice", ["shape", "two", "four"], ["size"]),
        helper.make_node("Cast", ["size"], ["float_size"], to=TensorProto.FLOAT),
        helper.make_node("Reciprocal", ["float_size"], ["least_factors"]),
        helper.make_node("Slice", ["pixels", "minus1", "end", "axis3", "minus1"], ["mirrored"]),
        helper.make_node("Size", ["scales"], ["count"]),
        helper.make_node("Conv", ["pixels", "weight", "bias"], ["like"]),
        helper.make_node("Mul", ["like", "zero"], ["sum0"]),
        helper.make_node("Loop", ["count", "true", "sum0"], ["sum"], body=_loop_body()),
        helper.make_node("Cast", ["count"], ["float_count"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["sum", "float_count"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
        helper.make_node("ArgMax", ["logits"], ["label"], axis=1, keepdims=0),
        helper.make_node("Cast", ["label"], ["mask"], to=mask_type),
        helper.make_node("GlobalMaxPool", ["logits"], ["largest"]),
        helper.make_node("Flatten", ["largest"], ["largest_flat"]),
        helper.make_node("Sigmoid", ["largest_flat"], ["presence"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [
            helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", "H", "W", 3]),
            helper.make_tensor_value_info("scales", TensorProto.FLOAT, ["S"]),
            helper.make_tensor_value_info("flip", TensorProto.BOOL, []),
        ],
        [
            helper.make_tensor_value_info("mask", mask_type, ["N", "H", "W"]),
            helper.make_tensor_value_info("presence", TensorProto.FLOAT, ["N", classes]),
            helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["N", classes, "H", "W"]),
        ],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    helper.set_model_props(model, METADATA)
    onnx.checker.check_model(model)
    return model


def encoded(image: Image.Image | np.ndarray, format: str = "PNG", **options: object) -> bytes:
    """A picture as a file in memory."""
    buffer = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(buffer, format, **options)
    return buffer.getvalue()
