"""Promise: serving needs no torch, none of the folders model/ and export/, and only its own requirements."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import service

SERVICE = Path(service.__file__).parent
ROOT = SERVICE.parent
DISTRIBUTION_OF = {"PIL": "pillow", "pynvml": "nvidia_ml_py"}
BROUGHT_BY_FASTAPI = {"anyio", "starlette", "typing_extensions"}
BLOCKED = ["torch", "model", "export", "onnx", "onnxscript", "scipy", "matplotlib", "sklearn", "pandas", "cv2", "timm"]

SEGMENT_ONCE = """
import io, sys
from pathlib import Path
sys.modules.update(dict.fromkeys({blocked!r}))
import numpy as np
from PIL import Image
from starlette.testclient import TestClient
import service.__main__
from service.app import create_app
from service.settings import Settings
picture = io.BytesIO()
Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(picture, "PNG")
client = TestClient(create_app(Settings(model=Path(sys.argv[1]), device="cpu", threads=1)))
assert client.post("/segment", content=picture.getvalue()).status_code == 200
assert not any(sys.modules.get(name) for name in {blocked!r})
"""


def test_serving_works_with_everything_else_blocked(model_file: Path) -> None:
    script = SEGMENT_ONCE.format(blocked=BLOCKED)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, model_file],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def _imports(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("file", sorted(SERVICE.glob("*.py")), ids=lambda file: file.name)
def test_every_import_is_in_the_requirements(file: Path) -> None:
    needs = ["requirements-base.txt", "requirements.txt", "requirements-gpu.txt"]
    if file.name == "client.py":
        needs = ["requirements-client.txt"]
    lines = [line for name in needs for line in _lines(SERVICE / name)]
    required = {re.split(r"[<>=\[]", line)[0].replace("-", "_") for line in lines}
    third_party = _imports(file) - set(sys.stdlib_module_names) - {"service"} - BROUGHT_BY_FASTAPI
    assert {DISTRIBUTION_OF.get(name, name) for name in third_party} <= required


def test_the_gpu_requirements_differ_by_the_runtime_and_its_driver_alone() -> None:
    cpu, gpu = (set(_lines(SERVICE / name)) for name in ("requirements.txt", "requirements-gpu.txt"))
    assert {line.split(">")[0] for line in cpu ^ gpu} == {"onnxruntime", "onnxruntime-gpu[cuda,cudnn]", "nvidia-ml-py"}


def _lines(file: Path) -> list[str]:
    return [line for line in file.read_text().splitlines() if line and not line.startswith("#")]


def test_the_runtimes_telemetry_is_off() -> None:
    script = "import os, service; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    clean = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=clean, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "1"
