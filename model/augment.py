"""Training crops: mirror, scale, rotate and crop in one warp, then light and colour; all of it decided by one seed."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy
import torch
from numpy.random import Generator, SeedSequence, default_rng
from PIL import Image, ImageEnhance
from torch.utils.data import Dataset, Sampler

from model.data import SegmentationData
from model.losses import IGNORE


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


def augment(
    image: numpy.ndarray, mask: numpy.ndarray, options: Augmentation, random: Generator, fill: tuple[int, int, int]
) -> tuple[numpy.ndarray, numpy.ndarray]:
    """A crop of picture (H, W, 3) uint8 and mask (H, W) uint8 -> (crop, crop, 3), (crop, crop).

    What lies outside the picture becomes `fill` and is labelled 255, so that no loss sees it.
    """
    height, width = mask.shape
    zoom = options.base_size * random.uniform(*options.scale) / max(height, width)
    angle = math.radians(random.uniform(-options.rotation, options.rotation))
    mirrored = options.mirror and random.random() < 0.5
    slack_x, slack_y = max(width * zoom - options.crop, 0), max(height * zoom - options.crop, 0)
    left, top = random.uniform(0, slack_x), random.uniform(0, slack_y)

    # PIL asks for the map from crop to picture coordinates: shift, turn around the middle, zoom out, mirror.
    centre_x, centre_y = width * zoom / 2, height * zoom / 2
    cos, sin = math.cos(angle) / zoom, math.sin(angle) / zoom
    shift_x, shift_y = left - centre_x, top - centre_y
    a, b, c = cos, sin, cos * shift_x + sin * shift_y + width / 2
    d, e, f = -sin, cos, -sin * shift_x + cos * shift_y + height / 2
    if mirrored:
        a, b, c = -a, -b, width - c
    size, matrix = (options.crop, options.crop), (a, b, c, d, e, f)
    picture = Image.fromarray(image).transform(
        size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=fill
    )
    label = Image.fromarray(mask).transform(
        size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST, fillcolor=IGNORE
    )
    if options.jitter:
        enhancers = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color]
        for position in random.permutation(len(enhancers)):
            amount = random.uniform(1 - options.jitter, 1 + options.jitter)
            picture = enhancers[position](picture).enhance(amount)
    if options.gamma or options.white_balance:
        power = 2 ** random.uniform(-options.gamma, options.gamma)
        gains = random.uniform(1 - options.white_balance, 1 + options.white_balance, size=(3, 1))
        curves = 255 * gains * (numpy.arange(256) / 255) ** power
        picture = picture.point(numpy.clip(curves, 0, 255).round().astype(int).ravel().tolist())
    return numpy.asarray(picture), numpy.asarray(label)


class TrainingCrops(Dataset):
    """Crops by (epoch, index): the same key gives the same crop in any run, process and order.

    Pictures are decoded once and kept in memory. Items: uint8 (3, crop, crop) and uint8 (crop, crop).
    """

    def __init__(self, data: SegmentationData, options: Augmentation, seed: int, fill: tuple[int, int, int]) -> None:
        self.samples = [data.load(index) for index in range(len(data))]
        self.options, self.seed, self.fill = options, seed, fill

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        epoch, index = key
        random = default_rng(SeedSequence([self.seed, epoch, index]))
        image, mask = augment(*self.samples[index], self.options, random, self.fill)
        return torch.from_numpy(image.copy()).permute(2, 0, 1), torch.from_numpy(mask.copy())


class StepSampler(Sampler):
    """Batches of (epoch, index) keys from `first_step` to the last; each process takes its share of every batch.

    Every epoch is a fresh seeded permutation; an epoch's incomplete last batch is dropped.
    """

    def __init__(
        self, size: int, batch: int, epochs: int, seed: int, first_step: int = 0, rank: int = 0, processes: int = 1
    ) -> None:
        self.size, self.batch, self.epochs, self.seed = size, batch, epochs, seed
        self.first_step, self.rank, self.processes = first_step, rank, processes
        self.steps_per_epoch = size // batch

    def __len__(self) -> int:
        return self.steps_per_epoch * self.epochs - self.first_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        share = self.batch // self.processes
        first_epoch, skip = divmod(self.first_step, self.steps_per_epoch)
        for epoch in range(first_epoch, self.epochs):
            order = default_rng(SeedSequence([self.seed, epoch])).permutation(self.size)
            for step in range(skip, self.steps_per_epoch):
                start = step * self.batch + self.rank * share
                yield [(epoch, int(index)) for index in order[start : start + share]]
            skip = 0
