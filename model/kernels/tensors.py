"""Tensors as encoding.h's C interface takes them: by pointer, strides and type."""

from ctypes import Structure, c_float, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

INTERFACE = 1  # ENCNET_INTERFACE of encoding.h
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # enum encnet_dtype

Strides = tuple[int, int, int]


class Sizes(Structure):
    """encnet_sizes of encoding.h."""

    _fields_ = (
        ("batch", c_int64),
        ("channels", c_int64),
        ("positions", c_int64),
        ("codewords", c_int64),
        ("factor", c_float),
    )


class Features(Structure):
    """encnet_features of encoding.h."""

    _fields_ = (
        ("data", c_void_p),
        ("batch_stride", c_int64),
        ("channel_stride", c_int64),
        ("position_stride", c_int64),
        ("dtype", c_int32),
    )


def check_interface(found: int, name: str) -> None:
    """Raises OSError for a library that was built from another encoding.h."""
    if found != INTERFACE:
        raise OSError(f"{name} has interface {found}, wanted {INTERFACE}")


def memory_format(x: Tensor) -> torch.memory_format:
    """The layout of x's gradient: x's own, where x is dense."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def strides_of(x: Tensor) -> Strides | None:
    """Strides (batch, channel, position) with which the kernels read x (B, D, H, W) in place; None where they cannot.

    One stride has to run over all positions, and positions or channels have to be next to each other.
    """
    _, _, height, width = x.shape
    batch, channel, row, column = x.stride()
    position = column if width > 1 else row if height > 1 else 1
    in_order = height == 1 or width == 1 or row == width * column
    return (batch, channel, position) if in_order and 1 in (position, channel) else None


def features(x: Tensor, strides: Strides) -> Features:
    return Features(x.data_ptr(), *strides, DTYPES[x.dtype])


def sizes(x: Tensor, codewords: Tensor, factor: float) -> Sizes:
    batch, channels, height, width = x.shape
    return Sizes(batch, channels, height * width, codewords.shape[0], factor)


def float32(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float32).contiguous()


def readable(x: Tensor) -> tuple[Tensor, Strides]:
    """x, or a contiguous copy of it where the kernels cannot read it in place, and its strides."""
    strides = strides_of(x)
    if strides is None:
        x = x.contiguous()
        strides = strides_of(x)
        assert strides is not None
    return x, strides


def with_gradient(x: Tensor) -> tuple[Tensor, Strides, Tensor, Strides]:
    """x and an empty gradient laid out in `memory_format(x)`, with their strides; x is copied where these disagree."""
    layout = memory_format(x)
    grad_x = torch.empty_like(x, memory_format=layout)
    grad_strides, strides = strides_of(grad_x), strides_of(x)
    assert grad_strides is not None
    if strides is None or (strides[2] == 1) != (grad_strides[2] == 1):
        x, strides = x.contiguous(memory_format=layout), grad_strides
    return x, strides, grad_x, grad_strides
