"""A training step part by part, and side by side with what plain PyTorch makes of it: `python -m benchmarks.training`.

The step is that of model.train, on made-up pictures: on a GPU EncNet-50s at crop 480, batch 16, bf16, 150 classes, on a
CPU something small. Other options as key=value, as model.train takes them. Compared in one run, in turns:

    ours        as recipes for a GPU have it: compiled, channels_last, fused optimizer, Encoding kernels
    eager       the same without torch.compile
    matmul      plain PyTorch: eager, contiguous, a loop over the parameters as optimizer, Encoding in its matmul form
    broadcast   the same with the Encoding that most published code has; it materialises B·N·K·D numbers

The losses of their first steps show that all of them learn the same. The share of the matmul rate is the step's
floating-point operations, counted by PyTorch, over its time, relative to those of a large matrix product in the same
type on the same device. Times are medians in milliseconds, each part waited for. On a GPU the kernels are built first.
Results go to benchmarks/results/training-<device>.json, written as they come.
"""

import gc
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.command import RESULTS, ROOT, commit, option_parser, write_json
from benchmarks.gpu_parts import broadcast_form
from model.arguments import at_least_one
from model.encoding import Encoding, backend, encode_reference
from model.pictures import StepSampler
from model.recipe import Recipe, RecipeError, read_recipe
from model.run import Run, validate

PICTURES, PICTURE_SIZE, CLASSES = 32, (480, 640), 150
ON_A_GPU = ["backbone=resnet50s", "crop=480", "batch=16", "precision=bf16", "compile=true", "ema=0.999"]
ON_A_CPU = [
    *("backbone=resnet18", "channels=64", "codewords=8", "output_stride=16", "crop=96", "batch=2", "base_size=160"),
    "ema=0.999",
]
PLAIN: dict[str, dict[str, Any]] = {"eager": {"compile": False}}
for name in ("matmul", "broadcast"):
    PLAIN[name] = {"compile": False, "channels_last": False}
FORMS: dict[str, Callable[..., Tensor]] = {"matmul": encode_reference, "broadcast": broadcast_form}


class PlainEncoding(nn.Module):
    """An Encoding layer's parameters under another form of it, in float32 as autocast would have it."""

    def __init__(self, layer: Encoding, form: Callable[..., Tensor]) -> None:
        super().__init__()
        self.codewords, self.scale, self.form = layer.codewords, layer.scale, form

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return self.form(x.float(), self.codewords, self.scale)


def make_data(root: Path, pictures: int, size: tuple[int, int], classes: int) -> Path:
    """A data set in the project's layout: coarse patches of colour, a class each."""
    random = numpy.random.default_rng(0)
    for folder in ("images", "labels", "splits"):
        (root / folder).mkdir(parents=True)
    patches = tuple(-(-side // 40) for side in size)
    for index in range(pictures):
        mask = random.integers(0, classes, patches).repeat(40, 0).repeat(40, 1)[: size[0], : size[1]]
        image = (37 * mask[..., None] * (1, 3, 7) + random.integers(0, 40, (*size, 3))) % 256
        Image.fromarray(image.astype(numpy.uint8)).save(root / "images" / f"{index}.png", compress_level=1)
        Image.fromarray(mask.astype(numpy.uint8)).save(root / "labels" / f"{index}.png", compress_level=1)
    for split in ("train", "val"):
        (root / "splits" / f"{split}.txt").write_text("\n".join(str(index) for index in range(pictures)))
    entries = [{"id": index, "name": f"class {index}", "color": [index] * 3} for index in range(classes)]
    (root / "classes.json").write_text(json.dumps({"classes": entries}))
    return root


def make_run(name: str, recipe: dict[str, Any], data: Path, out: Path) -> Run:
    """A training run as the contender of that name has it."""
    run = Run(Recipe(**recipe | PLAIN.get(name, {})), data, out, Console(quiet=True))
    if name in FORMS:
        context = run.network.head.context
        assert context is not None and isinstance(context.encoding, Encoding)
        context.encoding = PlainEncoding(context.encoding, FORMS[name])  # type: ignore[assignment]
        for group in run.optimizer.param_groups:
            group["fused"] = group["foreach"] = False
    run.network.train()
    return run


def finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(device: torch.device, call: Callable[[], object]) -> float:
    finish(device)
    start = time.perf_counter()
    call()
    finish(device)
    return 1000 * (time.perf_counter() - start)


def steps_in_turns(runs: dict[str, Run], batches: list[tuple[Tensor, Tensor]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of whole steps, crops at hand; two rounds before them warm up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(-2, rounds):
        for name, run in runs.items():
            crops = batches[turn % len(batches)]
            taken = milliseconds(run.device, lambda run=run, crops=crops: run.train_step(*crops))  # type: ignore[misc]
            if turn >= 0:
                times[name].append(taken)
    return times


def first_losses(run: Run, batches: list[tuple[Tensor, Tensor]]) -> list[float]:
    """The losses of a run's first steps, one on each batch: what is faster has to learn the same.

    Contenders begin with the same weights; dropout and rounding alone tell them apart.
    """
    return [round(run.train_step(*crops).total.item(), 4) for crops in batches]


def parts_of_a_step(run: Run, rounds: int) -> dict[str, float]:
    """Medians in milliseconds: making the crops, forward pass with losses, backward pass, optimizer with average."""
    source = run.crops.batches(StepSampler(len(run.crops), run.recipe.batch, 10_000, 0))
    times: dict[str, list[float]] = {"data": [], "forward": [], "backward": [], "optimizer": []}
    for turn in range(-2, rounds):
        crops: list[tuple[Tensor, Tensor]] = []
        losses: list[Tensor] = []
        taken = (
            milliseconds(run.device, lambda crops=crops: crops.append(next(source))),  # type: ignore[misc]
            milliseconds(
                run.device,
                lambda crops=crops, losses=losses: losses.append(  # type: ignore[misc]
                    run.losses_of(crops[0][0], crops[0][1], crops[0][1]).total
                ),
            ),
            milliseconds(run.device, lambda losses=losses: losses[0].backward()),  # type: ignore[misc]
            milliseconds(run.device, run.update_weights),
        )
        if turn >= 0:
            for part, value in zip(times.values(), taken, strict=True):
                part.append(value)
    return {name: round(statistics.median(values), 3) for name, values in times.items()}


def count_operations(run: Run, crops: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Floating-point operations of forward and backward pass in units of 10^9; Encoding's own, some 0.1 %, left out."""
    with FlopCounterMode(display=False) as forward:
        total = run.losses_of(crops[0], crops[1], crops[1]).total
    with FlopCounterMode(display=False) as backward:
        total.backward()
    run.optimizer.zero_grad(set_to_none=True)
    return {"forward": forward.get_total_flops() / 1e9, "backward": backward.get_total_flops() / 1e9}


def matmul_rate(device: torch.device, dtype: torch.dtype, side: int) -> float:
    """10^12 floating-point operations a second of a product of square matrices, the median of ten."""
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    times = [milliseconds(device, lambda: a @ b) for _ in range(13)][3:]
    return 2 * side**3 / statistics.median(times) / 1e9


def waits_of_the_loop(run: Run, steps: int = 3) -> str | None:
    """What in data and step makes the host wait for a GPU; None where nothing does."""
    batches = run.crops.batches(StepSampler(len(run.crops), run.recipe.batch, 10, 1))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(steps):
            run.train_step(*next(batches))
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None


def loop_rates(run: Run, steps: int) -> dict[str, float]:
    """Pictures a second: of the training loop with its crops, nothing waited for in between, and of validation."""
    batches = run.crops.batches(StepSampler(len(run.crops), run.recipe.batch, 10_000, 2))
    for _ in range(2):
        run.train_step(*next(batches))
    taken = milliseconds(run.device, lambda: [run.train_step(*next(batches)) for _ in range(steps)])
    validate(run)
    validated = milliseconds(run.device, lambda: validate(run))
    return {
        "training_pictures_per_second": round(1000 * steps * run.recipe.batch / taken, 2),
        "validation_pictures_per_second": round(1000 * len(run.validation) / validated, 2),
    }


def peak_memory(run: Run, crops: tuple[Tensor, Tensor]) -> float:
    """Largest memory of a step in 10^9 bytes, what was allocated before included."""
    torch.cuda.reset_peak_memory_stats(run.device)
    run.train_step(*crops)
    torch.cuda.synchronize(run.device)
    return round(torch.cuda.max_memory_allocated(run.device) / 1e9, 2)


def describe(device: torch.device, words: list[str]) -> dict[str, Any]:
    name = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} {platform.machine()} cores"
    )
    return {
        "command": " ".join(["python -m benchmarks.training", *words]),
        "commit": commit(),
        "device": name,
        "torch": torch.__version__,
        "encoding": backend(device.type),
    }


def measure(recipe: dict[str, Any], data: Path, out: Path, rounds: int, keep: Callable[[dict[str, Any]], None]) -> None:
    """Measure one thing after the other and hand each to `keep`; what fails is kept as a sentence."""
    names = ["ours", *PLAIN] if recipe.get("compile") else list(PLAIN)
    runs = {name: make_run(name, recipe, data, out) for name in names}
    run = runs[names[0]]
    device, batch = run.device, run.recipe.batch
    source = run.crops.batches(StepSampler(len(run.crops), batch, 10_000, 0))
    crops = [next(source) for _ in range(4)]

    losses: dict[str, list[float]] = {}
    for name in list(runs):  # one that cannot be compiled or does not fit leaves the others alone
        try:
            losses[name] = first_losses(runs[name], crops)
            if device.type == "cuda":
                keep({f"peak_gb_{name}": peak_memory(runs[name], crops[0])})
        except (RuntimeError, torch._dynamo.exc.TorchDynamoException) as error:  # type: ignore[attr-defined]
            keep({f"not_run_{name}": str(error).strip().splitlines()[0][:300]})
            del runs[name]
            gc.collect()
    keep({"first_losses": losses})
    best = runs[next(iter(runs))]

    half = best.recipe.precision != "fp32"
    rate = matmul_rate(device, torch.bfloat16 if half else torch.float32, 8192 if device.type == "cuda" else 512)
    keep({"matmul_tflops": round(rate, 3)})
    times = {name: statistics.median(values) for name, values in steps_in_turns(runs, crops, rounds).items()}
    keep({"step_ms": {name: round(value, 3) for name, value in times.items()}})
    first = next(iter(times))
    ratios = {name: round(value / times[first], 2) for name, value in times.items() if name != first}
    keep(
        {"times_faster_than": ratios, "pictures_per_second": {n: round(1000 * batch / t, 2) for n, t in times.items()}}
    )

    parts = parts_of_a_step(best, rounds)
    operations = count_operations(runs.get("eager", best), crops[0])
    shares = {
        part: round(operations[part] / parts[part] / rate, 4)  # 10^9 operations a millisecond are 10^12 a second
        for part in ("forward", "backward")
    }
    shares["step"] = round(sum(operations.values()) / times[first] / rate, 4)
    keep({"parts_ms": parts, "gflop": {name: round(value, 1) for name, value in operations.items()}})
    keep({"share_of_matmul_rate": shares})
    keep(loop_rates(best, rounds))
    if device.type == "cuda":
        keep({"host_waits_for": waits_of_the_loop(best)})


def main(arguments: list[str] | None = None) -> int:
    parser = option_parser("training", __doc__)
    parser.add_argument("options", nargs="*", metavar="key=value", help="options of model.train")
    parser.add_argument(
        "--rounds", type=at_least_one, default=20, metavar="N", help="timings of each (default: %(default)s)"
    )
    parser.add_argument("--pictures", type=at_least_one, default=PICTURES, metavar="N", help="of the made-up data set")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="instead of benchmarks/results/training-...")
    options = parser.parse_intermixed_args(arguments)
    cuda = torch.cuda.is_available()
    words = [*(ON_A_GPU if cuda else ON_A_CPU), *options.options]
    try:
        recipe = read_recipe(None, words)
        settings = Recipe(**recipe)
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if cuda:
        subprocess.run([sys.executable, "model/kernels/build.py", "--quiet"], cwd=ROOT)
    result = describe(torch.device("cuda" if cuda else "cpu"), words)
    short = re.sub(r"[^a-z0-9]+", "-", result["device"].lower()).strip("-") if cuda else "cpu"
    output = options.output or RESULTS / f"training-{short}.json"
    output.parent.mkdir(parents=True, exist_ok=True)

    def keep(found: dict[str, Any]) -> None:
        result.update(found)
        print("\n".join(f"{key}: {value}" for key, value in found.items()), flush=True)
        write_json(output, result)

    with tempfile.TemporaryDirectory() as folder:
        size = PICTURE_SIZE if settings.crop > 100 else (120, 160)
        data = make_data(Path(folder) / "data", max(options.pictures, 2 * settings.batch), size, CLASSES)
        measure(recipe, data, Path(folder), options.rounds, keep)
    print(f"written to {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
