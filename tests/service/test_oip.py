"""Promise: Triton's own client, unmodified, sync and asyncio, works here, and its answers are the engine's bits."""

import asyncio
import base64
import gzip
import json
import logging
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
import uvicorn
from onnx import helper
from PIL import Image
from pydantic import SecretStr
from starlette.testclient import TestClient
from tiny_model import CLASSES, METADATA, encoded, tiny_model
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from service import oip_infer
from service.app import create_app
from service.engine import Engine
from service.models import Models
from service.settings import Settings

Call = Callable[..., Any]


@pytest.fixture(scope="module")
def served_file(model_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of this suite's own, as a test changes it."""
    return Path(shutil.copy(model_file, tmp_path_factory.mktemp("oip") / "tiny.onnx"))


@pytest.fixture(scope="module")
def address(served_file: Path, model_file: Path) -> Iterator[str]:
    """host:port of a running service with two models, tiny and other."""
    settings = Settings(
        model=served_file,
        models={"other": model_file},
        device="cpu",
        threads=1,
        max_bytes=300_000,
        max_pixels=100_000,
        max_items=3,
        remote_control=True,
    )
    models = Models(settings)
    models.start()
    server = uvicorn.Server(uvicorn.Config(create_app(models=models), http="h11", log_config=None, lifespan="off"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()
    models.close()


def call_sync(address: str, method: str, *arguments: Any, **named: Any) -> Any:
    with triton.InferenceServerClient(address, network_timeout=60, connection_timeout=60) as client:
        result = getattr(client, method)(*arguments, **named)
        return result.get_result() if method == "async_infer" else result


def call_aio(address: str, method: str, *arguments: Any, **named: Any) -> Any:
    async def run() -> Any:
        async with triton_aio.InferenceServerClient(address) as client:
            return await getattr(client, "infer" if method == "async_infer" else method)(*arguments, **named)

    return asyncio.run(run())


@pytest.fixture(params=[call_sync, call_aio], ids=["sync", "aio"])
def call(request: pytest.FixtureRequest, address: str) -> Call:
    """Calls a method of the client, by name, on a connection of its own."""
    return lambda *arguments, **named: request.param(address, *arguments, **named)


@pytest.fixture(scope="module")
def batch() -> np.ndarray:
    """uint8 (2, 33, 47, 3), noise."""
    return np.random.default_rng(7).integers(0, 255, (2, 33, 47, 3), np.uint8)


def tensor(name: str, array: np.ndarray, binary: bool = True) -> triton.InferInput:
    declared = triton.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
    return declared.set_data_from_numpy(array, binary_data=binary)


def files(*contents: bytes) -> np.ndarray:
    array = np.empty(len(contents), np.object_)
    array[:] = contents
    return array


def asked(name: str, binary: bool = True, **named: Any) -> triton.InferRequestedOutput:
    return triton.InferRequestedOutput(name, binary_data=binary, **named)


def masks(engine: Engine, batch: np.ndarray, **options: Any) -> np.ndarray:
    return np.stack([engine.segment(image, **options).mask for image in batch])


# ---- what the service says about itself


def test_server(call: Call) -> None:
    assert call("is_server_live") is True
    assert call("is_server_ready") is True
    metadata = call("get_server_metadata")
    assert metadata["name"] == "encnet-serve"
    assert "binary_tensor_data" in metadata["extensions"]


@pytest.mark.parametrize("version", ["", "1"])
def test_model_metadata(call: Call, version: str) -> None:
    assert call("is_model_ready", "tiny", version) is True
    pixels = call("get_model_metadata", "tiny", version)
    assert pixels["name"] == "tiny"
    assert pixels["versions"] == ["1"]
    assert pixels["platform"] == "onnx_onnxv1"
    optional = [
        {"name": "scales", "datatype": "FP32", "shape": [-1]},
        {"name": "flip", "datatype": "BOOL", "shape": []},
    ]
    assert pixels["inputs"] == [{"name": "image", "datatype": "UINT8", "shape": [-1, -1, -1, 3]}, *optional]
    assert pixels["outputs"] == [
        {"name": "mask", "datatype": "UINT8", "shape": [-1, -1, -1]},
        {"name": "presence", "datatype": "FP32", "shape": [-1, 4]},
        {"name": "probabilities", "datatype": "FP32", "shape": [-1, 4, -1, -1]},
    ]
    by_file = call("get_model_metadata", "tiny_encoded", version)
    assert by_file["inputs"] == [{"name": "image", "datatype": "BYTES", "shape": [-1]}, *optional]
    assert by_file["outputs"] == pixels["outputs"]


def test_model_config(call: Call, engine: Engine) -> None:
    config = call("get_model_config", "tiny_encoded")
    assert config["name"] == "tiny_encoded"
    assert config["max_batch_size"] == 0
    assert config["input"][0] == {"name": "image", "data_type": "TYPE_STRING", "dims": [-1], "optional": False}
    assert config["input"][1] == {"name": "scales", "data_type": "TYPE_FP32", "dims": [-1], "optional": True}
    assert config["output"][1] == {"name": "presence", "data_type": "TYPE_FP32", "dims": [-1, 4]}
    assert config["parameters"]["sha256"] == {"string_value": engine.sha256}
    assert json.loads(config["parameters"]["classes"]["string_value"]) == CLASSES
    assert call("get_model_config", "tiny", "1")["input"][0]["dims"] == [-1, -1, -1, 3]


def test_repository_index(call: Call) -> None:
    index = call("get_model_repository_index")
    assert {entry["name"] for entry in index} == {"tiny", "tiny_encoded", "other", "other_encoded"}
    assert {(entry["version"], entry["state"]) for entry in index} == {("1", "READY")}


def test_logging(call: Call) -> None:
    before = logging.getLogger().level
    try:
        settings = call("get_log_settings")
        assert set(settings) == {
            "log_file", "log_info", "log_warnings", "log_errors", "log_verbose_level", "log_format"
        }  # fmt: skip
        changed = call("update_log_settings", {"log_info": False, "log_warnings": True, "log_verbose_level": 0})
        assert (changed["log_info"], changed["log_warnings"]) == (False, True)
        assert logging.getLogger().level == logging.WARNING
        assert call("update_log_settings", {"log_verbose_level": 1})["log_info"] is True
        assert logging.getLogger().level == logging.DEBUG
        with pytest.raises(
            InferenceServerException, match="log_verbose_level needs log_info; set log_verbose_level to 0"
        ):
            call("update_log_settings", {"log_info": False})
        for wrong in ({"log_file": "/etc/passwd"}, {"log_info": 1}, {"log_colour": True}):
            with pytest.raises(InferenceServerException, match="log setting"):
                call("update_log_settings", wrong)
        with pytest.raises(InferenceServerException, match="needs log_warnings"):
            call("update_log_settings", {"log_verbose_level": 0, "log_warnings": False, "log_info": True})
    finally:
        logging.getLogger().setLevel(before)


def test_tracing_is_off_and_says_so(call: Call) -> None:
    assert call("get_trace_settings") == {"trace_level": ["OFF"]}
    assert call("get_trace_settings", "tiny") == {"trace_level": ["OFF"]}
    assert call("update_trace_settings", settings={"trace_level": ["OFF"]}) == {"trace_level": ["OFF"]}
    with pytest.raises(InferenceServerException, match=r"\[501\] tracing .* is not supported"):
        call("update_trace_settings", "tiny", settings={"trace_level": ["TIMESTAMPS"]})


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("get_system_shared_memory_status", []),
        ("register_system_shared_memory", ["region", "key", 64]),
        ("unregister_system_shared_memory", []),
        ("get_cuda_shared_memory_status", ["region"]),
        ("register_cuda_shared_memory", ["region", base64.b64encode(b"handle").decode(), 0, 64]),
        ("unregister_cuda_shared_memory", ["region"]),
    ],
)
def test_shared_memory_is_a_clear_no(call: Call, method: str, arguments: list[Any]) -> None:
    with pytest.raises(InferenceServerException, match=r"\[501\] (system|cuda) shared memory is not supported"):
        call(method, *arguments)


def test_every_call_of_the_client_is_in_this_suite() -> None:
    own = {"close", "plugin", "register_plugin", "unregister_plugin"}
    suite = Path(__file__).read_text()
    for client in (triton.InferenceServerClient, triton_aio.InferenceServerClient):
        calls = {name for name in dir(client) if not name.startswith("_")} - own
        assert {name for name in calls if f'"{name}"' not in suite and f".{name}(" not in suite} == set()


# ---- inference on pixels


@pytest.mark.parametrize("binary_in", [True, False], ids=["binary-in", "json-in"])
@pytest.mark.parametrize("binary_out", [None, True, False], ids=["default-out", "binary-out", "json-out"])
def test_masks_are_the_engines_bits(
    call: Call, engine: Engine, batch: np.ndarray, binary_in: bool, binary_out: bool | None
) -> None:
    outputs = None if binary_out is None else [asked("presence", binary_out), asked("mask", binary_out)]
    result = call("infer", "tiny", [tensor("image", batch, binary_in)], request_id="me 1", outputs=outputs)
    np.testing.assert_array_equal(result.as_numpy("mask"), masks(engine, batch), strict=True)
    presence = np.stack([engine.segment(image).presence for image in batch])
    np.testing.assert_array_equal(result.as_numpy("presence"), presence, strict=True)
    response = result.get_response()
    assert (response["model_name"], response["model_version"], response["id"]) == ("tiny", "1", "me 1")
    order = ["mask", "presence"] if outputs is None else ["presence", "mask"]
    assert [output["name"] for output in response["outputs"]] == order
    assert ("data" in response["outputs"][0]) is (binary_out is False)


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
@pytest.mark.parametrize("binary", [True, False])
def test_compression_both_ways(call: Call, engine: Engine, batch: np.ndarray, algorithm: str, binary: bool) -> None:
    result = call(
        "infer",
        "tiny",
        [tensor("image", batch, binary)],
        outputs=[asked("mask", binary)],
        request_compression_algorithm=algorithm,
        response_compression_algorithm=algorithm,
    )
    np.testing.assert_array_equal(result.as_numpy("mask"), masks(engine, batch))


def test_the_response_is_compressed_where_asked_for_and_metadata_never_is(address: str, batch: np.ndarray) -> None:
    body, length = triton.InferenceServerClient.generate_request_body([tensor("image", batch)])
    url, headers = f"http://{address}/v2/models/tiny", {"Inference-Header-Content-Length": str(length)}
    for accepted in ("gzip", "deflate"):
        response = httpx.post(f"{url}/infer", content=body, headers={**headers, "Accept-Encoding": accepted})
        assert response.headers["content-encoding"] == accepted
        assert response.headers["vary"] == "Accept-Encoding"
        metadata = httpx.get(url, headers={"Accept-Encoding": accepted})
        assert "content-encoding" not in metadata.headers
    lines = [*headers.items(), ("Accept-Encoding", "br"), ("Accept-Encoding", "gzip")]
    assert httpx.post(f"{url}/infer", content=body, headers=lines).headers["content-encoding"] == "gzip"
    plain = httpx.post(f"{url}/infer", content=body, headers={**headers, "Accept-Encoding": "br"})
    assert "content-encoding" not in plain.headers
    header_length = int(plain.headers["inference-header-content-length"])
    result = triton.InferenceServerClient.parse_response_body(plain.content, header_length=header_length)
    assert result.as_numpy("mask").shape == (2, 33, 47)


def test_options_as_parameters_and_as_inputs(call: Call, engine: Engine, batch: np.ndarray) -> None:
    wanted = masks(engine, batch, scales=(0.5, 0.7), flip=True)
    assert not np.array_equal(wanted, masks(engine, batch))
    image = tensor("image", batch)
    by_parameter = call("infer", "tiny", [image], parameters={"scales": "0.5,0.7", "flip": True})
    scales, flip = np.array([0.5, 0.7], np.float32), np.array(True)
    for binary in (True, False):
        options = [tensor("scales", scales, binary), tensor("flip", flip, binary)]
        by_input = call("infer", "tiny", [image, *options], parameters={"scales": "0.5,0.7"})
        np.testing.assert_array_equal(by_input.as_numpy("mask"), wanted)
    np.testing.assert_array_equal(by_parameter.as_numpy("mask"), wanted)


def test_options_in_the_query(address: str, engine: Engine, batch: np.ndarray) -> None:
    url = f"http://{address}/v2/models/tiny/infer"
    image = {"name": "image", "datatype": "UINT8", "shape": list(batch.shape), "data": batch.flatten().tolist()}
    answer = httpx.post(f"{url}?scales=0.5,0.7&flip=true&window=", json={"inputs": [image]}).json()
    mask = np.array(answer["outputs"][0]["data"], np.uint8).reshape(batch.shape[:3])
    np.testing.assert_array_equal(mask, masks(engine, batch, scales=(0.5, 0.7), flip=True))
    for query, message in (
        ("bogus=1", "unknown option 'bogus' in the query; tiny knows scales, flip"),
        ("max_side=20", "unknown option 'max_side' in the query; tiny knows scales, flip"),
        ("stride=9", "stride needs window"),
        ("scales=2", "scales is given twice"),
    ):
        refused = httpx.post(f"{url}?{query}", json={"inputs": [image], "parameters": {"scales": "0.5"}})
        assert refused.status_code == 422
        assert message in refused.json()["error"]


def test_classes_are_those_that_the_mask_keeps(call: Call, engine: Engine, batch: np.ndarray) -> None:
    direct = masks(engine, batch)
    wanted = np.where(np.isin(direct, (1, 3)), direct, 255)
    assert not np.array_equal(wanted, direct)
    for classes in ("red,blue", "3,red"):
        result = call("infer", "tiny", [tensor("image", batch)], parameters={"classes": classes})
        np.testing.assert_array_equal(result.as_numpy("mask"), wanted)
        assert result.as_numpy("presence").shape == (2, 4)
    with pytest.raises(InferenceServerException, match=r"\[422\] option classes: the model has no class 'sheep'"):
        call("infer", "tiny", [tensor("image", batch)], parameters={"classes": "sheep"})


def test_window_and_stride(call: Call, engine: Engine, batch: np.ndarray) -> None:
    wanted = masks(engine, batch, scales=(0.5,), window=32, stride=16)
    assert not np.array_equal(wanted, masks(engine, batch, scales=(0.5,)))
    parameters = {"scales": 0.5, "window": 32, "stride": 16}
    result = call("infer", "tiny", [tensor("image", batch)], parameters=parameters)
    np.testing.assert_array_equal(result.as_numpy("mask"), wanted)


def test_probabilities_where_asked_for(call: Call, engine: Engine, batch: np.ndarray) -> None:
    image = tensor("image", batch)
    result = call("infer", "tiny", [image], outputs=[asked("probabilities"), asked("mask", False)])
    wanted = np.stack([engine.segment(one, probabilities=True).probabilities for one in batch])
    np.testing.assert_array_equal(result.as_numpy("probabilities"), wanted)
    assert call("infer", "tiny", [image]).as_numpy("probabilities") is None


def test_async_infer(call: Call, engine: Engine, batch: np.ndarray) -> None:
    result = call("async_infer", "tiny", [tensor("image", batch)], "1", priority=1, timeout=20_000_000)
    np.testing.assert_array_equal(result.as_numpy("mask"), masks(engine, batch))


def test_many_async_infers_at_once(address: str, engine: Engine) -> None:
    pictures = np.random.default_rng(3).integers(0, 255, (12, 1, 20, 30, 3), np.uint8)
    with triton.InferenceServerClient(address, concurrency=4) as client:
        pending = [
            client.async_infer("tiny", [tensor("image", one)], request_id=f"{i}") for i, one in enumerate(pictures)
        ]
        results = [one.get_result() for one in pending]
    for index, (picture, result) in enumerate(zip(pictures, results, strict=True)):
        assert result.get_response()["id"] == str(index)
        np.testing.assert_array_equal(result.as_numpy("mask"), masks(engine, picture))


# ---- inference on picture files


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "base64"])
def test_encoded_pictures(call: Call, engine: Engine, batch: np.ndarray, binary: bool) -> None:
    contents = [encoded(image) for image in batch]
    if not binary:
        contents = [base64.b64encode(contents[0]), b"data:image/png;base64," + base64.b64encode(contents[1])]
    result = call("infer", "tiny_encoded", [tensor("image", files(*contents), binary)], parameters={"flip": True})
    np.testing.assert_array_equal(result.as_numpy("mask"), masks(engine, batch, flip=True))


def test_encoded_pictures_are_read_by_the_services_rules(call: Call, engine: Engine, batch: np.ndarray) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(np.rot90(batch[0]), exif=exif)
    result = call("infer", "tiny_encoded", [tensor("image", files(turned))])
    np.testing.assert_array_equal(result.as_numpy("mask")[0], engine.segment(batch[0]).mask)
    small = call("infer", "tiny_encoded", [tensor("image", files(turned))], parameters={"max_side": 20})
    assert small.as_numpy("mask").shape == (1, 14, 20)


def test_a_bare_picture_file_with_curl(address: str, engine: Engine, batch: np.ndarray) -> None:
    url = f"http://{address}/v2/models/tiny_encoded/infer"
    response = httpx.post(url, content=encoded(batch[0]), headers={"Inference-Header-Content-Length": "0"})
    length = int(response.headers["inference-header-content-length"])
    result = triton.InferenceServerClient.parse_response_body(response.content, header_length=length)
    np.testing.assert_array_equal(result.as_numpy("mask")[0], engine.segment(batch[0]).mask)


def test_a_request_by_hand_in_json_alone(address: str, engine: Engine, batch: np.ndarray) -> None:
    image = {"name": "image", "datatype": "UINT8", "shape": [1, 33, 47, 3], "data": batch[:1].tolist()}
    response = httpx.post(f"http://{address}/v2/models/tiny/infer", json={"inputs": [image]})
    assert response.headers["content-type"] == "application/json"
    answer = response.json()
    assert "id" not in answer
    mask = np.array(answer["outputs"][0]["data"]).reshape(answer["outputs"][0]["shape"])
    np.testing.assert_array_equal(mask, masks(engine, batch[:1]))


# ---- statistics


def test_statistics(call: Call, batch: np.ndarray) -> None:
    def statistics() -> dict[str, Any]:
        (one,) = call("get_inference_statistics", "tiny", "1")["model_stats"]
        return one

    before = statistics()
    call("infer", "tiny", [tensor("image", batch)])
    with pytest.raises(InferenceServerException):
        call("infer", "tiny", [tensor("picture", batch)])
    after = statistics()
    assert after["inference_count"] - before["inference_count"] == 2
    assert after["execution_count"] - before["execution_count"] == 2
    assert abs(after["last_inference"] / 1000 - time.time()) < 60
    gained = {
        phase: tuple(
            after["inference_stats"][phase][key] - before["inference_stats"][phase][key] for key in ("count", "ns")
        )
        for phase in after["inference_stats"]
    }
    assert {phase: count for phase, (count, _) in gained.items()} == {
        "success": 1, "fail": 1, "queue": 1, "compute_input": 1, "compute_infer": 1, "compute_output": 1,
        "cache_hit": 0, "cache_miss": 0,
    }  # fmt: skip
    parts = sum(ns for phase, (_, ns) in gained.items() if phase.startswith("compute"))
    assert parts > 0
    assert gained["compute_infer"][1] > 0
    names = [one["name"] for one in call("get_inference_statistics")["model_stats"]]
    assert sorted(names) == ["other", "other_encoded", "tiny", "tiny_encoded"]


def test_a_request_that_failed_for_no_fault_of_its_own_is_counted_too(
    client_with: Callable[..., TestClient], batch: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = client_with()
    monkeypatch.setattr(oip_infer, "_write", None)
    body, length = triton.InferenceServerClient.generate_request_body([tensor("image", batch)])
    headers = {"Inference-Header-Content-Length": str(length)}
    assert client.post("/v2/models/tiny/infer", content=body, headers=headers).status_code == 500
    (one,) = client.get("/v2/models/tiny/stats").json()["model_stats"]
    assert (one["inference_stats"]["fail"]["count"], one["inference_stats"]["success"]["count"]) == (1, 0)


# ---- errors are sentences


@pytest.mark.parametrize(
    ("status", "message", "model", "array", "named"),
    [
        ("404", "there is no model 'none'; the models are", "none", np.zeros((1, 2, 2, 3), np.uint8), {}),
        ("404", "has only version 1", "tiny", np.zeros((1, 2, 2, 3), np.uint8), {"model_version": "2"}),
        ("400", r"\[-1, -1, -1, 3\] \(-1: any size\), not \[2, 2, 3\]", "tiny", np.zeros((2, 2, 3), np.uint8), {}),
        ("400", "must be UINT8, not INT8", "tiny", np.zeros((1, 2, 2, 3), np.int8), {}),
        ("413", "1000 x 101 = 101000 pixels", "tiny", np.zeros((1, 101, 1000, 3), np.uint8), {}),
        ("400", "4 pictures; send at most 3", "tiny", np.zeros((4, 2, 2, 3), np.uint8), {}),
        ("400", "no output 'label'; its outputs are mask", "tiny", np.zeros((1, 2, 2, 3), np.uint8),
         {"outputs": [asked("label")]}),
        ("501", "classification", "tiny", np.zeros((1, 2, 2, 3), np.uint8),
         {"outputs": [asked("presence", class_count=2)]}),
        ("422", "unknown parameter 'scale'; tiny knows scales, flip, window", "tiny", np.zeros((1, 2, 2, 3), np.uint8),
         {"parameters": {"scale": "1"}}),
        ("422", "scales must each be from 0.25 to 3", "tiny", np.zeros((1, 2, 2, 3), np.uint8),
         {"parameters": {"scales": "9"}}),
        ("422", "parameter timeout must be at most 300000000 microseconds", "tiny",
         np.zeros((1, 2, 2, 3), np.uint8), {"timeout": 10**12}),
        ("415", "not a picture", "tiny_encoded", files(b"nothing that is a picture"), {}),
        ("400", "the picture file is empty", "tiny_encoded", files(b""), {}),
    ],
)  # fmt: skip
def test_errors_reach_the_caller(
    call: Call, status: str, message: str, model: str, array: np.ndarray, named: dict[str, Any]
) -> None:
    with pytest.raises(InferenceServerException, match=message) as caught:
        call("infer", model, [tensor("image", array)], **named)
    assert caught.value.status() == status


def test_the_picture_at_fault_is_named(call: Call, batch: np.ndarray) -> None:
    whole = encoded(batch[0])
    with pytest.raises(InferenceServerException, match=r"\[400\] image\[1\]: the PNG file is cut short"):
        call("infer", "tiny_encoded", [tensor("image", files(whole, whole[:-200], whole))])
    with pytest.raises(InferenceServerException, match=r"image\[1\] is 20 x 10 and image\[0\] is 47 x 33"):
        call("infer", "tiny_encoded", [tensor("image", files(whole, encoded(batch[0][:10, :20])))])
    with pytest.raises(InferenceServerException, match=r"image\[0\] must be base64"):
        call("infer", "tiny_encoded", [tensor("image", files(b"not base64"), binary=False)])


def test_sizes_that_make_no_one_tensor_are_told_before_a_run(
    client_with: Callable[..., TestClient], batch: np.ndarray
) -> None:
    client = client_with()
    models = client.app.state.models
    runs: list[Any] = []
    models.pipeline().on_answer = lambda segmentation, classes: runs.append(segmentation)
    url = f"/v2/models/{models.default}_encoded/infer"
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(np.rot90(batch[0]), exif=exif)

    def infer(*contents: bytes, outputs: list[Any] | None = None, **parameters: Any) -> Any:
        inputs = [tensor("image", files(*contents))]
        body, length = triton.InferenceServerClient.generate_request_body(
            inputs, outputs=outputs or [asked("mask", False)], parameters=parameters
        )
        return client.post(url, content=body, headers={"Inference-Header-Content-Length": str(length)})

    whole, small = encoded(batch[0]), encoded(batch[0][:10, :20])
    for outputs in ([asked("mask")], [asked("presence"), asked("probabilities")]):
        refused = infer(whole, small, outputs=outputs)
        assert (refused.status_code, runs) == (400, [])
        assert "image[1] is 20 x 10 and image[0] is 47 x 33" in refused.json()["error"]
    presence = infer(whole, small, outputs=[asked("presence", False)]).json()["outputs"]
    assert [output["shape"] for output in presence] == [[2, 4]]
    assert infer(whole, turned).json()["outputs"][0]["shape"] == [2, 33, 47]
    twice = encoded(batch[0].repeat(2, 0).repeat(2, 1))
    assert infer(whole, twice, max_side=40).json()["outputs"][0]["shape"] == [2, 28, 40]
    assert infer(whole, encoded(np.rot90(batch[0]))).status_code == 400


def test_inputs_missing_and_unknown(call: Call, batch: np.ndarray) -> None:
    with pytest.raises(
        InferenceServerException, match="tiny has no input 'picture'; its inputs are image, scales, flip"
    ):
        call("infer", "tiny", [tensor("picture", batch)])
    with pytest.raises(InferenceServerException, match="input image is missing"):
        call("infer", "tiny", [tensor("flip", np.array(True))])
    with pytest.raises(InferenceServerException, match="scales is given twice"):
        scales = tensor("scales", np.ones(1, np.float32))
        call("infer", "tiny", [tensor("image", batch), scales], parameters={"scales": "2"})
    with pytest.raises(InferenceServerException, match=r"\[422\] input scales has 50000 scales, at most 8 are allowed"):
        call("infer", "tiny", [tensor("image", batch), tensor("scales", np.ones(50_000, np.float32))])


def test_json_outputs_are_bounded(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oip_infer, "MAX_JSON_ELEMENTS", 60_000)
    image = tensor("image", np.zeros((1, 200, 300, 3), np.uint8))
    with pytest.raises(InferenceServerException, match=r"probabilities has 240000 elements.*binary_data true"):
        call("infer", "tiny", [image], outputs=[asked("probabilities", False)])
    assert call("infer", "tiny", [image], outputs=[asked("mask", False)]).as_numpy("mask").shape == (1, 200, 300)


def test_json_outputs_that_are_too_large_are_told_before_a_run(
    client_with: Callable[..., TestClient], batch: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oip_infer, "MAX_JSON_ELEMENTS", 33 * 47 - 1)
    client = client_with()
    models = client.app.state.models
    runs: list[Any] = []
    models.pipeline().on_answer = lambda segmentation, classes: runs.append(segmentation)
    pixels = {"name": "image", "datatype": "UINT8", "shape": [1, *batch[0].shape], "data": batch[:1].ravel().tolist()}
    file = {"name": "image", "datatype": "BYTES", "shape": [1], "data": [base64.b64encode(encoded(batch[0])).decode()]}
    for name, image in ((models.default, pixels), (f"{models.default}_encoded", file)):
        refused = client.post(f"/v2/models/{name}/infer", json={"inputs": [image]})
        assert (refused.status_code, runs) == (400, [])
        assert "mask has 1551 elements" in refused.json()["error"]
        presence = {"inputs": [image], "outputs": [{"name": "presence"}]}
        assert client.post(f"/v2/models/{name}/infer", json=presence).status_code == 200
        runs.clear()
    reduced = {"inputs": [file], "parameters": {"max_side": 46}}
    assert client.post(f"/v2/models/{models.default}_encoded/infer", json=reduced).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v2/nothing", 404),
        ("GET", "/v2/models/none", 404),
        ("GET", "/v2/models/none/ready", 404),
        ("GET", "/v2/models/tiny/", 404),
        ("POST", "/v2/models/tiny/infer/", 404),
        ("GET", "/v2/models/tiny/versions/7", 404),
        ("GET", "/v2/models/tiny/infer", 405),
        ("POST", "/v2", 405),
        ("POST", "/v2/models/tiny/infer", 400),
        ("POST", "/v2/models/none/infer", 404),
        ("POST", "/v2/repository/models/none/load", 404),
    ],
)
def test_every_error_under_v2_is_an_error_string(address: str, method: str, path: str, status: int) -> None:
    response = httpx.request(method, f"http://{address}{path}")
    assert response.status_code == status
    assert list(response.json()) == ["error"]
    assert isinstance(response.json()["error"], str)


def test_mutated_requests_never_break_the_service(address: str, batch: np.ndarray) -> None:
    random = np.random.default_rng(11)
    requests = [
        triton.InferenceServerClient.generate_request_body([tensor("image", batch[:1])], request_id="x"),
        triton.InferenceServerClient.generate_request_body([tensor("image", files(encoded(batch[0])))]),
        triton.InferenceServerClient.generate_request_body(
            [tensor("image", batch[:1, :4, :4], False), tensor("scales", np.ones(2, np.float32), False)]
        ),
    ]
    statuses = set()
    with httpx.Client(timeout=60) as client:
        for turn in range(90):
            body, length = requests[turn % 3]
            mutated = bytearray(body)
            for _ in range(random.integers(1, 6)):
                mutated[random.integers(len(mutated) if turn % 2 else min(len(mutated), 250))] = random.integers(256)
            if turn % 5 == 0:
                mutated = mutated[: random.integers(len(mutated))]
            model = "tiny_encoded" if turn % 3 == 1 else "tiny"
            headers = {"Inference-Header-Content-Length": str(length)} if length else {}
            response = client.post(f"http://{address}/v2/models/{model}/infer", content=bytes(mutated), headers=headers)
            statuses.add(response.status_code)
            if response.status_code != 200:
                assert list(response.json()) == ["error"]
    assert {200, 400} <= statuses <= {200, 400, 413, 415, 422}


def test_bodies_beyond_the_limit_are_413(address: str) -> None:
    url = f"http://{address}/v2/models/tiny/infer"
    large = bytes(3 * 100_000 + 70_000)
    bomb = gzip.compress(bytes(50_000_000), 1)
    for body, headers in ((large, {}), (bomb, {"Content-Encoding": "gzip"})):
        response = httpx.post(url, content=body, headers=headers)
        assert response.status_code == 413
        assert "bytes allowed" in response.json()["error"]
    response = httpx.post(f"http://{address}/v2/logging", content=bytes(100_000))
    assert response.status_code == 413


def test_what_a_body_is_unpacked_to_counts_as_held(client_with: Callable[..., TestClient]) -> None:
    """Else small bodies, which wait with all that is in them, would fill the memory."""
    pixels = bytes(3 * 100 * 100)
    image = {"name": "image", "datatype": "UINT8", "shape": [1, 100, 100, 3]}
    head = json.dumps({"inputs": [{**image, "parameters": {"binary_data_size": len(pixels)}}]}).encode()
    plain = head + pixels
    packed = gzip.compress(plain)
    headers = {"Content-Encoding": "gzip", "Inference-Header-Content-Length": str(len(head))}
    for room, status in ((len(packed) + len(plain), 200), (len(packed) + len(plain) - 1, 413)):
        client = client_with(max_buffered_bytes=room)
        for _ in range(2):  # what is held is given back
            answer = client.post("/v2/models/tiny/infer", content=packed, headers=headers)
            assert answer.status_code == status, answer.content


def test_pixels_may_have_more_bytes_than_a_file(client_with: Callable[..., TestClient]) -> None:
    client = client_with(max_bytes=1_000, max_pixels=100_000)
    name = client.app.state.models.default
    image = tensor("image", np.zeros((1, 100, 300, 3), np.uint8))
    body, length = triton.InferenceServerClient.generate_request_body([image])
    assert len(body) > 64 * 1024 + 1_000
    headers = {"Inference-Header-Content-Length": str(length)}
    assert client.post(f"/v2/models/{name}/infer", content=body, headers=headers).status_code == 200


def test_other_encodings_are_415(address: str) -> None:
    response = httpx.post(f"http://{address}/v2/models/tiny/infer", content=b"{}", headers={"Content-Encoding": "br"})
    assert response.status_code == 415
    assert "gzip or deflate" in response.json()["error"]


def test_a_deadline_that_cannot_be_met_is_504_or_429(call: Call, batch: np.ndarray) -> None:
    with pytest.raises(InferenceServerException) as caught:
        call("infer", "tiny", [tensor("image", batch)], timeout=1)
    assert caught.value.status() in ("429", "504")


# ---- loading and unloading; last, as the models come and go


def test_unload_and_load(call: Call, batch: np.ndarray) -> None:
    call("unload_model", "other")
    for name in ("other", "other_encoded"):
        assert call("is_model_ready", name) is False
        with pytest.raises(InferenceServerException, match=r"\[503\] .*other is not loaded"):
            call("get_model_metadata", name)
    with pytest.raises(InferenceServerException, match=r"\[503\]"):
        call("infer", "other", [tensor("image", batch)])
    assert call("is_model_ready", "tiny") is True
    states = {entry["name"]: (entry["state"], entry["reason"]) for entry in call("get_model_repository_index")}
    assert states["other"] == ("UNAVAILABLE", "it was unloaded")
    assert states["tiny"] == ("READY", "")
    call("load_model", "other")
    assert call("is_model_ready", "other") is True
    call("infer", "other", [tensor("image", batch)])


def test_a_reload_reads_the_configured_file_and_nothing_from_the_request(
    address: str, call: Call, served_file: Path, batch: np.ndarray
) -> None:
    with pytest.raises(InferenceServerException, match="the file it was configured with"):
        call("load_model", "tiny", config='{"default_model_filename": "/etc/passwd"}')
    original = served_file.read_bytes()
    try:
        larger = tiny_model(classes=300)
        many = {"classes": json.dumps([*map(str, range(300))]), "palette": json.dumps([[0, 0, 0]] * 300)}
        helper.set_model_props(larger, {**METADATA, **many})
        onnx.save(larger, served_file)
        call("load_model", "tiny_encoded")
        assert call("get_model_metadata", "tiny")["outputs"][0]["datatype"] == "UINT16"
        assert call("infer", "tiny", [tensor("image", batch)]).as_numpy("mask").dtype == np.uint16
        served_file.write_bytes(b"not a model")
        with pytest.raises(InferenceServerException, match="cannot be loaded") as caught:
            call("load_model", "tiny")
        assert str(served_file) not in caught.value.message()
        assert call("infer", "tiny", [tensor("image", batch)]).as_numpy("mask").dtype == np.uint16
    finally:
        served_file.write_bytes(original)
        call("load_model", "tiny")


def test_no_request_is_lost_while_a_model_is_loaded_anew(address: str, batch: np.ndarray) -> None:
    def infer(_: int) -> tuple[int, ...]:
        return call_sync(address, "infer", "tiny", [tensor("image", batch[:1])]).as_numpy("mask").shape

    with ThreadPoolExecutor(3) as pool:
        answers = pool.map(infer, range(30))
        for _ in range(3):
            call_sync(address, "load_model", "tiny")
        assert set(answers) == {(1, 33, 47)}


def test_control_is_off_unless_switched_on(client_with: Callable[..., TestClient]) -> None:
    client = client_with()
    models = client.app.state.models
    name = models.default
    for path in (f"repository/models/{name}/load", f"repository/models/{name}/unload", "logging"):
        response = client.post(f"/v2/{path}", content=b'{"log_info": false}')
        assert response.status_code == 403
        assert "ENCNET_REMOTE_CONTROL" in response.json()["error"]
    assert client.get(f"/v2/models/{name}/ready").status_code == 200
    assert client.post("/v2/repository/index", content=b'{"ready": true}').json()[0]["name"] == f"{name}_encoded"


def test_a_service_that_is_stopping_says_so(client_with: Callable[..., TestClient], batch: np.ndarray) -> None:
    client = client_with()
    name = client.app.state.models.default
    client.app.state.models.drain()
    for path in ("health/ready", f"models/{name}", f"models/{name}/ready"):
        response = client.get(f"/v2/{path}")
        assert response.status_code == 503
        assert "stopping" in response.json()["error"]
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.post("/v2/repository/index", content=b'{"ready": true}').json() == []
    body, length = triton.InferenceServerClient.generate_request_body([tensor("image", batch)])
    headers = {"Inference-Header-Content-Length": str(length)}
    response = client.post(f"/v2/models/{name}/infer", content=body, headers=headers)
    assert response.status_code == 503
    assert "stopping" in response.json()["error"]


def test_keys_guard_the_protocol_but_not_its_health(client_with: Callable[..., TestClient]) -> None:
    client = client_with(api_keys=(SecretStr("secret"),))
    assert client.get("/v2/health/ready").status_code == 200
    assert client.get("/v2").status_code == 401
    assert list(client.get("/v2").json()) == ["error"]
    assert client.get("/v2", headers={"X-API-Key": "secret"}).status_code == 200
