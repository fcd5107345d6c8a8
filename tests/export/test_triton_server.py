"""A real Triton serves the repository that the export writes, asked by its own clients.

Its server comes in the package nvidia-pytriton (`pip install --no-deps nvidia-pytriton`, as it wants an older NumPy),
without the ONNX Runtime backend; for that, triton_backend.py stands in.
"""

import importlib.util
import os
import queue
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import onnx
import pytest
from networks import pictures

from export import cli
from service.engine import Engine
from tests.service.tiny_model import tiny_model

grpc = pytest.importorskip("tritonclient.grpc", reason="Triton's clients are not installed (tritonclient[grpc,http])")
http = pytest.importorskip("tritonclient.http", reason="Triton's clients are not installed (tritonclient[grpc,http])")

ROOT = Path(__file__).parents[2]
EMBEDDED = ROOT / "service" / "models" / "camvid.onnx"
NAME = "encnet-camvid"
VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
START_SECONDS = 300

PACKAGE = importlib.util.find_spec("pytriton")
if PACKAGE is None or not PACKAGE.submodule_search_locations:
    pytest.skip("there is no Triton server here (pip install --no-deps nvidia-pytriton)", allow_module_level=True)
TRITON = Path(PACKAGE.submodule_search_locations[0]) / "tritonserver"
LIBRARIES = TRITON.parents[1] / "nvidia_pytriton.libs"
STUB = TRITON / "python_backend_stubs" / VERSION / "triton_python_backend_stub"
ENVIRONMENT = {**os.environ, "LD_LIBRARY_PATH": str(LIBRARIES), "OMP_NUM_THREADS": "1"}


def _missing() -> str:
    """Why Triton's Python backend cannot start here; empty where it can."""
    if not STUB.exists():
        return f"it has none for Python {VERSION}"
    needs = subprocess.run(["ldd", str(STUB)], env=ENVIRONMENT, capture_output=True, text=True).stdout
    return ", ".join(line.strip() for line in needs.splitlines() if "not found" in line)


if REASON := _missing():
    pytest.skip(f"Triton's Python backend does not start here: {REASON}", allow_module_level=True)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def listening(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("triton") / "models"
    assert cli.main([str(EMBEDDED), "--triton-repository", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def ports(repository: Path) -> Iterator[tuple[int, int]]:
    """HTTP's and gRPC's port of a Triton that has loaded and warmed up the embedded model."""
    backends = repository.parent / "backends"
    shutil.copytree(TRITON / "backends" / "python", backends / "python")
    shutil.copy(STUB, backends / "python")
    (backends / "python" / STUB.name).chmod(0o755)
    (backends / "onnxruntime").mkdir()
    packages = f"import sys; sys.path.append({str(Path(numpy.__file__).parents[1])!r})\n"
    code = Path(__file__).with_name("triton_backend.py").read_text()
    (backends / "onnxruntime" / "model.py").write_text(packages + code)
    both, log = (free_port(), free_port()), repository.parent / "log"
    program = repository.parent / "tritonserver"
    shutil.copy(TRITON / "bin" / "tritonserver", program)
    program.chmod(0o755)
    command = [program, f"--backend-directory={backends}", f"--model-repository={repository}", "--allow-metrics=false"]
    command += ["--model-control-mode=explicit", f"--load-model={NAME}", "--http-address=127.0.0.1"]
    command += ["--grpc-address=127.0.0.1", f"--http-port={both[0]}", f"--grpc-port={both[1]}"]
    with log.open("wb") as output:  # elsewhere than here, where its interpreter would take our package for model.py
        process = subprocess.Popen(
            command, env=ENVIRONMENT, stdout=output, stderr=subprocess.STDOUT, cwd=repository.parent
        )
    try:
        until = time.monotonic() + START_SECONDS
        while not all(map(listening, both)):
            assert process.poll() is None, log.read_text(errors="replace")[-3000:]
            assert time.monotonic() < until, log.read_text(errors="replace")[-3000:]
            time.sleep(0.1)
        yield both
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def inputs(module: Any, image: numpy.ndarray, scales: list[float], flip: bool) -> list[Any]:
    """One picture, uint8 (H, W, 3), for one of Triton's client modules."""
    given = {
        "image": ("UINT8", image[None]),
        "scales": ("FP32", numpy.array([scales], numpy.float32)),
        "flip": ("BOOL", numpy.array([[flip]])),
    }
    tensors = []
    for name, (kind, array) in given.items():
        tensors.append(module.InferInput(name, list(array.shape), kind))
        tensors[-1].set_data_from_numpy(array)
    return tensors


def test_triton_is_ready_and_tells_the_models_inputs_and_outputs(ports: tuple[int, int]) -> None:
    with http.InferenceServerClient(f"127.0.0.1:{ports[0]}", network_timeout=120) as client:
        assert client.is_server_ready()
        told = client.get_model_metadata(NAME)
        assert (told["versions"], told["platform"]) == (["1"], "onnxruntime_onnx")
        shapes = {entry["name"]: (entry["datatype"], entry["shape"]) for entry in told["inputs"] + told["outputs"]}
    assert shapes == {
        "image": ("UINT8", [-1, -1, -1, 3]),
        "scales": ("FP32", [-1, -1]),
        "flip": ("BOOL", [-1, 1]),
        "mask": ("UINT8", [-1, -1, -1]),
        "presence": ("FP32", [-1, 11]),
    }


def test_requests_with_different_options_are_joined_and_answered_like_the_service(
    ports: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENCNET_KERNELS", "off")
    engine = Engine(EMBEDDED, "cpu", 1)
    images = list(pictures(7, 72, 96))
    views = [
        ([1.0], False),
        ([0.5], True),
        ([0.25], False),
        ([0.5], True),
        ([0.25], True),
        ([0.5], False),
        ([0.25], False),
    ]
    with grpc.InferenceServerClient(f"127.0.0.1:{ports[1]}") as client:
        before = client.get_inference_statistics(NAME).model_stats[0]
        done: queue.Queue[tuple[int, Any, Any]] = queue.Queue()
        for index, (image, view) in enumerate(zip(images, views, strict=True)):
            tensors = inputs(grpc, image, *view)
            client.async_infer(NAME, tensors, lambda result, error, index=index: done.put((index, result, error)))
        answers = dict(entry[:2] for entry in _all(done, len(images)))
        until = time.monotonic() + 60
        while (
            after := client.get_inference_statistics(NAME).model_stats[0]
        ).inference_count < before.inference_count + 7:
            assert time.monotonic() < until, "Triton counts an answer only after it has sent it, but not so late"
            time.sleep(0.05)
    assert after.inference_count - before.inference_count == 7
    assert after.execution_count - before.execution_count < 7, "Triton has joined some"
    for index, (image, view) in enumerate(zip(images, views, strict=True)):
        expected = engine.segment(image, *view)
        numpy.testing.assert_array_equal(answers[index].as_numpy("mask")[0], expected.mask)
        numpy.testing.assert_allclose(answers[index].as_numpy("presence")[0], expected.presence, rtol=0, atol=1e-5)


def _all(done: "queue.Queue[tuple[int, Any, Any]]", count: int) -> list[tuple[int, Any, Any]]:
    entries = [done.get(timeout=120) for _ in range(count)]
    assert not [error for _, _, error in entries if error]
    return entries


def test_presence_is_told_by_the_names_of_the_classes(ports: tuple[int, int]) -> None:
    (image,) = pictures(1, 60, 80)
    engine = Engine(EMBEDDED, "cpu", 1)
    with http.InferenceServerClient(f"127.0.0.1:{ports[0]}", network_timeout=120) as client:
        wanted = [http.InferRequestedOutput("presence", class_count=3)]
        answer = client.infer(NAME, inputs(http, image, [0.5], False), outputs=wanted).as_numpy("presence")
    expected = numpy.argsort(-engine.segment(image, [0.5], False).presence)[:3]
    assert [entry.decode().split(":")[1:] for entry in answer[0]] == [
        [str(index), engine.metadata.classes[index]] for index in expected
    ]


def test_a_later_export_is_the_version_that_is_served(ports: tuple[int, int], repository: Path, tmp_path: Path) -> None:
    model = tiny_model()
    with http.InferenceServerClient(f"127.0.0.1:{ports[0]}", network_timeout=120) as client:
        for version in ("1", "2"):
            onnx.save(model, tmp_path / "tiny.onnx")
            assert cli.main([str(tmp_path / "tiny.onnx"), "--triton-repository", str(repository)]) == 0
            client.load_model("encnet-tiny")
            assert client.get_model_metadata("encnet-tiny")["versions"] == [version]
            (image,) = pictures(1, 20, 30)
            answer = client.infer("encnet-tiny", inputs(http, image, [1.0, 0.5], True))
            expected = Engine(tmp_path / "tiny.onnx", "cpu", 1).segment(image, [1.0, 0.5], True)
            numpy.testing.assert_array_equal(answer.as_numpy("mask")[0], expected.mask)
            next(item for item in model.graph.initializer if item.name == "bias").raw_data = bytes(16)
