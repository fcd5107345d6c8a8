"""A client of the service, blocking and async. It needs httpx, numpy and Pillow, and nothing else of this package.

    from service.client import Client

    with Client("http://127.0.0.1:8000") as client:
        answer = client.segment("street.jpg", scales=[0.75, 1, 1.25], flip=True)
        answer.mask                     # uint8 (H, W), the class of every pixel
        answer.present                  # ["road", "sky", ...], the likeliest first

    async with AsyncClient("http://127.0.0.1:8000") as client:
        answer = await client.segment(array)

    for answer in client.segment_many(paths, concurrency=4):
        ...                             # a Segmentation, or the SegmentError of that picture alone

Segmenting changes nothing on the server, so a request is sent again when the server is too busy (429) or not ready
(503), after the time that its Retry-After names; and when it names none, the connection fails, or a proxy says that
its server failed (a 5xx that is not in the service's own words), after pauses that double, a few times. All attempts
together end at the client's timeout; the blocking client looks at it between two reads or writes, and gives up one that
stalls after as long again at most.
"""

import asyncio
import base64
import io
import json
import os
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, NamedTuple, Self

try:
    import httpx
except ImportError:
    raise ImportError(
        "the client needs httpx: pip install 'httpx>=0.27,<1' (service/requirements-client.txt)"
    ) from None
import numpy as np
from PIL import Image

Picture = str | os.PathLike[str] | bytes | bytearray | memoryview | np.ndarray | Image.Image
"""A file by its path, its bytes, pixels uint8 (H, W), (H, W, 3) or (H, W, 4), or a Pillow picture as it is."""

RETRIED = (429, 503)
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 8.0  # seconds between attempts where the server names none
JITTER = 0.1  # a pause that was named is longer by up to this share, lest all who were refused come back together

_CONNECT_SECONDS = 5.0
_PART_BYTES = 64 * 1024  # sent between two looks at the time
_LONGEST_WAIT = 86_400.0  # seconds; a socket takes no infinite time
_NOT_OURS = (ValueError, LookupError, TypeError, AttributeError, RecursionError)  # what reading another's answer raises
_RETRIED_FAILURES = (httpx.NetworkError, httpx.RemoteProtocolError, httpx.TimeoutException)
_CONNECTIONS = httpx.Limits(max_connections=None, max_keepalive_connections=32)
_SAVED_AS = {"CMYK": "RGB", "YCbCr": "RGB", "LAB": "RGB", "HSV": "RGB", "RGBX": "RGB", "RGBa": "RGBA", "PA": "RGBA"}


class SegmentError(Exception):
    """A picture was not segmented.

    `code` is the server's word (truncated, too_many_pixels, invalid_option, ...) or one of the client's: unreadable (no
    such file, or one that Pillow finds damaged), unreachable, deadline (no answer within the timeout), bad_answer
    (whatever is there is not this service), http_NNN (an error that is not the service's, as from a proxy). `status` is
    that of the last answer, None where there was none; `request_id` names it in the server's log.
    """

    def __init__(self, code: str, message: str, status: int | None = None, request_id: str | None = None) -> None:
        super().__init__(code, message, status, request_id)
        self.code = code
        self.message = message
        self.status = status
        self.request_id = request_id

    def __str__(self) -> str:
        return self.message


class Presence(NamedTuple):
    """How much a class is in the picture: its score, and its share of the mask in pixels and as a fraction."""

    name: str
    id: int
    score: float
    present: bool
    pixels: int
    fraction: float


@dataclass(frozen=True)
class Segmentation:
    """What is where in a picture.

    `mask` is uint8 (H, W), uint16 above 255 classes, of the picture's size after its EXIF orientation; `presence` has
    every class, the highest score first; `timing_ms` is the server's account of its phases; `answer` is all that the
    server said, without the mask.
    """

    mask: np.ndarray
    presence: list[Presence]
    timing_ms: dict[str, float]
    request_id: str
    answer: dict[str, Any]

    @property
    def present(self) -> list[str]:
        """The names of the classes that are in the picture."""
        return [row.name for row in self.presence if row.present]


class Client:
    """A blocking client, which several threads may share.

    `url` is the server's, with or without /segment; `timeout` is in seconds, for one picture with all attempts;
    `retries` is how often a request is sent again without the server having named a time; `headers` go with every
    request, say an API key.
    """

    def __init__(
        self, url: str, *, timeout: float = 60, retries: int = 5, headers: Mapping[str, str] | None = None
    ) -> None:
        self._timeout, self._retries = timeout, retries
        self._http = httpx.Client(base_url=_base(url), headers=headers, limits=_CONNECTIONS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def segment(self, picture: Picture, **options: Any) -> Segmentation:
        """Segment one picture with the options of POST /segment: scales, flip, ...

        Raises SegmentError where that fails; ValueError and TypeError for what is neither picture nor option.
        """
        attempts = _Attempts(self._timeout, self._retries)
        content, params = _file(picture), _params(options)
        pause: float | None
        while True:
            try:
                reply = self._post(content, params, attempts)
            except httpx.RequestError as error:
                pause = attempts.pause_after_failure(error)
            else:
                pause = attempts.pause_after(reply)
                if pause is None:
                    return _read(reply)
            time.sleep(pause)

    def _post(self, content: bytes, params: dict[str, str], attempts: "_Attempts") -> "_Reply":
        """The whole answer; httpx's timeouts are for each step of it, so the time is looked at between steps too."""
        timeout = httpx.Timeout(attempts.left(), connect=min(attempts.left(), _CONNECT_SECONDS))
        parts, length = _in_parts(content, attempts), {"Content-Length": str(len(content))}
        with self._http.stream(
            "POST", "segment", content=parts, headers=length, params=params, timeout=timeout
        ) as response:
            body = bytearray()
            for chunk in response.iter_bytes():
                body += chunk
                attempts.left()
        return _Reply(response.status_code, response.reason_phrase, response.headers, bytes(body))

    def segment_many(
        self, pictures: Iterable[Picture], *, concurrency: int = 4, **options: Any
    ) -> Iterator[Segmentation | SegmentError]:
        """Segment pictures, so many at a time, in their order; one that fails yields its SegmentError.

        Pictures are taken from the iterable as they are needed.
        """

        def one(picture: Picture) -> Segmentation | SegmentError:
            try:
                return self.segment(picture, **options)
            except SegmentError as error:
                return error

        running: deque[Future[Segmentation | SegmentError]] = deque()
        _check_concurrency(concurrency)
        with ThreadPoolExecutor(concurrency) as pool:
            try:
                for picture in pictures:
                    running.append(pool.submit(one, picture))
                    if len(running) > concurrency:
                        yield running.popleft().result()
                while running:
                    yield running.popleft().result()
            finally:
                pool.shutdown(cancel_futures=True)


class AsyncClient:
    """The same for asyncio; its arguments are those of Client."""

    def __init__(
        self, url: str, *, timeout: float = 60, retries: int = 5, headers: Mapping[str, str] | None = None
    ) -> None:
        self._timeout, self._retries = timeout, retries
        self._http = httpx.AsyncClient(
            base_url=_base(url),
            headers=headers,
            limits=_CONNECTIONS,
            timeout=httpx.Timeout(None, connect=_CONNECT_SECONDS),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def segment(self, picture: Picture, **options: Any) -> Segmentation:
        """Segment one picture, as Client.segment does; files and masks are read beside the event loop."""
        attempts = _Attempts(self._timeout, self._retries)
        content, params = await asyncio.to_thread(_file, picture), _params(options)
        pause: float | None
        while True:
            try:
                async with asyncio.timeout(attempts.left()):
                    response = await self._http.post("segment", content=content, params=params)
            except TimeoutError:
                raise attempts.deadline() from None
            except httpx.RequestError as error:
                pause = attempts.pause_after_failure(error)
            else:
                reply = _Reply(response.status_code, response.reason_phrase, response.headers, response.content)
                pause = attempts.pause_after(reply)
                if pause is None:
                    return await asyncio.to_thread(_read, reply)
            await asyncio.sleep(pause)

    async def segment_many(
        self, pictures: Iterable[Picture], *, concurrency: int = 4, **options: Any
    ) -> AsyncIterator[Segmentation | SegmentError]:
        """Segment pictures, as Client.segment_many does."""
        _check_concurrency(concurrency)
        free = asyncio.Semaphore(concurrency)

        async def one(picture: Picture) -> Segmentation | SegmentError:
            async with free:
                try:
                    return await self.segment(picture, **options)
                except SegmentError as error:
                    return error

        running: deque[asyncio.Task[Segmentation | SegmentError]] = deque()
        try:
            for picture in pictures:
                running.append(asyncio.create_task(one(picture)))
                if len(running) > concurrency:
                    yield await running.popleft()
            while running:
                yield await running.popleft()
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)


class _Reply(NamedTuple):
    status: int
    reason: str
    headers: httpx.Headers
    body: bytes

    @property
    def request_id(self) -> str | None:
        return self.headers.get("x-request-id")


class _Attempts:
    """The attempts at one picture: when the next one may be made, and when there is to be none."""

    def __init__(self, timeout: float, retries: int) -> None:
        self._timeout, self._retries = timeout, retries
        self._end = time.monotonic() + timeout
        self._unnamed = 0

    def left(self) -> float:
        """Seconds until the deadline, or for one wait; raises SegmentError when there are none."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise self.deadline()
        return min(left, _LONGEST_WAIT)

    def deadline(self) -> SegmentError:
        """The error for an answer that did not come in time."""
        return SegmentError("deadline", f"the server did not answer within {self._timeout:g} s")

    def pause_after(self, reply: _Reply) -> float | None:
        """Seconds to wait after this answer; None where it is the last one. Raises its SegmentError on giving up."""
        if reply.status not in RETRIED and not _from_a_proxy(reply):
            return None
        return self._pause(_retry_after(reply.headers), _error(reply))

    def pause_after_failure(self, error: httpx.RequestError) -> float:
        """Seconds to wait after a request without an answer. Raises SegmentError on giving up."""
        reason = str(error) or type(error).__name__
        final = SegmentError("unreachable", f"no answer from {error.request.url.copy_with(query=None)}: {reason}")
        if not isinstance(error, _RETRIED_FAILURES):
            raise final from error
        self.left()
        return self._pause(None, final)

    def _pause(self, named: float | None, final: SegmentError) -> float:
        if named:
            pause = named * random.uniform(1, 1 + JITTER)
        else:
            if self._unnamed == self._retries:
                raise final
            pause = min(FIRST_PAUSE * 2**self._unnamed, LONGEST_PAUSE) * random.uniform(0.5, 1)
            self._unnamed += 1
        if time.monotonic() + pause >= self._end:
            raise final
        return pause


def _retry_after(headers: httpx.Headers) -> float | None:
    """Seconds from a Retry-After header in either form: a number, or a date, which is taken by the server's clock."""
    text = headers.get("retry-after", "").strip()
    if text.isdecimal():
        return float(text)
    until = _date(text)
    if until is None:
        return None
    return max((until - (_date(headers.get("date", "")) or datetime.now(UTC))).total_seconds(), 0)


def _date(text: str) -> datetime | None:
    try:
        date = parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return None
    return date if date.tzinfo else date.replace(tzinfo=UTC)


def _in_parts(content: bytes, attempts: _Attempts) -> Iterator[bytes]:
    """What is sent, while there is time."""
    for start in range(0, len(content), _PART_BYTES):
        attempts.left()
        yield content[start : start + _PART_BYTES]


def _check_concurrency(concurrency: int) -> None:
    if concurrency < 1:
        raise ValueError(f"concurrency is at least 1, not {concurrency}")


def _base(url: str) -> str:
    try:
        parts = httpx.URL(url)
    except httpx.InvalidURL:
        parts = httpx.URL()
    if parts.scheme not in ("http", "https") or not parts.host:
        raise ValueError(f"the server's URL is as in http://127.0.0.1:8000, not {url!r}")
    return url.rstrip("/").removesuffix("/segment")


def _params(options: Mapping[str, Any]) -> dict[str, str]:
    """Options as a query says them; None is an option that is not given."""
    if "format" in options:
        raise ValueError("the client reads format json itself; for the others, POST to /segment with httpx or curl")
    if options.get("dry_run"):
        raise ValueError("the client gives back masks, and dry_run has none; POST to /segment with httpx or curl")
    return {name: _text(value) for name, value in options.items() if value is not None}


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, (bool, np.bool_)):
        return str(value).lower()
    if isinstance(value, Iterable):
        return ",".join(map(_text, value))
    return str(value)


def _file(picture: Picture) -> bytes:
    """A picture as the bytes of a file: pixels are packed as PNG, without loss."""
    if isinstance(picture, (bytes, bytearray, memoryview)):
        return bytes(picture)
    if isinstance(picture, np.ndarray):
        channels = picture.shape[2] if picture.ndim == 3 else 1
        if picture.dtype != np.uint8 or picture.ndim not in (2, 3) or channels not in (1, 3, 4) or not picture.size:
            raise ValueError(f"pixels are uint8 (H, W), (H, W, 3) or (H, W, 4), not {picture.dtype} {picture.shape}")
        picture = Image.fromarray(picture[:, :, 0] if picture.ndim == 3 and channels == 1 else picture)
    if isinstance(picture, Image.Image):
        if picture.mode in ("I", "F"):
            raise ValueError(f"in a picture of mode {picture.mode} nothing says which value is white; convert it to L")
        try:
            picture.load()
        except (OSError, SyntaxError) as error:
            raise SegmentError("unreadable", f"Pillow cannot read the picture's file: {error}") from error
        buffer = io.BytesIO()
        mode = _SAVED_AS.get(picture.mode, picture.mode)
        try:
            (picture if mode == picture.mode else picture.convert(mode)).save(buffer, "PNG", compress_level=1, exif=b"")
        except OSError as error:
            raise ValueError(f"a picture of mode {picture.mode} cannot be sent; convert it to RGB") from error
        return buffer.getvalue()
    if isinstance(picture, (str, os.PathLike)):
        try:
            return Path(picture).read_bytes()
        except OSError as error:
            raise SegmentError("unreadable", f"{os.fspath(picture)} cannot be read: {error.strerror}") from error
    raise TypeError(f"a picture is a path, bytes, a numpy array or a Pillow image, not {type(picture).__name__}")


def _read(reply: _Reply) -> Segmentation:
    """The answer 200 as a Segmentation; any other raises its SegmentError."""
    if reply.status != httpx.codes.OK:
        raise _error(reply)
    try:
        answer = json.loads(reply.body)
        with Image.open(io.BytesIO(base64.b64decode(answer.pop("mask")["data"])), formats=["PNG"]) as png:
            mask = np.array(png)
        presence = [
            Presence(row["class"], row["id"], row["score"], row["present"], row["pixels"], row["fraction"])
            for row in answer["presence"]
        ]
        return Segmentation(mask, presence, answer["timing_ms"], answer["id"], answer)
    except (*_NOT_OURS, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise SegmentError(
            "bad_answer",
            "the server answered 200 but not as EncNet Serve does; is it another server's URL?",
            reply.status,
            reply.request_id,
        ) from error


def _from_a_proxy(reply: _Reply) -> bool:
    """Whether this is the error of something in front of the service, as when the process behind it was killed."""
    return reply.status >= httpx.codes.INTERNAL_SERVER_ERROR and _error(reply).code == f"http_{reply.status}"


def _error(reply: _Reply) -> SegmentError:
    status, request_id = reply.status, reply.request_id
    try:
        fault = json.loads(reply.body)["error"]
        return SegmentError(str(fault["code"]), str(fault["message"]), status, fault.get("request_id", request_id))
    except _NOT_OURS:
        said = f"the server answered {status} {reply.reason}".rstrip()
        return SegmentError(f"http_{status}", said, status, request_id)
