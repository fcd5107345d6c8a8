"""The models of the Open Inference Protocol: what each takes and gives, as Triton describes models, and its counts."""

import json
import time
from dataclasses import dataclass, field
from typing import Any

from service.engine import Engine
from service.models import Served
from service.oip_codec import TensorSpec

VERSION = "1"  # of every model; the protocol has versions, a file here has none
OPTIONS = ("scales", "flip", "max_side", "window", "stride", "classes", "timeout_ms")

_PHASES = {  # of a request here -> the protocol's words
    "total": "success",
    "queue": "queue",
    "decode": "compute_input",
    "infer": "compute_infer",
    "encode": "compute_output",
}
_NEVER = ("cache_hit", "cache_miss")  # nothing is cached; Triton's perf_analyzer reads these of every server


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


def described(spec: TensorSpec) -> dict[str, Any]:
    """The tensor as a model's metadata names it."""
    return {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)}


def config(one: Face, engine: Engine) -> dict[str, Any]:
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


@dataclass
class Statistics:
    """Counts of one model's infer requests, and for each phase [how often, nanoseconds]."""

    last_inference: int = 0
    inferences: int = 0
    runs: float = 0.0
    phases: dict[str, list[int]] = field(
        default_factory=lambda: {name: [0, 0] for name in ("fail", *_PHASES.values(), *_NEVER)}
    )

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
