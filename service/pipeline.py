"""One model's way from a picture file to a label map: admission, decoding, the device's queue, the answer.

Nothing is queued that has not been decoded completely, nothing is decoded that has not been admitted, and the cost of
a picture is known from its header before either. It counts until its answer is written.
"""

import asyncio
import contextvars
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np

from service import cores
from service.cost import EncodeTimes, Work
from service.device import Device, Job
from service.engine import Engine, Plan, Segmentation
from service.errors import Departed, InputError, Refusal
from service.images import Picture, decode, read_size, reduced_size
from service.options import Options, chosen_classes
from service.settings import Settings

T = TypeVar("T")
Departure = asyncio.Future[None] | asyncio.Task[None]  # done once the caller has left


@dataclass(frozen=True)
class Result:
    """A segmented picture. `picture` holds the pixels that were segmented; `timings` maps phases to milliseconds."""

    picture: Picture
    segmentation: Segmentation
    work: Work
    predicted_ms: float
    timings: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Estimate:
    """What admission knows about a request: its work, the seconds of its run, of writing its answer, and those before
    its turn comes.
    """

    work: Work
    run_s: float
    encode_s: float
    wait_s: float

    @property
    def predicted_ms(self) -> float:
        """Milliseconds of its run and of writing its answer."""
        return (self.run_s + self.encode_s) * 1000


@dataclass
class Admitted:
    """Requests that are let in and not over, of one model or of all: how many, their cost, and the seconds they are
    predicted to need still, of the device and of a thread that encodes.
    """

    requests: int = 0
    cost: int = 0
    run_s: float = 0.0
    encode_s: float = 0.0


class Place:
    """What one request takes of several counts of `Admitted`, until its run and then all of it is over."""

    def __init__(self, estimate: Estimate, *counts: Admitted) -> None:
        self._estimate, self._counts, self._running = estimate, counts, True
        for count in counts:
            count.requests += 1
            count.cost += estimate.work.cost
            count.run_s += estimate.run_s
            count.encode_s += estimate.encode_s

    def run_is_over(self) -> None:
        """The device is free of it."""
        if self._running:
            for count in self._counts:
                count.run_s -= self._estimate.run_s
            self._running = False

    def release(self) -> None:
        """It is over."""
        self.run_is_over()
        for count in self._counts:
            count.requests -= 1
            count.cost -= self._estimate.work.cost
            count.encode_s -= self._estimate.encode_s
            if not count.requests:
                count.run_s = count.encode_s = 0.0  # not what rounding leaves of it


class Pipeline:
    """Segments pictures with one model, as many at once as admission lets in.

    To be used from one event loop. `readers` read headers, `workers` decode, `encoders` write answers; the device's
    threads run the model. `house` counts the requests of all models.
    """

    def __init__(
        self,
        load: Callable[[], Engine],
        settings: Settings,
        workers: ThreadPoolExecutor,
        readers: ThreadPoolExecutor,
        encoders: ThreadPoolExecutor,
        house: Admitted,
    ) -> None:
        self.settings = settings
        self.workers = workers
        self.readers = readers
        self.encoders = encoders
        self.house = house
        self.admitted = Admitted()
        self.encode_times = EncodeTimes()
        self._encoding_threads = cores.available()
        self.device = Device(load, settings.max_batch, settings.hang_seconds, settings.max_pixels)
        self.holders = 0  # see Models.hold
        self.on_answer: Callable[[Segmentation, Sequence[str]], None] = lambda segmentation, classes: None

    @property
    def engine(self) -> Engine:
        """The loaded engine. Raises Refusal while there is none."""
        if self.device.engine is None:
            raise self.device.refusal()
        return self.device.engine

    def estimate(self, width: int, height: int, plan: Plan, format_: str | None = None) -> Estimate:
        """What a picture of width x height pixels would cost now, with its answer in this format.

        Raises InputError for windows beyond the limit: there is no other bound on what they cost.
        """
        work = self.engine.work(width, height, plan)
        limit = self.settings.max_queue_pixels
        if plan.window and work.cost > limit:
            raise InputError(
                "invalid_option",
                f"option window: windows of {plan.window} pixels in steps of {plan.stride} cost {work.cost} pixels for "
                f"this picture, at most {limit} are let in; choose larger ones, or max_side",
            )
        encode_s = self.encode_times.predict(format_, width * height)
        return Estimate(work, self.device.cost_model.predict(work), encode_s, self.wait_s())

    def plan(self, options: Options) -> Plan:
        """The plan of a request. Raises InputError for a class that the model does not know."""
        chosen_classes(options, self.engine.metadata.classes)
        return self.engine.plan(
            options.scales,
            options.flip,
            window=options.window,
            stride=options.stride,
            probabilities=options.format == "npz",
        )

    async def size(self, data: bytes, options: Options, deadline: float) -> tuple[int, int]:
        """Width and height to segment, before orientation. Raises InputError and Refusal.

        Read on a thread, as a hostile file's header takes up to HEADER_SECONDS.
        """
        size, _, _ = await in_pool(self.readers, partial(read_size, data, **self._limits()), deadline)
        return reduced_size(*size, options.max_side)

    async def price(self, data: bytes, options: Options, deadline: float) -> Estimate:
        """What segmenting a picture file would cost, from its header alone. Raises InputError and Refusal."""
        return self.estimate(*await self.size(data, options, deadline), self.plan(options), options.format)

    @asynccontextmanager
    async def segmented(
        self,
        source: bytes | np.ndarray,
        options: Options,
        *,
        deadline: float,
        plan: Plan | None = None,
        departed: Departure | None = None,
    ) -> AsyncIterator[Result]:
        """Segment a picture file, or pixels uint8 (H, W, 3) RGB. Within the block, as for `encode`, it is admitted.

        `deadline` is on the monotonic clock; `plan` is made from the options unless given. When `departed` is done, the
        caller has left and the picture is dropped.

        Raises InputError, Refusal, and Departed for a caller who has left.
        """
        plan = plan or self.plan(options)
        self._refuse_if_late(0.0, deadline)  # a queue that is too long for any picture: no header need be read
        if isinstance(source, bytes):
            width, height = await self.size(source, options, deadline)
        else:
            height, width = source.shape[:2]
        estimate = self.estimate(width, height, plan, options.format)
        place = self._admit(estimate, deadline)
        submitted = None
        try:
            timings: dict[str, float] = {}
            if isinstance(source, bytes):
                work = partial(decode, source, **self._limits(), max_side=options.max_side)
                picture, waited, timings["decode"] = await in_pool(self.workers, work, deadline, departed)
            else:
                picture = Picture(source, "RGB", "array", exif_applied=False, size=(width, height))
                waited, timings["decode"] = 0.0, 0.0
            job = Job(picture.pixels, plan, estimate.work, deadline, alone=self.admitted.requests == 1)
            self.device.submit(job)
            submitted = job
            segmentation, queued_s = await self._outcome(job, departed)
            place.run_is_over()
            timings["queue"] = waited + queued_s * 1000
            timings["infer"] = segmentation.infer_ms
            self.on_answer(segmentation, self.engine.metadata.classes)
            yield Result(picture, segmentation, estimate.work, estimate.predicted_ms, timings)
        finally:
            self._leave(submitted, place)

    async def encode(
        self,
        result: Result,
        format_: str,
        work: Callable[[Callable[[], bool]], T],
        deadline: float,
        departed: Departure | None = None,
    ) -> tuple[T, float, float]:
        """Write the answer on a thread: it, and the milliseconds that this waited and took.

        `work` is told by its argument when nobody waits for it any more. Raises what it raises, Refusal and Departed.
        """
        abandoned, begun = threading.Event(), []

        def write() -> T:
            begun.append(time.monotonic())
            return work(abandoned.is_set)

        try:
            return await in_pool(self.encoders, write, deadline, departed)
        finally:  # one that is given up would have taken longer still: if all are, that must be learned from them
            abandoned.set()
            if begun:
                self.encode_times.observe(format_, result.segmentation.mask.size, time.monotonic() - begun[0])

    def close(self) -> None:
        """Stop the device; what still waits fails with 503."""
        self.device.close()

    def _limits(self) -> dict[str, int]:
        return {"max_bytes": self.settings.max_bytes, "max_pixels": self.settings.max_pixels}

    def _admit(self, estimate: Estimate, deadline: float) -> Place:
        """Let a request in, or raise Refusal: over the cost limit, or with no chance to be in time.

        A request that finds nobody before it is always let in, whatever it costs.
        """
        if self.device.state != "ready":
            raise self.device.refusal()
        limit = self.settings.max_queue_pixels
        if self.house.requests and self.house.cost + estimate.work.cost > limit:
            surplus = (self.house.cost + estimate.work.cost - limit) / max(self.house.cost, 1)
            others_s = self.house.run_s - self.admitted.run_s  # other models, and this one before a reload
            raise Refusal(
                "overloaded",
                f"the queue is full: {self.house.cost} pixels wait, this request has {estimate.work.cost}, "
                f"at most {limit} are let in",
                min(surplus, 1) * max(estimate.wait_s, others_s),
            )
        self._refuse_if_late(estimate.run_s, deadline, estimate.encode_s)
        return Place(estimate, self.admitted, self.house)

    def _refuse_if_late(self, run_s: float, deadline: float, encode_s: float = 0.0) -> None:
        """Raise Refusal where those before it leave a request with such a run and answer no chance to be in time."""
        if not self.admitted.requests:
            return
        taken_s, left_s = self.wait_s(run_s) + encode_s, deadline - time.monotonic()
        if left_s <= 0:
            raise _too_late()
        late_s = taken_s - self.settings.deadline_share * left_s
        if late_s > 0:
            raise Refusal(
                "overloaded",
                f"the queue is too long: about {taken_s:.1f} s, where this request has {left_s:.1f} s",
                late_s,
            )

    def wait_s(self, run_s: float = 0.0) -> float:
        """Predicted seconds until all that is admitted now, and then a run of `run_s`, has been run, and a thread that
        encodes is free.
        """
        running = max(0.0, self.admitted.run_s - self.device.seconds_of_running) + run_s
        return max(running, self.house.encode_s / self._encoding_threads)

    def _leave(self, job: Job | None, place: Place) -> None:
        """A request ends; what the device still does for it counts until that is over, too."""
        if job is not None and not job.done.done():
            self.device.abandon(job)
        if job is None or job.done.done():
            place.release()
            return
        loop = asyncio.get_running_loop()

        def over(done: object) -> None:
            with suppress(RuntimeError):  # the loop is closed: the service has ended
                loop.call_soon_threadsafe(place.release)

        job.done.add_done_callback(over)

    async def _outcome(self, job: Job, departed: Departure | None) -> tuple[Segmentation, float]:
        """Wait for the job, its deadline or its caller's leaving, whichever comes first."""
        done = asyncio.wrap_future(job.done)
        await first_of(done, job.deadline, departed)
        return done.result()


async def in_pool(
    workers: ThreadPoolExecutor | None, work: Callable[[], T], deadline: float, departed: Departure | None = None
) -> tuple[T, float, float]:
    """Run work on a thread of the pool (None: the loop's own): its result, and the milliseconds it waited and ran.

    What it logs carries the caller's request id.

    Raises what the work raises, and, even if the work goes on, Refusal at the deadline and Departed once the caller has
    left; Refusal also where memory runs out.
    """
    asked = time.perf_counter()
    task = [work]

    def timed() -> tuple[T, float, float]:
        begun = time.perf_counter()
        if time.monotonic() > deadline:
            raise _too_late()
        try:
            result = task.pop()()
        except MemoryError:
            raise Refusal("overloaded", "there is no memory for this picture now", 1.0) from None
        return result, (begun - asked) * 1000, (time.perf_counter() - begun) * 1000

    running = asyncio.get_running_loop().run_in_executor(workers, contextvars.copy_context().run, timed)
    try:
        await first_of(running, deadline, departed)
        return running.result()
    finally:
        task.clear()  # which the pool's queue holds, if nobody waits any more, until a thread comes to it
        del running  # its error holds this frame: in a circle, the picture would stay until Python looks for garbage


async def first_of(work: "asyncio.Future[Any]", deadline: float, departed: Departure | None) -> None:
    """Wait until the work is done. It is cancelled with Refusal at the deadline, with Departed for who left."""
    awaited: set[asyncio.Future[Any]] = {work} if departed is None else {work, departed}
    try:
        await asyncio.wait(awaited, timeout=max(0.0, deadline - time.monotonic()), return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return
        if departed is not None and departed.done():
            raise Departed
        raise _too_late()
    finally:
        work.cancel()


def _too_late() -> Refusal:
    return Refusal("deadline_passed", "the request's time was up before its answer was ready; see timeout_ms")
