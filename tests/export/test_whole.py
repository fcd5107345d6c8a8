"""The whole graph is `model.predict.predict`: views, merging, mask, for any size, batch and list of scales."""

import json
import math
from collections.abc import Iterator
from typing import Any

import numpy
import onnx
import onnxruntime
import pytest
import torch
from networks import CLASSES, MEAN, STD, copy_of, exported_network, pictures, small_checkpoint, small_network

from export.errors import ExportError
from export.metadata import describe, properties
from export.parity import session
from export.whole import subgraphs, whole_model
from model.calibration import Calibration
from model.encnet import EncNet
from model.predict import Prediction, predict, view_size

BASE_SIZE = 64
HEADS: list[dict[str, Any]] = [
    {},
    {"detail": 8, "align_corners": False, "reference_positions": 64.0, "auxiliary": False},
]
Exported = tuple[EncNet, onnx.ModelProto, onnxruntime.InferenceSession]


@pytest.fixture(scope="module", params=HEADS, ids=["align_corners", "half_pixel"])
def exported(request: pytest.FixtureRequest) -> Exported:
    network, core = exported_network(**request.param)
    align_corners = network.config.align_corners
    model = whole_model(core, mean=MEAN, std=STD, base_size=BASE_SIZE, align_corners=align_corners)
    return network, model, session(model.SerializeToString())


def run(runtime: onnxruntime.InferenceSession, image: numpy.ndarray, scales: tuple[float, ...], flip: bool) -> list:
    feeds = {"image": image, "scales": numpy.array(scales, numpy.float32), "flip": numpy.array(flip)}
    return runtime.run(["mask", "presence", "probabilities"], feeds)


def twin(network: EncNet, image: numpy.ndarray, scales: tuple[float, ...], flip: bool) -> Prediction:
    return predict(network, torch.from_numpy(image), mean=MEAN, std=STD, base_size=BASE_SIZE, scales=scales, flip=flip)


@pytest.mark.parametrize("flip", [False, True], ids=["plain", "mirrored"])
@pytest.mark.parametrize("scales", [(1.0,), (0.5, 0.7, 1.3)], ids=["one scale", "three scales"])
@pytest.mark.parametrize("size", [(1, 64, 48), (2, 37, 61), (3, 100, 90), (1, 1, 1), (2, 2, 90)])
def test_equals_predict(exported: Exported, size: tuple[int, int, int], scales: tuple[float, ...], flip: bool) -> None:
    network, _, runtime = exported
    image = pictures(*size)
    mask, presence, probabilities = run(runtime, image, scales, flip)
    expected = twin(network, image, scales, flip)
    batch, height, width = size
    assert mask.shape == (batch, height, width)
    assert mask.dtype == numpy.uint8
    assert presence.shape == (batch, CLASSES)
    assert probabilities.shape == (batch, CLASSES, height, width)
    assert presence.dtype == probabilities.dtype == numpy.float32
    numpy.testing.assert_allclose(probabilities, expected.probabilities.numpy(), atol=5e-4)
    numpy.testing.assert_allclose(presence, expected.presence.numpy(), atol=1e-4)
    assert (mask == probabilities.argmax(1)).all()
    assert (mask == expected.probabilities.argmax(1).numpy()).mean() >= 0.999
    numpy.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-5)


CALIBRATION = Calibration((0.5, 2.0, 1e-5, 1.0, 30.0), (-1.25, 1e-7, 3.0, 0.0, -2.0), "platt", 20)


@pytest.mark.parametrize("flip", [False, True], ids=["plain", "mirrored"])
def test_calibrated_presence_equals_predict(flip: bool) -> None:
    network, core = exported_network()
    model = whole_model(core, mean=MEAN, std=STD, base_size=BASE_SIZE, align_corners=True, calibration=CALIBRATION)
    onnx.checker.check_model(model, full_check=True)
    plain = whole_model(core, mean=MEAN, std=STD, base_size=BASE_SIZE, align_corners=True)
    image, scales = pictures(2, 37, 61), (0.5, 1.3)
    mask, presence, probabilities = run(session(model.SerializeToString()), image, scales, flip)
    expected = predict(
        network,
        torch.from_numpy(image),
        mean=MEAN,
        std=STD,
        base_size=BASE_SIZE,
        scales=scales,
        flip=flip,
        calibration=CALIBRATION,
    )
    numpy.testing.assert_allclose(presence, expected.presence.numpy(), atol=1e-3)
    before = run(session(plain.SerializeToString()), image, scales, flip)
    assert numpy.abs(presence - before[1]).max() > 0.1
    assert (mask == before[0]).all()
    assert (probabilities == before[2]).all()


def test_without_a_calibration_the_graph_has_no_node_for_one(exported: Exported) -> None:
    _, model, _ = exported
    nodes = [node for _, node in nodes_with_depth(model.graph)]
    (sigmoid,) = [node for node in nodes if list(node.output) == ["sigmoid"]]
    assert list(sigmoid.input) == ["presence_logits"]
    assert not [name for node in nodes for name in node.input if name in ("presence_scale", "presence_bias")]


def test_a_mirrored_picture_gets_the_mirrored_mask(exported: Exported) -> None:
    """Views and their mirror images count alike, so mirroring the picture mirrors the answer."""
    _, _, runtime = exported
    image = pictures(1, 40, 56)
    _, presence, probabilities = run(runtime, image, (1.0,), True)
    _, other_presence, other = run(runtime, numpy.ascontiguousarray(image[:, :, ::-1]), (1.0,), True)
    numpy.testing.assert_allclose(other[..., ::-1], probabilities, atol=1e-3)
    numpy.testing.assert_allclose(other_presence, presence, atol=1e-3)


def test_pictures_of_a_batch_do_not_mix(exported: Exported) -> None:
    _, _, runtime = exported
    image = pictures(3, 40, 56)
    together = run(runtime, image, (0.5, 1.0), True)
    for index in range(3):
        alone = run(runtime, image[index : index + 1], (0.5, 1.0), True)
        numpy.testing.assert_allclose(together[2][index], alone[2][0], atol=1e-4)
        numpy.testing.assert_allclose(together[1][index], alone[1][0], atol=1e-4)


@pytest.mark.parametrize("base_size", [480, 520, 1000, 2048])
def test_view_sizes_are_the_twins(base_size: int) -> None:
    """Thousands of sizes and scales through the graph's own arithmetic; it is given the scales as float32."""
    model = size_model(base_size)
    runtime = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    random = numpy.random.default_rng(base_size)
    scales = [index / 100 for index in range(1, 301, 7)] + [0.7, 1.1, 1.3, 1 / 3, 2 / 3, 1e-4]
    for scale in scales:
        for height, width in random.integers(1, 3000, (10, 2)):
            size = numpy.array([height, width], numpy.int64)
            (found,) = runtime.run(None, {"size": size, "scales": numpy.array([scale], numpy.float32)})
            assert tuple(found) == view_size(int(height), int(width), base_size, scale), (height, width, scale)


@pytest.mark.parametrize(("base_size", "scale", "long_side"), [(480, 0.7, 336), (480, 1.1, 528), (1000, 0.3, 300)])
def test_rounding_of_float32_scales_adds_no_pixel(base_size: int, scale: float, long_side: int) -> None:
    assert view_size(100, 200, base_size, scale) == (long_side // 2, long_side)
    assert view_size(300, 200, base_size, scale)[0] == long_side


def test_fractions_of_a_pixel_round_up() -> None:
    assert view_size(10, 20, 100, 0.5051)[1] == 51
    assert view_size(1, 1000, 100, 0.5) == (1, 50)


def size_model(base_size: int) -> onnx.ModelProto:
    """The part of the loop's body that computes a view's size, as a graph of its own."""
    core = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 18]> core (float[N,3,H,W] image) =>
        (float[N,3,H,W] logits, float[N,3] presence_logits)
        { logits = Identity (image) presence_logits = ReduceMax <keepdims = 0> (image) }"""
    )
    model = whole_model(core, mean=MEAN, std=STD, base_size=base_size, align_corners=True)
    body = next(graph for graph in subgraphs(model.graph) if graph.name == "at_one_scale")
    wanted, nodes = {"view_size"}, []
    for node in reversed([*model.graph.node, *body.node]):
        if wanted & set(node.output) and node.output[0] != "size":
            nodes.insert(0, node)
            wanted |= set(node.input)
    helper = onnx.helper
    graph = helper.make_graph(
        nodes,
        "view_size",
        [
            helper.make_tensor_value_info("size", onnx.TensorProto.INT64, [2]),
            helper.make_tensor_value_info("scales", onnx.TensorProto.FLOAT, [1]),
        ],
        [helper.make_tensor_value_info("view_size", onnx.TensorProto.INT64, [2])],
        [
            *(tensor for tensor in model.graph.initializer if tensor.name in wanted),
            helper.make_tensor("i", onnx.TensorProto.INT64, [], [0]),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def nodes_with_depth(graph: onnx.GraphProto, depth: int = 0) -> Iterator[tuple[int, onnx.NodeProto]]:
    for node in graph.node:
        yield depth, node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from nodes_with_depth(attribute.g, depth + 1)


def test_encoding_is_one_node_inside_the_loop(exported: Exported) -> None:
    _, model, _ = exported
    found = [(depth, node.domain, node.op_type) for depth, node in nodes_with_depth(model.graph) if node.domain]
    assert found == [(1, "encnet", "Encoding")]
    assert [(f.domain, f.name) for f in model.functions] == [("encnet", "Encoding")]


@pytest.mark.parametrize("head", HEADS, ids=["align_corners", "half_pixel"])
def test_weights_stand_once(head: dict[str, Any]) -> None:
    _, core = exported_network(**head)
    model = whole_model(core, mean=MEAN, std=STD, base_size=BASE_SIZE, align_corners=True)
    assert model.ByteSize() < core.ByteSize() + 20_000
    names = [tensor.name for graph in (model.graph, *subgraphs(model.graph)) for tensor in graph.initializer]
    assert len(names) == len(set(names))
    assert {tensor.name for tensor in core.graph.initializer} <= set(names)


def test_scales_that_the_graph_cannot_refuse(exported: Exported) -> None:
    """As the README says: none give zeros, and what is no positive number a view of one pixel."""
    _, _, runtime = exported
    image = pictures(1, 20, 30)
    mask, presence, probabilities = run(runtime, image, (), False)
    assert not mask.any() and not presence.any() and not probabilities.any()
    smallest = run(runtime, image, (1 / BASE_SIZE,), False)
    for scale in (math.nan, 0.0, -1.0):
        for found, expected in zip(run(runtime, image, (scale,), False), smallest, strict=True):
            numpy.testing.assert_array_equal(found, expected)


def test_interface(exported: Exported) -> None:
    _, model, runtime = exported
    onnx.checker.check_model(model, full_check=True)
    assert {value.name: (value.type, value.shape) for value in runtime.get_inputs()} == {
        "image": ("tensor(uint8)", ["N", "H", "W", 3]),
        "scales": ("tensor(float)", ["S"]),
        "flip": ("tensor(bool)", []),
    }
    assert {value.name: (value.type, value.shape) for value in runtime.get_outputs()} == {
        "mask": ("tensor(uint8)", ["N", "H", "W"]),
        "presence": ("tensor(float)", ["N", CLASSES]),
        "probabilities": ("tensor(float)", ["N", CLASSES, "H", "W"]),
    }


def test_above_255_classes_the_mask_is_uint16() -> None:
    core = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 18]> core (float[N,3,H,W] image) =>
        (float[N,300,H,W] logits, float[N,300] presence_logits)
        {
            axis = Constant <value_ints = [1]> ()
            none = Constant <value_float = 0.0> ()
            brightest = ReduceMax (image, axis)
            zeros = Mul (brightest, none)
            ramp = Constant <value_floats = [RAMP]> ()
            column = Constant <value_ints = [1, 300, 1, 1]> ()
            bias = Reshape (ramp, column)
            logits = Add (zeros, bias)
            pooled = GlobalMaxPool (logits)
            presence_logits = Flatten (pooled)
        }""".replace("RAMP", ", ".join("9.0" if index == 280 else "0.0" for index in range(300)))
    )
    runtime = session(whole_model(core, mean=MEAN, std=STD, base_size=64, align_corners=True).SerializeToString())
    mask, _, _ = run(runtime, pictures(1, 20, 30), (1.0,), False)
    assert mask.dtype == numpy.uint16
    assert (mask == 280).all()


@pytest.mark.parametrize(("classes", "mask_type"), [(255, onnx.TensorProto.UINT8), (256, onnx.TensorProto.UINT16)])
def test_a_mask_of_8_bits_has_room_for_255_classes_and_255_itself(classes: int, mask_type: int) -> None:
    """The service and the label maps of training keep 255 for "no class"."""
    core = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 18]> core (float[N,3,H,W] image) =>
        (float[N,COUNT,H,W] logits, float[N,COUNT] presence_logits)
        { logits = Identity (image) presence_logits = Identity (image) }""".replace("COUNT", str(classes))
    )
    model = whole_model(core, mean=MEAN, std=STD, base_size=64, align_corners=True)
    assert {value.name: value.type.tensor_type.elem_type for value in model.graph.output}["mask"] == mask_type


def test_logits_too_large_for_an_exponential_in_float32_overflow_nothing() -> None:
    """Half precision and long training make logits beyond 88, whose exponential is infinite."""
    core = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 18]> core (float[N,3,H,W] image) =>
        (float[N,3,H,W] logits, float[N,3] presence_logits)
        <float thousand = {1000.0}>
        { logits = Mul (image, thousand) pooled = GlobalMaxPool (image) presence_logits = Flatten (pooled) }"""
    )
    runtime = session(whole_model(core, mean=MEAN, std=STD, base_size=30, align_corners=True).SerializeToString())
    image = pictures(1, 20, 30)
    mask, _, probabilities = run(runtime, image, (1.0,), True)
    brightest = (image / 255.0 - MEAN) / STD
    assert numpy.abs(1000 * brightest).max() > 88
    numpy.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-5)
    assert (mask == brightest.argmax(3)).mean() > 0.99


def test_more_classes_than_a_mask_holds_are_refused() -> None:
    core = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 18]> core (float[N,3,H,W] image) =>
        (float[N,65536,H,W] logits, float[N,65536] presence_logits)
        { logits = Identity (image) presence_logits = Identity (image) }"""
    )
    with pytest.raises(ExportError, match="65535"):
        whole_model(core, mean=MEAN, std=STD, base_size=64, align_corners=True)


def test_metadata_says_what_the_checkpoint_says(exported: Exported) -> None:
    network, model, _ = exported
    checkpoint = small_checkpoint(network, licence="CC0", description="a test", sha256="ab" * 32)
    copied = copy_of(model)
    describe(copied, properties(checkpoint, whole=True, fp16=False))
    found = session(copied.SerializeToString()).get_modelmeta()
    values = found.custom_metadata_map
    assert found.producer_name == "encnet-serve"
    assert values["format"] == "encnet-serve/1"
    assert values["graph"] == "whole"
    assert values["name"] == "small"
    assert json.loads(values["classes"]) == checkpoint.classes
    assert json.loads(values["palette"]) == checkpoint.palette
    assert json.loads(values["mean"]) == list(MEAN)
    assert json.loads(values["std"]) == list(STD)
    assert int(values["base_size"]) == 64
    assert json.loads(values["scales"]) == [0.5, 1.0]
    assert values["flip"] == "true"
    assert values["align_corners"] == ("true" if network.config.align_corners else "false")
    assert math.isclose(float(values["reference_positions"]), network.config.reference_positions)
    assert values["checkpoint_sha256"] == "ab" * 32
    assert values["licence"] == "CC0"
    assert values["description"] == "a test"
    assert "antialias" in values["resize"]
    assert values["precision"] == "float32"


def test_metadata_leaves_out_what_the_checkpoint_does_not_know() -> None:
    values = properties(small_checkpoint(small_network()), whole=False, fp16=True)
    assert values["graph"] == "core"
    assert values["precision"] == "float16"
    assert {"licence", "description", "presence_scale", "presence_bias", "presence_method"}.isdisjoint(values)


def test_metadata_holds_the_calibration() -> None:
    values = properties(small_checkpoint(small_network(), calibration=CALIBRATION), whole=True, fp16=False)
    assert json.loads(values["presence_scale"]) == list(CALIBRATION.scale)
    assert json.loads(values["presence_bias"]) == list(CALIBRATION.bias)
    assert values["presence_method"] == "platt"
