"""The service on a Ray cluster: the application of `serve` as a Ray Serve deployment, on as many nodes as there are.

A proxy on each node takes the requests and hands each, as it comes, to one of the less busy replicas. A replica is the
whole service: it loads every model of the settings, prices and admits, batches and refuses by itself, so that what was
promised for one process holds for each of many. What waits and runs in the replicas decides how many there are.

`serve run service.cluster:app max_replicas=4` and a Serve config file with `import_path: service.cluster:app` deploy
the same; the settings are then those of the environment.
"""

import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from typing import Any

import ray
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import AutoscalingConfig, HTTPOptions
from ray.serve.context import _get_global_client
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview, LoggingConfig, ReplicaState
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import allocator, logs
from service.app import create_app
from service.errors import first_line
from service.models import Models
from service.settings import EMBEDDED_MODEL, Settings

NAME = "encnet"  # of the application and of its deployment

MAX_ONGOING = 1000  # requests in one replica: its own admission is to decide, and not the proxies' queue
SCALE_UP_SECONDS = 3.0
SCALE_DOWN_SECONDS = 120.0
LOAD_SECONDS = 15.0  # over which the load is averaged
HEALTH_SECONDS = 5.0  # between two checks; a replica that fails three in a row is replaced
SURGE_PERCENT = 20  # of the replicas that an update may have beside those to be replaced
LEAST_SHARE = 0.0001  # of a CPU or a GPU
KNOCK_SECONDS = 5.0
SPARE_SECONDS = 15.0  # beyond a request's or the grace period's own time, until Ray ends what should have ended

_POLL_SECONDS = 0.2

_serve_log = logging.getLogger("ray.serve")


class ClusterError(Exception):
    """The service cannot be had on this cluster; the message is one sentence that says why and what to do."""


class Layout(BaseModel):
    """How many replicas there are, and what Ray sets aside for each.

    `ongoing_requests` is how many a replica should have on average, running and waiting; more replicas are started
    above it, and some stopped below. Without `max_replicas` there are as many as the cluster has room for.
    """

    model_config = ConfigDict(extra="forbid")

    min_replicas: int = Field(default=1, ge=1)
    max_replicas: int | None = Field(default=None, ge=1)
    ongoing_requests: float = Field(default=2.0, gt=0, allow_inf_nan=False)
    cpus: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    gpus: float = Field(default=0.0, ge=0, allow_inf_nan=False)

    @field_validator("cpus", "gpus")
    @classmethod
    def _counted_by_ray(cls, value: float) -> float:
        if 0 < value < LEAST_SHARE:
            raise ValueError(f"must be 0 or at least {LEAST_SHARE:g}, the smallest part that Ray counts")
        return value

    @field_validator("gpus")
    @classmethod
    def _whole_above_one(cls, value: float) -> float:
        if value > 1 and value != int(value):
            raise ValueError(f"must be a part of one GPU, as in 0.5, or a whole number of them, not {value:g}")
        return value

    @model_validator(mode="after")
    def _room_for_the_least(self) -> "Layout":
        if self.max_replicas is not None and self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas {self.max_replicas} is below min_replicas {self.min_replicas}")
        if not self.cpus and not self.gpus:
            raise ValueError("a replica must take some of a CPU or of a GPU")
        return self

    @property
    def resources(self) -> dict[str, float]:
        """What one replica takes, in Ray's names."""
        return {name: amount for name, amount in (("CPU", self.cpus), ("GPU", self.gpus)) if amount}

    @property
    def takes(self) -> str:
        """What one replica takes, for people: "1 CPU and 0.5 GPU"."""
        return " and ".join(f"{amount:g} {name}" for name, amount in self.resources.items())

    def fits(self, room: dict[str, float]) -> int:
        """For how many replicas there is room."""
        return int(min(room.get(name, 0.0) / amount for name, amount in self.resources.items()))


def check_room(layout: Layout, has: dict[str, float]) -> None:
    """Raises ClusterError where there is no room for the fewest replicas."""
    if layout.fits(has) < layout.min_replicas:
        found = f"{has.get('CPU', 0):g} CPU and {has.get('GPU', 0):g} GPU"
        raise ClusterError(
            f"there is no room here for {layout.min_replicas} x {layout.takes}: this machine has {found}"
        )


def for_worker(settings: Settings, layout: Layout) -> Settings:
    """The settings of a process that Ray gives so many CPUs and GPUs.

    Raises ClusterError for settings that a cluster cannot have.
    """
    if settings.device == "cuda" and not layout.gpus:
        raise ClusterError("device cuda needs a GPU for each replica; say how much of one, as in --gpus 0.5")
    if settings.device == "cpu" and layout.gpus:
        raise ClusterError("device cpu leaves the GPUs unused that are set aside by --gpus; leave one of the two out")
    changes: dict[str, Any] = {
        "device": "cuda" if layout.gpus else "cpu",
        "threads": settings.threads or max(1, int(layout.cpus)),
        "models": {name: path.resolve() for name, path in settings.models.items()},
    }
    if settings.model != EMBEDDED_MODEL:
        changes["model"] = settings.model.resolve()
    return settings.model_copy(update=changes)


# ---- in the replicas


class Replica:
    """One copy of the service. It is ready once its models are."""

    def __init__(self, settings: Settings, embedded: bool) -> None:
        """`embedded`: whether the model is the embedded one, which each node has where its own copy of the code is."""
        if embedded:
            settings = settings.model_copy(update={"model": EMBEDDED_MODEL})
        logs.set_up(settings.log_format, settings.log_level)
        allocator.return_large_blocks()
        self._models = Models(settings)
        self._models.start()

    def __serve_build_asgi_app__(self) -> FastAPI:
        app = create_app(models=self._models)
        app.add_middleware(OneRequestId)
        return app

    async def check_health(self) -> None:
        """Asked by Ray. Raises RuntimeError where a model does not run: a restart may be quicker than the next check,
        three failures in a row are the end of the replica.
        """
        unwell = [f"model {served.name} is {served.state}" for served in self._models.all if served.state != "ready"]
        if unwell:
            raise RuntimeError("; ".join(unwell))

    async def drain(self) -> int:
        """Refuse new work from now on; how many requests are in flight."""
        self._models.drain()
        return self._models.in_flight

    def __del__(self) -> None:
        if hasattr(self, "_models"):
            self._models.close()


class OneRequestId:
    """Middleware: leaves the answer's X-Request-ID to Ray's proxy, which adds the one that the request came with."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = Headers(scope=scope).get("x-request-id") if scope["type"] == "http" else None

        async def send_without_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                if headers.get("x-request-id") == given:
                    del headers["x-request-id"]
            await send(message)

        await self.app(scope, receive, send_without_id)


# ---- what is deployed


def application(settings: Settings, layout: Layout, room: int = 0) -> serve.Application:
    """The application for a cluster that has room for so many replicas.

    In an update, new replicas are ready before old ones stop, where there is room for more than the most replicas;
    otherwise a few stop first, as Ray would wait for ever for room that only they can make. What comes while there is
    no replica waits.

    Raises ClusterError for settings that a cluster cannot have.
    """
    if settings.remote_control:
        raise ClusterError(
            "remote_control would load and unload models in one replica alone; in a cluster, deploy again instead"
        )
    at_most = layout.max_replicas or max(layout.min_replicas, room)
    make_deployment = serve.deployment(
        name=NAME,
        ray_actor_options={"num_cpus": layout.cpus, "num_gpus": layout.gpus},
        autoscaling_config=AutoscalingConfig(
            min_replicas=layout.min_replicas,
            max_replicas=at_most,
            target_ongoing_requests=layout.ongoing_requests,
            upscale_delay_s=SCALE_UP_SECONDS,
            downscale_delay_s=SCALE_DOWN_SECONDS,
            look_back_period_s=LOAD_SECONDS,
        ),
        max_ongoing_requests=MAX_ONGOING,
        max_surge_percent=SURGE_PERCENT if room >= at_most + -(-at_most * SURGE_PERCENT // 100) else 0,
        graceful_shutdown_timeout_s=settings.grace_seconds + SPARE_SECONDS,
        graceful_shutdown_wait_loop_s=_POLL_SECONDS,
        health_check_period_s=HEALTH_SECONDS,
        max_constructor_retry_count=3,
        logging_config=LoggingConfig(enable_access_log=False),
    )
    deployment = make_deployment(serve.ingress()(Replica))
    return deployment.bind(for_worker(settings, layout), settings.model == EMBEDDED_MODEL)


def app(layout: Layout) -> serve.Application:
    """For `serve run` and Serve's config files: the arguments are those of Layout, the settings the environment's.

    It is called where no cluster can be asked: without `max_replicas` there are `min_replicas`.
    """
    return application(Settings(), layout)


# ---- from outside


@contextmanager
def connected(address: str | None, layout: Layout | None = None) -> Iterator[None]:
    """Be part of a Ray cluster: of the one at an address (`auto` for one that this machine is part of), or of one of
    this machine's own that ends with the block.

    Raises ClusterError where there is none, and where this machine alone has no room for the layout, and
    KeyboardInterrupt at SIGTERM too.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_SERVE_CONTROL_LOOP_INTERVAL_S", "0.5")  # its own 0.1 takes 3 % of a core, all the time
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "30")  # its own 5 kills one that a busy core starts
    _serve_log.setLevel(logging.ERROR)
    mine: dict[str, Any] = {"include_dashboard": False} if address is None else {}
    try:
        if address:
            _knock(address)
        ray.init(address or "local", log_to_driver=False, logging_level=logging.ERROR, **mine)
    except SystemExit:  # Ray's own answer to SIGTERM, while it starts
        raise KeyboardInterrupt from None
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        where = f"at {address}" if address else "on this machine"
        raise ClusterError(f"there is no Ray cluster to be had {where}: {' '.join(str(error).split())}") from None
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray's own would abort and dump core
        if not address and layout:
            check_room(layout, ray.cluster_resources())
        yield
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Raises OSError where nothing listens: Ray itself would try for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), KNOCK_SECONDS).close()


def deploy(settings: Settings, layout: Layout, tell: Callable[[str], None]) -> int:
    """Deploy, or bring what is deployed up to date replica by replica, and wait for it; returns how many replicas run.

    `tell` is called with what it waits for, where it has to wait for room.

    Raises ClusterError where the replicas do not come up.
    """
    try:
        before = serve.status().applications.get(NAME)
        room = layout.fits(ray.available_resources()) + (_running(before) if before else 0)
        target = application(settings, layout, room)
        _listen(settings)
        serve.run_many([serve.RunTarget(target, name=NAME)], wait_for_applications_running=False)
        told = ""
        while (state := _deployed()).status != ApplicationStatus.RUNNING:
            reason = _last_line("\n".join([state.message, *(one.message for one in state.deployments.values())]))
            if state.status == ApplicationStatus.DEPLOY_FAILED:
                raise ClusterError(f"the replicas cannot be started: {reason}")
            if reason and reason != told:
                tell(told := reason)
            time.sleep(_POLL_SECONDS)
    except (RayError, RayServeException, TimeoutError) as error:
        raise ClusterError(f"the service cannot be deployed: {_said(error)}") from None
    return _running(state)


def _listen(settings: Settings) -> None:
    """Let Serve's proxies listen where the settings say, which is for good: one that runs takes no other address.

    Raises ClusterError where they listen elsewhere already, or end requests sooner than the settings do.
    """
    wanted = HTTPOptions(
        host=settings.host, port=settings.port, request_timeout_s=settings.max_timeout_ms / 1000 + SPARE_SECONDS
    )
    try:
        serve.start(http_options=wanted, logging_config=LoggingConfig(enable_access_log=False, log_level="WARNING"))
    except RayError:
        if not serve.status().applications:
            serve.shutdown()  # or the next attempt would find a Serve that runs and does not listen
        raise
    client = _get_global_client()
    assert client is not None  # as Serve runs
    has = client.http_config
    if (has.host, has.port) != (wanted.host, wanted.port):
        raise ClusterError(
            f"Serve listens on {has.host} port {has.port} on this cluster already; "
            f"deploy with --host {has.host} --port {has.port}, or after --stop"
        )
    if has.request_timeout_s and has.request_timeout_s < wanted.request_timeout_s:
        raise ClusterError(
            f"Serve was started to end requests after {has.request_timeout_s:g} s, and max_timeout_ms "
            f"{settings.max_timeout_ms} with {SPARE_SECONDS:g} s to spare is longer; deploy after --stop"
        )


def _deployed() -> ApplicationStatusOverview:
    try:
        return serve.status().applications[NAME]
    except KeyError:
        raise ClusterError("the service was removed while it was deployed; deploy it again") from None


def stop(settings: Settings) -> None:
    """Drain and remove, and Serve too, which frees its port, unless it has another application.

    Raises ClusterError where nothing is deployed.
    """
    _drain_and_remove(settings)
    if not serve.status().applications:
        serve.shutdown()


def _drain_and_remove(settings: Settings) -> None:
    """New work gets 503, what is in flight has the grace period to be finished."""
    try:
        handle = serve.get_app_handle(NAME)
    except RayServeException:
        raise ClusterError("nothing of this service is deployed on the cluster") from None
    end = time.monotonic() + settings.grace_seconds
    while (left := end - time.monotonic()) > 0:
        with suppress(RayError, TimeoutError):  # a replica may end meanwhile
            if not any(handle.broadcast("drain").results(timeout_s=left)):
                break
        time.sleep(_POLL_SECONDS)
    with suppress(TimeoutError):  # Ray goes on by itself
        serve.delete(NAME)


def stay(settings: Settings, layout: Layout, tell: Callable[[str], None]) -> None:
    """Until SIGTERM or Ctrl-C, then drain and remove. SIGHUP deploys again, with the model files as they are then.

    A second signal ends at once. `tell` is called with what goes wrong in between.
    """
    signals: SimpleQueue[int] = SimpleQueue()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, frame: signals.put(number))
    while signals.get() == signal.SIGHUP:
        try:
            deploy(settings, layout, tell)
        except ClusterError as error:
            tell(str(error))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: sys.exit(1))
    _drain_and_remove(settings)


def _running(state: ApplicationStatusOverview) -> int:
    deployment = state.deployments.get(NAME)
    return deployment.replica_states.get(ReplicaState.RUNNING, 0) if deployment else 0


def _said(error: Exception) -> str:
    return first_line(getattr(error, "cause", None) or error)  # what happened in another process has a traceback before


def _last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2]
