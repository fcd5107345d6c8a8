"""Promise: a run that fails, a device that dies and a run that hangs fail exactly their own pictures, at once."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.device import RESTARTS, Device, Job
from service.engine import Engine
from service.errors import Refusal

GREY = np.full((8, 8, 3), 128, np.uint8)
WAIT = 60  # seconds, far more than needed, so that a busy machine does not fail a test


class Moody(Engine):
    """An engine whose runs can be made to block, to fail, or to end their thread; warm-ups mind `broken` only."""

    def __init__(self, model: Path) -> None:
        super().__init__(model, "cpu", 1)
        self.go_on = threading.Event()
        self.go_on.set()
        self.entered = threading.Event()
        self.failures: list[BaseException | None] = []  # what the next runs raise, None for nothing
        self.broken_after_failure = False
        self.broken = False
        self.runs: list[int] = []

    def run(self, images: Any, plan: Any) -> Any:
        if self.broken:
            raise RuntimeError("the device is gone")
        if plan.scales == (1.0,):  # not a warm-up
            self.runs.append(len(images))
            self.entered.set()
            assert self.go_on.wait(WAIT)
            if self.failures and (failure := self.failures.pop(0)):
                self.broken = self.broken_after_failure
                raise failure
        return super().run(images, plan)


@pytest.fixture
def engines() -> list[Moody]:
    """Every engine the device has loaded, the newest last."""
    return []


@pytest.fixture
def device(model_file: Path, engines: list[Moody]) -> Iterator[Callable[..., Device]]:
    made: list[Device] = []

    def make(**options: Any) -> Device:
        def load() -> Engine:
            engines.append(Moody(model_file))
            return engines[-1]

        made.append(Device(load, **options))
        made[-1].wait_until_started()
        return made[-1]

    yield make
    for one in made:
        for engine in engines:
            engine.go_on.set()
        one.close()


def submit(device: Device, deadline: float = float("inf"), shape: tuple[int, int] = (8, 8)) -> "Future[Any]":
    assert device.engine
    plan = device.engine.plan()
    image = np.full((*shape, 3), 128, np.uint8)
    job = Job(image, plan, device.engine.work(*shape, plan), deadline)
    device.submit(job)
    return job.done


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_answers_are_the_engines(device: Callable[..., Device], engine: Engine) -> None:
    answer, waited = submit(device()).result(WAIT)
    np.testing.assert_array_equal(answer.mask, engine.segment(GREY).mask)
    assert waited >= 0


def test_a_failing_picture_fails_alone(device: Callable[..., Device], engines: list[Moody]) -> None:
    served = device()
    engines[0].failures = [RuntimeError("no memory for this one")]
    with pytest.raises(Refusal) as refused:
        submit(served).result(WAIT)
    assert refused.value.code == "model_failed"
    submit(served).result(WAIT)
    assert served.state == "ready"
    assert len(engines) == 1, "a picture's failure does not restart the device"


def test_in_a_shared_run_only_the_picture_at_fault_fails(device: Callable[..., Device], engines: list[Moody]) -> None:
    served = device(max_batch=4)
    engines[0].go_on.clear()
    first = submit(served)
    assert engines[0].entered.wait(WAIT)
    others = [submit(served) for _ in range(3)]
    # The run under way ends well; then the shared one fails, and of its pictures, each by itself, the first.
    engines[0].failures = [None, RuntimeError("together"), RuntimeError("alone")]
    engines[0].go_on.set()
    first.result(WAIT)
    assert [other.exception(WAIT) is not None for other in others] == [True, False, False]
    assert engines[0].runs == [1, 3, 1, 1, 1]
    assert served.state == "ready"


def test_waiting_pictures_of_one_shape_share_a_run(device: Callable[..., Device], engines: list[Moody]) -> None:
    served = device(max_batch=3)
    engines[0].go_on.clear()
    jobs = [submit(served)]
    assert engines[0].entered.wait(WAIT)
    jobs += [submit(served), submit(served, shape=(4, 8)), submit(served), submit(served)]
    engines[0].go_on.set()
    answers = [job.result(WAIT)[0] for job in jobs]
    assert engines[0].runs == [1, 3, 1]
    assert [answer.mask.shape for answer in answers] == [(8, 8), (8, 8), (4, 8), (8, 8), (8, 8)]
    assert [answer.batch for answer in answers] == [1, 3, 1, 3, 3]


def test_a_dead_device_fails_its_run_and_serves_the_waiting(
    device: Callable[..., Device], engines: list[Moody]
) -> None:
    served = device()
    engines[0].go_on.clear()
    running = submit(served)
    assert engines[0].entered.wait(WAIT)
    waiting = submit(served)
    engines[0].failures = [RuntimeError("illegal memory access")]
    engines[0].broken_after_failure = True  # so that the small run that tells picture from device fails too
    engines[0].go_on.set()
    error = running.exception(WAIT)
    assert isinstance(error, Refusal)
    assert error.code == "device_failed"
    assert waiting.result(WAIT)[0].mask.shape == (8, 8)
    assert served.state == "ready"
    assert len(engines) == 2


def test_a_thread_that_ends_is_replaced(device: Callable[..., Device], engines: list[Moody]) -> None:
    served = device()
    engines[0].failures = [SystemExit()]
    error = submit(served).exception(WAIT)
    assert isinstance(error, Refusal)
    assert error.code == "device_failed"
    until(lambda: served.state == "ready")
    submit(served).result(WAIT)


def test_a_hung_run_trips_the_watchdog(device: Callable[..., Device], engines: list[Moody]) -> None:
    served = device(hang_seconds=0.2)
    engines[0].go_on.clear()
    hung = submit(served)
    assert engines[0].entered.wait(WAIT)
    waiting = submit(served)
    error = hung.exception(WAIT)
    assert isinstance(error, Refusal)
    assert error.code == "device_failed"
    assert "hung" in error.message
    assert waiting.result(WAIT)[0].mask.shape == (8, 8), "what waited is served by the thread that took over"
    engines[0].go_on.set()  # the hung run comes back to life; nobody minds
    submit(served).result(WAIT)
    assert len(engines) == 2


def test_a_device_that_keeps_dying_is_given_up(device: Callable[..., Device], engines: list[Moody]) -> None:
    served = device()
    for attempt in range(RESTARTS + 1):
        until(lambda: served.state == "ready")
        until(lambda attempt=attempt: len(engines) == attempt + 1)  # type: ignore[misc]
        engines[-1].failures = [SystemExit()]
        assert submit(served).exception(WAIT) is not None
    assert served.state == "failed"
    with pytest.raises(Refusal) as refused:
        submit(served)
    assert refused.value.status == 503


def test_a_picture_whose_caller_has_left_is_dropped(device: Callable[..., Device], engines: list[Moody]) -> None:
    served = device()
    engines[0].go_on.clear()
    running = submit(served)
    assert engines[0].entered.wait(WAIT)
    left, stays = submit(served), submit(served)
    assert left.cancel()
    engines[0].go_on.set()
    running.result(WAIT)
    stays.result(WAIT)
    assert len(engines[0].runs) == 2


def test_a_picture_that_is_too_late_is_dropped(device: Callable[..., Device], engines: list[Moody]) -> None:
    served = device()
    error = submit(served, deadline=time.monotonic() - 1).exception(WAIT)
    assert isinstance(error, Refusal)
    assert error.code == "deadline_passed"
    assert engines[0].runs == []


def test_closing_fails_what_waits_and_finishes_what_runs(device: Callable[..., Device], engines: list[Moody]) -> None:
    served = device()
    engines[0].go_on.clear()
    running = submit(served)
    assert engines[0].entered.wait(WAIT)
    waiting = submit(served)
    closing = threading.Thread(target=served.close, args=(WAIT,))
    closing.start()
    error = waiting.exception(WAIT)
    assert isinstance(error, Refusal)
    assert error.status == 503
    engines[0].go_on.set()
    running.result(WAIT)
    closing.join(WAIT)
    assert not closing.is_alive()


def test_what_the_first_load_raises_reaches_the_caller() -> None:
    def load() -> Engine:
        raise ValueError("no such model")

    served = Device(load)
    with pytest.raises(ValueError, match="no such model"):
        served.wait_until_started()
    assert served.state == "failed"
