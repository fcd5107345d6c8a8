"""The op's body in standard operators is `encode_reference`, on a stock ONNX Runtime."""

import math

import onnx
import onnx.inliner
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from export import encoding_op
from model.encoding import encode_reference


def one_node_model(reference_positions: float, x_type: int = TensorProto.FLOAT) -> onnx.ModelProto:
    node = helper.make_node(
        "Encoding",
        ["x", "codewords", "scale"],
        ["encoded"],
        domain="encnet",
        reference_positions=float(reference_positions),
    )
    graph = helper.make_graph(
        [node],
        "one_node",
        [
            helper.make_tensor_value_info("x", x_type, ["B", "D", "H", "W"]),
            helper.make_tensor_value_info("codewords", TensorProto.FLOAT, ["K", "D"]),
            helper.make_tensor_value_info("scale", TensorProto.FLOAT, ["K"]),
        ],
        [helper.make_tensor_value_info("encoded", TensorProto.FLOAT, ["B", "K", "D"])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", encoding_op.OPSET)], ir_version=10)
    encoding_op.add_function(model)
    return model


def arguments(batch: int, channels: int, codewords: int, height: int, width: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(batch + channels + codewords + height + width)
    return (
        torch.randn(batch, channels, height, width, generator=generator),
        torch.randn(codewords, channels, generator=generator) / channels**0.5,
        -torch.rand(codewords, generator=generator),
    )


def run_body(model: onnx.ModelProto, *values: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {name: value.numpy() for name, value in zip(("x", "codewords", "scale"), values, strict=True)}
    return torch.from_numpy(session.run(None, feeds)[0])


@pytest.mark.parametrize("reference_positions", [0, 1, 36.5, 3600])
@pytest.mark.parametrize(
    "shape",
    [(1, 8, 4, 6, 5), (3, 16, 32, 9, 7), (2, 5, 1, 4, 4), (2, 6, 3, 1, 1), (1, 1, 1, 1, 1), (1, 512, 32, 20, 30)],
)
def test_function_body_is_the_twin(shape: tuple[int, ...], reference_positions: float) -> None:
    values = arguments(*shape)
    expected = encode_reference(*values, reference_positions)
    found = run_body(one_node_model(reference_positions), *values)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * max(1, float(expected.abs().max())))


def test_half_precision_features_are_summed_in_float32() -> None:
    """10,000 positions of size 20: a float16 sum of squares or of residuals would overflow or lose its digits."""
    x, codewords, scale = arguments(1, 8, 4, 100, 100)
    x = (20 * x).half()
    expected = encode_reference(x, codewords, scale)
    found = run_body(one_node_model(0, TensorProto.FLOAT16), x, codewords, scale)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


def test_codeword_chosen_by_scale_and_distance() -> None:
    """By hand: with steep scales every position goes to its nearest codeword, and the residuals add up."""
    x = torch.tensor([[[[0.0, 1.0, 10.0, 12.0]]]])
    codewords, scale = torch.tensor([[0.0], [10.0]]), torch.tensor([-100.0, -100.0])
    found = run_body(one_node_model(0), x, codewords, scale)
    torch.testing.assert_close(found, torch.tensor([[[1.0], [2.0]]]))
    torch.testing.assert_close(run_body(one_node_model(8), x, codewords, scale), torch.tensor([[[2.0], [4.0]]]))


def test_nothing_as_large_as_every_residual_is_made() -> None:
    """With B, D, K and N = 2, 8, 4 and 30 no intermediate has more elements than x itself."""
    model = one_node_model(0)
    for value, shape in zip(model.graph.input, [(2, 8, 6, 5), (4, 8), (4,)], strict=True):
        value.CopyFrom(helper.make_tensor_value_info(value.name, TensorProto.FLOAT, shape))
    flat = onnx.inliner.inline_local_functions(model)
    inferred = onnx.shape_inference.infer_shapes(flat, data_prop=True)
    sizes = {
        value.name: math.prod(dim.dim_value for dim in value.type.tensor_type.shape.dim)
        for value in inferred.graph.value_info
    }
    assert len(sizes) == len([name for node in flat.graph.node for name in node.output]) - 1
    assert min(sizes.values()) > 0
    assert max(sizes.values()) == 2 * 8 * 30


def test_function_is_added_once_and_valid() -> None:
    model = one_node_model(5)
    encoding_op.add_function(model)
    assert [(f.domain, f.name) for f in model.functions] == [("encnet", "Encoding")]
    assert [entry.domain for entry in model.opset_import].count("encnet") == 1
    onnx.checker.check_model(model, full_check=True)


def test_schema_can_be_registered_again() -> None:
    encoding_op.register_schema()
    encoding_op.register_schema()
    assert onnx.defs.get_schema("Encoding", 1, "encnet").attributes["reference_positions"].default_value.f == 0
