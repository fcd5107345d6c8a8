"""POST /segment and POST /segment/batch: from the request to the answer in the format asked for."""

import asyncio
import base64
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from service import formats
from service.answers import (
    AttachedMask,
    BatchAnswer,
    Cost,
    ErrorAnswer,
    Fault,
    ImageFacts,
    ItemAnswer,
    ModelIdentity,
    PngMask,
    PolygonMask,
    Prediction,
    RleMask,
    SegmentAnswer,
    Timings,
)
from service.errors import STATUS_OF_CODE, InputError, ServiceError
from service.fetch import fetch
from service.metrics import Metrics
from service.models import Models
from service.options import Options, chosen_classes, parse_options
from service.pipeline import Pipeline, Result, in_pool
from service.presence import PresenceRow, only_classes, presence_rows
from service.upload import Upload, read_upload, read_uploads

BATCH_FORMATS = ("json", "rle", "polygons")

SIDE_BY_SIDE = 4  # pictures of one batch that are under way at a time, so that a batch does not fill the queue


@dataclass(frozen=True)
class Labelled:
    """What every format is made from: the label map as asked for, and the rows about its classes."""

    result: Result
    mask: Any
    rows: list[PresenceRow]
    ids: list[int] | None


def segment_router(models: Models, metrics: Metrics) -> APIRouter:
    """The routes, over these models."""
    router = APIRouter(tags=["segmentation"])
    settings = models.settings

    async def fetched(upload: Upload, deadline: float) -> bytes:
        """The picture's bytes, wherever they are. Raises InputError where URLs are switched off or lead nowhere."""
        if upload.url is None:
            return upload.picture
        if not settings.allow_urls:
            raise InputError(
                "url_input_off", "pictures by URL are switched off here (ENCNET_ALLOW_URLS); send the bytes"
            )
        timeout_s = settings.url_timeout_ms / 1000
        work = partial(fetch, upload.url, max_bytes=settings.max_bytes, timeout_s=timeout_s)
        return (await in_pool(models.workers, work, deadline))[0]

    @router.post(
        "/segment",
        summary="Segment one picture",
        description=_SEGMENT_DESCRIPTION,
        responses=_segment_responses(),
        openapi_extra=_request_body(several=False),
    )
    async def segment(request: Request) -> Response:
        started = time.perf_counter()
        upload = await read_upload(request, settings.max_bytes)
        options = parse_options(upload.options, settings)
        format_ = formats.choose_format(request.headers.get("accept"), options.format)
        options = options.model_copy(update={"format": format_})
        deadline = time.monotonic() + (options.timeout_ms or settings.timeout_ms) / 1000
        picture = await fetched(upload, deadline)
        pipeline = models.pipeline(options.model)
        if options.dry_run:
            return _prediction(pipeline, picture, options)
        async with departure(request) as departed:
            result = await pipeline.segment(picture, options, deadline=deadline, departed=departed)
        labelled = _labelled(pipeline, result, options)
        (body, media_type), waited, encode_ms = await in_pool(
            models.workers, partial(_encoded, pipeline, labelled, format_), deadline
        )
        timings = _timings(result, waited, encode_ms, started, metrics)
        if format_ in (*BATCH_FORMATS, "multipart"):
            answer = _answer(request, pipeline, labelled, body, timings)
            body = answer.model_dump_json().encode()
            if format_ == "multipart":
                png = formats.mask_png(labelled.mask, pipeline.engine, labelled.rows)
                body, media_type = formats.multipart_body(body, png)
        return Response(body, media_type=media_type, headers=_headers(result, timings))

    @router.post(
        "/segment/batch",
        summary="Segment several pictures",
        description="A form with several files `image` and one set of options. Each picture has its own answer or its "
        "own error; a bad one fails alone. Formats: `json`, `rle`, `polygons`.",
        response_model=BatchAnswer,
        responses={status: {"model": ErrorAnswer} for status in (400, 401, 404, 413, 422, 429, 503)},
        openapi_extra=_request_body(several=True),
    )
    async def segment_batch(request: Request) -> Response:
        uploads = await read_uploads(request, settings.max_bytes, settings.max_items)
        options = parse_options(uploads[0].options, settings)
        format_ = options.format or "json"
        if format_ not in BATCH_FORMATS:
            known = ", ".join(BATCH_FORMATS)
            raise InputError("invalid_option", f"option format must be one of {known} here; it was {format_!r}")
        if options.dry_run:
            raise InputError("invalid_option", "option dry_run is for single pictures")
        options = options.model_copy(update={"format": format_})
        deadline = time.monotonic() + (options.timeout_ms or settings.timeout_ms) / 1000
        models.pipeline(options.model).plan(options)
        turns = asyncio.Semaphore(SIDE_BY_SIDE)

        async def one(upload: Upload, departed: "asyncio.Task[None]") -> ItemAnswer:
            async with turns:
                started = time.perf_counter()
                try:
                    pipeline = models.pipeline(options.model)
                    result = await pipeline.segment(upload.picture, options, deadline=deadline, departed=departed)
                    labelled = _labelled(pipeline, result, options)
                    (body, _), waited, encode_ms = await in_pool(
                        models.workers, partial(_encoded, pipeline, labelled, format_), deadline
                    )
                except ServiceError as error:
                    fault = Fault(code=error.code, message=error.message, request_id=request.state.request_id)
                    return ItemAnswer(name=upload.name, error=fault)
                timings = _timings(result, waited, encode_ms, started, metrics)
                return ItemAnswer(name=upload.name, answer=_answer(request, pipeline, labelled, body, timings))

        async with departure(request) as departed:
            items = await asyncio.gather(*(one(upload, departed) for upload in uploads))
        answer = BatchAnswer(id=request.state.request_id, items=list(items))
        return Response(answer.model_dump_json(), media_type="application/json")

    return router


@asynccontextmanager
async def departure(request: Request) -> "AsyncIterator[asyncio.Task[None]]":
    """A task that is done when the client has left; the body must have been read."""

    async def until_gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task = asyncio.create_task(until_gone())
    try:
        yield task
    finally:
        task.cancel()


def _labelled(pipeline: Pipeline, result: Result, options: Options) -> Labelled:
    metadata = pipeline.engine.metadata
    ids = chosen_classes(options, metadata.classes)
    threshold = pipeline.settings.threshold if options.threshold is None else options.threshold
    mask = result.segmentation.mask
    rows = presence_rows(mask, result.segmentation.presence, metadata.classes, threshold, ids)
    return Labelled(result, only_classes(mask, ids), rows, ids)


def _encoded(pipeline: Pipeline, labelled: Labelled, format_: str) -> tuple[Any, str]:
    """The label map in a format, and its media type; for the JSON formats, the object that the answer will hold."""
    metadata, mask = pipeline.engine.metadata, labelled.mask
    size = {"width": mask.shape[1], "height": mask.shape[0]}
    segmentation = labelled.result.segmentation
    encoders: dict[str, Callable[[], tuple[Any, str]]] = {
        "json": lambda: (
            PngMask(
                data=base64.b64encode(formats.mask_png(mask, pipeline.engine, labelled.rows)).decode("ascii"), **size
            ),
            "application/json",
        ),
        "rle": lambda: (RleMask(segments=formats.rle(mask, metadata.classes), **size), "application/json"),
        "polygons": lambda: (
            PolygonMask(features=formats.polygons(mask, metadata.classes), **size),
            "application/json",
        ),
        "multipart": lambda: (AttachedMask(**size), "multipart/mixed"),
        "png": lambda: (formats.mask_png(mask, pipeline.engine, labelled.rows), "image/png"),
        "overlay": lambda: (
            formats.overlay_jpeg(labelled.result.picture.pixels, mask, metadata.palette),
            "image/jpeg",
        ),
        "npz": lambda: (
            formats.npz(mask, segmentation.probabilities, segmentation.presence, metadata.classes),
            "application/x-npz",
        ),
    }
    return encoders[format_]()


def _answer(request: Request, pipeline: Pipeline, labelled: Labelled, mask: Any, timings: Timings) -> SegmentAnswer:
    result = labelled.result
    picture, engine = result.picture, pipeline.engine
    return SegmentAnswer(
        id=request.state.request_id,
        model=ModelIdentity(name=engine.metadata.name, sha256=engine.sha256),
        image=ImageFacts(
            width=picture.size[0], height=picture.size[1], exif_applied=picture.exif_applied, mode=picture.mode
        ),
        scales=list(result.segmentation.scales),
        flip=result.segmentation.flip,
        mask=mask,
        presence=labelled.rows,
        cost=Cost(pixels=result.work.cost, predicted_ms=result.predicted_ms),
        timing_ms=timings,
    )


def _timings(result: Result, waited: float, encode_ms: float, started: float, metrics: Metrics) -> Timings:
    """The phases of one picture, counted as they are put together."""
    timings = Timings(
        decode=result.timings["decode"],
        queue=result.timings["queue"] + waited,
        infer=result.timings["infer"],
        encode=encode_ms,
        total=(time.perf_counter() - started) * 1000,
    )
    for phase, milliseconds in timings.model_dump().items():
        metrics.phases.labels(phase).observe(milliseconds / 1000)
    return timings


def _headers(result: Result, timings: Timings) -> dict[str, str]:
    phases = timings.model_dump().items()
    return {
        "Server-Timing": ", ".join(f"{phase};dur={ms:.2f}" for phase, ms in phases),
        "Vary": "Accept",
        "X-Cost-Pixels": str(result.work.cost),
        "X-Predicted-Ms": f"{result.predicted_ms:.1f}",
    }


def _prediction(pipeline: Pipeline, picture: bytes, options: Options) -> Response:
    estimate = pipeline.price(picture, options)
    answer = Prediction(
        pixels=estimate.work.cost,
        predicted_ms=estimate.run_s * 1000,
        wait_ms=estimate.wait_s * 1000,
        queue_pixels=pipeline.admitted_cost,
        queue_limit_pixels=pipeline.settings.max_queue_pixels,
    )
    headers = {"X-Cost-Pixels": str(answer.pixels), "X-Predicted-Ms": f"{answer.predicted_ms:.1f}"}
    return Response(answer.model_dump_json(), media_type="application/json", headers=headers)


_SEGMENT_DESCRIPTION = """
Send the picture as a multipart form, as the bare body, or in JSON as a data URI:

    curl -F image=@street.jpg http://127.0.0.1:8000/segment
    curl -F image=@street.jpg -F scales=0.75,1,1.25 -F flip=true http://127.0.0.1:8000/segment
    curl --data-binary @street.jpg -H 'Content-Type: image/jpeg' 'http://127.0.0.1:8000/segment?format=png' -o mask.png
    curl --json '{"image": "data:image/png;base64,...", "scales": [0.75, 1], "format": "rle"}' http://127.0.0.1:8000/segment

The mask has the picture's own size, after its EXIF orientation is applied (or the size that `max_side` gives it); a
pixel's value is the id of its class. Options go in the query, the form or the JSON object. Given twice they must agree;
a blank one counts as not given.

`format=png` answers with the indexed PNG alone. It explains itself: its palette is the model's, and its text chunks
`model`, `model_sha256`, `classes`, `palette` and `presence` hold what the JSON answer would say.

Phases and their milliseconds are in `timing_ms` and in the `Server-Timing` header; what the request was charged is in
`cost` and in `X-Cost-Pixels`, and `dry_run=true` answers only that. A full queue answers 429 with `Retry-After`.
"""


def _request_body(several: bool) -> dict[str, Any]:
    """OpenAPI of the request: the body is read by hand, as FastAPI cannot declare a form or a bare body."""
    schema = Options.model_json_schema()["properties"]
    texts = {"scales": "0.75,1,1.25", "classes": "car,pedestrian"}
    options: dict[str, dict[str, Any]] = {}
    for name, entry in schema.items():
        kind = next((one for one in entry.get("anyOf", [entry]) if one.get("type") != "null"), entry)
        kind = {"type": "string", "example": texts[name]} if name in texts else kind
        options[name] = {**kind, "description": entry.get("description", "")}
    binary = {"type": "string", "format": "binary"}
    image: dict[str, Any] = {**binary, "description": "The picture file. The field may also be called `file`."}
    if several:
        image = {"type": "array", "items": binary, "description": "The picture files."}
    form = {"type": "object", "properties": {"image": image, **options}, "required": ["image"]}
    content: dict[str, Any] = {"multipart/form-data": {"schema": form}}
    if not several:
        data_uri = {"type": "string", "example": "data:image/png;base64,iVBORw0KGgo..."}
        by_url = {"type": "object", "properties": {"url": {"type": "string"}}, "required": ["url"]}
        described = {"type": "object", "properties": {"image": {"anyOf": [data_uri, by_url]}}, "required": ["image"]}
        content["application/json"] = {"schema": described}
        for kind_ in ("application/octet-stream", "image/jpeg", "image/png", "image/webp"):
            content[kind_] = {"schema": binary}
    return {
        "parameters": [
            {"name": name, "in": "query", "schema": entry, "description": entry["description"]}
            for name, entry in options.items()
        ],
        "requestBody": {"required": True, "content": content},
    }


def _segment_responses() -> dict[int | str, dict[str, Any]]:
    reasons: dict[int, list[str]] = {}
    for code, status in STATUS_OF_CODE.items():
        reasons.setdefault(status, []).append(f"`{code}`")
    binary = {"schema": {"type": "string", "format": "binary"}}
    return {
        200: {
            "model": SegmentAnswer,
            "description": "Mask, presence and timings, or the mask in the format asked for.",
            "content": dict.fromkeys(("image/png", "image/jpeg", "application/x-npz", "multipart/mixed"), binary),
        },
        **{
            status: {"model": ErrorAnswer, "description": "Error codes: " + ", ".join(codes)}
            for status, codes in reasons.items()
        },
    }
