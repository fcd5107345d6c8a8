"""What the service counts, for Prometheus at /metrics."""

from collections.abc import Iterator, Sequence

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from service import __version__
from service.engine import Segmentation
from service.models import Models
from service.pipeline import Pipeline

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counters of one service; a registry of its own, so that two services in one process do not mix."""

    def __init__(self, models: Models) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "encnet_requests_total",
            "Requests answered, by route, HTTP status and reason (ok, or the error's code).",
            ["route", "status", "reason"],
            registry=self.registry,
        )
        self.batch_faults = Counter(
            "encnet_batch_faults_total",
            "Pictures of a batch that failed alone, by the error's code; the batch counts as answered.",
            ["reason"],
            registry=self.registry,
        )
        self.phases = Histogram(
            "encnet_phase_seconds",
            "Seconds of a request by phase: decode, queue, infer, encode, total.",
            ["phase"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.batches = Histogram(
            "encnet_batch_size",
            "Pictures that shared one run.",
            ["model"],
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=self.registry,
        )
        self.pictures = Counter("encnet_pictures_total", "Pictures segmented.", ["model"], registry=self.registry)
        self.present = Counter(
            "encnet_present_total",
            "Pictures in which a class is present, by the service's own threshold whatever a request's may be.",
            ["model", "class"],
            registry=self.registry,
        )
        self.departed = Counter(
            "encnet_departed_total", "Requests whose client left before the answer.", registry=self.registry
        )
        self.cut = Counter(
            "encnet_connections_cut_total",
            "Connections ended for what their client did not do: take_answer, send_head, end_body.",
            ["awaited"],
            registry=self.registry,
        )
        ProcessCollector(registry=self.registry)
        self.registry.register(_State(models))

    def watch(self, name: str, pipeline: Pipeline) -> None:
        """Count the runs of a model's device and what its answers find, every class from 0 on."""
        pipeline.device.on_run = self.batches.labels(name).observe
        threshold = pipeline.settings.threshold
        pictures = self.pictures.labels(name)
        for class_ in pipeline.engine.metadata.classes:
            self.present.labels(name, class_)

        # Without the pipeline, which would keep itself alive by it. A restart may find another file with other classes.
        def count(segmentation: Segmentation, classes: Sequence[str]) -> None:
            pictures.inc()
            for index in np.flatnonzero(segmentation.presence >= threshold).tolist():
                self.present.labels(name, classes[index]).inc()

        pipeline.on_answer = count

    def text(self) -> bytes:
        """The exposition format, for CONTENT_TYPE."""
        return generate_latest(self.registry)


class _State(Collector):
    """Gauges that are read off the models when Prometheus asks."""

    def __init__(self, models: Models) -> None:
        self._models = models

    def collect(self) -> Iterator[Metric]:
        """One sample for each model and gauge."""
        ready = GaugeMetricFamily("encnet_ready", "1 where the model takes work.", labels=["model"])
        pixels = GaugeMetricFamily(
            "encnet_queue_pixels", "Pixels x views admitted and not yet answered.", labels=["model"]
        )
        limit = GaugeMetricFamily("encnet_queue_limit_pixels", "Pixels x views that are admitted at most.")
        requests = GaugeMetricFamily("encnet_queue_requests", "Requests admitted, not yet answered.", labels=["model"])
        info = GaugeMetricFamily(
            "encnet_model_info", "1 for each loaded model.", labels=["model", "name", "sha256", "device", "version"]
        )
        limit.add_metric([], self._models.settings.max_queue_pixels)
        on_gpu = False
        for served in self._models.all:
            ready.add_metric([served.name], float(served.state == "ready" and not self._models.draining))
            if served.pipeline is None:
                continue
            pixels.add_metric([served.name], served.pipeline.admitted.cost)
            requests.add_metric([served.name], served.pipeline.admitted.requests)
            engine = served.pipeline.device.engine
            if engine is not None:
                on_gpu = on_gpu or engine.device == "cuda"
                info.add_metric([served.name, engine.metadata.name, engine.sha256, engine.device, __version__], 1)
        yield from (ready, pixels, limit, requests, info)
        if on_gpu and (memory := _gpu_memory()):
            yield GaugeMetricFamily("encnet_gpu_memory_used_bytes", "Bytes taken on the GPU, by all.", value=memory[0])
            yield GaugeMetricFamily("encnet_gpu_memory_bytes", "Bytes of the GPU's memory.", value=memory[1])


def _gpu_memory() -> tuple[int, int] | None:
    """Bytes taken and bytes in all on the first GPU, by its driver; None where the driver cannot be asked."""
    try:
        import pynvml

        pynvml.nvmlInit()
        memory = pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0))
    except Exception:  # metrics must be readable whatever state the driver is in
        return None
    return memory.used, memory.total
