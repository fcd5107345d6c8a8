"""What the service says about itself: alive, ready, metrics, models, classes."""

import onnxruntime
from fastapi import APIRouter, Response

from service import __version__
from service.answers import (
    ClassEntry,
    ClassesAnswer,
    ErrorAnswer,
    HealthAnswer,
    HealthModel,
    ModelEntry,
    ModelIdentity,
    ModelsAnswer,
    StateAnswer,
)
from service.engine import Engine
from service.metrics import CONTENT_TYPE, Metrics
from service.models import Models

DROWNING = 0.95  # share of the queue's limits from which on load balancers are asked to send work elsewhere


def not_ready(models: Models) -> list[str]:
    """Why the service should get no new work now; empty where it should.

    A model that was unloaded is no reason, unless it is the one that is meant where a request names none.
    """
    settings = models.settings
    reasons = ["the service is stopping"] if models.draining else []
    longest_s = settings.deadline_share * settings.timeout_ms / 1000
    for served in models.all:
        if served.pipeline is None:
            if served.name == models.default:
                reasons.append(f"model {served.name} is not loaded: {served.reason}")
        elif served.state != "ready":
            reasons.append(f"model {served.name} is {served.state}: {served.pipeline.device.reason}".removesuffix(": "))
        elif (wait_s := served.pipeline.wait_s()) >= DROWNING * longest_s:
            reasons.append(f"the queue of model {served.name} is too long: about {wait_s:.1f} s")
    if models.house.cost >= DROWNING * settings.max_queue_pixels:
        reasons.append("the queue is full")
    return reasons


def not_alive(models: Models) -> list[str]:
    """Why the process should be restarted; empty where it should not."""
    return [
        f"model {served.name} could not be started again: {served.pipeline.device.reason}"
        for served in models.all
        if served.pipeline and served.state == "failed"
    ]


def info_router(models: Models, metrics: Metrics) -> APIRouter:
    """The routes, over these models."""
    router = APIRouter(tags=["service"])

    @router.head("/livez", include_in_schema=False)
    @router.get(
        "/livez",
        summary="Is the process alive? Where not, it should be restarted",
        responses={503: {"model": StateAnswer}},
    )
    async def livez(response: Response) -> StateAnswer:
        return _state(not_alive(models), response)

    @router.head("/readyz", include_in_schema=False)
    @router.get("/readyz", summary="Is the service ready for requests?", responses={503: {"model": StateAnswer}})
    async def readyz(response: Response) -> StateAnswer:
        return _state(not_ready(models), response)

    @router.get("/healthz", summary="Is the service up, and with which model?", responses={503: {"model": ErrorAnswer}})
    async def healthz() -> HealthAnswer:
        engine = models.pipeline().engine
        return HealthAnswer(
            version=__version__,
            onnxruntime=onnxruntime.__version__,
            device=engine.device,
            model=_facts(engine),
        )

    @router.get(
        "/metrics",
        summary="Counters for Prometheus",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def prometheus() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    @router.get("/models", summary="The models in service", responses={401: {"model": ErrorAnswer}})
    async def list_models() -> ModelsAnswer:
        entries = []
        for served in models.all:
            engine = served.pipeline.device.engine if served.pipeline else None
            entries.append(
                ModelEntry(
                    name=served.name,
                    default=served.name == models.default,
                    state=served.state,
                    device=engine.device if engine else None,
                    model=_facts(engine) if engine else None,
                )
            )
        return ModelsAnswer(models=entries)

    @router.get(
        "/classes",
        summary="Names, ids and colours of the classes",
        responses={status: {"model": ErrorAnswer} for status in (401, 404, 422, 503)},
    )
    async def classes(model: str | None = None) -> ClassesAnswer:
        engine = models.pipeline((model or "").strip() or None).engine
        pairs = zip(engine.metadata.classes, engine.metadata.palette, strict=True)
        entries = [ClassEntry(id=index, name=name, color=color) for index, (name, color) in enumerate(pairs)]
        identity = ModelIdentity(name=engine.metadata.name, sha256=engine.sha256)
        return ClassesAnswer(model=identity, classes=entries)

    return router


def _state(reasons: list[str], response: Response) -> StateAnswer:
    if reasons:
        response.status_code = 503
    return StateAnswer(ok=not reasons, reasons=reasons)


def _facts(engine: Engine) -> HealthModel:
    metadata = engine.metadata
    return HealthModel(
        name=metadata.name,
        sha256=engine.sha256,
        checkpoint_sha256=metadata.checkpoint_sha256,
        classes=len(metadata.classes),
        base_size=metadata.base_size,
        scales=list(metadata.scales),
        flip=metadata.flip,
        description=metadata.description,
        licence=metadata.licence,
    )
