"""The Open Inference Protocol v2 under /v2, for clients of Triton, KServe and others.

Every model NAME is there twice: NAME takes pixels, NAME_encoded takes picture files.

| model        | input `image`               | what holds for it                                                       |
|--------------|-----------------------------|-------------------------------------------------------------------------|
| NAME         | UINT8 [-1, -1, -1, 3]       | RGB, upright; all of one size                                           |
| NAME_encoded | BYTES [-1]                  | files, read as POST /segment reads them; in JSON as base64 or data URIs |

Both take `scales` FP32 [-1] and `flip` BOOL [] as inputs or as parameters, and of the other options of POST /segment
`window`, `stride`, `classes` and `timeout_ms`, with files `max_side` too, as parameters; what can be a parameter can
stand in the query too. Outputs are `mask` and `presence`, and `probabilities` where asked for by name; JSON is for
small ones. `classes` is about the mask: the others have scores of every class.

Here are the routes; an infer request is answered in oip_infer.py, its bytes are read and written in oip_codec.py.
"""

import json
import logging
import time
from collections import defaultdict
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from service import __version__
from service.errors import InputError, Refusal
from service.info_routes import not_alive, not_ready
from service.metrics import Metrics
from service.models import Models, Served
from service.oip_infer import answer_infer
from service.oip_logging import log_settings, wanted_level
from service.oip_models import VERSION, Face, Statistics, config, described, outputs_of
from service.settings import ENCODED
from service.upload import within

EXTENSIONS = (
    "binary_tensor_data",
    "model_configuration",
    "model_repository",
    "parameters",
    "statistics",
    "logging",
)

MAX_CONTROL_BYTES = 64 * 1024  # of a JSON body that asks for anything but infer

_STATES = {"ready": "READY", "starting": "LOADING", "restarting": "LOADING"}
_log = logging.getLogger(__name__)


def oip_router(models: Models, metrics: Metrics) -> APIRouter:
    """The routes, over these models. They are not in /openapi.json: the protocol has a description of its own."""
    router = APIRouter(prefix="/v2", include_in_schema=False)
    settings = models.settings
    statistics: defaultdict[str, Statistics] = defaultdict(Statistics)

    def face(name: str, version: str | None = None) -> Face:
        """A model of the protocol by name. Raises InputError with code unknown_model."""
        if version not in (None, VERSION):
            raise InputError("unknown_model", f"model {name[:64]!r} has only version {VERSION}")
        known = faces()
        if name not in known:
            raise InputError("unknown_model", f"there is no model {name[:64]!r}; the models are {', '.join(known)}")
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
        return {"model_stats": [statistics[name].answer(name) for name in faces()]}

    @router.get("/models/{name}/stats")
    @router.get("/models/{name}/versions/{version}/stats")
    async def model_statistics(name: str, version: str | None = None) -> dict[str, Any]:
        return {"model_stats": [statistics[face(name, version).name].answer(name)]}

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
            "inputs": [described(spec) for spec in one.inputs],
            "outputs": [described(spec) for spec in outputs_of(engine)],
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
        return config(one, models.pipeline(one.served.name).engine)

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
        try:
            return await answer_infer(one, request, models, metrics, statistics[name], started)
        except Exception:
            statistics[name].add_failure((time.perf_counter() - started) * 1000)
            raise

    # ---- logging, tracing, shared memory

    @router.get("/logging")
    async def current_log_settings() -> dict[str, Any]:
        return log_settings(settings)

    @router.post("/logging")
    async def change_log_settings(request: Request) -> dict[str, Any]:
        wanted = await _json_body(request)
        if wanted:
            check_control()
            logging.getLogger().setLevel(wanted_level(wanted, settings))
        return log_settings(settings)

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


async def _json_body(request: Request) -> dict[str, Any]:
    """A small JSON object; an empty body counts as an empty one. Raises InputError."""
    too_long = InputError("too_many_bytes", f"the body is larger than the {MAX_CONTROL_BYTES} bytes allowed here")
    body = await within(request, MAX_CONTROL_BYTES, too_long).body()
    try:
        value = json.loads(body) if body.strip() else {}
    except (ValueError, RecursionError):
        raise InputError("invalid_body", "the body is not valid JSON") from None
    if not isinstance(value, dict):
        raise InputError("invalid_body", "the body must be a JSON object")
    return value
