"""Promise: `bench` counts what really happened, and `warm` runs the model it is given; mistakes are sentences."""

import io
import json
import resource
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from live import Answer, scripted, serving
from PIL import Image
from tiny_model import encoded
from typer.testing import CliRunner, Result

from service.app import create_app
from service.bench import BenchError, Level, measure, read_target
from service.cli import cli
from service.settings import Settings


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def load(url: str, clients: int, seconds: float, pictures: Sequence[bytes] = (b"p",), timeout: float = 30) -> Level:
    return measure(read_target(url, {}, {}, timeout), pictures, clients, seconds, lambda _: None)


# ---- what is measured


def test_a_real_server_is_measured(settings: Settings, quadrants: np.ndarray, tmp_path: Path) -> None:
    (tmp_path / "q.png").write_bytes(encoded(quadrants))
    given = ["--image", tmp_path / "q.png", "--concurrency", "1,2", "--duration", "0.5", "--json", tmp_path / "b.json"]
    with serving(create_app(settings)) as url:
        result = run("bench", url, *given)
    assert result.exit_code == 0, result.output
    header, *rows = result.stdout.splitlines()
    assert header.split("  ")[0].strip() == "clients"
    assert [row.split()[0] for row in rows] == ["1", "2"]
    figures = json.loads((tmp_path / "b.json").read_text())
    assert (figures["path"], figures["pictures"]) == ("/segment", 1)
    for clients, level in zip((1, 2), figures["levels"], strict=True):
        assert level["clients"] == clients
        assert set(level["statuses"]) == {"200"}
        assert not level["errors"]
        answers, latency = level["statuses"]["200"], level["latency_ms"]["200"]
        assert 0 < latency["p50"] <= latency["p90"] <= latency["p99"] <= latency["max"]
        assert level["sent_bytes"] == answers * figures["picture_bytes"]
        assert answers - clients <= level["answers_per_second"] * 0.5 <= answers


def test_so_many_clients_ask_at_a_time_each_waiting_for_its_answer() -> None:
    now, most, lock = 0, 0, threading.Lock()

    def answer(number: int) -> Answer:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.05)
        with lock:
            now -= 1
        return 200, {}, b"mask"

    with scripted(answer) as server:
        level = load(server.url, 3, 0.6)
        assert level.statuses == {200: len(server.requests)}
    assert most == 3
    assert level.latency()["p50"] >= 50
    assert level.rate <= 3 / 0.05
    assert level.received_bytes == 4 * level.statuses[200]


def test_every_outcome_is_counted_as_what_it_is() -> None:
    outcomes: list[Answer | None] = [(200, {}, b"ok"), (429, {}, b""), (503, {}, b""), (504, {}, b""), None]
    with scripted(lambda number: outcomes[number % len(outcomes)]) as server:
        level = load(server.url, 1, 1.5)
        seen = len(server.requests)
    assert set(level.statuses) == {200, 429, 503, 504}
    assert set(level.errors) == {"cut off"}
    assert sum(level.statuses.values()) + level.errors.total() == seen
    assert level.in_time <= level.statuses[200]
    assert set(level.as_dict()["latency_ms"]) == {"200", "429", "503", "504"}


def test_an_answer_after_the_time_counts_for_latency_but_not_for_throughput() -> None:
    def answer(number: int) -> Answer:
        time.sleep(0.5)
        return 200, {}, b""

    with scripted(answer) as server:
        level = load(server.url, 1, 0.2)
    assert (level.statuses, level.rate) == ({200: 1}, 0)
    assert level.latency()["max"] >= 500


def test_a_server_that_hangs_is_told_apart() -> None:
    def answer(number: int) -> Answer:
        time.sleep(0.6)
        return 200, {}, b""

    with scripted(answer) as server:
        level = load(server.url, 1, 0.1, timeout=0.2)
    assert (level.statuses, level.errors) == ({}, {"timed out": 1})


def test_a_server_that_dies_is_told_apart() -> None:
    with scripted(lambda number: (200, {}, b"")) as server:
        url = server.url
    level = load(url, 2, 0.2)
    assert set(level.errors) == {"refused"}
    assert level.errors.total() < 20, "no busy loop"


def test_pictures_are_sent_in_turn() -> None:
    with scripted(lambda number: (200, {}, b"")) as server:
        load(server.url, 1, 0.3, (b"a", b"b", b"c"))
        bodies = [body for _, _, body in server.requests]
    assert len(bodies) >= 3
    assert bodies == [(b"a", b"b", b"c")[index % 3] for index in range(len(bodies))]


def test_options_headers_and_the_urls_own_query_are_sent(tmp_path: Path, quadrants: np.ndarray) -> None:
    (tmp_path / "q.png").write_bytes(encoded(quadrants))
    with scripted(lambda number: (200, {}, b"")) as server:
        result = run(
            "bench", f"{server.url}/segment?format=png", "--scales", "0.5,1", "--flip", "-H", "Authorization: Bearer k",
            "--image", tmp_path, "--concurrency", "1", "--duration", "0.1",
        )  # fmt: skip
        path, headers, body = server.requests[-1]
    assert result.exit_code == 0, result.output
    assert path == "/segment?format=png&scales=0.5%2C1&flip=true"
    assert headers["Authorization"] == "Bearer k"
    assert body == (tmp_path / "q.png").read_bytes()


def test_without_an_image_a_synthetic_one_is_sent() -> None:
    with scripted(lambda number: (200, {}, b"")) as server:
        run("bench", server.url, "--concurrency", "1", "--duration", "0.1")
        body = server.requests[0][2]
    assert Image.open(io.BytesIO(body)).size == (640, 480)


def test_the_table_has_columns_for_what_went_wrong() -> None:
    with scripted(lambda number: (200, {}, b"") if number % 2 else (429, {}, b"")) as server:
        result = run("bench", server.url, "--concurrency", "1", "--duration", "0.2")
    assert "429" in result.stdout.splitlines()[0]
    with scripted(lambda number: (503, {}, b"")) as server:
        result = run("bench", server.url, "--concurrency", "1", "--duration", "0.2")
    assert result.exit_code == 1
    assert "no picture was answered" in result.stderr


# ---- mistakes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["127.0.0.1:8000"], "http://127.0.0.1:8000"),
        (["http://127.0.0.1:many"], "not a URL"),
        (["--concurrency", "0"], "1,4,16"),
        (["--concurrency", "a"], "1,4,16"),
        (["http://" + "a" * 70], "name of its host"),
        (["http://127.0.0.1:8000/a b"], "%20"),
        (["http://127.0.0.1:8000/segment?classes=é"], "%C3%A9"),
        (["http://a b:8000"], "%20"),
        (["--header", "nonsense"], "Authorization: Bearer"),
        (["--header", "X: ✓"], "--header X is one line of Latin-1 characters, not '✓'"),
        (["--header", "X: a\rb"], "not 'a\\rb'"),
        (["--header", "X: a\nb"], "not 'a\\nb'"),
        (["--image", "none.jpg"], "none.jpg cannot be read"),
        (["--image", "."], "no pictures"),
    ],
)
def test_a_wrong_argument_is_a_sentence(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("bench", *arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_nobody_there_is_a_sentence() -> None:
    with scripted(lambda number: (200, {}, b"")) as server:
        url = server.url
    result = run("bench", url)
    assert result.exit_code == 1
    assert f"no server answers at {url.removeprefix('http://')}: connection refused" in result.stderr
    assert "python -m service serve" in result.stderr


def test_more_clients_than_the_machine_has_threads_for_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with scripted(lambda number: (200, {}, b"mask")) as server:
        target = read_target(server.url, {}, {}, 30)
        monkeypatch.setattr(threading.Thread, "start", full)
        with pytest.raises(BenchError, match="room for 0 clients, not for 3; ask for fewer"):
            measure(target, [b"p"], 3, 0.1, lambda _: None)
        monkeypatch.undo()


def test_the_soft_limit_of_descriptors_does_not_bound_the_clients() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 40, hard))
    try:
        with scripted(lambda number: (200, {}, b"mask")) as server:
            result = run("bench", server.url, "--concurrency", "60", "--duration", "0.5")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert "OSError" not in result.stdout


def test_a_refused_picture_is_a_sentence(settings: Settings) -> None:
    with serving(create_app(settings)) as url:
        result = run("bench", url, "--scales", "99")
    assert result.exit_code == 1
    assert "is answered 422: option scales must each be from 0.25 to 3" in result.stderr


def test_a_refused_picture_is_named(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "cut.jpg").write_bytes(b"no picture")
    with serving(create_app(settings)) as url:
        result = run("bench", url, "--image", tmp_path)
    assert result.exit_code == 1
    assert f"POST /segment with {tmp_path / 'cut.jpg'} is answered 415: the data is not a picture" in result.stderr


@pytest.mark.parametrize(("name", "reason"), [("none/b.json", "No such file"), ("", "Is a directory")])
def test_a_json_file_that_cannot_be_written_is_a_sentence(tmp_path: Path, name: str, reason: str) -> None:
    with scripted(lambda number: (200, {}, b"")) as server:
        target = tmp_path / name
        result = run("bench", server.url, "--concurrency", "1", "--duration", "0.1", "--json", target)
    assert result.exit_code == 1
    assert f"{target.name}: {reason}" in result.stderr
    assert not server.requests, "it is told before the server is loaded"


# ---- warm


@pytest.fixture
def warm(model_file: Path) -> Callable[..., Result]:
    return lambda *arguments: run("warm", "--model", model_file, "--device", "cpu", "--threads", "1", *arguments)


def test_warm_tells_two_times_of_each_size(warm: Callable[..., Result]) -> None:
    result = warm("--size", "40x30", "--size", "7x300", "--scales", "0.5,1", "--flip")
    assert result.exit_code == 0, result.output
    first, _, *rows = result.stdout.splitlines()
    assert first.startswith("encnet-tiny, 4 classes, on cpu: loaded in ")
    assert [row.split()[0] for row in rows] == ["40x30", "7x300"]
    assert all(float(ms) > 0 for row in rows for ms in row.split()[1:])


def test_warm_without_sizes_takes_those_of_the_model(warm: Callable[..., Result]) -> None:
    assert [row.split()[0] for row in warm().stdout.splitlines()[2:]] == ["64x48", "48x64", "64x64"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--size", "40"], "640x480"),
        (["--size", "0x30"], "640x480"),
        (["--size", "9999x9999"], "more than the 16000000 allowed"),
        (["--scales", "9"], "0.25 to 3"),
    ],
)
def test_a_wrong_size_or_scale_is_a_sentence(warm: Callable[..., Result], arguments: list[str], words: str) -> None:
    result = warm(*arguments)
    assert result.exit_code == 2
    assert words in result.stderr


def test_warm_fails_where_the_model_cannot_be_loaded() -> None:
    result = run("warm", "--model", "none.onnx")
    assert result.exit_code == 1
    assert "none.onnx does not exist" in result.stderr
