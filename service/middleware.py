"""Around every request: its id, its key, its bytes, its log line and its count."""

import asyncio
import hmac
import logging
import re
import time
import uuid
from collections.abc import Mapping

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import logs
from service.answers import ErrorAnswer, Fault
from service.errors import Departed, InputError, Refusal, ServiceError
from service.metrics import Metrics
from service.settings import Settings

OPEN_PATHS = frozenset(("/", "/docs", "/openapi.json", "/livez", "/readyz", "/healthz", "/metrics")) | frozenset(
    ("/v2/health/live", "/v2/health/ready")
)
OPEN_FOLDERS = ("/page/", "/samples", "/static-offline-docs/")

_ORIGIN = re.compile(r"https?://[^/]*", re.IGNORECASE)
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
# Asked for every few seconds: logged at debug level.
_QUIET = {"/livez", "/readyz", "/healthz", "/metrics", "/v2/health/live", "/v2/health/ready"}
_SECURITY_HEADERS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "X-Frame-Options": "DENY"}

_RESTART_SECONDS = 5.0  # told to those whom a stop cut off

_log = logging.getLogger(__name__)


class RequestContext:
    """Middleware: an id for every request, in every answer and log line; keys; the number of bytes in the house.

    A client's own X-Request-ID is kept where it is at most 128 letters, digits and `._:-`; otherwise one is made.
    An unforeseen failure is logged and becomes a 500 that names the id.
    """

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics
        self.keys = [key.get_secret_value().encode() for key in settings.api_keys]
        self.bytes_limit = settings.max_buffered_bytes
        self.upload_seconds = settings.upload_timeout_ms / 1000
        self.bytes_held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if origin := _ORIGIN.match(scope["path"]):  # a target in absolute form, as for a proxy
            scope["path"] = scope["path"][origin.end() :] or "/"
        request = Request(scope)
        given = request.headers.get("x-request-id", "")
        request.state.request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        request.state.reason = "ok"
        logs.request_id.set(request.state.request_id)
        started = time.perf_counter()
        status, held, uploaded = 0, 0, False

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-ID"] = request.state.request_id
                for name, value in _SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        def hold(size: int) -> None:
            """Count bytes of the request, as they are received, unpacked or fetched, until it is over."""
            nonlocal held
            if held + size > self.bytes_limit:
                text = f"the request is larger than the {self.bytes_limit} bytes that are held at a time"
                raise InputError("too_many_bytes", text)
            if size and self.bytes_held + size > self.bytes_limit:
                raise Refusal("overloaded", "too many bytes are being received at the same time", 1.0)
            held += size
            self.bytes_held += size

        request.state.hold = hold

        async def receive_within_limit() -> Message:
            nonlocal uploaded
            left = None if uploaded else started + self.upload_seconds - time.perf_counter()
            try:
                async with asyncio.timeout(left):
                    message = await receive()
            except TimeoutError:
                text = f"the request's body was not there after {self.upload_seconds:g} s"
                raise InputError("upload_too_slow", text) from None
            uploaded = not message.get("more_body", False)
            hold(len(message.get("body", b"")))
            return message

        try:
            self._check_key(request)
            await self.app(scope, receive_within_limit, send_with_headers)
        except ServiceError as error:
            if not status:
                await error_response(request, error)(scope, receive, send_with_headers)
        except (ClientDisconnect, Departed):
            status = status or 499
        except asyncio.CancelledError:  # the grace period is over
            if not status:
                gone = Refusal("draining", "the service stopped before this request was finished", _RESTART_SECONDS)
                await error_response(request, gone)(scope, receive, send_with_headers)
        except Exception:
            _log.exception("the request failed")
            if not status:
                text = "the service failed; its log has the reason under this request_id"
                await fault_response(request, 500, "internal_error", text)(scope, receive, send_with_headers)
        finally:
            self.bytes_held -= held
            self._account(request, scope, status or 499, time.perf_counter() - started)

    def _check_key(self, request: Request) -> None:
        """Raises InputError where keys are asked for and the request shows none of them."""
        path = request.scope["path"]  # never of request.url, which the Host header is a part of
        if not self.keys or path in OPEN_PATHS or path.startswith(OPEN_FOLDERS) or request.method == "OPTIONS":
            return
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        shown = [request.headers.get("x-api-key", ""), token if scheme.lower() == "bearer" else ""]
        # Every key is compared, each in constant time, so that the time tells nothing about any of them.
        if not sum(hmac.compare_digest(text.strip().encode(), key) for text in shown for key in self.keys):
            raise InputError("unauthorized", "a key is needed: Authorization: Bearer KEY, or X-API-Key: KEY")

    def _account(self, request: Request, scope: Scope, status: int, seconds: float) -> None:
        """One count and one log line; 499 stands for a client that left."""
        route = getattr(scope.get("route"), "path", "other")
        reason = "departed" if status == 499 else request.state.reason
        if status == 499:
            self.metrics.departed.inc()
        self.metrics.requests.labels(route, str(status), reason).inc()
        level = logging.DEBUG if scope["path"] in _QUIET else logging.INFO
        path = "".join(letter if letter.isprintable() else f"\\x{ord(letter):02x}" for letter in scope["path"])
        facts = {"method": request.method, "path": path, "status": status, "reason": reason}
        if _log.isEnabledFor(level):
            line = f"{request.method} {path} {status} {reason} {seconds * 1000:.1f} ms"
            _log.log(level, line, extra={**facts, "ms": round(seconds * 1000, 2)})


def fault_response(
    request: Request, status: int, code: str, message: str, headers: Mapping[str, str] | None = None
) -> Response:
    """The body of every error; under /v2 that of the Open Inference Protocol, {"error": message}."""
    request.state.reason = code
    path = request.scope["path"]
    if path == "/v2" or path.startswith("/v2/"):
        return JSONResponse({"error": message}, status, headers)
    body = ErrorAnswer(error=Fault(code=code, message=message, request_id=request.state.request_id))
    return JSONResponse(body.model_dump(), status, headers)


def error_response(request: Request, error: ServiceError) -> Response:
    """The answer to an error that has a code."""
    return fault_response(request, error.status, error.code, error.message, error.headers)
