"""What one CPU core serves, or one GPU: `python -m benchmarks.sizing [--device cuda]`, about two minutes.

Pictures go the way of `python -m service segment`, one after another: JPEG to pixels, the embedded model by the
service's engine, label map to PNG; each load in a process of its own, so that its memory is its own. On the CPU the
process stays on one core, the engine has one thread, and times are CPU time, so that they mean something on a busy
machine too. On a GPU they are those of the clock, and decoding and encoding tell how many cores feed it.

Results go into benchmarks/results/sizing.json, each device's beside the other's, and the rows of the README's table to
standard output. Until a GPU has been measured its column is computed from the parts: the operations of a view, counted
in ONNX Runtime's profile, and the bytes of the merging, at the shares of an H200's peaks in ASSUMED.
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime as ort
from rich.progress import track

from benchmarks.command import RESULTS, facts, option_parser, processor, write_json
from benchmarks.memory import forget_peak, kilobytes
from benchmarks.pictures import photo
from service.cost import work_of
from service.engine import Engine, ModelError
from service.images import decode, reduced_size
from service.render import mask_png
from service.settings import EMBEDDED_MODEL, Settings

RESULT = RESULTS / "sizing.json"
SIX = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
CORE_HOUR, GPU_HOUR = 0.04, 4.0  # dollars, assumed

GPU = "NVIDIA H200"
# Float32 without tensor cores 67 TFLOP/s, memory 4.8 TB/s, by its data sheet. The shares are guesses on the careful
# side; launching is that of some hundred kernels and of the loop's steps, for every scale.
ASSUMED = {
    "flops_per_s": 67e12,
    "share_of_flops": 0.25,
    "bytes_per_s": 4.8e12,
    "share_of_bytes": 0.5,
    "passes_over_probabilities": 10,
    "launch_ms_per_scale": 3.0,
}


@dataclass(frozen=True)
class Load:
    """Pictures of one size (width, height), asked for with one set of options."""

    size: tuple[int, int]
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    max_side: int | None = None

    def __str__(self) -> str:
        views = f"{len(self.scales)} scales" if len(self.scales) > 1 else f"scale {self.scales[0]:g}"
        mirrored = ", mirrored too" if self.flip else ""
        reduced = f", `max_side` {self.max_side}" if self.max_side else ""
        return f"{self.size[0]}x{self.size[1]}{reduced}, {views}{mirrored}"


LOADS = (
    Load((480, 360)),
    Load((480, 360), (0.5,)),
    Load((480, 360), SIX, flip=True),
    Load((1920, 1080)),
    Load((1920, 1080), max_side=960),
    Load((1920, 1080), SIX, flip=True),
    Load((4000, 3000)),
    Load((4000, 3000), max_side=1024),
)


@dataclass(frozen=True)
class Times:
    """Median milliseconds of one picture's parts; `memory_mb` is the process's peak of resident memory."""

    decode_ms: float
    run_ms: float
    encode_ms: float
    memory_mb: float


def measure(engine: Engine, load: Load, seconds: float) -> Times:
    """Pictures of a load, one after another, for so long and two at least, after a first one that does not count."""
    data = photo(*load.size)
    clock = time.process_time if engine.device == "cpu" else time.perf_counter
    segment_file(engine, data, load, clock)
    forget_peak()
    parts: list[tuple[float, float, float]] = []
    end = clock() + seconds
    while len(parts) < 2 or clock() < end:
        parts.append(segment_file(engine, data, load, clock))
    decoding, running, encoding = (1000 * statistics.median(part) for part in zip(*parts, strict=True))
    return Times(decoding, running, encoding, kilobytes("VmHWM") * 1024 / 1e6)


def segment_file(engine: Engine, data: bytes, load: Load, clock: Callable[[], float]) -> tuple[float, float, float]:
    """Seconds for decoding a picture file, segmenting it, and encoding its mask."""
    limits = Settings()
    begun = clock()
    picture = decode(data, max_bytes=limits.max_bytes, max_pixels=limits.max_pixels, max_side=load.max_side)
    decoded = clock()
    mask = engine.segment(picture.pixels, load.scales, load.flip).mask
    segmented = clock()
    mask_png(mask, engine.metadata.classes, engine.metadata.palette, {})
    return decoded - begun, segmented - decoded, clock() - segmented


def measure_alone(device: Literal["cpu", "cuda"], load: Load, seconds: float) -> Times:
    """As `measure`, of the embedded model on one core, in a process that does nothing else."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    return measure(Engine(EMBEDDED_MODEL, device, threads=1), load, seconds)


def flops_by_pixel(engine: Engine) -> float:
    """Floating-point operations of the network for a pixel that enters it: those of convolutions and matrix products.

    Counted in ONNX Runtime's own record of one view without optimisations, which tells every node's shapes.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_profiling = True
    side = engine.metadata.base_size
    image = np.zeros((1, side, side, 3), np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = ort.InferenceSession(engine.path, options, providers=["CPUExecutionProvider"])
        session.run(["mask"], {"image": image, "scales": np.ones(1, np.float32), "flip": np.array(False)})
        events = json.loads(Path(session.end_profiling()).read_text())
    total = 0
    for event in events:
        details = event.get("args", {})
        if details.get("op_name") not in ("Conv", "Gemm", "MatMul") or not event["name"].endswith("kernel_time"):
            continue
        given, made = (_shapes(details[key]) for key in ("input_type_shape", "output_type_shape"))
        # A convolution's weights are (out, in, height, width); a product sums over the last dimension of its first.
        summands = np.prod(given[1][1:]) if details["op_name"] == "Conv" else given[0][-1]
        total += 2 * int(np.prod(made[0])) * int(summands)
    return total / side**2


def _shapes(tensors: Sequence[dict[str, list[int]]]) -> list[list[int]]:
    return [shape for tensor in tensors for shape in tensor.values()]


def computed_gpu_ms(engine: Engine, load: Load, flops: float) -> float:
    """Milliseconds of one picture's run on the GPU of ASSUMED; `flops` for each pixel that enters the network."""
    width, height = reduced_size(*load.size, load.max_side)
    work = work_of(width, height, engine.metadata.base_size, load.scales, load.flip)
    network = work.network * flops / (ASSUMED["flops_per_s"] * ASSUMED["share_of_flops"])
    merged = work.merged * len(engine.metadata.classes) * 4 * ASSUMED["passes_over_probabilities"]
    merging = merged / (ASSUMED["bytes_per_s"] * ASSUMED["share_of_bytes"])
    return 1000 * (network + merging) + len(load.scales) * ASSUMED["launch_ms_per_scale"]


def rows(result: dict[str, Any]) -> list[str]:
    """The README's table: what a core serves and costs, and what a GPU does, measured or computed, to two digits.

    Name; pictures a second, peak in MB and dollars a million of one core; pictures a second of a GPU, the cores that
    decode and encode for it, dollars a million without these.
    """
    lines = []
    for name, cpu in result["cpu"]["loads"].items():
        core = 1000 / (cpu["decode_ms"] + cpu["run_ms"] + cpu["encode_ms"])
        gpu = result.get("cuda", {}).get("loads", {}).get(name) or {"run_ms": result["computed"]["gpu_ms"][name]}
        by_gpu = 1000 / gpu["run_ms"]
        figures = [
            core,
            cpu["memory_mb"],
            _million(core, result["cpu"]["dollars_per_hour"]),
            by_gpu,
            by_gpu * (cpu["decode_ms"] + cpu["encode_ms"]) / 1000,
            _million(by_gpu, result["computed"]["dollars_per_hour"]),
        ]
        cells = [name, *(f"{float(f'{figure:.2g}'):g}" for figure in figures)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _million(pictures_per_s: float, dollars_per_hour: float) -> float:
    """Dollars for a million pictures."""
    return 1e6 / pictures_per_s / 3600 * dollars_per_hour


def main() -> None:
    parser = option_parser("sizing", __doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=10, metavar="N", help="of each load (default: %(default)s)")
    parser.add_argument(
        "--core-hour", type=float, default=CORE_HOUR, metavar="DOLLARS", help="assumed (default: %(default)s)"
    )
    parser.add_argument(
        "--gpu-hour", type=float, default=GPU_HOUR, metavar="DOLLARS", help="assumed (default: %(default)s)"
    )
    options = parser.parse_args()
    try:
        engine = Engine(EMBEDDED_MODEL, options.device, threads=1)
    except ModelError as error:
        parser.error(str(error))
    measured = {}
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        for load in track(LOADS, description=f"measuring on {options.device}"):
            times = pool.submit(measure_alone, options.device, load, options.seconds).result()
            measured[str(load)] = {key: round(value, 2) for key, value in asdict(times).items()}
    result: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    result[options.device] = {
        **facts(f"python -m benchmarks.sizing --device {options.device} --seconds {options.seconds:g}"),
        "processor": processor(),
        "model_sha256": engine.sha256,
        "dollars_per_hour": options.core_hour if options.device == "cpu" else options.gpu_hour,
        "loads": measured,
    }
    flops = flops_by_pixel(engine)
    result["computed"] = {
        "gpu": GPU,
        "assumed": ASSUMED,
        "dollars_per_hour": options.gpu_hour,
        "flops_by_pixel": round(flops),
        "gpu_ms": {str(load): round(computed_gpu_ms(engine, load, flops), 3) for load in LOADS},
    }
    write_json(RESULT, result)
    if "cpu" in result:
        print("\n".join(rows(result)))


if __name__ == "__main__":
    main()
