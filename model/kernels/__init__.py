"""The compiled kernels for PyTorch: find the library, hand it tensors by pointer.

`make kernels` builds the library; where it is missing or does not load, `usable` answers False and the caller keeps to
the twin. ENCNET_KERNELS=off in the environment has the same effect.
"""

import ctypes
import functools
import logging
import os
from ctypes import POINTER, Structure, byref, c_char_p, c_float, c_int, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LIBRARY = Path(__file__).parents[2] / "build" / "kernels" / "libencnet_torch.so"
INTERFACE = 1  # ENCNET_INTERFACE of encoding.h

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # enum encnet_dtype
_NO_MEMORY = 4  # of enum encnet_status; the others cannot arise from tensors that `usable` lets through
_log = logging.getLogger(__name__)


class _Sizes(Structure):
    _fields_ = (
        ("batch", c_int64),
        ("channels", c_int64),
        ("positions", c_int64),
        ("codewords", c_int64),
        ("factor", c_float),
    )


class _Features(Structure):
    _fields_ = (
        ("data", c_void_p),
        ("batch_stride", c_int64),
        ("channel_stride", c_int64),
        ("position_stride", c_int64),
        ("dtype", c_int32),
    )


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library, loaded once; None where it is switched off, missing, or (one logged line) broken."""
    if os.environ.get("ENCNET_KERNELS", "").lower() == "off" or not LIBRARY.exists():
        return None
    try:
        loaded = ctypes.CDLL(str(LIBRARY))
        if loaded.encnet_interface() != INTERFACE:
            raise OSError(f"{LIBRARY.name} has interface {loaded.encnet_interface()}, wanted {INTERFACE}")
        sizes, features = POINTER(_Sizes), POINTER(_Features)
        array = c_void_p
        inputs: list[Any] = [sizes, features, array, array]
        loaded.encnet_torch_encode.argtypes = [*inputs, array, c_int32]
        loaded.encnet_torch_encode_backward.argtypes = [*inputs, array, features, array, array, c_int32]
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
    """Whether the kernel takes these: on the CPU, x float32, float16 or bfloat16, parameters not wider than float32."""
    return (
        all(tensor.device.type == "cpu" and tensor.dtype in _DTYPES for tensor in (x, codewords, scale))
        and codewords.numel() > 0
        and library() is not None
    )


def memory_format(x: Tensor) -> torch.memory_format:
    """The layout of x's gradient: x's own, where x is dense."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def _strides(x: Tensor) -> tuple[int, int, int] | None:
    """Strides (batch, channel, position) with which the kernel reads x (B, D, H, W) in place; None where it cannot.

    One stride has to run over all positions, and positions or channels have to be next to each other.
    """
    _, _, height, width = x.shape
    batch, channel, row, column = x.stride()
    position = column if width > 1 else row if height > 1 else 1
    in_order = height == 1 or width == 1 or row == width * column
    return (batch, channel, position) if in_order and 1 in (position, channel) else None


def _features(x: Tensor, strides: tuple[int, int, int]) -> _Features:
    return _Features(x.data_ptr(), *strides, _DTYPES[x.dtype])


def _sizes(x: Tensor, codewords: Tensor, factor: float) -> _Sizes:
    batch, channels, height, width = x.shape
    return _Sizes(batch, channels, height * width, codewords.shape[0], factor)


def _float32(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float32).contiguous()


def _check(status: int) -> None:
    if status == _NO_MEMORY:
        raise MemoryError("encode: no memory for the kernel's scratch")
    if status:
        raise RuntimeError(f"encode: the kernel refused its arguments (encnet_status {status})")


def encode(x: Tensor, codewords: Tensor, scale: Tensor, factor: float) -> Tensor:
    """x (B, D, H, W), codewords (K, D) and scale (K,), which are `usable` -> (B, K, D) float32.

    `factor` multiplies the result. Raises MemoryError where there is none for a few hundred KB of scratch a thread.
    """
    loaded = library()
    assert loaded is not None
    strides = _strides(x)
    if strides is None:
        x = x.contiguous()
        strides = _strides(x)
        assert strides is not None
    codewords, scale = _float32(codewords), _float32(scale)
    encoded = x.new_empty((x.shape[0], *codewords.shape), dtype=torch.float32)
    status = loaded.encnet_torch_encode(
        byref(_sizes(x, codewords, factor)),
        byref(_features(x, strides)),
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
    loaded = library()
    assert loaded is not None
    layout = memory_format(x)
    grad_x = torch.empty_like(x, memory_format=layout)
    grad_strides, strides = _strides(grad_x), _strides(x)
    assert grad_strides is not None
    if strides is None or (strides[2] == 1) != (grad_strides[2] == 1):
        x, strides = x.contiguous(memory_format=layout), grad_strides
    grad, codewords, scale = _float32(grad), _float32(codewords), _float32(scale)
    grad_codewords, grad_scale = torch.empty_like(codewords), torch.empty_like(scale)
    status = loaded.encnet_torch_encode_backward(
        byref(_sizes(x, codewords, factor)),
        byref(_features(x, strides)),
        codewords.data_ptr(),
        scale.data_ptr(),
        grad.data_ptr(),
        byref(_features(grad_x, grad_strides)),
        grad_codewords.data_ptr(),
        grad_scale.data_ptr(),
        torch.get_num_threads(),
    )
    _check(status)
    return grad_x, grad_codewords, grad_scale
