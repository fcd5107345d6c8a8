"""Promise: work is let in by its cost, refused with a time to come back, done in time or not at all."""

import asyncio
import base64
import gc
import socket
import threading
import time
import urllib.request
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from live import serving, until
from starlette.testclient import TestClient
from tiny_model import encoded

from model.predict import view_size
from service.app import create_app
from service.cost import CostModel, Work, work_of
from service.device import Job
from service.engine import Engine
from service.errors import Departed, InputError, Refusal
from service.models import Models
from service.options import Options
from service.pipeline import Admitted, Pipeline, Result, in_pool
from service.settings import Settings

WAIT = 60
GREY = np.full((20, 30, 3), 128, np.uint8)


class Gated(Engine):
    """An engine whose runs wait for a gate; warm-ups pass."""

    runs = 0

    def __init__(self, model: Path, gate: threading.Event) -> None:
        super().__init__(model, "cpu", 1)
        self.gate = gate

    def run(self, images: Any, plan: Any, *more: Any) -> Any:
        if plan.scales == (1.0,):
            self.runs += 1
            assert self.gate.wait(WAIT)
        return super().run(images, plan, *more)


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


def opening(gate: threading.Event) -> Callable[[Path, Settings], Engine]:
    """What opens an engine for `Models`."""
    return lambda path, settings: Gated(path, gate)


@pytest.fixture
def pipeline(settings: Settings, gate: threading.Event) -> Iterator[Callable[..., Pipeline]]:
    made = []
    workers = ThreadPoolExecutor(2)

    def make(**changes: Any) -> Pipeline:
        made.append(
            Pipeline(
                lambda: Gated(settings.model, gate),
                settings.model_copy(update=changes),
                *[workers] * 3,
                made[0].house if made else Admitted(),
            )
        )
        made[-1].device.wait_until_started()
        return made[-1]

    yield make
    gate.set()
    for one in made:
        one.close()
    workers.shutdown()


def run(main: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    return asyncio.run(asyncio.wait_for(main(), WAIT))


async def segment(pipeline: Pipeline, source: Any, options: Options, **more: Any) -> Result:
    deadline = time.monotonic() + (options.timeout_ms or pipeline.settings.timeout_ms) / 1000
    async with pipeline.segmented(source, options, deadline=deadline, **more) as result:
        return result


async def started(pipeline: Pipeline, source: Any = GREY, **options: Any) -> "asyncio.Task[Any]":
    """A segmentation under way: admitted, and its picture handed to the device."""
    before = pipeline.admitted.requests
    task = asyncio.create_task(segment(pipeline, source, Options.model_construct(**options)))
    while pipeline.admitted.requests == before and not task.done():
        await asyncio.sleep(0.005)
    return task


async def refusal_of(awaitable: Awaitable[Any]) -> Refusal:
    with pytest.raises(Refusal) as refused:
        await awaitable
    return refused.value


# ---- cost


def test_cost_counts_every_view_at_the_networks_and_the_pictures_size() -> None:
    one = work_of(200, 100, 480, (1.0,), False)
    assert one == Work(480 * 240, 200 * 100)
    assert work_of(200, 100, 480, (1.0,), True) == Work(2 * 480 * 240, 2 * 200 * 100)
    assert work_of(100, 200, 480, (0.5, 1.0), False) == Work(240 * 120 + 480 * 240, 2 * 200 * 100)
    assert work_of(1, 5000, 480, (1.0,), False) == Work(480, 5000)


def test_cost_is_of_the_views_that_the_network_sees() -> None:
    random = np.random.default_rng(0)
    for width, height, base_size in random.integers(1, 2000, (100, 3)).tolist():
        for scale in (1e-7, 0.5, 0.501, 0.7, 1.0, 1.1, 1.75):
            view_height, view_width = view_size(height, width, base_size, scale)
            assert work_of(width, height, base_size, (scale,), False).network == view_height * view_width, (
                f"{width} x {height} pixels at {scale} times {base_size}"
            )


def test_cost_counts_every_window() -> None:
    assert work_of(250, 100, 480, (1.0,), False, 100, 50) == Work(4 * 480 * 480, 4 * 100 * 100)
    assert work_of(90, 90, 480, (1.0,), False, 100, 50) == work_of(90, 90, 480, (1.0,), False)


def test_the_cost_model_learns_both_rates_and_follows_a_change() -> None:
    model, random = CostModel(), np.random.default_rng(0)
    works = [Work(int(network), int(merged)) for network, merged in random.integers(10_000, 5_000_000, (300, 2))]
    for work in works:
        model.observe(work, 2e-6 * work.network + 3e-8 * work.merged)
    assert model.predict(Work(1_000_000, 0)) == pytest.approx(2.0, rel=1e-3)
    assert model.predict(Work(0, 10_000_000)) == pytest.approx(0.3, rel=1e-2)
    for work in works:
        model.observe(work, 1e-6 * work.network)
    assert model.predict(Work(1_000_000, 0)) == pytest.approx(1.0, rel=0.02)


@pytest.mark.parametrize("runs", [20, 5_000])
def test_one_kind_of_picture_is_enough_to_predict_it(runs: int) -> None:
    model = CostModel()
    for _ in range(runs):
        model.observe(Work(172_800, 172_800), 0.17)
    assert model.predict(Work(172_800, 172_800)) == pytest.approx(0.17, rel=0.01)
    assert model.predict(Work(0, 0)) == 0


def test_large_runs_do_not_drown_small_ones() -> None:
    model = CostModel()
    for _ in range(300):
        model.observe(Work(10_000, 10_000), 0.02)
        model.observe(Work(10_000_000, 10_000_000), 10.0)
    assert model.predict(Work(10_000, 10_000)) == pytest.approx(0.015, rel=0.02), "half-way between the two rates"


@pytest.mark.parametrize("size", [(1920, 1080), (4000, 3000)])
def test_a_device_far_quicker_than_the_first_guess_is_learned_in_a_few_runs(size: tuple[int, int]) -> None:
    model, work = CostModel(), work_of(*size, 512, (1.0,), False)
    seconds = (0.01 * work.network + 0.002 * work.merged) / 1e6
    for _ in range(10):
        model.observe(work, seconds)
    assert model.predict(work) == pytest.approx(seconds, rel=0.1)


def test_no_prediction_is_below_zero() -> None:
    model = CostModel()
    for _ in range(50):
        model.observe(Work(100_000, 100_000), 1.0)
        model.observe(Work(100_000, 200_000), 0.5)
    assert model.predict(Work(0, 1_000_000)) == 0


# ---- admission


def test_a_full_queue_refuses_with_the_time_until_there_is_room(pipeline: Callable[..., Pipeline], gate: Any) -> None:
    async def main() -> None:
        served = pipeline(max_queue_pixels=served_cost * 2)
        first, second = await started(served), await started(served)
        refused = await refusal_of(segment(served, GREY, Options()))
        assert (refused.code, refused.status) == ("overloaded", 429)
        assert int(refused.headers["Retry-After"]) >= 1
        assert str(served_cost) in refused.message
        gate.set()
        await asyncio.gather(first, second)
        await segment(served, GREY, Options())
        assert served.admitted.requests == served.admitted.cost == 0

    served_cost = pipeline().estimate(30, 20, pipeline().engine.plan()).work.cost
    run(main)


def test_a_full_queue_names_the_time_until_enough_of_it_is_done(pipeline: Callable[..., Pipeline], gate: Any) -> None:
    async def main() -> None:
        plan = pipeline().engine.plan()
        work = pipeline().engine.work(30, 20, plan)
        served = pipeline(max_queue_pixels=2 * work.cost)
        for _ in range(50):
            served.device.cost_model.observe(work, 100.0)
        taken = [await started(served, timeout_ms=3_600_000) for _ in range(2)]
        wait_s = served.estimate(30, 20, plan).wait_s
        refused = await refusal_of(segment(served, GREY, Options.model_construct(timeout_ms=3_600_000)))
        assert refused.retry_after == pytest.approx(wait_s / 2, rel=0.1), "half of what is queued has to go"
        gate.set()
        await asyncio.gather(*taken)

    run(main)


def test_an_empty_house_lets_in_whatever_it_costs(pipeline: Callable[..., Pipeline], gate: Any) -> None:
    gate.set()
    run(lambda: segment(pipeline(max_queue_pixels=1), GREY, Options()))


def test_who_cannot_be_in_time_is_refused_at_once(pipeline: Callable[..., Pipeline], gate: Any) -> None:
    async def main() -> None:
        served = pipeline()
        for _ in range(50):
            served.device.cost_model.observe(served.engine.work(30, 20, served.engine.plan()), 4.0)
        first = await started(served, timeout_ms=60_000)
        refused = await refusal_of(segment(served, GREY, Options.model_construct(timeout_ms=5_000)))
        assert refused.code == "overloaded"
        assert 1 <= int(refused.headers["Retry-After"]) <= 8
        patient = await started(served, timeout_ms=60_000)
        gate.set()
        await asyncio.gather(first, patient)

    run(main)


def test_where_the_wait_alone_is_too_long_no_header_is_read(pipeline: Callable[..., Pipeline], gate: Any) -> None:
    async def main() -> None:
        served = pipeline()
        for _ in range(50):
            served.device.cost_model.observe(served.engine.work(30, 20, served.engine.plan()), 40.0)
        first = await started(served, timeout_ms=60_000)
        refused = await refusal_of(segment(served, b"no picture", Options.model_construct(timeout_ms=5_000)))
        assert refused.code == "overloaded"
        gate.set()
        await first
        with pytest.raises(InputError, match="not a picture"):
            await segment(served, b"no picture", Options.model_construct(timeout_ms=5_000))

    run(main)


def test_who_would_need_more_than_a_share_of_the_time_is_refused(pipeline: Callable[..., Pipeline], gate: Any) -> None:
    async def main() -> None:
        for share, code in ((0.8, "overloaded"), (0.95, None)):
            served = pipeline(deadline_share=share)
            for _ in range(50):
                served.device.cost_model.observe(served.engine.work(30, 20, served.engine.plan()), 400.0)
            first = await started(served, timeout_ms=900_000)
            second = await started(served, timeout_ms=900_000)  # it would take some 800 s with the wait
            assert second.done() == (code is not None)
            gate.set()
            await first
            if code is None:
                await second
            else:
                assert (await refusal_of(second)).code == code
            gate.clear()

    run(main)


def test_the_wait_is_what_the_runs_before_still_need(pipeline: Callable[..., Pipeline], gate: Any) -> None:
    async def main(predicted_s: float) -> tuple[float, float, float]:
        served = pipeline()
        plan = served.engine.plan()
        for _ in range(50):
            served.device.cost_model.observe(served.engine.work(30, 20, plan), predicted_s)
        first = await started(served)
        while served.engine.runs == 0:  # type: ignore[attr-defined]
            await asyncio.sleep(0.005)
        earlier = served.estimate(30, 20, plan)
        await asyncio.sleep(0.01)
        later = served.estimate(30, 20, plan)
        gate.set()
        await first
        gate.clear()
        return earlier.run_s, earlier.wait_s, later.wait_s

    whole, earlier, later = run(lambda: main(20.0))
    assert 0 < later < earlier < whole
    assert run(lambda: main(0.0))[1:] == (0, 0), "also of a run that takes longer than was predicted"


def test_the_deadline_ends_a_request_that_runs_and_its_cost_counts_until_the_run_is_over(
    pipeline: Callable[..., Pipeline], gate: Any
) -> None:
    async def main() -> None:
        served = pipeline(deadline_share=1.0)
        refused = await refusal_of(segment(served, GREY, Options.model_construct(timeout_ms=200)))
        assert (refused.code, refused.status) == ("deadline_passed", 504)
        assert served.engine.runs == 1  # type: ignore[attr-defined]
        assert served.admitted.requests == 1
        gate.set()
        while served.admitted.requests:
            await asyncio.sleep(0.005)
        assert served.admitted.cost == 0

    run(main)


def test_a_request_counts_until_its_answer_is_written(pipeline: Callable[..., Pipeline], gate: Any) -> None:
    async def main() -> None:
        served, writing, go_on = pipeline(max_queue_pixels=1), threading.Event(), threading.Event()

        def write(abandoned: Callable[[], bool]) -> str:
            writing.set()
            assert go_on.wait(WAIT)
            return "written"

        async def answered() -> Any:
            deadline = time.monotonic() + WAIT
            async with served.segmented(GREY, Options(), deadline=deadline) as result:
                return await served.encode(result, "npz", write, deadline)

        gate.set()
        first = asyncio.create_task(answered())
        await asyncio.to_thread(writing.wait, WAIT)
        assert served.estimate(30, 20, served.engine.plan()).wait_s == 0, "the device is free"
        assert (await refusal_of(segment(served, GREY, Options()))).code == "overloaded"
        go_on.set()
        assert (await first)[0] == "written"
        await segment(served, GREY, Options())

    run(main)


def test_who_cannot_be_in_time_for_the_writing_of_its_answer_is_refused(
    pipeline: Callable[..., Pipeline], gate: Any
) -> None:
    async def main() -> None:
        served = pipeline()
        for _ in range(50):
            served.encode_times.observe("npz", 1_000_000, 4e4)
        first = await started(served, format="png", timeout_ms=60_000)
        slow = Options.model_construct(format="npz", timeout_ms=20_000)
        assert (await refusal_of(segment(served, GREY, slow))).code == "overloaded", "600 pixels take 23 s to write"
        second = await started(served, format="png", timeout_ms=20_000)
        gate.set()
        await asyncio.gather(first, second)

    run(main)


def test_the_writing_of_an_answer_that_nobody_waits_for_is_told_so(
    pipeline: Callable[..., Pipeline], gate: Any
) -> None:
    async def main() -> None:
        served, told = pipeline(), threading.Event()
        departed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        loop = asyncio.get_running_loop()

        def write(abandoned: Callable[[], bool]) -> None:
            loop.call_soon_threadsafe(departed.set_result, None)
            until = time.monotonic() + WAIT
            while not abandoned() and time.monotonic() < until:
                time.sleep(0.005)
            told.set()

        deadline = time.monotonic() + WAIT
        async with served.segmented(GREY, Options(), deadline=deadline) as result:
            with pytest.raises(Departed):
                await served.encode(result, "npz", write, deadline, departed)
        assert await asyncio.to_thread(told.wait, WAIT / 2)
        assert served.encode_times.predict("npz", 600) > 0, "that it took so long is remembered"

    gate.set()
    run(main)


def test_the_limit_is_for_all_models_together(pipeline: Callable[..., Pipeline], gate: Any) -> None:
    async def main() -> None:
        one, other = pipeline(max_queue_pixels=1), pipeline(max_queue_pixels=1)
        first = await started(one)
        refused = await refusal_of(segment(other, GREY, Options()))
        assert refused.code == "overloaded"
        gate.set()
        await first
        await segment(other, GREY, Options())

    run(main)


def test_a_queue_that_other_models_fill_names_their_time(pipeline: Callable[..., Pipeline], gate: Any) -> None:
    async def main() -> None:
        one = pipeline()
        work = one.engine.work(30, 20, one.engine.plan())
        other = pipeline(max_queue_pixels=2 * work.cost)
        for _ in range(50):
            one.device.cost_model.observe(work, 100.0)
        taken = [await started(one, timeout_ms=3_600_000) for _ in range(2)]
        refused = await refusal_of(segment(other, GREY, Options()))
        assert refused.retry_after == pytest.approx(100, rel=0.1), "one of the two has to go"
        gate.set()
        await asyncio.gather(*taken)

    run(main)


def test_the_device_is_told_whether_others_are_on_their_way(pipeline: Callable[..., Pipeline], gate: Any) -> None:
    async def main() -> None:
        served = pipeline()
        jobs: list[Job] = []
        submit = served.device.submit
        served.device.submit = lambda job: [jobs.append(job), submit(job)]  # type: ignore[method-assign,func-returns-value]
        first, second = await started(served), await started(served)
        gate.set()
        await asyncio.gather(first, second)
        await segment(served, GREY, Options())
        assert [job.alone for job in jobs] == [True, False, True]

    run(main)


def test_a_departed_clients_picture_is_not_run(pipeline: Callable[..., Pipeline], gate: Any) -> None:
    async def main() -> None:
        served = pipeline()
        first = await started(served)
        while served.engine.runs == 0:  # type: ignore[attr-defined]
            await asyncio.sleep(0.005)
        departed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiting = asyncio.create_task(segment(served, GREY, Options(), departed=departed))
        while served.admitted.requests < 2:
            await asyncio.sleep(0.005)
        departed.set_result(None)
        with pytest.raises(Departed):
            await waiting
        assert served.admitted.requests == 1
        gate.set()
        await first
        await segment(served, GREY, Options())
        assert served.engine.runs == 2  # type: ignore[attr-defined]

    run(main)


def test_what_a_refused_picture_held_is_let_go_at_once() -> None:
    """Not only when Python looks for garbage, which it does by the number of objects and not by their size."""

    async def main() -> None:
        class Picture: ...

        def refuse(picture: Picture) -> None:
            raise InputError("truncated", "cut short")

        async def refused() -> weakref.ref[Picture]:
            picture = Picture()
            with suppress(InputError):
                await in_pool(workers, partial(refuse, picture), time.monotonic() + WAIT)
            return weakref.ref(picture)

        picture = await refused()
        while picture():  # a moment, until the worker has put its task away
            await asyncio.sleep(0.005)

    gc.disable()
    try:
        with ThreadPoolExecutor(1) as workers:
            run(main)
    finally:
        gc.enable()


def test_what_waits_for_a_thread_is_let_go_when_its_caller_has_left() -> None:
    """Not only when a thread comes to it: who comes and goes while all are busy would otherwise fill the memory."""

    async def main() -> None:
        class Picture: ...

        async def left() -> weakref.ref[Picture]:
            picture = Picture()
            departed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            departed.set_result(None)
            with suppress(Departed):
                await in_pool(workers, partial(repr, picture), time.monotonic() + WAIT, departed)
            return weakref.ref(picture)

        assert (await left())() is None

    go_on = threading.Event()
    with ThreadPoolExecutor(1) as workers:
        workers.submit(go_on.wait, WAIT)
        try:
            run(main)
        finally:
            go_on.set()


def test_a_bad_picture_is_told_before_it_is_queued(pipeline: Callable[..., Pipeline], gate: Any) -> None:
    async def main() -> None:
        served = pipeline()
        first = await started(served)
        cut = encoded(GREY)[:-30]
        with pytest.raises(InputError):
            await segment(served, cut, Options())
        assert served.admitted.requests == 1
        gate.set()
        await first

    run(main)


# ---- over HTTP


def test_dry_run_tells_what_a_request_would_cost(client: TestClient, engine: Engine) -> None:
    picture = encoded(GREY)
    answer = client.post("/segment?dry_run=true&scales=0.5,1&flip=true", content=picture)
    expected = work_of(30, 20, engine.metadata.base_size, (0.5, 1.0), True).cost
    assert answer.json()["pixels"] == expected == int(answer.headers["x-cost-pixels"])
    assert answer.json()["wait_ms"] == 0
    assert answer.json()["predicted_ms"] > 0
    done = client.post("/segment?scales=0.5,1&flip=true", content=picture)
    assert int(done.headers["x-cost-pixels"]) == expected
    assert float(done.headers["x-predicted-ms"]) > 0
    assert "encnet_phase_seconds_count" in client.get("/metrics").text
    reduced = client.post("/segment?dry_run=true&max_side=15", content=picture).json()["pixels"]
    assert reduced == work_of(15, 10, engine.metadata.base_size, engine.metadata.scales, engine.metadata.flip).cost


@pytest.mark.parametrize("route", ["/segment/batch", "/v2/models/tiny_encoded/infer"])
def test_a_request_of_several_pictures_tells_their_cost_and_time(client: TestClient, route: str) -> None:
    picture = encoded(GREY)
    single = client.post("/segment", content=picture).headers
    if route == "/segment/batch":
        files = [("image", (name, content)) for name, content in (("a", picture), ("b", b"none"), ("c", picture))]
        headers = client.post(route, files=files).headers
    else:
        text = base64.b64encode(picture).decode()
        image = {"name": "image", "datatype": "BYTES", "shape": [2], "data": [text, text]}
        headers = client.post(route, json={"inputs": [image]}).headers
    assert int(headers["x-cost-pixels"]) == 2 * int(single["x-cost-pixels"])
    assert float(headers["x-predicted-ms"]) > 0
    timing = dict(entry.split(";dur=") for entry in headers["server-timing"].split(", "))
    assert list(timing) == ["decode", "queue", "infer", "encode", "total"]
    assert float(timing["total"]) > 0


def test_overload_over_http_is_429_with_retry_after(
    client_with: Callable[..., TestClient], gate: threading.Event
) -> None:
    with (
        client_with(opening(gate), max_queue_pixels=5_000) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        first = pool.submit(client.post, "/segment", content=encoded(GREY))
        until(lambda: 'encnet_queue_requests{model="tiny"} 1.0' in client.get("/metrics").text)
        refused = client.post("/segment", content=encoded(GREY))
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "overloaded"
        late = client.post("/segment?timeout_ms=1", content=encoded(GREY))
        assert late.status_code in (429, 504)
        gate.set()
        assert first.result(WAIT).status_code == 200


@pytest.mark.parametrize("route", ["/segment/batch", "/v2/models/tiny_encoded/infer"])
def test_the_pictures_of_one_request_do_not_refuse_each_other(
    client_with: Callable[..., TestClient], route: str
) -> None:
    client = client_with(max_queue_pixels=5_000)
    pictures = [encoded(GREY)] * 6
    if route == "/segment/batch":
        items = client.post(route, files=[("image", (f"{i}.png", one)) for i, one in enumerate(pictures)]).json()[
            "items"
        ]
        assert [item["error"] for item in items] == [None] * 6
    else:
        texts = [base64.b64encode(one).decode() for one in pictures]
        image = {"name": "image", "datatype": "BYTES", "shape": [6], "data": texts}
        answer = client.post(route, json={"inputs": [image]})
        assert answer.status_code == 200, answer.text
        assert answer.json()["outputs"][0]["shape"] == [6, 20, 30]


def test_the_pictures_of_one_request_are_refused_because_of_other_requests(
    client_with: Callable[..., TestClient], gate: threading.Event
) -> None:
    files = [("image", (name, encoded(GREY))) for name in ("a.png", "b.png")]
    with (
        client_with(opening(gate), max_queue_pixels=5_000) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        first = pool.submit(client.post, "/segment", content=encoded(GREY))
        until(lambda: 'encnet_queue_requests{model="tiny"} 1.0' in client.get("/metrics").text)
        items = client.post("/segment/batch", files=files).json()["items"]
        assert [item["error"]["code"] for item in items] == ["overloaded"] * 2
        gate.set()
        assert first.result(WAIT).status_code == 200


def test_a_picture_that_waits_for_others_of_its_request_keeps_its_deadline(
    client_with: Callable[..., TestClient], gate: threading.Event
) -> None:
    files = [("image", (name, encoded(GREY))) for name in ("a.png", "b.png")]
    with client_with(opening(gate), max_queue_pixels=5_000) as client:
        begun = time.monotonic()
        items = client.post("/segment/batch?timeout_ms=500", files=files).json()["items"]
        assert time.monotonic() - begun < WAIT
        assert [item["error"]["code"] for item in items] == ["deadline_passed"] * 2


def test_a_client_that_leaves_is_counted_and_no_failure(
    settings: Settings, gate: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    models = Models(settings, opening(gate))
    models.start()
    with serving(create_app(models=models)) as url:

        def metrics() -> str:
            with urllib.request.urlopen(f"{url}/metrics", timeout=WAIT) as answer:
                return str(answer.read(), "utf-8")

        with socket.create_connection(("127.0.0.1", urlsplit(url).port), WAIT) as connection:
            picture = encoded(GREY)
            head = f"POST /segment HTTP/1.1\r\nHost: x\r\nContent-Length: {len(picture)}\r\n\r\n"
            connection.sendall(head.encode() + picture)
            until(lambda: 'encnet_queue_requests{model="tiny"} 1.0' in metrics())
        until(lambda: "encnet_departed_total 1.0" in metrics())
        gate.set()
        until(lambda: 'encnet_queue_requests{model="tiny"} 0.0' in metrics())
    models.close()
    assert "Traceback" not in caplog.text


def test_bytes_in_the_house_are_bounded(client_with: Callable[..., TestClient]) -> None:
    picture = encoded(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    client = client_with(max_buffered_bytes=len(picture) - 1)
    refused = client.post("/segment", content=picture)
    assert (refused.status_code, refused.json()["error"]["code"]) == (413, "too_many_bytes"), "no use coming back"
    assert "retry-after" not in refused.headers
    assert client.post("/segment", content=encoded(GREY)).status_code == 200, "what was held has been given back"


def test_bytes_in_the_house_are_those_of_all_requests_and_given_back(client_with: Callable[..., TestClient]) -> None:
    app = client_with(max_buffered_bytes=10).app

    async def main() -> None:
        held, go_on = asyncio.Event(), asyncio.Event()
        first = asyncio.create_task(status_of(app, [b"123", b"456"], held, go_on))
        await held.wait()
        assert await status_of(app, [b"12345"]) == 429
        assert await status_of(app, [b"1234"]) == 415, "there was room for it"
        go_on.set()
        assert await first == 415
        assert await status_of(app, [b"1234567890"]) == 415

    run(main)


def test_a_batch_in_flight_is_finished_when_the_service_is_told_to_stop(
    client_with: Callable[..., TestClient], gate: Any
) -> None:
    client = client_with(opening(gate))
    models = client.app.state.models  # type: ignore[attr-defined]

    def stop() -> None:
        until(lambda: models.in_flight > 0)
        models.drain()
        gate.set()

    stopping = threading.Thread(target=stop)
    stopping.start()
    answer = client.post("/segment/batch", files=[("image", (f"{i}.png", encoded(GREY))) for i in range(10)])
    stopping.join()
    assert [item["error"] for item in answer.json()["items"]] == [None] * 10


def test_the_time_for_an_upload_does_not_end_a_run(client_with: Callable[..., TestClient], gate: Any) -> None:
    app = client_with(opening(gate), upload_timeout_ms=50).app

    async def main() -> None:
        answer = asyncio.create_task(status_of(app, [encoded(GREY)]))
        await asyncio.sleep(0.2)
        gate.set()
        assert await answer == 200

    run(main)


async def status_of(
    app: Any, chunks: list[bytes], held: asyncio.Event | None = None, go_on: asyncio.Event | None = None
) -> int:
    """Of a POST to /segment whose body comes in these pieces, and ends when it may go on."""
    statuses = []
    pieces = [*chunks, b""]

    async def receive() -> dict[str, Any]:
        if not pieces:
            await asyncio.Event().wait()
        if len(pieces) == 1 and held and go_on:
            held.set()
            await go_on.wait()
        piece = pieces.pop(0)
        return {"type": "http.request", "body": piece, "more_body": bool(pieces)}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    scope = {"type": "http", "http_version": "1.1", "method": "POST", "path": "/segment", "raw_path": b"/segment"}
    await app({**scope, "scheme": "http", "query_string": b"", "root_path": "", "headers": []}, receive, send)
    (status,) = statuses
    return status


def test_a_picture_that_memory_has_no_room_for_is_429(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(image: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("service.images._to_rgb", full)
    refused = client.post("/segment", content=encoded(GREY))
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")
    assert refused.headers["retry-after"] == "1"
