"""The one thread that runs a model, its queue, and what happens when it dies or hangs.

Jobs wait in order of arrival. A job whose caller has left, or whose deadline has passed, is dropped when its turn
comes. Waiting pictures of one shape and one plan share a run where the device gains from that.

    state      what it means                                     what brings it back
    starting   the model is being loaded and warmed up           -
    ready      jobs run                                          -
    restarting the thread died or hung; its jobs have failed     a fresh session, warmed up, on a fresh thread
    failed     the model could not be loaded again               nothing: the process should be restarted
    closed     close() was called                                -
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from service.cost import CostModel, Work
from service.engine import Engine, Plan, Segmentation
from service.errors import Refusal

State = Literal["starting", "ready", "restarting", "failed", "closed"]

RESTARTS = 3  # in a row, without one successful run between them
RETRY_SECONDS = 5.0  # told to callers while a restart is under way

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class Job:
    """One picture on its way: uint8 (H, W, 3), its plan, its work, and when it is of no use any more (monotonic)."""

    image: np.ndarray
    plan: Plan
    work: Work
    deadline: float
    done: "Future[tuple[Segmentation, float]]" = field(default_factory=Future)
    queued: float = field(default_factory=time.monotonic)


class Device:
    """Runs jobs on one thread. `submit` gives a future of the segmentation and the seconds that it waited.

    `load` makes a loaded engine; it is called on the device's thread, at the start and after each death.
    `hang_seconds`: a run that takes longer than this, and than ten times its prediction, counts as hung.
    """

    def __init__(self, load: Callable[[], Engine], max_batch: int = 1, hang_seconds: float = 60.0) -> None:
        self.cost_model = CostModel()
        self.state: State = "starting"
        self.reason = ""
        self.engine: Engine | None = None
        self.on_run: Callable[[int, float], None] = lambda batch, seconds: None
        self._load = load
        self._max_batch = max_batch
        self._hang_seconds = hang_seconds
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._running_until = float("inf")
        self._started = 0.0
        self._restarts = 0
        self._failure: BaseException | None = None
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._settled = threading.Event()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        self._start_thread()

    def wait_until_started(self) -> None:
        """Block until the first load has ended. Raises what it raised."""
        self._settled.wait()
        if self.state == "failed":
            assert self._failure is not None
            raise self._failure

    def submit(self, job: Job) -> None:
        """Queue a job. Raises Refusal unless the device is ready."""
        with self._wake:
            if self.state != "ready":
                raise self.refusal()
            self._waiting.append(job)
            self._wake.notify_all()

    def refusal(self) -> Refusal:
        """The error for a request that finds the device in its present state."""
        if self.state == "starting":
            return Refusal("starting", "the model is still being loaded", RETRY_SECONDS)
        if self.state == "closed":
            return Refusal("draining", "the service is stopping", RETRY_SECONDS)
        return Refusal("device_failed", f"the model is not running: {self.reason}", RETRY_SECONDS)

    @property
    def seconds_of_running(self) -> float:
        """How long the present run has taken; 0 between runs."""
        with self._wake:
            return time.monotonic() - self._started if self._running else 0.0

    def close(self, timeout: float = 5.0) -> None:
        """Fail what waits, let the present run end (for up to `timeout` seconds), and stop."""
        with self._wake:
            self.state = "closed"
            waiting, self._waiting = self._waiting, deque()
            self._wake.notify_all()
        for job in waiting:
            _fail([job], self.refusal())
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def _start_thread(self) -> None:
        self._thread = threading.Thread(target=self._live, name="device", daemon=True)
        self._thread.start()

    def _live(self) -> None:
        """The life of one thread: load, then run jobs until it is closed, dies, or the watchdog gives it up."""
        me = threading.current_thread()
        try:
            engine = self._load()
            with self._wake:
                if self._given_up() or self.state == "closed":
                    return
                self.engine, self.state, self.reason = engine, "ready", ""
            self._settled.set()
            while True:
                batch = self._next_batch()
                if not batch:
                    return
                self._run(engine, batch)
        except BaseException as error:  # whatever ends the thread, those who wait must be told
            if self.engine is not None:  # before the first load has ended, whoever waits for it tells
                _log.exception("the device thread died")
            self._die(me, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}", error)

    def _next_batch(self) -> list[Job]:
        """Wait for a job; it, and waiting ones that can share its run, become the running ones. Empty: closed."""
        with self._wake:
            while True:
                while not self._waiting and self.state == "ready":
                    self._wake.wait()
                if self.state != "ready" or self._given_up():
                    return []
                job = self._waiting.popleft()
                if not _wanted(job):
                    continue
                batch = [job]
                if self._max_batch > 1:
                    alike = [other for other in self._waiting if _alike(other, job)][: self._max_batch - 1]
                    for other in alike:
                        self._waiting.remove(other)
                    batch += [other for other in alike if _wanted(other)]
                predicted = self.cost_model.predict(_total(batch))
                self._running = batch
                self._started = time.monotonic()
                self._running_until = self._started + max(self._hang_seconds, 10 * predicted)
                self._wake.notify_all()
                return batch

    def _run(self, engine: Engine, batch: list[Job]) -> None:
        try:
            answers = engine.run([job.image for job in batch], batch[0].plan)
        except Exception as error:
            self._after_failure(engine, batch, error)
            return
        seconds = time.monotonic() - self._started
        with self._wake:
            if self._given_up():
                return
            self._running, self._restarts = [], 0
        self.cost_model.observe(_total(batch), seconds)
        self.on_run(len(batch), seconds)
        for job, answer in zip(batch, answers, strict=True):
            job.done.set_result((answer, self._started - job.queued))

    def _given_up(self) -> bool:
        """Whether the watchdog has replaced this thread; what it finds out then is of no use to anyone."""
        return self._thread is not threading.current_thread()

    def _after_failure(self, engine: Engine, batch: list[Job], error: Exception) -> None:
        """One run failed. Was it the picture, or the device? A small run of the engine's own tells."""
        _log.error("a run failed: %s", error)
        engine.warm_up()  # raises where the device is broken, which ends the thread and fails the batch
        with self._wake:
            if self._given_up():
                return
            self._running = []
        if len(batch) > 1:
            for job in batch:
                with self._wake:
                    self._started, self._running = time.monotonic(), [job]
                self._run(engine, [job])
            return
        _fail(
            batch, Refusal("model_failed", "the model failed on this picture; a smaller one, or fewer scales, may work")
        )

    def _die(self, thread: threading.Thread, reason: str, error: BaseException) -> None:
        """Fail exactly what was running, and start again, up to RESTARTS times in a row."""
        with self._wake:
            if self._thread is not thread or self.state == "closed":
                return
            first = self.engine is None
            lost, self._running = self._running, []
            self.reason = reason
            self._restarts += 1
            self.state = "failed" if first or self._restarts > RESTARTS else "restarting"
            self._failure = error
            waiting: deque[Job] = deque()
            if self.state == "failed":
                waiting, self._waiting = self._waiting, waiting
        _fail([*lost, *waiting], self.refusal())
        self._settled.set()
        if self.state == "restarting":
            _log.warning("restarting the device thread (%d of %d)", self._restarts, RESTARTS)
            self._start_thread()

    def _watch(self) -> None:
        """Give up a run that hangs: its thread is abandoned, as no thread can be killed, and another takes over."""
        while self.state not in ("failed", "closed"):
            with self._wake:
                hung = bool(self._running) and time.monotonic() > self._running_until
                thread = self._thread
            if hung:
                assert thread is not None
                _log.error("a run hangs; its thread is given up")
                self._die(thread, "a run hung", TimeoutError("a run hung"))
            time.sleep(min(0.25, self._hang_seconds / 4))


def _wanted(job: Job) -> bool:
    """Whether somebody still waits for the job; marks it as running if so."""
    if not job.done.set_running_or_notify_cancel():
        return False
    if time.monotonic() > job.deadline:
        _fail([job], Refusal("deadline_passed", "the request's time was up before its turn came"))
        return False
    return True


def _alike(one: Job, other: Job) -> bool:
    return one.plan == other.plan and one.image.shape == other.image.shape


def _total(batch: list[Job]) -> Work:
    return Work(sum(job.work.network for job in batch), sum(job.work.merged for job in batch))


def _fail(jobs: list[Job], error: Exception) -> None:
    for job in jobs:
        if not job.done.cancelled() and not job.done.done():
            job.done.set_exception(error)
