"""A label map as GeoJSON: the outlines of every class along the edges of its pixels, exact.

Coordinates are those of the picture: x to the right, y down, (0, 0) its upper left corner, so that the centre of the
pixel in row r and column c is at (c + 0.5, r + 0.5). A pixel's square lies in the polygons of its class and in no
other, hence rasterising by pixel centres gives the label map back.

The outlines of all classes are found at once, from the corners where they turn. An edge of an outline is horizontal or
vertical; in the list of corners sorted along the lines of the pixel grid, each edge is two neighbours. What follows
what around an outline is then a permutation of the horizontal edges, and its cycles are the rings.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from service.errors import InputError

MAX_CORNERS = 1 << 22  # every label map up to 1024 x 1024, and larger ones of which 1 pixel in 4 or fewer stands alone

_TEXT_POINTS = 1 << 17  # points that are turned into text at a time
_SAME_RING, _NEXT_RING, _NEXT_POLYGON, _FIRST_OF_CLASS = range(4)
_JOINTS = np.array([b",[", b"],[[", b"]],[[[", b"[[["])


@dataclass(frozen=True)
class _Rings:
    """Closed rings, sorted by class; the outer ring of a polygon comes first, its holes follow.

    `x` and `y`, integers (P,), are the points, each ring's first one repeated as its last. Per ring: `first` the index
    of its first point, `label` its class, `hole` whether it is one, `area` in pixels, negative for a hole.
    """

    x: np.ndarray
    y: np.ndarray
    first: np.ndarray
    label: np.ndarray
    hole: np.ndarray
    area: np.ndarray


def polygons(mask: np.ndarray, classes: Sequence[str], members: Mapping[str, Any]) -> bytes:
    """Label map -> GeoJSON FeatureCollection, one MultiPolygon feature for each class that has pixels.

    `mask` is uint8 or uint16 (H, W); its dtype's largest value is no class and gets no feature. A feature's `id` is the
    class id, its properties are `class`, `id`, `pixels` and `fraction` of the picture. `members` are put beside
    `features`, as RFC 7946 section 6.1 allows, and `bbox` is the picture, [0, 0, W, H].

    Geometries are valid as simple features are: no ring meets itself, a polygon's interior is connected (through pixel
    sides, not corners), rings touch in single points at most. Outer rings have a positive shoelace area in (x, y) and
    holes a negative one, counterclockwise and clockwise in the words of RFC 7946; on a screen, with y down, they look
    the other way round.

    Raises InputError with code too_detailed where the outlines have more than MAX_CORNERS corners.
    """
    height, width = mask.shape
    rings = _trace(mask)
    joints = np.full(len(rings.x), _SAME_RING, np.uint8)
    joints[rings.first] = np.where(rings.hole, _NEXT_RING, _NEXT_POLYGON)
    of_class = np.flatnonzero(np.diff(rings.label, prepend=-1))  # each class's first ring
    starts = rings.first[of_class]
    joints[starts] = _FIRST_OF_CLASS
    x_text = np.array([b"%d," % x for x in range(width + 1)])
    y_text = np.array([b"%d]" % y for y in range(height + 1)])

    head = {"type": "FeatureCollection", **members, "bbox": [0, 0, width, height], "features": []}
    parts = [_dump(head).removesuffix(b"]}")]
    pixels = np.add.reduceat(rings.area, of_class) if len(of_class) else ()
    stops = np.append(starts, len(rings.x))[1:]
    for label, count, start, stop in zip(rings.label[of_class].tolist(), pixels, starts, stops, strict=True):
        properties = {"class": classes[label], "id": label, "pixels": int(count), "fraction": int(count) / mask.size}
        geometry = {"type": "MultiPolygon", "coordinates": []}
        feature = {"type": "Feature", "id": label, "properties": properties, "geometry": geometry}
        parts.append((b"," if len(parts) > 1 else b"") + _dump(feature).removesuffix(b"]}}"))
        for begin in range(start, stop, _TEXT_POINTS):
            points = slice(begin, min(begin + _TEXT_POINTS, stop))
            parts.append(_text(_JOINTS[joints[points]], x_text[rings.x[points]], y_text[rings.y[points]]))
        parts.append(b"]]]}}")
    return b"".join([*parts, b"]}"])


def _dump(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def _text(*columns: np.ndarray) -> bytes:
    """Arrays of byte strings (N,) -> their strings side by side, row after row."""
    rows = np.empty(len(columns[0]), [(str(index), column.dtype) for index, column in enumerate(columns)])
    for index, column in enumerate(columns):
        rows[str(index)] = column
    return rows.tobytes().translate(None, b"\0")  # NumPy pads byte strings with zeros


def _trace(mask: np.ndarray) -> _Rings:
    """Label map uint8 or uint16 (H, W) -> the rings around its 4-connected regions."""
    height, width = mask.shape
    columns = width + 1  # of the grid of pixel corners, whose points are numbered row by row
    points = (height + 1) * columns
    integer = np.int32 if points < 1 << 29 else np.int64  # half the memory, where the keys below fit
    nobody = np.iinfo(mask.dtype).max
    padded = np.pad(mask, 1, constant_values=nobody)

    # Around each grid point, four pixels; which of them are of the same class?
    north_west, north_east, south_west, south_east = padded[:-1, :-1], padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    north, south = north_west == north_east, south_west == south_east
    west, east = north_west == south_west, north_east == south_east
    falling, rising = north_west == south_east, north_east == south_west

    # A pixel's region has a corner here, a convex one where neither the pixel beside it nor the one above or below
    # belongs to it, a reflex one where these two do and the opposite one does not. The keys sort corners along the
    # grid's lines: (is the region below the line, line, position, does the edge go on from here), and likewise for the
    # vertical lines and a region to the right.
    keys_h, keys_v = [], []
    for is_south, is_east, pixel, beside, along, opposite in (
        (False, False, north_west, north, west, falling),
        (False, True, north_east, north, east, rising),
        (True, False, south_west, south, west, rising),
        (True, True, south_east, south, east, falling),
    ):
        corner = np.flatnonzero((beside == along) & ~(beside & opposite) & (pixel != nobody)).astype(integer)
        convex = ~beside.ravel()[corner]
        y, x = np.divmod(corner, columns)
        keys_h.append((corner + is_south * points) * 2 + (convex == is_east))
        keys_v.append((x * (height + 1) + y + is_east * points) * 2 + (convex == is_south))
    count = sum(map(len, keys_h))
    if count > MAX_CORNERS:
        raise InputError(
            "too_detailed",
            f"the outlines of this mask have {count} corners, at most {MAX_CORNERS} are allowed as polygons; "
            "ask for format png or rle",
        )
    if not count:
        none = np.empty(0, np.int64)
        return _Rings(none, none, none, none, none.astype(bool), none)
    key_h, key_v = np.concatenate(keys_h), np.concatenate(keys_v)
    by_h = np.argsort(key_h)
    key_h, key_v = key_h[by_h], key_v[by_h]

    # Corners 2k and 2k + 1 are the left and right end of horizontal edge k. Every edge has its region on the right-hand
    # side as seen on a screen: to the right above a region's pixels, down at their right, and so on.
    below = key_h[::2] // 2 >= points
    start = 2 * np.arange(count // 2, dtype=integer) + ~below
    end = start ^ 1
    upper, lower = np.argsort(key_v).astype(integer).reshape(-1, 2).T
    upwards = key_v[upper] // 2 >= points
    after = np.empty(count, integer)  # of a corner where a vertical edge starts: the corner where it ends
    after[np.where(upwards, lower, upper)] = np.where(upwards, upper, lower)

    # Where a region meets itself across a grid point, one ring may pass twice. Cut there, it becomes two that touch.
    following = after[end] // 2
    least = _least_of_cycle(following)
    pinch_falling = np.flatnonzero(falling & ~north & ~west & (north_west != nobody))
    pinch_rising = np.flatnonzero(rising & ~north & ~east & (north_east != nobody))
    one = np.searchsorted(key_h, np.concatenate([pinch_falling * 2, pinch_rising * 2 + 1]))
    other = np.searchsorted(key_h, np.concatenate([(pinch_falling + points) * 2 + 1, (pinch_rising + points) * 2]))
    twice = least[one // 2] == least[other // 2]
    if twice.any():
        partner = np.arange(count, dtype=integer)
        partner[one[twice]], partner[other[twice]] = other[twice], one[twice]
        following = partner[after[partner[end]]] // 2
        least = _least_of_cycle(following)
    order, first, ring_of_edge = _cycle_by_cycle(following, least)

    grid_point = key_h // 2 % points
    y = grid_point[start[order]] // columns
    x_start, x_end = grid_point[start[order]] % columns, grid_point[end[order]] % columns
    area = np.add.reduceat(y * (x_start - x_end), first, dtype=np.int64)
    hole = area < 0
    label = mask[y[first] - ~below[order[first]], np.minimum(x_start, x_end)[first]].astype(np.int64)

    # Which outer ring is a hole's? Above its topmost edge are pixels of the region: the top of that column of pixels is
    # an edge of the region's outer ring, or of another of its holes that begins further up.
    owner = np.arange(len(first))
    if hole.any():
        top_y, top_x = np.divmod(np.minimum.reduceat(y * columns + np.minimum(x_start, x_end), first)[hole], columns)
        same_above = east[:-1, :-1]
        run_top = np.where(same_above, 0, np.arange(height, dtype=np.int32)[:, None])
        np.maximum.accumulate(run_top, axis=0, out=run_top)
        top = points + run_top[top_y - 1, top_x] * columns + top_x
        owner[hole] = ring_of_edge[np.searchsorted(key_h[::2], 2 * top + 1, "right") - 1]
        while hole[owner].any():
            owner = owner[owner]

    sorting = np.argsort((label * len(first) + owner) * 2 + hole, kind="stable")
    edges = np.diff(first, append=len(order))[sorting]
    place = np.cumsum(edges) - edges  # of a ring's first edge in the sorted list
    ring = np.repeat(np.arange(len(first)), edges)
    gather = np.arange(len(order)) + (first[sorting] - place)[ring]
    at = 2 * np.arange(len(order)) + ring  # of an edge's first point: a ring has one more than two for each edge
    xs, ys = np.empty((2, count + len(first)), integer)
    xs[at], xs[at + 1] = x_start[gather], x_end[gather]
    ys[at] = ys[at + 1] = y[gather]
    opening = at[place]
    closing = opening + 2 * edges
    xs[closing], ys[closing] = xs[opening], ys[opening]
    return _Rings(xs, ys, opening, label[sorting], hole[sorting], area[sorting])


def _least_of_cycle(following: np.ndarray) -> np.ndarray:
    """For each element of a permutation, the least of its cycle; the distance looked ahead doubles each time."""
    least, ahead = np.arange(len(following), dtype=following.dtype), following
    while not np.array_equal(seen := least[ahead], least):
        least, ahead = np.minimum(least, seen), ahead[ahead]
    return least


def _cycle_by_cycle(following: np.ndarray, least: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The elements of a permutation in the order of its cycles, each from its least element on.

    `least` is `_least_of_cycle` of it. Returns the elements in that order, the index there at which each cycle begins,
    and for each element the number of its cycle.
    """
    elements = np.arange(len(following), dtype=following.dtype)
    heads = np.flatnonzero(least == elements)
    to_go = np.ones_like(following)  # steps from an element to the one looked ahead to, at last its head
    to_go[heads] = 0
    ahead = np.where(to_go, following, elements)
    moving = np.flatnonzero(ahead != least)
    while len(moving):
        via = ahead[moving]
        to_go[moving] += to_go[via]
        ahead[moving] = via = ahead[via]
        moving = moving[via != least[moving]]
    number = np.empty_like(following)
    number[heads] = np.arange(len(heads))
    number = number[least]
    sizes = np.bincount(number)
    first = np.cumsum(sizes) - sizes
    order = np.empty_like(following)
    order[first[number] + (-to_go % sizes[number])] = elements
    return order, first, number
