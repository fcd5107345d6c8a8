"""The .onnx file as a Python object: read it, check that it is ours, segment pictures. A library, no HTTP."""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime as ort
from pydantic import BaseModel, ConfigDict, Field, Json, PositiveInt, ValidationError, model_validator

from service import kernels

HOW_TO_EXPORT = "`python -m export CHECKPOINT --output FILE.onnx` makes a file that can be served"

_INPUTS = {"image": "tensor(uint8)", "scales": "tensor(float)", "flip": "tensor(bool)"}
_OUTPUTS = ("mask", "presence")
_ERRORS_ONLY = 3  # ONNX Runtime's log level


class ModelError(Exception):
    """The model cannot be served; the message is one sentence that says why and what to do."""


class Metadata(BaseModel):
    """What the file says about itself in its `metadata_props`.

    `mean`, `std` are per channel on the 0..1 scale; at scale s the picture's long side becomes ceil(base_size * s);
    `scales` and `flip` are the defaults of a request; `palette` has one (r, g, b) of 0..255 for each class.
    """

    model_config = ConfigDict(frozen=True)

    format: Literal["encnet-serve/1"]
    graph: Literal["whole"]
    name: str
    classes: Json[tuple[str, ...]] = Field(min_length=1)
    palette: Json[tuple[tuple[int, int, int], ...]]
    mean: Json[tuple[float, float, float]]
    std: Json[tuple[float, float, float]]
    base_size: PositiveInt
    scales: Json[tuple[float, ...]] = Field(min_length=1)
    flip: bool
    resize: str
    align_corners: str
    reference_positions: str
    checkpoint_sha256: str
    licence: str | None = None
    description: str | None = None

    @model_validator(mode="after")
    def _palette_fits(self) -> "Metadata":
        if len(self.palette) != len(self.classes):
            raise ValueError(f"{len(self.classes)} classes but {len(self.palette)} palette entries")
        if not all(0 <= channel <= 255 for colour in self.palette for channel in colour):
            raise ValueError("a palette entry is outside 0..255")
        return self


@dataclass(frozen=True)
class Segmentation:
    """The answer for one picture: `mask` uint8 (H, W), uint16 above 255 classes; `presence` float32 (C,) in 0..1.

    `scales` and `flip` are those used; `infer_ms` is the time inside ONNX Runtime, in milliseconds.
    """

    mask: np.ndarray
    presence: np.ndarray
    scales: tuple[float, ...]
    flip: bool
    infer_ms: float


def read_metadata(properties: dict[str, str], file: Path) -> Metadata:
    """Check a file's `metadata_props`; raises ModelError which names what is missing or wrong."""
    if properties.get("graph") == "core":
        raise ModelError(f"{file} holds the bare network (graph=core), not whole inference; {HOW_TO_EXPORT}")
    try:
        return Metadata.model_validate(properties)
    except ValidationError as error:
        faults = error.errors(include_url=False)
    missing = [str(fault["loc"][0]) for fault in faults if fault["type"] == "missing"]
    if missing:
        raise ModelError(
            f"{file} is not an EncNet Serve model: no {', '.join(missing)} in its metadata; {HOW_TO_EXPORT}"
        )
    wrong = "; ".join(f"{'.'.join(map(str, fault['loc'])) or 'metadata'}: {fault['msg']}" for fault in faults)
    raise ModelError(f"{file} has metadata that cannot be used ({wrong}); {HOW_TO_EXPORT}")


class Engine:
    """A loaded model.

    One engine may be used from several threads, as ONNX Runtime's sessions may. How many inferences run at the same
    time is the caller's choice.

    Raises ModelError where the file is missing, is no ONNX model, lacks the metadata or the graph of an EncNet Serve
    model, or where the device asked for is not there.
    """

    def __init__(self, model: Path, device: Literal["auto", "cpu", "cuda"] = "auto", threads: int = 0) -> None:
        self.path = model
        self._session = _open_session(model, _providers(device), threads)
        self.metadata = read_metadata(self._session.get_modelmeta().custom_metadata_map, model)
        _check_graph(self._session, model)
        self.device: Literal["cpu", "cuda"] = (
            "cuda" if "CUDAExecutionProvider" in self._session.get_providers() else "cpu"
        )
        if device == "cuda" and self.device != "cuda":
            raise ModelError("CUDA was asked for, but ONNX Runtime could not start it on this machine; try device cpu")
        with model.open("rb") as file:
            self.sha256 = hashlib.file_digest(file, "sha256").hexdigest()

    def segment(
        self, image: np.ndarray, scales: Sequence[float] | None = None, flip: bool | None = None
    ) -> Segmentation:
        """Segment one picture.

        `image` is uint8 (H, W, 3) RGB, upright. `scales` and `flip` choose the views that are averaged; left out, they
        are the model's own defaults. Raises ValueError for an array of another shape or dtype, or no scale above 0.
        """
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise ValueError(f"image must be uint8 (H, W, 3), not {image.dtype} {image.shape}")
        used_scales = self.metadata.scales if scales is None else tuple(scales)
        if not used_scales or not all(scale > 0 for scale in used_scales):
            raise ValueError(f"scales must be one or more numbers above 0, not {used_scales}")
        used_flip = self.metadata.flip if flip is None else flip
        feeds = {
            "image": np.ascontiguousarray(image)[None],
            "scales": np.asarray(used_scales, np.float32),
            "flip": np.asarray(used_flip, np.bool_),
        }
        started = time.perf_counter()
        mask, presence = self._session.run(_OUTPUTS, feeds)
        infer_ms = (time.perf_counter() - started) * 1000
        return Segmentation(mask[0], presence[0], used_scales, used_flip, infer_ms)

    def warm_up(self) -> None:
        """Run once, so that the first request does not pay for set-up.

        On a GPU that means the default views; on a CPU, where only the first touch of weights and code counts, a small
        view is enough.
        """
        grey = np.full((64, 64, 3), 128, np.uint8)
        if self.device == "cuda":
            self.segment(grey)
        else:
            self.segment(grey, scales=(0.25,), flip=False)


def _providers(device: str) -> list[Any]:
    """ONNX Runtime's execution providers for a device, the preferred one first."""
    if device == "cpu":
        return ["CPUExecutionProvider"]
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        if device == "cuda":
            raise ModelError(
                "CUDA was asked for, but this build of ONNX Runtime has no CUDA; "
                "install service/requirements-gpu.txt in a fresh environment, or use device cpu"
            )
        return ["CPUExecutionProvider"]
    ort.preload_dlls()  # finds the CUDA libraries that pip installed
    cuda = {
        "cudnn_conv_algo_search": "HEURISTIC",  # an exhaustive search would run anew for every picture size
        "arena_extend_strategy": "kSameAsRequested",  # sizes vary: doubling the arena each time would hoard memory
    }
    return [("CUDAExecutionProvider", cuda), "CPUExecutionProvider"]


def _open_session(model: Path, providers: list[Any], threads: int) -> ort.InferenceSession:
    if not model.is_file():
        kind = "is a folder, not a file" if model.is_dir() else "does not exist"
        raise ModelError(f"the model file {model} {kind}; {HOW_TO_EXPORT}")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = _ERRORS_ONLY
    kernels.register(options, cuda=providers != ["CPUExecutionProvider"])
    try:
        return ort.InferenceSession(model, options, providers=providers)
    except Exception as error:  # ONNX Runtime's own exceptions share no base class of their own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"ONNX Runtime cannot load {model}: {reason}") from error


def _check_graph(session: ort.InferenceSession, file: Path) -> None:
    inputs = {node.name: node.type for node in session.get_inputs()}
    outputs = {node.name for node in session.get_outputs()}
    if inputs != _INPUTS or not outputs.issuperset(_OUTPUTS):
        raise ModelError(
            f"{file} is not a whole-inference graph: it maps {', '.join(inputs)} to {', '.join(sorted(outputs))}, "
            f"where {', '.join(_INPUTS)} to {', '.join(_OUTPUTS)} are needed; {HOW_TO_EXPORT}"
        )
