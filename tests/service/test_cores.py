"""Promise: the service starts threads for the cores that it may use, whatever the machine has."""

import os
from pathlib import Path

import pytest

from service import cores
from service.engine import Engine
from service.models import Models
from service.settings import Settings


@pytest.mark.parametrize(
    ("files", "count"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": "200000 100000\n"}, 2),
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "10000 100000\n"}, 1),
        ({"cpu.max": "6400000 100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
    ],
)
def test_a_containers_limit_counts(
    files: dict[str, str], count: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(cores, "CONTROL_GROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    assert cores.available() == count


def threads(engine: Engine) -> list[int]:
    """Of a lone picture's session, and of one beside others."""
    return [session.get_session_options().intra_op_num_threads for session in (engine._session, engine._narrow)]


def test_threads_are_for_the_cores_that_there_are(monkeypatch: pytest.MonkeyPatch, model_file: Path) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(cores, "available", lambda: 4)
    assert threads(Engine(model_file, device="cpu", lanes=2)) == [4, 2]
    assert threads(Engine(model_file, device="cpu", threads=6, lanes=2)) == [6, 3]
    assert Models(Settings(model=model_file)).workers._max_workers == 4
