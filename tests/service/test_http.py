"""Promise: the HTTP face answers as documented, bit for bit what the engine says, and tells in JSON what is wrong."""

import asyncio
import base64
import gzip
import io
import json
import re
import threading
import tomllib
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient
from tiny_model import CLASSES, PALETTE, encoded

import service
from service.engine import Engine
from service.errors import STATUS_OF_CODE
from service.options import Options
from service.upload import _from_boundary


def mask_of(answer: dict[str, Any]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["mask"]["data"]))))


def assert_error(response: httpx.Response, status: int, code: str) -> str:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    (body,) = response.json().values()
    assert set(body) == {"code", "message", "request_id"}
    assert body["code"] == code
    assert body["request_id"] == response.headers["x-request-id"]
    assert "Traceback" not in response.text
    return body["message"]


@pytest.fixture
def png(quadrants: np.ndarray) -> bytes:
    return encoded(quadrants)


# ---- the answer


def test_answer_is_bit_identical_to_the_engine(client: TestClient, engine: Engine, png: bytes) -> None:
    noisy = np.random.default_rng(1).integers(0, 255, (33, 47, 3), np.uint8)
    form = {"scales": "0.5,1", "flip": "true"}
    answer = client.post("/segment", files={"image": encoded(noisy)}, data=form).json()
    direct = engine.segment(noisy, (0.5, 1.0), True)
    np.testing.assert_array_equal(mask_of(answer), direct.mask)
    scores = np.empty(len(CLASSES), np.float32)
    for row in answer["presence"]:
        scores[row["id"]] = row["score"]
    np.testing.assert_array_equal(scores, direct.presence)


def test_answer_has_every_documented_part(client: TestClient, engine: Engine, png: bytes) -> None:
    response = client.post("/segment", files={"image": ("q.png", png)})
    assert response.status_code == 200
    answer = response.json()
    assert set(answer) == {"id", "model", "image", "scales", "flip", "mask", "presence", "cost", "timing_ms"}
    assert answer["id"] == response.headers["x-request-id"]
    assert answer["model"] == {"name": "encnet-tiny", "sha256": engine.sha256}
    assert answer["image"] == {"width": 40, "height": 30, "exif_applied": False, "mode": "RGB"}
    assert answer["scales"] == [1.0]
    assert answer["flip"] is False
    assert answer["mask"]["format"] == "png"
    assert answer["mask"]["encoding"] == "base64"
    assert (answer["mask"]["width"], answer["mask"]["height"]) == (40, 30)
    assert str(answer["cost"]["pixels"]) == response.headers["x-cost-pixels"]
    assert set(answer["timing_ms"]) == {"decode", "queue", "infer", "encode", "total"}
    phases = {phase: ms for phase, ms in answer["timing_ms"].items() if phase != "total"}
    assert all(ms >= 0 for ms in phases.values())
    assert sum(phases.values()) <= answer["timing_ms"]["total"]
    named = [entry.split(";dur=")[0] for entry in response.headers["server-timing"].split(", ")]
    assert named == ["decode", "queue", "infer", "encode", "total"]


def test_presence_has_score_and_area_of_every_class(client_with: Callable[..., TestClient]) -> None:
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[0] = 255, 0, 0
    rows = client_with(threshold=0.9).post("/segment", content=encoded(pixels)).json()["presence"]
    assert [row["score"] for row in rows] == sorted((row["score"] for row in rows), reverse=True)
    by_name = {row["class"]: row for row in rows}
    assert set(by_name) == set(CLASSES)
    assert {name: row["pixels"] for name, row in by_name.items()} == {"black": 12, "red": 4, "green": 0, "blue": 0}
    assert by_name["black"]["fraction"] == 0.75
    assert {name for name, row in by_name.items() if row["present"]} == {"black", "red"}
    assert by_name["green"]["score"] == pytest.approx(0.5)


@pytest.mark.parametrize("field", ["image", "file"])
def test_multipart_field_names(client: TestClient, png: bytes, quadrants_mask: np.ndarray, field: str) -> None:
    answer = client.post("/segment", files={field: ("q.png", png)}).json()
    np.testing.assert_array_equal(mask_of(answer), quadrants_mask)


@pytest.mark.parametrize(
    "content_type", ["image/png", "application/octet-stream", "application/x-www-form-urlencoded", None]
)
def test_raw_body(client: TestClient, png: bytes, quadrants_mask: np.ndarray, content_type: str | None) -> None:
    headers = {"Content-Type": content_type} if content_type else {}
    answer = client.post("/segment?scales=1&flip=false", content=png, headers=headers).json()
    np.testing.assert_array_equal(mask_of(answer), quadrants_mask)


def test_mask_is_upright_and_at_the_pictures_own_size(
    client: TestClient, quadrants: np.ndarray, quadrants_mask: np.ndarray
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held so that the stored picture has to turn clockwise
    answer = client.post("/segment", content=encoded(np.rot90(quadrants), exif=exif)).json()
    assert answer["image"] == {"width": 40, "height": 30, "exif_applied": True, "mode": "RGB"}
    np.testing.assert_array_equal(mask_of(answer), quadrants_mask)


# ---- formats


def test_png_is_indexed_and_explains_itself(
    client: TestClient, engine: Engine, png: bytes, quadrants_mask: np.ndarray
) -> None:
    response = client.post("/segment?format=png", content=png)
    assert response.headers["content-type"] == "image/png"
    assert "server-timing" in response.headers
    mask = Image.open(io.BytesIO(response.content))
    assert mask.mode == "P"
    np.testing.assert_array_equal(np.asarray(mask), quadrants_mask)
    assert mask.getpalette()[:12] == [channel for colour in PALETTE for channel in colour]
    assert mask.text["model"] == "encnet-tiny"
    assert mask.text["model_sha256"] == engine.sha256
    assert json.loads(mask.text["classes"]) == CLASSES
    assert json.loads(mask.text["palette"]) == PALETTE
    assert {row["class"] for row in json.loads(mask.text["presence"])} == set(CLASSES)


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("image/png", "image/png"),
        ("image/*", "image/png"),
        ("application/json;q=0.5, image/png", "image/png"),
        ("*/*", "application/json"),
        ("application/json", "application/json"),
        ("text/html, */*;q=0.8", "application/json"),
        ("image/png;q=0.1, application/json", "application/json"),
        ("image/png;q=x", "application/json"),
        ("", "application/json"),
    ],
)
def test_accept_chooses_where_format_does_not(client: TestClient, png: bytes, accept: str, kind: str) -> None:
    response = client.post("/segment", content=png, headers={"Accept": accept})
    assert response.headers["content-type"] == kind
    for format, wins in (("png", "image/png"), ("json", "application/json")):
        response = client.post(f"/segment?format={format}", content=png, headers={"Accept": accept})
        assert response.headers["content-type"] == wins


# ---- options


def test_several_accept_lines_are_one(client: TestClient, png: bytes) -> None:
    lines = [("Accept", "text/html"), ("Accept", "application/json;q=0.5"), ("Accept", "image/png")]
    assert client.post("/segment", content=png, headers=lines).headers["content-type"] == "image/png"


def test_options_in_query_and_form_may_agree(client: TestClient, png: bytes) -> None:
    response = client.post("/segment?scales=0.5", files={"image": png}, data={"scales": "0.5", "flip": "true"})
    assert response.json()["scales"] == [0.5]
    assert response.json()["flip"] is True


def test_options_in_query_and_form_may_not_contradict(client: TestClient, png: bytes) -> None:
    response = client.post("/segment?scales=0.5", files={"image": png}, data={"scales": "1"})
    assert "scales" in assert_error(response, 422, "contradicting_options")


@pytest.mark.parametrize("where", ["query", "form"])
def test_unknown_option(client: TestClient, png: bytes, where: str) -> None:
    extra: dict[str, Any] = {"params" if where == "query" else "data": {"sclaes": "1"}}
    message = assert_error(client.post("/segment", files={"image": png}, **extra), 422, "unknown_option")
    assert "sclaes" in message
    assert "scales" in message


def test_option_out_of_range(client: TestClient, png: bytes) -> None:
    message = assert_error(client.post("/segment?scales=7", content=png), 422, "invalid_option")
    assert "0.25 to 3" in message


# ---- pictures at fault


@pytest.mark.parametrize("send", ["raw", "form"])
@pytest.mark.parametrize(
    ("name", "status", "code"),
    [("empty", 400, "empty"), ("text", 415, "not_an_image"), ("cut", 400, "truncated"), ("float", 415, "unsupported")],
)
def test_bad_picture(client: TestClient, png: bytes, send: str, name: str, status: int, code: str) -> None:
    data = {
        "empty": b"",
        "text": b"hello",
        "cut": png[: len(png) // 2],
        "float": encoded(Image.new("F", (4, 4)), "TIFF"),
    }[name]
    body: dict[str, Any] = {"content": data} if send == "raw" else {"files": {"image": ("x.png", data)}}
    assert_error(client.post("/segment", **body), status, code)


@pytest.mark.parametrize("route", ["/segment", "/segment/batch", "/hf"])
def test_a_compressed_body_is_refused_by_its_content_encoding(client: TestClient, png: bytes, route: str) -> None:
    response = client.post(route, content=gzip.compress(png), headers={"Content-Encoding": "gzip"})
    message = assert_error(response, 415, "unsupported")
    assert message == "Content-Encoding 'gzip' is not supported here; send the body without one"
    plain = client.post("/segment", content=png, headers={"Content-Encoding": "identity"})
    assert plain.status_code == 200


def test_the_service_goes_on_after_bad_pictures(client: TestClient, png: bytes) -> None:
    for _ in range(20):
        assert client.post("/segment", content=png[:60]).status_code == 400
    assert client.post("/segment", content=png).status_code == 200


def test_too_many_pixels(client_with: Callable[..., TestClient], png: bytes) -> None:
    assert client_with(max_pixels=1200).post("/segment", content=png).status_code == 200
    message = assert_error(client_with(max_pixels=1199).post("/segment", content=png), 413, "too_many_pixels")
    assert "1199" in message
    assert "40 x 30" in message


@pytest.mark.parametrize("send", ["raw", "form", "stream"])
def test_too_many_bytes(client_with: Callable[..., TestClient], png: bytes, send: str) -> None:
    client = client_with(max_bytes=len(png))
    padded = png + b"\0" * 100_000

    def body(data: bytes) -> dict[str, Any]:
        if send == "form":
            return {"files": {"image": ("x.png", data)}}
        return {"content": data if send == "raw" else iter([data[:10], data[10:]])}

    assert client.post("/segment", **body(png)).status_code == 200
    for data in (png + b"\0", padded):
        message = assert_error(client.post("/segment", **body(data)), 413, "too_many_bytes")
        assert str(len(png)) in message


def test_a_json_body_too_long_for_a_picture_is_not_read(client_with: Callable[..., TestClient]) -> None:
    client = client_with(max_bytes=3000)
    headers = {"Content-Type": "application/json"}
    assert_error(client.post("/segment", content=b"x" * (4000 + 65536), headers=headers), 400, "invalid_body")
    assert_error(client.post("/segment", content=b"x" * (4001 + 65536), headers=headers), 413, "too_many_bytes")


# ---- forms at fault


def test_form_without_a_picture(client: TestClient, png: bytes) -> None:
    boundary = {"Content-Type": "multipart/form-data; boundary=b"}
    assert_error(client.post("/segment", content=b"--b--\r\n", headers=boundary), 400, "missing_image")
    text = b'--b\r\nContent-Disposition: form-data; name="image"\r\n\r\nq.png\r\n--b--\r\n'
    assert "-F image=@" in assert_error(client.post("/segment", content=text, headers=boundary), 400, "missing_image")
    assert_error(client.post("/segment", files={"picture": ("q.png", png)}), 422, "unknown_option")


CLOSED = b"\r\n--b--\r\n"


def _form_of(png: bytes, preamble: bytes = b"", end: bytes = CLOSED) -> dict[str, Any]:
    flip = b'--b\r\nContent-Disposition: form-data; name="flip"\r\n\r\ntrue\r\n'
    file = b'--b\r\nContent-Disposition: form-data; name="image"; filename="q.png"\r\n\r\n'
    return {
        "content": preamble + flip + file + png + end,
        "headers": {"Content-Type": "multipart/form-data; boundary=b"},
    }


@pytest.mark.parametrize("end", [b"", b"\r\n", b"\r\n--b", b"\r\n--b-", b"\r\n--b\r\n", b"\r\n--b\r\nContent-Dispo"])
@pytest.mark.parametrize("route", ["/segment", "/segment/batch", "/hf"])
def test_a_form_without_its_end_is_cut_short(client: TestClient, png: bytes, route: str, end: bytes) -> None:
    message = assert_error(client.post(route, **_form_of(png, end=end)), 400, "invalid_body")
    assert message == "the form ends early: its closing boundary '--b--' is missing"


@pytest.mark.parametrize("end", [CLOSED, b"\r\n--b--", b"\r\n--b--\r\nan epilogue"])
@pytest.mark.parametrize("preamble", [b"\r\n", b"\n", b"of --b two\r\n-lines\r\n", b"x" * 300_000 + b"\r\n"])
def test_a_form_may_have_a_preamble_and_an_epilogue(
    client: TestClient, png: bytes, quadrants_mask: np.ndarray, preamble: bytes, end: bytes
) -> None:
    answer = client.post("/segment", **_form_of(png, preamble, end)).json()
    assert answer["flip"] is True
    np.testing.assert_array_equal(mask_of(answer), quadrants_mask)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 100])
@pytest.mark.parametrize("preamble", [b"", b"\r\n", b"--\n", b"a --bound\r\n-\n--\r\n"])
def test_a_preamble_ends_where_it_does_however_it_is_cut(preamble: bytes, size: int) -> None:
    form = b"--bound\r\nX: y\r\n\r\n1\r\n--bound--\r\n"
    sent = preamble + form

    async def pieces() -> AsyncGenerator[bytes, None]:
        for start in range(0, len(sent), size):
            yield sent[start : start + size]

    async def received() -> bytes:
        return b"".join([piece async for piece in _from_boundary(pieces(), b"--bound")])

    assert asyncio.run(received()) == form


def test_form_with_two_pictures(client: TestClient, png: bytes) -> None:
    response = client.post("/segment", files={"image": ("a.png", png), "file": ("b.png", png)})
    assert_error(response, 400, "several_images")


def test_an_unused_file_field_of_a_browser_is_passed_over(client: TestClient, png: bytes) -> None:
    part = b'--b\r\nContent-Disposition: form-data; name="%s"; filename="%s"\r\nContent-Type: image/png\r\n\r\n%s\r\n'
    body = part % (b"file", b"", b"") + part % (b"image", b"q.png", png) + b"--b--\r\n"
    response = client.post("/segment", content=body, headers={"Content-Type": "multipart/form-data; boundary=b"})
    assert response.status_code == 200


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("multipart/form-data", b"x"),
        ("multipart/form-data; boundary=b", b"no boundary at all"),
        ("multipart/form-data; boundary=b; charset=klingon", b"--b\r\nContent-Disposition: form-data\r\n\r\n\r\n--b--"),
        ("multipart/form-data; boundary=" + "b" * 1000, b"x"),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\nContent-Disposition: form-data; name="scales"\r\n\r\n' + b"1" * 70_000,
        ),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n' * 40 + b"--b--",
        ),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\nab',
        ),
    ],
)
def test_a_form_that_cannot_be_read_is_a_4xx(client: TestClient, content_type: str, body: bytes) -> None:
    response = client.post("/segment", content=body, headers={"Content-Type": content_type})
    assert response.status_code in (400, 415, 422), response.text
    assert_error(response, response.status_code, response.json()["error"]["code"])


# ---- errors of the service itself


def test_unknown_path_and_wrong_method(client: TestClient) -> None:
    assert "/nowhere" in assert_error(client.get("/nowhere"), 404, "not_found")
    assert "/segment/" in assert_error(client.post("/segment/", follow_redirects=False), 404, "not_found")
    response = client.get("/segment")
    assert_error(response, 405, "method_not_allowed")
    assert response.headers["allow"] == "POST"


def test_an_unforeseen_failure_is_json_without_a_traceback(
    client: TestClient, png: bytes, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.segment_routes.presence_rows", None)
    response = client.post("/segment", content=png, headers={"X-Request-ID": "abc-1"})
    assert_error(response, 500, "internal_error")
    assert response.json()["error"]["request_id"] == "abc-1"
    (record,) = (record for record in caplog.records if record.exc_info)
    assert "TypeError" in caplog.text
    assert record.name == "service.middleware"


def test_request_id_is_echoed_where_it_is_decent_and_made_otherwise(client: TestClient) -> None:
    for good in ("mine.42", "x" * 128):
        assert client.get("/healthz", headers={"X-Request-ID": good}).headers["x-request-id"] == good
    for bad in ("a b", "x" * 129, "<script>", ""):
        made = client.get("/healthz", headers={"X-Request-ID": bad}).headers["x-request-id"]
        assert made != bad
        assert len(made) == 32
    assert client.get("/healthz").headers["x-request-id"] != client.get("/healthz").headers["x-request-id"]


# ---- the other pages


def test_healthz(client: TestClient, engine: Engine) -> None:
    answer = client.get("/healthz").json()
    assert answer["status"] == "ok"
    assert answer["device"] == "cpu"
    assert answer["model"]["name"] == "encnet-tiny"
    assert answer["model"]["sha256"] == engine.sha256
    assert answer["model"]["checkpoint_sha256"] == "0" * 64
    pyproject = Path(service.__file__).parents[1] / "pyproject.toml"
    assert answer["version"] == tomllib.loads(pyproject.read_text())["project"]["version"]


def test_classes(client: TestClient) -> None:
    answer = client.get("/classes").json()
    assert answer["model"]["name"] == "encnet-tiny"
    assert [entry["id"] for entry in answer["classes"]] == [0, 1, 2, 3]
    assert [entry["name"] for entry in answer["classes"]] == CLASSES
    assert [entry["color"] for entry in answer["classes"]] == PALETTE


def test_a_blank_model_counts_as_not_given(client: TestClient, png: bytes) -> None:
    for blank in ("", "%20"):
        assert client.get(f"/classes?model={blank}").json() == client.get("/classes").json()
        assert client.post(f"/segment?model={blank}", content=png).status_code == 200


def test_the_docs_are_there(client: TestClient) -> None:
    page = client.get("/docs")
    assert page.status_code == 200
    links = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(links) >= 3
    for link in links:
        assert client.get(link).status_code == 200, "what the page needs comes from here, not from another host"


def test_docs_describe_upload_options_and_errors(client: TestClient) -> None:
    operation = client.get("/openapi.json").json()["paths"]["/segment"]["post"]
    assert {parameter["name"] for parameter in operation["parameters"]} == set(Options.model_fields)
    assert all(parameter["description"] for parameter in operation["parameters"])
    content = operation["requestBody"]["content"]
    assert set(content["multipart/form-data"]["schema"]["properties"]) == {"image", *Options.model_fields}
    assert {"application/octet-stream", "image/jpeg", "application/json"} <= set(content)
    assert {"application/json", "image/png", "image/jpeg"} <= set(operation["responses"]["200"]["content"])
    for code, status in STATUS_OF_CODE.items():
        assert code in operation["responses"][str(status)]["description"]


# ---- the event loop


def test_inference_does_not_block_the_event_loop(client_with: Callable[..., TestClient], png: bytes) -> None:
    begun, go_on, running, most = threading.Event(), threading.Event(), [], []

    class Slow(Engine):
        def run(self, images: Any, plan: Any, *more: Any) -> Any:
            if plan.scales == (1.0,):  # not the warm-up
                running.append(1)
                most.append(len(running))
                begun.set()
                assert go_on.wait(60)
                running.pop()
            return super().run(images, plan, *more)

    with client_with(lambda path, settings: Slow(path, "cpu")) as client, ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(client.post, "/segment", content=png) for _ in range(3)]
        assert begun.wait(60)
        assert client.get("/healthz").status_code == 200
        go_on.set()
        assert [answer.result().status_code for answer in answers] == [200, 200, 200]
    assert max(most) == 1, "the device takes one picture at a time"
