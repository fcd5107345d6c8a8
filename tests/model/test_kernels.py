"""The compiled Encoding kernel: equal to the float64 twin, deterministic, careful with memory, and never needed.

Errors are measured against the twin in float64 and relative to the largest value of each result. TOLERANCE is what
float32 arithmetic allows at ordinary values; where the formula itself is ill-conditioned (long features under large
scales) the float32 twin errs too, and the kernel may err four times as much as that.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model import encoding, kernels
from model.encoding import encode, encode_backward, encode_reference
from model.kernels import build

ROOT = Path(__file__).parents[2]
NAMES = ("encoded", "grad_x", "grad_codewords", "grad_scale")
TOLERANCE = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # half types: grad_x is rounded to them
INSTRUCTIONS = ("baseline", "avx2", "avx512")

needs_kernel = pytest.mark.skipif(encoding.backend() == "twin", reason="no compiled kernel (make kernels)")


@pytest.fixture(params=INSTRUCTIONS)
def each_instruction_set(request):
    usual = kernels.instructions()
    if not kernels.choose_instructions(request.param):
        pytest.skip(f"this processor or build has no {request.param}")
    yield request.param
    kernels.choose_instructions(usual)


def arguments(batch, channels, height, width, codewords, dtype=torch.float32, spread=0.3):
    """(x, codewords, scale, grad) as a trained layer has them: x rectified, scale in (-1, 0) over sqrt(D)."""
    random = torch.Generator().manual_seed(channels + codewords)
    x = torch.randn(batch, channels, height, width, generator=random).relu().to(dtype)
    c = spread * torch.randn(codewords, channels, generator=random)
    s = -torch.rand(codewords, generator=random) / channels**0.5
    return x, c, s, torch.randn(batch, codewords, channels, generator=random)


def results(x, c, s, grad, reference_positions=0.0):
    return encode(x, c, s, reference_positions), *encode_backward(grad, x, c, s, reference_positions)


def twin_results(x, c, s, grad, reference_positions=0.0):
    """The twin's, with the gradients that autograd finds for it; in the arguments' own dtype."""
    inputs = [tensor.detach().requires_grad_() for tensor in (x, c, s)]
    encoded = encode_reference(*inputs, reference_positions)
    return encoded.detach(), *torch.autograd.grad(encoded, inputs, grad.to(encoded.dtype))


def assert_equals_the_twin(x, c, s, grad, reference_positions=0.0):
    got = results(x, c, s, grad, reference_positions)
    want = twin_results(*(tensor.double() for tensor in (x, c, s, grad)), reference_positions)
    twin = twin_results(x.float(), c, s, grad, reference_positions)
    for name, mine, exact, theirs in zip(NAMES, got, want, twin, strict=True):
        largest = exact.abs().max() if exact.numel() else torch.tensor(0.0)
        tolerance = TOLERANCE[x.dtype if name == "grad_x" else torch.float32] * largest
        error = (mine.double() - exact).abs().max() if exact.numel() else torch.tensor(0.0)
        allowed = max(tolerance, 4 * (theirs.double() - exact).abs().max() if exact.numel() else tolerance)
        assert error <= allowed, f"{name}: error {error:.1e}, allowed {allowed:.1e}, largest value {largest:.1e}"


# Every N, B, K and D that matters, each with several of the others: (B, D, H, W, K).
SHAPES = [
    (1, 1, 1, 1, 1),
    (3, 40, 1, 7, 16),
    (1, 128, 7, 9, 32),
    (3, 512, 8, 8, 33),
    (1, 520, 5, 13, 64),
    (3, 1, 5, 13, 33),
    (1, 40, 45, 60, 64),
    (1, 512, 45, 60, 32),
    (3, 128, 45, 60, 1),
    (1, 40, 128, 128, 16),
    (20, 40, 8, 8, 32),
]


@needs_kernel
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_float64_twin(shape, layout):
    x, *rest = arguments(*shape)
    assert_equals_the_twin(x.contiguous(memory_format=layout), *rest)


@needs_kernel
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (3, 40, 1, 7, 16), (1, 130, 33, 35, 33)], ids=str)
def test_on_every_instruction_set(shape, layout, each_instruction_set):
    x, *rest = arguments(*shape)
    assert_equals_the_twin(x.contiguous(memory_format=layout), *rest, reference_positions=300.0)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_half_precision_features(dtype, layout):
    x, *rest = arguments(2, 130, 13, 15, 33, dtype)
    assert_equals_the_twin(x.contiguous(memory_format=layout), *rest)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_conversions_are_those_of_pytorch_for_every_value(dtype, each_instruction_set):
    codes = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = codes.view(dtype).view(2**8, 1, 1, 2**8)
    x = torch.where(x.isfinite() & (x.abs() < 1e15), x, 0)
    image = x.float().sum(-1, dtype=torch.float64).view(-1)
    encoded = encode(x, torch.zeros(1, 1), torch.zeros(1))
    assert (encoded.view(-1).double() - image).abs().max() <= 1e-6 * x.float().abs().sum(-1).max()
    # With one codeword the weight is 1, so that the gradient of x is that of the result, rounded once.
    grad = torch.cat([torch.linspace(-7e4, 7e4, 4001), torch.logspace(-9, 5, 4001), torch.tensor([float("inf")])])
    pixels = torch.zeros(len(grad), 1, 1, 1, dtype=dtype)
    grad_x, *_ = encode_backward(grad.view(-1, 1, 1), pixels, torch.zeros(1, 1), torch.zeros(1), 0.0)
    finite = grad.isfinite()
    assert torch.equal(grad_x.view(-1)[finite], grad[finite].to(dtype))


@needs_kernel
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[..., ::2],
        lambda x: x[:, :, 1:, 1:],
        lambda x: x[:, ::2],
        lambda x: x[::2],
        lambda x: x.transpose(2, 3),
        lambda x: x.contiguous(memory_format=torch.channels_last)[..., ::2],
        lambda x: x.contiguous(memory_format=torch.channels_last)[:, 1:],
        lambda x: x[:, :, :1, :1],
        lambda x: x[:, :, :, :1],
        lambda x: x[:, :1].expand(-1, 6, -1, -1),
    ],
)
def test_strided_features(view):
    x = view(arguments(3, 6, 5, 14, 4)[0])
    _, c, s, grad = arguments(x.shape[0], x.shape[1], 1, 1, 4)
    assert_equals_the_twin(x, c, s, grad)


@needs_kernel
@pytest.mark.parametrize("scale", [0.0, 3.0, -1e4])
@pytest.mark.parametrize("size", [1.0, 1e3])
def test_extreme_scales_and_features(scale, size):
    x, c, _, grad = arguments(1, 64, 9, 15, 8)
    assert_equals_the_twin(size * x, size * c, scale * torch.linspace(0.5, 1, 8), grad)


@needs_kernel
def test_codewords_far_away():
    x, c, s, grad = arguments(2, 64, 9, 15, 8)
    assert_equals_the_twin(x, c + 100, s, grad)


@needs_kernel
def test_equal_scales_stay_exact_for_long_features():
    """The common part of the logits is left out before it can swallow the differences; the float32 twin loses them."""
    x, c, *_ = arguments(1, 64, 9, 15, 8)
    x, s = x + 1000, torch.full((8,), -1e-3)
    want = encode_reference(x.double(), c.double(), s.double())
    assert (encode(x, c, s) - want).abs().max() <= 1e-5 * want.abs().max()


@needs_kernel
def test_empty_batch_and_empty_pictures():
    for batch, height in ((0, 5), (2, 0)):
        x, c, s, grad = arguments(batch, 8, height, 7, 4)
        encoded, grad_x, grad_codewords, grad_scale = results(x, c, s, grad, 9.0)
        assert encoded.shape == (batch, 4, 8)
        assert grad_x.shape == x.shape
        assert not any(result.any() for result in (encoded, grad_codewords, grad_scale))


@needs_kernel
@pytest.mark.parametrize("shape", [(1, 64, 45, 60, 32), (5, 40, 30, 30, 33)], ids=str)
def test_the_same_bits_on_every_run_and_for_any_number_of_threads(shape):
    inputs = arguments(*shape)
    usual = torch.get_num_threads()
    try:
        every = []
        for threads in (1, 1, 2, 3):
            torch.set_num_threads(threads)
            every.append(results(*inputs))
    finally:
        torch.set_num_threads(usual)
    assert all(torch.equal(*pair) for run in every[1:] for pair in zip(run, every[0], strict=True))


@needs_kernel
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_give_nan_where_they_reach(value, each_instruction_set):
    x, c, s, grad = arguments(2, 40, 9, 9, 5)
    x[0, 3, 4, 5] = value
    encoded, grad_x, grad_codewords, grad_scale = results(x, c, s, grad)
    assert encoded[0].isnan().all() and encoded[1].isfinite().all()
    assert grad_x[0, :, 4, 5].isnan().all() and grad_x.isnan().sum() == 40
    assert grad_codewords.isnan().all() and grad_scale.isnan().all()
    for position in range(2):
        inputs = [x.nan_to_num(0, 0, 0), c.clone(), s.clone()]
        inputs[1 + position][-1] = value
        assert encode(*inputs).isnan().any()


@needs_kernel
def test_autograd_gives_each_gradient_its_arguments_dtype_and_layout():
    x, c, s, _ = arguments(2, 8, 3, 5, 4, torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    inputs = x, c.requires_grad_(), s.bfloat16().requires_grad_()
    encode(*inputs).sum().backward()
    assert [tensor.grad.dtype for tensor in inputs] == [torch.bfloat16, torch.float32, torch.bfloat16]
    assert x.grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_opcheck_of_both_operators(layout, dtype):
    x, c, s, grad = arguments(2, 8, 3, 5, 4)
    x = x.to(dtype, memory_format=layout).requires_grad_()
    if dtype == torch.float64:
        c, s, grad = c.double(), s.double(), grad.double()
    torch.library.opcheck(torch.ops.encnet.encode.default, (x, c.requires_grad_(), s.requires_grad_(), 3.0))
    plain = [tensor.detach() for tensor in (grad, x, c, s)]
    torch.library.opcheck(torch.ops.encnet.encode_backward.default, (*plain, 3.0))


MEASURE = """
import torch
from benchmarks.memory import extra_kilobytes
from model.encoding import encode, encode_backward
torch.set_num_threads(1)
x, c, s, grad = torch.randn(1, 512, 128, 128), torch.randn(32, 512), -torch.rand(32), torch.randn(1, 32, 512)
forward = extra_kilobytes(lambda: encode(x, c, s))
backward = extra_kilobytes(lambda: encode_backward(grad, x, c, s, 0.0))
print(forward, backward)
"""


@needs_kernel
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no /proc")
def test_memory_beyond_inputs_and_outputs():
    """Under 2 MB on one thread, forward and backward, at D = 512, K = 32, N = 16384."""
    done = subprocess.run([sys.executable, "-c", MEASURE], cwd=ROOT, capture_output=True, text=True, check=True)
    forward, backward = map(int, done.stdout.split())
    assert forward < 2048, f"{forward} KB"
    assert backward < 2048, f"{backward} KB"


# ------------------------------------------------------------------------------------------- without the library

DESCRIBE = "from model import encoding; print(encoding.backend())"


def describe(**environment):
    done = subprocess.run(
        [sys.executable, "-c", DESCRIBE],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_switched_off_the_twin_answers():
    assert describe(ENCNET_KERNELS="off") == "twin"


@pytest.fixture
def library_at(monkeypatch):
    def place(path):
        monkeypatch.setattr(kernels, "LIBRARY", path)
        kernels.library.cache_clear()

    yield place
    kernels.library.cache_clear()


@pytest.mark.parametrize("fault", ["missing", "no library", "another library"])
def test_without_a_sound_library_the_twin_answers(fault, tmp_path, library_at, caplog):
    broken = tmp_path / "libencnet_torch.so"
    if fault == "no library":
        broken.write_text("not a library")
    elif fault == "another library":
        other = kernels.LIBRARY.with_name("libencnet_ort.so")
        if not other.exists():
            pytest.skip("no compiled kernel (make kernels)")
        broken.write_bytes(other.read_bytes())
    library_at(broken)
    inputs = arguments(2, 8, 3, 5, 4)
    assert encoding.backend() == "twin"
    assert kernels.instructions() is None
    for mine, exact in zip(results(*inputs), twin_results(*inputs), strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-5, atol=1e-5)
    assert len(caplog.records) == (0 if fault == "missing" else 1)


# ---------------------------------------------------------------------------------------------------- the build


@pytest.fixture
def run_build(tmp_path, monkeypatch, capsys):
    def run(compiler, *options):
        monkeypatch.setattr(build, "OUTPUT", tmp_path / "kernels")
        monkeypatch.setattr(sys, "argv", ["build.py", *options])
        monkeypatch.setenv("CXX", compiler)
        status = build.main()
        return status, capsys.readouterr().err

    return run


def test_without_a_compiler_the_build_says_so_and_goes_on(run_build):
    status, printed = run_build("no-such-compiler")
    assert status == 0
    assert "no C++ compiler here (no-such-compiler)" in printed
    assert run_build("no-such-compiler", "--quiet") == (0, "")
    assert run_build("no-such-compiler", "--strict")[0] == 1


def test_a_failing_compiler_is_reported_and_leaves_no_stale_library(run_build, tmp_path):
    stale = tmp_path / "kernels" / "libencnet_torch.so"
    stale.parent.mkdir()
    stale.touch()
    status, printed = run_build("false", "--quiet")
    assert status == 0
    assert "not built: false ended with status 1" in printed
    assert not stale.exists()


def has_compiler():
    try:
        return bool(build.compiler())
    except build.BuildError:
        return False


@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")
def test_sanitizers_find_nothing(tmp_path):
    """The kernel on every instruction set under AddressSanitizer and UBSan, driven from C++."""
    cxx, options = build.compiler(), ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() {}")
    try:
        build.run([*cxx, *options, str(probe), "-o", str(tmp_path / "probe")])
        build.run([str(tmp_path / "probe")])
    except build.BuildError as error:
        pytest.skip(f"no sanitizers here: {error}")
    objects = build.compile_kernel(cxx, tmp_path, options)
    driver = tmp_path / "driver"
    source = Path(__file__).with_name("kernel_driver.cpp")
    build.run([*cxx, *options, "-std=c++17", "-I", str(build.SOURCES), str(source), *objects, "-o", str(driver)])
    done = subprocess.run([str(driver)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "baseline" in done.stdout


# ---- GPUs


def test_a_gpu_before_sm_80_has_the_twin(monkeypatch, caplog):
    for capability, runs in (((7, 5), False), ((8, 0), True), ((12, 0), True)):
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda device, found=capability: found)
        kernels.cuda.capable.cache_clear()
        assert kernels.cuda.capable(0) == runs
    kernels.cuda.capable.cache_clear()
    assert caplog.messages == [
        "the Encoding kernel for CUDA needs compute capability 8.0, GPU 0 has 7.5; its PyTorch twin is used"
    ]


def test_what_is_compiled_for_gpus(monkeypatch):
    def shown(text):
        done = subprocess.CompletedProcess([], 0, stdout=text)
        monkeypatch.setattr(build.subprocess, "run", lambda *given, **options: done)
        return build.visible_architectures()

    assert shown("9.0\n10.0\n9.0\n") == ["90", "100"]
    assert shown("7.5\n") == []
    codes = build.architecture_flags(["80", "90", "120"])[1::2]
    assert codes == [
        *(f"arch=compute_{cap},code=sm_{cap}" for cap in (80, 90, 120)),
        *(f"arch=compute_{cap},code=compute_{cap}" for cap in (80, 120)),
    ]
    assert build.architecture_flags(["90"])[1::2] == ["arch=compute_90,code=sm_90", "arch=compute_90,code=compute_90"]
