"""One model's way from a picture file to a label map: admission, decoding, the device's queue, the answer.

Nothing is queued that has not been decoded completely, nothing is decoded that has not been admitted, and the cost of
a picture is known from its header before either.
"""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import numpy as np

from service.cost import Work
from service.device import Device, Job
from service.engine import Engine, Plan, Segmentation
from service.errors import Departed, InputError, Refusal
from service.images import Picture, decode, read_size, reduced_size
from service.options import Options, chosen_classes
from service.settings import Settings

T = TypeVar("T")


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
    """What admission knows about a request: its work, the seconds of its run, and those before its turn comes."""

    work: Work
    run_s: float
    wait_s: float


class Pipeline:
    """Segments pictures with one model, as many at once as admission lets in.

    To be used from one event loop. `readers` read headers, `workers` decode; the device's threads run the model.
    """

    def __init__(
        self, load: Callable[[], Engine], settings: Settings, workers: ThreadPoolExecutor, readers: ThreadPoolExecutor
    ) -> None:
        self.settings = settings
        self.workers = workers
        self.readers = readers
        self.device = Device(load, settings.max_batch, settings.hang_seconds, settings.max_pixels)
        self.admitted_cost = 0
        self.admitted_requests = 0
        self.holders = 0  # see Models.hold
        self.on_answer: Callable[[Segmentation], None] = lambda segmentation: None
        self._unfinished_s = 0.0  # predicted seconds of the runs that are admitted and not over

    @property
    def engine(self) -> Engine:
        """The loaded engine. Raises Refusal while there is none."""
        if self.device.engine is None:
            raise self.device.refusal()
        return self.device.engine

    def estimate(self, width: int, height: int, plan: Plan) -> Estimate:
        """What a picture of width x height pixels would cost now.

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
        return Estimate(work, self.device.cost_model.predict(work), self._wait_s())

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

    async def price(self, data: bytes, options: Options, deadline: float) -> Estimate:
        """What segmenting a picture file would cost, from its header alone. Raises InputError and Refusal."""
        return self.estimate(*await self._size(data, options, deadline), self.plan(options))

    async def segment(
        self,
        source: bytes | np.ndarray,
        options: Options,
        *,
        plan: Plan | None = None,
        deadline: float | None = None,
        departed: "asyncio.Future[None] | asyncio.Task[None] | None" = None,
    ) -> Result:
        """Segment a picture file, or pixels uint8 (H, W, 3) RGB.

        `plan` is made from the options unless given. `deadline` is on the monotonic clock, by default the options'
        `timeout_ms` from now. When `departed` is done, the caller has left and the picture is dropped.

        Raises InputError, Refusal, and Departed for a caller who has left.
        """
        timeout_s = (options.timeout_ms or self.settings.timeout_ms) / 1000
        if deadline is None:
            deadline = time.monotonic() + timeout_s
        plan = plan or self.plan(options)
        self._refuse_if_late(0.0, deadline)  # a queue that is too long for any picture: no header need be read
        if isinstance(source, bytes):
            width, height = await self._size(source, options, deadline)
        else:
            height, width = source.shape[:2]
        estimate = self.estimate(width, height, plan)
        release = self._admit(estimate, deadline)
        submitted = None
        try:
            timings: dict[str, float] = {}
            if isinstance(source, bytes):
                work = partial(decode, source, **self._limits(), max_side=options.max_side)
                picture, waited, timings["decode"] = await in_pool(self.workers, work, deadline)
            else:
                picture = Picture(source, "RGB", "array", exif_applied=False, size=(width, height))
                waited, timings["decode"] = 0.0, 0.0
            job = Job(picture.pixels, plan, estimate.work, deadline, alone=self.admitted_requests == 1)
            self.device.submit(job)
            submitted = job
            segmentation, queued_s = await self._outcome(job, departed)
            timings["queue"] = waited + queued_s * 1000
            timings["infer"] = segmentation.infer_ms
            self.on_answer(segmentation)
            return Result(picture, segmentation, estimate.work, estimate.run_s * 1000, timings)
        finally:
            self._leave(submitted, release)

    def fullness(self) -> float:
        """Share of the admission limit that is taken, 0..1 and above where one large picture is in."""
        return self.admitted_cost / self.settings.max_queue_pixels

    def close(self) -> None:
        """Stop the device; what still waits fails with 503."""
        self.device.close()

    def _limits(self) -> dict[str, int]:
        return {"max_bytes": self.settings.max_bytes, "max_pixels": self.settings.max_pixels}

    async def _size(self, data: bytes, options: Options, deadline: float) -> tuple[int, int]:
        """Width and height to segment. Read in the pool, as a hostile file has a header that takes seconds."""
        size, _, _ = await in_pool(self.readers, partial(read_size, data, **self._limits()), deadline)
        return reduced_size(*size, options.max_side)

    def _admit(self, estimate: Estimate, deadline: float) -> Callable[[], None]:
        """Let a request in, or raise Refusal: over the cost limit, or with no chance to be in time. What is returned is
        to be called when its work is over.

        A request that finds nobody before it is always let in, whatever it costs.
        """
        if self.device.state != "ready":
            raise self.device.refusal()
        limit = self.settings.max_queue_pixels
        if self.admitted_requests and self.admitted_cost + estimate.work.cost > limit:
            surplus = (self.admitted_cost + estimate.work.cost - limit) / max(self.admitted_cost, 1)
            raise Refusal(
                "overloaded",
                f"the queue is full: {self.admitted_cost} pixels wait, this request has {estimate.work.cost}, "
                f"at most {limit} are let in",
                min(surplus, 1) * estimate.wait_s,
            )
        self._refuse_if_late(estimate.run_s, deadline)
        self.admitted_requests += 1
        self.admitted_cost += estimate.work.cost
        self._unfinished_s += estimate.run_s

        def release() -> None:
            self.admitted_requests -= 1
            self.admitted_cost -= estimate.work.cost
            self._unfinished_s = self._unfinished_s - estimate.run_s if self.admitted_requests else 0.0

        return release

    def _refuse_if_late(self, run_s: float, deadline: float) -> None:
        """Raise Refusal where the runs before it leave a run of `run_s` seconds no chance to be over in time."""
        if not self.admitted_requests:
            return
        taken_s, left_s = self._wait_s() + run_s, deadline - time.monotonic()
        if left_s <= 0:
            raise _too_late()
        late_s = taken_s - self.settings.deadline_share * left_s
        if late_s > 0:
            raise Refusal(
                "overloaded",
                f"the queue is too long: about {taken_s:.1f} s, where this request has {left_s:.1f} s",
                late_s,
            )

    def _wait_s(self) -> float:
        """Predicted seconds until all that is admitted now has been run."""
        return max(0.0, self._unfinished_s - self.device.seconds_of_running)

    def _leave(self, job: Job | None, release: Callable[[], None]) -> None:
        """A request ends; what the device still does for it counts until that is over, too."""
        if job is not None and not job.done.done():
            self.device.abandon(job)
        if job is None or job.done.done():
            release()
            return
        loop = asyncio.get_running_loop()

        def over(done: object) -> None:
            with suppress(RuntimeError):  # the loop is closed: the service has ended
                loop.call_soon_threadsafe(release)

        job.done.add_done_callback(over)

    async def _outcome(
        self, job: Job, departed: "asyncio.Future[None] | asyncio.Task[None] | None"
    ) -> tuple[Segmentation, float]:
        """Wait for the job, its deadline or its caller's leaving, whichever comes first."""
        done = asyncio.wrap_future(job.done)
        awaited: set[asyncio.Future[object]] = {done}  # type: ignore[arg-type]
        if departed is not None:
            awaited.add(departed)  # type: ignore[arg-type]
        try:
            await asyncio.wait(
                awaited, timeout=max(0.0, job.deadline - time.monotonic()), return_when=asyncio.FIRST_COMPLETED
            )
            if done.done():
                return done.result()
            if departed is not None and departed.done():
                raise Departed
            raise _too_late()
        finally:
            done.cancel()


async def in_pool(workers: ThreadPoolExecutor | None, work: Callable[[], T], deadline: float) -> tuple[T, float, float]:
    """Run work on a thread of the pool (None: the loop's own): its result, and the milliseconds it waited and ran.

    Raises what the work raises, and Refusal at the deadline, even if the work goes on, or where memory runs out.
    """
    asked = time.perf_counter()

    def timed() -> tuple[T, float, float]:
        begun = time.perf_counter()
        if time.monotonic() > deadline:
            raise _too_late()
        try:
            result = work()
        except MemoryError:
            raise Refusal("overloaded", "there is no memory for this picture now", 1.0) from None
        return result, (begun - asked) * 1000, (time.perf_counter() - begun) * 1000

    running = asyncio.get_running_loop().run_in_executor(workers, timed)
    try:
        return await asyncio.wait_for(running, max(0.0, deadline - time.monotonic()))
    except TimeoutError:
        raise _too_late() from None


def _too_late() -> Refusal:
    return Refusal("deadline_passed", "the request's time was up before its answer was ready; see timeout_ms")
