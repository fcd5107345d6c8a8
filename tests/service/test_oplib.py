"""The custom-op library for ONNX Runtime: the node runs our kernel, and nothing breaks where the library does."""

import logging
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from service import kernels
from service.engine import Engine

needs_library = pytest.mark.skipif(not kernels.LIBRARY.exists(), reason="no compiled kernel (make kernels)")

# Not the op's real body: zeros tell that ONNX Runtime took the function and not the kernel.
ZEROS = """
<domain: "encnet", opset_import: ["" : 18]>
Encoding <reference_positions: float = 0.0> (x, codewords, scale) => (encoded)
{
    zero = Constant <value_float = 0.0> ()
    encoded = Mul (codewords, zero)
}
"""


@pytest.fixture(autouse=True)
def _switched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ENCNET_KERNELS", raising=False)


def encoding_model(x_type: int = TensorProto.FLOAT, in_loop: bool = False, **attributes: float) -> bytes:
    """One node encnet::Encoding, alone or in the body of a loop of one turn, and the function above."""
    float32 = TensorProto.FLOAT
    node = helper.make_node("Encoding", ["x", "codewords", "scale"], ["encoded"], domain="encnet", **attributes)
    nodes = [node]
    if in_loop:
        body = helper.make_graph(
            [node, helper.make_node("Identity", ["go_on"], ["go_on_out"])],
            "body",
            [
                helper.make_tensor_value_info("i", TensorProto.INT64, []),
                helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            ],
            [
                helper.make_tensor_value_info("go_on_out", TensorProto.BOOL, []),
                helper.make_tensor_value_info("encoded", float32, None),
            ],
        )
        nodes = [
            helper.make_node("Constant", [], ["one"], value_int=1),
            helper.make_node("Constant", [], ["yes"], value=onnx.numpy_helper.from_array(np.array(True))),
            helper.make_node("Loop", ["one", "yes"], ["turns"], body=body),
            helper.make_node("Constant", [], ["axis"], value_ints=[0]),
            helper.make_node("Squeeze", ["turns", "axis"], ["result"]),
        ]
    graph = helper.make_graph(
        nodes,
        "encoding",
        [
            helper.make_tensor_value_info("x", x_type, ["B", "D", "H", "W"]),
            helper.make_tensor_value_info("codewords", float32, ["K", "D"]),
            helper.make_tensor_value_info("scale", float32, ["K"]),
        ],
        [helper.make_tensor_value_info("result" if in_loop else "encoded", float32, None)],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("encnet", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    model.functions.append(onnx.parser.parse_function(ZEROS))
    return model.SerializeToString()


def session(model: bytes, threads: int = 1) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    kernels.register(options)
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def feeds(batch: int = 2, height: int = 25, width: int = 41, dtype: type = np.float32) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        "x": random.standard_normal((batch, 8, height, width)).astype(dtype),
        "codewords": random.standard_normal((5, 8)).astype(np.float32),
        "scale": -random.random(5).astype(np.float32),
    }


def expected(inputs: dict[str, np.ndarray], reference_positions: float = 0.0) -> np.ndarray:
    """Equation 1 of the paper in float64, as it is written."""
    x, codewords, scale = (array.astype(np.float64) for array in inputs.values())
    residuals = x.reshape(*x.shape[:2], -1).transpose(0, 2, 1)[:, :, None] - codewords
    logits = scale * np.square(residuals).sum(-1)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    encoded = (weights[..., None] * residuals).sum(1)
    return encoded * (reference_positions / residuals.shape[1] if reference_positions else 1)


@needs_library
@pytest.mark.parametrize("in_loop", [False, True])
@pytest.mark.parametrize("attributes", [{}, {"reference_positions": 0.0}, {"reference_positions": 300.0}])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_the_node_runs_the_kernel(dtype: type, attributes: dict[str, float], in_loop: bool) -> None:
    inputs = feeds(dtype=dtype)
    x_type = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    (encoded,) = session(encoding_model(x_type, in_loop, **attributes)).run(None, inputs)
    wanted = expected(inputs, **attributes)
    assert encoded.dtype == np.float32
    np.testing.assert_allclose(encoded, wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())


@needs_library
def test_the_number_of_threads_changes_no_bit_and_sessions_may_share_the_library() -> None:
    inputs = feeds(batch=1, height=64, width=64)
    sessions = [session(encoding_model(), threads) for threads in (1, 2)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda turn: sessions[turn % 2].run(None, inputs)[0], range(8)))
    for result in results:
        np.testing.assert_array_equal(result, results[0])


@needs_library
def test_an_empty_batch() -> None:
    assert session(encoding_model()).run(None, feeds(batch=0))[0].shape == (0, 5, 8)


@needs_library
@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("x", (8, 3, 5), r"x must be \(B, D, H, W\), got \[8, 3, 5\]"),
        ("codewords", (5, 7), r"codewords must be \(K, D\) with x's D, got \[5, 7\]; x is \[2, 8, 25, 41\]"),
        ("scale", (3,), r"scale must be \(K,\) with the codewords' K, got \[3\]; codewords is \[5, 8\]"),
    ],
)
def test_wrong_shapes_are_named(name: str, shape: tuple[int, ...], words: str) -> None:
    model = onnx.load_from_string(encoding_model())
    for value in model.graph.input:
        value.type.tensor_type.ClearField("shape")
    loaded = session(model.SerializeToString())
    with pytest.raises(Exception, match=words):
        loaded.run(None, feeds() | {name: np.zeros(shape, np.float32)})


@pytest.mark.skipif(not kernels.CUDA_LIBRARY.exists(), reason="no compiled kernel for CUDA")
def test_where_cuda_does_not_start_the_library_for_gpus_runs_the_cpu_kernel() -> None:
    options = ort.SessionOptions()
    assert kernels.register(options, cuda=True)
    inputs = feeds()
    (encoded,) = ort.InferenceSession(encoding_model(), options, providers=["CPUExecutionProvider"]).run(None, inputs)
    wanted = expected(inputs)
    np.testing.assert_allclose(encoded, wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())


def runs_the_function() -> bool:
    return not session(encoding_model()).run(None, feeds())[0].any()


def test_switched_off_the_function_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENCNET_KERNELS", "off")
    assert runs_the_function()


@pytest.mark.parametrize("fault", ["missing", "no library", "cut short", "another library"])
def test_without_a_sound_library_one_line_is_logged_and_the_function_runs(
    fault: str,
    tmp_path: Path,
    model_file: Path,
    quadrants: np.ndarray,
    quadrants_mask: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    broken = tmp_path / "libencnet_ort.so"
    if fault == "no library":
        broken.write_text("not a library")
    elif fault == "cut short":
        broken.write_bytes(b"\x7fELF\x02\x01\x01" + bytes(100))
    elif fault == "another library":
        other = kernels.LIBRARY.with_name("libencnet_torch.so")
        if not other.exists():
            pytest.skip("no compiled kernel (make kernels)")
        shutil.copy(other, broken)
    monkeypatch.setattr(kernels, "LIBRARY", broken)
    with caplog.at_level(logging.INFO, "service"):
        assert runs_the_function()
        assert len(caplog.records) == 1
        assert caplog.records[0].levelno == (logging.INFO if fault == "missing" else logging.WARNING)
        np.testing.assert_array_equal(Engine(model_file, "cpu", 1).segment(quadrants).mask, quadrants_mask)
    assert len(caplog.records) == 2
