"""Real servers on real sockets for the tests of those that speak to one, real processes, and the wait for both."""

import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import uvicorn


@contextmanager
def serving(app: Any) -> Iterator[str]:
    """An ASGI application under uvicorn, on a thread; yields its URL."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, http="h11", log_level="warning", timeout_graceful_shutdown=5))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


Answer = tuple[int, dict[str, str], bytes]


class Scripted(ThreadingHTTPServer):
    """An HTTP server that answers as a function of the number of the request says; None cuts the connection.

    `requests` has the path, headers and body of each request.
    """

    daemon_threads = True

    def __init__(self, answer: Callable[[int], Answer | None], port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.answer = answer
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that has left is no error here."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Scripted

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append((self.path, dict(self.headers), body))
        answer = self.server.answer(len(self.server.requests) - 1)
        if answer is None:
            self.close_connection = True
            return
        status, headers, content = answer
        self.send_response_only(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@contextmanager
def scripted(answer: Callable[[int], Answer | None], port: int = 0) -> Iterator[Scripted]:
    """A Scripted server, running; port 0 is a free one."""
    with Scripted(answer, port) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def until(condition: Callable[[], object], seconds: float = 90) -> None:
    """Wait until it holds; so long only that a busy machine does not fail a test."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def heed_ctrl_c() -> None:
    """For preexec_fn: Ctrl-C ends the process, also where the suite runs in the background, which does not heed it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
