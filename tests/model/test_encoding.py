"""The Encoding op equals the formula of the paper, is differentiable, traceable, and safe under autocast."""

import contextlib

import pytest
import torch
from torch._subclasses import FakeTensorMode

from model.encoding import Encoding, encode, encode_backward, encode_backward_reference, encode_reference


def arguments(batch=2, channels=8, height=3, width=5, codewords=4, dtype=torch.float64):
    random = torch.Generator().manual_seed(0)
    x = torch.randn(batch, channels, height, width, generator=random, dtype=torch.float64)
    c = torch.randn(codewords, channels, generator=random, dtype=torch.float64)
    s = -torch.rand(codewords, generator=random, dtype=torch.float64)
    return [tensor.to(dtype).requires_grad_() for tensor in (x, c, s)]


def broadcast_form(x, codewords, scale):
    """Equation 1 as it is written: residuals to every codeword, softmax over codewords, sum over positions."""
    residuals = x.flatten(2).transpose(1, 2).unsqueeze(2) - codewords
    weights = torch.softmax(scale * residuals.square().sum(-1), dim=-1)
    return (weights.unsqueeze(-1) * residuals).sum(1)


@pytest.mark.parametrize("codewords", [1, 4, 33])
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (9, 7)])
def test_equals_the_broadcast_form(size, codewords):
    x, c, s = arguments(height=size[0], width=size[1], codewords=codewords)
    torch.testing.assert_close(encode(x, c, s), broadcast_form(x, c, s), rtol=1e-10, atol=1e-10)


def test_gradients_equal_those_of_the_broadcast_form():
    inputs = arguments()
    weight = torch.randn(2, 4, 8, dtype=torch.float64)
    ours = torch.autograd.grad((encode(*inputs) * weight).sum(), inputs)
    theirs = torch.autograd.grad((broadcast_form(*inputs) * weight).sum(), inputs)
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("reference_positions", [0.0, 6.0])
def test_gradcheck(reference_positions):
    assert torch.autograd.gradcheck(encode, (*arguments(), reference_positions))
    assert torch.autograd.gradcheck(encode_reference, (*arguments(), reference_positions))


def test_opcheck():
    x, c, s = arguments(dtype=torch.float32)
    torch.library.opcheck(torch.ops.encnet.encode.default, (x, c, s, 3.0))


def test_reference_positions_make_the_sum_independent_of_the_area():
    x, c, s = arguments()
    tiled = x.repeat(1, 1, 2, 2)
    torch.testing.assert_close(encode(tiled, c, s, 15.0), encode(x, c, s, 15.0))
    torch.testing.assert_close(encode(tiled, c, s), 4 * encode(x, c, s))
    torch.testing.assert_close(encode(x, c, s, 15.0), encode(x, c, s))


def test_channels_last_and_strided_memory_give_the_same():
    x, c, s = arguments()
    expected = encode(x, c, s)
    torch.testing.assert_close(encode(x.contiguous(memory_format=torch.channels_last), c, s), expected)
    wide = torch.randn(2, 8, 3, 10, dtype=torch.float64)
    torch.testing.assert_close(encode(wide[..., ::2], c, s), encode(wide[..., ::2].contiguous(), c, s))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input_is_computed_and_returned_in_float32(dtype):
    x, c, s = arguments(channels=64, height=20, width=20, dtype=torch.float32)
    half = x.detach().to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = encode(half, c, s)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, encode(half.float(), c, s), rtol=1e-5, atol=1e-4)
    result.sum().backward()
    assert half.grad.dtype == dtype


def test_extreme_scales_stay_finite():
    x, c, s = arguments(dtype=torch.float32)
    for scale in (s.detach() * 0, s.detach() * 1e4, -s.detach() * 1e4):
        assert torch.isfinite(encode(x.detach() * 1e3, c, scale)).all()


def test_empty_batch():
    x, c, s = arguments()
    none = x.detach()[:0].requires_grad_()
    encoded = encode(none, c, s)
    assert encoded.shape == (0, 4, 8)
    encoded.sum().backward()
    assert none.grad.shape == none.shape
    assert not c.grad.any() and not s.grad.any()


def test_compiles_without_a_graph_break_and_exports_as_one_node():
    layer = Encoding(8, 4, reference_positions=15.0)
    x = torch.randn(2, 8, 3, 5)
    program = torch.export.export(layer, (x,))
    assert [str(node.target) for node in program.graph.nodes].count("encnet.encode.default") == 1
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


def test_initialisation_is_the_authors():
    """Uniform: a mean and a deviation of (highest - lowest) / sqrt(12), within their bounds."""
    torch.manual_seed(0)
    layers = [Encoding(512, 32) for _ in range(64)]
    codewords, scales = (
        torch.stack([getattr(layer, name).detach() for layer in layers]) for name in ("codewords", "scale")
    )
    for values, lowest, highest in ((codewords, -(2.0**-7), 2.0**-7), (scales, -1.0, 0.0)):  # 32 x 512 is 2^14
        assert lowest <= float(values.min()) and float(values.max()) <= highest
        assert float(values.mean()) == pytest.approx((lowest + highest) / 2, abs=0.03 * (highest - lowest))
        assert float(values.std()) == pytest.approx((highest - lowest) / 12**0.5, rel=0.05)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda x, c, s: (x[0], c, s), ValueError, r"x must be \(B, D, H, W\), got \(8, 3, 5\)"),
        (lambda x, c, s: (x, c[:, :7], s), ValueError, r"codewords must be .* got \(4, 7\)"),
        (lambda x, c, s: (x, c, s[:3]), ValueError, r"scale must be \(K,\) with K = 4 .* got \(3,\)"),
        (lambda x, c, s: (x.long(), c, s), TypeError, "x must be floating point, got torch.int64"),
    ],
)
def test_wrong_arguments_are_named(change, error, words):
    with pytest.raises(error, match=words):
        encode(*change(*(tensor.detach() for tensor in arguments())))


WRONG_GRADIENTS = [
    (lambda g, x, c, s: (g[:1, :1, :1], x, c, s), ValueError, r"grad must be .* = \(2, 4, 8\) .* got \(1, 1, 1\)"),
    (lambda g, x, c, s: (g.transpose(1, 2), x, c, s), ValueError, r"grad must be .* got \(2, 8, 4\)"),
    (lambda g, x, c, s: (g.long(), x, c, s), TypeError, "grad must be floating point, got torch.int64"),
    (lambda g, x, c, s: (g.to("meta"), x, c, s), ValueError, "grad must be on cpu as x is, got meta"),
    (lambda g, x, c, s: (g, x, c.to("meta"), s), ValueError, "codewords must be on cpu as x is, got meta"),
    (lambda g, x, c, s: (g, x[0], c, s), ValueError, r"x must be \(B, D, H, W\), got \(8, 3, 5\)"),
    (lambda g, x, c, s: (g, x, c[:, :7], s), ValueError, r"codewords must be .* got \(4, 7\)"),
    (lambda g, x, c, s: (g, x, c, s[:3]), ValueError, r"scale must be \(K,\) with K = 4 .* got \(3,\)"),
]


@pytest.mark.parametrize(("change", "error", "words"), WRONG_GRADIENTS)
@pytest.mark.parametrize("mode", [contextlib.nullcontext, FakeTensorMode], ids=["run", "traced"])
def test_wrong_arguments_of_the_gradients_are_named(change, error, words, mode):
    with mode(), pytest.raises(error, match=words):
        encode_backward(*change(*(torch.ones(shape) for shape in ((2, 4, 8), (2, 8, 3, 5), (4, 8), (4,)))), 0.0)


@pytest.mark.parametrize(
    "given",
    [
        lambda grad: grad.half(),
        lambda grad: grad.bfloat16(),
        lambda grad: grad.transpose(0, 2).contiguous().transpose(0, 2),
        lambda grad: grad[:1, :1].expand(2, 4, 8),
    ],
    ids=["half", "bfloat16", "transposed", "expanded"],
)
def test_gradients_of_any_precision_and_strides(given):
    x, c, s = (tensor.detach() for tensor in arguments(dtype=torch.float32))
    grad = given(torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(1)))
    exact = encode_backward_reference(grad.double(), x.double(), c.double(), s.double(), 0.0)
    for mine, theirs in zip(encode_backward(grad, x, c, s, 0.0), exact, strict=True):
        torch.testing.assert_close(mine, theirs.float(), rtol=1e-4, atol=1e-4)
