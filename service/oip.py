"""The Open Inference Protocol v2 under /v2, for clients of Triton, KServe and others.

Every model NAME is there twice: NAME takes pixels, NAME_encoded takes picture files.

| model        | input `image`               | what holds for it                                                       |
|--------------|-----------------------------|-------------------------------------------------------------------------|
| NAME         | UINT8 [-1, -1, -1, 3]       | RGB, upright; all of one size                                           |
| NAME_encoded | BYTES [-1]                  | files, read as POST /segment reads them; in JSON as base64 or data URIs |

Both take `scales` FP32 [-1] and `flip` BOOL [] as inputs or as parameters, and of the other options of POST /segment
`window`, `stride` and `timeout_ms`, with files `max_side` too, as parameters; what can be a parameter can stand in the
query too. Outputs are `mask` and `presence`, and `probabilities` where asked for by name; JSON is for small ones.
"""

import asyncio
import json
import logging
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from service import __version__
from service.engine import Engine
from service.errors import InputError, Refusal, ServiceError
from service.images import read_size, reduced_size
from service.info_routes import not_alive, not_ready
from service.metrics import Metrics
from service.models import Models, Served
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
from service.options import Options, option_pairs, parse_options
from service.pipeline import Pipeline, Result, in_pool
from service.segment_routes import Siblings, cost_headers, departure
from service.settings import ENCODED, Settings
from service.tracing import record_phases
from service.upload import within

VERSION = "1"  # of every model; the protocol has versions, a file here has none
EXTENSIONS = (
    "binary_tensor_data",
    "model_configuration",
    "model_repository",
    "parameters",
    "statistics",
    "logging",
)
OPTIONS = ("scales", "flip", "max_side", "window", "stride", "timeout_ms")

MAX_JSON_BYTES = 8 * 2**20  # Python's lock is held while JSON is parsed, 0.2 s for this much
MAX_JSON_ELEMENTS = 2**20  # of one output; float32 takes half a second to become text, 20 MB of it
_OVERHEAD = 64 * 1024  # JSON beside the largest binary tensor, in bytes
_PHASES = {  # of a request here -> the protocol's words
    "total": "success",
    "queue": "queue",
    "decode": "compute_input",
    "infer": "compute_infer",
    "encode": "compute_output",
}
_STATES = {"ready": "READY", "starting": "LOADING", "restarting": "LOADING"}
_LEVELS = (("log_errors", logging.ERROR), ("log_warnings", logging.WARNING), ("log_info", logging.INFO))

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Face:
    """One model of the protocol: `served` as pixels, or as picture files."""

    name: str
    served: Served
    encoded: bool

    @property
    def inputs(self) -> list[TensorSpec]:
        """What infer takes."""
        image = TensorSpec("image", "BYTES", (-1,)) if self.encoded else TensorSpec("image", "UINT8", (-1, -1, -1, 3))
        return [
            image,
            TensorSpec("scales", "FP32", (-1,), optional=True),
            TensorSpec("flip", "BOOL", (), optional=True),
        ]

    @property
    def options(self) -> tuple[str, ...]:
        """The parameters of a request that are options; pixels have their size already."""
        return tuple(name for name in OPTIONS if self.encoded or name != "max_side")


def outputs_of(engine: Engine) -> list[TensorSpec]:
    """What infer gives; the last one only where it is asked for by name."""
    classes = len(engine.metadata.classes)
    return [
        TensorSpec("mask", "UINT8" if classes <= 255 else "UINT16", (-1, -1, -1)),
        TensorSpec("presence", "FP32", (-1, classes)),
        TensorSpec("probabilities", "FP32", (-1, classes, -1, -1)),
    ]


@dataclass
class Statistics:
    """Counts of one model's infer requests, and for each phase [how often, nanoseconds]."""

    last_inference: int = 0
    inferences: int = 0
    runs: float = 0.0
    phases: dict[str, list[int]] = field(default_factory=lambda: {name: [0, 0] for name in ("fail", *_PHASES.values())})

    def add_failure(self, milliseconds: float) -> None:
        """Count a request that ended in an error."""
        self._add("fail", milliseconds)

    def add_success(self, milliseconds: dict[str, float], batches: list[int]) -> None:
        """Count a request by its phases; `batches` has, for each picture, how many pictures shared its run."""
        self.last_inference = round(time.time() * 1000)
        self.inferences += len(batches)
        self.runs += sum(1 / batch for batch in batches)
        for phase, name in _PHASES.items():
            self._add(name, milliseconds[phase])

    def _add(self, name: str, milliseconds: float) -> None:
        self.phases[name][0] += 1
        self.phases[name][1] += round(milliseconds * 1e6)

    def answer(self, name: str) -> dict[str, Any]:
        """The protocol's words for it. Executions are not told apart by batch size."""
        return {
            "name": name,
            "version": VERSION,
            "last_inference": self.last_inference,
            "inference_count": self.inferences,
            "execution_count": round(self.runs),
            "inference_stats": {phase: {"count": count, "ns": ns} for phase, (count, ns) in self.phases.items()},
            "batch_stats": [],
        }


def oip_router(models: Models, metrics: Metrics) -> APIRouter:
    """The routes, over these models. They are not in /openapi.json: the protocol has a description of its own."""
    router = APIRouter(prefix="/v2", include_in_schema=False)
    settings = models.settings
    statistics: dict[str, Statistics] = {}

    def face(name: str, version: str | None = None) -> Face:
        """A model of the protocol by name. Raises InputError with code unknown_model."""
        if version not in (None, VERSION):
            raise InputError("unknown_model", f"model {name[:64]!r} has only version {VERSION}")
        known = faces()
        if name not in known:
            raise InputError("unknown_model", f"there is no model {name[:64]!r}; there are {', '.join(known)}")
        return known[name]

    def faces() -> dict[str, Face]:
        encoded = {served.name + ENCODED: Face(served.name + ENCODED, served, True) for served in models.all}
        return encoded | {served.name: Face(served.name, served, False) for served in models.all}

    def why_not(served: Served) -> str:
        """Why a model takes no work now; empty where it does."""
        if models.draining:
            return "the service is stopping"
        if served.pipeline is None:
            return served.reason
        return "" if served.state == "ready" else served.pipeline.device.reason or f"it is {served.state}"

    def check_control() -> None:
        if not settings.remote_control:
            raise InputError(
                "control_off", "changing models and settings over HTTP is switched off here (ENCNET_REMOTE_CONTROL)"
            )

    # ---- the server

    @router.get("")
    @router.get("/")
    async def server_metadata() -> dict[str, Any]:
        return {"name": "encnet-serve", "version": __version__, "extensions": list(EXTENSIONS)}

    @router.get("/health/live")
    async def live() -> Response:
        reasons = not_alive(models)
        return JSONResponse({"error": "; ".join(reasons)}, 503) if reasons else JSONResponse({"live": True})

    @router.get("/health/ready")
    async def server_ready() -> Response:
        reasons = not_ready(models)
        return JSONResponse({"error": "; ".join(reasons)}, 503) if reasons else JSONResponse({"ready": True})

    # ---- statistics; before the routes that take any name after /models/

    @router.get("/models/stats")
    async def all_statistics() -> dict[str, Any]:
        return {"model_stats": [statistics.setdefault(name, Statistics()).answer(name) for name in faces()]}

    @router.get("/models/{name}/stats")
    @router.get("/models/{name}/versions/{version}/stats")
    async def model_statistics(name: str, version: str | None = None) -> dict[str, Any]:
        return {"model_stats": [statistics.setdefault(face(name, version).name, Statistics()).answer(name)]}

    # ---- models

    @router.get("/models/{name}")
    @router.get("/models/{name}/versions/{version}")
    async def model_metadata(name: str, version: str | None = None) -> dict[str, Any]:
        one = face(name, version)
        engine = models.pipeline(one.served.name).engine
        return {
            "name": name,
            "versions": [VERSION],
            "platform": "onnx_onnxv1",
            "inputs": [_described(spec) for spec in one.inputs],
            "outputs": [_described(spec) for spec in outputs_of(engine)],
        }

    @router.get("/models/{name}/ready")
    @router.get("/models/{name}/versions/{version}/ready")
    async def model_ready(name: str, version: str | None = None) -> Response:
        served = face(name, version).served
        if reason := why_not(served):
            return JSONResponse({"error": f"model {name} is not ready: {reason}"}, 503)
        return JSONResponse({"name": name, "ready": True})

    @router.get("/models/{name}/config")
    @router.get("/models/{name}/versions/{version}/config")
    async def model_config(name: str, version: str | None = None) -> dict[str, Any]:
        one = face(name, version)
        return _config(one, models.pipeline(one.served.name).engine)

    @router.post("/repository/index")
    async def repository_index(request: Request) -> list[dict[str, str]]:
        only_ready = (await _json_body(request)).get("ready", False)
        return [
            {
                "name": one.name,
                "version": VERSION,
                "state": _STATES.get(one.served.state, "UNAVAILABLE"),
                "reason": why_not(one.served),
            }
            for one in faces().values()
            if only_ready is not True or not why_not(one.served)
        ]

    @router.post("/repository/models/{name}/load")
    async def load(name: str, request: Request) -> dict[str, Any]:
        one = face(name)
        check_control()
        if (await _json_body(request)).get("parameters"):
            raise InputError(
                "not_implemented", "a model is loaded from the file it was configured with; send no parameters"
            )
        try:
            await models.load(one.served.name)
        except Exception as error:  # ModelError, or whatever its warm-up led to; the sentence may name files
            _log.error("model %s is not loaded: %s", one.served.name, error)
            raise Refusal("model_failed", f"model {name} cannot be loaded; the service's log has the reason") from None
        return {}

    @router.post("/repository/models/{name}/unload")
    async def unload(name: str, request: Request) -> dict[str, Any]:
        one = face(name)
        check_control()
        await _json_body(request)
        await models.unload(one.served.name)
        return {}

    # ---- infer

    @router.post("/models/{name}/infer")
    @router.post("/models/{name}/versions/{version}/infer")
    async def infer(name: str, request: Request, version: str | None = None) -> Response:
        started = time.perf_counter()
        one = face(name, version)
        counted = statistics.setdefault(name, Statistics())
        try:
            return await answered(one, request, counted, started)
        except ServiceError:
            counted.add_failure((time.perf_counter() - started) * 1000)
            raise

    async def answered(one: Face, request: Request, counted: Statistics, started: float) -> Response:
        models.pipeline(one.served.name)  # raises before a body is read in vain
        arrived = time.monotonic()
        limit = max(settings.max_bytes, 3 * settings.max_pixels) + _OVERHEAD
        too_long = InputError("too_many_bytes", f"the body is larger than the {limit} bytes allowed")
        body = await within(request, limit, too_long).body()
        read = partial(_read, one, body, request.headers, limit)
        infer_request, _, read_ms = await in_pool(models.workers, read, arrived + settings.max_timeout_ms / 1000)
        options = _options(infer_request, request.query_params.multi_items(), one, settings)
        deadline = arrived + (options.timeout_ms or settings.timeout_ms) / 1000
        pictures = _pictures(infer_request.inputs["image"], settings)
        with models.hold(one.served.name) as pipeline:
            outputs = _asked_for(infer_request, outputs_of(pipeline.engine), one.name)
            wanted = any(asked.name == "probabilities" for asked in outputs)
            plan = replace(pipeline.plan(options), probabilities=wanted)
            await _check_outputs(outputs, pictures, pipeline, options, deadline)
            async with departure(request) as departed:
                segment = partial(pipeline.segment, options=options, plan=plan, deadline=deadline, departed=departed)
                results = await _one_for_each(pictures, segment)
        head = {"model_name": one.name, "model_version": VERSION}
        if infer_request.id is not None:
            head["id"] = infer_request.id
        encoding = accepted_encoding(", ".join(request.headers.getlist("accept-encoding")))
        write = partial(_write, head, outputs, results, encoding)
        (answer, header_length), waited, write_ms = await in_pool(models.workers, write, deadline)
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

    # ---- logging, tracing, shared memory

    @router.get("/logging")
    async def logging_settings() -> dict[str, Any]:
        return _logging_settings(settings)

    @router.post("/logging")
    async def change_logging_settings(request: Request) -> dict[str, Any]:
        wanted = await _json_body(request)
        if wanted:
            check_control()
            logging.getLogger().setLevel(_level(wanted, settings))
        return _logging_settings(settings)

    @router.api_route("/trace/setting", methods=["GET", "POST"])
    @router.api_route("/models/{name}/trace/setting", methods=["GET", "POST"])
    async def trace_settings(request: Request, name: str | None = None) -> dict[str, Any]:
        if name is not None:
            face(name)
        wanted = await _json_body(request)
        if wanted.get("trace_level", ["OFF"]) not in (["OFF"], "OFF", None) or wanted.keys() - {"trace_level"}:
            raise InputError("not_implemented", "tracing over the protocol is not supported; trace_level stays OFF")
        return {"trace_level": ["OFF"]}

    @router.api_route("/{kind}sharedmemory/{rest:path}", methods=["GET", "POST"])
    async def shared_memory(kind: str, rest: str) -> Response:
        raise InputError("not_implemented", f"{kind} shared memory is not supported; send tensors as binary data")

    return router


def _described(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)}


def _config(one: Face, engine: Engine) -> dict[str, Any]:
    """The model as Triton's ModelConfig says it. `max_batch_size` 0 means that shapes are whole, batch included."""
    metadata = engine.metadata
    parameters = {
        "classes": json.dumps(metadata.classes),
        "palette": json.dumps(metadata.palette),
        "base_size": str(metadata.base_size),
        "scales": ",".join(f"{scale:g}" for scale in metadata.scales),
        "flip": str(metadata.flip).lower(),
        "sha256": engine.sha256,
        "checkpoint_sha256": metadata.checkpoint_sha256,
        "options": ",".join(one.options),
    }

    def tensor(spec: TensorSpec) -> dict[str, Any]:
        word = {"BYTES": "STRING"}.get(spec.datatype, spec.datatype)
        return {"name": spec.name, "data_type": f"TYPE_{word}", "dims": list(spec.shape)}

    return {
        "name": one.name,
        "platform": "onnxruntime_onnx",
        "backend": "onnxruntime",
        "version_policy": {"latest": {"num_versions": 1}},
        "max_batch_size": 0,
        "input": [{**tensor(spec), "optional": spec.optional} for spec in one.inputs],
        "output": [tensor(spec) for spec in outputs_of(engine)],
        "instance_group": [
            {"name": one.name, "count": 1, "kind": "KIND_GPU" if engine.device == "cuda" else "KIND_CPU"}
        ],
        "parameters": {name: {"string_value": value} for name, value in parameters.items()},
    }


async def _json_body(request: Request) -> dict[str, Any]:
    """A small JSON object; an empty body counts as an empty one. Raises InputError."""
    too_long = InputError("too_many_bytes", f"the body is larger than the {_OVERHEAD} bytes allowed here")
    body = await within(request, _OVERHEAD, too_long).body()
    try:
        value = json.loads(body) if body.strip() else {}
    except (ValueError, RecursionError):
        raise InputError("invalid_body", "the body is not valid JSON") from None
    if not isinstance(value, dict):
        raise InputError("invalid_body", "the body must be a JSON object")
    return value


def _read(one: Face, body: bytes, headers: Mapping[str, str], limit: int) -> InferRequest:
    """The body -> a request that fits the model's inputs, its picture files no longer in base64."""
    plain = inflate(body, headers.get("content-encoding", ""), limit)
    raw_input = "image" if one.encoded else None
    request = parse_infer(plain, headers.get(HEADER_LENGTH), max_json_bytes=MAX_JSON_BYTES, raw_input=raw_input)
    check_inputs(request.inputs, one.inputs, one.name)
    image = request.inputs["image"]
    if one.encoded and not image.binary:
        for index, text in enumerate(image.array):
            image.array[index] = decode_base64(text, f"image[{index}]")
    return request


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
    pairs = query + option_pairs(given)
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
        pairs.append(("scales", ",".join(str(scale) for scale in request.inputs["scales"].array)))
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
        if height * width > settings.max_pixels:
            raise InputError(
                "too_many_pixels",
                f"the pictures are {width} x {height} = {width * height} pixels, more than the {settings.max_pixels} "
                "allowed",
            )
    return list(image.array)


async def _one_for_each(
    pictures: list[Any], segment: Callable[[bytes | np.ndarray], Coroutine[Any, Any, Result]]
) -> list[Result]:
    """Segment the pictures of a request, a few at a time. Where one fails, so does the request, and names it."""
    siblings = Siblings()

    async def one(index: int, picture: bytes | np.ndarray) -> Result:
        async with siblings.turns:
            try:
                return await siblings.segment(partial(segment, picture))
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
    limits = {"max_bytes": pipeline.settings.max_bytes, "max_pixels": pipeline.settings.max_pixels}
    sizes: list[tuple[int, int]] = []
    for index, picture in enumerate(pictures):
        try:
            stated, _, _ = await in_pool(pipeline.readers, partial(read_size, picture, **limits), deadline)
        except InputError as error:
            raise _named(error, index) from None
        sizes.append(reduced_size(*stated, options.max_side))
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
    encoding: str | None,
) -> tuple[bytes, int | None]:
    """The response's body, compressed where asked for, and the length of its JSON before that."""
    if _need_one_size(outputs):
        sizes = [(result.segmentation.mask.shape[1], result.segmentation.mask.shape[0]) for result in results]
        for index, size in enumerate(sizes):
            if size != sizes[0]:
                raise _sizes_differ(index, size, sizes[0])
    stacked = [(asked, np.stack([getattr(result.segmentation, asked.name) for result in results])) for asked in outputs]
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


def _logging_settings(settings: Settings) -> dict[str, Any]:
    level = logging.getLogger().getEffectiveLevel()
    return {
        "log_file": "",
        **{name: level <= least for name, least in reversed(_LEVELS)},
        "log_verbose_level": int(level <= logging.DEBUG),
        "log_format": settings.log_format,
    }


def _level(wanted: dict[str, Any], settings: Settings) -> int:
    """The one level of Python's logging that the switches describe, those not given as they are. Raises InputError."""
    present = _logging_settings(settings)
    for name, value in wanted.items():
        if name not in present:
            raise InputError("invalid_body", f"unknown log setting {name[:64]!a}; there are {', '.join(present)}")
        if type(value) is not type(present[name]):
            raise InputError("invalid_body", f"log setting {name} must be like {json.dumps(present[name])}")
        if isinstance(value, str) and value != present[name]:
            raise InputError("not_implemented", f"log setting {name} cannot be changed while the service runs")
    described = {**present, **wanted}
    if described["log_verbose_level"]:
        off = next((name for name, _ in _LEVELS if wanted.get(name) is False), None)
        if off:
            raise InputError("invalid_body", f"log_verbose_level needs {off}; set log_verbose_level to 0 as well")
        return logging.DEBUG
    level = logging.CRITICAL
    switches = [described[name] for name, _ in _LEVELS]
    if sorted(switches, reverse=True) != switches:
        raise InputError("invalid_body", "log_info needs log_warnings, and log_warnings needs log_errors")
    for on, (_, least) in zip(switches, _LEVELS, strict=True):
        level = least if on else level
    return level
