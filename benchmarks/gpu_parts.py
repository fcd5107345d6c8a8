"""What `make gpu-check` checks and measures of the Encoding kernels on a GPU, part by part.

Every part is a function of the device that adds to a Report; gpu_check.py runs each in a process of its own. Only
torch is needed, and what else a part can use is reported as not run where it is missing. The functions also run on a
CPU, where they exercise the CPU kernel or the twin (tests/model/test_gpu_check.py).

Errors are differences from the twin in float64, relative to the largest value of each result. TOLERANCE is what the
arithmetic allows at ordinary values: encoding_cuda.h says what is rounded. Where the formula itself is ill-conditioned
(long features under large scales) rounding alone moves the result, and the kernel may err four times as much as the
float32 twin does when codewords and gradient are rounded to x's type.
"""

import contextlib
import copy
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model import kernels
from model.encoding import Encoding, backend, encode, encode_backward, encode_backward_reference, encode_reference
from model.kernels import cuda

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]  # x, codewords, scale and the gradient of the result
Results = tuple[Tensor, Tensor, Tensor, Tensor]  # the result and the gradients of x, codewords and scale

NAMES = ("encoded", "grad_x", "grad_codewords", "grad_scale")
TOLERANCE = {
    torch.float32: (5e-6, 5e-6, 5e-6, 2e-5),  # the scale's gradient adds terms far longer than itself
    torch.float16: (5e-4, 2.5e-3, 5e-4, 2.5e-3),
    torch.bfloat16: (4e-3, 2e-2, 4e-3, 2e-2),
}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

# (B, D, H, W, K): every N, B, D and K of the promise, each with several of the others. The last two take the general
# path everywhere, the others the tensor cores where TENSOR_CORES says so.
SHAPES = [
    (1, 1, 1, 1, 1),
    (3, 40, 1, 7, 16),
    (1, 128, 7, 9, 32),
    (3, 512, 8, 8, 33),
    (1, 512, 8, 8, 64),
    (2, 512, 30, 33, 48),
    (3, 1, 5, 13, 33),
    (1, 40, 45, 60, 64),
    (1, 512, 45, 60, 32),
    (3, 128, 45, 60, 1),
    (1, 512, 128, 128, 32),
    (40, 40, 8, 8, 32),
    (1, 520, 5, 13, 64),
    (2, 600, 30, 33, 100),
]

# Bytes of shared memory that a block can have (sm_90 and 100; 80; 86, 89 and 120), and with these the most codewords
# that are promised the tensor cores at D <= 512: of half types forward and backward, and of float32.
TENSOR_CORES = {232448: ((64, 64), (64, 32)), 166912: ((64, 64), (32, 16)), 101376: ((64, 32), (16, 0))}


@dataclass
class Report:
    """What one part found: checks by name (None: passed, else what was wrong), measurements, and what was not run."""

    checks: dict[str, str | None] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    not_run: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def check(self, name: str) -> Iterator[None]:
        """The block is a check of this name: it passes unless it raises, and whatever it raises ends there."""
        try:
            yield
            self.checks[name] = None
        except Exception as error:
            words = str(error).strip().splitlines()
            self.checks[name] = f"{type(error).__name__}: {words[0] if words else ''}"[:300]

    def add(self, **row: Any) -> None:
        self.rows.append(row)

    def plain(self) -> dict[str, Any]:
        return asdict(self)


def inputs_of(
    shape: tuple[int, int, int, int, int], device: str, dtype: torch.dtype = torch.float32, spread: float = 0.3
) -> Inputs:
    """As a trained layer has them: x rectified, scale in (-1, 0) over sqrt(D)."""
    batch, channels, height, width, codewords = shape
    random = torch.Generator().manual_seed(channels + codewords)
    x = torch.randn(batch, channels, height, width, generator=random).relu().to(dtype)
    c = spread * torch.randn(codewords, channels, generator=random)
    s = -torch.rand(codewords, generator=random) / channels**0.5
    grad = torch.randn(batch, codewords, channels, generator=random)
    return x.to(device), c.to(device), s.to(device), grad.to(device)


def results(inputs: Inputs, reference_positions: float = 0.0) -> Results:
    x, c, s, grad = inputs
    return encode(x, c, s, reference_positions), *encode_backward(grad, x, c, s, reference_positions)


def twin_results(inputs: Inputs, reference_positions: float = 0.0) -> Results:
    x, c, s, grad = inputs
    encoded = encode_reference(x, c, s, reference_positions)
    return encoded, *encode_backward_reference(grad, x, c, s, reference_positions)


def rounded_twin_results(inputs: Inputs, reference_positions: float = 0.0) -> Results:
    """The twin in float32, with what the kernels round to x's type rounded to it."""
    x, c, s, grad = inputs
    return twin_results((x.float(), c.to(x.dtype).float(), s, grad.to(x.dtype).float()), reference_positions)


def largest(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0


def assert_equals_the_twin(got: Results, inputs: Inputs, reference_positions: float = 0.0) -> list[float]:
    """Raises AssertionError naming the result that is further off than it may be; returns the relative errors."""
    x, c, s, grad = inputs
    exact = twin_results((x.double(), c.double(), s.double(), grad.double()), reference_positions)
    rounded = rounded_twin_results(inputs, reference_positions)
    errors = []
    for name, tolerance, mine, want, theirs in zip(NAMES, TOLERANCE[x.dtype], got, exact, rounded, strict=True):
        assert mine.shape == want.shape, f"{name} has shape {tuple(mine.shape)}, not {tuple(want.shape)}"
        assert mine.isfinite().all(), f"{name} is not finite"
        error, size = largest(mine.double() - want), largest(want)
        allowed = max(tolerance * size, 4 * largest(theirs.double() - want))
        assert error <= allowed, f"{name}: error {error:.1e}, allowed {allowed:.1e}, largest value {size:.1e}"
        errors.append(error / size if size else 0.0)
    return errors


# --------------------------------------------------------------------------------------------------- correctness

VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "every second column": lambda x: x[..., ::2],
    "cut out": lambda x: x[:, :, 1:, 1:],
    "every second channel": lambda x: x[:, ::2],
    "every second picture": lambda x: x[::2],
    "rows cut off": lambda x: x[:, :, 1:],
    "transposed": lambda x: x.transpose(2, 3),
    "channels_last, every second column": lambda x: x.contiguous(memory_format=torch.channels_last)[..., ::2],
    "channels_last, a channel cut off": lambda x: x.contiguous(memory_format=torch.channels_last)[:, 1:],
    "one row": lambda x: x[:, :, :1],
    "expanded": lambda x: x[:, :1].expand(-1, 6, -1, -1),
}


def like_shape(x: Tensor, inputs: Inputs) -> Inputs:
    """x with the other inputs made for its shape."""
    batch, channels, height, width = x.shape
    return x, *inputs_of((batch, channels, height, width, inputs[1].shape[0]), str(x.device), x.dtype)[1:]


def kernel_runs(device: str, report: Report) -> bool:
    """Check that the device's kernel computes `encode`: the twin, in its place, would pass as its own equal."""
    with report.check("the kernel is what runs"):
        takes_them = kernels.usable(*inputs_of((1, 8, 3, 5, 4), device)[:3])
        found = backend(device) if takes_them else "twin"
        wanted = f"{torch.device(device).type} kernel"
        assert found == wanted, f"the {found} computes encode on {device}, not the {wanted}: nothing was checked"
    return report.checks["the kernel is what runs"] is None


def promised_paths(x: Tensor, codewords: int, shared_bytes: int) -> tuple[str | None, str | None]:
    """The path of each pass on a card with so much shared memory; None: either."""
    if x.shape[1] > 512 or codewords > 64:
        return "general", "general"
    half, single = max((room, most) for room, most in TENSOR_CORES.items() if room <= shared_bytes)[1]
    forward, backward = single if x.dtype == torch.float32 else half
    return "tiles" if codewords <= forward else None, "tiles" if codewords <= backward else None


def check_paths(x: Tensor, codewords: Tensor, shared_bytes: int, layout: str, report: Report) -> None:
    promised = promised_paths(x, codewords.shape[0], shared_bytes)
    where = f"{str(x.dtype)[6:]} {layout} B,D,H,W,K={(*x.shape, codewords.shape[0])}"
    for backward, path in enumerate(promised):
        if path:
            with report.check(f"takes the path {path}: {where} {'backward' if backward else 'forward'}"):
                plan = cuda.describe(x, codewords, bool(backward))
                assert plan.split()[0] == path, f"runs: {plan}"


def correctness(device: str, report: Report, shapes: list[tuple[int, int, int, int, int]] = SHAPES) -> None:
    if not kernel_runs(device, report):
        return
    for dtype in TOLERANCE:
        kind = str(dtype).removeprefix("torch.")
        for shape in shapes:
            for layout, memory_format in LAYOUTS.items():
                with report.check(f"equals the float64 twin: {kind} {layout} B,D,H,W,K={shape}"):
                    x, *rest = inputs_of(shape, device, dtype)
                    inputs = (x.contiguous(memory_format=memory_format), *rest)
                    errors = assert_equals_the_twin(results(inputs, 300.0), inputs, 300.0)  # type: ignore[arg-type]
                    report.rows.append({"what": "error", "dtype": kind, "layout": layout, "shape": shape} | dict(
                        zip(NAMES, errors, strict=True)))  # fmt: skip
                if device != "cpu":
                    properties = torch.cuda.get_device_properties(device)
                    room = getattr(properties, "shared_memory_per_block_optin", min(TENSOR_CORES))
                    check_paths(inputs[0], inputs[1], room, layout, report)
        small = inputs_of((3, 6, 5, 14, 4), device, dtype)
        for name, view in VIEWS.items():
            with report.check(f"strided x: {kind} {name}"):
                inputs = like_shape(view(small[0]), small)
                assert_equals_the_twin(results(inputs), inputs)
        x, c, s, grad = inputs_of((1, 64, 9, 15, 8), device, dtype)
        for scale in (0.0, 3.0, -1e4):
            for size in (1.0, 1e3):
                with report.check(f"scale {scale:g}, |x| about {size:g}: {kind}"):
                    inputs = (size * x, size * c, scale * torch.linspace(0.5, 1, 8, device=device), grad)
                    if dtype != torch.float16 or size * abs(scale) <= 3:  # more has no room in float16
                        assert_equals_the_twin(results(inputs), inputs)
        with report.check(f"codewords far away: {kind}"):
            assert_equals_the_twin(results((x, c + 100, s, grad)), (x, c + 100, s, grad))
        with report.check(f"small and large gradients: {kind}"):
            for size in (1e-12, 1e12):
                if dtype != torch.float16:  # grad_x itself is a float16
                    assert_equals_the_twin(results((x, c, s, size * grad)), (x, c, s, size * grad))
            tiny = results((x, c, s, 1e-12 * grad))
            exact = twin_results((x.double(), c.double(), s.double(), 1e-12 * grad.double()))
            for i in (2, 3):
                assert largest(tiny[i] - exact[i]) <= TOLERANCE[dtype][i] * largest(exact[i]), NAMES[i]
        for batch, height in ((0, 5), (2, 0)):
            with report.check(f"batch of {batch}, pictures {height} high: {kind}"):
                inputs = inputs_of((batch, 8, height, 7, 4), device, dtype)
                got = results(inputs, 9.0)
                assert got[1].shape == inputs[0].shape
                assert not any(result.any() for result in (got[0], got[2], got[3]))
        for value in (float("nan"), float("inf"), float("-inf")):
            with report.check(f"{value} gives NaN where it reaches: {kind}"):
                x, c, s, grad = inputs_of((2, 40, 9, 9, 5), device, dtype)
                x[0, 3, 4, 5] = value
                encoded, grad_x, grad_codewords, grad_scale = results((x, c, s, grad))
                assert encoded[0].isnan().all() and encoded[1].isfinite().all(), "encoded"
                assert grad_x[0, :, 4, 5].isnan().all() and int(grad_x.isnan().sum()) == 40, "grad_x"
                assert grad_codewords.isnan().all() and grad_scale.isnan().all(), "gradients of the parameters"
        for shape in ((1, 64, 45, 60, 32), (5, 40, 30, 30, 33), (2, 600, 9, 33, 70)):
            with report.check(f"the same bits on every run: {kind} {shape}"):
                inputs = inputs_of(shape, device, dtype)
                first = results(inputs)
                for _ in range(5):
                    assert all(torch.equal(*pair) for pair in zip(results(inputs), first, strict=True))


# ------------------------------------------------------------------------------------------- the operator in PyTorch


def close(mine: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    error, size = largest(mine.double() - theirs.double()), largest(theirs)
    assert error <= tolerance * size, f"error {error:.1e}, largest value {size:.1e}"


def loss_gradients(layer: Any, x: Tensor) -> list[Tensor]:
    layer.zero_grad()
    x = x.detach().requires_grad_()
    layer(x).square().sum().backward()
    assert x.grad is not None
    return [x.grad, *(parameter.grad for parameter in layer.parameters() if parameter.grad is not None)]


def operator(device: str, report: Report) -> None:
    with report.check("backend"):
        found = backend(device)
        assert device == "cpu" or found == "cuda kernel", f"the backend on {device} is the {found}"
    for dtype in (torch.float32, torch.bfloat16):
        for layout, memory_format in LAYOUTS.items():
            with report.check(f"opcheck: {str(dtype)[6:]} {layout}"):
                x, c, s, grad = inputs_of((2, 8, 3, 5, 4), device, dtype)
                x = x.contiguous(memory_format=memory_format)
                leaves = x.requires_grad_(), c.requires_grad_(), s.requires_grad_()
                torch.library.opcheck(torch.ops.encnet.encode.default, (*leaves, 3.0))
                plain = [tensor.detach() for tensor in (grad, *leaves)]
                torch.library.opcheck(torch.ops.encnet.encode_backward.default, (*plain, 3.0))
    x = inputs_of((2, 64, 9, 15, 8), device)[0]
    layer = Encoding(64, 8, reference_positions=100.0).to(device)
    plain = loss_gradients(layer, x)
    with report.check("gradients have their arguments' dtype and layout"):
        half = x.bfloat16().contiguous(memory_format=torch.channels_last)
        gradients = loss_gradients(layer, half)
        assert [gradient.dtype for gradient in gradients] == [torch.bfloat16, torch.float32, torch.float32]
        assert gradients[0].is_contiguous(memory_format=torch.channels_last)
    with report.check("torch.compile(fullgraph=True)"):
        for mine, theirs in zip(loss_gradients(torch.compile(layer, fullgraph=True), x), plain, strict=True):
            close(mine, theirs)
    with report.check("torch.export"):
        exported = torch.export.export(layer, (x,)).module()
        close(exported(x), layer(x))
    with report.check("autocast"), torch.autocast(device, torch.bfloat16):
        projected = torch.nn.functional.conv2d(x, torch.eye(64, device=device).view(64, 64, 1, 1))
        assert projected.dtype == torch.bfloat16
        encoded = layer(projected)
        assert encoded.dtype == torch.float32
        close(encoded, layer(x.bfloat16()), 2e-3)
    with report.check("second derivatives"):
        small, c, s, _ = (tensor.double().requires_grad_() for tensor in inputs_of((1, 3, 2, 2, 2), device))
        assert torch.autograd.gradgradcheck(encode, (small, c, s))
    with report.check("wrong shapes are named"):
        try:
            encode(x, layer.codewords[:, 1:], layer.scale)
            raise AssertionError("no error")
        except ValueError as error:
            assert "codewords must be (K, D) with D = 64" in str(error), error
    if device == "cpu":
        report.not_run.append("CUDA graph, streams and DDP over NCCL: no GPU")
        return
    with report.check("CUDA graph"):
        graphed = torch.cuda.make_graphed_callables(copy.deepcopy(layer), (x.clone().requires_grad_(),))
        for seed in range(3):
            torch.manual_seed(seed)
            fresh = torch.randn_like(x)
            for mine, theirs in zip(loss_gradients(graphed, fresh), loss_gradients(layer, fresh), strict=True):
                assert torch.equal(mine, theirs)
    with report.check("another stream"):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            encoded = [layer(x) for _ in range(50)]
        side.synchronize()
        assert all(torch.equal(one, layer(x)) for one in encoded)
    if not torch.distributed.is_available() or not torch.distributed.is_nccl_available():
        report.not_run.append("DDP: this PyTorch has no NCCL")
        return
    with report.check("DDP over NCCL, one process"), tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
        store = torch.distributed.FileStore(str(Path(folder) / "store"), 1)
        torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
        try:
            parallel = torch.nn.parallel.DistributedDataParallel(copy.deepcopy(layer), device_ids=[x.device.index or 0])
            for mine, theirs in zip(loss_gradients(parallel, x), plain, strict=True):
                close(mine, theirs)
        finally:
            torch.distributed.destroy_process_group()


# --------------------------------------------------------------------------------------------------------- speed


def broadcast_form(x: Tensor, codewords: Tensor, scale: Tensor) -> Tensor:
    """Equation 1 as it is written, every residual in memory."""
    residuals = x.float().flatten(2).transpose(1, 2).unsqueeze(2) - codewords
    weights = torch.softmax(scale * residuals.square().sum(-1), dim=-1)
    return (weights.unsqueeze(-1) * residuals).sum(1)


def milliseconds(calls: Sequence[Callable[[], object]], device: str, rounds: int, inner: int) -> float:
    """Median time of a call. `calls` do the same on different memory, so that none finds its input in the cache."""
    times = []
    for turn in range(-2, rounds):
        if device == "cpu":
            start = time.perf_counter()
            for i in range(inner):
                calls[i % len(calls)]()
            taken = 1000 * (time.perf_counter() - start)
        else:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            for i in range(inner):
                calls[i % len(calls)]()
            end.record()
            end.synchronize()
            taken = begin.elapsed_time(end)
        if turn >= 0:
            times.append(taken / inner)
    return statistics.median(times)


def captured(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """The calls, one after another, as one CUDA graph: what is left is the GPU's own time."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def copy_rate(device: str, megabytes: int = 2048) -> float:
    """Bytes per millisecond, read and written, of a copy within the device's memory."""
    source = torch.empty(megabytes << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / milliseconds([lambda: target.copy_(source)], device, 10, 2)


def calls_of(function: Callable[..., Tensor], every: list[Inputs], passes: str) -> list[Callable[[], object]]:
    """One call for each set of inputs: the forward pass, or the forward and the backward one by autograd."""
    if passes == "forward":
        return [lambda given=given: function(*given[:3]) for given in every]  # type: ignore[misc]
    calls: list[Callable[[], object]] = []
    for x, c, s, grad in every:
        leaves = [tensor.detach().requires_grad_() for tensor in (x, c, s)]
        calls.append(lambda leaves=leaves, grad=grad: torch.autograd.grad(function(*leaves), leaves, grad))  # type: ignore[misc]
    return calls


def time_of(row: dict[str, Any], key: str, calls: Sequence[Callable[[], object]], device: str, rounds: int) -> None:
    """Add a call's milliseconds to the row: as a program calls it, and as a graph where that can be captured."""
    try:
        row[f"{key}_ms"] = round(milliseconds(calls, device, rounds, 2 * len(calls)), 4)
        if device != "cpu":
            row[f"{key}_gpu_ms"] = round(milliseconds([captured(calls)], device, rounds, 4) / len(calls), 4)
    except Exception as error:
        row[f"{key}_failed"] = str(error).splitlines()[0][:200]
        if device != "cpu":
            torch.cuda.empty_cache()


def speed(
    device: str,
    report: Report,
    batch: int = 16,
    positions: tuple[int, ...] = (8100, 3600, 16384),
    channels: int = 512,
    rounds: int = 20,
    copies: int = 4,
) -> None:
    """Every contender for contiguous x; for channels_last, and for a shape of the general path, ours and the twin."""
    rate = copy_rate(device, 2048 if device != "cpu" else 16)
    report.add(what="copy", gigabytes_per_second=round(rate / 1e6, 1))
    for layout in LAYOUTS:
        for count in positions:
            for dtype in (torch.bfloat16, torch.float32):
                every = speed_inputs(batch, channels, count, 32, layout, dtype, device, copies)
                where = {"dtype": str(dtype)[6:], "layout": layout, "positions": count, "batch": batch}
                add_backward(every, where, rate, device, report, rounds)
                for passes in ("forward", "forward + backward"):
                    contenders: dict[str, Callable[..., Tensor]] = {"ours": encode, "twin": encode_reference}
                    if layout == "contiguous":
                        torch.compiler.reset()
                        contenders["compiled"] = torch.compile(encode_reference, dynamic=False)
                        if count == min(positions):
                            contenders["broadcast"] = broadcast_form
                    add_speed(contenders, passes, every, where, rate, device, report, rounds)
    every = speed_inputs(4, 2 * channels, min(positions), 128, "contiguous", torch.float32, device, 1)
    where = {"dtype": "float32", "layout": "D and K doubled and more", "positions": min(positions), "batch": 4}
    add_speed({"ours": encode, "twin": encode_reference}, "forward", every, where, 0, device, report, rounds)


def speed_inputs(
    batch: int, channels: int, count: int, codewords: int, layout: str, dtype: torch.dtype, device: str, copies: int
) -> list[Inputs]:
    _, c, s, grad = inputs_of((batch, channels, 1, 1, codewords), device, dtype)
    every: list[Inputs] = []
    for _ in range(copies):
        x = torch.randn(batch, channels, count, 1, device=device).relu().to(dtype)
        every.append((x.contiguous(memory_format=LAYOUTS[layout]), c, s, grad))
    return every


def add_backward(
    every: list[Inputs], where: dict[str, Any], rate: float, device: str, report: Report, rounds: int
) -> None:
    """The backward pass alone, without autograd."""
    row: dict[str, Any] = {"what": "speed", "pass": "backward", **where}
    with torch.no_grad():
        calls = [lambda g=g: encode_backward(g[3], *g[:3], 0.0) for g in every]  # type: ignore[misc]
        time_of(row, "ours", calls, device, rounds)
    if device != "cpu":
        row["launch"] = cuda.describe(every[0][0], every[0][1], True)
    add_share(row, 2 * every[0][0].nbytes, rate)
    judge(row, report)
    report.add(**row)


def add_speed(
    contenders: dict[str, Callable[..., Tensor]],
    passes: str,
    every: list[Inputs],
    where: dict[str, Any],
    rate: float,
    device: str,
    report: Report,
    rounds: int,
) -> None:
    row: dict[str, Any] = {"what": "speed", "pass": passes, **where}
    with torch.set_grad_enabled(passes != "forward"):
        for name, function in contenders.items():
            slow = name == "broadcast"
            calls = calls_of(function, every[:1] if slow else every, passes)
            time_of(row, name, calls, device, 3 if slow else rounds)
    if passes == "forward":
        if device != "cpu":
            row["launch"] = cuda.describe(every[0][0], every[0][1], False)
        add_share(row, every[0][0].nbytes, rate)
    judge(row, report)
    report.add(**row)


def add_share(row: dict[str, Any], least_bytes: int, rate: float) -> None:
    """Percent of the time taken that moving this much at the copy's rate takes."""
    taken = None if "ours_failed" in row else row.get("ours_gpu_ms", row.get("ours_ms"))
    if taken and rate:
        row["share_percent"] = round(100 * least_bytes / rate / taken, 1)


def judge(row: dict[str, Any], report: Report) -> None:
    """The promises about speed as checks: a figure that is not reached is a failed one, and so is a call of ours that
    raised; contenders that did count as not run. Adds the ratios to the row."""
    where = f"{row['pass']}, {row['dtype']} {row['layout']} B={row['batch']} N={row['positions']}"
    if "ours_failed" in row:
        report.checks[f"ours runs: {where}"] = row["ours_failed"]
    for key in ("twin", "compiled", "broadcast"):
        if f"{key}_failed" in row:
            report.not_run.append(f"the {key}, {where}: {row[f'{key}_failed']}")
    for key, factor in (("twin", 1.0), ("broadcast", 1.0), ("compiled", 2.0)):
        for kind in ("ms", "gpu_ms"):
            mine, theirs = row.get(f"ours_{kind}"), row.get(f"{key}_{kind}")
            if mine and theirs:
                row[f"{key}_over_ours_{kind}"] = round(theirs / mine, 2)
                if kind == "gpu_ms" and row["layout"] in LAYOUTS:  # nothing is promised for the general path
                    reached = None if theirs >= factor * mine else f"{theirs / mine:.2f}x"
                    report.checks[f"at least {factor:g}x the {key}: {where}"] = reached
    least = {"forward": 60, "backward": 50}.get(row["pass"])
    if least and row["dtype"] == "bfloat16" and row["positions"] >= 8100 and "share_percent" in row:
        share = row["share_percent"]
        name = f"at least {least} % of the copy's rate: {where}"
        report.checks[name] = None if share >= least else f"{share} %"


def overhead(device: str, report: Report, rounds: int = 300) -> None:
    """Microseconds of the caller's time for one call on a tiny input: operator, kernel's Python part, and the twin."""
    x, c, s, grad = inputs_of((1, 64, 4, 4, 8), device)
    calls: dict[str, Callable[[], object]] = {
        "operator": lambda: encode(x, c, s),
        "operator, backward": lambda: encode_backward(grad, x, c, s, 0.0),
        "twin": lambda: encode_reference(x, c, s),
    }
    if kernels.usable(x, c, s):
        calls["kernel alone"] = lambda: kernels.encode(x, c, s, 1.0)
    with torch.no_grad():
        for name, call in calls.items():
            for turns in (rounds // 10, rounds):
                start = time.perf_counter()
                for _ in range(turns):
                    call()
                taken = time.perf_counter() - start
                if device != "cpu":
                    torch.cuda.synchronize()
            report.add(what="overhead", call=name, microseconds=round(1e6 * taken / rounds, 1))


def memory(device: str, report: Report) -> None:
    if not kernel_runs(device, report):
        return
    if device == "cpu":
        report.not_run.append("peak memory: no GPU")
        return
    for dtype in (torch.bfloat16, torch.float32):
        for layout, memory_format in LAYOUTS.items():
            for count in (3600, 8100, 16384):
                x, c, s, grad = inputs_of((16, 512, 1, 1, 32), device, dtype)
                x = torch.randn(16, 512, count, 1, device=device).to(dtype).contiguous(memory_format=memory_format)
                leaves = [tensor.requires_grad_() for tensor in (x, c, s)]

                def once(leaves: list[Tensor] = leaves, grad: Tensor = grad) -> tuple[Tensor, ...]:
                    encoded = encode(*leaves)
                    return encoded, *torch.autograd.grad(encoded, leaves, grad)

                once()
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                returned = sum(tensor.nbytes for tensor in once())
                torch.cuda.synchronize()
                extra = torch.cuda.max_memory_allocated() - before - returned
                percent = round(100 * extra / x.nbytes, 2)
                where = f"{str(dtype)[6:]} {layout} N={count}"
                name = f"peak memory over inputs and outputs under 3 % of x: {where}"
                report.checks[name] = None if percent < 3 else f"{percent} %"
                report.add(what="memory", where=where, extra_kb=extra // 1024, percent_of_x=percent)


# ------------------------------------------------------------------------------------------------------ sanitizer


def sanitized(device: str, report: Report) -> None:
    """Small calls of every path, for compute-sanitizer to watch."""
    if not kernel_runs(device, report):
        return
    for dtype in TOLERANCE:
        for shape in ((2, 40, 5, 13, 33), (1, 512, 9, 9, 32), (1, 512, 3, 7, 48), (1, 520, 5, 13, 20)):
            for memory_format in LAYOUTS.values():
                with report.check(f"watched: {dtype} {memory_format} {shape}"):
                    x, *rest = inputs_of(shape, device, dtype)
                    inputs = (x.contiguous(memory_format=memory_format), *rest)
                    got = results(inputs)  # type: ignore[arg-type]
                    assert all(result.isfinite().all() for result in got)


# --------------------------------------------------------------------------------------------------- ONNX Runtime


def onnx_runtime(device: str, report: Report) -> None:
    """The custom op in ONNX Runtime's CUDA provider equals the function in the file."""
    try:
        import numpy as np
        import onnx
        import onnxruntime
        from onnx import helper

        from export import encoding_op
        from service import kernels as service_kernels
    except ImportError as error:
        report.not_run.append(f"ONNX Runtime: {error}")
        return
    provider = "CUDAExecutionProvider" if device != "cpu" else "CPUExecutionProvider"
    if provider not in onnxruntime.get_available_providers():
        report.not_run.append(f"ONNX Runtime: this build has no {provider}")
        return
    for kind, x_type in ((np.float32, onnx.TensorProto.FLOAT), (np.float16, onnx.TensorProto.FLOAT16)):
        with report.check(f"the custom op on {provider}: {kind.__name__}"):
            node = helper.make_node("Encoding", ["x", "codewords", "scale"], ["encoded"], domain=encoding_op.DOMAIN)
            float32 = onnx.TensorProto.FLOAT
            graph = helper.make_graph(
                [node],
                "encoding",
                [
                    helper.make_tensor_value_info("x", x_type, ["B", "D", "H", "W"]),
                    helper.make_tensor_value_info("codewords", float32, ["K", "D"]),
                    helper.make_tensor_value_info("scale", float32, ["K"]),
                ],
                [helper.make_tensor_value_info("encoded", float32, ["B", "K", "D"])],
            )
            model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", encoding_op.OPSET)], ir_version=9)
            encoding_op.add_function(model)
            x, c, s, _ = inputs_of((3, 128, 45, 60, 32), "cpu")
            feeds = {"x": x.numpy().astype(kind), "codewords": c.numpy(), "scale": s.numpy()}
            options = onnxruntime.SessionOptions()
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(tempfile.gettempdir()) / "encnet-gpu-check")
            assert service_kernels.register(options, cuda=device != "cpu"), "the library is not registered"
            session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=[provider])
            assert provider in session.get_providers(), f"{provider} does not start here"
            encoded = torch.from_numpy(session.run(None, feeds)[0])
            profile = Path(session.end_profiling())
            nodes = profile.read_text()
            profile.unlink()
            exact = encode_reference(torch.from_numpy(feeds["x"]).double(), c.double(), s.double())
            close(encoded, exact, TOLERANCE[torch.float32 if kind is np.float32 else torch.float16][0])
            assert '"op_name" : "Encoding"' in nodes, "the function in the file ran, not the kernel"


def service(device: str, report: Report) -> None:
    """The targets of serving: benchmarks/gpu_service.py, which needs what serving and export need."""
    try:
        from benchmarks import gpu_service
    except ImportError as error:
        report.not_run.append(f"service: {error}")
        return
    gpu_service.service(device, report)


PARTS: dict[str, Callable[[str, Report], None]] = {
    "correctness": correctness,
    "operator": operator,
    "memory": memory,
    "overhead": overhead,
    "speed": speed,
    "onnx_runtime": onnx_runtime,
    "service": service,
    "sanitized": sanitized,
}
