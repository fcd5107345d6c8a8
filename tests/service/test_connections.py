"""Promise: a client that does nothing any more holds nothing for long, and one that is merely slow is served."""

import contextlib
import re
import resource
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import httpx
import numpy as np
import pytest
from test_serve import Server
from tiny_model import encoded

WAIT = 60

Start = Callable[..., Server]


@pytest.fixture
def start(model_file: Path) -> Iterator[Start]:
    """A function that starts a server whose limits are short, or as they are given."""
    started: list[Server] = []

    def start(**changes: str) -> Server:
        limits = {"ENCNET_HEADER_TIMEOUT_MS": "500", "ENCNET_SEND_TIMEOUT_MS": "1000", "ENCNET_LOG_LEVEL": "debug"}
        started.append(Server(model_file, **{**limits, **changes}))
        return started[-1]

    yield start
    for server in started:
        server.stop()


@pytest.fixture(scope="module")
def large() -> bytes:
    """A picture whose `npz` answer is larger than what a system holds for a client."""
    return encoded(np.random.default_rng(0).integers(0, 256, (800, 1000, 3), np.uint8))


def connected(server: Server, data: bytes = b"") -> AbstractContextManager[socket.socket]:
    """A connection of a client that takes in little at a time, on which `data` was sent."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(WAIT)
    connection.connect(("127.0.0.1", server.port))
    connection.sendall(data)
    return connection


def asking_much(picture: bytes) -> bytes:
    head = b"POST /segment?format=npz HTTP/1.1\r\nHost: x\r\nX-Request-ID: much\r\nContent-Length: %d\r\n\r\n"
    return head % len(picture) + picture


def answer_on(connection: socket.socket) -> bytes:
    """The next answer, which is JSON."""
    received = b""
    while not received.endswith(b"}"):
        received += connection.recv(4096)
    return received


def cut(server: Server, awaited: str) -> int:
    text = httpx.get(f"{server.url}/metrics", timeout=WAIT).text
    found = re.search(rf'encnet_connections_cut_total{{awaited="{awaited}"}} (\d+)', text)
    return int(found[1]) if found else 0


def line_with(server: Server, words: str) -> str:
    """The next line of the log that has these words."""
    assert server.process.stdout
    return next(line for line in server.process.stdout if words in line)


def assert_ends(connection: socket.socket, within: float) -> None:
    begun = time.monotonic()
    with contextlib.suppress(ConnectionError):
        while connection.recv(65536):
            pass
    assert time.monotonic() - begun < within


def test_who_takes_nothing_of_an_answer_is_cut_off(start: Start, large: bytes) -> None:
    server = start()
    with connected(server, asking_much(large)) as connection:
        assert connection.recv(16).startswith(b"HTTP/1.1 200 ")
        line = line_with(server, "is cut")
        assert re.search(r"WARNING the connection of 127\.0\.0\.1:\d+ is cut: nothing of an answer was taken", line)
        assert line.endswith("[much]\n")
        assert cut(server, "take_answer") == 1
        assert_ends(connection, WAIT)


def test_who_takes_an_answer_slowly_gets_all_of_it(start: Start, large: bytes) -> None:
    server = start()
    with connected(server, asking_much(large)) as connection:
        received, begun = b"", time.monotonic()
        while time.monotonic() - begun < 3:
            received += connection.recv(2048)
            time.sleep(0.05)
        head, _, body = received.partition(b"\r\n\r\n")
        assert len(body) < 200_000, "too little for the system to ask the server for more"
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**20)
        while data := connection.recv(2**20):
            body += data
        assert b"content-length: %d\r\n" % len(body) in head
    assert cut(server, "take_answer") == 0


def test_a_stop_does_not_wait_for_who_takes_nothing(start: Start, large: bytes) -> None:
    server = start(ENCNET_GRACE_SECONDS="600")
    with connected(server, asking_much(large)) as connection:
        assert connection.recv(16)
        assert server.stop() == 0


@pytest.mark.parametrize("begun", [b"", b"G", b"GET /livez HTTP/1.1\r\nHost: x\r\n"])
def test_a_connection_without_a_request_is_closed(start: Start, begun: bytes) -> None:
    server = start()
    with connected(server, begun) as connection:
        assert connection.recv(1) == b""
        assert cut(server, "send_head") == 1


def test_a_second_request_whose_header_does_not_end_is_given_up_and_the_time_between_is_not_its_own(
    start: Start,
) -> None:
    server = start()
    request = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"
    with connected(server, request) as connection:
        assert answer_on(connection).startswith(b"HTTP/1.1 200 ")
        time.sleep(1.5)
        connection.sendall(request)
        assert answer_on(connection).startswith(b"HTTP/1.1 200 ")
        connection.sendall(b"G")
        assert_ends(connection, 4)  # uvicorn's five seconds between two requests end with the first byte


def test_a_body_that_has_been_answered_does_not_go_on_for_ever(start: Start) -> None:
    server = start(ENCNET_UPLOAD_TIMEOUT_MS="500")
    with connected(server, b"POST /segment HTTP/1.1\r\nHost: x\r\nContent-Length: 9000\r\n\r\nabc") as connection:
        assert answer_on(connection).startswith(b"HTTP/1.1 408 ")
        with pytest.raises(ConnectionError):
            for _ in range(80):
                connection.sendall(b"a")
                time.sleep(0.1)
        assert cut(server, "end_body") == 1


def test_connections_beyond_the_descriptors_are_told_of_and_hold_the_service_up_for_a_moment(start: Start) -> None:
    server = start(ENCNET_HEADER_TIMEOUT_MS="3000")
    open_now = len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))
    resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (open_now + 20, open_now + 20))
    with contextlib.ExitStack() as stack:
        for _ in range(40):
            stack.enter_context(connected(server))
        assert re.search(r"ERROR no file descriptor is left .* there are \d+ now", line_with(server, "descriptor"))
        assert "send_head" in line_with(server, "is closed")
        assert httpx.get(f"{server.url}/livez", timeout=WAIT).status_code == 200


def test_the_soft_limit_of_descriptors_does_not_count(start: Start) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard - 1, hard))
    try:
        server = start()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE) == (hard, hard)


def test_an_offer_of_another_protocol_is_nothing_to_warn_of(start: Start) -> None:
    server = start()
    for offered in ("h2c", "websocket"):
        asking = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": offered, "HTTP2-Settings": "AAEAAEAAAAIAAAAA"}
        assert httpx.get(f"{server.url}/livez", headers=asking, timeout=WAIT).status_code == 200
    server.process.terminate()
    output, _ = server.process.communicate(timeout=WAIT)
    assert "GET /livez 200" in output
    assert "WARNING" not in output
