"""Promise: a mask file holds the class ids exactly, and an overlay shows the picture under the classes' colours."""

import io
import json
from typing import Literal

import numpy as np
import pytest
from PIL import Image

from service.errors import InputError
from service.render import mask_png, overlay_picture

PALETTE = [(0, 0, 0), (100, 200, 0), (7, 8, 9)]


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def palette_of(classes: int) -> list[tuple[int, int, int]]:
    return [(index % 251, index % 13, index % 7) for index in range(classes)]


@pytest.mark.parametrize("others", [False, True])
@pytest.mark.parametrize(
    ("dtype", "mode", "classes"),
    [(np.uint8, "P", 2), (np.uint8, "P", 4), (np.uint8, "P", 16), (np.uint8, "P", 255), (np.uint16, "I;16", 300)],
)
def test_ids_survive(dtype: type, mode: str, classes: int, others: bool) -> None:
    mask = np.random.default_rng(0).integers(0, classes, (37, 53), dtype)
    if others:
        mask[5:20, 7:30] = np.iinfo(dtype).max
    image = opened(mask_png(mask, ["name"] * classes, palette_of(classes), {}))
    assert image.mode == mode
    np.testing.assert_array_equal(np.asarray(image), mask)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 1)])
def test_ids_survive_in_thin_pictures(shape: tuple[int, int]) -> None:
    mask = np.random.default_rng(0).integers(0, 3, shape, np.uint8)
    np.testing.assert_array_equal(np.asarray(opened(mask_png(mask, ["a", "b", "c"], PALETTE, {}))), mask)


def test_pixels_of_no_class_are_transparent_and_the_others_have_their_colours() -> None:
    shown = np.asarray(
        opened(mask_png(np.array([[0, 1, 2, 255]], np.uint8), ["a", "b", "c"], PALETTE, {})).convert("RGBA")
    )
    assert shown.tolist() == [[[0, 0, 0, 255], [100, 200, 0, 255], [7, 8, 9, 255], [0, 0, 0, 0]]]


def test_a_mask_without_such_pixels_has_no_transparency() -> None:
    assert "transparency" not in opened(mask_png(np.zeros((2, 2), np.uint8), ["a", "b", "c"], PALETTE, {})).info


def test_text_chunks_explain_the_mask() -> None:
    texts = {"model": "Modell ß", "presence": [{"class": "道", "score": 0.5}]}
    chunks = opened(mask_png(np.zeros((2, 2), np.uint8), ["a", "b", "道"], PALETTE, texts)).text
    assert chunks["model"] == "Modell ß"
    assert json.loads(chunks["presence"]) == texts["presence"]
    assert json.loads(chunks["classes"]) == ["a", "b", "道"]
    assert json.loads(chunks["palette"]) == [list(colour) for colour in PALETTE]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize(("file_format", "tolerance"), [("JPEG", 3), ("PNG", 0)])
def test_overlay_blends_half_and_half_and_leaves_no_class_alone(
    dtype: type, file_format: Literal["JPEG", "PNG"], tolerance: int
) -> None:
    pixels = np.full((32, 48, 3), 200, np.uint8)
    mask = np.zeros((32, 48), dtype)
    mask[:, 16:] = 1
    mask[:, 32:] = np.iinfo(dtype).max
    image = opened(overlay_picture(pixels, mask, PALETTE, file_format=file_format))
    assert image.format == file_format
    for column, colour in ((4, [100, 100, 100]), (24, [150, 200, 100]), (44, [200, 200, 200])):
        assert np.abs(np.asarray(image).astype(int)[4, column] - colour).max() <= tolerance


@pytest.mark.parametrize("shape", [(1, 65_501), (70_000, 1)])
def test_an_overlay_longer_than_a_jpeg_can_be_is_had_as_png(shape: tuple[int, int]) -> None:
    pixels, mask = np.zeros((*shape, 3), np.uint8), np.zeros(shape, np.uint8)
    with pytest.raises(InputError, match=r"65500 pixels a side.* as PNG"):
        overlay_picture(pixels, mask, PALETTE)
    assert opened(overlay_picture(pixels, mask, PALETTE, file_format="PNG")).size == shape[::-1]


def test_an_overlay_as_long_as_a_jpeg_can_be() -> None:
    data = overlay_picture(np.zeros((1, 65_500, 3), np.uint8), np.zeros((1, 65_500), np.uint8), PALETTE)
    assert opened(data).size == (65_500, 1)
