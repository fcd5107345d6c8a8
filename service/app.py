"""The ASGI application: routes, errors and middleware put together."""

from http import HTTPStatus

from fastapi import FastAPI, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import Response
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException

from service import __version__, tracing
from service.errors import ServiceError
from service.hugging_face import hugging_face_router
from service.info_routes import info_router
from service.metrics import Metrics
from service.middleware import RequestContext, error_response, fault_response
from service.models import Models
from service.oip import oip_router
from service.page import page_router
from service.segment_routes import segment_router
from service.settings import Settings


def create_app(settings: Settings | None = None, models: Models | None = None) -> FastAPI:
    """The application; the models of the settings are loaded and warmed up unless started ones are given.

    Raises engine.ModelError where a model cannot be served.
    """
    if models is None:
        models = Models(settings or Settings())
        models.start()
    settings = models.settings
    metrics = Metrics(models)
    models.on_load = metrics.watch
    for served in models.all:
        if served.pipeline:
            metrics.watch(served.name, served.pipeline)
    app = FastAPIOffline(
        title="EncNet Serve",
        version=__version__,
        description=_description(models),
        docs_url="/docs",
        redoc_url=None,
        redirect_slashes=False,  # to http:// behind a proxy that speaks https, with the picture and the key
        # for /docs, which has a place for the key then; RequestContext checks it
        dependencies=[Security(HTTPBearer(auto_error=False))] if settings.api_keys else [],
    )
    app.state.models = models
    app.state.metrics = metrics
    app.add_middleware(RequestContext, settings=settings, metrics=metrics)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=[
                "X-Request-ID",
                "Server-Timing",
                "Retry-After",
                "X-Cost-Pixels",
                "X-Predicted-Ms",
                "Inference-Header-Content-Length",
            ],
        )
    app.add_exception_handler(ServiceError, _service_error)
    app.add_exception_handler(HTTPException, _http_exception)
    app.add_exception_handler(RequestValidationError, _validation_error)

    app.include_router(segment_router(models, metrics))
    app.include_router(hugging_face_router(models, metrics))
    app.include_router(info_router(models, metrics))
    app.include_router(oip_router(models, metrics))
    app.include_router(page_router(models))
    tracing.instrument(app)
    return app


async def _service_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)
    return error_response(request, error)


async def _http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = HTTPStatus(error.status_code).phrase.lower().replace(" ", "_")
    path = request.scope["path"]
    message = {
        404: f"there is nothing at {path}; /docs lists what there is",
        405: f"{request.method} is not possible at {path}; send {(error.headers or {}).get('Allow', 'something else')}",
    }.get(error.status_code, str(error.detail))
    return fault_response(request, error.status_code, code, message, error.headers)


async def _validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
    return fault_response(request, 422, "invalid_request", "; ".join(faults))


def _description(models: Models) -> str:
    settings = models.settings
    served = [
        f"| {entry.name}{' (default)' if entry.name == models.default else ''} | {len(metadata.classes)} classes: "
        f"{', '.join(metadata.classes[:20])}{' ...' if len(metadata.classes) > 20 else ''} | "
        f"scales {', '.join(f'{scale:g}' for scale in metadata.scales)}, flip {str(metadata.flip).lower()} |"
        for entry in models.all
        if entry.pipeline is not None
        for metadata in [entry.pipeline.engine.metadata]
    ]
    return f"""
Scene segmentation with EncNet: a picture in, a mask and a score of presence for each class out.

| model | classes | defaults |
|---|---|---|
{chr(10).join(served)}

| limit | |
|---|---|
| scales allowed | {settings.min_scale:g} to {settings.max_scale:g}, at most {settings.max_scales} |
| largest file | {settings.max_bytes} bytes |
| largest picture | {settings.max_pixels} pixels |
| time | {settings.timeout_ms} ms unless `timeout_ms` says otherwise, at most {settings.max_timeout_ms} ms |

Every error has the body `{{"error": {{"code", "message", "request_id"}}}}`. Send `X-Request-ID` to
choose the id yourself.
"""
