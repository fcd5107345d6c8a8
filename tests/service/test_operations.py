"""Promise: operators can see, log, lock and reload the service."""

import asyncio
import gc
import io
import json
import logging
import re
import signal
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import uvicorn
from live import until
from onnx import helper
from prometheus_client import Counter
from pydantic import SecretStr, ValidationError
from starlette.testclient import TestClient
from tiny_model import METADATA, encoded, tiny_model
from typer.testing import CliRunner

import service
from service import logs
from service.app import create_app
from service.cli import cli
from service.cost import Work
from service.engine import Engine, ModelError, Plan
from service.models import Models
from service.pipeline import Estimate, Place
from service.server import Server
from service.settings import Settings, settings_table


@pytest.fixture
def png(quadrants: np.ndarray) -> bytes:
    return encoded(quadrants)


@pytest.fixture
def other_model(tmp_path: Path) -> Path:
    model = tiny_model()
    helper.set_model_props(model, METADATA | {"name": "encnet-other"})
    onnx.save(model, tmp_path / "other.onnx")
    return tmp_path / "other.onnx"


# ---- alive, ready, counted


def test_livez_and_readyz(client: TestClient) -> None:
    assert client.get("/livez").json() == {"ok": True, "reasons": []}
    assert client.get("/readyz").json() == {"ok": True, "reasons": []}


def test_load_balancers_may_ask_by_head(client: TestClient) -> None:
    for path in ("/livez", "/readyz"):
        told, asked = client.head(path), client.get(path)
        assert (told.status_code, told.content) == (200, b"")
        assert told.headers["content-length"] == asked.headers["content-length"]
    client.app.state.models.drain()  # type: ignore[attr-defined]
    assert client.head("/readyz").status_code == 503


def test_draining_is_not_ready_but_alive_and_refuses_work(client: TestClient, png: bytes) -> None:
    client.app.state.models.drain()  # type: ignore[attr-defined]
    assert client.get("/livez").status_code == 200
    ready = client.get("/readyz")
    assert ready.status_code == 503
    assert ready.json()["reasons"] == ["the service is stopping"]
    refused = client.post("/segment", content=png)
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "draining"
    assert int(refused.headers["retry-after"]) >= 1


def test_a_full_queue_is_not_ready_whichever_models_fill_it(
    client_with: Callable[..., TestClient], other_model: Path
) -> None:
    client = client_with(models={"other": other_model})
    models = client.app.state.models  # type: ignore[attr-defined]
    models.house.cost = models.settings.max_queue_pixels
    ready = client.get("/readyz")
    assert (ready.status_code, ready.json()["reasons"]) == (503, ["the queue is full"])
    assert client.get("/livez").status_code == 200
    models.house.cost = models.settings.max_queue_pixels // 2
    assert client.get("/readyz").status_code == 200


def test_a_queue_that_is_too_long_for_the_usual_time_is_not_ready(client: TestClient, png: bytes) -> None:
    models = client.app.state.models  # type: ignore[attr-defined]
    pipeline, settings = models.pipeline(), models.settings
    usual_s = settings.deadline_share * settings.timeout_ms / 1000
    place = Place(Estimate(Work(1000, 0), run_s=usual_s, encode_s=0, wait_s=0), pipeline.admitted, models.house)
    assert client.post("/segment", content=png).status_code == 429
    ready = client.get("/readyz")
    assert (ready.status_code, ready.json()["reasons"]) == (503, ["the queue of model tiny is too long: about 24.0 s"])
    place.release()
    Place(Estimate(Work(1000, 0), run_s=usual_s / 2, encode_s=0, wait_s=0), pipeline.admitted, models.house)
    assert client.get("/readyz").status_code == 200
    assert client.post("/segment", content=png).status_code == 200


def test_a_model_that_was_unloaded_is_missed_only_where_none_is_named(
    client_with: Callable[..., TestClient], other_model: Path
) -> None:
    client = client_with(models={"other": other_model}, remote_control=True)
    assert client.post("/v2/repository/models/other/unload").status_code == 200
    assert client.get("/v2/models/other/ready").status_code == 503
    assert client.get("/readyz").status_code == client.get("/v2/health/ready").status_code == 200
    assert client.post("/v2/repository/models/tiny/unload").status_code == 200
    ready = client.get("/readyz")
    assert (ready.status_code, ready.json()["reasons"]) == (503, ["model tiny is not loaded: it was unloaded"])
    assert client.post("/v2/repository/models/tiny/load").status_code == 200
    assert client.get("/readyz").status_code == 200


def test_a_model_that_cannot_come_back_is_neither_ready_nor_alive(client: TestClient, png: bytes) -> None:
    served = client.app.state.models.served()  # type: ignore[attr-defined]
    served.pipeline.device.state = "failed"
    served.pipeline.device.reason = "no device"
    assert client.get("/livez").status_code == 503
    assert client.get("/readyz").status_code == 503
    assert client.post("/segment", content=png).json()["error"]["code"] == "device_failed"


def test_metrics_count_requests_by_outcome_and_reason(client: TestClient, png: bytes) -> None:
    client.post("/segment", content=png)
    client.post("/segment", content=png[:40])
    client.post("/segment", content=b"hello")
    client.get("/nowhere")
    text = client.get("/metrics").text
    for line in (
        'encnet_requests_total{reason="ok",route="/segment",status="200"} 1.0',
        'encnet_requests_total{reason="truncated",route="/segment",status="400"} 1.0',
        'encnet_requests_total{reason="not_an_image",route="/segment",status="415"} 1.0',
        'encnet_requests_total{reason="not_found",route="other",status="404"} 1.0',
        'encnet_ready{model="tiny"} 1.0',
        'encnet_queue_pixels{model="tiny"} 0.0',
        'encnet_batch_size_count{model="tiny"} 1.0',
        'encnet_phase_seconds_count{phase="infer"} 1.0',
    ):
        assert line in text
    assert 'name="encnet-tiny"' in text


def test_a_restart_that_finds_another_file_counts_by_its_classes(
    client_with: Callable[..., TestClient], png: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served_file = tmp_path / "served.onnx"
    onnx.save(tiny_model(), served_file)
    client = client_with(model=served_file, threshold=0.0)
    names = [f"class {index}" for index in range(6)]
    larger = tiny_model(classes=6)
    helper.set_model_props(larger, {**METADATA, "classes": json.dumps(names), "palette": json.dumps([[0, 0, 0]] * 6)})
    onnx.save(larger, served_file)

    def dies(*given: Any) -> None:
        monkeypatch.undo()
        raise SystemExit

    monkeypatch.setattr(Engine, "run", dies)
    assert client.post("/segment", content=png).status_code == 503
    until(lambda: client.get("/readyz").status_code == 200)
    answer = client.post("/segment", content=png)
    assert answer.status_code == 200, answer.text
    assert {row["class"] for row in answer.json()["presence"]} == set(names)
    assert 'encnet_present_total{class="class 5",model="served"} 1.0' in client.get("/metrics").text


# ---- keys, origins, headers


def test_a_key_is_asked_for_where_keys_are_set(client_with: Callable[..., TestClient], png: bytes) -> None:
    client = client_with(api_keys=(SecretStr("first"), SecretStr("second")))
    refused = client.post("/segment", content=png)
    assert refused.status_code == 401
    assert refused.headers["www-authenticate"] == "Bearer"
    assert refused.json()["error"]["code"] == "unauthorized"
    for headers in ({"Authorization": "Bearer wrong"}, {"X-API-Key": "firs"}, {"Authorization": "Basic first"}):
        assert client.post("/segment", content=png, headers=headers).status_code == 401
    for headers in ({"Authorization": "Bearer first"}, {"X-API-Key": "second"}, {"Authorization": "bearer second"}):
        assert client.post("/segment", content=png, headers=headers).status_code == 200
    both = {"Authorization": "Bearer what-a-gateway-asks-for", "X-API-Key": "first"}
    assert client.post("/segment", content=png, headers=both).status_code == 200
    assert client.get("/models").status_code == 401
    assert client.get("/readyz").status_code == client.get("/metrics").status_code == 200


OPEN = ("/", "/docs", "/openapi.json", "/livez", "/readyz", "/healthz", "/metrics") + (
    "/v2/health/live",
    "/v2/health/ready",
    "/page/settings",
    "/samples",
    "/static-offline-docs/swagger-ui.css",
)


def test_a_key_guards_every_route_that_is_not_told_to_be_open(client_with: Callable[..., TestClient]) -> None:
    client = client_with(api_keys=(SecretStr("first"),))
    assert [client.get(path).status_code for path in OPEN] == [200] * len(OPEN)
    documented = client.get("/openapi.json").json()["paths"]
    guarded = {path: method for path, methods in documented.items() for method in methods if path not in OPEN}
    assert {"/segment", "/segment/batch", "/hf", "/models", "/classes"} <= guarded.keys()
    for path in ("/v2", "/v2/models/tiny", "/v2/models/tiny/ready", "/v2/logging", "/nowhere", "/livez/", "/docs/x"):
        guarded[path] = "get"
    assert {path: client.request(method, path).status_code for path, method in guarded.items()} == dict.fromkeys(
        guarded, 401
    )


def test_the_docs_have_a_place_for_the_key_where_one_is_needed(client_with: Callable[..., TestClient]) -> None:
    known = client_with(api_keys=(SecretStr("first"),)).get("/openapi.json").json()
    assert known["components"]["securitySchemes"] == {"HTTPBearer": {"type": "http", "scheme": "bearer"}}
    for path, method in (("/segment", "post"), ("/segment/batch", "post"), ("/classes", "get")):
        assert known["paths"][path][method]["security"] == [{"HTTPBearer": []}]
        assert len(known["paths"][path][method]["tags"]) == 1, "it stands in /docs once"
    guarded = [(path, method) for path, methods in known["paths"].items() if path not in OPEN for method in methods]
    assert len(guarded) == 5
    for path, method in guarded:
        assert "401" in known["paths"][path][method]["responses"], path
    assert "securitySchemes" not in client_with().get("/openapi.json").json()["components"]


@pytest.mark.parametrize("host", ["a/livez?", "a/docs#", "a/page/", "a/samples"])
def test_a_host_header_opens_no_route(client_with: Callable[..., TestClient], host: str) -> None:
    client = client_with(api_keys=(SecretStr("first"),))
    assert client.get("/models", headers={"Host": host}).status_code == 401


def test_a_browser_may_ask_beforehand_without_a_key(client_with: Callable[..., TestClient]) -> None:
    client = client_with(api_keys=(SecretStr("first"),), cors_origins=("https://a.example",))
    asking = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    assert client.options("/segment", headers=asking).status_code == 200


def test_other_origins_may_call_only_where_they_are_named(client_with: Callable[..., TestClient]) -> None:
    asking = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in client_with().options("/segment", headers=asking).headers
    named = client_with(cors_origins=("https://a.example",))
    assert named.options("/segment", headers=asking).headers["access-control-allow-origin"] == "https://a.example"
    shown = named.get("/models", headers={"Origin": "https://a.example"}).headers["access-control-expose-headers"]
    assert {"Retry-After", "Inference-Header-Content-Length"} <= set(shown.split(", "))
    asking["Origin"] = "https://b.example"
    assert "access-control-allow-origin" not in named.options("/segment", headers=asking).headers


def test_security_headers_are_on_every_answer(client: TestClient) -> None:
    for answer in (client.get("/models"), client.get("/nowhere"), client.post("/segment", content=b"x")):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
        assert answer.headers["referrer-policy"] == "no-referrer"


# ---- log lines


def test_json_log_lines_carry_the_request_and_its_id(client: TestClient, png: bytes) -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logs.JsonFormatter())
    handler.addFilter(logs.WithRequestId())
    logger = logging.getLogger("service.middleware")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        client.post("/segment?scales=0.5", content=png, headers={"X-Request-ID": "mine-1"})
        client.post("/segment", content=b"secret bytes", headers={"Authorization": "Bearer secret key"})
    finally:
        logger.removeHandler(handler)
    first, second = (json.loads(line) for line in stream.getvalue().splitlines())
    assert first["request_id"] == "mine-1"
    assert (first["method"], first["path"], first["status"], first["reason"]) == ("POST", "/segment", 200, "ok")
    assert first["ms"] > 0
    assert second["status"] == 415
    assert "secret" not in stream.getvalue()


def test_the_line_of_a_run_that_failed_carries_the_id_of_its_request(
    client: TestClient, png: bytes, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    run = Engine.run

    def failing(self: Engine, images: Sequence[np.ndarray], plan: Plan, *options: Any) -> Any:
        if plan.flip:
            raise RuntimeError("no memory")
        return run(self, images, plan, *options)

    monkeypatch.setattr(Engine, "run", failing)
    client.post("/segment?flip=true", content=png, headers={"X-Request-ID": "mine-2"})
    (line,) = (record for record in log.records if record.message == "a run failed: no memory")
    assert logs.TextFormatter("%(message)s").format(line) == "a run failed: no memory [mine-2]"


def test_the_lines_of_threads_that_work_for_a_request_carry_its_id(
    client: TestClient, png: bytes, log: pytest.LogCaptureFixture
) -> None:
    with log.at_level(logging.DEBUG, "service.images"):
        client.post("/segment", content=png[: len(png) // 2], headers={"X-Request-ID": "mine-3"})
    (line,) = (record for record in log.records if record.name == "service.images")
    assert (line.message, line.request_id) == ("undecodable picture", "mine-3")  # type: ignore[attr-defined]


def test_the_line_of_a_stop_carries_no_id_of_the_request_that_it_came_in(
    client: TestClient, log: pytest.LogCaptureFixture
) -> None:
    server = Server(uvicorn.Config(client.app), client.app.state.models, Counter("cut", "-", registry=None), list)

    async def stopped_in_the_midst_of_a_request() -> None:
        server.started, server._loop = True, asyncio.get_running_loop()
        logs.request_id.set("mine-4")
        server.handle_exit(signal.SIGTERM, None)
        while not server.should_exit:
            await asyncio.sleep(0)

    with log.at_level(logging.INFO, "service.server"):
        asyncio.run(stopped_in_the_midst_of_a_request())
    (line,) = (record for record in log.records if record.name == "service.server")
    assert line.message.startswith("stopping")
    assert line.request_id == ""  # type: ignore[attr-defined]


def test_a_line_for_people_ends_with_the_id_whatever_else_it_says() -> None:
    record = logging.makeLogRecord({"msg": "POST /segment 200 ok 12.3 ms", "request_id": "200"})
    assert logs.TextFormatter("%(message)s").format(record) == "POST /segment 200 ok 12.3 ms [200]"


def test_probes_do_not_fill_the_log(client: TestClient, log: pytest.LogCaptureFixture) -> None:
    with log.at_level(logging.INFO, "service.middleware"):
        for path in ("/livez", "/readyz", "/healthz", "/metrics", "/v2/health/live", "/v2/health/ready"):
            assert client.get(path).status_code == 200
        client.get("/models")
    said = [record.getMessage() for record in log.records if record.name == "service.middleware"]
    assert [line.split()[1] for line in said] == ["/models"]


# ---- several models


def test_a_path_cannot_forge_log_lines(client: TestClient, log: pytest.LogCaptureFixture) -> None:
    with log.at_level(logging.INFO, "service.middleware"):
        client.get("/x%0aINFO POST /segment 200 ok%1b[31m")
    (line,) = [record.getMessage() for record in log.records if record.name == "service.middleware"]
    assert "/x\\x0aINFO POST /segment 200 ok\\x1b[31m" in line


def test_models_are_chosen_by_name(
    client_with: Callable[..., TestClient], other_model: Path, png: bytes, model_file: Path
) -> None:
    client = client_with(models={"night": other_model})
    listed = client.get("/models").json()["models"]
    assert [(entry["name"], entry["default"], entry["state"]) for entry in listed] == [
        ("tiny", True, "ready"),
        ("night", False, "ready"),
    ]
    assert client.post("/segment", content=png).json()["model"]["name"] == "encnet-tiny"
    assert client.post("/segment?model=night", content=png).json()["model"]["name"] == "encnet-other"
    assert client.get("/classes?model=night").json()["model"]["name"] == "encnet-other"
    refused = client.post("/segment?model=../etc/passwd", content=png)
    assert refused.status_code == 404
    assert "tiny, night" in refused.json()["error"]["message"]


def test_settings_read_models_keys_and_origins_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "encnet.env").write_text("ENCNET_PORT=9001\nENCNET_MAX_SCALES=3\n")
    monkeypatch.setenv("ENCNET_MODELS", "night=a/night.onnx, day=b.onnx")
    monkeypatch.setenv("ENCNET_API_KEYS", "sesame-1, sesame-2")
    monkeypatch.setenv("ENCNET_CORS_ORIGINS", "https://a.example")
    monkeypatch.setenv("ENCNET_PORT", "9002")
    settings = Settings()
    assert settings.models == {"night": Path("a/night.onnx"), "day": Path("b.onnx")}
    assert [key.get_secret_value() for key in settings.api_keys] == ["sesame-1", "sesame-2"]
    assert settings.cors_origins == ("https://a.example",)
    assert (settings.port, settings.max_scales) == (9002, 3)
    assert "sesame" not in repr(settings)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("API_KEYS", " , ", "nothing between them"),
        ("MODELS", "a=x.onnx, a =y.onnx", "'a' is given twice"),
        ("HOST", "a" * 70, "neither an address nor the name of a host"),
    ],
)
def test_settings_that_would_not_do_what_they_say_are_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, text: str, words: str
) -> None:
    monkeypatch.setenv(f"ENCNET_{name}", text)
    with pytest.raises(ValidationError, match=words):
        Settings()


def test_a_variable_that_is_set_to_nothing_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, _, _ in settings_table():
        monkeypatch.setenv(name, "")
    assert Settings() == Settings.model_construct()


def test_two_models_of_one_name_are_refused(settings: Settings, other_model: Path) -> None:
    with pytest.raises(ValueError, match="the name tiny is that of model"):
        Settings(model=settings.model, models={"tiny": other_model})


@pytest.mark.parametrize("names", [{"model": "day_encoded.onnx"}, {"models": "night_encoded=night.onnx"}])
def test_a_name_that_the_protocol_gives_its_own_models_is_refused(names: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="must not end in _encoded"):
        Settings(**names)


@pytest.mark.parametrize("names", [{"model": "stats.onnx"}, {"models": "stats=night.onnx"}])
def test_a_name_under_which_the_protocol_has_its_statistics_is_refused(names: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="the model name 'stats' is taken under /v2"):
        Settings(**names)
    Settings(models="my-stats=night.onnx")


def test_every_setting_is_in_the_readme_and_in_help() -> None:
    readme = (Path(service.__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    shown = CliRunner().invoke(cli, ["serve", "--help"], env={"COLUMNS": "300"}).output
    for name, default, meaning in settings_table():
        assert f"| `{name}` | {default} | {meaning} |" in readme
        assert name in shown
    in_the_table = set(re.findall(r"^\| `(ENCNET_\w+)` \|", readme, re.MULTILINE))
    assert in_the_table == set(re.findall(r"ENCNET_\w+(?=[: ])", shown.partition("Settings, from")[2]))


def test_a_model_that_cannot_be_loaded_is_told_once_no_other_is_loading(
    settings: Settings, other_model: Path, engine: Engine
) -> None:
    """The process would abort where it ended under a thread that loads."""
    loaded = threading.Event()

    def open_engine(path: Path, settings: Settings) -> Engine:
        if path != other_model:
            raise ModelError("no model")
        time.sleep(0.5)
        loaded.set()
        return engine

    with pytest.raises(ModelError, match="no model"):
        Models(settings.model_copy(update={"models": {"other": other_model}}), open_engine).start()
    assert loaded.is_set()


def test_what_was_loaded_before_a_reload_is_gone_at_once(settings: Settings) -> None:
    """Not when Python next looks for cycles: each has the weights and two sessions."""
    models = Models(settings)
    models.start()
    with TestClient(create_app(models=models)) as client:
        assert client.portal is not None
        old = weakref.ref(models.pipeline().engine)
        gc.disable()
        try:
            client.portal.call(models.load, models.default)
            until = time.monotonic() + 20
            while old() is not None:  # the watchdog looks four times a second
                assert time.monotonic() < until
                time.sleep(0.05)
        finally:
            gc.enable()
    models.close()


def test_a_reload_drops_no_request_and_a_broken_file_changes_nothing(
    settings: Settings, other_model: Path, png: bytes, tmp_path: Path
) -> None:
    served_file = tmp_path / "served.onnx"
    onnx.save(tiny_model(), served_file)
    models = Models(settings.model_copy(update={"model": served_file}))
    models.start()
    with TestClient(create_app(models=models)) as client:
        portal = client.portal
        assert portal is not None
        answers = [client.post("/segment", content=png)]
        other_model.replace(served_file)
        reload = portal.start_task_soon(models.load, "served")
        while not reload.done():
            answers.append(client.post("/segment", content=png))
        answers.append(client.post("/segment", content=png))
        assert {answer.status_code for answer in answers} == {200}
        assert answers[0].json()["model"]["name"] == "encnet-tiny"
        assert answers[-1].json()["model"]["name"] == "encnet-other"
        served_file.write_bytes(b"not a model")
        with pytest.raises(Exception, match="is no ONNX file"):
            portal.call(models.load, "served")
        assert client.post("/segment", content=png).json()["model"]["name"] == "encnet-other"
        assert client.get("/readyz").status_code == 200
        portal.call(models.unload, "served")
        for refused in (client.post("/segment", content=png), client.get("/classes")):
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "unloaded"
            assert "the model served is not loaded: it was unloaded" in refused.json()["error"]["message"]
        assert client.get("/models").json()["models"][0]["state"] == "unloaded"
    models.close()
