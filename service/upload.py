"""One request body -> the picture's bytes and the options beside it, never keeping more than the limit."""

import base64
import binascii
import json
import re
import string
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.types import Message, Receive

from service.errors import InputError
from service.images import too_many_bytes
from service.options import option_pairs

PICTURE_FIELDS = ("image", "file")

_FORM_OVERHEAD = 64 * 1024  # part headers, boundaries and options around the picture, in bytes
_MAX_FIELDS = 32
_CHARSETS = (b"utf-8", b"utf8", b"us-ascii", b"iso-8859-1")  # of names and options; some that Python has are slow
_MAX_COMMAS = 10_000  # in JSON, which has one between two values; base64 has none
_DATA_URI = re.compile(r"data:[\w.+/-]{0,255}(;[\w=.+-]{1,255}){0,8};base64,", re.ASCII)


@dataclass(frozen=True)
class Upload:
    """The picture file as sent (or where to fetch it), and the options of query and body, not yet checked."""

    picture: bytes
    options: list[tuple[str, str]]
    url: str | None = None
    name: str = ""


async def read_upload(request: Request, max_bytes: int) -> Upload:
    """Read a multipart form, a JSON object, or any other body as the picture itself.

    In a form the picture is the file field `image` (or `file`), in JSON the data URI `image`, or `{"url": ...}`.
    Raises InputError with code too_many_bytes, missing_image, several_images, invalid_body or unsupported.
    """
    query = request.query_params.multi_items()
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        uploads = await read_uploads(request, max_bytes, 1)
        return uploads[0]
    if kind == "application/json":
        error = too_many_bytes(max_bytes)
        body = await within(request, max_bytes * 4 // 3 + _FORM_OVERHEAD, error).body()
        return _from_json(body, query)
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


async def _form(request: Request, max_files: int) -> FormData:
    """The parsed form; InputError for one that cannot be."""
    kind, parameters = parse_options_header(request.headers.get("content-type"))
    if kind != b"multipart/form-data":
        raise InputError("missing_image", "the body is no form: send multipart/form-data with files in the field image")
    if parameters.get(b"charset", b"utf-8").lower() not in _CHARSETS:
        raise InputError("unsupported", "the charset of the form is not supported; send UTF-8")
    limits = {"max_files": max_files, "max_fields": _MAX_FIELDS, "max_part_size": _FORM_OVERHEAD}
    try:
        return await _InMemory(request.headers, request.stream(), **limits).parse()
    except (MultiPartException, ValueError) as error:
        reason = getattr(error, "message", None) or str(error)
        raise InputError("invalid_body", f"the form cannot be read: {reason.rstrip('.')}") from None


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


def _from_json(body: bytes, query: list[tuple[str, str]]) -> Upload:
    if body.count(b",") > _MAX_COMMAS:  # everything would stand still while millions of values are read
        raise InputError("invalid_body", "the JSON has far more values than there are options")
    try:
        values: Any = json.loads(body)
    except (ValueError, RecursionError):
        raise InputError("invalid_body", "the body is not JSON, which its Content-Type says it is") from None
    if not isinstance(values, dict):
        raise InputError("invalid_body", 'the body must be a JSON object, as in {"image": "data:image/png;base64,..."}')
    image = values.pop("image", None)
    options = query + option_pairs(values)
    if isinstance(image, dict) and set(image) == {"url"} and isinstance(image["url"], str):
        return Upload(b"", options, url=image["url"])
    if not isinstance(image, str):
        raise InputError("missing_image", 'the body has no picture: set image to a data URI, or to {"url": ...}')
    start = _DATA_URI.match(image)
    if not start:
        raise InputError("missing_image", "image must be a data URI, as in data:image/png;base64,iVBORw0...")
    try:
        joined = image[start.end() :].encode("ascii").translate(None, string.whitespace.encode())
        return Upload(base64.b64decode(joined, validate=True), options)
    except (binascii.Error, ValueError):
        raise InputError("invalid_body", "the data URI in image is not valid base64") from None


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
