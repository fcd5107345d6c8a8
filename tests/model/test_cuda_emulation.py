"""The CUDA kernels' own source, run on the CPU: equal to the float64 twin, and no barrier is missing.

cuda_emulation.h stands in for the device. Compared are results with warps and blocks run in two orders, which differ
where a barrier is missing, and with the twin, under the tolerances of `make gpu-check`. Memory around x ends in pages
that must not be touched.
"""

import ctypes
import mmap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_parts
from model.kernels import build, cuda
from model.kernels.tensors import features, sizes

H200 = (132, 232448, 8)  # multiprocessors, bytes of shared memory for a block, blocks in a cluster
A100 = (108, 166912, 1)
RTX_4090 = (128, 101376, 1)
FEW = (4, 232448, 4)  # so few that clusters take several images in turn
FEW_OF_A100 = (2, 166912, 1)

has_compiler = build.shutil.which("g++") is not None


def compile_emulation(folder):
    """The library of encoding_cuda.h; float16, which shares bfloat16's source, with one width of tiles."""
    flags = ["-std=c++17", "-O1", "-fPIC", "-w", "-U_FORTIFY_SOURCE", "-DENCNET_EMULATION"]
    include = ["-I", str(Path(__file__).parent), "-I", str(build.SOURCES)]
    units = {
        name: [
            *macros,
            *(["-DENCNET_WIDTHS=32"] if name.startswith("float16") else []),
            "-x",
            "c++",
            str(build.SOURCES / "encoding_cuda.cu"),
        ]
        for name, macros in build.kernel_units().items()
    }
    units["dispatch"] = [str(build.SOURCES / "cuda_dispatch.cpp")]
    commands = [["g++", *flags, *include, *unit, "-c", "-o", str(folder / f"{name}.o")] for name, unit in units.items()]
    with ThreadPoolExecutor() as pool:
        list(pool.map(build.run, commands))
    library = folder / "libencnet_emulation.so"
    build.run(["g++", "-shared", *[command[-1] for command in commands], "-o", str(library)])
    return library


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if not has_compiler:
        pytest.skip("no g++")
    try:
        return cuda.load(compile_emulation(tmp_path_factory.mktemp("emulation")))
    except build.BuildError as error:
        pytest.skip(f"this compiler cannot build the emulation: {error}")


@pytest.fixture
def emulated(library, monkeypatch):
    """Runs both passes on an emulated card, in both orders, which must give the same bits."""
    monkeypatch.setattr(cuda, "library", lambda: library)
    monkeypatch.setattr(cuda, "queue", lambda x: (0, 0))

    def results(inputs, card=FEW, factor=1.0):
        x, c, s, grad = inputs
        every = []
        for descending in (0, 1):
            library.encnet_emulation_set(*card, descending)
            every.append((cuda.encode(x, c, s, factor), *cuda.encode_backward(grad, x, c, s, factor)))
        assert all(torch.equal(*pair) for pair in zip(*every, strict=True)), "a barrier is missing"
        return every[0]

    return results


def described(inputs, library, card):
    library.encnet_emulation_set(*card, 0)
    return [cuda.describe(*inputs[:2], backward).split()[0] for backward in (False, True)]


# (B, D, H, W, K) and the card; between them every path: parts, partial sums, several images for a cluster, one stage.
CASES = [
    ((1, 1, 1, 1, 1), FEW),
    ((3, 40, 1, 7, 16), FEW),
    ((6, 40, 5, 13, 32), FEW),
    ((1, 128, 7, 9, 32), H200),
    ((2, 96, 9, 15, 20), A100),
    ((1, 400, 5, 7, 32), RTX_4090),
    ((2, 512, 3, 7, 64), H200),
    ((5, 512, 3, 7, 33), FEW),
    ((3, 512, 3, 7, 48), FEW_OF_A100),
    ((2, 512, 3, 7, 60), RTX_4090),
    ((1, 505, 3, 7, 30), RTX_4090),
    ((3, 352, 1, 19, 50), FEW),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", gpu_parts.LAYOUTS)
@pytest.mark.parametrize(("shape", "card"), CASES, ids=str)
def test_tiles_equal_the_float64_twin(shape, card, layout, dtype, emulated):
    x, *rest = gpu_parts.inputs_of(shape, "cpu", dtype)
    inputs = (x.contiguous(memory_format=gpu_parts.LAYOUTS[layout]), *rest)
    factor = 300.0 / (shape[2] * shape[3])
    gpu_parts.assert_equals_the_twin(emulated(inputs, card, factor), inputs, 300.0)


@pytest.mark.parametrize("layout", gpu_parts.LAYOUTS)
def test_float16(layout, emulated):
    x, *rest = gpu_parts.inputs_of((2, 96, 9, 15, 20), "cpu", torch.float16)
    inputs = (x.contiguous(memory_format=gpu_parts.LAYOUTS[layout]), *rest)
    gpu_parts.assert_equals_the_twin(emulated(inputs), inputs)


@pytest.mark.parametrize("card", [H200, A100, RTX_4090], ids=str)
def test_every_shape_takes_the_path_that_is_promised(card, emulated, library):
    library.encnet_emulation_set(*card, 0)
    report = gpu_parts.Report()
    widest = [(16, 512, 60, 60, codewords) for codewords in (16, 32, 33, 64)]
    for dtype in (torch.float32, torch.bfloat16):
        for layout, memory_format in gpu_parts.LAYOUTS.items():
            for shape in [*gpu_parts.SHAPES, *widest]:
                x = torch.empty(shape[:4], dtype=dtype).contiguous(memory_format=memory_format)
                gpu_parts.check_paths(x, torch.empty(shape[4], shape[1]), card[1], layout, report)
    assert len(report.checks) > 60
    assert not any(report.checks.values()), report.checks


def test_another_path_than_the_promised_one_is_found(emulated, library):
    library.encnet_emulation_set(*RTX_4090, 0)
    report = gpu_parts.Report()
    gpu_parts.check_paths(torch.empty(1, 512, 8, 8), torch.empty(64, 512), H200[1], "contiguous", report)
    assert ["runs: general" in (wrong or "") for wrong in report.checks.values()] == [True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", gpu_parts.LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 70, 9, 8, 70), (1, 530, 3, 3, 5), (9, 20, 2, 5, 70)], ids=str)
def test_the_general_path_equals_the_float64_twin(shape, layout, dtype, emulated, library):
    x, *rest = gpu_parts.inputs_of(shape, "cpu", dtype)
    inputs = (x.contiguous(memory_format=gpu_parts.LAYOUTS[layout]), *rest)
    assert described(inputs, library, FEW) == ["general", "general"]
    gpu_parts.assert_equals_the_twin(emulated(inputs), inputs)


@pytest.mark.parametrize(("channels", "codewords"), [(1024, 100), (1024, 2000), (8, 2000), (8, 200000)])
def test_the_general_paths_workspace_is_bounded(channels, codewords, library):
    library.encnet_emulation_set(*H200, 0)
    needed, x = ctypes.c_int64(), torch.empty(16, channels, 60, 60, device="meta")
    shape = sizes(x, torch.empty(codewords, channels, device="meta"), 1.0)
    partials, scratch = 16 * 4 * codewords * (channels + 1), 784 * codewords  # one for each image, and of one block
    for backward in (0, 1):
        given = ctypes.byref(shape), ctypes.byref(features(x, (channels * 3600, 3600, 1)))
        assert library.encnet_cuda_workspace(*given, 0, backward, ctypes.byref(needed)) == 0
        assert needed.value <= max(64 * 2**20, partials) + max(64 * 2**20, scratch)


def test_the_trained_shape_runs_on_tensor_cores_within_the_memory_promised(emulated, library):
    x, *rest = (torch.empty(16, 512, 3600, 1, dtype=torch.bfloat16), torch.empty(32, 512))
    library.encnet_emulation_set(*H200, 0)
    for backward in (False, True):
        words = dict(word.split("=") for word in cuda.describe(x, rest[0], backward).split()[1:])
        assert words["stages"] == "2" and words["cluster"] == "8" and words["parts"] == "1"
        assert int(words["partials"]) * 33 * 512 * 4 < 0.03 * x.nbytes


@pytest.mark.parametrize("name", gpu_parts.VIEWS)
def test_strided_x(name, emulated):
    small = gpu_parts.inputs_of((3, 6, 5, 14, 4), "cpu", torch.bfloat16)
    inputs = gpu_parts.like_shape(gpu_parts.VIEWS[name](small[0]), small)
    gpu_parts.assert_equals_the_twin(emulated(inputs), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [0.0, 3.0, -1e4])
def test_extreme_scales_and_features(scale, dtype, emulated):
    x, c, _, grad = gpu_parts.inputs_of((1, 64, 3, 11, 8), "cpu", dtype)
    inputs = (1e3 * x, 1e3 * c, scale * torch.linspace(0.5, 1, 8), grad)
    gpu_parts.assert_equals_the_twin(emulated(inputs), inputs)


def test_gradients_of_very_different_size_in_one_batch(emulated):
    x, c, s, grad = gpu_parts.inputs_of((6, 40, 5, 7, 8), "cpu", torch.bfloat16)
    inputs = x, c, s, grad * torch.tensor([1.0, 1e-12, 0, 1e12, 1, 3]).view(6, 1, 1)
    gpu_parts.assert_equals_the_twin(emulated(inputs), inputs)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_give_nan_where_they_reach(value, emulated, library):
    x, c, s, grad = gpu_parts.inputs_of((2, 40, 5, 9, 5), "cpu", torch.bfloat16)
    x[0, 3, 4, 5] = value
    library.encnet_emulation_set(*FEW, 0)
    encoded = cuda.encode(x, c, s, 1.0)
    grad_x, grad_codewords, grad_scale = cuda.encode_backward(grad, x, c, s, 1.0)
    assert encoded[0].isnan().all() and encoded[1].isfinite().all()
    assert grad_x[0, :, 4, 5].isnan().all() and grad_x.isnan().sum() == 40
    assert grad_codewords.isnan().all() and grad_scale.isnan().all()


def test_empty_batch_and_empty_pictures(emulated):
    for batch, height in ((0, 5), (2, 0)):
        inputs = gpu_parts.inputs_of((batch, 8, height, 7, 4), "cpu", torch.bfloat16)
        encoded, grad_x, grad_codewords, grad_scale = emulated(inputs)
        assert grad_x.shape == inputs[0].shape
        assert not any(result.any() for result in (encoded, grad_codewords, grad_scale))


@pytest.mark.parametrize("layout", gpu_parts.LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 24, 1, 33, 4), (1, 20, 2, 32, 4)], ids=str)
def test_nothing_before_or_after_x_is_read(shape, layout, emulated):
    """x ends where a page ends, and begins where one begins, beside pages that may not be read."""
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    x, *rest = gpu_parts.inputs_of(shape, "cpu", torch.bfloat16)
    x = x.contiguous(memory_format=gpu_parts.LAYOUTS[layout])
    page = mmap.PAGESIZE
    region = mmap.mmap(-1, 3 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(region))
    assert protect(start, page, 0) == 0 and protect(start + 2 * page, page, 0) == 0
    for offset in (page, 2 * page - x.nbytes):
        placed = torch.frombuffer(region, dtype=x.dtype, count=x.numel(), offset=offset)
        placed = placed.as_strided(x.shape, x.stride()).copy_(x)
        inputs = (placed, *rest)
        gpu_parts.assert_equals_the_twin(emulated(inputs), (x, *rest))  # type: ignore[arg-type]


@pytest.mark.skipif(build.shutil.which("g++") is None, reason="no g++")
def test_the_build_without_a_cuda_compiler_says_so(monkeypatch, capsys):
    monkeypatch.setenv("NVCC", "no-such-nvcc")
    monkeypatch.setattr(build, "build", lambda cxx: True)
    monkeypatch.setattr(build.sys, "argv", ["build.py", "--cuda", "--strict"])
    assert build.main() == 1
    assert "no CUDA compiler here (no-such-nvcc)" in capsys.readouterr().err
