"""The .onnx file as a Python object: read it, check that it is ours, segment pictures. A library, no HTTP."""

import hashlib
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import onnxruntime as ort
from pydantic import BaseModel, ConfigDict, Field, Json, ValidationError, model_validator

from service import cores, kernels
from service.cost import Work, window_starts, work_of
from service.errors import first_line

HOW_TO_EXPORT = "`python -m export CHECKPOINT --output FILE.onnx` makes a file that can be served"

_INPUTS = {"image": "tensor(uint8)", "scales": "tensor(float)", "flip": "tensor(bool)"}
_OUTPUTS = ("mask", "presence", "probabilities")
_ERRORS_ONLY, _FATAL_ONLY = 3, 4  # ONNX Runtime's log levels
_KEPT_PIXELS = 2_000_000  # of a run whose memory is kept for the next
_GIVE_MEMORY_BACK = ("memory.enable_memory_arena_shrinkage", "cpu:0")  # at the end of a run
_GREY = np.full((64, 64, 3), 128, np.uint8)


class ModelError(Exception):
    """The model cannot be served; the message is one sentence that says why and what to do."""


class Stopped(Exception):
    """The run was told to stop before it had an answer."""


class Metadata(BaseModel):
    """What the file says about itself in its `metadata_props`.

    `mean`, `std` are per channel on the 0..1 scale; at scale s the picture's long side becomes ceil(base_size * s);
    `scales` and `flip` are the defaults of a request; `palette` has one (r, g, b) of 0..255 for each class;
    `presence_scale`, `presence_bias` are the calibration inside the graph, one number for each class.
    """

    model_config = ConfigDict(frozen=True)

    format: Literal["encnet-serve/1"]
    graph: Literal["whole"]
    name: str
    classes: Json[tuple[str, ...]] = Field(min_length=1)
    palette: Json[tuple[tuple[int, int, int], ...]]
    mean: Json[tuple[float, float, float]]
    std: Json[tuple[float, float, float]]
    base_size: int = Field(ge=1, le=16384)
    scales: Json[tuple[Annotated[float, Field(gt=0, le=1e6)], ...]] = Field(min_length=1)
    flip: bool
    resize: str
    align_corners: str
    reference_positions: str
    checkpoint_sha256: str
    licence: str | None = None
    description: str | None = None
    presence_scale: Json[tuple[float, ...]] | None = None
    presence_bias: Json[tuple[float, ...]] | None = None

    @model_validator(mode="after")
    def _palette_fits(self) -> "Metadata":
        if len(self.palette) != len(self.classes):
            raise ValueError(f"{len(self.classes)} classes but {len(self.palette)} palette entries")
        if not all(0 <= channel <= 255 for colour in self.palette for channel in colour):
            raise ValueError("a palette entry is outside 0..255")
        return self

    @model_validator(mode="after")
    def _calibration_fits(self) -> "Metadata":
        scale, bias = self.presence_scale, self.presence_bias
        if scale is None and bias is None:
            return self
        if scale is None or bias is None or not len(scale) == len(bias) == len(self.classes):
            lengths = " and ".join("none" if values is None else str(len(values)) for values in (scale, bias))
            raise ValueError(
                f"presence_scale and presence_bias need {len(self.classes)} numbers each, one for each class, "
                f"have {lengths}"
            )
        if not all(0 < value < math.inf for value in scale) or not all(math.isfinite(value) for value in bias):
            raise ValueError("presence_scale must be finite numbers above 0, presence_bias finite numbers")
        return self


@dataclass(frozen=True)
class Plan:
    """How a picture is segmented; see Engine.segment. Pictures of one shape and one plan can share a run."""

    scales: tuple[float, ...]
    flip: bool
    window: int | None = None
    stride: int | None = None
    probabilities: bool = False


@dataclass(frozen=True)
class Segmentation:
    """The answer for one picture: `mask` uint8 (H, W), uint16 above 255 classes; `presence` float32 (C,) in 0..1;
    `probabilities` float32 (C, H, W), None unless the plan asks for them.

    `scales` and `flip` are those used; `infer_ms` is the time of the run, shared with `batch` - 1 other pictures.
    """

    mask: np.ndarray
    presence: np.ndarray
    scales: tuple[float, ...]
    flip: bool
    infer_ms: float
    probabilities: np.ndarray | None = None
    batch: int = 1


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

    `threads` are those of one inference on the CPU, 0 for one per core; `gpu_memory_limit` bounds what ONNX Runtime
    takes on the GPU, in bytes, 0 for no limit.

    With `lanes` above 1, and as many threads, a second session is opened for runs `beside` others, each of which has
    its share of the threads. `lanes` says for how many runs side by side the engine is made: 1 on a GPU.
    """

    def __init__(
        self,
        model: Path,
        device: Literal["auto", "cpu", "cuda"] = "auto",
        threads: int = 0,
        gpu_memory_limit: int = 0,
        lanes: int = 1,
    ) -> None:
        self.path = model
        own = cores.available()
        if not threads and own < (os.cpu_count() or 1):
            threads = own  # ONNX Runtime's own choice goes by the machine's cores, and binds threads to them
        self._session = _open_session(model, execution_providers(device, gpu_memory_limit), threads)
        try:
            self.metadata = read_metadata(self._session.get_modelmeta().custom_metadata_map, model)
            self._mask_type = np.uint16 if len(self.metadata.classes) > 255 else np.uint8
            _check_graph(self._session, model, len(self.metadata.classes), np.dtype(self._mask_type).name)
        except UnicodeDecodeError:
            raise ModelError(f"{model} has names or metadata that are no text in UTF-8; {HOW_TO_EXPORT}") from None
        self.device: Literal["cpu", "cuda"] = (
            "cuda" if "CUDAExecutionProvider" in self._session.get_providers() else "cpu"
        )
        if device == "cuda" and self.device != "cuda":
            raise ModelError("CUDA was asked for, but ONNX Runtime could not start it on this machine; try device cpu")
        width = (threads or own) // lanes
        self.lanes = lanes if self.device == "cpu" and width else 1
        self._narrow = _open_session(model, execution_providers("cpu", 0), width) if self.lanes > 1 else self._session
        self._shapes: dict[ort.InferenceSession, tuple[int, ...]] = {}  # of the last run
        with model.open("rb") as file:
            self.sha256 = hashlib.file_digest(file, "sha256").hexdigest()

    def plan(
        self,
        scales: Sequence[float] | None = None,
        flip: bool | None = None,
        *,
        window: int | None = None,
        stride: int | None = None,
        probabilities: bool = False,
    ) -> Plan:
        """The arguments of `segment` with the model's defaults filled in. Raises ValueError as `segment` does."""
        used_scales = self.metadata.scales if scales is None else tuple(scales)
        if not used_scales or not all(scale > 0 for scale in used_scales):
            raise ValueError(f"scales must be one or more numbers above 0, not {used_scales}")
        if window is not None and window < 1:
            raise ValueError(f"window must be at least 1 pixel, not {window}")
        if stride is not None and not (window and 1 <= stride <= window):
            raise ValueError(f"stride must be from 1 to the window's {window}, not {stride}")
        return Plan(
            used_scales,
            self.metadata.flip if flip is None else flip,
            window,
            (stride or -(-2 * window // 3)) if window else None,
            probabilities,
        )

    def work(self, width: int, height: int, plan: Plan) -> Work:
        """What a picture of width x height pixels costs under a plan."""
        return work_of(width, height, self.metadata.base_size, plan.scales, plan.flip, plan.window, plan.stride)

    def segment(
        self,
        image: np.ndarray,
        scales: Sequence[float] | None = None,
        flip: bool | None = None,
        *,
        window: int | None = None,
        stride: int | None = None,
        probabilities: bool = False,
    ) -> Segmentation:
        """Segment one picture.

        `image` is uint8 (H, W, 3) RGB, upright. `scales` and `flip` choose the views that are averaged; left out, they
        are the model's own defaults. With `window`, every window x window part is segmented like a picture of its own,
        in steps of `stride` pixels (two thirds of a window where left out), and where windows overlap their
        probabilities are averaged; a class's presence is then the highest among the windows.

        Raises ValueError for an array of another shape or dtype, no scale above 0, or a stride outside 1..window.
        """
        plan = self.plan(scales, flip, window=window, stride=stride, probabilities=probabilities)
        return self.run([image], plan)[0]

    def run(
        self,
        images: Sequence[np.ndarray],
        plan: Plan,
        options: ort.RunOptions | None = None,
        beside: bool = False,
    ) -> list[Segmentation]:
        """Segment pictures of one shape in one call of ONNX Runtime; with windows, in one call for each window.

        `beside`: on the threads of one lane, to the same bits. Another thread may set `options.terminate`; the run then
        raises Stopped at its next step.
        """
        session = self._narrow if beside else self._session
        for image in images:
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
                raise ValueError(f"image must be uint8 (H, W, 3), not {image.dtype} {image.shape}")
        options = options or ort.RunOptions()
        options.log_severity_level = _FATAL_ONLY  # a failure is raised, and a run that is told to stop is none
        started = time.perf_counter()
        try:
            if plan.window:
                answers = [self._windows(session, image, plan, options) for image in images]
            else:
                answers = self._views(session, images, plan, options)
        except Exception as error:  # ONNX Runtime's own exceptions share no base class of their own
            if options.terminate:
                raise Stopped("the run was told to stop") from error
            raise
        finally:
            if plan.window:
                self._let_memory_go(session)
        infer_ms = (time.perf_counter() - started) * 1000
        return [
            Segmentation(mask, presence, plan.scales, plan.flip, infer_ms, probabilities, len(images))
            for mask, presence, probabilities in answers
        ]

    def _views(
        self, session: ort.InferenceSession, images: Sequence[np.ndarray], plan: Plan, options: ort.RunOptions
    ) -> list[tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
        """Mask, presence and (if the plan asks) probabilities of each picture."""
        batch = images[0][None] if len(images) == 1 else np.stack(images)
        self._mind_memory(session, batch, options)
        outputs = self._infer(session, batch, plan, _OUTPUTS if plan.probabilities else _OUTPUTS[:2], options)
        return list(zip(*outputs, *([] if plan.probabilities else [[None] * len(images)]), strict=True))

    def _infer(
        self,
        session: ort.InferenceSession,
        batch: np.ndarray,
        plan: Plan,
        names: Sequence[str],
        options: ort.RunOptions,
    ) -> list[np.ndarray]:
        """The named outputs for pictures uint8 (N, H, W, 3).

        On a CPU they are written to memory of their own: the arena gives nothing back of a block in which one lies.
        """
        feeds = {
            "image": batch,
            "scales": np.asarray(plan.scales, np.float32),
            "flip": np.asarray(plan.flip, np.bool_),
        }
        if self.device != "cpu":
            return session.run(names, feeds, options)
        count, height, width, _ = batch.shape
        classes = len(self.metadata.classes)
        shapes = {
            "mask": (count, height, width),
            "presence": (count, classes),
            "probabilities": (count, classes, height, width),
        }
        outputs = [np.empty(shapes[name], self._mask_type if name == "mask" else np.float32) for name in names]
        binding = session.io_binding()
        for name, feed in feeds.items():
            binding.bind_cpu_input(name, feed)
        for name, output in zip(names, outputs, strict=True):
            binding.bind_output(name, "cpu", 0, output.dtype, output.shape, output.ctypes.data)
        session.run_with_iobinding(binding, options)
        return outputs

    def _mind_memory(self, session: ort.InferenceSession, batch: np.ndarray, options: ort.RunOptions) -> None:
        """On a CPU, memory is kept only from one run to the next of the same shape, and not after a large one.

        ONNX Runtime's arena would keep the most that it ever took, and under mixed shapes a good deal more. Giving it
        back costs a run about a tenth of its time.
        """
        alike = self._shapes.get(session) == batch.shape
        self._shapes[session] = batch.shape
        if self.device == "cpu" and not (alike and batch.size < 3 * _KEPT_PIXELS):
            options.add_run_config_entry(*_GIVE_MEMORY_BACK)

    def _let_memory_go(self, session: ort.InferenceSession) -> None:
        """On a CPU, give back what earlier runs took and kept, or what one that was stopped left: by a small run."""
        if self.device == "cpu":
            options = ort.RunOptions()
            options.add_run_config_entry(*_GIVE_MEMORY_BACK)
            self._infer(session, _GREY[None], self.plan((0.25,), False), _OUTPUTS[1:2], options)

    def _windows(
        self, session: ort.InferenceSession, image: np.ndarray, plan: Plan, options: ort.RunOptions
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Mask, presence and (if the plan asks) probabilities of one picture, window by window."""
        height, width, _ = image.shape
        window, stride = plan.window, plan.stride
        assert window and stride
        total = np.zeros((len(self.metadata.classes), height, width), np.float32)
        visits = np.zeros((height, width), np.float32)
        presence = np.zeros(len(self.metadata.classes), np.float32)
        for top, left in product(window_starts(height, window, stride), window_starts(width, window, stride)):
            part = (slice(top, top + window), slice(left, left + window))
            crop = np.ascontiguousarray(image[part])
            scores, probabilities = self._infer(session, crop[None], plan, _OUTPUTS[1:], options)
            total[:, *part] += probabilities[0]
            visits[part] += 1
            np.maximum(presence, scores[0], out=presence)
        mask = total.argmax(0).astype(self._mask_type)
        return mask, presence, total / visits if plan.probabilities else None

    def warm_up(self) -> None:
        """Run once, so that the first request does not pay for set-up.

        On a GPU that means the default views; on a CPU, where only the first touch of weights and code counts, a small
        view is enough.
        """
        if self.device == "cuda":
            self.segment(_GREY)
        else:
            self.segment(_GREY, scales=(0.25,), flip=False)
            if self.lanes > 1:
                self.run([_GREY], self.plan((0.25,), False), beside=True)


def execution_providers(device: str, gpu_memory_limit: int) -> list[Any]:
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
    if gpu_memory_limit:
        cuda["gpu_mem_limit"] = str(gpu_memory_limit)
    return [("CUDAExecutionProvider", cuda), "CPUExecutionProvider"]


def _open_session(model: Path, providers: list[Any], threads: int) -> ort.InferenceSession:
    try:
        if not model.is_file():
            kind = "is a folder, not a file" if model.is_dir() else "does not exist"
            raise ModelError(f"the model file {model} {kind}; {HOW_TO_EXPORT}")
        model.open("rb").close()  # ONNX Runtime would give a number for a reason
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ModelError(f"the model file {model} cannot be read by user {os.geteuid()}: {reason}") from None
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = _ERRORS_ONLY
    options.add_session_config_entry("session.force_spinning_stop", "1")  # else its threads keep cores from the codecs
    kernels.register(options, cuda=providers != ["CPUExecutionProvider"])
    try:
        return ort.InferenceSession(model, options, providers=providers)
    except Exception as error:  # ONNX Runtime's own exceptions share no base class of their own
        if "INVALID_PROTOBUF" in str(error):
            raise ModelError(f"{model} is no ONNX file; {HOW_TO_EXPORT}") from error
        raise ModelError(f"ONNX Runtime cannot load {model}: {first_line(error)}") from error


def _check_graph(session: ort.InferenceSession, file: Path, classes: int, mask_type: str) -> None:
    inputs = {node.name: node.type for node in session.get_inputs()}
    outputs = {node.name: node for node in session.get_outputs()}
    if inputs != _INPUTS or not outputs.keys() >= set(_OUTPUTS):
        raise ModelError(
            f"{file} is not a whole-inference graph: it maps {', '.join(inputs)} to {', '.join(sorted(outputs))}, "
            f"where {', '.join(_INPUTS)} to {', '.join(_OUTPUTS)} are needed; {HOW_TO_EXPORT}"
        )
    for name in _OUTPUTS:
        found, needed = outputs[name].type, f"tensor({mask_type if name == 'mask' else 'float'})"
        if found != needed:
            raise ModelError(f"{file} gives {name} as {found}, where {needed} is needed; {HOW_TO_EXPORT}")
    for scores in outputs["presence"].shape[1:2]:
        if isinstance(scores, int) and scores != classes:
            raise ModelError(f"{file} gives {scores} classes, and its metadata names {classes}; {HOW_TO_EXPORT}")
