"""The models in service, by name: load, reload without dropping a request, unload."""

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from service import cores
from service.engine import Engine, ModelError
from service.errors import InputError, Refusal, first_line
from service.pipeline import Admitted, Pipeline
from service.settings import Settings

_log = logging.getLogger(__name__)


@dataclass
class Served:
    """One model: its file, and the pipeline that runs it; None while it is not loaded."""

    name: str
    path: Path
    pipeline: Pipeline | None = None
    reason: str = "not loaded"
    changing: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def state(self) -> Literal["ready", "starting", "restarting", "failed", "closed", "unloaded"]:
        """The device's state, or `unloaded`."""
        return self.pipeline.device.state if self.pipeline else "unloaded"


class Models:
    """Every model the service was started with. A request never names a file, only one of these.

    The first is the one that is meant where a request names none. For all models together, `workers` are the threads
    that decode, `encoders` those that write answers, as one may take many seconds, and `readers` those that read
    headers: a refusal must not wait behind work let in earlier. `house` counts what is let in.
    """

    def __init__(self, settings: Settings, open_engine: "Callable[[Path, Settings], Engine] | None" = None) -> None:
        self.settings = settings
        self._open_engine = open_engine or _open_engine
        self.on_load: Callable[[str, Pipeline], None] = lambda name, pipeline: None
        self.draining = False  # see drain
        self.workers = ThreadPoolExecutor(cores.available(), thread_name_prefix="codec")
        self.encoders = ThreadPoolExecutor(cores.available(), thread_name_prefix="encoder")
        self.house = Admitted()
        self.readers = ThreadPoolExecutor(2, thread_name_prefix="reader")
        paths = {settings.model.stem: settings.model, **settings.models}
        self._served = {name: Served(name, path) for name, path in paths.items()}
        self.default = next(iter(self._served))

    @property
    def all(self) -> Sequence[Served]:
        """In the order of the settings."""
        return list(self._served.values())

    def served(self, name: str | None = None) -> Served:
        """A model by name, loaded or not. Raises InputError with code unknown_model."""
        name = self.default if name is None else name
        if name not in self._served:
            raise InputError(
                "unknown_model", f"there is no model {name[:64]!r}; the models are {', '.join(self._served)}"
            )
        return self._served[name]

    def pipeline(self, name: str | None = None) -> Pipeline:
        """The pipeline for new work. Raises InputError with code unknown_model, and Refusal where there is none now."""
        served = self.served(name)
        if self.draining:
            raise Refusal("draining", "the service is stopping", self.settings.grace_seconds)
        if served.pipeline is None:
            raise Refusal("unloaded", f"the model {served.name} is not loaded: {served.reason}; see /models for others")
        return served.pipeline

    @contextmanager
    def hold(self, name: str | None = None) -> Iterator[Pipeline]:
        """The pipeline for a request of several steps, not stopped before the block ends. Raises as `pipeline` does."""
        pipeline = self.pipeline(name)
        pipeline.holders += 1
        try:
            yield pipeline
        finally:
            pipeline.holders -= 1

    def start(self) -> None:
        """Load every model and wait for all: an interpreter that ends while one still loads aborts.

        Raises engine.ModelError for the first that cannot be served.
        """
        for served in self.all:
            served.pipeline = self._make(served)
        failures = []
        for served in self.all:
            assert served.pipeline is not None
            try:
                served.pipeline.device.wait_until_started()
                served.reason = ""
            except Exception as error:
                failures.append(error)
        if failures:
            raise failures[0]

    async def load(self, name: str) -> None:
        """Load a model's file anew. Requests go on with what is loaded until the new one is ready, then finish on it.

        Raises engine.ModelError where the file cannot be served; what was loaded stays.
        """
        served = self.served(name)
        async with served.changing:
            fresh = self._make(served)
            try:
                while fresh.device.state == "starting":  # on a thread, the wait would outlast the end of the service
                    await asyncio.sleep(0.02)
                fresh.device.wait_until_started()
            except Exception:
                fresh.close()
                raise
            old, served.pipeline, served.reason = served.pipeline, fresh, ""
            self.on_load(name, fresh)
            _log.info("model %s is loaded from %s", name, served.path)
            await self._retire(old)

    async def unload(self, name: str) -> None:
        """Take a model out of service once its requests have been answered."""
        served = self.served(name)
        async with served.changing:
            old, served.pipeline, served.reason = served.pipeline, None, "it was unloaded"
            await self._retire(old)

    def drain(self) -> None:
        """From now on, refuse new work; what is in flight goes on."""
        self.draining = True

    @property
    def in_flight(self) -> int:
        """Admitted requests that have no answer yet."""
        return self.house.requests

    def close(self) -> None:
        """Stop every model."""
        for served in self.all:
            if served.pipeline:
                served.pipeline.close()
        for pool in (self.workers, self.encoders, self.readers):
            pool.shutdown(wait=False, cancel_futures=True)

    def _make(self, served: Served) -> Pipeline:
        settings = self.settings

        def load() -> Engine:
            engine = self._open_engine(served.path, settings)
            try:
                engine.warm_up()
            except Exception as error:  # ONNX Runtime's own exceptions share no base class of their own
                raise ModelError(f"{served.path} loads but does not run: {first_line(error)}") from error
            return engine

        return Pipeline(load, settings, self.workers, self.readers, self.encoders, self.house)

    async def _retire(self, pipeline: Pipeline | None) -> None:
        if pipeline is None:
            return
        while pipeline.admitted.requests or pipeline.holders:
            await asyncio.sleep(0.02)
        await asyncio.to_thread(pipeline.close)


def _open_engine(path: Path, settings: Settings) -> Engine:
    return Engine(path, settings.device, settings.threads, settings.gpu_memory_limit, settings.lanes)
