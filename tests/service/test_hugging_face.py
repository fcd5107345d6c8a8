"""Promise: /hf answers Hugging Face's own client, unmodified, with what /segment says."""

import asyncio
import base64
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import HfHubHTTPError
from live import serving
from starlette.testclient import TestClient
from tiny_model import CLASSES, encoded

from service import hugging_face, upload
from service.app import create_app
from service.engine import Engine
from service.hugging_face import _segments
from service.models import Models
from service.settings import Settings

KEY = "a key"


@pytest.fixture(scope="module")
def url(model_file: Path) -> Iterator[str]:
    models = Models(Settings(model=model_file, device="cpu", threads=1, api_keys=[KEY]))
    models.start()
    with serving(create_app(models=models)) as address:
        yield f"{address}/hf"
    models.close()


def mask_of(segment: Any) -> np.ndarray:
    assert segment.mask.mode == "L"
    return np.asarray(segment.mask)


def label_map(segments: list[Any]) -> np.ndarray:
    """The masks put together; every pixel is in one of them, and in one alone."""
    masks = np.array([mask_of(segment) for segment in segments])
    assert set(np.unique(masks)) == {0, 255}
    assert ((masks == 255).sum(0) == 1).all()
    ids = np.array([CLASSES.index(segment.label) for segment in segments])
    return ids[masks.argmax(0)]


def test_its_client_gets_the_engines_label_map(url: str, engine: Engine, tmp_path: Path) -> None:
    pixels = np.random.default_rng(3).integers(0, 255, (33, 47, 3), np.uint8)
    file = tmp_path / "noisy.png"
    file.write_bytes(encoded(pixels))
    client = InferenceClient(url, api_key=KEY)
    segments = client.image_segmentation(file)
    direct = engine.segment(pixels)
    np.testing.assert_array_equal(label_map(segments), direct.mask)
    assert [segment.score for segment in segments] == sorted((segment.score for segment in segments), reverse=True)
    for segment in segments:
        assert segment.score == pytest.approx(direct.presence[CLASSES.index(segment.label)])
    again = asyncio.run(AsyncInferenceClient(url, api_key=KEY).image_segmentation(file, subtask="semantic"))
    np.testing.assert_array_equal(label_map(again), direct.mask)


def test_a_threshold_leaves_out_what_is_not_present(url: str, quadrants: np.ndarray) -> None:
    client = InferenceClient(url, api_key=KEY)
    every = client.image_segmentation(encoded(quadrants))
    assert len(every) == 4
    bar = sorted(segment.score for segment in every)[2]
    some = client.image_segmentation(encoded(quadrants), threshold=bar)
    assert [segment.label for segment in some] == [one.label for one in every if one.score >= bar]


def test_options_of_segment_go_in_the_query(url: str, quadrants: np.ndarray) -> None:
    client = InferenceClient(f"{url}?classes={CLASSES[1]}&max_side=20", api_key=KEY)
    (segment,) = client.image_segmentation(encoded(quadrants))
    assert segment.label == CLASSES[1]
    assert segment.mask.size == (20, 15)


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"subtask": "panoptic"}, "option subtask must be semantic; it was 'panoptic'"),
        ({"mask_threshold": 0.5}, "option mask_threshold is for single things"),
        ({"threshold": 2}, "option threshold must be at most 1"),
    ],
)
def test_its_client_is_told_what_cannot_be(
    url: str, quadrants: np.ndarray, parameters: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(HfHubHTTPError, match=sentence) as caught:
        InferenceClient(url, api_key=KEY).image_segmentation(encoded(quadrants), **parameters)
    assert caught.value.response.status_code == 422


def test_its_client_needs_the_key(url: str, quadrants: np.ndarray) -> None:
    with pytest.raises(HfHubHTTPError, match="401"):
        InferenceClient(url, api_key="another").image_segmentation(encoded(quadrants))


def in_json(**members: Any) -> dict[str, Any]:
    return {"content": json.dumps(members), "headers": {"Content-Type": "application/json"}}


@pytest.mark.parametrize("head", ["", "data:image/png;base64,"])
def test_inputs_may_be_a_data_uri(client: TestClient, quadrants: np.ndarray, head: str) -> None:
    inputs = head + base64.b64encode(encoded(quadrants)).decode()
    answer = client.post("/hf", **in_json(inputs=inputs, parameters={"flip": True}, options={"use_cache": False}))
    assert answer.status_code == 200, answer.text
    assert {entry["label"] for entry in answer.json()} == set(CLASSES)
    assert "server-timing" in answer.headers
    assert int(answer.headers["x-cost-pixels"]) > 0


@pytest.mark.parametrize(
    ("members", "code", "sentence"),
    [
        ({}, "missing_image", "set inputs to the file in base64"),
        ({"inputs": 5}, "missing_image", "set inputs to the file in base64"),
        ({"inputs": "%%"}, "invalid_body", "the base64 in inputs is not valid"),
        ({"inputs": "aGFsbG8="}, "not_an_image", ""),
        ({"inputs": "", "parameters": {}}, "empty", ""),
        ({"inputs": "aGFsbG8=", "parameters": [1]}, "invalid_body", "parameters must be a JSON object"),
        ({"inputs": "aGFsbG8=", "image": "x"}, "unknown_option", "unknown member 'image'"),
        ({"inputs": "aGFsbG8=", "parameters": {"format": "png"}}, "unknown_option", "option format is one of /segment"),
    ],
)
def test_what_is_wrong_is_said(client: TestClient, members: dict[str, Any], code: str, sentence: str) -> None:
    error = client.post("/hf", **in_json(**members)).json()["error"]
    assert error["code"] == code
    assert sentence in error["message"]


def test_the_description_has_every_option(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    of_hf, of_segment = ({one["name"] for one in paths[path]["post"]["parameters"]} for path in ("/hf", "/segment"))
    assert of_hf == of_segment - {"format", "dry_run"}


def test_the_base64_is_walked_once(quadrants: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    walked = []
    load = upload.load_json
    monkeypatch.setattr(upload, "load_json", lambda text, **hooks: walked.append(bytes(text)) or load(text, **hooks))
    inputs = base64.b64encode(encoded(quadrants)).decode()
    body = json.dumps({"inputs": inputs, "parameters": {"threshold": 0.5}}).encode()
    read = upload.with_inputs(body, [("flip", "true")])
    assert read.picture == encoded(quadrants)
    assert read.options == [("flip", "true"), ("threshold", "0.5")]
    assert walked == [b'{"inputs": "", "parameters": {"threshold": 0.5}}']


def test_masks_that_nobody_waits_for_are_not_written(
    client: TestClient, quadrants: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of many classes in a large picture take seconds."""
    begun, too_late, ended = [], threading.Event(), threading.Event()

    def slow_png(where: np.ndarray) -> bytes:
        begun.append(where)
        too_late.wait(60)
        return b""

    def segments(*arguments: Any) -> bytes:
        body = _segments(*arguments)
        ended.set()
        return body

    monkeypatch.setattr(hugging_face, "class_png", slow_png)
    monkeypatch.setattr(hugging_face, "_segments", segments)
    answer = client.post("/hf?timeout_ms=500", content=encoded(quadrants))
    assert answer.json()["error"]["code"] == "deadline_passed"
    too_late.set()
    assert ended.wait(60)
    assert len(begun) == 1
