"""Training crops: mirror, scale, rotate and crop in one warp, then light and colour, for a batch and on any device.

What becomes of a picture is drawn on the host from one seed and the key (epoch, index). The crop is then the same in
any run, process and batch, and on any device: the arithmetic is elementwise or in whole numbers, so that neither the
composition of the batch nor the order of a sum decides a bit.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy
import torch
from numpy.random import Generator, SeedSequence, default_rng
from torch import Tensor

from model.losses import IGNORE

BRIGHTNESS, CONTRAST, COLOUR = range(3)
LUMA = (19595, 38470, 7471)  # of red, green and blue, in 65536ths (ITU-R 601)


@dataclass(frozen=True)
class Augmentation:
    """crop: side in pixels; base_size: long side in pixels at scale 1; scale: range, uniform;
    rotation: largest angle in degrees, either way; jitter: largest relative change of brightness, contrast, saturation;
    gamma: a picture's values in 0..1 are raised to a power from 2^-gamma to 2^gamma;
    white_balance: largest relative change of each channel by itself.
    """

    crop: int
    base_size: int
    scale: tuple[float, float] = (0.5, 2.0)
    mirror: bool = True
    rotation: float = 10.0
    jitter: float = 0.3
    gamma: float = 0.0
    white_balance: float = 0.0


class Draw(NamedTuple):
    """What was drawn for one crop.

    matrix: (6,) a, b, c, d, e, f, from a place (column, row) of the crop to one of the picture:
    (a column + b row + c, d column + e row + f), pixel centres at halves;
    order: BRIGHTNESS, CONTRAST and COLOUR in the order in which they change, () for no jitter; amounts: theirs;
    curves: (3, 256) uint8, what red, green and blue become, or None.
    """

    matrix: tuple[float, ...]
    order: tuple[int, ...]
    amounts: tuple[float, ...]
    curves: numpy.ndarray | None


def draw(height: int, width: int, options: Augmentation, random: Generator) -> Draw:
    """Decide a crop of a picture of that size in pixels."""
    zoom = options.base_size * random.uniform(*options.scale) / max(height, width)
    angle = math.radians(random.uniform(-options.rotation, options.rotation))
    mirrored = options.mirror and random.random() < 0.5
    slack_x, slack_y = max(width * zoom - options.crop, 0), max(height * zoom - options.crop, 0)
    left, top = random.uniform(0, slack_x), random.uniform(0, slack_y)

    # From crop to picture: shift, turn around the middle, zoom out, mirror.
    cos, sin = math.cos(angle) / zoom, math.sin(angle) / zoom
    shift_x, shift_y = left - width * zoom / 2, top - height * zoom / 2
    a, b, c = cos, sin, cos * shift_x + sin * shift_y + width / 2
    d, e, f = -sin, cos, -sin * shift_x + cos * shift_y + height / 2
    if mirrored:
        a, b, c = -a, -b, width - c
    order: list[int] = []
    amounts: list[float] = []
    if options.jitter:
        for kind in random.permutation(3):
            order.append(int(kind))
            amounts.append(random.uniform(1 - options.jitter, 1 + options.jitter))
    curves = None
    if options.gamma or options.white_balance:
        power = 2 ** random.uniform(-options.gamma, options.gamma)
        gains = random.uniform(1 - options.white_balance, 1 + options.white_balance, size=(3, 1))
        curves = 255 * gains * (numpy.arange(256) / 255) ** power
        curves = numpy.clip(curves, 0, 255).round().astype(numpy.uint8)
    return Draw((a, b, c, d, e, f), tuple(order), tuple(amounts), curves)


def draw_for(key: tuple[int, int], size: tuple[int, int], options: Augmentation, seed: int) -> Draw:
    """The crop that (epoch, index) stands for, of a picture of size (height, width)."""
    return draw(*size, options, default_rng(SeedSequence([seed, *key])))


class Draws(NamedTuple):
    """The draws of a batch as tensors; of the last three, none or all have rows.

    matrices: (B, 6) float32; amounts: (B, steps) float32; picks: (B, steps, 2) float32, 1 where that step's blend is
    with the mean grey of the crop or with the grey of each pixel; curves: (B, 3, 256) uint8, or (B, 0, 256).
    """

    matrices: Tensor
    amounts: Tensor
    picks: Tensor
    curves: Tensor


def stack(draws: Sequence[Draw]) -> Draws:
    """The draws of a batch, all made with one Augmentation, on the CPU."""
    order = torch.tensor([one.order for one in draws], dtype=torch.int64).view(len(draws), -1)
    curves = [one.curves for one in draws if one.curves is not None]
    return Draws(
        torch.tensor([one.matrix for one in draws], dtype=torch.float32),
        torch.tensor([one.amounts for one in draws], dtype=torch.float32).view(len(draws), -1),
        torch.stack([order == CONTRAST, order == COLOUR], -1).float(),
        torch.from_numpy(numpy.stack(curves)) if curves else torch.empty(len(draws), 0, 256, dtype=torch.uint8),
    )


def pack(image: numpy.ndarray, mask: numpy.ndarray) -> Tensor:
    """Picture (H, W, 3) uint8 and labels (H, W) uint8 -> (H * W,) int32: red, green, blue and label, a byte each."""
    return torch.from_numpy(numpy.dstack([image, mask])).view(-1, 4).view(torch.int32).flatten()


def bytes_of(packed: Tensor) -> Tensor:
    """(...,) int32 -> (..., 4) uint8: red, green, blue, label."""
    return packed.contiguous().view(torch.uint8).view(*packed.shape, 4)


def crops(packed: Tensor, places: Tensor, draws: Draws, crop: int, fill: Tensor) -> tuple[Tensor, Tensor]:
    """Crops (B, 3, crop, crop) and labels (B, crop, crop), uint8, of pictures that lie end to end in `packed`.

    packed: see `pack`, of any number of pictures; places: (B, 3) int64, where each crop's picture starts in it, its
    height and its width; fill: (3,) uint8. All on one device, on which the crops are made. What lies outside a picture
    becomes `fill` and is labelled 255, so that no loss sees it.
    """
    start, height, width = places[:, :, None, None].unbind(1)
    side = torch.arange(crop, device=packed.device, dtype=torch.float32) + 0.5
    a, b, c, d, e, f = draws.matrices[:, :, None, None].unbind(1)
    x = a * side + b * side[:, None] + c
    y = d * side + e * side[:, None] + f
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    height, width = height.int(), width.int()

    def within(place: Tensor, size: Tensor) -> Tensor:
        return place.int().clamp_min(0).minimum(size - 1)

    def at(row: Tensor, column: Tensor) -> Tensor:
        return bytes_of(packed[start + (row * width + column)])

    masks = at(within(y.floor(), height), within(x.floor(), width))[..., 3].masked_fill(~inside, IGNORE)
    left, top = (x - 0.5).floor(), (y - 0.5).floor()
    right_share, lower_share = (x - 0.5 - left)[:, None], (y - 0.5 - top)[:, None]
    columns = within(left, width), within(left + 1, width)

    def between(row: Tensor) -> Tensor:
        first, second = (planes(at(row, column)) for column in columns)
        return first + (second - first) * right_share

    upper, lower = between(within(top, height)), between(within(top + 1, height))
    pixels = (upper + (lower - upper) * lower_share).floor()
    pixels = torch.where(inside[:, None], pixels, fill.float()[:, None, None])
    return recolour(pixels, draws), masks


def planes(pixels: Tensor) -> Tensor:
    """(B, H, W, 4) uint8, red, green, blue, label -> (B, 3, H, W) float32."""
    return pixels.permute(0, 3, 1, 2)[:, :3].to(torch.float32, memory_format=torch.contiguous_format)


def recolour(pixels: Tensor, draws: Draws) -> Tensor:
    """Light and colour of whole numbers 0..255 as float (B, 3, H, W) -> uint8, each step rounded down to them.

    A step blends with black, with the mean grey of the crop, or with each pixel's grey. Whole numbers below 2^24 are
    exact in float32, so that grey and mean are as well.
    """
    amounts = draws.amounts[:, :, None, None, None]
    mean_picks, grey_picks = draws.picks[:, :, :, None, None, None].unbind(2)
    for step in range(amounts.shape[1]):
        red, green, blue = pixels.split(1, dim=1)
        grey = ((LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue + 32768) / 65536).floor()
        mean = (grey.sum((2, 3), keepdim=True, dtype=torch.float64) / grey[0].numel() + 0.5).floor().float()
        towards = mean_picks[:, step] * mean + grey_picks[:, step] * grey
        pixels = (towards + amounts[:, step] * (pixels - towards)).clamp(0, 255).floor()
    if not draws.curves.shape[1]:
        return pixels.to(torch.uint8)
    return draws.curves.gather(2, pixels.long().flatten(2)).view(pixels.shape)
