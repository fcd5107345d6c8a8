"""The network's graph gives PyTorch's logits, for every head and any size."""

from pathlib import Path
from typing import Any

import numpy
import onnx
import pytest
import torch
from networks import CLASSES, copy_of, exported_network, small_network

from export.core import Network
from export.half import convolutions_to_half
from export.parity import session
from model.encnet import EncNet
from service import kernels

HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "half-pixel detail": {"detail": 8, "align_corners": False, "reference_positions": 64.0, "auxiliary": False},
    "lateral and detail at stride 16": {"detail": 8, "lateral": True, "output_stride": 16, "stage3_presence": True},
}
SIZES = [(1, 64, 96), (2, 64, 96), (1, 33, 47), (2, 7, 130), (1, 1, 1), (3, 1, 20), (1, 16, 2)]


@pytest.fixture(scope="module", params=HEADS.values(), ids=HEADS.keys())
def exported(request: pytest.FixtureRequest) -> tuple[EncNet, onnx.ModelProto]:
    return exported_network(**request.param)


def largest_difference(
    network: EncNet, model: onnx.ModelProto, batch: int, height: int, width: int
) -> tuple[float, float]:
    """Of the logits and of the presence logits, which are of order 10."""
    image = torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(height * width))
    with torch.inference_mode():
        expected = network(image)
    logits, presence = session(model.SerializeToString()).run(["logits", "presence_logits"], {"image": image.numpy()})
    assert logits.shape == (batch, CLASSES, height, width)
    assert logits.dtype == presence.dtype == numpy.float32
    return (
        float(numpy.abs(logits - expected.logits.numpy()).max()),
        float(numpy.abs(presence - expected.presence_logits.numpy()).max()),
    )


def test_logits_of_order_ten_agree_within_a_thousandth(exported: tuple[EncNet, onnx.ModelProto]) -> None:
    network, model = exported
    for size in SIZES:
        assert max(largest_difference(network, model, *size)) < 1e-3, size


def test_file_is_valid_and_holds_the_used_weights_once(exported: tuple[EncNet, onnx.ModelProto]) -> None:
    network, model = exported
    onnx.checker.check_model(model, full_check=True)
    used = sum(
        parameter.numel()
        for name, parameter in network.named_parameters()
        if not name.startswith(("aux.", "stage3.")) and ".bn" not in name
    )
    assert 4 * used <= model.ByteSize() < 4.02 * used + 100_000


def test_encoding_stays_one_node_with_its_attribute(exported: tuple[EncNet, onnx.ModelProto]) -> None:
    network, model = exported
    (node,) = [node for node in model.graph.node if node.domain == "encnet"]
    assert node.op_type == "Encoding"
    assert {a.name: a.f for a in node.attribute} == {"reference_positions": network.config.reference_positions}
    assert [(f.domain, f.name) for f in model.functions] == [("encnet", "Encoding")]


def test_the_network_that_is_given_is_left_alone() -> None:
    network = small_network(stage3_presence=True).train()
    exported = Network(network)
    assert not exported.network.training
    assert exported.network.aux is None
    assert exported.network.stage3 is None
    assert network.training
    assert network.aux is not None
    assert network.stage3 is not None


def test_no_traces_of_the_machine(exported: tuple[EncNet, onnx.ModelProto]) -> None:
    _, model = exported
    assert str(Path(__file__).parents[2]).encode() not in model.SerializeToString()
    assert b"stack_trace" not in model.SerializeToString()


def test_half_precision(exported: tuple[EncNet, onnx.ModelProto]) -> None:
    network, single = exported
    half = copy_of(single)
    convolutions_to_half(half.graph)
    onnx.checker.check_model(half, full_check=True)
    assert half.ByteSize() < 0.52 * single.ByteSize()
    kinds = {t.name: t.data_type for t in half.graph.initializer}
    makers = {name: node for node in half.graph.node for name in node.output}
    (encoding,) = [node for node in half.graph.node if node.op_type == "Encoding"]
    rectified = makers[encoding.input[0]]
    assert (rectified.op_type, makers[rectified.input[0]].op_type) == ("Relu", "Conv"), "no copy in float32 between"
    assert [kinds[name] for name in encoding.input[1:]] == [onnx.TensorProto.FLOAT] * 2
    for node in half.graph.node:
        if node.op_type == "Conv":
            assert kinds[node.input[1]] == onnx.TensorProto.FLOAT16
        if node.op_type in ("Encoding", "Gemm", "BatchNormalization"):
            assert all(kinds.get(name) != onnx.TensorProto.FLOAT16 for name in node.input)
    for size in SIZES[:3]:
        logits, presence = largest_difference(network, half, *size)
        assert logits < 0.1
        assert presence < 0.1


@pytest.mark.skipif(not kernels.LIBRARY.exists(), reason="no compiled kernel (make kernels)")
def test_the_compiled_kernel_takes_features_in_half_precision() -> None:
    """Its answers are those of the body in the file, far closer than half precision is to full."""
    half = copy_of(exported_network()[1])
    convolutions_to_half(half.graph)
    data = half.SerializeToString()
    image = torch.randn(2, 3, 48, 64, generator=torch.Generator().manual_seed(3)).numpy()
    with_body, with_kernel = (
        session(data, library).run(["logits", "presence_logits"], {"image": image})
        for library in (None, kernels.LIBRARY)
    )
    for found, expected in zip(with_kernel, with_body, strict=True):
        numpy.testing.assert_allclose(found, expected, atol=1e-3)


def test_half_keeps_an_initializer_that_others_read() -> None:
    """One tensor feeds a convolution's bias and a float32 node: each reads it in its own type."""
    helper, floats = onnx.helper, onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [
            helper.make_node("Softplus", ["shared"], ["soft"]),
            helper.make_node("Conv", ["x", "weight", "shared"], ["convolved"]),
            helper.make_node("GlobalAveragePool", ["convolved"], ["pooled"]),
            helper.make_node("Flatten", ["pooled"], ["flat"]),
            helper.make_node("Sub", ["flat", "soft"], ["y"]),
        ],
        "shared",
        [helper.make_tensor_value_info("x", floats, [1, 1, 4, 4])],
        [helper.make_tensor_value_info("y", floats, [1, 2])],
        [
            helper.make_tensor("weight", floats, [2, 1, 1, 1], [1.0, 2.0]),
            helper.make_tensor("shared", floats, [2], [0.1, 0.2]),
        ],
    )
    convolutions_to_half(graph)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    (y,) = session(model.SerializeToString()).run(None, {"x": numpy.ones((1, 1, 4, 4), numpy.float32)})
    bias = numpy.array([0.1, 0.2])
    numpy.testing.assert_allclose(y[0], [1, 2] + bias - numpy.log1p(numpy.exp(bias)), atol=2e-3)
    assert {t.name: t.data_type for t in graph.initializer}["shared"] == floats
