"""One infer request of the Open Inference Protocol: from its body to pictures and options, and to the response."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from fastapi import Request
from fastapi.responses import Response

from service.answers import cost_headers
from service.errors import InputError
from service.images import check_pixels
from service.metrics import Metrics
from service.models import Models
from service.oip_codec import (
    HEADER_LENGTH,
    InferRequest,
    InputTensor,
    RequestedOutput,
    TensorSpec,
    accepted_encoding,
    check_inputs,
    check_json_elements,
    compress,
    decode_base64,
    encode_response,
    inflate,
    parse_infer,
)
from service.oip_models import VERSION, Face, Statistics, outputs_of
from service.options import Options, chosen_classes, option_pairs, parse_options
from service.pipeline import Pipeline, Result, in_pool
from service.presence import only_classes
from service.settings import Settings
from service.tracing import record_phases
from service.upload import within
from service.waiting import Siblings, departure

MAX_JSON_BYTES = 8 * 2**20  # Python's lock is held while JSON is parsed, 0.2 s for this much
MAX_JSON_ELEMENTS = 2**20  # of one output; float32 takes half a second to become text, 20 MB of it
_OVERHEAD = 64 * 1024  # JSON beside the largest binary tensor, in bytes


async def answer_infer(
    one: Face, request: Request, models: Models, metrics: Metrics, counted: Statistics, started: float
) -> Response:
    """Segment the pictures of a request to one model of the protocol, and count it; `started` by `time.perf_counter`.

    Raises ServiceError.
    """
    settings = models.settings
    models.pipeline(one.served.name)  # raises before a body is read in vain
    arrived = time.monotonic()
    limit = max(settings.max_bytes, 3 * settings.max_pixels) + _OVERHEAD
    too_long = InputError("too_many_bytes", f"the body is larger than the {limit} bytes allowed")
    body = await within(request, limit, too_long).body()
    read = partial(_read, one, body, request.headers, limit)
    latest = arrived + settings.max_timeout_ms / 1000
    (infer_request, unpacked), _, read_ms = await in_pool(models.workers, read, latest)
    request.state.hold(unpacked)
    options = _options(infer_request, request.query_params.multi_items(), one, settings)
    deadline = arrived + (options.timeout_ms or settings.timeout_ms) / 1000
    pictures = _pictures(infer_request.inputs["image"], settings)
    with models.hold(one.served.name) as pipeline:
        outputs = _asked_for(infer_request, outputs_of(pipeline.engine), one.name)
        wanted = any(asked.name == "probabilities" for asked in outputs)
        plan = replace(pipeline.plan(options), probabilities=wanted)
        ids = chosen_classes(options, pipeline.engine.metadata.classes)
        await _check_outputs(outputs, pictures, pipeline, options, deadline)
        async with departure(request) as departed:
            segment = partial(pipeline.segmented, options=options, plan=plan, deadline=deadline, departed=departed)
            results = await _one_for_each(pictures, segment)
    head = {"model_name": one.name, "model_version": VERSION}
    if infer_request.id is not None:
        head["id"] = infer_request.id
    encoding = accepted_encoding(", ".join(request.headers.getlist("accept-encoding")))
    write = partial(_write, head, outputs, results, ids, encoding)
    (answer, header_length), waited, write_ms = await in_pool(models.encoders, write, deadline)
    milliseconds = {
        "decode": read_ms + sum(result.timings["decode"] for result in results),
        "queue": waited + sum(result.timings["queue"] for result in results),
        "infer": sum(result.timings["infer"] for result in results),
        "encode": write_ms,
        "total": (time.perf_counter() - started) * 1000,
    }
    for phase, duration in milliseconds.items():
        metrics.phases.labels(phase).observe(duration / 1000)
    record_phases(milliseconds)
    counted.add_success(milliseconds, [result.segmentation.batch for result in results])
    cost = sum(result.work.cost for result in results)
    headers = cost_headers(cost, sum(result.predicted_ms for result in results), milliseconds)
    return _response(answer, header_length, encoding, headers)


def _read(one: Face, body: bytes, headers: Mapping[str, str], limit: int) -> tuple[InferRequest, int]:
    """The body -> a request that fits the model's inputs, its picture files no longer in base64; and the bytes that the
    body was unpacked to, 0 where it came as it is.
    """
    plain = inflate(body, headers.get("content-encoding", ""), limit)
    raw_input = "image" if one.encoded else None
    request = parse_infer(plain, headers.get(HEADER_LENGTH), max_json_bytes=MAX_JSON_BYTES, raw_input=raw_input)
    check_inputs(request.inputs, one.inputs, one.name)
    image = request.inputs["image"]
    if one.encoded and not image.binary:
        for index, text in enumerate(image.array):
            image.array[index] = decode_base64(text, f"image[{index}]")
    return request, 0 if plain is body else len(plain)


def _options(request: InferRequest, query: list[tuple[str, str]], one: Face, settings: Settings) -> Options:
    """The options in a request's query, parameters and inputs; `timeout` is the protocol's own, in microseconds."""
    for name, _ in query:
        if name not in one.options:
            known = ", ".join(one.options)
            raise InputError("unknown_option", f"unknown option {name[:64]!a} in the query; {one.name} knows {known}")
    given: dict[str, Any] = {}
    for name, value in request.parameters.items():
        if name in one.options:
            given[name] = value
        elif name not in ("timeout", "priority", "sequence_id", "sequence_start", "sequence_end"):
            known = ", ".join(one.options)
            raise InputError("unknown_option", f"unknown parameter {name[:64]!a}; {one.name} knows {known}, timeout")
    pairs = query + option_pairs(given.items())
    timeout = request.parameters.get("timeout", 0)
    if type(timeout) is not int or timeout < 0:
        raise InputError("invalid_option", "parameter timeout must be a whole number of microseconds from 0 on")
    if timeout > settings.max_timeout_ms * 1000:
        raise InputError(
            "invalid_option",
            f"parameter timeout must be at most {settings.max_timeout_ms * 1000} microseconds; it was {timeout}",
        )
    if timeout:
        pairs.append(("timeout_ms", str(-(-timeout // 1000))))
    if "scales" in request.inputs:
        scales = request.inputs["scales"].array
        if len(scales) > settings.max_scales:  # millions of them would take seconds to become text
            text = f"input scales has {len(scales)} scales, at most {settings.max_scales} are allowed"
            raise InputError("invalid_option", text)
        pairs.append(("scales", ",".join(map(str, scales))))
    if "flip" in request.inputs:
        pairs.append(("flip", str(request.inputs["flip"].array)))
    return parse_options(pairs, settings)


def _asked_for(request: InferRequest, specs: list[TensorSpec], model: str) -> tuple[RequestedOutput, ...]:
    """The outputs to answer with, in the order asked. Raises InputError for one that the model does not have."""
    names = [spec.name for spec in specs]
    if request.outputs is None:
        return tuple(RequestedOutput(name, request.binary_output) for name in names[:2])
    for asked in request.outputs:
        if asked.name not in names:
            raise InputError(
                "invalid_body", f"{model} has no output {asked.name[:64]!a}; its outputs are {', '.join(names)}"
            )
    return request.outputs


def _pictures(image: InputTensor, settings: Settings) -> list[Any]:
    """The batch as single pictures, `bytes` or uint8 (H, W, 3). Raises InputError beyond a limit."""
    if len(image.array) > settings.max_items:
        raise InputError(
            "several_images", f"image has {len(image.array)} pictures; send at most {settings.max_items} in a request"
        )
    if image.datatype == "UINT8":
        height, width = image.array.shape[1:3]
        check_pixels((width, height), settings.max_pixels)
    return list(image.array)


async def _one_for_each(
    pictures: list[Any], segment: Callable[[bytes | np.ndarray], AbstractAsyncContextManager[Result]]
) -> list[Result]:
    """Segment the pictures of a request, a few at a time. Where one fails, so does the request, and names it.

    What is done counts no longer as admitted: the results wait for each other, and might be more than is let in.
    """
    siblings = Siblings()

    async def result_of(picture: bytes | np.ndarray) -> Result:
        async with segment(picture) as result:
            return result

    async def one(index: int, picture: bytes | np.ndarray) -> Result:
        async with siblings.turns:
            try:
                return await siblings.segment(partial(result_of, picture))
            except InputError as error:
                raise _named(error, index) from None

    tasks = [asyncio.create_task(one(index, picture)) for index, picture in enumerate(pictures)]
    try:
        return await asyncio.gather(*tasks)
    finally:  # once one has failed, the others are of no use
        for task in tasks:
            task.cancel()


def _named(error: InputError, index: int) -> InputError:
    return InputError(error.code, f"image[{index}]: {error.message}")


def _need_one_size(outputs: tuple[RequestedOutput, ...]) -> bool:
    return any(asked.name != "presence" for asked in outputs)


async def _check_outputs(
    outputs: tuple[RequestedOutput, ...], pictures: list[Any], pipeline: Pipeline, options: Options, deadline: float
) -> None:
    """Raise InputError where the pictures' sizes show that an output cannot be answered as it is asked for."""
    in_json = [asked.name for asked in outputs if not asked.binary]
    if not _need_one_size(outputs) or (len(pictures) == 1 and not in_json):
        return
    if isinstance(pictures[0], bytes):
        width, height = await _check_sizes(pictures, pipeline, options, deadline)
    else:
        height, width = pictures[0].shape[:2]
    classes, pixels = len(pipeline.engine.metadata.classes), len(pictures) * width * height
    elements = {"mask": pixels, "presence": len(pictures) * classes, "probabilities": pixels * classes}
    for name in in_json:
        check_json_elements(name, elements[name], MAX_JSON_ELEMENTS)


async def _check_sizes(pictures: list[bytes], pipeline: Pipeline, options: Options, deadline: float) -> tuple[int, int]:
    """The sides of the masks by the headers of picture files. Raises InputError where they make no one tensor.

    Sides that are only swapped may be of one size, by the orientation in the file, and are left to `_write`.
    """
    sizes: list[tuple[int, int]] = []
    for index, picture in enumerate(pictures):
        try:
            sizes.append(await pipeline.size(picture, options, deadline))
        except InputError as error:
            raise _named(error, index) from None
        if sorted(sizes[index]) != sorted(sizes[0]):
            raise _sizes_differ(index, sizes[index], sizes[0])
    return sizes[0]


def _sizes_differ(index: int, size: tuple[int, int], first: tuple[int, int]) -> InputError:
    return InputError(
        "invalid_body",
        f"image[{index}] is {size[0]} x {size[1]} and image[0] is {first[0]} x {first[1]}: "
        "the pictures of one request must have one size, as their masks make one tensor",
    )


def _write(
    head: dict[str, Any],
    outputs: tuple[RequestedOutput, ...],
    results: list[Result],
    ids: Sequence[int] | None,
    encoding: str | None,
) -> tuple[bytes, int | None]:
    """The response's body, compressed where asked for, and the length of its JSON before that.

    `ids` are the classes that the mask keeps, None for all.
    """
    if _need_one_size(outputs):
        sizes = [(result.segmentation.mask.shape[1], result.segmentation.mask.shape[0]) for result in results]
        for index, size in enumerate(sizes):
            if size != sizes[0]:
                raise _sizes_differ(index, size, sizes[0])
    stacked = []
    for asked in outputs:
        tensor = np.stack([getattr(result.segmentation, asked.name) for result in results])
        stacked.append((asked, only_classes(tensor, ids) if asked.name == "mask" else tensor))
    body, header_length = encode_response(head, stacked, max_json_elements=MAX_JSON_ELEMENTS)
    return compress(body, encoding) if encoding else body, header_length


def _response(body: bytes, header_length: int | None, encoding: str | None, headers: dict[str, str]) -> Response:
    headers = {**headers, "Vary": "Accept-Encoding"}
    if header_length is not None:
        headers[HEADER_LENGTH] = str(header_length)
    if encoding:
        headers["Content-Encoding"] = encoding
    media_type = "application/json" if header_length is None else "application/octet-stream"
    return Response(body, media_type=media_type, headers=headers)
