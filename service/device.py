"""The threads that run a model, their queue, and what happens when one dies or hangs.

Jobs wait in order of arrival. A job whose caller has left, or whose deadline has passed, is dropped when its turn
comes. Waiting pictures of one shape and one plan share a run where the device gains from that. An engine with several
lanes has as many runs side by side, each on a thread of its own.

    state      what it means                                     what brings it back
    starting   the model is being loaded and warmed up           -
    ready      jobs run                                          -
    restarting a thread died or hung; its jobs have failed       a fresh engine, warmed up, on fresh threads
                                                                 (where loading it hangs, the next)
    failed     the model could not be loaded again               nothing: the process should be restarted
    closed     close() was called                                -
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import onnxruntime as ort

from service import logs
from service.cost import CostModel, Work
from service.engine import Engine, Plan, Segmentation, Stopped
from service.errors import Refusal

State = Literal["starting", "ready", "restarting", "failed", "closed"]

RESTARTS = 3  # in a row, without one successful run between them
RETRY_SECONDS = 5.0  # told to callers while a restart is under way
THREAD_NAME = "device"

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class Job:
    """One picture on its way: uint8 (H, W, 3), its plan, its work, and when it is of no use any more (monotonic).

    `alone`: no other picture was on its way to the device when this one came. `abandoned`: see Device.abandon.
    `request_id` is that of the request under which the job was made.
    """

    image: np.ndarray
    plan: Plan
    work: Work
    deadline: float
    alone: bool = True
    abandoned: bool = False
    done: "Future[tuple[Segmentation, float]]" = field(default_factory=Future)
    queued: float = field(default_factory=time.monotonic)
    request_id: str = field(default_factory=logs.request_id.get)


@dataclass(eq=False)
class _Run:
    """What one thread is running: the jobs that are lost if it dies; times are monotonic."""

    jobs: list[Job]
    beside: bool  # see Device._has_company
    started: float
    hangs_from: float
    share_before: float  # see Device._share
    options: ort.RunOptions = field(default_factory=ort.RunOptions)
    thread: threading.Thread = field(default_factory=threading.current_thread)


class Device:
    """Runs jobs on threads of its own. `submit` gives a future of the segmentation and the seconds that it waited.

    `load` makes a loaded engine; it is called on a thread of the device, at the start and after each death.
    `hang_seconds`: a run that takes longer than this, and than ten times its prediction, counts as hung; so does a load
    after a death that takes longer than this, and than ten times the one before.
    `beside_pixels`: pictures share a run, and runs are side by side, only while they have no more pixels than this
    together, so that neither needs more memory than the largest picture does.

    When a thread dies or hangs, its engine is given up: the other threads finish their runs on it, and end.
    """

    def __init__(
        self,
        load: Callable[[], Engine],
        max_batch: int = 1,
        hang_seconds: float = 60.0,
        beside_pixels: int = 16_000_000,
    ) -> None:
        self.cost_model = CostModel()
        self.state: State = "starting"
        self.reason = ""
        self.engine: Engine | None = None
        self.on_run: Callable[[int], None] = lambda batch: None  # is told how many jobs a run had
        self._load = load
        self._max_batch = max_batch
        self._hang_seconds = hang_seconds
        self._beside_pixels = beside_pixels
        self._waiting: deque[Job] = deque()
        self._runs: list[_Run] = []
        self._share = 0.0  # seconds of the device that a run would have had by now, had it been there all along
        self._share_counted = 0.0  # monotonic
        self._restarts = 0
        self._load_seconds = 0.0  # what the last load took
        self._load_hangs_from = float("inf")  # monotonic; of a load after a death
        self._failure: BaseException | None = None
        self._wake = threading.Condition()
        self._threads: list[threading.Thread] = []  # those that take jobs; a thread that is not among them is given up
        self._settled = threading.Event()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        self._start_thread()

    def wait_until_started(self) -> None:
        """Block until the first load has ended. Raises what it raised."""
        while not self._settled.wait(1):  # a signal that came just before a wait is heeded after it
            pass
        if self.state == "failed":
            assert self._failure is not None
            raise self._failure

    def submit(self, job: Job) -> None:
        """Queue a job. Raises Refusal unless the device is ready."""
        with self._wake:
            if self.state != "ready":
                raise self.refusal()
            self._waiting.append(job)
            self._wake.notify()

    def abandon(self, job: Job) -> None:
        """Nobody waits for this job any more: it will not run; a run of which nobody waits for any job is stopped."""
        if job.done.cancel():
            with self._wake:
                if job in self._waiting:  # its pixels are let go now, and not only when its turn comes
                    self._waiting.remove(job)
                    self._wake.notify_all()
            return
        with self._wake:
            job.abandoned = True
            for run in self._runs:
                if job in run.jobs and all(one.abandoned for one in run.jobs):
                    run.options.terminate = True

    def refusal(self) -> Refusal:
        """The error for a request that finds the device in its present state."""
        if self.state == "starting":
            return Refusal("starting", "the model is still being loaded", RETRY_SECONDS)
        if self.state == "closed":
            return Refusal("draining", "the service is stopping", RETRY_SECONDS)
        return Refusal("device_failed", f"the model is not running: {self.reason}", RETRY_SECONDS)

    @property
    def seconds_of_running(self) -> float:
        """How many seconds of the device the present runs have taken; 0 between runs."""
        with self._wake:
            self._count_share()
            return sum(self._share - run.share_before for run in self._runs)

    def close(self, timeout: float = 5.0) -> None:
        """Fail what waits, let the present runs end (for up to `timeout` seconds), and stop."""
        with self._wake:
            threads = list(self._threads) if self.state == "ready" else []  # one that loads cannot be stopped
            self.state = "closed"
            waiting, self._waiting = self._waiting, deque()
            self._wake.notify_all()
        for job in waiting:
            _fail([job], self.refusal())
        until = time.monotonic() + timeout
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, until - time.monotonic()))

    def _start_thread(self, engine: Engine | None = None) -> None:
        """One more thread: for this engine, or without one the first of a fresh engine."""
        thread = threading.Thread(target=self._live, args=(engine,), name=THREAD_NAME, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _live(self, engine: Engine | None) -> None:
        """The life of one thread: load if need be, then run jobs until it is closed, dies, or is given up."""
        try:
            if engine is None:
                began = time.monotonic()
                engine = self._load()
                with self._wake:
                    if self._given_up() or self.state == "closed":
                        return
                    self._load_seconds = time.monotonic() - began
                    self.engine, self.state, self.reason = engine, "ready", ""
                    for _ in range(engine.lanes - 1):
                        self._start_thread(engine)
                self._settled.set()
            while run := self._next_run():
                self._run(engine, run, run.jobs)
                del run  # and with it the pictures and their answers, before the wait for the next
        except BaseException as error:  # whatever ends the thread, those who wait must be told
            if self.engine is not None:  # before the first load has ended, whoever waits for it tells
                _log.exception("the device thread died")
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            self._die(threading.current_thread(), reason, error)

    def _next_run(self) -> _Run | None:
        """Wait for a job; it, and waiting ones that can share its run, become a run. None: the thread is to end."""
        with self._wake:
            while True:
                while self.state == "ready" and not self._given_up() and not self._has_turn():
                    self._wake.wait()
                if self.state != "ready" or self._given_up():
                    return None
                job = self._waiting.popleft()
                if not _wanted(job):
                    continue
                batch = [job]
                if self._max_batch > 1:
                    most = min(self._max_batch, self._room() // _pixels(job))
                    alike = [other for other in self._waiting if _alike(other, job)][: max(most - 1, 0)]
                    for other in alike:
                        self._waiting.remove(other)
                    batch += [other for other in alike if _wanted(other)]
                return self._begin(batch)

    def _has_turn(self) -> bool:
        """Whether the first waiting job may start: nothing runs, or what runs leaves room for its pixels."""
        return bool(self._waiting) and (not self._runs or _pixels(self._waiting[0]) <= self._room())

    def _room(self) -> int:
        """Pixels that may be run beside what runs now. The lock is held."""
        return self._beside_pixels - sum(_pixels(job) for run in self._runs for job in run.jobs)

    def _begin(self, jobs: list[Job]) -> _Run:
        """Enter a run of this thread into the books. The lock is held."""
        self._count_share()
        now = time.monotonic()
        predicted = self.cost_model.predict(_total(jobs)) * (len(self._runs) + 1)
        hangs_from = now + max(self._hang_seconds, 10 * predicted)
        run = _Run(jobs, self._has_company(jobs), now, hangs_from, self._share)
        self._runs.append(run)
        return run

    def _has_company(self, jobs: list[Job]) -> bool:
        """Whether a run of these jobs will not have the device to itself. The lock is held.

        Of a picture that is still on its way no more is known than that it comes: it is taken to be as large as these.
        """
        if self._runs:
            return True
        next_one = self._waiting[0] if self._waiting else None if jobs[0].alone else jobs[0]
        return next_one is not None and sum(map(_pixels, jobs)) + _pixels(next_one) <= self._beside_pixels

    def _end(self, run: _Run) -> float | None:
        """Strike a run off the books: the seconds of the device that it took, None where the watchdog was quicker."""
        with self._wake:
            if run not in self._runs:
                return None
            self._count_share()
            self._runs.remove(run)
            if self._waiting:
                self._wake.notify_all()
            return self._share - run.share_before

    def _count_share(self) -> None:
        """Bring `_share` up to date: runs that are side by side have equal parts of the time that passes."""
        now = time.monotonic()
        if self._runs:
            self._share += (now - self._share_counted) / len(self._runs)
        self._share_counted = now

    def _run(self, engine: Engine, run: _Run, jobs: list[Job]) -> None:
        """Run these jobs of the run, which are all of it or its first."""
        logs.request_id.set(_request_ids(jobs))
        try:
            answers = engine.run([job.image for job in jobs], jobs[0].plan, run.options, run.beside)
        except Stopped:
            seconds = self._end(run)
            with self._wake:  # it would have taken longer still: runs that are always stopped must teach that
                if seconds is not None and seconds > self.cost_model.predict(_total(jobs)):
                    self.cost_model.observe(_total(jobs), seconds)
            _fail(jobs, _stopped())
            return
        except Exception as error:
            self._after_failure(engine, run, jobs, error)
            return
        seconds = self._end(run)
        if seconds is None:
            return
        with self._wake:
            if not self._given_up():
                self._restarts = 0
            self.cost_model.observe(_total(jobs), seconds)
        self.on_run(len(jobs))
        for job, answer in zip(jobs, answers, strict=True):
            job.done.set_result((answer, run.started - job.queued))

    def _given_up(self) -> bool:
        """Whether this thread's engine has been given up; what the thread finds out then is of no use to anyone."""
        return threading.current_thread() not in self._threads

    def _after_failure(self, engine: Engine, run: _Run, jobs: list[Job], error: Exception) -> None:
        """One run failed. Was it the picture, or the device? A small run of the engine's own tells."""
        _log.error("a run failed: %s", error)
        engine.warm_up()  # raises where the device is broken, which ends the thread and fails the run
        if self._end(run) is None:
            return
        if len(jobs) == 1:
            text = "the model failed on this picture; a smaller one, or fewer scales, may work"
            _fail(jobs, Refusal("model_failed", text))
            return
        for index, job in enumerate(jobs):
            if job.done.done():  # the watchdog has failed this one and the rest
                return
            if job.abandoned:
                _fail([job], _stopped())
                continue
            with self._wake:
                rest = self._begin(jobs[index:])
            self._run(engine, rest, [job])

    def _die(self, thread: threading.Thread, reason: str, error: BaseException) -> None:
        """Fail exactly what the thread was running, and start again, up to RESTARTS times in a row."""
        with self._wake:
            self._count_share()
            lost = [job for run in self._runs if run.thread is thread for job in run.jobs]
            self._runs = [run for run in self._runs if run.thread is not thread]
            restart = thread in self._threads and self.state != "closed"
            waiting: deque[Job] = deque()
            if restart:
                first = self.engine is None
                self._threads = []
                self.reason = reason
                self._restarts += 1
                self.state = "failed" if first or self._restarts > RESTARTS else "restarting"
                if self.state == "failed":
                    self._failure = error  # not before: its traceback would keep the engine that died
                    waiting, self._waiting = self._waiting, waiting
                else:
                    _log.warning("restarting the device (%d of %d)", self._restarts, RESTARTS)
                    self._load_hangs_from = time.monotonic() + max(self._hang_seconds, 10 * self._load_seconds)
                    self._start_thread()
                self._wake.notify_all()
        failure = Refusal("device_failed", f"the model is not running: {reason}", RETRY_SECONDS)
        _fail([*lost, *waiting], failure)
        if restart:
            self._settled.set()

    def _watch(self) -> None:
        """Give up what hangs: its thread is abandoned, as no thread can be killed, and others take over."""
        while self.state not in ("failed", "closed"):
            with self._wake:
                now = time.monotonic()
                hung = [("a run", run.thread, _request_ids(run.jobs)) for run in self._runs if now > run.hangs_from]
                if self.state == "restarting" and now > self._load_hangs_from:
                    hung += [("the load", thread, "") for thread in self._threads]
            for what, thread, ids in hung:
                logs.request_id.set(ids)
                _log.error("%s hangs; its thread is given up", what)
                self._die(thread, f"{what} hung", TimeoutError(f"{what} hung"))
            time.sleep(min(0.25, self._hang_seconds / 4))


def _request_ids(jobs: list[Job]) -> str:
    """The ids of the jobs' requests, under which what becomes of their run is logged."""
    return ",".join(dict.fromkeys(job.request_id for job in jobs))


def _stopped() -> Refusal:
    return Refusal("deadline_passed", "nobody waited for the answer any more")


def _wanted(job: Job) -> bool:
    """Whether somebody still waits for the job; marks it as running if so."""
    if not job.done.set_running_or_notify_cancel():
        return False
    if time.monotonic() > job.deadline:
        _fail([job], Refusal("deadline_passed", "the request's time was up before its turn came"))
        return False
    return True


def _pixels(job: Job) -> int:
    return job.image.shape[0] * job.image.shape[1]


def _alike(one: Job, other: Job) -> bool:
    return one.plan == other.plan and one.image.shape == other.image.shape


def _total(batch: list[Job]) -> Work:
    return Work(sum(job.work.network for job in batch), sum(job.work.merged for job in batch))


def _fail(jobs: list[Job], error: Exception) -> None:
    for job in jobs:
        with suppress(InvalidStateError):  # it is over already
            job.done.set_exception(error)
