"""Fixtures for the tests of training."""

import signal
from collections.abc import Iterator

import pytest


@pytest.fixture
def terminal_signals() -> Iterator[None]:
    """Signals as in a terminal: where the suite runs in the background, Ctrl-C is ignored."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
