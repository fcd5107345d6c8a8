"""What the suites share: the tiny model loaded, a picture whose mask is known, a client without a network."""

import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper
from tiny_model import METADATA, PALETTE, tiny_model

from service import logs
from service.app import create_app
from service.engine import Engine
from service.models import Models
from service.settings import Settings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # starlette would rather have httpx's successor
    from starlette.testclient import TestClient


@pytest.fixture(scope="session")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.onnx"
    onnx.save(tiny_model(), path)
    return path


@pytest.fixture
def changed_model(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes the tiny model with other metadata; None removes a key."""

    def write(**changes: str | None) -> Path:
        model = tiny_model()
        properties = {key: value for key, value in {**METADATA, **changes}.items() if value is not None}
        helper.set_model_props(model, properties)
        path = tmp_path / "changed.onnx"
        onnx.save(model, path)
        return path

    return write


@pytest.fixture(scope="session")
def engine(model_file: Path) -> Engine:
    return Engine(model_file, device="cpu", threads=1)


@pytest.fixture
def settings(model_file: Path) -> Settings:
    return Settings(model=model_file, device="cpu", threads=1)


@pytest.fixture
def at_the_command_line(monkeypatch: pytest.MonkeyPatch, model_file: Path, tmp_path: Path) -> None:
    """Commands are given in an empty folder, and use the tiny model on one core."""
    for name, value in (("MODEL", str(model_file)), ("DEVICE", "cpu"), ("THREADS", "1")):
        monkeypatch.setenv(f"ENCNET_{name}", value)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What is logged, each record with its request id as in the service's own log."""
    with caplog.filtering(logs.WithRequestId()):
        yield caplog


@pytest.fixture
def powerless() -> Iterator[None]:
    """The test may read what any user may, where root could read everything."""
    mine = os.geteuid()
    if not mine:
        os.seteuid(65534)
    yield
    os.seteuid(mine)


@pytest.fixture(scope="session")
def quadrants() -> np.ndarray:
    """uint8 (30, 40, 3): black and red above, green and blue below; each quarter is one class of the tiny model."""
    pixels = np.zeros((30, 40, 3), np.uint8)
    pixels[:15, 20:] = PALETTE[1]
    pixels[15:, :20] = PALETTE[2]
    pixels[15:, 20:] = PALETTE[3]
    return pixels


@pytest.fixture(scope="session")
def quadrants_mask() -> np.ndarray:
    """uint8 (30, 40): what the tiny model says about `quadrants`, known from how it is made."""
    mask = np.zeros((30, 40), np.uint8)
    mask[:15, 20:] = 1
    mask[15:, :20] = 2
    mask[15:, 20:] = 3
    return mask


@pytest.fixture
def client_with(settings: Settings) -> Iterator[Callable[..., TestClient]]:
    """A function that makes a client of a service with some settings changed, or with engines of its own."""
    made: list[Models] = []

    def make(open_engine: Callable[[Path, Settings], Engine] | None = None, **changes: object) -> TestClient:
        models = Models(settings.model_copy(update=changes), open_engine)
        models.start()
        made.append(models)
        return TestClient(create_app(models=models), raise_server_exceptions=False)

    yield make
    for models in made:
        models.close()


@pytest.fixture
def client(client_with: Callable[..., TestClient]) -> TestClient:
    return client_with()
