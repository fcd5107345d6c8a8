"""One request body -> the picture's bytes and the options beside it, never keeping more than the limit."""

import binascii
import io
import re
import string
import sys
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.types import Message, Receive

from service.errors import InputError
from service.images import too_many_bytes
from service.json_text import load_json
from service.options import option_pairs
from service.pipeline import in_pool
from service.settings import Settings

PICTURE_FIELDS = ("image", "file")

_FORM_OVERHEAD = 64 * 1024  # part headers, boundaries and options around the picture, in bytes
_MAX_FIELDS = 32
_CHARSETS = (b"utf-8", b"utf8", b"us-ascii", b"iso-8859-1")  # of names and options; some that Python has are slow
_MAX_COMMAS = 10_000  # in JSON, which has one between two values; base64 has none
_SHORT_JSON = 64 * 1024  # bytes, read on the event loop sooner than a thread would begin
_URI_HEAD = r"data:[\w.+/-]{0,255}(;[\w=.+-]{1,255}){0,8};base64,"
_DATA_URI = re.compile(_URI_HEAD, re.ASCII)
_HEADS = {  # what stands before a picture's base64, by the name of its member
    "image": re.compile(rb'"image"\s*:\s*"' + _URI_HEAD.encode()),
    "inputs": re.compile(rb'"inputs"\s*:\s*"(?:' + _URI_HEAD.encode() + rb")?"),
}
_BASE64_PIECE = 2**20  # characters decoded at once

Pairs = list[tuple[str, str]]


@dataclass(frozen=True)
class Upload:
    """The picture file as sent (or where to fetch it), and the options of query and body, not yet checked."""

    picture: bytes
    options: list[tuple[str, str]]
    url: str | None = None
    name: str = ""


async def read_upload(
    request: Request,
    settings: Settings,
    workers: ThreadPoolExecutor,
    read_json: Callable[[bytes, Pairs], Upload] | None = None,
) -> Upload:
    """Read a multipart form, a JSON object, or any other body as the picture itself.

    In a form the picture is the file field `image` (or `file`). JSON is read with the options of the query by
    `read_json`, `described` where none is given; long JSON by one of the `workers`.

    Raises InputError with code too_many_bytes, missing_image, several_images, invalid_body, unsupported or
    contradicting_options, and Refusal where no worker is free in time.
    """
    max_bytes = settings.max_bytes
    query = request.query_params.multi_items()
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        uploads = await read_uploads(request, max_bytes, 1)
        return uploads[0]
    if kind == "application/json":
        error = too_many_bytes(max_bytes)
        body = await within(request, max_bytes * 4 // 3 + _FORM_OVERHEAD, error).body()
        read = partial(read_json or described, body, query)
        if len(body) <= _SHORT_JSON:
            return read()
        return (await in_pool(workers, read, time.monotonic() + settings.max_timeout_ms / 1000))[0]
    return Upload(await within(request, max_bytes, too_many_bytes(max_bytes)).body(), query)


async def read_uploads(request: Request, max_bytes: int, max_items: int) -> list[Upload]:
    """Read a multipart form with up to `max_items` pictures of `max_bytes` each; all have the form's options.

    Raises InputError as `read_upload` does.
    """
    limit = max_items * max_bytes + _FORM_OVERHEAD
    total = InputError("too_many_bytes", f"the form is larger than the {limit} bytes allowed")
    bounded = within(request, limit, too_many_bytes(max_bytes) if max_items == 1 else total)
    pictures, options = _split(await _form(bounded, max_items + _MAX_FIELDS))
    if not pictures:
        raise InputError("missing_image", "the form has no picture: send a file in the field image")
    if len(pictures) > max_items:
        allowed = "one for each request" if max_items == 1 else f"at most {max_items}"
        raise InputError("several_images", f"the form has {len(pictures)} pictures: send {allowed}")
    options += request.query_params.multi_items()
    return [Upload(await file.read(), options, name=file.filename or "") for file in pictures]


class _InMemory(MultiPartParser):
    """Keeps files in memory, which the limit on the body bounds: what is sent is never written to a disk."""

    spool_max_size = sys.maxsize
    ended = False

    def on_end(self) -> None:
        """The closing boundary has come."""
        self.ended = True


async def _form(request: Request, max_files: int) -> FormData:
    """The parsed form; InputError for one that cannot be."""
    kind, parameters = parse_options_header(request.headers.get("content-type"))
    if kind != b"multipart/form-data":
        raise InputError("missing_image", "the body is no form: send multipart/form-data with files in the field image")
    if parameters.get(b"charset", b"utf-8").lower() not in _CHARSETS:
        raise InputError("unsupported", "the charset of the form is not supported; send UTF-8")
    boundary = parameters.get(b"boundary", b"")
    limits = {"max_files": max_files, "max_fields": _MAX_FIELDS, "max_part_size": _FORM_OVERHEAD}
    parser = _InMemory(request.headers, _from_boundary(request.stream(), b"--" + boundary), **limits)
    try:
        form = await parser.parse()
    except (MultiPartException, ValueError) as error:
        reason = getattr(error, "message", None) or str(error)
        raise InputError("invalid_body", f"the form cannot be read: {reason.rstrip('.')}") from None
    if not parser.ended:
        closing = ascii((b"--" + boundary + b"--").decode("latin-1"))
        raise InputError("invalid_body", f"the form ends early: its closing boundary {closing} is missing")
    return form


async def _from_boundary(stream: AsyncGenerator[bytes, None], boundary: bytes) -> AsyncGenerator[bytes, None]:
    """The form without the preamble that RFC 2046 lets stand before the first line that is its boundary."""
    held = b"\n"  # a boundary begins a line
    async for chunk in stream:
        held += chunk
        start = held.find(b"\n" + boundary)
        if start >= 0:
            yield held[start + 1 :]
            break
        held = held[-len(boundary) :]
    async for chunk in stream:
        yield chunk


def _split(form: FormData) -> tuple[list[UploadFile], list[tuple[str, str]]]:
    """The pictures and the options of a form."""
    pictures: list[UploadFile] = []
    options = []
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            if name not in PICTURE_FIELDS:
                raise InputError("unknown_option", f"file field {name[:64]!r} is not known; send the picture as image")
            if value.filename or value.size:  # browsers send an unused file field as a nameless empty file
                pictures.append(value)
        elif name in PICTURE_FIELDS:
            if value:
                raise InputError("missing_image", f"field {name} is text, not a file: with curl, -F {name}=@FILE")
        else:
            options.append((name, value))
    return pictures, options


def described(body: bytes, query: Pairs) -> Upload:
    """JSON whose `image` is a data URI, or `{"url": ...}`, with the options beside it. Raises as `read_upload` does."""
    members, span = _members(body, "image")
    options = query + option_pairs((name, value) for name, value in members if name != "image")
    image = _only("image", members)
    if not (isinstance(image, str) or _is_by_url(image)):
        raise InputError("missing_image", 'the body has no picture: set image to a data URI, or to {"url": ...}')
    if _is_by_url(image):
        return Upload(b"", options, url=image[0][1])
    head = _DATA_URI.match(image)
    if not head:
        raise InputError("missing_image", "image must be a data URI, as in data:image/png;base64,iVBORw0...")
    return Upload(_picture("image", body, span, image, head.end()), options)


def with_inputs(body: bytes, query: Pairs) -> Upload:
    """JSON as Hugging Face's clients send it: base64 in `inputs`, with or without the head of a data URI, and the
    options in `parameters`; `options`, about their own service, are passed over. Raises as `read_upload` does.
    """
    members, span = _members(body, "inputs")
    unknown = [name for name, _ in members if name not in ("inputs", "parameters", "options")]
    if unknown:
        raise InputError("unknown_option", f"unknown member {unknown[0][:64]!r}; there are inputs and parameters")
    inputs, parameters = _only("inputs", members), _only("parameters", members)
    if not isinstance(inputs, str):
        raise InputError("missing_image", "the body has no picture: set inputs to the file in base64")
    if parameters is not None and not isinstance(parameters, tuple):
        raise InputError("invalid_body", "parameters must be a JSON object")
    head = _DATA_URI.match(inputs)
    picture = _picture("inputs", body, span, inputs, head.end() if head else 0)
    return Upload(picture, query + option_pairs(parameters or ()))


def _members(body: bytes, name: str) -> tuple[tuple[tuple[str, Any], ...], tuple[int, int] | None]:
    """The members of an object in JSON, and what `_taken_apart` says of the base64 in that name. Raises InputError."""
    text, span = _taken_apart(body, name)
    if text.count(b",") > _MAX_COMMAS:  # everything would stand still while millions of values are read
        raise InputError("invalid_body", "the JSON has far more values than there are options")
    try:
        members: Any = load_json(text, object_pairs_hook=tuple)  # which lists are not, and which keeps what came twice
    except (ValueError, RecursionError):
        raise InputError("invalid_body", "the body is not JSON, which its Content-Type says it is") from None
    if not isinstance(members, tuple):
        raise InputError("invalid_body", f'the body must be a JSON object, as in {{"{name}": ...}}')
    return members, span


def _only(name: str, members: tuple[tuple[str, Any], ...]) -> Any:
    """The member of this name, None where there is none. Raises InputError for two that differ."""
    values = [value for other, value in members if other == name and value is not None]
    if any(value != values[0] for value in values):
        raise InputError("contradicting_options", f"{name} is given twice, and not the same")
    return values[0] if values else None


def _picture(name: str, body: bytes, span: tuple[int, int] | None, text: str, start: int) -> bytes:
    """The base64 of a member, which begins at `start` of its text where `span` does not tell its place in the body."""
    try:
        if span is None:
            return _decoded(text.encode("ascii"), start, len(text), string.whitespace)
        return _decoded(body, *span, blanks=" ")  # all else must be escaped in a string of JSON
    except ValueError:
        raise InputError("invalid_body", f"the base64 in {name} is not valid") from None


def _is_by_url(image: Any) -> bool:
    return isinstance(image, tuple) and [name for name, _ in image] == ["url"] and isinstance(image[0][1], str)


def _taken_apart(body: bytes, name: str) -> tuple[bytes, tuple[int, int] | None]:
    """The JSON without the base64 in the member of this name, and where that begins and ends in the body; the whole
    body and None where bytes alone do not tell.

    Python's lock is held for as long as a string in JSON is walked.
    """
    head = _HEADS[name].search(body)
    if head is None or b"\\" in body:
        return body, None
    start = head.end()
    end = body.find(b'"', start)
    rest = body[:start] + body[end:]
    if end < 0 or rest.count(f'"{name}"'.encode()) > 1:
        return body, None
    return rest, (start, end)


def _decoded(text: bytes, start: int, end: int, blanks: str) -> bytes:
    """The base64 from `start` to `end`, blanks passed over -> its bytes. Between two pieces other threads have a turn.

    Raises ValueError for anything else.
    """
    padding = text.find(b"=", start, end)
    if padding >= 0 and text[padding:end].translate(None, blanks.encode()) not in (b"=", b"=="):
        raise ValueError("padding before the end, which might be that of a piece")
    decoded, rest = io.BytesIO(), b""
    for begin in range(start, end, _BASE64_PIECE):
        rest += text[begin : min(begin + _BASE64_PIECE, end)].translate(None, blanks.encode())
        whole = len(rest) - len(rest) % 4
        decoded.write(binascii.a2b_base64(rest[:whole], strict_mode=True))
        rest = rest[whole:]
    if rest:
        raise ValueError("cut short")
    return decoded.getvalue()


def within(request: Request, limit: int, error: InputError) -> Request:
    """The request, whose body raises `error` as soon as it is, or says it is, longer than `limit` bytes."""
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        raise error
    return Request(request.scope, _bounded(request.receive, limit, error))


def _bounded(receive: Receive, limit: int, error: InputError) -> Callable[[], Any]:
    """`receive` that raises `error` once the body has passed `limit` bytes; the server drops what still comes."""
    seen = 0

    async def receive_bounded() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > limit:
            raise error
        return message

    return receive_bounded
