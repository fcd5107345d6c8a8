"""POST /hf: the task image-segmentation of Hugging Face's Inference API, so that its clients can be used as they are.

huggingface_hub's InferenceClient and @huggingface/inference send the picture as the bare body or, with parameters, in
JSON as base64; they expect a list with one black-and-white mask for each class in the picture.
"""

import base64
import json
import time
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from service.answers import ErrorAnswer, Segment, cost_headers
from service.errors import InputError
from service.metrics import Metrics
from service.models import Models
from service.options import Options, parse_options
from service.render import class_png
from service.segment_openapi import request_body
from service.segment_routes import Labelled, check_not_compressed, count_phases, label
from service.settings import Settings
from service.upload import Pairs, read_upload, with_inputs
from service.waiting import departure

_DESCRIPTION = """
The same as `/segment`, for the clients of Hugging Face's Inference API:

    from huggingface_hub import InferenceClient

    segments = InferenceClient("http://127.0.0.1:8000/hf").image_segmentation("street.jpg", threshold=0.5)

One entry for each class that has pixels, the highest score first; `threshold` leaves out those whose presence is below.
The options of `/segment` but `format` and `dry_run` go in the query or in `parameters`.
"""
_ELSEWHERE = ("format", "dry_run")  # options of /segment alone
_OF_INSTANCES = ("mask_threshold", "overlap_mask_area_threshold")
_FORMAT = "hf"
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_BODY = {
    "application/json": {
        "schema": {
            "type": "object",
            "properties": {
                "inputs": {"type": "string", "format": "byte", "description": "The picture file in base64."},
                "parameters": {"type": "object", "description": "Options, in place of the query or beside it."},
            },
            "required": ["inputs"],
        }
    },
    "image/jpeg": _BINARY,
    "image/png": _BINARY,
}


def hugging_face_router(models: Models, metrics: Metrics) -> APIRouter:
    """The route, over these models."""
    router = APIRouter(tags=["segmentation"])
    settings = models.settings
    described = request_body(several=False)["parameters"]

    @router.post(
        "/hf",
        summary="Segment one picture, for Hugging Face's clients",
        description=_DESCRIPTION,
        response_model=list[Segment],
        responses={status: {"model": ErrorAnswer} for status in (400, 401, 404, 408, 413, 415, 422, 429, 503, 504)},
        openapi_extra={
            "parameters": [option for option in described if option["name"] not in _ELSEWHERE],
            "requestBody": {"required": True, "content": _BODY},
        },
    )
    async def image_segmentation(request: Request) -> Response:
        started = time.perf_counter()
        check_not_compressed(request)
        upload = await read_upload(request, settings, models.workers, with_inputs)
        options = _options(upload.options, settings)
        deadline = time.monotonic() + (options.timeout_ms or settings.timeout_ms) / 1000
        with models.hold(options.model) as pipeline:
            async with (
                departure(request) as departed,
                pipeline.segmented(upload.picture, options, deadline=deadline, departed=departed) as result,
            ):

                def write(abandoned: Callable[[], bool]) -> bytes:
                    return _segments(label(pipeline, result, options), options.threshold is not None, abandoned)

                body, waited, encode_ms = await pipeline.encode(result, _FORMAT, write, deadline, departed)
        timings = count_phases(result, waited, encode_ms, started, metrics)
        headers = cost_headers(result.work.cost, result.predicted_ms, timings.model_dump())
        return Response(body, media_type="application/json", headers=headers)

    return router


def _options(pairs: Pairs, settings: Settings) -> Options:
    """The options of a request. Raises InputError as `parse_options` does, and for what only /segment has or nobody."""
    kept = []
    for name, text in pairs:
        if name in _ELSEWHERE:
            raise InputError("unknown_option", f"option {name} is one of /segment; here the answer is always the same")
        if name in _OF_INSTANCES:
            raise InputError(
                "invalid_option", f"option {name} is for single things, which are not told apart here; leave it out"
            )
        if name != "subtask":
            kept.append((name, text))
        elif text != "semantic":
            raise InputError("invalid_option", f"option subtask must be semantic; it was {text[:64]!r}")
    return parse_options(kept, settings)


def _segments(labelled: Labelled, only_present: bool, abandoned: Callable[[], bool]) -> bytes:
    """The answer's body; once `abandoned`, not all of it."""
    segments: list[dict[str, Any]] = []
    for row in labelled.rows:
        if abandoned():
            break
        if row["pixels"] and (row["present"] or not only_present):
            png = base64.b64encode(class_png(labelled.mask == row["id"])).decode("ascii")
            segments.append({"label": row["class"], "score": row["score"], "mask": png})
    return json.dumps(segments, ensure_ascii=False).encode()
