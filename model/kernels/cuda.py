"""The Encoding kernels on NVIDIA GPUs: load the library, hand it tensors by pointer, on PyTorch's current stream.

Workspace comes from PyTorch's allocator, so that a call can be captured into a CUDA graph.
"""

import ctypes
import functools
import logging
import os
from ctypes import POINTER, Structure, byref, c_char_p, c_int, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.kernels.tensors import (
    DTYPES,
    Features,
    Sizes,
    check_interface,
    features,
    float32,
    readable,
    sizes,
    with_gradient,
)

LIBRARY = Path(__file__).parents[2] / "build" / "kernels" / "libencnet_cuda.so"
CUDA_ERROR = 100  # ENCNET_CUDA_ERROR of encoding_cuda.h
LEAST_CAPABILITY = (8, 0)

_log = logging.getLogger(__name__)


class _Cuda(Structure):
    _fields_ = (("device", c_int32), ("stream", c_void_p), ("workspace", c_void_p))


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library, loaded once; None where it is switched off, missing, without a GPU, or (one logged line) broken."""
    if os.environ.get("ENCNET_KERNELS", "").lower() == "off" or not LIBRARY.exists() or not torch.cuda.is_available():
        return None
    try:
        return load(LIBRARY)
    except (OSError, AttributeError) as error:
        _log.warning("the Encoding kernel for CUDA does not load, its PyTorch twin is used (make kernels): %s", error)
        return None


def load(path: Path) -> ctypes.CDLL:
    """Raises OSError or AttributeError for what is not our library."""
    loaded = ctypes.CDLL(str(path))
    check_interface(loaded.encnet_cuda_interface(), path.name)
    pointers: list[Any] = [POINTER(Sizes), POINTER(Features)]
    array = c_void_p
    loaded.encnet_cuda_workspace.argtypes = [*pointers, c_int32, c_int32, POINTER(c_int64)]
    loaded.encnet_encode_cuda.argtypes = [*pointers, array, array, array, POINTER(_Cuda)]
    loaded.encnet_encode_backward_cuda.argtypes = [
        *pointers, array, array, array, POINTER(Features), array, array, POINTER(_Cuda)
    ]  # fmt: skip
    loaded.encnet_cuda_describe.argtypes = [*pointers, c_int32, c_int32]
    loaded.encnet_cuda_describe.restype = c_char_p
    loaded.encnet_cuda_error.argtypes, loaded.encnet_cuda_error.restype = [c_int], c_char_p
    return loaded


def usable(x: Tensor, codewords: Tensor, scale: Tensor) -> bool:
    """Whether the kernels take these: on one GPU that is `capable`, x float32, float16 or bfloat16, and parameters not
    wider than float32."""
    return (
        all(tensor.device == x.device and tensor.dtype in DTYPES for tensor in (x, codewords, scale))
        and codewords.numel() > 0
        and library() is not None
        and capable(x.device.index)
    )


@functools.cache
def capable(device: int) -> bool:
    """Whether the kernels run on this GPU; where they do not, one logged line says so."""
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        _log.warning(
            "the Encoding kernel for CUDA needs compute capability %d.%d, GPU %d has %d.%d; its PyTorch twin is used",
            *LEAST_CAPABILITY,
            device,
            *capability,
        )
    return capability >= LEAST_CAPABILITY


def queue(x: Tensor) -> tuple[int, int]:
    """The number of x's device and the address of the stream that PyTorch uses there now."""
    return x.device.index, torch.cuda.current_stream(x.device).cuda_stream


def _check(loaded: ctypes.CDLL, status: int) -> None:
    if status >= CUDA_ERROR:
        raise RuntimeError(f"encode: CUDA failed: {loaded.encnet_cuda_error(status).decode()}")
    if status:
        raise RuntimeError(f"encode: the kernel refused its arguments (encnet_status {status})")


def _workspace(loaded: ctypes.CDLL, shape: Sizes, x: Features, like: Tensor, device: int, backward: bool) -> Tensor:
    needed = c_int64()
    _check(loaded, loaded.encnet_cuda_workspace(byref(shape), byref(x), device, backward, byref(needed)))
    return like.new_empty(needed.value, dtype=torch.uint8)


def describe(x: Tensor, codewords: Tensor, backward: bool) -> str:
    """How the kernels would run these: path, tile, launch and partial sums; for logs and measurements."""
    loaded = library()
    assert loaded is not None
    x, strides = readable(x)
    given = byref(sizes(x, codewords, 1.0)), byref(features(x, strides))
    return loaded.encnet_cuda_describe(*given, queue(x)[0], backward).decode()


def encode(x: Tensor, codewords: Tensor, scale: Tensor, factor: float) -> Tensor:
    """x (B, D, H, W), codewords (K, D) and scale (K,), which are `usable` -> (B, K, D) float32.

    `factor` multiplies the result. Raises RuntimeError with CUDA's own words where a launch fails.
    """
    loaded = library()
    assert loaded is not None
    x, strides = readable(x)
    codewords, scale = float32(codewords), float32(scale)
    encoded = x.new_empty((x.shape[0], *codewords.shape), dtype=torch.float32)
    device, stream = queue(x)
    shape, given = sizes(x, codewords, factor), features(x, strides)
    workspace = _workspace(loaded, shape, given, x, device, backward=False)
    status = loaded.encnet_encode_cuda(
        byref(shape),
        byref(given),
        codewords.data_ptr(),
        scale.data_ptr(),
        encoded.data_ptr(),
        byref(_Cuda(device, stream, workspace.data_ptr())),
    )
    _check(loaded, status)
    return encoded


def encode_backward(
    grad: Tensor, x: Tensor, codewords: Tensor, scale: Tensor, factor: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (x's dtype, laid out in `memory_format(x)`), codewords and scale (both float32).

    grad (B, K, D) is that of `encode`'s result; the other arguments and the errors are `encode`'s.
    """
    loaded = library()
    assert loaded is not None
    x, strides, grad_x, grad_strides = with_gradient(x)
    grad, codewords, scale = float32(grad), float32(codewords), float32(scale)
    if x.shape[0] == 0:
        return grad_x, torch.zeros_like(codewords), torch.zeros_like(scale)
    grad_codewords, grad_scale = torch.empty_like(codewords), torch.empty_like(scale)
    device, stream = queue(x)
    shape, given = sizes(x, codewords, factor), features(x, strides)
    workspace = _workspace(loaded, shape, given, x, device, backward=True)
    status = loaded.encnet_encode_backward_cuda(
        byref(shape),
        byref(given),
        codewords.data_ptr(),
        scale.data_ptr(),
        grad.data_ptr(),
        byref(features(grad_x, grad_strides)),
        grad_codewords.data_ptr(),
        grad_scale.data_ptr(),
        byref(_Cuda(device, stream, workspace.data_ptr())),
    )
    _check(loaded, status)
    return grad_x, grad_codewords, grad_scale
