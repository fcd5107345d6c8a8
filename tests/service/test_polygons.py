"""Promise: polygons are the mask, exactly, and they are valid GeoJSON whatever the mask looks like."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import shapely
import shapely.geometry
from mask_readers import read_mask

from service import polygons as module
from service.errors import InputError
from service.polygons import polygons

CLASSES = [f"class {index}" for index in range(300)]


def noise(height: int, width: int, classes: int, dtype: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(height * width + classes).integers(0, classes, (height, width), dtype)


def with_others(mask: np.ndarray) -> np.ndarray:
    """The mask with the pixels of half its classes given to no class."""
    return np.where(mask % 2, np.iinfo(mask.dtype).max, mask)


def blobs(height: int, width: int) -> np.ndarray:
    """Smooth regions with islands in their lakes, and single pixels here and there."""
    y, x = np.mgrid[:height, :width] / 9
    mask = ((np.sin(x) + np.cos(y * 1.3) + np.sin(x * y / 7)) * 1.3 + 4).astype(np.uint8)
    rng = np.random.default_rng(0)
    return np.where(rng.random(mask.shape) < 0.03, rng.integers(0, 7, mask.shape, np.uint8), mask)


def squares(size: int) -> np.ndarray:
    """Frames inside frames, 1 pixel wide, of two classes in turn."""
    y, x = np.mgrid[:size, :size]
    return (np.minimum(np.minimum(x, y), np.minimum(size - 1 - x, size - 1 - y)) % 2).astype(np.uint8)


def drawn(*rows: str) -> np.ndarray:
    return np.array([[255 if pixel == "." else int(pixel) for pixel in row] for row in rows], np.uint8)


MASKS: dict[str, Callable[[], np.ndarray]] = {
    "one pixel": lambda: np.zeros((1, 1), np.uint8),
    "one row": lambda: noise(1, 5000, 3),
    "one column": lambda: noise(5000, 1, 3),
    "one class": lambda: np.full((40, 60), 7, np.uint8),
    "classes from 1 on": lambda: noise(20, 30, 3) + 1,
    "no class": lambda: np.full((4, 6), 255, np.uint8),
    "checkerboard": lambda: (np.indices((30, 41)).sum(0) % 2).astype(np.uint8),
    "noise of 2": lambda: noise(64, 80, 2),
    "noise of 3": lambda: noise(64, 80, 3),
    "noise of 12": lambda: noise(64, 80, 12),
    "noise of 300": lambda: noise(40, 50, 300, np.uint16),
    "noise with others": lambda: with_others(noise(64, 80, 5)),
    "noise of 300 with others": lambda: with_others(noise(40, 50, 300, np.uint16)),
    "mostly one class": lambda: (np.random.default_rng(5).random((90, 70)) < 0.3).astype(np.uint8),
    "blobs": lambda: blobs(120, 160),
    "frames": lambda: squares(25),
    "hole that touches the outside": lambda: drawn("000.", "0.00", "0.00", "0000"),
    "holes that touch each other": lambda: drawn("00000", "0.000", "00.00", "000.0", "00000"),
    "ring that meets itself": lambda: drawn("..000", ".0..0", ".0..0", "0.000", "000.."),
    "island in a lake": lambda: drawn("00000", "0...0", "0.0.0", "0...0", "00000"),
}


@pytest.fixture(params=MASKS)
def mask(request: pytest.FixtureRequest) -> np.ndarray:
    return MASKS[request.param]()


def geojson(mask: np.ndarray, **members: Any) -> dict[str, Any]:
    return json.loads(polygons(mask, CLASSES, members))


def test_rasterising_by_pixel_centres_gives_the_mask_back(mask: np.ndarray) -> None:
    body = polygons(mask, CLASSES, {})
    np.testing.assert_array_equal(read_mask("polygons", body, "", mask.shape, mask.dtype.type), mask)


def test_geometries_are_valid_and_as_large_as_their_class(mask: np.ndarray) -> None:
    labels = np.unique(mask[mask != np.iinfo(mask.dtype).max])
    features = geojson(mask)["features"]
    assert [feature["id"] for feature in features] == labels.tolist()
    for label, feature in zip(labels.tolist(), features, strict=True):
        geometry = shapely.geometry.shape(feature["geometry"])
        assert geometry.is_valid, shapely.is_valid_reason(geometry)
        pixels = int((mask == label).sum())
        assert geometry.area == pixels
        assert feature["properties"] == {
            "class": CLASSES[label],
            "id": label,
            "pixels": pixels,
            "fraction": pixels / mask.size,
        }


def test_outer_rings_run_counterclockwise_in_x_y_and_holes_clockwise(mask: np.ndarray) -> None:
    for feature in geojson(mask)["features"]:
        for outer, *holes in feature["geometry"]["coordinates"]:
            assert shapely.LinearRing(outer).is_ccw
            assert not any(shapely.LinearRing(hole).is_ccw for hole in holes)


def test_no_point_lies_on_a_straight_line_between_its_neighbours(mask: np.ndarray) -> None:
    for feature in geojson(mask)["features"]:
        for ring in (ring for polygon in feature["geometry"]["coordinates"] for ring in polygon):
            steps = np.diff(np.array([*ring, ring[1]]), axis=0)
            assert np.all((steps[:-1] == 0) != (steps[1:] == 0))


def test_a_small_mask_in_full() -> None:
    mask = drawn("2222", "2..2", "2222")
    assert geojson(mask, id="x", image={"width": 4, "height": 3}) == {
        "type": "FeatureCollection",
        "id": "x",
        "image": {"width": 4, "height": 3},
        "bbox": [0, 0, 4, 3],
        "features": [
            {
                "type": "Feature",
                "id": 2,
                "properties": {"class": "class 2", "id": 2, "pixels": 10, "fraction": 10 / 12},
                "geometry": {
                    "type": "MultiPolygon",
                    "coordinates": [
                        [[[4, 3], [0, 3], [0, 0], [4, 0], [4, 3]], [[3, 1], [1, 1], [1, 2], [3, 2], [3, 1]]]
                    ],
                },
            }
        ],
    }


def test_names_keep_their_letters() -> None:
    name = 'Straße "3", \\ 道'
    assert json.loads(polygons(np.zeros((1, 1), np.uint8), [name], {}))["features"][0]["properties"]["class"] == name


def test_a_long_outline_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = noise(50, 60, 3)
    whole = polygons(mask, CLASSES, {})
    monkeypatch.setattr(module, "_TEXT_POINTS", 7)
    assert polygons(mask, CLASSES, {}) == whole


def test_too_many_corners_are_refused_with_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = (np.indices((10, 10)).sum(0) % 2).astype(np.uint8)
    monkeypatch.setattr(module, "MAX_CORNERS", 400)
    assert geojson(mask)
    monkeypatch.setattr(module, "MAX_CORNERS", 399)
    with pytest.raises(InputError) as caught:
        polygons(mask, CLASSES, {})
    assert caught.value.code == "too_detailed"
    assert "400 corners" in caught.value.message
    assert "399" in caught.value.message
