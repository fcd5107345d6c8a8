"""Serving over HTTP: the listening socket, the banner, and the way to stop without losing a request."""

import asyncio
import contextvars
import gc
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import cast

import uvicorn
from prometheus_client import Counter

from service import allocator, connections, logs
from service.app import create_app
from service.device import THREAD_NAME
from service.info_routes import not_alive
from service.models import Models
from service.settings import Settings

DIED = 70  # exit code of a server whose model could not be started again

_POLL_SECONDS = 0.05

_log = logging.getLogger(__name__)


class CannotListen(Exception):
    """The address is not to be had; the message is one sentence that says why and what to do."""


def listen(settings: Settings) -> socket.socket:
    """The listening socket, taken before the model is loaded so that a port in use is told at once.

    Raises CannotListen.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise CannotListen(f"cannot listen on {settings.host}: {error.strerror}") from None
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise CannotListen(
            f"cannot listen on {settings.host} port {settings.port}: {(error.strerror or str(error)).lower()}; "
            "choose another with --port (make serve PORT=...)"
        ) from None
    return listener


class Server(uvicorn.Server):
    """uvicorn that drains: on the first SIGTERM or Ctrl-C new work gets 503, what is in flight is finished.

    The socket stays open meanwhile, so that load balancers read /readyz and late requests get an answer. A second
    signal, or the end of the grace period, stops within a second.
    """

    def __init__(self, config: uvicorn.Config, models: Models, cut: Counter, ready: Callable[[], None]) -> None:
        """`cut` counts the connections that had to be ended, `ready` is called once requests are answered."""
        super().__init__(config)
        self._models = models
        self._cut = cut
        self._ready = ready
        self._draining: asyncio.Task[None] | None = None
        self.died = False
        self._reloads: list[asyncio.Task[None]] = []

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, then tell the caller."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.started:
            self._loop.add_signal_handler(signal.SIGHUP, self._reload)
            known = cast("set[connections.Connection]", self.server_state.connections)
            self._watching = asyncio.create_task(connections.watch(known, self._models.settings, self._cut))
            self._ready()

    async def on_tick(self, counter: int) -> bool:
        """Stop when a model has died for good; called by uvicorn ten times a second."""
        if not self.died and not_alive(self._models):
            _log.error("stopping: %s", "; ".join(not_alive(self._models)))
            self.died = self.should_exit = True
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: drain. Second: stop."""
        if self._models.draining or not self.started:
            self.config.timeout_graceful_shutdown = 1
            self.force_exit = self.should_exit  # the time above is read as the shutdown begins, and it has begun
            super().handle_exit(sig, frame)
            return
        self._models.drain()
        # The signal may have come in the midst of a request, whose id is not that of the stop.
        self._loop.call_soon_threadsafe(self._start_draining, context=contextvars.Context())

    def _start_draining(self) -> None:
        self._draining = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        grace = self._models.settings.grace_seconds
        _log.info("stopping: %d requests in flight, up to %g s for them", self._models.in_flight, grace)
        until = self._loop.time() + grace
        while self._models.in_flight and self._loop.time() < until:
            await asyncio.sleep(_POLL_SECONDS)
            if self.should_exit:
                return
        # What has left the device may still be encoded or on its way out; the grace period is for both together.
        self.config.timeout_graceful_shutdown = max(1, round(until - self._loop.time()))
        self.should_exit = True

    def _reload(self) -> None:
        self._reloads = [asyncio.create_task(self._reload_one(served.name)) for served in self._models.all]

    async def _reload_one(self, name: str) -> None:
        try:
            await self._models.load(name)
        except Exception as error:  # a broken file must not take a working service down
            _log.error("model %s is not loaded anew, the old one stays: %s", name, error)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Within the block SIGINT and SIGTERM end the process at once, with exit code 0.

    The threads that load cannot be stopped, and under them the interpreter would abort. An exception in the main thread
    might come out of the midst of Python's own locks, as while it starts a thread.
    """
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda *_: os._exit(0)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(settings: Settings, listener: socket.socket, ready: Callable[[Models], None]) -> None:
    """Serve until told to stop; `ready` is called once requests are answered.

    Raises engine.ModelError where a model cannot be served at the start, and SystemExit where one has died for good:
    another process may do better. Told to stop while the models load, the process ends with exit code 0.
    """
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # it is served from startup on; until then it would kill
    logs.set_up(settings.log_format, settings.log_level)
    allocator.return_large_blocks()
    connections.raise_descriptor_limit()
    models = Models(settings)
    with ended_by_signals():
        models.start()
    app = create_app(models=models)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=max(1, round(settings.grace_seconds)),
        server_header=False,
        http=connections.Connection,  # by h11: httptools is quicker, but loses the body of who offers HTTP/2
        ws="none",  # else who asks for a websocket would wait for ever, where a package for them is installed
        lifespan="off",
    )
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    server = Server(config, models, app.state.metrics.cut, lambda: ready(models))
    gc.collect()
    gc.freeze()  # what is loaded stays: a collection that looked at all of it again would hold every request up
    try:
        server.run(sockets=[listener])
    finally:
        models.close()
        if any(thread.name == THREAD_NAME for thread in threading.enumerate()):
            os._exit(DIED if server.died else 0)  # one that loads or hangs: see ended_by_signals
    if server.died:
        raise SystemExit(DIED)
