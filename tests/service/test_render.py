"""Promise: a mask file holds the class ids exactly, and an overlay shows the picture under the classes' colours."""

import io

import numpy as np
import pytest
from PIL import Image

from service.engine import Engine
from service.render import mask_png, overlay_jpeg


@pytest.mark.parametrize(("dtype", "mode", "classes"), [(np.uint8, "P", 4), (np.uint16, "I;16", 300)])
def test_ids_survive(engine: Engine, dtype: type, mode: str, classes: int) -> None:
    mask = np.random.default_rng(0).integers(0, classes, (37, 53), dtype)
    image = Image.open(io.BytesIO(mask_png(mask, engine, [])))
    assert image.mode == mode
    np.testing.assert_array_equal(np.asarray(image), mask)
    assert image.text["model"] == "encnet-tiny"


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_overlay_blends_half_and_half(dtype: type) -> None:
    pixels = np.full((32, 32, 3), 200, np.uint8)
    mask = np.zeros((32, 32), dtype)
    mask[:, 16:] = 1
    image = np.asarray(Image.open(io.BytesIO(overlay_jpeg(pixels, mask, [(0, 0, 0), (100, 200, 0)])))).astype(int)
    assert np.abs(image[4, 4] - [100, 100, 100]).max() <= 3
    assert np.abs(image[4, 28] - [150, 200, 100]).max() <= 3
