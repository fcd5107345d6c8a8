"""The whole of inference as one ONNX graph, around the network: the ONNX side of `model.predict.predict`."""

from collections.abc import Collection, Iterator, Sequence

import numpy
import onnx
import onnx.parser
from onnx import numpy_helper

from export import encoding_op
from export.errors import ExportError
from model.calibration import Calibration
from model.predict import SIZE_TOLERANCE

PLACEHOLDER = "Network"

# uint8 pictures in, label map out. Each step of the loop over the scales sees the pictures at one size, and, with
# `flip`, their mirror images behind them on the batch axis; the inner loop over the one or two halves of the batch adds
# each half's softmax to the running mean, so that only one half's probabilities are held at the pictures' own size.
# The softmax is spelt out: ONNX Runtime's own, over an axis that is not the last, turns the tensor there and back,
# which on a CPU takes as long as a small network does.
# Element types in Cast: 1 float32, 7 int64, 11 float64; the views' sizes are computed in float64, as the twin does.
GRAPH = """
<ir_version: 10, opset_import: ["" : {opset}, "encnet" : 1]>
encnet_whole (uint8[N,H,W,3] image, float[S] scales, bool flip)
    => ({mask_type}[N,H,W] mask, float[N,{classes}] presence, float[N,{classes},H,W] probabilities)
<
    float[1,3,1,1] to_unit = {{{to_unit}}}, float[1,3,1,1] offset = {{{offset}}},
    double base_size = {{{base_size}}}, double size_tolerance = {{{size_tolerance}}},
    int64 one = {{1}}, int64[1] zero = {{0}}, int64[1] minus_one = {{-1}}, int64[1] two = {{2}},
    int64[1] ones = {{1}}, int64[2] axes_n_w = {{0, 3}}, int64[1] classes = {{{classes}}},
    int64[1] far = {{4611686018427387904}}, int64[1] far_back = {{-4611686018427387904}},
    bool yes = {{1}}
>
{{
    planes = Transpose <perm = [0, 3, 1, 2]> (image)
    levels = Cast <to = 1> (planes)
    unit = Mul (levels, to_unit)
    pixels = Sub (unit, offset)

    count = Shape <start = 0, end = 1> (pixels)
    size = Shape <start = 2, end = 4> (pixels)
    long_side = ReduceMax <keepdims = 1> (size)
    twice_long_side = Mul (long_side, two)

    mirrors = Cast <to = 7> (flip)
    sides = Add (mirrors, one)
    mirrored_count = Mul (count, mirrors)
    scale_count = Size (scales)
    view_count = Mul (scale_count, sides)
    view_count_float = Cast <to = 1> (view_count)
    weight = Reciprocal (view_count_float)
    sides_row = Unsqueeze (sides, zero)

    full_shape = Concat <axis = 0> (count, classes, size)
    presence_shape = Concat <axis = 0> (count, classes)
    presence_by_side = Concat <axis = 0> (sides_row, presence_shape)
    no_probabilities = ConstantOfShape <value = float[1] {{0.0}}> (full_shape)
    no_presence = ConstantOfShape <value = float[1] {{0.0}}> (presence_shape)

    probabilities, presence = Loop (scale_count, yes, no_probabilities, no_presence) <body = at_one_scale
        (int64 i, bool go_on, float[N,{classes},H,W] sum_before, float[N,{classes}] presence_before)
        => (bool go_on_out, float[N,{classes},H,W] sum_after, float[N,{classes}] presence_after)
    {{
        go_on_out = Identity (go_on)

        scale = Gather (scales, i)
        scale_exact = Cast <to = 11> (scale)
        exact_side = Mul (scale_exact, base_size)
        lowered_side = Sub (exact_side, size_tolerance)
        whole_side = Ceil (lowered_side)
        view_long_side = Cast <to = 7> (whole_side)
        scaled = Mul (size, view_long_side)
        scaled_twice = Mul (scaled, two)
        numerator = Add (scaled_twice, long_side)
        rounded = Div (numerator, twice_long_side)
        view_size = Max (rounded, ones)

        resized = Resize <mode = "linear", coordinate_transformation_mode = "half_pixel", antialias = 1,
                          exclude_outside = 1, axes = [2, 3]> (pixels, , , view_size)
        mirror_start = Concat <axis = 0> (zero, minus_one)
        mirror_end = Concat <axis = 0> (mirrored_count, far_back)
        mirror_step = Concat <axis = 0> (ones, minus_one)
        mirrored = Slice (resized, mirror_start, mirror_end, axes_n_w, mirror_step)
        views = Concat <axis = 0> (resized, mirrored)

        logits, presence_logits = encnet.{placeholder} (views)

        sum_after = Loop (sides, yes, sum_before) <body = add_one_side
            (int64 side, bool go_on_side, float[N,{classes},H,W] side_before)
            => (bool go_on_side_out, float[N,{classes},H,W] side_after)
        {{
            go_on_side_out = Identity (go_on_side)
            first = Mul (count, side)
            last = Add (first, count)
            backwards = Neg (side)
            backwards_row = Unsqueeze (backwards, zero)
            twice_backwards = Mul (backwards_row, two)
            direction = Add (twice_backwards, ones)
            edge = Mul (direction, far)
            side_start = Concat <axis = 0> (first, backwards_row)
            side_end = Concat <axis = 0> (last, edge)
            side_step = Concat <axis = 0> (ones, direction)
            side_logits = Slice (logits, side_start, side_end, axes_n_w, side_step)

            upsampled = Resize <mode = "linear", coordinate_transformation_mode = "{coordinates}", axes = [2, 3]>
                (side_logits, , , size)
            highest = ReduceMax <keepdims = 1> (upsampled, ones)
            lowered = Sub (upsampled, highest)
            raised = Exp (lowered)
            total = ReduceSum <keepdims = 1> (raised, ones)
            total_of_views = Mul (total, view_count_float)
            share = Div (raised, total_of_views)
            side_after = Add (side_before, share)
        }}>

{calibration}
        sigmoid = Sigmoid ({calibrated})
        by_side = Reshape (sigmoid, presence_by_side)
        presence_sum = ReduceSum <keepdims = 0> (by_side, zero)
        presence_share = Mul (presence_sum, weight)
        presence_after = Add (presence_before, presence_share)
    }}>

    label = ArgMax <axis = 1, keepdims = 0> (probabilities)
    mask = Cast <to = {mask_code}> (label)
}}
"""

CALIBRATION = """        scaled_presence = Mul (presence_logits, presence_scale)
        calibrated_presence = Add (scaled_presence, presence_bias)"""


def whole_model(
    core: onnx.ModelProto,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    base_size: int,
    align_corners: bool,
    calibration: Calibration | None = None,
) -> onnx.ModelProto:
    """The whole graph around the network of `core`.

    The weights stand once in the file, in the loop's body: ONNX Runtime re-arranges a convolution's weights for the
    CPU only where they stand in the same graph as the convolution, which makes the network a fifth faster.

    image uint8 (N, H, W, 3), scales float32 (S,), flip bool () -> mask uint8 (N, H, W) (uint16 above 255 classes),
    presence float32 (N, C), probabilities float32 (N, C, H, W). Presence is the mean over the views of the calibrated
    sigmoids; without a calibration the graph has no node for one. Raises ExportError above 65535 classes.
    """
    classes = core.graph.output[0].type.tensor_type.shape.dim[1].dim_value
    if classes > 65535:
        raise ExportError(f"a mask holds at most 65535 classes, the network has {classes}")
    wide = classes > 255
    text = GRAPH.format(
        opset=encoding_op.OPSET,
        placeholder=PLACEHOLDER,
        classes=classes,
        mask_type="uint16" if wide else "uint8",
        mask_code=onnx.TensorProto.UINT16 if wide else onnx.TensorProto.UINT8,
        to_unit=", ".join(repr(1 / (255 * s)) for s in std),
        offset=", ".join(repr(m / s) for m, s in zip(mean, std, strict=True)),
        base_size=float(base_size),
        size_tolerance=SIZE_TOLERANCE,
        coordinates="align_corners" if align_corners else "half_pixel",
        calibration=CALIBRATION if calibration else "",
        calibrated="calibrated_presence" if calibration else "presence_logits",
    )
    model = onnx.parser.parse_model(text)
    if calibration:
        for name, values in (("presence_scale", calibration.scale), ("presence_bias", calibration.bias)):
            model.graph.initializer.append(numpy_helper.from_array(numpy.array([values], numpy.float32), name))
    body = next(graph for graph in subgraphs(model.graph) if graph.name == "at_one_scale")
    network = core.graph
    weights = {tensor.name for tensor in network.initializer}
    inputs, outputs = ([value.name for value in values] for values in (network.input, network.output))
    insert_graph(body, PLACEHOLDER, network, inputs, outputs, "network/", kept=weights)
    encoding_op.add_function(model)
    return model


def subgraphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Every graph inside a graph's nodes, outermost first."""
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield attribute.g
                yield from subgraphs(attribute.g)


def insert_graph(
    body: onnx.GraphProto,
    placeholder: str,
    graph: onnx.GraphProto,
    inputs: Sequence[str],
    outputs: Sequence[str],
    prefix: str,
    kept: Collection[str] = (),
) -> None:
    """Put a graph's nodes and initializers in the place of the one node of that kind that stands for it.

    inputs, outputs: the graph's names for what that node reads and makes, which take the node's names; every other name
    gets the prefix, but for those that are kept.
    """
    position = next(i for i, node in enumerate(body.node) if node.op_type == placeholder)
    place = body.node[position]
    names = {"": "", **{name: name for name in kept}}
    names.update(zip((*inputs, *outputs), (*place.input, *place.output), strict=True))
    inside = onnx.GraphProto()
    inside.CopyFrom(graph)
    for part in (inside, *subgraphs(inside)):
        for value in (*part.input, *part.output, *part.initializer, *part.value_info):
            value.name = names.get(value.name, f"{prefix}{value.name}")
        for node in part.node:
            node.input[:] = [names.get(name, f"{prefix}{name}") for name in node.input]
            node.output[:] = [names.get(name, f"{prefix}{name}") for name in node.output]
    before, after = list(body.node[:position]), list(body.node[position + 1 :])
    del body.node[:]
    body.node.extend([*before, *inside.node, *after])
    body.initializer.extend(inside.initializer)
