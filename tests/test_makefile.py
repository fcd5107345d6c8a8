"""What `make` hands on to the commands behind its verbs. Nothing is set up here: make only says what it would do."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# `make test` tells its children that they are below a make, which has a make talk about its directory and its flags.
ABOVE = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "PORT", "HOST", "MODEL", "PYTHON")
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ABOVE}

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="no make here")


def make(*words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(["make", *words], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ((), []),
        (("PORT=9000",), ["--port", "9000"]),
        (("HOST=::1", "MODEL=my.onnx"), ["--host", "::1", "--model", "my.onnx"]),
    ],
    ids=["nothing", "port", "host and model"],
)
def test_serve_leaves_to_the_settings_what_it_is_not_told(given: tuple[str, ...], options: list[str]) -> None:
    done = make("--dry-run", "serve", *given)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].split()[-len(options) - 3 :] == ["-m", "service", "serve", *options]


def test_gpu_train_without_torch_is_a_sentence() -> None:
    done = make("gpu-train", "PYTHON=false")
    assert done.returncode == 2
    assert done.stderr.startswith(
        "false has no torch; name one that has, as in PYTHON=.venv/bin/python after make setup\n"
    )
