"""Promise: the embedded model is ready to serve and sees a street in the example picture."""

from pathlib import Path

import numpy as np
import pytest
from starlette.testclient import TestClient

import service
from service.app import create_app
from service.engine import Engine
from service.images import decode
from service.settings import EMBEDDED_MODEL, Settings

STREET = Path(service.__file__).parents[1] / "examples" / "street.jpg"

pytestmark = [
    pytest.mark.skipif(not EMBEDDED_MODEL.is_file(), reason="service/models/camvid.onnx is not made yet"),
    pytest.mark.skipif(not STREET.is_file(), reason="examples/street.jpg is not there yet"),
]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(EMBEDDED_MODEL, device="cpu")


def test_the_street_has_houses_and_a_sky(engine: Engine) -> None:
    answer = TestClient(create_app(Settings(device="cpu"))).post("/segment", content=STREET.read_bytes()).json()
    rows = {row["class"]: row for row in answer["presence"]}
    for name in ("building", "sky"):
        assert rows[name]["present"]
        assert rows[name]["fraction"] > 0.1
    assert rows["road"]["present"]


@pytest.mark.parametrize("shape", [(1, 1), (1, 200), (200, 1), (3, 5), (64, 96)])
def test_odd_sizes_get_a_mask_of_their_own_size(engine: Engine, shape: tuple[int, int]) -> None:
    result = engine.segment(np.full((*shape, 3), 127, np.uint8), scales=[0.25], flip=False)
    assert result.mask.shape == shape
    assert np.isfinite(result.presence).all()
    assert ((result.presence >= 0) & (result.presence <= 1)).all()


def test_scales_and_flip_change_the_answer_a_little(engine: Engine) -> None:
    pixels = decode(STREET.read_bytes(), max_bytes=1 << 30, max_pixels=1 << 27).pixels
    plain = engine.segment(pixels, [0.5], False).mask
    merged = engine.segment(pixels, [0.5, 0.75], True).mask
    assert plain.shape == merged.shape == pixels.shape[:2]
    assert 0.6 < (plain == merged).mean() < 1


def test_a_lane_gives_the_same_bits_as_all_threads() -> None:
    engine = Engine(EMBEDDED_MODEL, device="cpu", threads=2, lanes=2)
    pixels = decode(STREET.read_bytes(), max_bytes=1 << 30, max_pixels=1 << 27).pixels
    plan = engine.plan((0.5,), True, probabilities=True)
    (alone,), (beside,) = engine.run([pixels], plan), engine.run([pixels], plan, beside=True)
    np.testing.assert_array_equal(beside.mask, alone.mask)
    np.testing.assert_array_equal(beside.presence, alone.presence)
    np.testing.assert_array_equal(beside.probabilities, alone.probabilities)


def test_the_file_is_small_enough_for_the_repository() -> None:
    assert EMBEDDED_MODEL.stat().st_size <= 40_000_000
