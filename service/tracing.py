"""OpenTelemetry: a span for each request, and within it one for each phase of a picture.

Set up by OpenTelemetry's own environment variables: OTEL_EXPORTER_OTLP_ENDPOINT, a collector's address that takes
OTLP over HTTP, switches it on; OTEL_SERVICE_NAME, OTEL_TRACES_SAMPLER and the others mean what they mean elsewhere.
"""

import logging
import os
import sys
import time
from collections.abc import Mapping

from fastapi import FastAPI

from service import logs

REQUIREMENTS = "service/requirements-tracing.txt"

_SWITCHES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_UNTRACED = "livez,readyz,healthz,metrics,v2/health"

_log = logging.getLogger(__name__)


def instrument(app: FastAPI) -> None:
    """Trace the application's requests, where the environment asks for it and the packages are installed.

    Where they are not, that is one logged line. Spans are sent in the background, and the last of them at the
    process's end.
    """
    switch = next((name for name in _SWITCHES if os.environ.get(name)), None)
    if not switch:
        return
    try:
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.util.http import parse_excluded_urls
    except ImportError as error:
        _log.warning("%s is set, but nothing is traced: %s; pip install -r %s", switch, error, REQUIREMENTS)
        return
    resource = Resource.create({"service.name": "encnet-serve"}).merge(OTELResourceDetector().detect())
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    app.add_middleware(
        OpenTelemetryMiddleware,
        excluded_urls=parse_excluded_urls(_UNTRACED),
        exclude_spans=["receive", "send"],
    )


def record_phases(phases: Mapping[str, float]) -> None:
    """Put phases, in milliseconds and one after another, into the current request's span, so that the last ends now.

    `total` is the span itself and no phase.
    """
    if not sys.modules.get("opentelemetry"):  # a failing import would be looked for anew with every request
        return
    from opentelemetry import trace

    span = trace.get_current_span()
    if not span.is_recording():
        return
    span.set_attribute("encnet.request_id", logs.request_id.get())
    tracer = trace.get_tracer(__name__)
    end = time.time_ns()
    for name, milliseconds in reversed(list(phases.items())):
        if name != "total":
            start = end - int(milliseconds * 1e6)
            tracer.start_span(name, start_time=start).end(end)
            end = start
