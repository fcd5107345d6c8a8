"""The authors' sliding-window protocol against a plain transcription of it."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.encnet import Outputs
from model.windows import AUTHORS_SCALES, predict_windows, window_spans

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLASSES = 3


class Network(nn.Module):
    """A small network whose answer depends on every pixel's place in the window; it counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_classes=CLASSES)
        self.weight = torch.randn(CLASSES, 3, 3, 3, generator=torch.Generator().manual_seed(0)) * 0.3
        self.windows: list[Tensor] = []

    def forward(self, x: Tensor) -> Outputs:
        self.windows.append(x)
        ramp = torch.linspace(-1, 2, x.shape[-1]) * torch.linspace(1, 2, x.shape[-2])[:, None]
        return Outputs(F.conv2d(x, self.weight, padding=1) + ramp, x.mean((2, 3)))


class Constant(nn.Module):
    """Says the same everywhere."""

    def __init__(self, logits: list[float]) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_classes=len(logits))
        self.logits = torch.tensor(logits)

    def forward(self, x: Tensor) -> Outputs:
        logits = self.logits.view(1, -1, 1, 1).expand(1, -1, *x.shape[-2:])
        return Outputs(logits, self.logits[None])


def picture(height: int, width: int) -> Tensor:
    return torch.randint(
        0, 256, (1, height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(height)
    )


def transcription(network: Network, image: Tensor, base: int, crop: int, scales, flip: bool) -> Tensor:
    """`MultiEvalModule` of PyTorch-Encoding, step by step and branch by branch, in float64."""
    mean, std = torch.tensor(MEAN).view(1, 3, 1, 1), torch.tensor(STD).view(1, 3, 1, 1)
    x = (image.permute(0, 3, 1, 2) / 255 - mean) / std
    h, w = x.shape[-2:]

    def fill(part: Tensor) -> Tensor:
        columns = []
        for channel in range(3):
            value = -MEAN[channel] / STD[channel]
            right, below = max(crop - part.shape[-1], 0), max(crop - part.shape[-2], 0)
            columns.append(F.pad(part[:, channel : channel + 1], (0, right, 0, below), value=value))
        return torch.cat(columns, 1)

    def infer(part: Tensor) -> Tensor:
        score = network(part).logits.double()
        if flip:
            score = score + network(part.flip(3)).logits.double().flip(3)
        return score.exp()

    total = torch.zeros(1, CLASSES, h, w, dtype=torch.float64)
    for scale in scales:
        long = math.ceil(base * scale)
        if h > w:
            height, width = long, int(1.0 * w * long / h + 0.5)
            short = width
        else:
            width, height = long, int(1.0 * h * long / w + 0.5)
            short = height
        current = F.interpolate(x, (height, width), mode="bilinear", align_corners=True)
        if long <= crop:
            outputs = infer(fill(current))[:, :, :height, :width]
        else:
            padded = fill(current) if short < crop else current
            ph, pw = padded.shape[2:]
            stride = int(crop * 2 / 3)
            outputs = torch.zeros(1, CLASSES, ph, pw, dtype=torch.float64)
            count = torch.zeros(1, 1, ph, pw, dtype=torch.float64)
            for i in range(math.ceil((ph - crop) / stride) + 1):
                for j in range(math.ceil((pw - crop) / stride) + 1):
                    h0, w0 = i * stride, j * stride
                    h1, w1 = min(h0 + crop, ph), min(w0 + crop, pw)
                    answer = infer(fill(padded[:, :, h0:h1, w0:w1]))
                    outputs[:, :, h0:h1, w0:w1] += answer[:, :, : h1 - h0, : w1 - w0]
                    count[:, :, h0:h1, w0:w1] += 1
            assert count.min() > 0
            outputs = (outputs / count)[:, :, :height, :width]
        total += F.interpolate(outputs, (h, w), mode="bilinear", align_corners=True)
    return total


def run(network: nn.Module, image: Tensor, **options):
    return predict_windows(network, image, mean=MEAN, std=STD, **options)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("height", "width"), [(36, 48), (48, 36), (40, 40), (9, 61)])
def test_exp_sum_is_the_authors_protocol(height, width, flip):
    image = picture(height, width)
    expected = transcription(Network(), image, 52, 48, AUTHORS_SCALES, flip)
    answer = run(Network(), image, base_size=52, crop=48, scales=AUTHORS_SCALES, flip=flip, merge="exp_sum")
    assert answer.scores.dtype == torch.float64
    torch.testing.assert_close(answer.scores, expected, rtol=1e-4, atol=1e-9)
    assert torch.equal(answer.scores.argmax(1), expected.argmax(1))


def test_a_camvid_picture_takes_36_forward_passes():
    network = Network()
    run(network, picture(360, 480), base_size=520, crop=480, scales=AUTHORS_SCALES, flip=True, merge="exp_sum")
    assert len(network.windows) == 36
    assert {tuple(window.shape) for window in network.windows} == {(1, 3, 480, 480)}


def test_the_last_window_is_shorter_and_padded_with_black():
    assert window_spans(48, 48) == [(0, 48)]
    assert window_spans(100, 48) == [(0, 48), (32, 80), (64, 100)]
    assert window_spans(100, 64) == [(0, 64), (42, 100)], "a step of two thirds, rounded down"
    network = Network()
    run(network, picture(48, 60), base_size=60, crop=48)
    assert len(network.windows) == 2
    black = -torch.tensor(MEAN) / torch.tensor(STD)
    outside = network.windows[1][0, :, :, 60 - 32 :]
    torch.testing.assert_close(outside, black.view(3, 1, 1).expand_as(outside))


@pytest.mark.parametrize("flip", [False, True])
def test_a_network_that_always_says_the_same(flip):
    logits = [2.0, -1.0, 0.5]
    options = {"base_size": 40, "crop": 24, "scales": (0.5, 1.0), "flip": flip}
    softmax = run(Constant(logits), picture(20, 33), **options)
    expected = torch.tensor(logits).softmax(0).view(1, 3, 1, 1).expand(1, 3, 20, 33)
    torch.testing.assert_close(softmax.scores, expected)
    torch.testing.assert_close(softmax.presence, torch.tensor(logits).sigmoid()[None])
    exp_sum = run(Constant(logits), picture(20, 33), merge="exp_sum", **options)
    views = 2 if flip else 1
    expected = 2 * (views * torch.tensor(logits).double()).exp().view(1, 3, 1, 1).expand(1, 3, 20, 33)
    torch.testing.assert_close(exp_sum.scores, expected)
    torch.testing.assert_close(exp_sum.presence, softmax.presence)


def test_summed_logits_beyond_float32_do_not_overflow():
    answer = run(Constant([60.0, 50.0]), picture(8, 8), base_size=8, crop=8, flip=True, merge="exp_sum")
    assert answer.scores.isfinite().all()
    assert (answer.scores.argmax(1) == 0).all()


def test_presence_is_the_mean_over_windows_and_mirrors():
    network = Network()
    answer = run(network, picture(30, 40), base_size=60, crop=32, scales=(0.5, 1.0), flip=True)
    expected = torch.stack([window.mean((2, 3)).sigmoid() for window in network.windows]).mean(0)
    torch.testing.assert_close(answer.presence, expected)


def test_no_scale_is_an_error():
    with pytest.raises(ValueError, match="at least one scale"):
        run(Network(), picture(8, 8), base_size=8, crop=8, scales=())
