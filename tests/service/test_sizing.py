"""Promise: the README's table on sizing is what `python -m benchmarks.sizing` measured and computed."""

import json
from pathlib import Path

import pytest

from benchmarks import sizing
from benchmarks.sizing import ASSUMED, LOADS, SIX, Load
from service.engine import Engine

README = Path(__file__).parents[2] / "README.md"


def test_a_load_is_measured_in_its_parts(engine: Engine) -> None:
    times = sizing.measure(engine, Load((60, 40), (0.5, 1.0), flip=True), seconds=0)
    assert 0 < times.decode_ms < 1000
    assert 0 < times.run_ms < 1000
    assert 0 < times.encode_ms < 1000
    assert 20 < times.memory_mb < 100_000


def test_operations_are_counted_as_by_hand(engine: Engine) -> None:
    """The tiny model has two 1x1 convolutions from 3 to 4 channels, each 12 multiplications and as many additions."""
    assert sizing.flops_by_pixel(engine) == 2 * 2 * 12


def test_the_gpu_is_computed_from_pixels_views_and_launches(engine: Engine) -> None:
    """The tiny model's base size is 64, and it has four classes."""
    launch = ASSUMED["launch_ms_per_scale"]
    network, merged = 2 * 64 * 48, 2 * 640 * 480
    seconds = network * 1e6 / (67e12 * 0.25) + merged * 4 * 4 * 10 / (4.8e12 * 0.5)
    found = sizing.computed_gpu_ms(engine, Load((640, 480), flip=True), 1e6)
    assert found == pytest.approx(1000 * seconds + launch)
    assert sizing.computed_gpu_ms(engine, Load((640, 480), SIX), 1e6) > 6 * launch
    reduced = sizing.computed_gpu_ms(engine, Load((640, 480), flip=True, max_side=320), 1e6)
    assert reduced < found


def test_the_readme_has_the_rows_of_the_result() -> None:
    result = json.loads(sizing.RESULT.read_text())
    rows = sizing.rows(result)
    assert len(rows) == len(LOADS)
    lines = README.read_text(encoding="utf-8").splitlines()
    start = lines.index(rows[0])
    assert lines[start : start + len(rows)] == rows
    heading = lines[start - 2]
    assert ("computed" in heading) == ("cuda" not in result), "the heading says whether a GPU was measured"


def test_a_measured_gpu_takes_the_place_of_the_computed_one() -> None:
    result = json.loads(sizing.RESULT.read_text())
    name = str(LOADS[0])
    result["cuda"] = {"loads": {name: {"run_ms": 2.0}}}
    cells = [cell.strip() for cell in sizing.rows(result)[0].split("|")]
    assert cells[1] == name
    assert cells[5] == "500"
    assert float(cells[7]) == pytest.approx(1e6 / 500 / 3600 * result["computed"]["dollars_per_hour"], rel=0.05)
