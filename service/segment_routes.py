"""POST /segment and POST /segment/batch: from the request to the answer in the format asked for."""

import asyncio
import base64
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel

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
    Prediction,
    RleMask,
    SegmentAnswer,
    Timings,
    cost_headers,
)
from service.encoders import multipart, npz, rle
from service.engine import Engine
from service.errors import InputError, Refusal, ServiceError
from service.fetch import failed, fetch
from service.formats import FormatName, choose_format
from service.metrics import Metrics
from service.models import Models
from service.options import Options, chosen_classes, parse_options
from service.pipeline import Estimate, Pipeline, Result, in_pool
from service.polygons import polygons
from service.presence import PresenceRow, only_classes, presence_rows
from service.render import mask_png, overlay_picture
from service.segment_openapi import SEGMENT_DESCRIPTION, request_body, segment_responses
from service.tracing import record_phases
from service.upload import Upload, read_upload, read_uploads
from service.waiting import Siblings, departure

BATCH_FORMATS: tuple[FormatName, ...] = ("json", "rle")

Encoded = bytes | PngMask | RleMask | tuple[AttachedMask, bytes]
"""The whole body for the formats that are files; for those in JSON its mask, and what is attached to it."""


@dataclass(frozen=True)
class Labelled:
    """What every format is made from: the label map as asked for, the rows about its classes, and who made them."""

    result: Result
    engine: Engine
    mask: np.ndarray
    rows: list[PresenceRow]

    def png(self) -> bytes:
        """The label map as a PNG that explains itself."""
        metadata = self.engine.metadata
        texts = {"model": metadata.name, "model_sha256": self.engine.sha256, "presence": self.rows}
        return mask_png(self.mask, metadata.classes, metadata.palette, texts)


def segment_router(models: Models, metrics: Metrics) -> APIRouter:
    """The routes, over these models."""
    router = APIRouter(tags=["segmentation"])
    settings = models.settings

    async def fetched(request: Request, upload: Upload, deadline: float) -> bytes:
        """The picture's bytes, wherever they are. Raises InputError where URLs are switched off or lead nowhere."""
        if upload.url is None:
            return upload.picture
        if not settings.allow_urls:
            raise InputError(
                "url_input_off", "pictures by URL are switched off here (ENCNET_ALLOW_URLS); send the bytes"
            )
        timeout_s = settings.url_timeout_ms / 1000
        work = partial(fetch, upload.url, max_bytes=settings.max_bytes, timeout_s=timeout_s)
        try:  # `fetch` ends by its time but for the look-up of the host's name, which nothing can end
            picture, _, _ = await in_pool(None, work, min(deadline, time.monotonic() + timeout_s))
        except Refusal as refusal:
            if refusal.code == "deadline_passed" and time.monotonic() < deadline:
                raise failed(upload.url, "it took too long") from None
            raise
        request.state.hold(len(picture))
        return picture

    @router.post(
        "/segment",
        summary="Segment one picture",
        description=SEGMENT_DESCRIPTION,
        responses=segment_responses(),
        openapi_extra=request_body(several=False),
    )
    async def segment(request: Request) -> Response:
        started = time.perf_counter()
        check_not_compressed(request)
        upload = await read_upload(request, settings, models.workers)
        options = parse_options(upload.options, settings)
        format_, media_type = choose_format(", ".join(request.headers.getlist("accept")), options.format)
        options = options.model_copy(update={"format": format_})
        deadline = time.monotonic() + (options.timeout_ms or settings.timeout_ms) / 1000
        picture = await fetched(request, upload, deadline)
        with models.hold(options.model) as pipeline:
            if options.dry_run:
                return _prediction(pipeline, await pipeline.price(picture, options, deadline))
            async with (
                departure(request) as departed,
                pipeline.segmented(picture, options, deadline=deadline, departed=departed) as result,
            ):

                def write(abandoned: Callable[[], bool]) -> tuple[Labelled, Encoded]:
                    labelled = label(pipeline, result, options)
                    return labelled, _encoded(request, labelled, format_, media_type, abandoned)

                answer = await pipeline.encode(result, format_, write, deadline, departed)
        (labelled, encoded), waited, encode_ms = answer
        timings = count_phases(result, waited, encode_ms, started, metrics)
        headers = cost_headers(result.work.cost, result.predicted_ms, timings.model_dump()) | {"Vary": "Accept"}
        if isinstance(encoded, bytes):
            return Response(encoded, media_type=media_type, headers=headers)
        mask, attached = encoded if isinstance(encoded, tuple) else (encoded, None)
        body = _answer(request, labelled, mask, timings).model_dump_json().encode()
        if attached is not None:
            body, media_type = multipart(body, attached)
        return Response(body, media_type=media_type, headers=headers)

    @router.post(
        "/segment/batch",
        summary="Segment several pictures",
        description="A form with several files `image` and one set of options. Each picture has its own answer or its "
        "own error; a bad one fails alone. Formats: `json` and `rle`. Headers as of `/segment`, summed over the "
        "pictures.",
        response_model=BatchAnswer,
        responses={status: {"model": ErrorAnswer} for status in (400, 401, 404, 408, 413, 415, 422, 429, 503)},
        openapi_extra=request_body(several=True),
    )
    async def segment_batch(request: Request) -> Response:
        arrived = time.perf_counter()
        check_not_compressed(request)
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
        siblings = Siblings()

        async def one(pipeline: Pipeline, upload: Upload, departed: "asyncio.Task[None]") -> ItemAnswer:
            async def answered() -> tuple[Result, tuple[tuple[Labelled, PngMask | RleMask], float, float]]:
                segmented = pipeline.segmented(upload.picture, options, deadline=deadline, departed=departed)
                async with segmented as result:

                    def write(abandoned: Callable[[], bool]) -> tuple[Labelled, PngMask | RleMask]:
                        labelled = label(pipeline, result, options)
                        return labelled, _mask_part(labelled, format_)

                    return result, await pipeline.encode(result, format_, write, deadline, departed)

            async with siblings.turns:
                started = time.perf_counter()
                try:
                    result, ((labelled, mask), waited, encode_ms) = await siblings.segment(answered)
                except ServiceError as error:
                    metrics.batch_faults.labels(error.code).inc()
                    fault = Fault(code=error.code, message=error.message, request_id=request.state.request_id)
                    return ItemAnswer(name=upload.name, error=fault)
                timings = count_phases(result, waited, encode_ms, started, metrics)
                return ItemAnswer(name=upload.name, answer=_answer(request, labelled, mask, timings))

        with models.hold(options.model) as pipeline:  # for all of them: what is in flight is finished
            pipeline.plan(options)
            async with departure(request) as departed:
                items = await asyncio.gather(*(one(pipeline, upload, departed) for upload in uploads))
        answer = BatchAnswer(id=request.state.request_id, items=list(items))
        body = answer.model_dump_json()
        headers = _batch_headers([item.answer for item in items if item.answer], (time.perf_counter() - arrived) * 1000)
        return Response(body, media_type="application/json", headers=headers)

    return router


def check_not_compressed(request: Request) -> None:
    """Raise InputError for a body with a Content-Encoding: pictures are compressed already."""
    encoding = ", ".join(request.headers.getlist("content-encoding")).strip()
    if encoding.lower() not in ("", "identity"):
        raise InputError(
            "unsupported", f"Content-Encoding {encoding[:64]!a} is not supported here; send the body without one"
        )


def label(pipeline: Pipeline, result: Result, options: Options) -> Labelled:
    """The label map as these options ask for it."""
    engine = pipeline.engine
    ids = chosen_classes(options, engine.metadata.classes)
    threshold = pipeline.settings.threshold if options.threshold is None else options.threshold
    mask = result.segmentation.mask
    rows = presence_rows(mask, result.segmentation.presence, engine.metadata.classes, threshold, ids)
    return Labelled(result, engine, only_classes(mask, ids), rows)


def _mask_part(labelled: Labelled, format_: FormatName) -> PngMask | RleMask:
    """The `mask` of an answer in JSON alone."""
    height, width = labelled.mask.shape
    if format_ == "rle":
        return RleMask(width=width, height=height, segments=rle(labelled.mask, labelled.engine.metadata.classes))
    return PngMask(width=width, height=height, data=base64.b64encode(labelled.png()).decode("ascii"))


def _encoded(
    request: Request, labelled: Labelled, format_: FormatName, media_type: str, abandoned: Callable[[], bool]
) -> Encoded:
    """What takes time after the model has run; for the pool, not for the event loop."""
    metadata, segmentation = labelled.engine.metadata, labelled.result.segmentation
    if format_ == "png":
        return labelled.png()
    if format_ == "overlay":
        kind: Literal["JPEG", "PNG"] = "PNG" if media_type == "image/png" else "JPEG"
        return overlay_picture(labelled.result.picture.pixels, labelled.mask, metadata.palette, file_format=kind)
    if format_ == "npz":
        assert segmentation.probabilities is not None
        return npz(labelled.mask, segmentation.probabilities, segmentation.presence, metadata.classes, abandoned)
    if format_ == "multipart":
        height, width = labelled.mask.shape
        return AttachedMask(width=width, height=height), labelled.png()
    if format_ == "polygons":
        return polygons(labelled.mask, metadata.classes, _facts(request, labelled))
    return _mask_part(labelled, format_)


def _facts(request: Request, labelled: Labelled) -> dict[str, Any]:
    """What an answer says beside its mask and its timings."""
    result, engine = labelled.result, labelled.engine
    picture = result.picture
    facts = {
        "id": request.state.request_id,
        "model": ModelIdentity(name=engine.metadata.name, sha256=engine.sha256),
        "image": ImageFacts(
            width=picture.size[0], height=picture.size[1], exif_applied=picture.exif_applied, mode=picture.mode
        ),
        "scales": list(result.segmentation.scales),
        "flip": result.segmentation.flip,
        "presence": labelled.rows,
        "cost": Cost(pixels=result.work.cost, predicted_ms=result.predicted_ms),
    }
    return {name: fact.model_dump() if isinstance(fact, BaseModel) else fact for name, fact in facts.items()}


def _answer(
    request: Request, labelled: Labelled, mask: PngMask | RleMask | AttachedMask, timings: Timings
) -> SegmentAnswer:
    return SegmentAnswer(**_facts(request, labelled), mask=mask, timing_ms=timings)


def count_phases(result: Result, waited: float, encode_ms: float, started: float, metrics: Metrics) -> Timings:
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
    record_phases(timings.model_dump())
    return timings


def _batch_headers(answers: list[SegmentAnswer], total_ms: float) -> dict[str, str]:
    """The headers of a batch; its pictures ran side by side, so that phases may add up to more than the total."""
    each = [answer.timing_ms.model_dump() for answer in answers]
    phases = {phase: sum(timings[phase] for timings in each) for phase in Timings.model_fields}
    cost = sum(answer.cost.pixels for answer in answers)
    return cost_headers(cost, sum(answer.cost.predicted_ms for answer in answers), phases | {"total": total_ms})


def _prediction(pipeline: Pipeline, estimate: Estimate) -> Response:
    answer = Prediction(
        pixels=estimate.work.cost,
        predicted_ms=estimate.predicted_ms,
        wait_ms=estimate.wait_s * 1000,
        queue_pixels=pipeline.house.cost,
        queue_limit_pixels=pipeline.settings.max_queue_pixels,
    )
    headers = cost_headers(answer.pixels, answer.predicted_ms)
    return Response(answer.model_dump_json(), media_type="application/json", headers=headers)
