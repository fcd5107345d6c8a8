"""Promise: every option and every way of sending a picture does over HTTP exactly what the library does."""

import base64
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import numpy as np
import pytest
from mask_readers import parts_of, read_mask
from PIL import Image
from starlette.testclient import TestClient
from tiny_model import CLASSES, encoded

from service import upload
from service.engine import Engine
from service.errors import InputError
from service.fetch import fetch, is_public
from service.formats import FORMATS
from service.presence import presence_rows

LABELLED = [name for name, known in FORMATS.items() if known.carries_labels]


@pytest.fixture(scope="module")
def noisy() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 255, (70, 95, 3), np.uint8)


# ---- formats


@pytest.mark.parametrize("format", LABELLED)
@pytest.mark.parametrize("options", [{}, {"scales": "0.5,1", "flip": "true"}, {"window": "40", "stride": "25"}])
def test_every_format_carries_the_engines_mask(
    client: TestClient, engine: Engine, noisy: np.ndarray, format: str, options: dict[str, str]
) -> None:
    answer = client.post("/segment", params={"format": format, **options}, content=encoded(noisy))
    assert answer.status_code == 200, answer.text
    scales = tuple(float(scale) for scale in options["scales"].split(",")) if "scales" in options else None
    window, stride = (int(options[name]) if name in options else None for name in ("window", "stride"))
    direct = engine.segment(noisy, scales, options.get("flip") == "true", window=window, stride=stride)
    mask = read_mask(format, answer.content, answer.headers["content-type"], noisy.shape[:2], np.uint8)
    np.testing.assert_array_equal(mask, direct.mask)
    assert answer.headers["content-type"].partition(";")[0] == FORMATS[format].media_types[0]  # type: ignore[index]
    assert "server-timing" in answer.headers


def test_overlay_is_the_picture_in_colours(client: TestClient, quadrants: np.ndarray) -> None:
    answer = client.post("/segment?format=overlay", content=encoded(quadrants), headers={"Accept": "image/png"})
    shown = np.asarray(Image.open(io.BytesIO(answer.content)))
    np.testing.assert_array_equal(shown, quadrants)  # the tiny model's colours are those of the picture
    assert client.post("/segment?format=overlay", content=encoded(quadrants)).headers["content-type"] == "image/jpeg"


@pytest.mark.parametrize("format", FORMATS)
def test_a_picture_longer_than_a_jpeg_can_be(client: TestClient, format: str) -> None:
    content = encoded(np.zeros((1, 70_000, 3), np.uint8))
    answer = client.post("/segment", params={"format": format}, content=content)
    if format != "overlay":
        assert answer.status_code == 200, answer.text
        return
    assert answer.status_code == 415
    assert "70000 x 1" in answer.json()["error"]["message"]
    answer = client.post("/segment?format=overlay", content=content, headers={"Accept": "image/png"})
    assert Image.open(io.BytesIO(answer.content)).size == (70_000, 1)


def test_npz_has_the_probabilities_that_the_mask_is_the_largest_of(
    client: TestClient, engine: Engine, noisy: np.ndarray
) -> None:
    answer = client.post("/segment?format=npz", content=encoded(noisy))
    direct = engine.segment(noisy, probabilities=True)
    assert direct.probabilities is not None
    with np.load(io.BytesIO(answer.content), allow_pickle=False) as arrays:
        np.testing.assert_array_equal(arrays["probabilities"], direct.probabilities.astype(np.float16))
        np.testing.assert_array_equal(arrays["presence"], direct.presence)
        assert list(arrays["classes"]) == CLASSES
    np.testing.assert_array_equal(direct.probabilities.argmax(0), direct.mask)


def test_polygons_and_multipart_say_what_json_says(client: TestClient, quadrants: np.ndarray) -> None:
    picture = encoded(quadrants)
    plain = client.post("/segment", content=picture, headers={"X-Request-ID": "a"}).json()
    outlines = client.post("/segment?format=polygons", content=picture, headers={"X-Request-ID": "a"}).json()
    parts = client.post("/segment?format=multipart", content=picture, headers={"X-Request-ID": "a"})
    (kind, first), _ = parts_of(parts.content, parts.headers["content-type"])
    attached = json.loads(first)
    assert kind == "application/json"
    for name in ("id", "model", "image", "scales", "flip", "presence"):
        assert plain[name] == outlines[name] == attached[name]
    assert attached["mask"] == {"width": 40, "height": 30, "format": "attached"}


def test_what_cannot_be_had_is_406(client: TestClient, quadrants: np.ndarray) -> None:
    answer = client.post("/segment", content=encoded(quadrants), headers={"Accept": "text/html"})
    assert answer.status_code == 406
    assert "image/png" in answer.json()["error"]["message"]


# ---- options


def test_windows_cover_the_picture_and_average_where_they_meet(engine: Engine) -> None:
    image = np.random.default_rng(2).integers(0, 255, (50, 64, 3), np.uint8)
    answer = engine.segment(image, window=32, stride=18, probabilities=True)
    total, visits = np.zeros((4, 50, 64), np.float32), np.zeros((50, 64), np.float32)
    scores = []
    for top in (0, 18):
        for left in (0, 18, 32):
            part = engine.segment(image[top : top + 32, left : left + 32], probabilities=True)
            assert part.probabilities is not None
            total[:, top : top + 32, left : left + 32] += part.probabilities
            visits[top : top + 32, left : left + 32] += 1
            scores.append(part.presence)
    assert visits.min() == 1
    np.testing.assert_array_equal(answer.presence, np.max(scores, 0), "each class's highest among the windows")
    assert len(set(np.argmax(scores, 0).tolist())) > 1
    np.testing.assert_allclose(answer.probabilities, total / visits, rtol=1e-6)
    np.testing.assert_array_equal(answer.mask, total.argmax(0))


def test_windows_step_by_two_thirds_where_no_stride_is_given(engine: Engine) -> None:
    assert [engine.plan(window=window).stride for window in (32, 33, 34, 1)] == [22, 22, 23, 1]


def test_a_window_larger_than_the_picture_changes_nothing(engine: Engine, noisy: np.ndarray) -> None:
    plain, windowed = engine.segment(noisy), engine.segment(noisy, window=500)
    np.testing.assert_array_equal(plain.mask, windowed.mask)
    np.testing.assert_array_equal(plain.presence, windowed.presence)


def test_max_side_reduces_the_picture_and_says_so(client: TestClient, noisy: np.ndarray) -> None:
    answer = client.post("/segment?max_side=50", content=encoded(noisy)).json()
    assert (answer["image"]["width"], answer["image"]["height"]) == (95, 70)
    assert (answer["mask"]["width"], answer["mask"]["height"]) == (50, 37)
    mask = np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["mask"]["data"]))))
    assert mask.shape == (37, 50)
    larger = client.post("/segment?max_side=5000", content=encoded(noisy)).json()
    assert (larger["mask"]["width"], larger["mask"]["height"]) == (95, 70)


@pytest.mark.parametrize("format", LABELLED)
@pytest.mark.parametrize("asked", ["red,blue", "1,3", "blue,1"])
def test_classes_keeps_those_and_nothing_else(
    client: TestClient, quadrants: np.ndarray, quadrants_mask: np.ndarray, format: str, asked: str
) -> None:
    answer = client.post("/segment", params={"classes": asked, "format": format}, content=encoded(quadrants))
    mask = read_mask(format, answer.content, answer.headers["content-type"], (30, 40), np.uint8)
    np.testing.assert_array_equal(mask, np.where(np.isin(quadrants_mask, (1, 3)), quadrants_mask, 255))
    if format == "json":
        assert {row["class"]: row["pixels"] for row in answer.json()["presence"]} == {"red": 300, "blue": 300}


def test_a_class_is_present_from_the_threshold_on() -> None:
    scores = np.array([0.5, np.nextafter(np.float32(0.5), np.float32(0))], np.float32)
    rows = presence_rows(np.zeros((2, 2), np.uint8), scores, ("road", "sky"), 0.5)
    assert [(row["class"], row["present"]) for row in rows] == [("road", True), ("sky", False)]


def test_threshold_is_the_requests_own(client: TestClient, quadrants: np.ndarray) -> None:
    rows = client.post("/segment?threshold=1", content=encoded(quadrants)).json()["presence"]
    assert not any(row["present"] for row in rows if row["score"] < 1)
    rows = client.post("/segment?threshold=0", content=encoded(quadrants)).json()["presence"]
    assert all(row["present"] for row in rows)


@pytest.mark.parametrize(
    ("query", "part"),
    [
        ("classes=green,sheep", "no class 'sheep'"),
        ("threshold=2", "at most 1"),
        ("threshold=warm", "must be a number"),
        ("max_side=0", "at least 1"),
        ("max_side=1.5", "whole number"),
        ("stride=20", "stride needs window"),
        ("window=64&stride=70", "from 8"),
        ("window=64&stride=1", "from 8"),
        ("window=3", "at least 32"),
        ("timeout_ms=999999999", "at most 300000"),
        ("format=gif", "'json', 'png'"),
        ("dry_run=maybe", "true or false"),
    ],
)
def test_an_option_at_fault_is_a_sentence(client: TestClient, quadrants: np.ndarray, query: str, part: str) -> None:
    answer = client.post(f"/segment?{query}", content=encoded(quadrants))
    assert answer.status_code == 422
    assert answer.json()["error"]["code"] == "invalid_option"
    assert part in answer.json()["error"]["message"]


# ---- JSON bodies


def data_uri(image: np.ndarray) -> str:
    return "data:image/png;base64," + base64.b64encode(encoded(image)).decode()


def test_json_bodies_carry_picture_and_options(client: TestClient, engine: Engine, noisy: np.ndarray) -> None:
    body = {"image": data_uri(noisy), "scales": [0.5, 1], "flip": True, "classes": ["red", "green"], "max_side": None}
    answer = client.post("/segment", json=body).json()
    assert answer["scales"] == [0.5, 1.0]
    assert answer["flip"] is True
    assert {row["class"] for row in answer["presence"]} == {"red", "green"}
    direct = engine.segment(noisy, (0.5, 1.0), True).mask
    mask = np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["mask"]["data"]))))
    np.testing.assert_array_equal(mask, np.where(np.isin(direct, (1, 2)), direct, 255))


def test_base64_with_line_breaks_as_a_shell_writes_it(client: TestClient, noisy: np.ndarray) -> None:
    broken = "data:image/png;base64,\n" + base64.encodebytes(encoded(noisy)).decode().replace("\n", "\r\n")
    answers = [client.post("/segment", json={"image": text}).json() for text in (broken, data_uri(noisy))]
    assert answers[0]["mask"] == answers[1]["mask"]


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"{", 400, "invalid_body"),
        (b"\xff", 400, "invalid_body"),
        (b"[1]", 400, "invalid_body"),
        (b"[" * 100_000, 400, "invalid_body"),
        (b"{}", 400, "missing_image"),
        (b'{"image": 5}', 400, "missing_image"),
        (b'{"image": "hello"}', 400, "missing_image"),
        (b'{"image": "data:image/png;base64,!!!!"}', 400, "invalid_body"),
        (b'{"image": "data:image/png;base64,"}', 400, "empty"),
        (b'{"image": "data:image/png;base64,aGVsbG8="}', 415, "not_an_image"),
        (b'{"image": "data:image/png;base64,iVBO\nRw0="}', 400, "invalid_body"),
        (b'{"image": "data:image/png;base64,iVBO Rw0"}', 400, "invalid_body"),
        (b'{"image": "data:image/png;base64,AA==AAAA"}', 400, "invalid_body"),
        (b'{"image": "data:image/png;base64,iV\xff\xff"}', 400, "invalid_body"),
        (b'{"image": "data:;base64,aGVsbG8=", "scales": {}}', 422, "invalid_option"),
        (b'{"image": "data:;base64,aGVsbG8=", "sclaes": 1}', 422, "unknown_option"),
        (b'{"image": {"url": "https://example.com/a.png"}}', 403, "url_input_off"),
    ],
)
def test_a_json_body_at_fault_is_a_sentence(client: TestClient, body: bytes, status: int, code: str) -> None:
    answer = client.post("/segment", content=body, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


def _json_answer(client: TestClient, body: bytes) -> Any:
    return client.post("/segment", content=body, headers={"Content-Type": "application/json"})


@pytest.mark.parametrize(
    ("members", "part"),
    [
        ('"flip": true, "flip": false', "option flip is given twice: 'True' and 'False'"),
        ('"scales": [1], "scales": [0.5]', "option scales"),
        ('"image": "data:;base64,AAAA"', "image is given twice"),
        ('"im\\u0061ge": {"url": "https://example.com/a.png"}', "image is given twice"),
    ],
)
def test_json_may_not_contradict_itself(client: TestClient, quadrants: np.ndarray, members: str, part: str) -> None:
    answer = _json_answer(client, f'{{"image": "{data_uri(quadrants)}", {members}}}'.encode())
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "contradicting_options")
    assert part in answer.json()["error"]["message"]


def test_json_may_say_the_same_twice(client: TestClient, quadrants: np.ndarray) -> None:
    uri = data_uri(quadrants)
    body = f'{{"image": "{uri}", "image": null, "image": "{uri}", "flip": true, "flip": "true", "scales": null}}'
    answer = _json_answer(client, body.encode())
    assert answer.status_code == 200
    assert answer.json()["flip"] is True


@pytest.mark.parametrize(
    "body",
    [
        '{"image": "URI"}',
        '{"flip": true, "image" :\n"URI", "scales": [0.5, 1]}',
        '{"image": "URI", "model": "\\u0061"}',
        '{"image": "URI", "classes": "image"}',
        '{"image": "URI", "note": {"image": "URI"}}',
        '{"note": {"image": "URI"}}',
        '{"note": "URI", "image": "data:;base64,"}',
        '{"image": "URI", "image": "URI"}',
        '{"image": "URI',
        '{"image": "URI"',
        '["image": "URI"]',
        '"URI"',
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_json_without_its_picture_says_what_the_whole_says(
    quadrants: np.ndarray, body: str, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = body.replace("URI", data_uri(quadrants)).encode(encoding)

    def outcome() -> Any:
        try:
            return upload.described(sent, [("flip", "true")])
        except InputError as error:
            return error.code, error.message

    apart = outcome()
    monkeypatch.setattr(upload, "_taken_apart", lambda body, name: (body, None))
    assert apart == outcome()


def test_the_picture_in_json_is_walked_once(quadrants: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    walked = []
    load = upload.load_json
    monkeypatch.setattr(upload, "load_json", lambda text, **hooks: walked.append(len(text)) or load(text, **hooks))
    body = json.dumps({"image": data_uri(quadrants), "flip": True}).encode()
    assert upload.described(body, []).picture == encoded(quadrants)
    assert walked == [len('{"image": "data:image/png;base64,", "flip": true}')]


@pytest.mark.parametrize("piece", [1, 4, 5, 1000])
def test_base64_in_pieces_is_base64(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "_BASE64_PIECE", piece)
    good = [base64.b64encode(bytes(range(200, 200 + count))) for count in range(12)]
    good += [b"A A A A", b" ", b"AAAA AA = = ", b"AA==\n", b"AA\n=="]
    for text in good:
        assert upload._decoded(b"xy" + text + b"z", 2, 2 + len(text), " \n") == base64.b64decode(text), text
    bad = [b"A", b"AA", b"AAA", b"AA=", b"AA==AAAA", b"AAA=AAA=", b"=", b"====", b"AAAA=", b"AAAA====", b"AA=A"]
    for text in [*bad, b"AA-_", b"AA==A", b"\xff\xff\xff\xff", b"AAAA\x0b"]:
        with pytest.raises(ValueError):
            upload._decoded(b"xy" + text + b"z", 2, 2 + len(text), " \n")


# ---- batches


def test_a_batch_answers_each_picture_and_a_bad_one_fails_alone(
    client: TestClient, engine: Engine, noisy: np.ndarray, quadrants: np.ndarray
) -> None:
    good = [encoded(noisy), encoded(quadrants)]
    files = [("image", ("a.png", good[0])), ("image", ("b.png", good[0][:50])), ("image", ("c.png", good[1]))]
    answer = client.post("/segment/batch", files=files, data={"scales": "0.5"})
    assert answer.status_code == 200
    first, second, third = answer.json()["items"]
    assert [item["name"] for item in (first, second, third)] == ["a.png", "b.png", "c.png"]
    assert second["answer"] is None
    assert second["error"]["code"] == "truncated"
    for item, image in ((first, noisy), (third, quadrants)):
        assert item["error"] is None
        mask = np.asarray(Image.open(io.BytesIO(base64.b64decode(item["answer"]["mask"]["data"]))))
        np.testing.assert_array_equal(mask, engine.segment(image, (0.5,)).mask)
    assert 'encnet_batch_faults_total{reason="truncated"} 1.0' in client.get("/metrics").text


def test_a_batch_as_a_whole_can_be_at_fault(client_with: Callable[..., TestClient], quadrants: np.ndarray) -> None:
    client = client_with(max_items=2)
    files = [("image", ("a.png", encoded(quadrants)))]
    for answer, code in (
        (client.post("/segment/batch", files=files * 3), "several_images"),
        (client.post("/segment/batch", files=files, data={"format": "png"}), "invalid_option"),
        (client.post("/segment/batch", files=files, data={"classes": "sheep"}), "invalid_option"),
        (client.post("/segment/batch", files={"other": b"x"}), "unknown_option"),
    ):
        assert 400 <= answer.status_code < 500
        assert answer.json()["error"]["code"] == code


# ---- pictures by URL

DRIPS = {  # what comes at once before one byte after another
    "/drip/status": b"HTTP/1.1 2",
    "/drip/header": b"HTTP/1.1 200 OK\r\nX: ",
    "/drip/chunk-size": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
    "/drip/chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfff\r\n",
    "/drip/body": b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n",
}


class Host(BaseHTTPRequestHandler):
    """A picture host: /picture, /part of it, /moved, /slow, /endless, /empty, /drip/... and 404.

    `names` are those that it was asked by.
    """

    picture = b""
    names: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.names.append(self.headers["Host"])
        if self.path in ("/picture?a=1", "/part"):
            self.send_response(206 if self.path == "/part" else 200)
            self.send_header("Content-Length", str(len(self.picture)))
            self.end_headers()
            self.wfile.write(self.picture)
        elif self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/picture")
            self.end_headers()
        elif self.path == "/slow":
            self.send_response(200)
            self.end_headers()
            for _ in range(100):
                self.wfile.write(b"x")
                self.wfile.flush()
                threading.Event().wait(0.05)
        elif self.path in DRIPS:
            with suppress(OSError):
                self.wfile.write(DRIPS[self.path])
                for _ in range(30):
                    self.wfile.write(b"1")
                    threading.Event().wait(0.1)
        elif self.path == "/empty":
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif self.path == "/endless":
            self.send_response(200)
            self.end_headers()
            for _ in range(1000):
                self.wfile.write(b"x" * 65536)
        else:
            self.send_error(404)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def host() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Host)
    server.handle_error = lambda *args: None  # type: ignore[method-assign]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://pictures.example:{server.server_port}"
    server.shutdown()
    server.server_close()


def local(url: str, **options: Any) -> bytes:
    """`fetch` that takes the test's own host for a public one."""
    options = {"max_bytes": 1_000_000, "timeout_s": 5.0, **options}
    return fetch(url, resolver=lambda host, port: ["127.0.0.1"], allowed=lambda address: True, **options)


def test_a_picture_is_fetched(host: str, quadrants: np.ndarray) -> None:
    Host.picture = encoded(quadrants)
    assert local(f"{host}/picture?a=1") == Host.picture
    assert host == f"http://{Host.names[-1]}"
    assert local(f"{host}/picture?a=1", max_bytes=len(Host.picture)) == Host.picture
    with pytest.raises(InputError) as refused:
        local(f"{host}/picture?a=1", max_bytes=len(Host.picture) - 1)
    assert refused.value.code == "too_many_bytes"


def test_over_https_the_hosts_name_is_checked_and_the_connection_closed(
    host: str, quadrants: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    secured: list[tuple[socket.socket, str]] = []

    class Context:
        """Takes over a connection as ssl's own does, but leaves the encryption out."""

        def wrap_socket(self, plain: socket.socket, server_hostname: str) -> socket.socket:
            secured.append((socket.socket(fileno=plain.detach()), server_hostname))
            return secured[-1][0]

    monkeypatch.setattr("ssl.create_default_context", Context)
    Host.picture = encoded(quadrants)
    assert local(f"{host.replace('http', 'https')}/picture?a=1") == Host.picture
    ((connection, name),) = secured
    assert (connection.fileno(), name) == (-1, "pictures.example")


@pytest.mark.parametrize(
    ("path", "code", "part"),
    [
        ("/moved", "url_failed", "302"),
        ("/part", "url_failed", "206"),
        ("/nothing", "url_failed", "404"),
        ("/slow", "url_failed", "too long"),
        ("/endless", "too_many_bytes", "larger"),
        ("/empty", "url_failed", "empty"),
    ],
)
def test_what_a_host_does_wrong_is_a_sentence(host: str, path: str, code: str, part: str) -> None:
    with pytest.raises(InputError) as refused:
        local(f"{host}{path}", timeout_s=0.4 if path == "/slow" else 10.0)
    assert refused.value.code == code
    assert part in refused.value.message


@pytest.mark.parametrize("path", DRIPS)
def test_the_time_is_for_the_whole_fetch_however_slowly_the_host_sends(host: str, path: str) -> None:
    started = time.monotonic()
    with pytest.raises(InputError, match="too long"):
        local(f"{host}{path}", timeout_s=0.5)
    assert time.monotonic() - started < 2


@pytest.mark.parametrize(
    "url",
    [
        "ftp://example.com/a",
        "file:///etc/passwd",
        "http://",
        "//example.com/a",
        "http://user:pw@example.com/",
        "http://@example.com/",
        "http://example.com/a b",
        "http://example.com/\u00e4",
        "http://[x/",
    ]
    + ["http://a b/", "http://example.com/\r\nX: y", "http://example.com:99999/"],
)
def test_a_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(InputError) as refused:
        fetch(url, max_bytes=1, timeout_s=1, resolver=lambda host, port: ["8.8.8.8"])
    assert refused.value.code == "url_refused"


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0", "100.64.0.1", "224.0.0.1"]
    + [
        "::1",
        "fe80::1%eth0",
        "fc00::1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "2002:7f00:1::",
        "64:ff9b:1::1",
        "64:ff9b::7f00:1",
        "fec0::1",
        "::7f00:1",
        "::ffff:0:127.0.0.1",
        "2001:0:4136:e378:8000:63bf:80ff:fffe",
        "4000::1",
        "ff0e::1",
    ],
)
def test_private_addresses_are_not_public(address: str) -> None:
    assert not is_public(address)
    with pytest.raises(InputError) as refused:
        fetch("http://example.com/", max_bytes=1, timeout_s=1, resolver=lambda host, port: ["8.8.8.8", address])
    assert refused.value.code == "url_refused"


def test_a_host_without_an_address_is_refused() -> None:
    with pytest.raises(InputError) as refused:
        fetch("http://example.com/", max_bytes=1, timeout_s=1, resolver=lambda host, port: [])
    assert refused.value.code == "url_refused"


@pytest.mark.parametrize(
    ("url", "port"), [("http://a.example/x", 80), ("https://a.example/x", 443), ("http://a.example:8080/x", 8080)]
)
def test_the_port_is_the_urls_or_its_schemes(url: str, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    connected = []

    def refuse(address: tuple[str, int], **options: Any) -> None:
        connected.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "create_connection", refuse)
    with pytest.raises(InputError) as failed:
        fetch(url, max_bytes=1, timeout_s=1, resolver=lambda host, port: ["8.8.8.8", "1.1.1.1"])
    assert (failed.value.code, connected) == ("url_failed", [("8.8.8.8", port)])


def test_public_addresses_are() -> None:
    assert is_public("8.8.8.8")
    assert is_public("2606:4700:4700::1111")
    assert is_public("64:ff9b::808:808")  # 8.8.8.8, as the name servers of networks without IPv4 give it
    for carrier in ("::ffff:8.8.8.8", "2002:808:808::", "2001:0:4136:e378:8000:63bf:f7f7:f7f7"):
        assert is_public(carrier), "counts as the 8.8.8.8 that it carries"


def test_the_address_that_was_checked_is_the_one_connected_to(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([["127.0.0.1"], ["10.0.0.1"]])
    connected = []
    connect = socket.create_connection

    def recording(address: tuple[str, int], *args: Any, **options: Any) -> socket.socket:
        connected.append(address[0])
        return connect(address, *args, **options)

    monkeypatch.setattr(socket, "create_connection", recording)
    fetch(
        f"{host}/picture?a=1",
        max_bytes=1_000_000,
        timeout_s=60,
        resolver=lambda host, port: next(answers),
        allowed=lambda address: address == "127.0.0.1",
    )
    assert connected == ["127.0.0.1"]


def test_the_time_is_for_the_look_up_of_the_hosts_name_too(
    client_with: Callable[..., TestClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = threading.Event()

    def look_up(*arguments: Any, **options: Any) -> list[Any]:
        assert found.wait(60)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    body = {"image": {"url": "https://pictures.example/a.png"}}
    with client_with(allow_urls=True, url_timeout_ms=100, timeout_ms=10_000) as client:
        try:
            answer, late = client.post("/segment", json=body), client.post("/segment?timeout_ms=1", json=body)
        finally:
            found.set()
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "url_failed")
    assert "could not be fetched: it took too long" in answer.json()["error"]["message"]
    assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_passed")


def test_a_service_that_allows_urls_still_refuses_its_own_network(
    client_with: Callable[..., TestClient], host: str
) -> None:
    port = host.rpartition(":")[2]
    client = client_with(allow_urls=True)
    answer = client.post("/segment", json={"image": {"url": f"http://127.0.0.1:{port}/picture?a=1"}})
    assert answer.status_code == 422
    assert answer.json()["error"]["code"] == "url_refused"


def test_a_picture_by_url_is_segmented_and_its_bytes_count_as_held(
    client_with: Callable[..., TestClient], quadrants: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = encoded(quadrants)
    monkeypatch.setattr("service.segment_routes.fetch", lambda url, **limits: picture)
    body = {"image": {"url": "https://pictures.example/picture"}}
    client = client_with(allow_urls=True)
    direct = client.post("/segment", content=picture).json()
    assert client.post("/segment", json=body).json()["mask"] == direct["mask"]
    refused = client_with(allow_urls=True, max_buffered_bytes=len(picture)).post("/segment", json=body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (413, "too_many_bytes")
