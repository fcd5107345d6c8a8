"""Promise: a run that fails, a device that dies and a run that hangs fail exactly their own pictures, at once."""

import logging
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from live import until

from service import logs
from service.device import RESTARTS, Device, Job
from service.engine import Engine
from service.errors import Refusal

GREY = np.full((8, 8, 3), 128, np.uint8)
STUCK = (4, 4)
WAIT = 60  # seconds, far more than needed, so that a busy machine does not fail a test


class Moody(Engine):
    """An engine whose runs can be made to block, to fail, or to end their thread; warm-ups mind `broken` only.

    `runs` has the number of pictures of each run in the order in which they began, `beside` how many of the runs had
    one lane's threads only.
    """

    def __init__(self, model: Path, lanes: int) -> None:
        super().__init__(model, "cpu", lanes, lanes=lanes)
        self.go_on = threading.Event()
        self.go_on.set()
        self.entered = threading.Event()
        self.failures: list[BaseException | None] = []  # what the next runs raise, None for nothing
        self.broken_after_failure = False
        self.broken = False
        self.runs: list[int] = []
        self.beside = 0
        self.stuck = threading.Event()  # set once a picture of the shape STUCK is being run, until come_back
        self.come_back = threading.Event()

    def run(self, images: Any, plan: Any, options: Any = None, beside: bool = False) -> Any:
        self.beside += beside and plan.scales == (1.0,)
        self.meet(images, plan)
        return super().run(images, plan, options, beside)

    def meet(self, images: Any, plan: Any) -> None:
        if self.broken:
            raise RuntimeError("the device is gone")
        if plan.scales == (1.0,):  # not a warm-up
            self.runs.append(len(images))
            self.entered.set()
            if images[0].shape[:2] == STUCK:
                self.stuck.set()
                assert self.come_back.wait(WAIT)
            assert self.go_on.wait(WAIT)
            if self.failures and (failure := self.failures.pop(0)):
                self.broken = self.broken_after_failure
                raise failure


@pytest.fixture
def engines() -> list[Moody]:
    """Every engine the device has loaded, the newest last."""
    return []


@pytest.fixture
def device(model_file: Path, engines: list[Moody]) -> Iterator[Callable[..., Device]]:
    made: list[Device] = []

    def make(lanes: int = 1, **options: Any) -> Device:
        def load() -> Engine:
            engines.append(Moody(model_file, lanes))
            return engines[-1]

        made.append(Device(load, **options))
        made[-1].wait_until_started()
        return made[-1]

    yield make
    for one in made:
        for engine in engines:
            engine.go_on.set()
            engine.come_back.set()
        one.close()


def submit(
    device: Device, deadline: float = float("inf"), shape: tuple[int, int] = (8, 8), alone: bool = True
) -> "Future[Any]":
    assert device.engine
    plan = device.engine.plan()
    image = np.full((*shape, 3), 128, np.uint8)
    job = Job(image, plan, device.engine.work(*shape, plan), deadline, alone)
    device.submit(job)
    return job.done


def held(served: Device, engine: Moody) -> "Future[Any]":
    """A picture whose run has begun, and goes on until the engine's `go_on` is set."""
    engine.go_on.clear()
    picture = submit(served)
    assert engine.entered.wait(WAIT)
    return picture


def test_a_picture_is_let_go_when_its_run_is_over(device: Callable[..., Device]) -> None:
    """Not only when the next one comes: with its answer it may have a gigabyte."""
    one = device()
    assert one.engine
    plan = one.engine.plan()
    job = Job(GREY.copy(), plan, one.engine.work(8, 8, plan), float("inf"))
    picture = weakref.ref(job.image)
    one.submit(job)
    job.done.result(WAIT)
    del job
    until(lambda: picture() is None)


def test_answers_are_the_engines(device: Callable[..., Device], engine: Engine) -> None:
    answer, waited = submit(device()).result(WAIT)
    np.testing.assert_array_equal(answer.mask, engine.segment(GREY).mask)
    assert waited >= 0


def test_a_run_is_measured_and_a_wait_too(device: Callable[..., Device], engines: list[Moody]) -> None:
    served = device()
    work = engines[0].work(8, 8, engines[0].plan())
    assert served.cost_model.predict(work) < 0.03
    running = held(served, engines[0])
    waiting = submit(served)
    time.sleep(0.1)
    engines[0].go_on.set()
    running.result(WAIT)
    assert waiting.result(WAIT)[1] >= 0.1
    assert served.cost_model.predict(work) > 0.03, "about half of the two runs"


def test_a_failing_picture_fails_alone(device: Callable[..., Device], engines: list[Moody]) -> None:
    served = device()
    engines[0].failures = [RuntimeError("no memory for this one")]
    with pytest.raises(Refusal) as refused:
        submit(served).result(WAIT)
    assert refused.value.code == "model_failed"
    submit(served).result(WAIT)
    assert served.state == "ready"
    assert len(engines) == 1, "a picture's failure does not restart the device"


def test_in_a_shared_run_only_the_picture_at_fault_fails(
    device: Callable[..., Device], engines: list[Moody], log: pytest.LogCaptureFixture
) -> None:
    served = device(max_batch=4)
    first = held(served, engines[0])
    others = []
    for request_id in ("one", "two", "two"):
        token = logs.request_id.set(request_id)
        others.append(submit(served))
        logs.request_id.reset(token)
    # The run under way ends well; then the shared one fails, and of its pictures, each by itself, the first.
    engines[0].failures = [None, RuntimeError("together"), RuntimeError("alone")]
    engines[0].go_on.set()
    first.result(WAIT)
    assert [other.exception(WAIT) is not None for other in others] == [True, False, False]
    assert engines[0].runs == [1, 3, 1, 1, 1]
    said = [(record.message, record.request_id) for record in log.records]  # type: ignore[attr-defined]
    assert said == [("a run failed: together", "one,two"), ("a run failed: alone", "one")]
    assert served.state == "ready"


def test_of_a_shared_run_that_failed_those_whose_callers_have_left_are_not_run_again(
    device: Callable[..., Device], engines: list[Moody]
) -> None:
    served = device(max_batch=4)
    first = held(served, engines[0])
    plan = engines[0].plan()
    picture = np.full((*STUCK, 3), 128, np.uint8)
    left, kept = (Job(picture, plan, engines[0].work(*STUCK, plan), float("inf")) for _ in range(2))
    served.submit(left)
    served.submit(kept)
    engines[0].failures = [None, RuntimeError("together")]
    engines[0].go_on.set()
    first.result(WAIT)
    assert engines[0].stuck.wait(WAIT)
    served.abandon(left)
    engines[0].come_back.set()
    assert kept.done.result(WAIT)[0].batch == 1
    assert isinstance(left.done.exception(WAIT), Refusal)
    assert engines[0].runs == [1, 2, 1]


def test_a_device_that_dies_over_a_shared_run_fails_all_that_is_left_of_it(
    device: Callable[..., Device], engines: list[Moody]
) -> None:
    served = device(max_batch=4)
    held(served, engines[0])
    others = [submit(served) for _ in range(3)]
    engines[0].failures = [None, RuntimeError("together"), None, SystemExit()]
    engines[0].go_on.set()
    errors = [other.exception(WAIT) for other in others]
    assert [error.code if isinstance(error, Refusal) else error for error in errors] == [
        None,
        "device_failed",
        "device_failed",
    ]


def test_waiting_pictures_of_one_shape_share_a_run(device: Callable[..., Device], engines: list[Moody]) -> None:
    served = device(max_batch=3)
    engines[0].go_on.clear()
    jobs = [submit(served)]
    assert engines[0].entered.wait(WAIT)
    jobs += [submit(served), submit(served, shape=(4, 8)), submit(served), submit(served), submit(served)]
    engines[0].go_on.set()
    answers = [job.result(WAIT)[0] for job in jobs]
    assert engines[0].runs == [1, 3, 1, 1]
    assert [answer.mask.shape for answer in answers] == [(8, 8), (8, 8), (4, 8), (8, 8), (8, 8), (8, 8)]
    assert [answer.batch for answer in answers] == [1, 3, 1, 3, 3, 1]


def test_pictures_share_a_run_only_while_they_fit_together(device: Callable[..., Device], engines: list[Moody]) -> None:
    served = device(max_batch=4, beside_pixels=3 * 64 - 1)
    jobs = [held(served, engines[0])] + [submit(served) for _ in range(5)]
    engines[0].go_on.set()
    for job in jobs:
        job.result(WAIT)
    assert engines[0].runs == [1, 2, 2, 1]


def test_pictures_that_ask_for_other_views_do_not_share_a_run(
    device: Callable[..., Device], engines: list[Moody]
) -> None:
    served = device(max_batch=4)
    held(served, engines[0])
    jobs = []
    for flip in (False, True, False):
        plan = engines[0].plan(flip=flip)
        jobs.append(Job(GREY, plan, engines[0].work(8, 8, plan), float("inf")))
        served.submit(jobs[-1])
    engines[0].go_on.set()
    answers = [job.done.result(WAIT)[0] for job in jobs]
    assert [(answer.flip, answer.batch) for answer in answers] == [(False, 2), (True, 1), (False, 2)]


def test_a_dead_device_fails_its_run_and_serves_the_waiting(
    device: Callable[..., Device], engines: list[Moody]
) -> None:
    served = device()
    running = held(served, engines[0])
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


def test_a_hung_run_trips_the_watchdog(
    device: Callable[..., Device], engines: list[Moody], log: pytest.LogCaptureFixture
) -> None:
    served = device(hang_seconds=0.2)
    token = logs.request_id.set("slow one")
    hung = held(served, engines[0])
    logs.request_id.reset(token)
    waiting = submit(served)
    error = hung.exception(WAIT)
    assert isinstance(error, Refusal)
    assert error.code == "device_failed"
    assert "hung" in error.message
    hangs = next(record for record in log.records if record.message.startswith("a run hangs"))
    assert hangs.request_id == "slow one"  # type: ignore[attr-defined]
    assert waiting.result(WAIT)[0].mask.shape == (8, 8), "what waited is served by the thread that took over"
    engines[0].go_on.set()  # the hung run comes back to life; nobody minds
    submit(served).result(WAIT)
    assert len(engines) == 2


def test_a_load_after_a_death_that_hangs_is_given_up_and_at_last_the_device(model_file: Path) -> None:
    """A driver that hangs in a run may well hang in the next load; only another process helps then."""
    engine = Moody(model_file, 1)
    loads: list[Engine] = [engine]
    go_on = threading.Event()

    def load() -> Engine:
        if not loads:
            assert go_on.wait(WAIT)
        return loads.pop() if loads else engine

    served = Device(load, hang_seconds=0.1)
    served.wait_until_started()
    threads = list(served._threads)
    engine.failures = [SystemExit()]
    engine.go_on.clear()
    lost, waiting = held(served, engine), submit(served)
    engine.go_on.set()
    for job in (lost, waiting):
        assert isinstance(job.exception(WAIT), Refusal)
    until(lambda: served.state == "failed")
    assert served.reason == "the load hung"
    go_on.set()  # the loads come back to life; nobody minds
    for thread in threads:
        thread.join(WAIT)
    assert served.state == "failed"


def test_a_load_does_not_hang_before_ten_times_the_one_before(
    device: Callable[..., Device], engines: list[Moody]
) -> None:
    served = device(hang_seconds=0.05)
    served._load_seconds = WAIT
    load, go_on = served._load, threading.Event()

    def slow() -> Engine:
        assert go_on.wait(WAIT)
        return load()

    served._load = slow
    engines[0].failures = [SystemExit()]
    assert submit(served).exception(WAIT) is not None
    time.sleep(0.3)
    assert (served.state, served._restarts) == ("restarting", 1)
    go_on.set()
    until(lambda: served.state == "ready")


def test_a_run_does_not_hang_before_ten_times_its_prediction(
    device: Callable[..., Device], engines: list[Moody]
) -> None:
    served = device(hang_seconds=0.05)
    for _ in range(50):
        served.cost_model.observe(engines[0].work(8, 8, engines[0].plan()), 60.0)
    slow = held(served, engines[0])
    time.sleep(0.2)
    assert not slow.done()
    engines[0].go_on.set()
    assert slow.result(WAIT)[0].mask.shape == (8, 8)
    assert (len(engines), served.state) == (1, "ready")


def test_an_engine_that_died_is_let_go(model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its session and, on a GPU, its memory there: beside the fresh engine there may be no room for it."""
    monkeypatch.setattr(logging.getLogger("service.device"), "disabled", True)  # pytest keeps the tracebacks it is told

    class Mortal(Moody):
        def meet(self, images: Any, plan: Any) -> None:
            if plan.scales == (1.0,) and len(engines) == 1:
                sys.exit()

    engines: list[weakref.ref[Engine]] = []

    def load() -> Engine:
        engine = Mortal(model_file, 1)
        engines.append(weakref.ref(engine))
        return engine

    served = Device(load)
    served.wait_until_started()
    assert submit(served).exception(WAIT) is not None
    until(lambda: len(engines) == 2 and served.state == "ready")
    until(lambda: engines[0]() is None)
    served.close()


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


def test_what_waits_for_a_device_that_cannot_come_back_fails_at_once(model_file: Path) -> None:
    engine = Moody(model_file, 1)
    loads: list[Engine | Exception] = [engine, *[ValueError("no memory")] * RESTARTS]

    def load() -> Engine:
        loaded = loads.pop(0)
        if isinstance(loaded, Exception):
            raise loaded
        return loaded

    served = Device(load)
    served.wait_until_started()
    running = held(served, engine)
    waiting = submit(served)
    engine.failures = [SystemExit()]
    engine.go_on.set()
    for job in (running, waiting):
        error = job.exception(WAIT)
        assert isinstance(error, Refusal)
        assert error.code == "device_failed"
    assert (served.state, loads) == ("failed", [])


def test_a_device_that_dies_now_and_then_is_not_given_up(device: Callable[..., Device], engines: list[Moody]) -> None:
    served = device()
    for death in range(1, RESTARTS + 3):
        engines[-1].failures = [SystemExit()]
        assert submit(served).exception(WAIT) is not None
        until(lambda death=death: len(engines) == death + 1 and served.state == "ready")  # type: ignore[misc]
        submit(served).result(WAIT)


def test_a_picture_whose_caller_has_left_is_dropped(device: Callable[..., Device], engines: list[Moody]) -> None:
    served = device()
    running = held(served, engines[0])
    left, stays = submit(served), submit(served)
    assert left.cancel()
    engines[0].go_on.set()
    running.result(WAIT)
    stays.result(WAIT)
    assert len(engines[0].runs) == 2


def test_a_picture_whose_caller_has_left_is_let_go_while_others_run(
    device: Callable[..., Device], engines: list[Moody]
) -> None:
    """Who comes and goes while a run takes long would otherwise fill the memory, no longer counted as let in."""
    served = device()
    running = held(served, engines[0])
    plan = engines[0].plan()
    job = Job(GREY.copy(), plan, engines[0].work(8, 8, plan), float("inf"))
    picture = weakref.ref(job.image)
    served.submit(job)
    served.abandon(job)
    del job
    assert picture() is None
    engines[0].go_on.set()
    running.result(WAIT)


def test_a_shared_run_leaves_out_whose_caller_has_left_and_who_is_too_late(
    device: Callable[..., Device], engines: list[Moody]
) -> None:
    served = device(max_batch=4)
    running = held(served, engines[0])
    first, left, late, stays = submit(served), submit(served), submit(served, time.monotonic() - 1), submit(served)
    assert left.cancel()
    engines[0].go_on.set()
    assert [job.result(WAIT)[0].batch for job in (running, first, stays)] == [1, 2, 2]
    error = late.exception(WAIT)
    assert isinstance(error, Refusal)
    assert error.code == "deadline_passed"
    assert (engines[0].runs, len(engines), served.state) == ([1, 2], 1, "ready")


def test_a_picture_that_is_too_late_is_dropped(device: Callable[..., Device], engines: list[Moody]) -> None:
    served = device()
    error = submit(served, deadline=time.monotonic() - 1).exception(WAIT)
    assert isinstance(error, Refusal)
    assert error.code == "deadline_passed"
    assert engines[0].runs == []


def test_closing_fails_what_waits_and_finishes_what_runs(device: Callable[..., Device], engines: list[Moody]) -> None:
    served = device()
    running = held(served, engines[0])
    waiting = submit(served)
    closing = threading.Thread(target=served.close, args=(WAIT,))
    closing.start()
    error = waiting.exception(WAIT)
    assert isinstance(error, Refusal)
    assert (error.code, error.status) == ("draining", 503)
    closing.join(0.05)
    assert closing.is_alive(), "it waits for what runs"
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


def test_a_device_closed_while_it_loads_stays_closed(model_file: Path) -> None:
    go_on = threading.Event()

    def load() -> Engine:
        assert go_on.wait(WAIT)
        return Moody(model_file, 1)

    served = Device(load)
    (thread,) = served._threads
    served.close(0)
    go_on.set()
    thread.join(WAIT)
    assert (thread.is_alive(), served.state) == (False, "closed")


def test_a_device_that_dies_after_it_was_closed_stays_closed(
    device: Callable[..., Device], engines: list[Moody]
) -> None:
    served = device()
    running = held(served, engines[0])
    served.close(0)
    engines[0].failures = [SystemExit()]
    engines[0].go_on.set()
    assert running.exception(WAIT) is not None
    assert (len(engines), served.state) == (1, "closed")


def test_a_run_that_nobody_waits_for_is_stopped(device: Callable[..., Device], engines: list[Moody]) -> None:
    served = device()
    engines[0].go_on.clear()
    image = np.full((8, 8, 3), 128, np.uint8)
    plan = engines[0].plan()
    jobs = [Job(image, plan, engines[0].work(8, 8, plan), float("inf")) for _ in range(2)]
    for job in jobs:
        served.submit(job)
    assert engines[0].entered.wait(WAIT)
    for job in jobs:
        served.abandon(job)
    assert jobs[1].done.cancelled(), "this one never ran"
    assert not jobs[0].done.done()
    engines[0].go_on.set()
    error = jobs[0].done.exception(WAIT)
    assert isinstance(error, Refusal)
    assert submit(served).result(WAIT)[0].mask.shape == (8, 8)
    assert (len(engines), engines[0].runs, served.state) == (1, [1, 1], "ready")


def test_a_run_that_is_stopped_late_teaches_that_such_take_longer(
    device: Callable[..., Device], engines: list[Moody]
) -> None:
    served = device()
    engines[0].go_on.clear()
    plan = engines[0].plan()
    job = Job(np.full((8, 8, 3), 128, np.uint8), plan, engines[0].work(8, 8, plan), float("inf"))
    before = served.cost_model.predict(job.work)
    served.submit(job)
    assert engines[0].entered.wait(WAIT)
    time.sleep(before + 0.1)
    served.abandon(job)
    engines[0].go_on.set()
    assert isinstance(job.done.exception(WAIT), Refusal)
    assert served.cost_model.predict(job.work) > before


def test_a_run_goes_on_while_somebody_waits_for_one_of_its_pictures(
    device: Callable[..., Device], engines: list[Moody]
) -> None:
    served = device(max_batch=2)
    engines[0].go_on.clear()
    submit(served)
    until(lambda: engines[0].runs == [1])
    plan = engines[0].plan()
    picture = np.full((*STUCK, 3), 128, np.uint8)
    left, kept = (Job(picture, plan, engines[0].work(*STUCK, plan), float("inf")) for _ in range(2))
    served.submit(left)
    served.submit(kept)
    engines[0].go_on.set()
    assert engines[0].stuck.wait(WAIT)
    served.abandon(left)
    engines[0].come_back.set()
    assert kept.done.result(WAIT)[0].batch == 2


# ---- lanes


def test_a_lone_picture_has_all_threads_and_pictures_side_by_side_share_them(
    device: Callable[..., Device], engines: list[Moody], engine: Engine
) -> None:
    served = device(lanes=2)
    submit(served).result(WAIT)
    assert (engines[0].runs, engines[0].beside) == ([1], 0)
    engines[0].go_on.clear()
    jobs = [submit(served) for _ in range(4)]
    until(lambda: len(engines[0].runs) == 3)
    time.sleep(0.05)
    assert len(engines[0].runs) == 3, "two at a time"
    engines[0].go_on.set()
    for job in jobs:
        np.testing.assert_array_equal(job.result(WAIT)[0].mask, engine.segment(GREY).mask)
    assert engines[0].beside >= 2, "those that began while others ran or waited"


def test_a_picture_that_others_follow_leaves_them_their_threads(
    device: Callable[..., Device], engines: list[Moody]
) -> None:
    submit(device(lanes=2), alone=False).result(WAIT)
    assert engines[0].beside == 1


def test_a_dead_lane_fails_its_own_run_only(device: Callable[..., Device], engines: list[Moody]) -> None:
    served = device(lanes=2)
    neighbour = submit(served, shape=STUCK)
    assert engines[0].stuck.wait(WAIT)
    engines[0].failures = [SystemExit()]
    engines[0].go_on.clear()
    dying, waiting = submit(served), submit(served)
    until(lambda: len(engines[0].runs) == 2)
    engines[0].go_on.set()
    error = dying.exception(WAIT)
    assert isinstance(error, Refusal)
    assert error.code == "device_failed"
    assert waiting.result(WAIT)[0].mask.shape == (8, 8), "what waited is served by a fresh engine"
    assert not neighbour.done()
    engines[0].come_back.set()
    assert neighbour.result(WAIT)[0].mask.shape == STUCK
    assert (len(engines), len(engines[0].runs), served.state) == (2, 2, "ready")


def test_a_lane_of_an_engine_given_up_takes_no_more_pictures(
    device: Callable[..., Device], engines: list[Moody]
) -> None:
    served = device(lanes=2)
    neighbour = submit(served, shape=STUCK)
    assert engines[0].stuck.wait(WAIT)
    engines[0].failures = [SystemExit()]
    assert submit(served).exception(WAIT) is not None
    until(lambda: len(engines) == 2 and served.state == "ready")
    jobs = [submit(served, shape=STUCK), submit(served, shape=STUCK), submit(served)]
    until(lambda: len(engines[1].runs) == 2)
    engines[0].come_back.set()
    neighbour.result(WAIT)
    time.sleep(0.05)
    engines[1].come_back.set()
    for job in jobs:
        job.result(WAIT)
    assert (len(engines[0].runs), len(engines[1].runs)) == (2, 3)


def test_a_hung_lane_fails_its_own_run_only(device: Callable[..., Device], engines: list[Moody]) -> None:
    served = device(lanes=2, hang_seconds=0.5)
    hung, other = submit(served, shape=STUCK), submit(served)
    assert other.result(WAIT)[0].mask.shape == (8, 8)
    error = hung.exception(WAIT)
    assert isinstance(error, Refusal)
    assert "hung" in error.message
    until(lambda: served.state == "ready")
    engines[0].come_back.set()  # the hung run comes back to life; nobody minds
    submit(served).result(WAIT)
    assert len(engines) == 2


def test_a_device_gone_under_two_lanes_is_restarted_once(device: Callable[..., Device], engines: list[Moody]) -> None:
    served = device(lanes=2)
    engines[0].go_on.clear()
    jobs = [submit(served), submit(served)]
    until(lambda: len(engines[0].runs) == 2)
    engines[0].failures = [RuntimeError("illegal memory access"), RuntimeError("illegal memory access")]
    engines[0].broken_after_failure = True
    engines[0].go_on.set()
    errors = [job.exception(WAIT) for job in jobs]
    assert [error.code if isinstance(error, Refusal) else error for error in errors] == ["device_failed"] * 2
    until(lambda: served.state == "ready")
    submit(served).result(WAIT)
    assert len(engines) == 2


def test_large_pictures_run_one_at_a_time_on_all_threads(device: Callable[..., Device], engines: list[Moody]) -> None:
    served = device(lanes=2, beside_pixels=2 * 64 - 1)
    engines[0].go_on.clear()
    jobs = [submit(served, alone=False), submit(served), submit(served)]
    assert engines[0].entered.wait(WAIT)
    time.sleep(0.05)
    assert len(engines[0].runs) == 1
    engines[0].go_on.set()
    for job in jobs:
        job.result(WAIT)
    assert engines[0].beside == 0


def test_as_many_pixels_as_are_allowed_run_side_by_side(device: Callable[..., Device], engines: list[Moody]) -> None:
    served = device(lanes=2, beside_pixels=2 * 64)
    engines[0].go_on.clear()
    jobs = [submit(served), submit(served)]
    until(lambda: len(engines[0].runs) == 2)
    engines[0].go_on.set()
    for job in jobs:
        job.result(WAIT)


def test_a_picture_that_is_larger_than_all_that_runs_side_by_side_runs_alone(device: Callable[..., Device]) -> None:
    assert submit(device(lanes=2, beside_pixels=1)).result(WAIT)[0].mask.shape == (8, 8)


def test_pictures_that_waited_for_a_large_one_run_side_by_side(
    device: Callable[..., Device], engines: list[Moody]
) -> None:
    served = device(lanes=2, beside_pixels=64)
    large = held(served, engines[0])
    small = [submit(served, shape=STUCK), submit(served, shape=STUCK)]
    engines[0].go_on.set()
    large.result(WAIT)
    until(lambda: len(engines[0].runs) == 3)
    engines[0].come_back.set()
    for job in small:
        job.result(WAIT)


def test_a_picture_that_finds_another_running_leaves_it_its_threads(
    device: Callable[..., Device], engines: list[Moody]
) -> None:
    served = device(lanes=2)
    first = submit(served, shape=STUCK)
    assert engines[0].stuck.wait(WAIT)
    submit(served).result(WAIT)
    assert (engines[0].runs, engines[0].beside) == ([1, 1], 1)
    engines[0].come_back.set()
    first.result(WAIT)


def test_runs_side_by_side_share_the_devices_time(device: Callable[..., Device], engines: list[Moody]) -> None:
    served = device(lanes=2)
    engines[0].go_on.clear()
    before = time.monotonic()
    jobs = [submit(served), submit(served)]
    until(lambda: len(engines[0].runs) == 2)
    both = time.monotonic()
    time.sleep(0.05)
    least = time.monotonic() - both
    assert least <= served.seconds_of_running <= time.monotonic() - before
    engines[0].go_on.set()
    for job in jobs:
        job.result(WAIT)
    assert served.seconds_of_running == 0
