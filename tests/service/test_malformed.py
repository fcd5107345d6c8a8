"""Promise: whatever is uploaded, the answer is a sentence and never a 5xx, and the service goes on."""

import asyncio
import base64
import itertools
import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from live import serving
from pydantic import SecretStr
from starlette.testclient import TestClient
from starlette.types import Receive, Scope, Send
from tiny_model import encoded

from benchmarks.malformed import Stock, good_picture_is_answered, malformed, send, stock_for
from benchmarks.wire import Request, request_bytes
from service import images, pipeline, upload
from service.app import create_app
from service.errors import InputError, Refusal
from service.images import decode
from service.models import Models
from service.pipeline import in_pool
from service.settings import Settings

pytestmark = pytest.mark.filterwarnings("ignore:::PIL")  # of which damaged files give many

COUNT = 300
SEED = 1
WAIT = 60


@pytest.fixture(scope="module")
def url(model_file: Path) -> Iterator[str]:
    models = Models(Settings(model=model_file, device="cpu", threads=1, timeout_ms=240_000))  # no test of times
    models.start()
    with serving(create_app(models=models)) as served:
        yield served
    models.close()


@pytest.fixture(scope="module")
def stock(url: str) -> Stock:
    return stock_for(url, max_side=300)


def test_malformed_requests_are_each_answered_with_a_sentence(url: str, stock: Stock) -> None:
    tally = send(url, itertools.islice(malformed(SEED, stock), COUNT), clients=4)
    assert [str(failure) for failure in tally.failures] == []
    assert sum(tally.answers.values()) == COUNT
    assert {status for _, status, _ in tally.answers} >= {200, 400, 413, 415, 422}
    assert good_picture_is_answered(url)


def test_bombs_and_floods_are_each_answered_with_a_sentence(url: str, stock: Stock) -> None:
    requests = [Request(name, request_bytes("POST", "/segment", [], data)) for name, data in stock.hurtful.items()]
    tally = send(url, iter(requests), clients=2)
    assert [str(failure) for failure in tally.failures] == []
    assert sum(tally.answers.values()) == len(requests)
    assert good_picture_is_answered(url)


def test_the_requests_are_the_same_for_a_seed(stock: Stock) -> None:
    first, second = (list(itertools.islice(malformed(SEED, stock), 100)) for _ in range(2))
    assert first == second
    assert first != list(itertools.islice(malformed(SEED + 1, stock), 100))


# ---- one by one


@pytest.mark.parametrize(
    "query", ["classes=" + "9" * 5000, "window=1" + "0" * 400 + "&stride=5", "max_side=" + "9" * 5000]
)
def test_numbers_of_thousands_of_digits(client: TestClient, quadrants: np.ndarray, query: str) -> None:
    answer = client.post(f"/segment?{query}", content=encoded(quadrants))
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "invalid_option")


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b'{"image": "data:;base64,aGVsbG8=", "\\ud800": {}}', 422, "invalid_option"),
        (b'{"image": "", "scales": [' + b"1," * 20_000 + b"1]}", 400, "invalid_body"),
        (b'{"image": "data:' + b"a" * 500_000 + b'"}', 400, "missing_image"),
        (b'{"image": DEEP, "image": DEEP}'.replace(b"DEEP", b'{"a":' * 400 + b"1" + b"}" * 400), 400, "missing_image"),
    ],
    ids=["half a surrogate pair", "flood of values", "endless media type", "deep twins"],
)
def test_hostile_json(client: TestClient, body: bytes, status: int, code: str) -> None:
    answer = client.post("/segment", content=body, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
@pytest.mark.parametrize("digits", [501, 4200, 5000, 100_000])
def test_a_number_of_hundreds_of_digits_is_not_read(client: TestClient, digits: int, encoding: str) -> None:
    number = "7" * digits
    for path, body in (
        ("/segment", f'{{"image": "data:;base64,AAAA", "scales": [-{number}]}}'),
        ("/hf", f'{{"inputs": "AAAA", "parameters": {{"scales": [-{number}]}}}}'),
        ("/v2/models/tiny/infer", f'{{"inputs": [{number}]}}'),
    ):
        answer = client.post(path, content=body.encode(encoding), headers={"Content-Type": "application/json"})
        assert answer.status_code == 400
        assert "a number in the JSON has too many digits" in answer.text


@pytest.mark.parametrize("charset", ["undefined", "idna", "punycode", "utf-7", "zlib"])
def test_only_usual_charsets_of_forms_are_read(client: TestClient, charset: str) -> None:
    body = b'--b\r\nContent-Disposition: form-data; name="image"; filename="+2AA-"\r\n\r\nx\r\n--b--\r\n'
    headers = {"Content-Type": f"multipart/form-data; boundary=b; charset={charset}"}
    for path in ("/segment", "/segment/batch", "/hf"):
        answer = client.post(path, content=body, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported")


@pytest.mark.parametrize("headers", [{}, {"Content-Type": "application/json"}, {"Content-Type": "multipart/form-data"}])
def test_a_batch_that_is_no_form(client: TestClient, headers: dict[str, str]) -> None:
    answer = client.post("/segment/batch", content=b"{}", headers=headers)
    assert answer.status_code == 400
    assert "form" in answer.json()["error"]["message"]


def test_uploads_never_touch_a_disk(
    client: TestClient, noise: np.ndarray, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "read-only"))
    picture = encoded(noise)
    assert len(picture) > 2 * 2**20
    assert client.post("/segment", files={"image": ("a.png", picture)}).status_code == 200


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (1000, 1000, 3), np.uint8)


def test_the_host_header_opens_no_door(client_with: Callable[..., TestClient]) -> None:
    client = client_with(api_keys=(SecretStr("k"),))
    assert client.get("/classes", headers={"Host": "a/livez?x="}).status_code == 401
    assert client.get("/classes", headers={"Host": "[", "X-API-Key": "k"}).status_code == 200

    async def in_absolute_form(scope: Scope, receive: Receive, send: Send) -> None:
        await client.app({**scope, "path": "http://livez" + scope["path"]}, receive, send)

    assert TestClient(in_absolute_form).get("/classes").status_code == 401
    assert TestClient(in_absolute_form).get("/classes", headers={"X-API-Key": "k"}).status_code == 200


# ---- time


def test_decoding_ends_when_its_time_is_over(monkeypatch: pytest.MonkeyPatch, quadrants: np.ndarray) -> None:
    assert images.DECODE_SECONDS == 10, "as README says"
    monkeypatch.setattr(images, "DECODE_SECONDS", -1.0)
    with pytest.raises(InputError, match="to decode") as refused:
        decode(encoded(quadrants), max_bytes=10**6, max_pixels=10**6)
    assert refused.value.code == "unsupported"


def test_a_file_whose_header_takes_long_holds_nobody_up(
    client_with: Callable[..., TestClient], quadrants: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, go_on = threading.Event(), threading.Event()
    read_size = pipeline.read_size

    def slow(data: bytes, **limits: Any) -> tuple[int, int]:
        entered.set()
        assert go_on.wait(WAIT)
        return read_size(data, **limits)

    monkeypatch.setattr(pipeline, "read_size", slow)
    with client_with() as client, ThreadPoolExecutor(1) as pool:  # `with`: one event loop for all requests
        answer = pool.submit(client.post, "/segment", content=encoded(quadrants))
        assert entered.wait(WAIT)
        assert client.get("/livez").status_code == 200
        assert not answer.done()
        go_on.set()
        assert answer.result(WAIT).status_code == 200


def test_long_json_holds_nobody_up(
    client_with: Callable[..., TestClient], noise: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, go_on = threading.Event(), threading.Event()
    load_json = upload.load_json

    def slow(text: bytes, **hooks: Any) -> Any:
        entered.set()
        assert go_on.wait(WAIT)
        return load_json(text, **hooks)

    monkeypatch.setattr(upload, "load_json", slow)
    body = {"image": "data:;base64," + base64.b64encode(encoded(noise)).decode()}
    with client_with() as client, ThreadPoolExecutor(1) as pool:  # `with`: one event loop for all requests
        answer = pool.submit(client.post, "/segment", json=body)
        assert entered.wait(WAIT)
        try:
            assert client.get("/livez").status_code == 200
            assert not answer.done()
        finally:
            go_on.set()
        assert answer.result(WAIT).status_code == 200


def test_work_in_the_pool_is_not_waited_for_beyond_the_deadline() -> None:
    go_on = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        try:
            with pytest.raises(Refusal) as refused:
                asyncio.run(in_pool(pool, lambda: go_on.wait(WAIT), time.monotonic() + 0.05))
        finally:
            go_on.set()
    assert refused.value.code == "deadline_passed"


def test_windows_are_limited_even_in_an_empty_house(client_with: Callable[..., TestClient]) -> None:
    client = client_with(max_queue_pixels=1_000_000)
    picture = encoded(np.zeros((400, 400, 3), np.uint8))
    for query in ("window=32&stride=4", "window=32&stride=4&dry_run=true"):
        answer = client.post(f"/segment?{query}", content=picture)
        assert (answer.status_code, answer.json()["error"]["code"]) == (422, "invalid_option")
        assert "windows of 32 pixels" in answer.json()["error"]["message"]
    assert client.post("/segment?window=256", content=picture).status_code == 200
    assert json.loads(client.post("/segment?window=300&dry_run=true", content=picture).content)["pixels"] <= 1_000_000
