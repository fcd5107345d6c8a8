"""Promise: the client gives the server's answer bit for bit, waits as it is told, and says what failed."""

import asyncio
import io
import json
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from email.utils import formatdate
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
import pytest
from live import Answer, scripted, serving
from onnx import helper
from PIL import Image
from tiny_model import CLASSES, METADATA, encoded, tiny_model

import service
from service.app import create_app
from service.client import LONGEST_PAUSE, AsyncClient, Client, Segmentation, SegmentError, _Attempts
from service.engine import Engine
from service.settings import Settings

ROOT = Path(service.__file__).parents[1]


@pytest.fixture(scope="module")
def url(model_file: Path) -> Iterator[str]:
    with serving(create_app(Settings(model=model_file, device="cpu", threads=1, max_pixels=100_000))) as url:
        yield url


@pytest.fixture(scope="module")
def good(url: str, quadrants: np.ndarray) -> bytes:
    """The body of a real answer."""
    return httpx.post(f"{url}/segment", content=encoded(quadrants)).content


class Blocking:
    """AsyncClient with the face of Client, so that one test holds for both."""

    def __init__(self, url: str, **arguments: Any) -> None:
        self.make = lambda: AsyncClient(url, **arguments)

    def segment(self, picture: Any, **options: Any) -> Segmentation:
        async def run() -> Segmentation:
            async with self.make() as client:
                return await client.segment(picture, **options)

        return asyncio.run(run())

    def segment_many(self, pictures: Any, **options: Any) -> list[Segmentation | SegmentError]:
        async def run() -> list[Segmentation | SegmentError]:
            async with self.make() as client:
                return [answer async for answer in client.segment_many(pictures, **options)]

        return asyncio.run(run())

    def close(self) -> None:
        """Each call closed its own."""


@pytest.fixture(params=[Client, Blocking], ids=["sync", "async"])
def connect(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """A function that makes a client, blocking or async."""
    made = []

    def make(url: str, **arguments: Any) -> Any:
        made.append(request.param(url, **arguments))
        return made[-1]

    yield make
    for client in made:
        client.close()


def failure(client: Any, picture: Any = b"picture", **options: Any) -> SegmentError:
    with pytest.raises(SegmentError) as caught:
        client.segment(picture, **options)
    return caught.value


def busy(seconds: str, status: int = 429, **headers: str) -> Answer:
    fault = {"error": {"code": "busy", "message": "too much to do", "request_id": "r1"}}
    return status, {"Retry-After": seconds, **headers}, json.dumps(fault).encode()


# ---- the answer


def test_the_answer_is_the_engines_bit_for_bit(connect: Callable[..., Any], url: str, engine: Engine) -> None:
    noisy = np.random.default_rng(1).integers(0, 255, (33, 47, 3), np.uint8)
    answer = connect(url).segment(noisy, scales=[0.5, 1], flip=True)
    direct = engine.segment(noisy, (0.5, 1.0), True)
    np.testing.assert_array_equal(answer.mask, direct.mask)
    assert answer.mask.dtype == direct.mask.dtype
    scores = sorted((row.id, row.score) for row in answer.presence)
    np.testing.assert_array_equal(np.float32([score for _, score in scores]), direct.presence)
    assert {row.name for row in answer.presence} == set(CLASSES)
    assert answer.present == [row.name for row in answer.presence if row.score >= 0.5]
    assert (answer.answer["scales"], answer.answer["flip"]) == ([0.5, 1.0], True)
    assert answer.timing_ms["total"] > 0
    assert answer.request_id == answer.answer["id"]


def test_masks_of_many_classes(tmp_path: Path, quadrants: np.ndarray, quadrants_mask: np.ndarray) -> None:
    model = tiny_model(300)
    names = {"classes": json.dumps(list(map(str, range(300)))), "palette": json.dumps([[0, 0, 0]] * 300)}
    helper.set_model_props(model, {**METADATA, **names})
    onnx.save(model, tmp_path / "many.onnx")
    with (
        serving(create_app(Settings(model=tmp_path / "many.onnx", device="cpu", threads=1))) as url,
        Client(url) as client,
    ):
        mask = client.segment(quadrants).mask
    assert mask.dtype == np.uint16
    np.testing.assert_array_equal(mask, quadrants_mask)


@pytest.mark.parametrize(
    "make",
    [
        lambda pixels, folder: encoded(pixels),
        lambda pixels, folder: bytearray(encoded(pixels)),
        lambda pixels, folder: pixels,
        lambda pixels, folder: pixels[::1, ::-1][:, ::-1],
        lambda pixels, folder: np.dstack([pixels, np.full(pixels.shape[:2], 255, np.uint8)]),
        lambda pixels, folder: Image.fromarray(pixels),
        lambda pixels, folder: Image.fromarray(pixels).convert("P"),
        lambda pixels, folder: Image.fromarray(pixels).convert("CMYK"),
        lambda pixels, folder: folder / "q.png",
        lambda pixels, folder: str(folder / "q.png"),
    ],
    ids=["bytes", "bytearray", "array", "view", "rgba", "pillow", "palette", "cmyk", "path", "str"],
)
def test_every_kind_of_picture(
    make: Callable[..., Any], url: str, tmp_path: Path, quadrants: np.ndarray, quadrants_mask: np.ndarray
) -> None:
    (tmp_path / "q.png").write_bytes(encoded(quadrants))
    with Client(url) as client:
        np.testing.assert_array_equal(client.segment(make(quadrants, tmp_path)).mask, quadrants_mask)


def test_grey_arrays(url: str) -> None:
    grey = np.zeros((5, 7), np.uint8)
    with Client(url) as client:
        for pixels in (grey, grey[:, :, None]):
            np.testing.assert_array_equal(client.segment(pixels).mask, grey)


def test_a_pillow_picture_is_taken_as_it_is(url: str, quadrants: np.ndarray, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "turned.png").write_bytes(encoded(quadrants, exif=exif))
    with Client(url) as client:
        assert client.segment(tmp_path / "turned.png").mask.shape == (40, 30), "the file says how it stands"
        assert client.segment(Image.open(tmp_path / "turned.png")).mask.shape == (30, 40), "its pixels are as they are"


@pytest.mark.parametrize("suffix", ["", "/", "/segment", "/segment/"])
def test_the_url_may_name_the_route(url: str, suffix: str, quadrants: np.ndarray) -> None:
    with Client(url + suffix) as client:
        assert client.segment(quadrants).mask.shape == (30, 40)


def test_options_and_headers_as_they_are_sent(connect: Callable[..., Any], good: bytes) -> None:
    with scripted(lambda number: (200, {}, good)) as server:
        client = connect(server.url + "/prefix", headers={"Authorization": "Bearer key"})
        client.segment(b"picture", scales=(0.75, 1), flip=np.True_, max_side=512, classes=["a", "b"], threshold=None)
        ((path, headers, body),) = server.requests
    assert path == "/prefix/segment?scales=0.75%2C1&flip=true&max_side=512&classes=a%2Cb"
    assert (headers["Authorization"], body) == ("Bearer key", b"picture")


# ---- trying again


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_in_seconds_is_waited_for(connect: Callable[..., Any], good: bytes, status: int) -> None:
    with scripted(lambda number: busy("1", status) if number == 0 else (200, {}, good)) as server:
        started = time.monotonic()
        assert connect(server.url).segment(b"picture").mask.shape == (30, 40)
        assert time.monotonic() - started >= 1
        assert [body for _, _, body in server.requests] == [b"picture"] * 2


def test_retry_after_as_a_date_is_by_the_servers_clock(connect: Callable[..., Any], good: bytes) -> None:
    """The server's clock is a day behind ours; it asks for one second."""
    now = time.time() - 86400
    dates = {"Date": formatdate(now, usegmt=True)}
    first = busy(formatdate(now + 1, usegmt=True), **dates)
    with scripted(lambda number: first if number == 0 else (200, {}, good)) as server:
        started = time.monotonic()
        connect(server.url).segment(b"picture")
        assert time.monotonic() - started >= 1
        assert len(server.requests) == 2


def test_retry_after_is_followed_as_often_as_it_is_said(connect: Callable[..., Any], good: bytes) -> None:
    with scripted(lambda number: busy("1") if number < 2 else (200, {}, good)) as server:
        connect(server.url, retries=0).segment(b"picture")
        assert len(server.requests) == 3


def test_a_wait_beyond_the_deadline_is_not_begun(connect: Callable[..., Any]) -> None:
    with scripted(lambda number: busy("60")) as server:
        started = time.monotonic()
        error = failure(connect(server.url, timeout=5))
        assert time.monotonic() - started < 4
        assert len(server.requests) == 1
    assert (error.code, str(error), error.status, error.request_id) == ("busy", "too much to do", 429, "r1")


@pytest.mark.parametrize("said", ["", "soon", "0", "-3", "1.5", "Mon, 99 Foo 2020"])
def test_without_a_time_that_can_be_read_pauses_double(
    connect: Callable[..., Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.client.FIRST_PAUSE", 0.08)
    with scripted(lambda number: busy(said)) as server:
        started = time.monotonic()
        assert failure(connect(server.url, retries=3)).status == 429
        assert time.monotonic() - started >= 0.5 * (0.08 + 0.16 + 0.32)
        assert len(server.requests) == 4


def test_a_pause_is_never_shorter_than_was_told_and_without_that_never_long() -> None:
    attempts, final = _Attempts(timeout=3600, retries=20), SegmentError("busy", "too much to do")
    told = [attempts._pause(10.0, final) for _ in range(200)]
    assert 10 <= min(told) < max(told) <= 11
    doubled = [attempts._pause(None, final) for _ in range(20)]
    assert doubled[0] <= 0.25
    assert LONGEST_PAUSE / 2 <= min(doubled[5:]) < max(doubled) <= LONGEST_PAUSE


def test_a_connection_that_is_cut_is_tried_again(connect: Callable[..., Any], good: bytes) -> None:
    with scripted(lambda number: None if number < 2 else (200, {}, good)) as server:
        assert connect(server.url).segment(b"picture").mask.shape == (30, 40)
        assert len(server.requests) == 3


def test_a_server_that_comes_up_meanwhile(connect: Callable[..., Any], good: bytes) -> None:
    with scripted(lambda number: (200, {}, good)) as before:
        port = before.server_address[1]
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(connect(f"http://127.0.0.1:{port}").segment, b"picture")
        time.sleep(0.3)
        with scripted(lambda number: (200, {}, good), port) as server:
            assert answer.result(60).mask.shape == (30, 40)
            assert len(server.requests) == 1


@pytest.mark.parametrize("status", [500, 502, 504])
def test_an_error_of_a_proxy_is_tried_again(connect: Callable[..., Any], good: bytes, status: int) -> None:
    with scripted(lambda number: (status, {}, b"Internal Server Error") if number == 0 else (200, {}, good)) as server:
        assert connect(server.url).segment(b"picture").mask.shape == (30, 40)
        assert len(server.requests) == 2


@pytest.mark.parametrize("status", [400, 413, 422, 500, 504])
def test_other_errors_are_not_tried_again(connect: Callable[..., Any], status: int) -> None:
    with scripted(lambda number: busy("1", status)) as server:
        assert failure(connect(server.url)).status == status
        assert len(server.requests) == 1


def test_nobody_there_is_a_sentence(connect: Callable[..., Any]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    error = failure(connect(url, retries=1))
    assert (error.code, error.status) == ("unreachable", None)
    assert str(error).startswith(f"no answer from {url}/segment: ")


def test_all_attempts_end_at_the_deadline(connect: Callable[..., Any]) -> None:
    """A server that takes the connection and never answers, and one that answers a byte now and then."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        error = failure(connect(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout=0.5))
        assert 0.5 <= time.monotonic() - started < 5
    assert (error.code, str(error)) == ("deadline", "the server did not answer within 0.5 s")


def test_a_trickling_answer_ends_at_the_deadline(connect: Callable[..., Any]) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        left = asyncio.create_task(receive())
        while not left.done():
            await send({"type": "http.response.body", "body": b" ", "more_body": True})
            await asyncio.sleep(0.1)

    with serving(app) as url:
        assert failure(connect(url, timeout=0.5)).code == "deadline"


def test_a_picture_that_is_taken_too_slowly_ends_at_the_deadline(connect: Callable[..., Any]) -> None:
    taken = []

    def take(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection, suppress(OSError):
            while part := connection.recv(64 * 1024):
                taken.append(len(part))
                time.sleep(0.01)

    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        taking = threading.Thread(target=take, args=(listener,))
        taking.start()
        client = connect(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=0.5)
        error = failure(client, bytes(60_000_000))
        taking.join()
    assert sum(taken) < 60_000_000, "the rest is not sent when the time is up"
    assert (error.code, str(error)) == ("deadline", "the server did not answer within 0.5 s")


# ---- what went wrong


def test_the_servers_error_is_told(connect: Callable[..., Any], url: str, quadrants: np.ndarray) -> None:
    error = failure(connect(url), encoded(quadrants)[:60])
    assert (error.code, error.status) == ("truncated", 400)
    assert "cut short or damaged" in str(error)
    assert error.request_id
    assert failure(connect(url), quadrants, scales=99).code == "invalid_option"
    assert failure(connect(url), quadrants, speed=1).code == "unknown_option"
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.code, copy.message, copy.status, copy.request_id) == error.args


@pytest.mark.parametrize(
    ("status", "body", "code"),
    [
        (502, b"<html>Bad Gateway</html>", "http_502"),
        (404, b'{"detail": "Not Found"}', "http_404"),
        (200, b"<html>Welcome</html>", "bad_answer"),
        (200, b'{"mask": {"data": "AAAA"}}', "bad_answer"),
        (200, b"[]", "bad_answer"),
        (200, b"[" * 100_000, "bad_answer"),
    ],
)
def test_what_is_not_this_service_is_told(connect: Callable[..., Any], status: int, body: bytes, code: str) -> None:
    with scripted(lambda number: (status, {}, body)) as server:
        error = failure(connect(server.url, retries=0))
    assert (error.code, error.status) == (code, status)


def test_a_file_that_is_not_there(connect: Callable[..., Any], url: str, tmp_path: Path) -> None:
    error = failure(connect(url), tmp_path / "none.jpg")
    assert (error.code, error.status) == ("unreadable", None)
    assert "none.jpg" in str(error)


@pytest.mark.parametrize(
    ("picture", "kind"),
    [
        (np.zeros((4, 4, 3), np.float32), ValueError),
        (np.zeros((4, 4, 2), np.uint8), ValueError),
        (np.zeros((0, 4, 3), np.uint8), ValueError),
        (Image.new("F", (4, 4)), ValueError),
        (Image.new("I", (4, 4)), ValueError),
        (None, TypeError),
        (7, TypeError),
    ],
)
def test_what_is_no_picture_is_refused_before_it_is_sent(
    connect: Callable[..., Any], picture: Any, kind: type[Exception]
) -> None:
    with pytest.raises(kind):
        connect("http://127.0.0.1:1").segment(picture)


def test_a_damaged_file_that_pillow_opened_fails_alone(
    connect: Callable[..., Any], url: str, quadrants: np.ndarray
) -> None:
    file = encoded(np.random.default_rng(1).integers(0, 255, (200, 200, 3), np.uint8))
    second_part = file.rindex(b"IDAT")
    cut, broken = (Image.open(io.BytesIO(part)) for part in (file[:2000], file[:second_part] + b"????"))
    answers = list(connect(url).segment_many([quadrants, cut, broken, quadrants]))
    assert [getattr(answer, "code", None) for answer in answers] == [None, "unreadable", "unreadable", None]
    assert "Pillow cannot read the picture's file: " in str(answers[1])


def test_a_timeout_may_be_infinite(connect: Callable[..., Any], url: str, quadrants: np.ndarray) -> None:
    assert connect(url, timeout=float("inf")).segment(quadrants).mask.shape == quadrants.shape[:2]


def test_what_the_client_cannot_do_is_refused(connect: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="format json"):
        connect("http://127.0.0.1:1").segment(b"picture", format="png")
    with pytest.raises(ValueError, match="dry_run has none"):
        connect("http://127.0.0.1:1").segment(b"picture", dry_run=True)
    for url in ("127.0.0.1:8000", "http://", "http://host:port", "ftp://127.0.0.1"):
        with pytest.raises(ValueError, match="http://127"):
            connect(url).segment(b"picture")


# ---- many


def test_many_keep_their_order_and_one_bad_one_fails_alone(
    connect: Callable[..., Any], url: str, quadrants: np.ndarray
) -> None:
    pictures = [quadrants[: 5 + index] for index in range(10)]
    pictures[3] = b"no picture"  # type: ignore[call-overload]
    answers = list(connect(url).segment_many(iter(pictures), concurrency=3))
    assert len(answers) == 10
    assert isinstance(answers[3], SegmentError)
    assert answers[3].code == "not_an_image"
    heights = [len(answer.mask) for answer in answers if isinstance(answer, Segmentation)]
    assert heights == [5 + index for index in range(10) if index != 3]


def test_many_run_side_by_side_but_no_more_than_asked(connect: Callable[..., Any], good: bytes) -> None:
    now, most, lock = 0, 0, threading.Lock()

    def answer(number: int) -> Answer:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.1)
        with lock:
            now -= 1
        return 200, {}, good

    with scripted(answer) as server:
        assert len(list(connect(server.url).segment_many([b"picture"] * 9, concurrency=3))) == 9
    assert most == 3


@pytest.mark.parametrize("concurrency", [0, -1])
def test_many_at_least_one_at_a_time(connect: Callable[..., Any], url: str, concurrency: int) -> None:
    with pytest.raises(ValueError, match="concurrency is at least 1"):
        list(connect(url).segment_many([b"picture"], concurrency=concurrency))


def test_many_can_be_left_early(good: bytes) -> None:
    async def take_one(url: str) -> None:
        pictures = (b"picture" for _ in range(20))
        async with AsyncClient(url) as client, aclosing(client.segment_many(pictures, concurrency=2)) as answers:
            assert isinstance(await anext(answers), Segmentation)

    with scripted(lambda number: (200, {}, good)) as server:
        with Client(server.url) as client:
            answers = client.segment_many((b"picture" for _ in range(20)), concurrency=2)
            assert isinstance(next(answers), Segmentation)
            answers.close()  # type: ignore[attr-defined]
        assert len(server.requests) <= 3
        asyncio.run(take_one(server.url))
        assert len(server.requests) <= 6


# ---- what it needs


def test_the_client_needs_nothing_of_the_service() -> None:
    blocked = [
        "fastapi",
        "onnxruntime",
        "pydantic",
        "pydantic_settings",
        "rich",
        "starlette",
        "torch",
        "typer",
        "uvicorn",
    ]
    script = f"import sys; sys.modules.update(dict.fromkeys({blocked!r})); import service.client"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=120)


def test_without_httpx_it_says_what_to_install() -> None:
    script = "import sys; sys.modules['httpx'] = None; import service.client"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "pip install 'httpx" in done.stderr.splitlines()[-1]
