"""What `make gpu-check` checks and measures of the service on a GPU: the targets of serving, one after another.

The model is EncNet on a ResNet-50 with 150 classes and seeded weights, exported with --fp16: its speed is that of a
trained one. Everything besides onnxruntime-gpu is what serving and export need anyway; what is missing is reported as
not run. On a CPU the same steps run with a small model (tests/model/test_gpu_check.py).
"""

import importlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.command import ROOT
from benchmarks.gpu_parts import Report
from export.parity import equal_share
from model.checkpoint import Checkpoint, save_checkpoint
from model.config import ModelConfig
from model.encnet import EncNet
from model.windows import AUTHORS_SCALES, predict_windows

SIDE = 480
CLIENTS = (1, 8, 32)
SHAPES = 500
MODEL = ModelConfig(num_classes=150, backbone="resnet50s", reference_positions=3600.0)

MOST_MS = 20.0  # six scales with mirroring of a 480x480 picture
LEAST_SPEEDUP = 10.0  # over the authors' window protocol in eager PyTorch
LEAST_EQUAL = 0.995  # share of labels that the float32 answer on the CPU has too, ties of its scores left open
MOST_MS_OVER_WARM = 50.0  # first picture of a new shape
MOST_COPY_BYTES = 4096  # of a copy inside the graph: sizes and conditions may cross over, nothing of a picture


def seeded_network(config: ModelConfig) -> EncNet:
    """A network in evaluation whose batch norms have statistics of their own, so that its logits are of usual size."""
    torch.manual_seed(0)
    network = EncNet(config)
    network.train()
    with torch.no_grad():
        for _ in range(3):
            network(torch.randn(2, 3, 96, 96))
    return network.eval()


def export(network: EncNet, folder: Path, base_size: int, *options: str) -> Path:
    """The .onnx file of a network whose pictures have this long side at scale 1.

    Raises RuntimeError with what the export command printed.
    """
    classes = [f"class {index}" for index in range(network.config.num_classes)]
    palette = [[index % 256, index * 7 % 256, index * 13 % 256] for index in range(len(classes))]
    checkpoint = Checkpoint(
        config=network.config,
        weights=network.state_dict(),
        classes=classes,
        palette=palette,
        base_size=base_size,
        name="gpu-check",
    )
    save_checkpoint(folder / "seeded.pt", checkpoint)
    file = folder / f"seeded{''.join(options)}.onnx"
    done = subprocess.run(
        [sys.executable, "-m", "export", str(folder / "seeded.pt"), "--output", str(file), *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"export failed: {done.stderr.strip()[-300:]}")
    return file


def median_ms(call: Callable[[], object], rounds: int) -> float:
    """Median milliseconds of a call that ends when its work has ended; the first two are not counted."""
    times = []
    for _ in range(rounds + 2):
        started = time.perf_counter()
        call()
        times.append((time.perf_counter() - started) * 1000)
    return statistics.median(times[2:])


def used_megabytes() -> float:
    """What is taken on the first GPU, by its driver; 0 without one."""
    try:
        command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0])
    except (OSError, subprocess.CalledProcessError, ValueError, IndexError):
        return 0.0


def copies(file: Path, device: str, image: np.ndarray) -> dict[str, dict[str, int]]:
    """Copies between host and device inside the graph in one picture's run, off ONNX Runtime's own profile.

    By direction their number and the bytes of the largest. The graph's inputs go up and its outputs come down once each
    beside them.
    """
    import onnxruntime as ort

    from service import kernels
    from service.engine import execution_providers

    options = ort.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(file.with_suffix(""))
    kernels.register(options, cuda=device == "cuda")
    session = ort.InferenceSession(
        file, options, providers=execution_providers("cuda" if device == "cuda" else "cpu", 0)
    )
    feeds = {"image": image[None], "scales": np.asarray(AUTHORS_SCALES, np.float32), "flip": np.asarray(True)}
    session.run(("mask", "presence"), feeds)
    profile = Path(session.end_profiling())
    nodes = [event["args"] for event in json.loads(profile.read_text()) if "args" in event]
    found = {}
    for name in ("MemcpyFromHost", "MemcpyToHost"):
        sizes = [int(node["output_size"]) for node in nodes if node.get("op_name") == name and "output_size" in node]
        found[name] = {"number": len(sizes), "largest_bytes": max(sizes, default=0)}
    return found


def service(
    device: str,
    report: Report,
    config: ModelConfig = MODEL,
    side: int = SIDE,
    shapes: int = SHAPES,
    clients: Sequence[int] = CLIENTS,
) -> None:
    """Every target of serving on a GPU; what stands behind `report` is made small for a rehearsal."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  (export needs it)

        from service.engine import Engine
    except ImportError as error:
        report.not_run.append(f"service: {error}")
        return
    if device == "cuda" and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        report.not_run.append("service: this build of ONNX Runtime has no CUDAExecutionProvider")
        return
    image = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    network = seeded_network(config)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with report.check("the model is exported"):
            half, exact = export(network, folder, side, "--fp16"), export(network, folder, side)
        if report.checks["the model is exported"] is not None:
            return
        engine = Engine(half, "cuda" if device == "cuda" else "cpu")
        views = {"scales": AUTHORS_SCALES, "flip": True}
        with report.check(f"six scales and mirroring within {MOST_MS:g} ms"):
            ours = median_ms(lambda: engine.segment(image, **views), 20 if device == "cuda" else 1)  # type: ignore[arg-type]
            report.rows.append({"what": f"six scales, mirrored, {side}x{side}", "ms": round(ours, 2)})
            assert ours <= MOST_MS or device == "cpu", f"{ours:.1f} ms"
        with report.check(f"{LEAST_SPEEDUP:g} times the authors' window protocol"):
            network.to(device)
            picture = torch.from_numpy(image)[None].to(device)

            def authors() -> None:
                scores = predict_windows(
                    network,
                    picture,
                    mean=(0.485, 0.456, 0.406),
                    std=(0.229, 0.224, 0.225),
                    base_size=side,
                    crop=side,
                    scales=AUTHORS_SCALES,
                    flip=True,
                    merge="exp_sum",
                )
                scores.scores.argmax(1).cpu()

            theirs = median_ms(authors, 5 if device == "cuda" else 1)
            report.rows.append({"what": "authors' windows, eager", "ms": round(theirs, 1), "ratio": theirs / ours})
            assert theirs / ours >= LEAST_SPEEDUP or device == "cpu", f"{theirs / ours:.1f} times"
        with report.check(f"at least {LEAST_EQUAL:.1%} of the labels of float32 on the CPU"):
            reference = Engine(exact, "cpu").segment(image, (1.0,), True, probabilities=True).probabilities
            assert reference is not None
            mask = engine.segment(image, (1.0,), True).mask
            equal, same = equal_share(mask[None], reference[None]), float((mask == reference.argmax(0)).mean())
            report.rows.append({"what": "equal labels", "share": round(equal, 5), "without_ties": round(same, 5)})
            assert equal >= LEAST_EQUAL, f"{equal:.4%}"
        with report.check("one upload and one download a picture"):
            found = copies(half, device, image)
            report.rows.append({"what": "copies inside the graph", **found})
            assert all(one["largest_bytes"] <= MOST_COPY_BYTES for one in found.values()), str(found)
        with report.check(f"a new shape costs at most {MOST_MS_OVER_WARM:g} ms over a warm one"):
            random = np.random.default_rng(1)
            before, excess = used_megabytes(), []
            for height, width in random.integers(200, 800, (shapes, 2)):
                new = random.integers(0, 256, (height, width, 3), np.uint8)
                first, again = (engine_ms(engine, new) for _ in range(2))
                excess.append(first - again)
            taken = used_megabytes() - before
            worst = float(np.percentile(excess, 99))
            row = {"shapes": shapes, "p99_ms_over_warm": round(worst, 1), "median": round(float(np.median(excess)), 2)}
            report.rows.append({"what": "new shapes", **row, "megabytes_taken": taken})
            assert worst <= MOST_MS_OVER_WARM or device == "cpu", f"{worst:.0f} ms"
        server(half, "cuda" if device == "cuda" else "cpu", report, clients)


def engine_ms(engine: Any, image: np.ndarray) -> float:
    """Milliseconds of one picture at one scale."""
    started = time.perf_counter()
    engine.segment(image, (1.0,), False)
    return (time.perf_counter() - started) * 1000


def server(file: Path, device: str, report: Report, clients: Sequence[int]) -> None:
    """Whether a real server serves; not run where one of its packages is missing."""
    try:
        importlib.import_module("service.server")
    except ImportError as error:
        report.not_run.append(f"the server: {error}")
        return
    with report.check("the server serves"):
        for row in throughput(file, device, clients):
            report.rows.append({"what": "server", **row})


def throughput(file: Path, device: str, clients: Sequence[int]) -> list[dict[str, Any]]:
    """Pictures a second and latency at several numbers of clients, from the load command itself."""
    from benchmarks.server import serving

    words = ("--model", str(file), "--device", device)
    settings = {"ENCNET_TIMEOUT_MS": "60000", "ENCNET_MAX_BATCH": "8"}
    with serving(None, *words, **settings) as server, tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "bench.json"
        numbers = ",".join(map(str, clients))
        command = ["bench", f"{server.url}/segment?format=png", "--concurrency", numbers, "--duration", "4"]
        done = subprocess.run(
            [sys.executable, "-m", "service", *command, "--json", str(output)], cwd=ROOT, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(done.stderr.strip()[-300:])
        return list(json.loads(output.read_text())["levels"])
