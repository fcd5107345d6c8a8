"""The HTTP face of the engine: routes, error bodies, and threads so that no picture blocks the event loop."""

import base64
import logging
import os
import re
import time
import uuid
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from typing import Any, TypeVar

import anyio.to_thread
import onnxruntime
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import __version__
from service.answers import (
    ClassEntry,
    ClassesAnswer,
    ErrorAnswer,
    Fault,
    HealthAnswer,
    HealthModel,
    ImageFacts,
    Mask,
    ModelIdentity,
    SegmentAnswer,
    Timings,
)
from service.engine import Engine
from service.errors import InputError
from service.images import decode
from service.options import Options, parse_options
from service.page import page_router
from service.presence import presence_rows
from service.render import mask_png
from service.settings import Settings
from service.upload import read_upload

T = TypeVar("T")

STATUS_OF_CODE = {
    "empty": 400,
    "missing_image": 400,
    "several_images": 400,
    "truncated": 400,
    "too_many_bytes": 413,
    "too_many_pixels": 413,
    "not_an_image": 415,
    "unsupported": 415,
    "unknown_option": 422,
    "invalid_option": 422,
    "contradicting_options": 422,
}

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")

_log = logging.getLogger(__name__)


def create_app(settings: Settings | None = None, engine: Engine | None = None) -> FastAPI:
    """The ASGI application; the engine is loaded from the settings and warmed up unless a ready one is given.

    Raises engine.ModelError where the model cannot be served.
    """
    settings = settings or Settings()
    if engine is None:
        engine = Engine(settings.model, settings.device, settings.threads)
        engine.warm_up()
    identity = ModelIdentity(name=engine.metadata.name, sha256=engine.sha256)
    # Decoding and encoding may use every core; the device takes one picture at a time.
    workers = anyio.CapacityLimiter(os.cpu_count() or 1)
    device = anyio.CapacityLimiter(1)

    app = FastAPI(
        title="EncNet Serve",
        version=__version__,
        description=_description(engine, settings),
        docs_url="/docs",
        redoc_url=None,
    )
    app.add_middleware(RequestContext)
    app.add_exception_handler(InputError, _input_error)
    app.add_exception_handler(HTTPException, _http_exception)
    app.add_exception_handler(RequestValidationError, _validation_error)

    app.include_router(page_router(settings, engine.metadata))

    @app.get("/healthz", summary="Is the service up, and with which model?", tags=["service"])
    async def healthz() -> HealthAnswer:
        metadata = engine.metadata
        return HealthAnswer(
            version=__version__,
            onnxruntime=onnxruntime.__version__,
            device=engine.device,
            model=HealthModel(
                **identity.model_dump(),
                checkpoint_sha256=metadata.checkpoint_sha256,
                classes=len(metadata.classes),
                base_size=metadata.base_size,
                scales=list(metadata.scales),
                flip=metadata.flip,
                description=metadata.description,
                licence=metadata.licence,
            ),
        )

    @app.get("/classes", summary="Names, ids and colours of the classes", tags=["segmentation"])
    async def classes() -> ClassesAnswer:
        pairs = zip(engine.metadata.classes, engine.metadata.palette, strict=True)
        entries = [ClassEntry(id=index, name=name, color=color) for index, (name, color) in enumerate(pairs)]
        return ClassesAnswer(model=identity, classes=entries)

    @app.post(
        "/segment",
        summary="Segment one picture",
        description=_SEGMENT_DESCRIPTION,
        tags=["segmentation"],
        responses=_segment_responses(),
        openapi_extra=_segment_request(),
    )
    async def segment(request: Request) -> Response:
        started = time.perf_counter()
        upload = await read_upload(request, settings.max_bytes)
        options = parse_options(upload.options, settings)
        limits = {"max_bytes": settings.max_bytes, "max_pixels": settings.max_pixels}
        picture, decode_wait, decode_ms = await _in_thread(workers, partial(decode, upload.picture, **limits))
        result, device_wait, _ = await _in_thread(
            device, partial(engine.segment, picture.pixels, options.scales, options.flip)
        )
        rows = presence_rows(result.mask, result.presence, engine.metadata.classes, settings.threshold)
        png, encode_wait, encode_ms = await _in_thread(workers, partial(mask_png, result.mask, engine, rows))
        timings = Timings(
            decode=decode_ms,
            queue=decode_wait + device_wait + encode_wait,
            infer=result.infer_ms,
            encode=encode_ms,
            total=(time.perf_counter() - started) * 1000,
        )
        phases = timings.model_dump().items()
        headers = {"Server-Timing": ", ".join(f"{phase};dur={ms:.2f}" for phase, ms in phases), "Vary": "Accept"}
        if _wants_png(options, request):
            return Response(png, media_type="image/png", headers=headers)
        answer = SegmentAnswer(
            id=request.state.request_id,
            model=identity,
            image=ImageFacts(
                width=picture.width, height=picture.height, exif_applied=picture.exif_applied, mode=picture.mode
            ),
            scales=list(result.scales),
            flip=result.flip,
            mask=Mask(data=base64.b64encode(png).decode("ascii")),
            presence=rows,
            timing_ms=timings,
        )
        return Response(answer.model_dump_json(), media_type="application/json", headers=headers)

    return app


async def _in_thread(limiter: anyio.CapacityLimiter, work: Callable[[], T]) -> tuple[T, float, float]:
    """Run `work` on a thread; returns its result, how long it waited for the limiter and how long it ran, in ms."""
    asked = time.perf_counter()

    def timed() -> tuple[T, float, float]:
        begun = time.perf_counter()
        result = work()
        return result, (begun - asked) * 1000, (time.perf_counter() - begun) * 1000

    return await anyio.to_thread.run_sync(timed, limiter=limiter)


class RequestContext:
    """Middleware: every request has an id, every answer carries it, and an unforeseen failure is logged under it.

    A client's own X-Request-ID is kept where it is at most 128 letters, digits and `._:-`; otherwise one is made.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope)
        given = request.headers.get("x-request-id", "")
        request.state.request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        answering = False

        async def send_with_id(message: Message) -> None:
            nonlocal answering
            if message["type"] == "http.response.start":
                answering = True
                MutableHeaders(scope=message)["X-Request-ID"] = request.state.request_id
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except ClientDisconnect:
            _log.info("request %s: the client left before its body was read", request.state.request_id)
        except Exception:
            _log.exception("request %s failed", request.state.request_id)
            if not answering:
                message = "the service failed; its log has the reason under this request_id"
                await _error(request, 500, "internal_error", message)(scope, receive, send_with_id)


def _error(request: Request, status: int, code: str, message: str, headers: Any = None) -> Response:
    body = ErrorAnswer(error=Fault(code=code, message=message, request_id=request.state.request_id))
    return JSONResponse(body.model_dump(), status, headers)


async def _input_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, InputError)
    return _error(request, STATUS_OF_CODE[error.code], error.code, error.message)


async def _http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = HTTPStatus(error.status_code).phrase.lower().replace(" ", "_")
    message = {
        404: f"there is nothing at {request.url.path}; /docs lists what there is",
        405: f"{request.method} is not possible at {request.url.path}",
    }.get(error.status_code, str(error.detail))
    return _error(request, error.status_code, code, message, error.headers)


async def _validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
    return _error(request, 422, "invalid_request", "; ".join(faults))


def _wants_png(options: Options, request: Request) -> bool:
    """`format` decides; without it, the Accept header, where PNG has to be preferred to JSON."""
    if options.format is not None:
        return options.format == "png"
    accept = request.headers.get("accept", "*/*")
    return _quality(accept, "image/png") > _quality(accept, "application/json")


def _quality(accept: str, media_type: str) -> float:
    """The q value that an Accept header gives a media type, by its most specific range; 0 where none matches."""
    ranges = {}
    for entry in accept.split(","):
        name, *parameters = (part.strip().lower() for part in entry.split(";"))
        text = next((parameter[2:] for parameter in parameters if parameter.startswith("q=")), "1")
        try:
            ranges[name] = float(text)
        except ValueError:
            ranges[name] = 0.0
    kind = media_type.partition("/")[0]
    return next((ranges[name] for name in (media_type, f"{kind}/*", "*/*") if name in ranges), 0.0)


_SEGMENT_DESCRIPTION = """
Send the picture as a multipart form or as the bare body:

    curl -F image=@street.jpg http://127.0.0.1:8000/segment
    curl -F image=@street.jpg -F scales=0.75,1,1.25 -F flip=true http://127.0.0.1:8000/segment
    curl --data-binary @street.jpg -H 'Content-Type: image/jpeg' 'http://127.0.0.1:8000/segment?format=png' -o mask.png

The mask has the picture's own size, after its EXIF orientation is applied; a pixel's value is the id of its class.
Options go in the query or in the form. Given in both they must agree; a blank one counts as not given.

`format=png` answers with the indexed PNG alone. It explains itself: its palette is the model's, and its text chunks
`model`, `model_sha256`, `classes`, `palette` and `presence` hold what the JSON answer would say.

Phases and their milliseconds are in `timing_ms` and in the `Server-Timing` header.
"""


def _description(engine: Engine, settings: Settings) -> str:
    metadata = engine.metadata
    return f"""
Scene segmentation with EncNet: a picture in, a mask and a score of presence for each class out.

Serving **{metadata.name}** ({len(metadata.classes)} classes: {", ".join(metadata.classes[:20])}
{"..." if len(metadata.classes) > 20 else ""}). {metadata.description or ""}

| | |
|---|---|
| default scales and flip | {", ".join(f"{scale:g}" for scale in metadata.scales)}; {str(metadata.flip).lower()} |
| scales allowed | {settings.min_scale:g} to {settings.max_scale:g}, at most {settings.max_scales} |
| largest file | {settings.max_bytes} bytes |
| largest picture | {settings.max_pixels} pixels |

Every error has the body `{{"error": {{"code", "message", "request_id"}}}}`. Send `X-Request-ID` to
choose the id yourself.
"""


def _segment_request() -> dict[str, Any]:
    """OpenAPI of the request: the body is read by hand, as FastAPI cannot declare a form or a bare body."""
    properties: dict[str, dict[str, Any]] = {
        "scales": {"type": "string", "example": "0.75,1,1.25"},
        "flip": {"type": "boolean"},
        "format": {"type": "string", "enum": ["json", "png"]},
    }
    options: dict[str, dict[str, Any]] = {
        name: {**properties[name], "description": field.description} for name, field in Options.model_fields.items()
    }
    binary = {"type": "string", "format": "binary"}
    form = {
        "type": "object",
        "properties": {
            "image": {**binary, "description": "The picture file. The field may also be called `file`."},
            **options,
        },
        "required": ["image"],
    }
    bare = {
        type_: {"schema": binary} for type_ in ("application/octet-stream", "image/jpeg", "image/png", "image/webp")
    }
    return {
        "parameters": [
            {"name": name, "in": "query", "schema": schema, "description": schema["description"]}
            for name, schema in options.items()
        ],
        "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": form}, **bare}},
    }


def _segment_responses() -> dict[int | str, dict[str, Any]]:
    reasons: dict[int, list[str]] = {}
    for code, status in STATUS_OF_CODE.items():
        reasons.setdefault(status, []).append(f"`{code}`")
    return {
        200: {
            "model": SegmentAnswer,
            "description": "Mask, presence and timings; or the mask alone as an indexed PNG.",
            "content": {"image/png": {"schema": {"type": "string", "format": "binary"}}},
        },
        **{
            status: {"model": ErrorAnswer, "description": "Error codes: " + ", ".join(codes)}
            for status, codes in reasons.items()
        },
    }
