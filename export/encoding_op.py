"""The Encoding op on the ONNX side: its schema, how PyTorch's op becomes the node, and its body in standard operators.

A file holds nodes `encnet::Encoding` and the model-local function of that name. A runtime that knows the op (through
our custom-op library) runs its kernel; any other inlines the function, whose mathematics are `encode_reference`'s.
"""

from collections.abc import Callable
from typing import Any

import onnx
import onnx.defs
import onnx.parser
import torch
from onnxscript import values

from model.encoding import encode  # noqa: F401  (registers torch.ops.encnet.encode)

DOMAIN = "encnet"
VERSION = 1
NAME = "Encoding"
OPSET = 18

# Everything stays (B, D, N) as in memory; only the weights (B, N, K) and the result (B, D, K) are transposed.
# 1 is TensorProto.FLOAT: the arithmetic is float32 whatever the type of x.
FUNCTION = f"""
<domain: "{DOMAIN}", opset_import: ["" : {OPSET}]>
{NAME} <reference_positions: float = 0.0> (x, codewords, scale) => (encoded)
{{
    c = Cast <to = 1> (codewords)
    s = Cast <to = 1> (scale)
    x32 = Cast <to = 1> (x)
    one_row = Constant <value_ints = [0, 0, -1]> ()
    positions = Reshape (x32, one_row)

    first = Constant <value_ints = [1]> ()
    last = Constant <value_ints = [-1]> ()
    two = Constant <value_float = 2.0> ()
    cross = MatMul (c, positions)
    twice_cross = Mul (two, cross)
    x_norms = ReduceSumSquare <keepdims = 1> (positions, first)
    c_norms = ReduceSumSquare <keepdims = 1> (c, last)
    norms = Add (x_norms, c_norms)
    distances = Sub (norms, twice_cross)

    s_column = Unsqueeze (s, last)
    assignment_logits = Mul (s_column, distances)
    by_position = Transpose <perm = [0, 2, 1]> (assignment_logits)
    weights = Softmax <axis = -1> (by_position)

    weighted = MatMul (positions, weights)
    weighted_rows = Transpose <perm = [0, 2, 1]> (weighted)
    mass = ReduceSum <keepdims = 0> (weights, first)
    mass_column = Unsqueeze (mass, last)
    weighted_codewords = Mul (mass_column, c)
    sums = Sub (weighted_rows, weighted_codewords)

    reference = Constant <value_float: float = @reference_positions> ()
    zero = Constant <value_float = 0.0> ()
    one = Constant <value_float = 1.0> ()
    is_plain = Equal (reference, zero)
    count = Shape <start = 2, end = 3> (positions)
    count32 = Cast <to = 1> (count)
    ratio = Div (reference, count32)
    factor = Where (is_plain, one, ratio)
    encoded = Mul (sums, factor)
}}
"""


def function() -> onnx.FunctionProto:
    """The op's body in standard operators: x (B, D, H, W), codewords (K, D), scale (K,) -> float32 (B, K, D)."""
    return onnx.parser.parse_function(FUNCTION)


def register_schema() -> None:
    """Make `encnet::Encoding` known to onnx in this process; the exporter builds nodes from registered schemas only."""
    if onnx.defs.has(NAME, VERSION, DOMAIN):
        return
    floats = ["tensor(float16)", "tensor(float)"]
    parameter = onnx.defs.OpSchema.FormalParameter
    onnx.defs.register_schema(
        onnx.defs.OpSchema(
            NAME,
            DOMAIN,
            VERSION,
            doc="E_k = sum_i A_ik (x_i - c_k), A = softmax_k(scale_k ||x_i - c_k||^2), in float32.",
            inputs=[
                parameter("x", "T", description="(B, D, H, W)"),
                parameter("codewords", "tensor(float)", description="(K, D)"),
                parameter("scale", "tensor(float)", description="(K,)"),
            ],
            outputs=[parameter("encoded", "tensor(float)", description="(B, K, D)")],
            type_constraints=[("T", floats, "the features may be half precision")],
            attributes=[
                onnx.defs.OpSchema.Attribute(
                    "reference_positions",
                    onnx.helper.make_attribute("reference_positions", 0.0),
                    "times this over N; 0 keeps the plain sum",
                )
            ],
        )
    )


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """For `custom_translation_table` of `torch.onnx.export`."""
    register_schema()
    op = values.Opset(DOMAIN, VERSION)

    def encoding(x: Any, codewords: Any, scale: Any, reference_positions: float = 0.0) -> Any:
        return op.Encoding(x, codewords, scale, reference_positions=float(reference_positions))

    return {torch.ops.encnet.encode.default: encoding}


def add_function(model: onnx.ModelProto) -> None:
    """Put the function and its domain into a model that has `Encoding` nodes, each once."""
    if all((f.domain, f.name) != (DOMAIN, NAME) for f in model.functions):
        model.functions.append(function())
    if all(entry.domain != DOMAIN for entry in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, VERSION))
