"""Promise: memory stays where it is under a mixed load. The half hour is `python -m benchmarks.soak`."""

from pathlib import Path

import pytest

from benchmarks.malformed import good_picture_is_answered, stock_for
from benchmarks.server import serving
from benchmarks.soak import GROWTH, growth, mixed, run

SECONDS = 120
BYTES = 96 * 2**20  # beside the benchmark's share: on a busy machine, warming up takes longer than a fifth of the time


@pytest.mark.slow
def test_two_minutes_of_everything_leave_no_trace(model_file: Path) -> None:
    environment = {"ENCNET_DEVICE": "cpu", "ENCNET_THREADS": "1", "ENCNET_TIMEOUT_MS": "240000"}
    with serving(None, "--model", str(model_file), **environment) as server:
        stock = stock_for(server.url, max_side=500)
        samples, tally = run(server, SECONDS, 3, mixed(3, stock, ((120, 90), (480, 360), (1000, 1))), lambda at: None)
        assert [str(failure) for failure in tally.failures] == []
        assert server.is_alive()
        assert server.tracebacks() == 0
        assert good_picture_is_answered(server.url)
    assert {kind for kind, _, _ in tally.answers} >= {"body", "form", "batch", "v2", "departing", "question", "picture"}
    first, last = growth(samples, SECONDS)
    assert last <= first * (1 + GROWTH) + BYTES
