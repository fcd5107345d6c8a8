"""The whole graph with a batch dimension on every input, as servers want it that join requests into batches.

    image uint8 (N, H, W, 3), scales float32 (N, S), flip bool (N, 1) -> mask uint8 (N, H, W), presence float32 (N, C)

In the whole graph one list of scales and one flip hold for all its pictures. Here every picture has its own: those that
ask for the same views are run together by the whole graph inside, group by group, so that a request gets what it asked
for whatever it was joined with. There is no `probabilities`.
"""

from pathlib import Path

import numpy
import onnx
import onnx.parser

from export.errors import ParityError
from export.metadata import describe
from export.parity import Case, answers, picture, session
from export.whole import insert_graph, subgraphs

# A scale beyond is taken as the nearer one, NaN as the least: a graph cannot refuse an input, and to Unique, which
# makes the groups, NaN is equal to any number, so that one request's would become everyone's.
LEAST_SCALE, MOST_SCALE = 0.25, 3.0

PLACEHOLDER = "Whole"

# Element types in Cast: 1 float32, 9 bool.
GRAPH = """
<ir_version: 10, opset_import: ["" : 18, "encnet" : 1]>
encnet_batched (uint8[N,H,W,3] image, float[N,S] scales, bool[N,1] flip)
    => ({mask}[N,H,W] mask, float[N,{classes}] presence)
<
    float least_scale = {{{least}}}, float most_scale = {{{most}}}, int64 last = {{-1}},
    int64[1] zero = {{0}}, int64[1] minus_one = {{-1}}, int64[1] classes = {{{classes}}}, bool yes = {{1}}
>
{{
    clipped_scales = Clip (scales, least_scale, most_scale)
    no_number = IsNaN (clipped_scales)
    bounded_scales = Where (no_number, least_scale, clipped_scales)
    flip_number = Cast <to = 1> (flip)
    options = Concat <axis = 1> (bounded_scales, flip_number)
    groups, first_of_group, group_of_picture = Unique <axis = 0> (options)
    group_count = Size (first_of_group)

    mask_shape = Shape <start = 0, end = 3> (image)
    count = Shape <start = 0, end = 1> (image)
    presence_shape = Concat <axis = 0> (count, classes)
    no_mask = ConstantOfShape <value = {mask}[1] {{0}}> (mask_shape)
    no_presence = ConstantOfShape <value = float[1] {{0.0}}> (presence_shape)

    mask, presence = Loop (group_count, yes, no_mask, no_presence) <body = one_group
        (int64 group, bool go_on, {mask}[N,H,W] mask_before, float[N,{classes}] presence_before)
        => (bool go_on_out, {mask}[N,H,W] mask_after, float[N,{classes}] presence_after)
    {{
        go_on_out = Identity (go_on)
        is_member = Equal (group_of_picture, group)
        member_row = NonZero (is_member)
        members = Transpose (member_row)
        group_image = GatherND (image, members)
        group_options = Gather <axis = 0> (groups, group)
        group_scales = Slice (group_options, zero, minus_one)
        group_flip_number = Gather <axis = 0> (group_options, last)
        group_flip = Cast <to = 9> (group_flip_number)

        group_mask, group_presence = encnet.{placeholder} (group_image, group_scales, group_flip)

        mask_after = ScatterND (mask_before, members, group_mask)
        presence_after = ScatterND (presence_before, members, group_presence)
    }}>
}}
"""


def batched_model(whole: onnx.ModelProto) -> onnx.ModelProto:
    """The graph described at the top of this file, around the nodes of a whole graph."""
    outputs = {value.name: value.type.tensor_type for value in whole.graph.output}
    text = GRAPH.format(
        mask="uint16" if outputs["mask"].elem_type == onnx.TensorProto.UINT16 else "uint8",
        classes=outputs["presence"].shape.dim[1].dim_value,
        least=LEAST_SCALE,
        most=MOST_SCALE,
        placeholder=PLACEHOLDER,
    )
    model = onnx.parser.parse_model(text)
    model.ir_version = whole.ir_version
    del model.opset_import[:]
    model.opset_import.extend(whole.opset_import)
    model.functions.extend(whole.functions)
    body = next(subgraphs(model.graph))
    insert_graph(body, PLACEHOLDER, whole.graph, ("image", "scales", "flip"), ("mask", "presence"), "whole/")
    values = {entry.key: entry.value for entry in whole.metadata_props}
    describe(model, {**values, "graph": "batched"})
    return model


def check_same(whole: bytes, batched: bytes, library: Path | None) -> None:
    """Run three pictures in one batch, two with the same views, and each group of them through the whole graph.

    Raises ParityError unless the answers are the same bits, and ExportError for a library that does not load or a graph
    that does not run.
    """
    image = picture(Case(3, 48, 64)).numpy()
    scales = numpy.array([[0.5, 0.25], [0.75, 0.75], [0.5, 0.25]], numpy.float32)
    flip = numpy.array([[False], [True], [False]])
    names = ["mask", "presence"]
    groups = ([0, 2], [1])
    feeds = [
        {"image": image[group], "scales": scales[group[0]], "flip": flip[group[0]].reshape(())} for group in groups
    ]
    alone, together = session(whole, library), session(batched, library)
    expected = [answers(alone, names, one) for one in feeds]
    found = answers(together, names, {"image": image, "scales": scales, "flip": flip})
    for group, wanted_ones in zip(groups, expected, strict=True):
        for name, wanted, answer in zip(names, wanted_ones, found, strict=True):
            if not numpy.array_equal(answer[group], wanted):
                raise ParityError(f"the graph for Triton and the whole graph differ in {name}; nothing is written")
