"""Promise: whatever carries labels gives the mask back bit for bit, to readers that know nothing of this service."""

import base64
import io
import json
from typing import Any, get_args

import numpy as np
import pycocotools.mask
import pytest
from mask_readers import mask_of_rle, parts_of, read_mask

from service.encoders import multipart, npz, rle
from service.formats import FORMATS, FormatName
from service.polygons import polygons
from service.render import mask_png

CLASSES = [f"class {index}" for index in range(300)]
PALETTE = [(index % 251, index % 13, index % 7) for index in range(300)]


def noise(shape: tuple[int, int], classes: int, dtype: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(classes).integers(0, classes, shape, dtype)


def with_others(mask: np.ndarray) -> np.ndarray:
    return np.where(mask % 2, np.iinfo(mask.dtype).max, mask)


MASKS = {
    "noise": noise((60, 70), 12),
    "noise with others": with_others(noise((60, 70), 12)),
    "16 bits": noise((40, 50), 300, np.uint16),
    "16 bits with others": with_others(noise((40, 50), 300, np.uint16)),
    "one pixel": np.full((1, 1), 3, np.uint8),
    "one row": noise((1, 5000), 3),
    "one column": noise((5000, 1), 3),
    "one class": np.full((30, 20), 11, np.uint8),
    "no class": np.full((30, 20), 255, np.uint8),
    "halves": np.repeat([[0], [1]], [7, 3], axis=0).repeat(9, axis=1).astype(np.uint8),
}


@pytest.fixture(params=MASKS)
def mask(request: pytest.FixtureRequest) -> np.ndarray:
    return MASKS[request.param]


def write(format: str, mask: np.ndarray) -> tuple[bytes, str]:
    """The mask in a format: body and content type."""
    classes = CLASSES[: 255 if mask.dtype == np.uint8 else 300]
    png = mask_png(mask, classes, PALETTE[: len(classes)], {})
    media_type = FORMATS[format].media_types[0]
    if format == "multipart":
        return multipart(b'{"id": "x"}', png)
    if format == "npz":
        probabilities = np.full((2, *mask.shape), 0.5, np.float32)
        return npz(mask, probabilities, np.array([0.5, 0.5], np.float32), classes), media_type
    bodies = {
        "png": lambda: png,
        "json": lambda: json.dumps({"mask": {"data": base64.b64encode(png).decode()}}).encode(),
        "rle": lambda: json.dumps(rle(mask, classes)).encode(),
        "polygons": lambda: polygons(mask, classes, {}),
    }
    return bodies[format](), media_type


@pytest.mark.parametrize("format", [name for name, format in FORMATS.items() if format.carries_labels])
def test_every_format_that_carries_labels_gives_the_mask_back(format: FormatName, mask: np.ndarray) -> None:
    body, content_type = write(format, mask)
    back = read_mask(format, body, content_type, mask.shape, mask.dtype.type)
    assert back.dtype == mask.dtype
    np.testing.assert_array_equal(back, mask)


def test_the_table_lists_every_format_once() -> None:
    assert tuple(FORMATS) == get_args(FormatName)


# ---- COCO run lengths


def test_rle_is_what_pycocotools_encodes(mask: np.ndarray) -> None:
    labels = np.unique(mask[mask != np.iinfo(mask.dtype).max]).tolist()
    entries = rle(mask, CLASSES)
    assert [entry["id"] for entry in entries] == labels
    for label, entry in zip(labels, json.loads(json.dumps(entries)), strict=True):
        inside = mask == label
        theirs = pycocotools.mask.encode(np.asfortranarray(inside, np.uint8))
        assert entry["segmentation"] == {"size": list(mask.shape), "counts": theirs["counts"].decode()}
        rows, columns = np.nonzero(inside)
        x, y = int(columns.min()), int(rows.min())
        assert entry["bbox"] == [x, y, int(columns.max()) - x + 1, int(rows.max()) - y + 1]
        assert entry["area"] == len(rows)
        assert entry["class"] == CLASSES[label]
    np.testing.assert_array_equal(mask_of_rle(entries, mask.shape, mask.dtype.type), mask)


# ---- NumPy


@pytest.fixture
def arrays() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 4, (3, 21, 34)).astype(np.float32)
    probabilities = np.exp(logits) / np.exp(logits).sum(0)
    return {
        "mask": probabilities.argmax(0).astype(np.uint8),
        "probabilities": probabilities,
        "presence": rng.random(3, np.float32),
        "classes": ["sky", "道", "Straße"],
    }


def test_npz_is_read_without_pickle(arrays: dict[str, Any]) -> None:
    with np.load(io.BytesIO(npz(**arrays)), allow_pickle=False) as back:
        assert set(back) == set(arrays)
        assert back["classes"].tolist() == arrays["classes"]
        assert back["presence"].dtype == np.float32
        np.testing.assert_array_equal(back["presence"], arrays["presence"])
        np.testing.assert_array_equal(back["mask"], arrays["mask"])
        assert back["probabilities"].dtype == np.float16
        np.testing.assert_array_equal(back["probabilities"], arrays["probabilities"].astype(np.float16))
        assert np.abs(back["probabilities"].astype(np.float32) - arrays["probabilities"]).max() < 0.00025


def test_npz_that_nobody_waits_for_is_given_up_between_two_planes(arrays: dict[str, Any]) -> None:
    planes = iter([False, True])
    npz(**arrays, abandoned=lambda: next(planes))
    assert next(planes, None) is None, "asked before each plane"


def test_npz_takes_probabilities_that_are_not_contiguous(arrays: dict[str, Any]) -> None:
    turned = np.asfortranarray(arrays["probabilities"])
    with np.load(io.BytesIO(npz(**{**arrays, "probabilities": turned}))) as back:
        np.testing.assert_array_equal(back["probabilities"], turned.astype(np.float16))


# ---- multipart


def test_multipart_keeps_every_byte_of_its_two_parts() -> None:
    every_byte = bytes(range(256)) * 64 + b"\r\n--\r\n\r\n\n\r" + bytes(range(255, -1, -1)) + b"\r"
    answer = '{"class": "道"}'.encode()
    body, content_type = multipart(answer, every_byte)
    assert parts_of(body, content_type) == [("application/json", answer), ("image/png", every_byte)]


def test_multipart_has_another_boundary_each_time() -> None:
    assert multipart(b"{}", b"")[1] != multipart(b"{}", b"")[1]
