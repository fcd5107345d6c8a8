"""The Encoding layer: every position votes softly for codewords, the scene is the sum of its residuals.

Zhang et al., "Context Encoding for Semantic Segmentation" (CVPR 2018), equation 1. The code's `scale` is
minus the paper's smoothing factor s_k, so that the assignment logits are `scale_k * ||x_i - c_k||^2`.

`encode` is the operator `torch.ops.encnet.encode`: opaque to tracing (so that it is exported as one node), with a fake
implementation, autograd and float32 arithmetic under autocast. `encode_reference` is its readable twin: specification,
test oracle, and what computes wherever the compiled kernel (model/kernels) is missing or does not apply.
"""

import math

import torch
from torch import Tensor, nn

from model import kernels


def check_arguments(x: Tensor, codewords: Tensor, scale: Tensor) -> None:
    """Raise ValueError naming the argument and both shapes (devices), or TypeError for a dtype that is not floating."""
    for name, tensor in (("x", x), ("codewords", codewords), ("scale", scale)):
        _check_number(name, tensor, x)
    if x.dim() != 4:
        raise ValueError(f"encode: x must be (B, D, H, W), got {tuple(x.shape)}")
    if codewords.dim() != 2 or codewords.shape[1] != x.shape[1]:
        raise ValueError(
            f"encode: codewords must be (K, D) with D = {x.shape[1]} as in x {tuple(x.shape)}, "
            f"got {tuple(codewords.shape)}"
        )
    if scale.dim() != 1 or scale.shape[0] != codewords.shape[0]:
        raise ValueError(
            f"encode: scale must be (K,) with K = {codewords.shape[0]} as in codewords {tuple(codewords.shape)}, "
            f"got {tuple(scale.shape)}"
        )


def _check_number(name: str, tensor: Tensor, x: Tensor) -> None:
    if not tensor.is_floating_point():
        raise TypeError(f"encode: {name} must be floating point, got {tensor.dtype}")
    if tensor.device != x.device:
        raise ValueError(f"encode: {name} must be on {x.device} as x is, got {tensor.device}")


def check_backward_arguments(grad: Tensor, x: Tensor, codewords: Tensor, scale: Tensor) -> None:
    """`check_arguments`, and the same for the gradient of the result."""
    check_arguments(x, codewords, scale)
    _check_number("grad", grad, x)
    if grad.shape != (x.shape[0], *codewords.shape):
        raise ValueError(
            f"encode: grad must be (B, K, D) = {(x.shape[0], *codewords.shape)} for x {tuple(x.shape)} and codewords "
            f"{tuple(codewords.shape)}, got {tuple(grad.shape)}"
        )


def _positions(x: Tensor) -> Tensor:
    """(B, D, H, W) -> (B, N, D): a view for contiguous and for channels_last memory; float64 stays, else float32."""
    wide = x if x.dtype == torch.float64 else x.float()
    return wide.permute(0, 2, 3, 1).flatten(1, 2)


def _squared_distances(positions: Tensor, codewords: Tensor) -> Tensor:
    """(B, N, D), (K, D) -> (B, N, K). ||x||^2 is computed: it does not cancel in a softmax whose scales differ."""
    cross = positions @ codewords.t()
    return positions.square().sum(-1, keepdim=True) - 2 * cross + codewords.square().sum(-1)


def _factor(reference_positions: float, positions: int) -> float:
    return reference_positions / max(positions, 1) if reference_positions else 1.0


def assignments(x: Tensor, codewords: Tensor, scale: Tensor) -> Tensor:
    """(B, N, K): the share of each position i that goes to each codeword k, softmax_k(scale_k ||x_i - c_k||^2).

    Arguments are those of `encode_reference`; each row sums to 1.
    """
    positions = _positions(x)
    codewords, scale = codewords.to(positions.dtype), scale.to(positions.dtype)
    return torch.softmax(scale * _squared_distances(positions, codewords), dim=-1)


def encode_reference(x: Tensor, codewords: Tensor, scale: Tensor, reference_positions: float = 0.0) -> Tensor:
    """The specification in matmul form, differentiable by autograd.

    x: (B, D, H, W); codewords: (K, D); scale: (K,). Returns (B, K, D), float32 (float64 for float64 input):
    E_k = sum_i A_ik (x_i - c_k), A = softmax_k(scale_k ||x_i - c_k||^2), times reference_positions / N unless 0.
    """
    positions = _positions(x)
    codewords = codewords.to(positions.dtype)
    weights = assignments(x, codewords, scale)
    encoded = weights.transpose(1, 2) @ positions - weights.sum(1).unsqueeze(-1) * codewords
    return encoded * _factor(reference_positions, positions.shape[1])


def encode_backward_reference(
    grad: Tensor, x: Tensor, codewords: Tensor, scale: Tensor, reference_positions: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The twin of `encode_backward`: the derivatives of `encode_reference` in closed form, the weights computed anew.

    grad: (B, K, D), of the result. Returns the gradients of x (B, D, H, W), codewords (K, D) and scale (K,), float32
    (float64 for float64 x). With the weights A, the squared distances d, p_ik = grad_k . (x_i - c_k), and the gradient
    of the assignment logits l_ik = A_ik (p_ik - sum_j A_ij p_ij):
        x_i:      sum_k t_ik,  t_ik = A_ik grad_k + 2 scale_k l_ik (x_i - c_k)
        c_k:    - sum_i t_ik
        scale_k:  sum_i l_ik d_ik
    """
    positions = _positions(x)
    c, s = codewords.to(positions.dtype), scale.to(positions.dtype)
    g = grad.to(positions.dtype) * _factor(reference_positions, positions.shape[1])
    distances = _squared_distances(positions, c)
    weights = torch.softmax(s * distances, dim=-1)
    projection = positions @ g.transpose(1, 2) - (g * c).sum(-1).unsqueeze(1)
    grad_logits = weights * (projection - (weights * projection).sum(-1, keepdim=True))
    grad_scale = (grad_logits * distances).sum((0, 1))
    w = 2 * s * grad_logits
    grad_x = weights @ g + w.sum(-1, keepdim=True) * positions - w @ c
    grad_codewords = (
        w.sum((0, 1)).unsqueeze(-1) * c
        - (w.transpose(1, 2) @ positions).sum(0)
        - (weights.sum(1).unsqueeze(-1) * g).sum(0)
    )
    batch, channels, height, width = x.shape
    return grad_x.view(batch, height, width, channels).permute(0, 3, 1, 2), grad_codewords, grad_scale


def backend(device: str = "cpu") -> str:
    """What computes `encode` on "cpu" or "cuda" for tensors up to float32: "cpu kernel", "cuda kernel" or "twin"."""
    library = kernels.cuda.library() if torch.device(device).type == "cuda" else kernels.library()
    return "twin" if library is None else f"{torch.device(device).type} kernel"


@torch.library.custom_op("encnet::encode", mutates_args=())
def encode(x: Tensor, codewords: Tensor, scale: Tensor, reference_positions: float = 0.0) -> Tensor:
    """The operator; arguments, result and mathematics are those of `encode_reference`.

    Raises ValueError and TypeError as `check_arguments` does.
    """
    check_arguments(x, codewords, scale)
    if kernels.usable(x, codewords, scale):
        return kernels.encode(x, codewords, scale, _factor(reference_positions, x.shape[2] * x.shape[3]))
    with torch.autocast(x.device.type, enabled=False):
        return encode_reference(x, codewords, scale, reference_positions)


@encode.register_fake
def _(x: Tensor, codewords: Tensor, scale: Tensor, reference_positions: float = 0.0) -> Tensor:
    check_arguments(x, codewords, scale)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty((x.shape[0], codewords.shape[0], x.shape[1]), dtype=dtype)


@torch.library.custom_op("encnet::encode_backward", mutates_args=())
def encode_backward(
    grad: Tensor, x: Tensor, codewords: Tensor, scale: Tensor, reference_positions: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, codewords and scale, each of its argument's dtype, from that of the (B, K, D) result.

    Only the arguments of the forward pass are needed. An operator of its own, so that tracing sees one node. Raises
    ValueError and TypeError as `check_backward_arguments` does.
    """
    check_backward_arguments(grad, x, codewords, scale)
    if kernels.usable(x, codewords, scale):
        factor = _factor(reference_positions, x.shape[2] * x.shape[3])
        gradients = kernels.encode_backward(grad, x, codewords, scale, factor)
    else:
        with torch.autocast(x.device.type, enabled=False):
            gradients = encode_backward_reference(grad, x, codewords, scale, reference_positions)
    grad_x, grad_codewords, grad_scale = gradients
    return (
        grad_x.to(x.dtype).contiguous(memory_format=kernels.memory_format(x)),
        grad_codewords.to(codewords.dtype).contiguous(),
        grad_scale.to(scale.dtype).contiguous(),
    )


@encode_backward.register_fake
def _(
    grad: Tensor, x: Tensor, codewords: Tensor, scale: Tensor, reference_positions: float
) -> tuple[Tensor, Tensor, Tensor]:
    check_backward_arguments(grad, x, codewords, scale)
    return (
        torch.empty_like(x, memory_format=kernels.memory_format(x)),
        torch.empty_like(codewords, memory_format=torch.contiguous_format),
        torch.empty_like(scale, memory_format=torch.contiguous_format),
    )


def _save_all(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.reference_positions = inputs
    ctx.save_for_backward(*tensors)


def _second_backward(ctx, *grads):  # type: ignore[no-untyped-def]
    """Second derivatives, which training does not need, are those of the twin."""
    with torch.enable_grad():
        grad, x, codewords, scale = inputs = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
        gradients = encode_backward_reference(grad, x, codewords, scale, ctx.reference_positions)
    wanted = [grad.to(gradient.dtype) for grad, gradient in zip(grads, gradients, strict=True)]
    return *torch.autograd.grad(gradients, inputs, wanted), None


encode_backward.register_autograd(_second_backward, setup_context=_save_all)


def _save_inputs(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, codewords, scale, ctx.reference_positions = inputs
    ctx.save_for_backward(x, codewords, scale)


def _backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    return *encode_backward(grad, *ctx.saved_tensors, ctx.reference_positions), None


encode.register_autograd(_backward, setup_context=_save_inputs)


class Encoding(nn.Module):
    """A learned codebook and its smoothing factors; (B, D, H, W) -> (B, K, D), float32.

    reference_positions: see `encode_reference`.
    """

    def __init__(self, channels: int, codewords: int, reference_positions: float = 0.0) -> None:
        super().__init__()
        bound = 1 / math.sqrt(codewords * channels)
        self.codewords = nn.Parameter(torch.empty(codewords, channels).uniform_(-bound, bound))
        self.scale = nn.Parameter(torch.empty(codewords).uniform_(-1, 0))
        self.reference_positions = reference_positions

    def forward(self, x: Tensor) -> Tensor:
        return encode(x, self.codewords, self.scale, self.reference_positions)

    def extra_repr(self) -> str:
        codewords, channels = self.codewords.shape
        return f"channels={channels}, codewords={codewords}, reference_positions={self.reference_positions:g}"
