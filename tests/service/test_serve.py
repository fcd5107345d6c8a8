"""Promise: `python -m service serve` says when it is ready, answers, stops cleanly, and fails in a sentence."""

import contextlib
import http.client
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from tiny_model import encoded

import service

ROOT = Path(service.__file__).parents[1]


CLIENT = httpx.Client(timeout=60)  # generous, as the machine may be busy


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "service", "serve", *map(str, arguments)]


def environment(**changes: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("ENCNET_")}
    return {**clean, "ENCNET_DEVICE": "cpu", "ENCNET_THREADS": "1", "PYTHONUNBUFFERED": "1", **changes}


class Server:
    """A served model in a process of its own; `banner` is what it printed until it was ready."""

    def __init__(self, model: Path, **changes: str) -> None:
        self.process = subprocess.Popen(
            command("--model", model, "--port", 0),
            cwd=ROOT,
            env=environment(**changes),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self.process.stdout
        self.banner = ""
        for line in self.process.stdout:
            self.banner += line
            if "/docs" in line:
                break
        found = re.search(r"http://127\.0\.0\.1:(\d+)", self.banner)
        assert found, self.banner
        self.url, self.port = found[0], int(found[1])

    def stop(self, signal_: int = signal.SIGTERM) -> int:
        self.process.send_signal(signal_)
        try:
            return self.process.wait(60)
        finally:
            self.process.kill()
            assert self.process.stdout
            self.process.stdout.close()


@pytest.fixture(scope="module")
def server(model_file: Path) -> Iterator[Server]:
    server = Server(model_file, ENCNET_MAX_BYTES="300000")
    yield server
    server.stop()


@pytest.fixture(scope="module")
def png(quadrants: np.ndarray) -> bytes:
    return encoded(quadrants)


def resident_bytes(process: int) -> int:
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def refusal(*arguments: object, **changes: str) -> str:
    """What a start that fails says: one line on stderr, no traceback, exit code not zero."""
    done = subprocess.run(
        command(*arguments), cwd=ROOT, env=environment(**changes), capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr


def test_banner_says_where_what_and_how(server: Server, model_file: Path) -> None:
    assert "encnet-tiny" in server.banner
    assert str(model_file) in server.banner
    assert f"curl -F image=@examples/street.jpg {server.url}/segment\n" in server.banner
    assert "-o mask.png" in server.banner


def test_the_banner_has_the_names_by_which_several_models_are_asked_for(model_file: Path) -> None:
    server = Server(model_file, ENCNET_MODELS=f"again={model_file}")
    assert server.stop() == 0
    names = re.findall(r"^  model    (.*), on cpu", server.banner, re.MULTILINE)
    assert names == [f"{model_file.stem}: encnet-tiny, 4 classes", "again: encnet-tiny, 4 classes"]


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_the_curl_lines_of_the_banner_work(server: Server, png: bytes, tmp_path: Path) -> None:
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "street.jpg").write_bytes(png)
    lines = re.findall(r"curl .*", server.banner)
    assert len(lines) == 2
    for line in lines:
        done = subprocess.run([*shlex.split(line), "-sS"], cwd=tmp_path, capture_output=True, check=True, timeout=60)
    assert (tmp_path / "mask.png").read_bytes().startswith(b"\x89PNG")
    assert done.stderr == b""


def test_the_curl_lines_have_a_place_for_the_key_where_one_is_needed(model_file: Path) -> None:
    server = Server(model_file, ENCNET_API_KEYS="opens")
    try:
        assert server.banner.count("curl -H 'Authorization: Bearer KEY' -F image=@examples/street.jpg ") == 2
        assert "opens" not in server.banner
    finally:
        server.stop()


def test_a_picture_over_a_socket(server: Server, png: bytes) -> None:
    answer = CLIENT.post(f"{server.url}/segment", files={"image": ("q.png", png)}).json()
    assert answer["image"]["width"] == 40
    assert answer["timing_ms"]["total"] > 0


@pytest.mark.parametrize(
    "asking",
    [
        {"Connection": "close, upgrade", "Upgrade": "websocket"},
        {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAEAAEAAAAIAAAAAAAMAAAAA"},
    ],
)
def test_who_asks_for_another_protocol_is_answered_over_http(
    server: Server, png: bytes, asking: dict[str, str]
) -> None:
    assert CLIENT.post(f"{server.url}/segment", content=png, headers=asking).status_code == 200


def test_a_client_that_sends_too_much_can_read_why(server: Server) -> None:
    for body in (b"\0" * 500_000, iter([b"\0" * 100_000] * 5)):
        response = CLIENT.post(f"{server.url}/segment", content=body)
        assert response.status_code == 413
        assert "300000" in response.json()["error"]["message"]


def test_a_head_without_end_is_refused_and_a_long_one_is_read(server: Server) -> None:
    assert CLIENT.get(f"{server.url}/livez", headers={"X-Long": "a" * 60_000}).status_code == 200
    line = b"GET /livez HTTP/1.1\r\n"
    for begun, endless in ((b"GET /", b"a" * 4096), (line + b"X-Long: ", b"a" * 4096), (line, b"X-Short: a\r\n" * 300)):
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
            connection.sendall(begun)
            answer, sent = b"", 0
            while not answer and sent < 10_000_000:
                connection.settimeout(0.01)
                with contextlib.suppress(TimeoutError):
                    answer = connection.recv(4096)
                with contextlib.suppress(ConnectionError):
                    connection.sendall(endless)
                sent += len(endless)
        assert answer.startswith(b"HTTP/1.1 400 "), answer


def test_requests_sent_at_once_are_answered_in_their_order(server: Server, png: bytes) -> None:
    picture = png.ljust(200_000, b"\0")
    post = b"POST /segment?format=png HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(picture) + picture
    last = b"GET /livez HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(post + post + last)
        answers = connection.makefile("rb").read()
    assert answers.count(b"HTTP/1.1 200 OK") == 3
    assert answers.count(b"\x89PNG") == 2


@pytest.mark.parametrize("target", ["http://x/livez?a=b", "HTTPS://x:443/livez", "http://x", "http://x?a=b"])
def test_a_target_may_name_its_host(server: Server, target: str) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(f"GET {target} HTTP/1.1\r\nHost: y\r\n\r\n".encode())
        assert connection.recv(4096).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    "nonsense",
    [
        b"\x16\x03\x01 hello, TLS\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nBad Header\r\n\r\n",
        b"POST /segment HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\na",
        b"POST /segment HTTP/1.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /segment HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_what_is_no_request_is_answered_400(server: Server, nonsense: bytes) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(nonsense)
        assert connection.recv(4096).startswith(b"HTTP/1.1 400 ")


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_curl_is_refused_a_huge_file_at_once(server: Server, tmp_path: Path) -> None:
    huge = tmp_path / "huge.jpg"
    with huge.open("wb") as file:
        file.truncate(100_000_000)
    for arguments in (["-F", f"image=@{huge}"], ["--data-binary", f"@{huge}"], ["-T", str(huge), "-X", "POST"]):
        line = ["curl", "-sS", *arguments, f"{server.url}/segment"]
        done = subprocess.run(line, capture_output=True, text=True, timeout=60)
        assert "too_many_bytes" in done.stdout, done.stderr


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_an_endless_body_is_answered_and_never_kept(server: Server) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.putrequest("POST", "/segment")
    connection.putheader("Transfer-Encoding", "chunked")
    connection.endheaders()
    chunk = b"2710\r\n" + b"\0" * 10_000 + b"\r\n"
    for _ in range(100):
        connection.send(chunk)
    received = b""
    while not received.endswith(b"}"):
        received += connection.sock.recv(65536)
    assert received.startswith(b"HTTP/1.1 413")
    assert b"too_many_bytes" in received
    before = resident_bytes(server.process.pid)
    for _ in range(4000):
        connection.send(chunk)
    assert resident_bytes(server.process.pid) < before + 10_000_000
    connection.close()
    assert CLIENT.get(f"{server.url}/healthz").status_code == 200


def test_a_client_that_leaves_midway_does_no_harm(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(b"POST /segment HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nabc")
    time.sleep(0.1)
    assert CLIENT.get(f"{server.url}/healthz").status_code == 200


def test_port_in_use_is_a_sentence(server: Server, model_file: Path) -> None:
    message = refusal("--model", model_file, "--port", server.port)
    assert f"port {server.port}: address already in use" in message
    assert "--port" in message


def test_missing_model_is_a_sentence() -> None:
    assert "none.onnx does not exist" in refusal("--model", "none.onnx", "--port", 0)


def test_foreign_model_is_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "foreign.onnx"
    path.write_bytes(b"something else")
    assert "foreign.onnx" in refusal("--model", path, "--port", 0)


def test_unknown_host_is_a_sentence(model_file: Path) -> None:
    assert "cannot listen" in refusal("--model", model_file, "--host", "256.0.0.1")


def test_wrong_setting_is_a_sentence() -> None:
    assert "ENCNET_PORT" in refusal(ENCNET_PORT="many")


@pytest.mark.parametrize("signal_", [signal.SIGTERM, signal.SIGINT])
def test_stops_with_exit_code_0_when_told(model_file: Path, png: bytes, signal_: int) -> None:
    server = Server(model_file)
    assert CLIENT.post(f"{server.url}/segment", content=png).status_code == 200
    assert server.stop(signal_) == 0
