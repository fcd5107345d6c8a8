"""One request body -> the picture's bytes and the options beside it, never keeping more than the limit."""

from dataclasses import dataclass

from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.types import Message, Receive

from service.errors import InputError
from service.images import too_many_bytes

PICTURE_FIELDS = ("image", "file")

_FORM_OVERHEAD = 64 * 1024  # part headers, boundaries and options around the picture, in bytes
_MAX_FIELDS = 32


@dataclass(frozen=True)
class Upload:
    """The picture file as sent, and the options of query and form as (name, text) pairs, not yet checked."""

    picture: bytes
    options: list[tuple[str, str]]


async def read_upload(request: Request, max_bytes: int) -> Upload:
    """Read a multipart form with the picture in `image` or `file`, or any other body as the picture itself.

    Raises InputError with code too_many_bytes, missing_image or several_images, and starlette's HTTPException (400) for
    a form that cannot be parsed.
    """
    query = request.query_params.multi_items()
    is_form = request.headers.get("content-type", "").lower().startswith("multipart/form-data")
    limit = max_bytes + _FORM_OVERHEAD if is_form else max_bytes
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        raise too_many_bytes(max_bytes)
    bounded = Request(request.scope, _bounded(request.receive, limit, too_many_bytes(max_bytes)))
    if not is_form:
        return Upload(await bounded.body(), query)
    async with bounded.form(max_files=_MAX_FIELDS, max_fields=_MAX_FIELDS, max_part_size=_FORM_OVERHEAD) as form:
        pictures: list[UploadFile] = []
        options = query
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                if name not in PICTURE_FIELDS:
                    raise InputError(
                        "unknown_option", f"file field {name[:64]!r} is not known; send the picture as image"
                    )
                if value.filename or value.size:  # browsers send an unused file field as a nameless empty file
                    pictures.append(value)
            elif name in PICTURE_FIELDS:
                if value:
                    raise InputError("missing_image", f"field {name} is text, not a file: with curl, -F {name}=@FILE")
            else:
                options.append((name, value))
        if not pictures:
            raise InputError("missing_image", "the form has no picture: send a file in the field image")
        if len(pictures) > 1:
            raise InputError("several_images", f"the form has {len(pictures)} pictures: send one for each request")
        return Upload(await pictures[0].read(), options)


def _bounded(receive: Receive, limit: int, error: InputError) -> Receive:
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
