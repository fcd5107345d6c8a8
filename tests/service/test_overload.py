"""Promise: with far more clients than room, everybody gets an answer: a mask, or a refusal that says when to come back.

Figures are the benchmark's business (`python -m benchmarks.overload`): here no time is asserted.
"""

import asyncio
from pathlib import Path

import numpy as np
from live import serving
from tiny_model import encoded

from benchmarks.overload import POLLED, overload
from service.app import create_app
from service.models import Models
from service.settings import Settings


def test_sixty_clients_with_room_for_a_few(model_file: Path) -> None:
    picture = encoded(np.zeros((300, 300, 3), np.uint8))
    # Room for some ten requests of 8 views of this picture.
    models = Models(Settings(model=model_file, device="cpu", threads=1, max_queue_pixels=8_000_000))
    models.start()
    with serving(create_app(models=models)) as url:
        load = asyncio.run(overload(url, [picture], 60, 3, [60_000], "&scales=1,1,1,1&flip=true"))
    models.close()
    assert load.faults == {}
    assert set(load.statuses) <= {200, 429, 503, 504}
    assert load.statuses[200] > 0
    assert load.statuses[429] > 0
    assert all(load.polled[path] for path in POLLED)
