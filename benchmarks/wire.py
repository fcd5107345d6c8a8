"""HTTP by hand: requests as bytes, well made or not, and what every answer of the service has to be."""

import http.client
import io
import json
import socket
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from PIL import Image

from service.errors import STATUS_OF_CODE

Headers = Sequence[tuple[str, str]]

_WINDOW_BITS = {"gzip": 31, "deflate": 15}
_NOT_HTTP = b"Invalid HTTP request received."  # what uvicorn says, before the service sees anything


@dataclass(frozen=True)
class Request:
    """`raw` is all that goes over the connection. `name` says what is wrong with it.

    `due`: whether an answer is; where the body never becomes complete or the framing is broken, the server may as well
    close. `ends`: whether the client closes its side after sending, so that the server does not wait for the rest.
    `leaves_after`: the seconds after which it leaves without having read anything, None for one that waits.
    """

    name: str
    raw: bytes
    due: bool = True
    ends: bool = False
    leaves_after: float | None = None

    @property
    def method(self) -> str:
        """The first word."""
        return self.raw[:16].partition(b" ")[0].decode("latin-1")

    @property
    def path(self) -> str:
        """The second word, without the query; empty where there is none."""
        words = self.raw.split(b" ", 2)
        return words[1].decode("latin-1").partition("?")[0] if len(words) > 1 else ""


@dataclass(frozen=True)
class Answer:
    """One answer; `seconds` from the first byte sent to the last received."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes
    seconds: float

    @property
    def code(self) -> str:
        """The code of an error; for other answers what kind of body they have."""
        kind = self.headers.get_content_type() if self.headers.get("content-type") else "nothing"
        if self.status < 400:
            return kind
        try:
            error = json.loads(self.body)["error"]
            return error["code"] if isinstance(error, dict) else "(v2)"
        except (ValueError, LookupError, TypeError):
            return kind


def request_bytes(
    method: str, target: str, headers: Headers = (), body: bytes = b"", *, length: bool = True, host: bool = True
) -> bytes:
    """A request of HTTP/1.1; what is in the headers is taken as it is. Text is sent as Latin-1."""
    lines = [f"{method} {target} HTTP/1.1"]
    if host:
        lines.append("Host: 127.0.0.1")
    lines += [f"{name}: {value}" for name, value in headers]
    if length:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1", "replace") + body


def form(
    fields: Sequence[tuple[str, str]], files: Sequence[tuple[str, str, str, bytes]], boundary: str = "b0undary"
) -> tuple[str, bytes]:
    """Content-Type and body of a multipart form. A file is (field, filename, content type, content)."""
    parts = [f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
             for name, value in fields]  # fmt: skip
    for name, filename, kind, content in files:
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"; filename="{filename}"\r\n'
        parts.append(f"{head}Content-Type: {kind}\r\n\r\n".encode() + content + b"\r\n")
    return f"multipart/form-data; boundary={boundary}", b"".join(parts) + f"--{boundary}--\r\n".encode()


def address(url: str) -> tuple[str, int]:
    """Host and port of a URL."""
    parts = urlsplit(url)
    return parts.hostname or "127.0.0.1", parts.port or 80


def exchange(place: tuple[str, int], request: Request, timeout: float = 300) -> Answer | None:
    """Send a request on a connection of its own; None where it closes without an answer.

    Raises TimeoutError where nothing comes, and http.client.HTTPException for what is no HTTP.
    """
    started = time.perf_counter()
    with socket.create_connection(place, timeout) as connection:
        try:
            connection.sendall(request.raw)
            if request.ends:
                connection.shutdown(socket.SHUT_WR)
        except ConnectionError:
            pass  # it may have answered before it closed
        if request.leaves_after is not None:
            time.sleep(request.leaves_after)
            return None
        response = http.client.HTTPResponse(connection, method=request.method)
        try:
            response.begin()
            body = response.read()
        except (ConnectionError, http.client.RemoteDisconnected):
            return None
        return Answer(response.status, response.headers, body, time.perf_counter() - started)


def faults(request: Request, answer: Answer | None) -> list[str]:
    """What an answer lacks to be one of the service's.

    The status must be below 500, or 504 where the request set a time for itself.
    """
    if answer is None:
        return ["no answer"] if request.due else []
    in_vain = answer.status == 504 and b"timeout" in request.raw
    found = [f"status {answer.status}"] if answer.status >= 500 and not in_vain else []
    if answer.body == _NOT_HTTP and answer.status == 400:
        return found
    if not answer.headers.get("x-request-id"):
        found.append("no X-Request-ID")
    if answer.status in (429, 503) and not answer.headers.get("retry-after", "").isdecimal():
        found.append("no Retry-After")
    if request.method == "HEAD" or 300 <= answer.status < 400:
        return found
    kind = answer.headers.get_content_type()
    try:
        if kind.endswith("json"):
            found += _faults_of_json(request, answer, json.loads(_inflated(answer)))
        elif kind.startswith("image/") and "svg" not in kind:
            with Image.open(io.BytesIO(answer.body)) as image:
                image.load()
        elif answer.status >= 400:
            found.append(f"an error as {kind}")
    except (ValueError, OSError, zlib.error) as error:
        found.append(f"not {kind}: {error}")
    return found


def _inflated(answer: Answer) -> bytes:
    encoding = answer.headers.get("content-encoding")
    return zlib.decompress(answer.body, _WINDOW_BITS[encoding]) if encoding else answer.body


def _faults_of_json(request: Request, answer: Answer, body: object) -> list[str]:
    if answer.status < 400:
        return []
    error = body.get("error") if isinstance(body, dict) else None
    if isinstance(error, str):
        return [] if error and request.path.startswith("/v2") else ["an error without a code"]
    if not isinstance(error, dict) or not all(isinstance(error.get(key), str) for key in ("code", "message")):
        return ["an error without code and message"]
    found = [] if error.get("request_id") == answer.headers.get("x-request-id") else ["two request ids"]
    if STATUS_OF_CODE.get(error["code"], answer.status) != answer.status:
        found.append(f"code {error['code']} with status {answer.status}")
    return found


@dataclass
class Failure:
    """A request whose answer was not as it must be."""

    number: int
    request: Request
    faults: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.number} {self.request.name}: {', '.join(self.faults)}: {self.request.raw[:300]!r}"
