"""Every format that carries labels, read back by code that shares nothing with what wrote it."""

import base64
import email
import email.policy
import io
import itertools
import json
import math
from typing import Any

import numpy as np
import pycocotools.mask
from PIL import Image


def read_mask(format: str, body: bytes, content_type: str, size: tuple[int, int], dtype: type) -> np.ndarray:
    """An answer's label map; `size` is (H, W), for answers that may not tell it. No class is dtype's largest value.

    An `rle` body may be the bare list or an answer that has it as its mask's segments.
    """
    other = np.iinfo(dtype).max
    if format == "png":
        return np.asarray(Image.open(io.BytesIO(body)))
    if format == "json":
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(json.loads(body)["mask"]["data"]))))
    if format == "rle":
        entries = json.loads(body)
        return mask_of_rle(entries if isinstance(entries, list) else entries["mask"]["segments"], size, dtype)
    if format == "polygons":
        mask = np.full(size, other, dtype)
        for feature in json.loads(body)["features"]:
            inside = rasterise([ring for polygon in feature["geometry"]["coordinates"] for ring in polygon], size)
            assert np.all(mask[inside] == other), "two classes claim a pixel"
            mask[inside] = feature["id"]
        return mask
    if format == "npz":
        with np.load(io.BytesIO(body), allow_pickle=False) as arrays:
            return arrays["mask"]
    assert format == "multipart"
    return np.asarray(Image.open(io.BytesIO(parts_of(body, content_type)[1][1])))


def mask_of_rle(entries: list[dict[str, Any]], size: tuple[int, int], dtype: type) -> np.ndarray:
    mask = np.full(size, np.iinfo(dtype).max, dtype)
    for entry in entries:
        assert tuple(entry["segmentation"]["size"]) == size
        inside = pycocotools.mask.decode(entry["segmentation"]).astype(bool)
        assert np.all(mask[inside] == np.iinfo(dtype).max), "two classes claim a pixel"
        mask[inside] = entry["id"]
    return mask


def parts_of(body: bytes, content_type: str) -> list[tuple[str, bytes]]:
    """Content types and contents of a multipart body's parts, by Python's email parser."""
    head = f"Content-Type: {content_type}\r\n\r\n".encode()
    message = email.message_from_bytes(head + body, policy=email.policy.HTTP)
    assert message.is_multipart()
    assert not message.defects
    return [(part.get_content_type(), part.get_payload(decode=True)) for part in message.iter_parts()]


def rasterise(rings: list[list[list[float]]], size: tuple[int, int]) -> np.ndarray:
    """Closed rings of any shape -> bool (H, W): is a pixel's centre inside, by the even-odd rule.

    In each row of centres, every side of a ring that crosses the row flips all pixels to the right of the crossing.
    """
    height, width = size
    crossings = np.zeros((height, width + 1), np.int64)
    for ring in rings:
        assert ring[0] == ring[-1], "a ring is not closed"
        for (x0, y0), (x1, y1) in itertools.pairwise(ring):
            for row in range(math.ceil(min(y0, y1) - 0.5), math.ceil(max(y0, y1) - 0.5)):
                x = x0 + (row + 0.5 - y0) * (x1 - x0) / (y1 - y0)
                crossings[row, max(0, math.ceil(x - 0.5))] += 1
    return np.cumsum(crossings, axis=1)[:, :width] % 2 == 1
