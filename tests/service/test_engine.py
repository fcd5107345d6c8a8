"""Promise: the engine takes everything from the .onnx file and refuses what is not ours with a sentence."""

import ctypes
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Timer
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper
from tiny_model import CLASSES, GAIN, METADATA, PALETTE, tiny_model

from service.engine import Engine, ModelError, Stopped
from service.models import Models
from service.settings import EMBEDDED_MODEL, Settings

REQUIRED = [key for key in METADATA if key != "graph"]


def refusal(path: Path, device: str = "cpu") -> str:
    with pytest.raises(ModelError) as caught:
        Engine(path, device=device)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---- segmenting


def test_mask_and_presence_are_those_known_by_hand(
    engine: Engine, quadrants: np.ndarray, quadrants_mask: np.ndarray
) -> None:
    result = engine.segment(quadrants)
    np.testing.assert_array_equal(result.mask, quadrants_mask)
    assert result.mask.dtype == np.uint8
    assert result.presence.dtype == np.float32
    expected = 1 / (1 + np.exp(-GAIN * np.array([0.5, 1, 1, 1])))
    np.testing.assert_allclose(result.presence, expected, rtol=1e-6)
    assert result.infer_ms > 0


def test_a_class_that_is_absent_has_a_low_score(engine: Engine) -> None:
    result = engine.segment(np.full((8, 8, 3), (255, 0, 0), np.uint8))
    assert (result.mask == 1).all()
    np.testing.assert_allclose(result.presence, 1 / (1 + np.exp(-GAIN * np.array([0.25, 1, -0.5, -0.5]))), rtol=1e-5)


def test_scales_are_used(engine: Engine) -> None:
    dot = np.zeros((9, 11, 3), np.uint8)
    dot[4, 5] = 255, 0, 0
    assert engine.segment(dot, scales=[1.0]).mask[4, 5] == 1
    assert engine.segment(dot, scales=[0.25]).mask[4, 5] == 0


def test_flip_of_a_mirrored_picture_is_the_mirrored_answer(engine: Engine, quadrants: np.ndarray) -> None:
    noisy = np.random.default_rng(0).integers(0, 255, quadrants.shape, np.uint8)
    assert not np.array_equal(
        engine.segment(noisy, [0.5], flip=True).mask, engine.segment(noisy, [0.5], flip=False).mask
    )
    there = engine.segment(noisy, [0.5], flip=True)
    back = engine.segment(noisy[:, ::-1], [0.5], flip=True)
    np.testing.assert_array_equal(back.mask[:, ::-1], there.mask)


def test_defaults_are_the_files_own(changed_model: Callable[..., Path], quadrants: np.ndarray) -> None:
    result = Engine(changed_model(scales="[0.5, 1.0]", flip="true"), "cpu").segment(quadrants)
    assert result.scales == (0.5, 1.0)
    assert result.flip is True
    result = Engine(changed_model(scales="[0.5, 1.0]", flip="true"), "cpu").segment(quadrants, [1.0], False)
    assert result.scales == (1.0,)
    assert result.flip is False


def test_many_classes_give_a_16_bit_mask(tmp_path: Path, quadrants: np.ndarray, quadrants_mask: np.ndarray) -> None:
    model = tiny_model(classes=300)
    names = [f"class{index}" for index in range(300)]
    helper.set_model_props(
        model, METADATA | {"classes": str(names).replace("'", '"'), "palette": str([[1, 2, 3]] * 300)}
    )
    onnx.save(model, tmp_path / "many.onnx")
    result = Engine(tmp_path / "many.onnx", "cpu").segment(quadrants)
    assert result.mask.dtype == np.uint16
    np.testing.assert_array_equal(result.mask, quadrants_mask)
    assert result.presence.shape == (300,)


def test_threads_may_share_an_engine(engine: Engine, quadrants: np.ndarray) -> None:
    pictures = [np.roll(quadrants, shift, axis=1) for shift in range(16)]
    alone = [engine.segment(picture).mask for picture in pictures]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda picture: engine.segment(picture).mask, pictures))
    np.testing.assert_array_equal(together, alone)


def test_a_lane_gives_the_same_bits_as_all_threads(model_file: Path, quadrants: np.ndarray) -> None:
    engine = Engine(model_file, "cpu", threads=2, lanes=2)
    assert engine.lanes == 2
    for options in ({}, {"window": 16, "probabilities": True}):
        plan = engine.plan((0.5, 1.0), True, **options)
        (alone,), (beside,) = engine.run([quadrants], plan), engine.run([quadrants], plan, beside=True)
        np.testing.assert_array_equal(beside.mask, alone.mask)
        np.testing.assert_array_equal(beside.presence, alone.presence)


def test_there_are_no_more_lanes_than_threads(model_file: Path) -> None:
    assert Engine(model_file, "cpu", threads=1, lanes=2).lanes == 1


def test_a_view_of_an_array_will_do(engine: Engine, quadrants: np.ndarray, quadrants_mask: np.ndarray) -> None:
    np.testing.assert_array_equal(engine.segment(quadrants[::-1]).mask, quadrants_mask[::-1])


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
    ],
)
def test_arrays_of_another_kind_are_refused(engine: Engine, image: np.ndarray) -> None:
    with pytest.raises(ValueError, match="uint8"):
        engine.segment(image)


@pytest.mark.parametrize("scales", [[], [0.0], [-1.0], [float("nan")]])
def test_impossible_scales_are_refused(engine: Engine, quadrants: np.ndarray, scales: list[float]) -> None:
    with pytest.raises(ValueError, match="scales"):
        engine.segment(quadrants, scales)


def test_warm_up_runs(engine: Engine) -> None:
    engine.warm_up()


# ---- metadata


def test_metadata_is_read(engine: Engine, model_file: Path) -> None:
    assert engine.metadata.name == "encnet-tiny"
    assert list(engine.metadata.classes) == CLASSES
    assert [list(colour) for colour in engine.metadata.palette] == PALETTE
    assert engine.metadata.base_size == 64
    assert engine.metadata.licence is None
    assert engine.sha256 == hashlib.sha256(model_file.read_bytes()).hexdigest()
    assert engine.device == "cpu"


@pytest.mark.parametrize("key", REQUIRED)
def test_a_missing_key_is_named(changed_model: Callable[..., Path], key: str) -> None:
    message = refusal(changed_model(**{key: None}))
    assert key in message
    assert "python -m export CHECKPOINT --output FILE.onnx" in message


def test_a_foreign_onnx_file_is_refused(changed_model: Callable[..., Path]) -> None:
    message = refusal(changed_model(**dict.fromkeys(METADATA)))
    assert "not an EncNet Serve model" in message
    assert "python -m export" in message


def test_a_core_graph_is_refused(changed_model: Callable[..., Path]) -> None:
    message = refusal(changed_model(graph="core"))
    assert "core" in message
    assert "python -m export" in message


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("format", "encnet-serve/9"),
        ("classes", "not json"),
        ("classes", "[]"),
        ("palette", "[[0, 0, 0]]"),
        ("palette", "[[0, 0, 0], [0, 0, 256], [1, 1, 1], [2, 2, 2]]"),
        ("base_size", "0"),
        ("base_size", "9" * 400),
        ("scales", "[]"),
        ("scales", "[0]"),
        ("scales", "[1, NaN]"),
        ("scales", "[Infinity]"),
        ("scales", "[1e300]"),
        ("flip", "perhaps"),
        ("mean", "[0.5]"),
    ],
)
def test_a_value_that_cannot_be_is_refused(changed_model: Callable[..., Path], key: str, text: str) -> None:
    assert key in refusal(changed_model(**{key: text}))


@pytest.mark.parametrize("text", [b"encnet-tiny", b"presence", b"flip"])
def test_text_that_is_not_utf_8_is_refused(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "latin.onnx"
    path.write_bytes(tiny_model().SerializeToString().replace(text, b"\xe9" + text[1:]))
    assert "no text in UTF-8" in refusal(path)


def test_the_calibration_is_read(changed_model: Callable[..., Path], engine: Engine) -> None:
    calibrated = Engine(changed_model(presence_scale="[1, 2.5, 1, 1]", presence_bias="[0, -1, 0, 0]"), "cpu")
    assert calibrated.metadata.presence_scale == (1, 2.5, 1, 1)
    assert calibrated.metadata.presence_bias == (0, -1, 0, 0)
    assert engine.metadata.presence_scale is None


@pytest.mark.parametrize(
    ("scale", "bias", "said"),
    [
        ("[1, 1, 1, 1]", None, "need 4 numbers each, one for each class, have 4 and none"),
        ("[1, 1, 1]", "[0, 0, 0]", "have 3 and 3"),
        ("[1, 1, 1, 1]", "[0, 0, 0]", "have 4 and 3"),
        ("[1, 1, 1, 0]", "[0, 0, 0, 0]", "presence_scale must be finite numbers above 0"),
        ("[1, 1, 1, NaN]", "[0, 0, 0, 0]", "presence_scale"),
        ("[1, 1, 1, 1]", "[0, 0, 0, Infinity]", "presence_bias"),
        ("one", "[0, 0, 0, 0]", "presence_scale"),
        ("[1, 1, 1, 1]", '["a", 0, 0, 0]', "presence_bias"),
    ],
)
def test_a_malformed_calibration_is_refused(
    changed_model: Callable[..., Path], scale: str, bias: str | None, said: str
) -> None:
    message = refusal(changed_model(presence_scale=scale, presence_bias=bias))
    assert "metadata that cannot be used" in message
    assert said in message


def test_our_metadata_on_another_graph_is_refused(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "other",
        [value],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    helper.set_model_props(model, METADATA)
    onnx.save(model, tmp_path / "other.onnx")
    assert "image, scales, flip" in refusal(tmp_path / "other.onnx")


def test_a_graph_whose_outputs_are_others(tmp_path: Path) -> None:
    model = tiny_model()
    names = {"classes": json.dumps(CLASSES[:3]), "palette": json.dumps(PALETTE[:3])}
    helper.set_model_props(model, {**METADATA, **names})
    onnx.save(model, tmp_path / "three.onnx")
    assert "gives 4 classes, and its metadata names 3" in refusal(tmp_path / "three.onnx")
    helper.set_model_props(model, METADATA)
    model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.INT64
    model.graph.node.append(helper.make_node("Cast", ["mask_8"], ["mask"], to=onnx.TensorProto.INT64))
    for node in model.graph.node[:-1]:
        node.output[:] = ["mask_8" if name == "mask" else name for name in node.output]
    onnx.save(model, tmp_path / "int64.onnx")
    assert "gives mask as tensor(int64), where tensor(uint8) is needed" in refusal(tmp_path / "int64.onnx")


def test_a_graph_that_gives_presence_as_one_number_is_refused_when_it_has_run(tmp_path: Path) -> None:
    model = tiny_model()
    presence = next(value for value in model.graph.output if value.name == "presence")
    presence.CopyFrom(helper.make_tensor_value_info("presence", onnx.TensorProto.FLOAT, []))
    model.graph.node[-1].output[:] = ["scores"]
    model.graph.node.append(helper.make_node("ReduceMax", ["scores"], ["presence"], keepdims=0))
    onnx.save(model, tmp_path / "one.onnx")
    models = Models(Settings(model=tmp_path / "one.onnx", device="cpu", threads=1))
    with pytest.raises(ModelError, match="loads but does not run: "):
        models.start()
    models.close()


# ---- files that are no model


def test_a_missing_file(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "none.onnx")
    assert re.search(r"cannot be read by user \d+: file name too long", refusal(tmp_path / ("n" * 300)))


@pytest.fixture(params=["m", "m/model.onnx"])
def closed_file(request: pytest.FixtureRequest, model_file: Path) -> Iterator[Path]:
    """A model file that nobody may read, or whose folder nobody may look into."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "m").mkdir()
        shutil.copy(model_file, folder / "m" / "model.onnx")
        (folder / request.param).chmod(0)
        yield folder / "m" / "model.onnx"


def test_a_file_that_may_not_be_read(closed_file: Path, powerless: None) -> None:
    assert re.search(r"model.onnx cannot be read by user \d+: permission denied", refusal(closed_file))


def test_a_folder(tmp_path: Path) -> None:
    assert "folder" in refusal(tmp_path)


@pytest.mark.parametrize("data", [b"", b"not a model", b"\x08\x09"])
def test_a_file_that_is_not_onnx(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(data)
    assert str(path) in refusal(path)


def test_cuda_where_there_is_none(model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    assert "CUDA" in refusal(model_file, device="cuda")
    assert Engine(model_file, device="auto").device == "cpu"


@pytest.mark.parametrize("options", [{}, {"probabilities": True}, {"window": 1500}], ids=str)
def test_a_large_picture_does_not_keep_its_memory(engine: Engine, options: dict[str, Any]) -> None:
    large = np.zeros((3000, 4000, 3), np.uint8)
    engine.segment(large[:30, :40])
    before = resident()
    engine.segment(large, **options)
    assert resident() - before < 100e6, "up to 1.4 GB are kept otherwise"


def test_a_run_that_ends_between_its_windows_keeps_no_memory(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    infer, calls = engine._infer, []

    def second_fails(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise RuntimeError
        return infer(*arguments)

    before = resident()
    monkeypatch.setattr(engine, "_infer", second_fails)
    with pytest.raises(RuntimeError):
        engine.segment(np.zeros((2000, 4000, 3), np.uint8), window=2000)
    assert resident() - before < 100e6


def resident() -> int:
    """Bytes of memory that this process has, without what earlier tests left free in the C library's heaps."""
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("window", [None, 8])
def test_a_run_told_to_stop_ends_without_an_answer(engine: Engine, quadrants: np.ndarray, window: int | None) -> None:
    options = ort.RunOptions()
    options.terminate = True
    plan = engine.plan(window=window)
    with pytest.raises(Stopped):
        engine.run([quadrants], plan, options)
    assert engine.run([quadrants], plan)[0].mask.shape == quadrants.shape[:2]


def test_a_run_stopped_in_its_midst_puts_no_lines_of_onnx_runtime_into_the_log(
    capfd: pytest.CaptureFixture[str],
) -> None:
    embedded = Engine(EMBEDDED_MODEL, device="cpu", threads=1)
    options = ort.RunOptions()
    Timer(0.3, lambda: setattr(options, "terminate", True)).start()
    with pytest.raises(Stopped):
        embedded.run([np.zeros((500, 500, 3), np.uint8)], embedded.plan(scales=(1.0,) * 100), options)
    assert capfd.readouterr().err == ""
