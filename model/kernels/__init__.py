"""The compiled kernels for PyTorch: find the library, hand it tensors by pointer. Here those for CPUs, and the choice
between them and cuda.py's for NVIDIA GPUs.

`make kernels` builds the libraries; where one is missing or does not load, `usable` answers False and the caller keeps
to the twin. ENCNET_KERNELS=off in the environment has the same effect.
"""

import ctypes
import functools
import logging
import os
from ctypes import POINTER, byref, c_char_p, c_int, c_int32, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.kernels import cuda
from model.kernels.tensors import (
    DTYPES,
    Features,
    Sizes,
    check_interface,
    features,
    float32,
    memory_format,
    readable,
    sizes,
    with_gradient,
)

__all__ = ["choose_instructions", "encode", "encode_backward", "instructions", "library", "memory_format", "usable"]

LIBRARY = Path(__file__).parents[2] / "build" / "kernels" / "libencnet_torch.so"

_NO_MEMORY = 4  # of enum encnet_status; the others cannot arise from tensors that `usable` lets through
_log = logging.getLogger(__name__)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library, loaded once; None where it is switched off, missing, or (one logged line) broken."""
    if os.environ.get("ENCNET_KERNELS", "").lower() == "off" or not LIBRARY.exists():
        return None
    try:
        loaded = ctypes.CDLL(str(LIBRARY))
        check_interface(loaded.encnet_interface(), LIBRARY.name)
        array = c_void_p
        inputs: list[Any] = [POINTER(Sizes), POINTER(Features), array, array]
        loaded.encnet_torch_encode.argtypes = [*inputs, array, c_int32]
        loaded.encnet_torch_encode_backward.argtypes = [*inputs, array, POINTER(Features), array, array, c_int32]
        loaded.encnet_cpu_instructions.restype = c_char_p
        loaded.encnet_cpu_choose.argtypes, loaded.encnet_cpu_choose.restype = [c_char_p], c_int
    except (OSError, AttributeError) as error:
        _log.warning("the Encoding kernel does not load, its PyTorch twin is used (make kernels): %s", error)
        return None
    return loaded


def instructions() -> str | None:
    """The instruction set that the CPU kernel uses: avx512, avx2 or baseline; None without a library."""
    loaded = library()
    return loaded.encnet_cpu_instructions().decode() if loaded else None


def choose_instructions(name: str) -> bool:
    """Use this instruction set from now on, for tests and measurements; False where it is not to be had."""
    loaded = library()
    return loaded is not None and loaded.encnet_cpu_choose(name.encode()) == 0


def usable(x: Tensor, codewords: Tensor, scale: Tensor) -> bool:
    """Whether a kernel takes these: all on the CPU or on one GPU, none wider than float32."""
    if x.is_cuda:
        return cuda.usable(x, codewords, scale)
    return (
        all(tensor.device.type == "cpu" and tensor.dtype in DTYPES for tensor in (x, codewords, scale))
        and codewords.numel() > 0
        and library() is not None
    )


def _check(status: int) -> None:
    if status == _NO_MEMORY:
        raise MemoryError("encode: no memory for the kernel's scratch")
    if status:
        raise RuntimeError(f"encode: the kernel refused its arguments (encnet_status {status})")


def encode(x: Tensor, codewords: Tensor, scale: Tensor, factor: float) -> Tensor:
    """x (B, D, H, W), codewords (K, D) and scale (K,), which are `usable` -> (B, K, D) float32.

    `factor` multiplies the result. Raises MemoryError where there is none for a few hundred KB of scratch a thread;
    on a GPU see `cuda.encode`.
    """
    if x.is_cuda:
        return cuda.encode(x, codewords, scale, factor)
    loaded = library()
    assert loaded is not None
    x, strides = readable(x)
    codewords, scale = float32(codewords), float32(scale)
    encoded = x.new_empty((x.shape[0], *codewords.shape), dtype=torch.float32)
    status = loaded.encnet_torch_encode(
        byref(sizes(x, codewords, factor)),
        byref(features(x, strides)),
        codewords.data_ptr(),
        scale.data_ptr(),
        encoded.data_ptr(),
        torch.get_num_threads(),
    )
    _check(status)
    return encoded


def encode_backward(
    grad: Tensor, x: Tensor, codewords: Tensor, scale: Tensor, factor: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (x's dtype, laid out in `memory_format(x)`), codewords and scale (both float32).

    grad (B, K, D) is that of `encode`'s result; the other arguments and the errors are `encode`'s.
    """
    if x.is_cuda:
        return cuda.encode_backward(grad, x, codewords, scale, factor)
    loaded = library()
    assert loaded is not None
    x, strides, grad_x, grad_strides = with_gradient(x)
    grad, codewords, scale = float32(grad), float32(codewords), float32(scale)
    grad_codewords, grad_scale = torch.empty_like(codewords), torch.empty_like(scale)
    status = loaded.encnet_torch_encode_backward(
        byref(sizes(x, codewords, factor)),
        byref(features(x, strides)),
        codewords.data_ptr(),
        scale.data_ptr(),
        grad.data_ptr(),
        byref(features(grad_x, grad_strides)),
        grad_codewords.data_ptr(),
        grad_scale.data_ptr(),
        torch.get_num_threads(),
    )
    _check(status)
    return grad_x, grad_codewords, grad_scale
