"""Crops: decided by their key alone, equal to Pillow's, geometry equal for picture and mask, padding ignored."""

import numpy
import pytest
import torch
from numpy.random import default_rng

from model.augment import Augmentation, Draw, crops, draw, draw_for, pack, stack
from model.pictures import places_of
from tests.model.pillow_crops import crop_of

FILL = (1, 2, 3)
AS_IT_IS = {"scale": (1.0, 1.0), "mirror": False, "rotation": 0.0, "jitter": 0.0}


def squares():
    """A picture whose channels are its labels."""
    rows, columns = numpy.mgrid[0:60, 0:80]
    mask = ((rows // 12) * 7 + columns // 16).astype(numpy.uint8)
    return numpy.stack([mask, mask, mask], -1), mask


def photograph(height, width, seed=0):
    """Smooth colours with edges, and a label to every corner."""
    random = default_rng(seed)
    coarse = random.integers(0, 256, (2 + height // 9, 2 + width // 9, 3))
    image = coarse.repeat(9, 0).repeat(9, 1)[:height, :width] + random.integers(-9, 10, (height, width, 3))
    rows, columns = numpy.mgrid[0:height, 0:width]
    return image.clip(0, 255).astype(numpy.uint8), ((rows > height / 2) * 2 + (columns > width / 2)).astype(numpy.uint8)


def cut(samples, draws: list[Draw], crop):
    """The crops of these pictures as numpy arrays (B, crop, crop, 3) and (B, crop, crop)."""
    packed = torch.cat([pack(*sample) for sample in samples])
    places = places_of([mask.shape for _, mask in samples])
    images, masks = crops(packed, places, stack(draws), crop, torch.tensor(FILL, dtype=torch.uint8))
    assert images.dtype == masks.dtype == torch.uint8
    assert images.shape == (len(samples), 3, crop, crop) and masks.shape == (len(samples), crop, crop)
    return images.permute(0, 2, 3, 1).numpy(), masks.numpy()


def drawn(key, size, seed=0, **options):
    return draw_for(key, size, Augmentation(32, 80, **options), seed)


def test_the_same_key_draws_the_same_and_others_do_not():
    size = (60, 80)
    assert drawn((3, 0), size) == drawn((3, 0), size)
    assert (
        len({drawn(key, size, seed).matrix for key, seed in (((3, 0), 0), ((4, 0), 0), ((3, 1), 0), ((3, 0), 1))}) == 4
    )


@pytest.mark.parametrize("size", [(60, 80), (90, 61)])
@pytest.mark.parametrize(
    "options",
    [
        {"jitter": 0.0},
        {"jitter": 0.4},
        {"jitter": 0.0, "gamma": 0.5, "white_balance": 0.2},
        {"jitter": 0.3, "gamma": 0.3, "white_balance": 0.1},
    ],
)
def test_crops_are_pillows(size, options):
    off, labels_off = [], []
    for index in range(8):
        sample, chosen = photograph(*size, seed=index), drawn((0, index), size, **options)
        (image,), (mask,) = cut([sample], [chosen], 32)
        expected, expected_mask = crop_of(*sample, chosen, 32, FILL)
        off.append(numpy.abs(image.astype(int) - expected.astype(int)))
        labels_off.append(mask != expected_mask)
    assert (numpy.stack(off) <= 2).mean() > 0.999, "places that rounding moves across an edge aside"
    assert numpy.stack(off).mean() < 0.05
    assert numpy.stack(labels_off).mean() < 0.001


def test_a_crop_does_not_depend_on_its_batch():
    sizes = [(60, 80), (90, 61), (33, 120), (60, 80)]
    samples = [photograph(*size, seed=index) for index, size in enumerate(sizes)]
    draws = [drawn((5, index), size, gamma=0.3) for index, size in enumerate(sizes)]
    images, masks = cut(samples, draws, 32)
    for index in range(4):
        (image,), (mask,) = cut(samples[index : index + 1], draws[index : index + 1], 32)
        assert (image == images[index]).all() and (mask == masks[index]).all()


def test_picture_and_mask_are_warped_alike():
    sample = squares()
    for epoch in range(20):
        (image,), (mask,) = cut([sample], [drawn((epoch, 0), (60, 80), jitter=0.0)], 32)
        labelled = mask != 255
        difference = numpy.abs(image[..., 0][labelled].astype(int) - mask[labelled])
        assert (difference <= 1).mean() > 0.6, "only interpolated edges may differ"
        assert numpy.median(difference) == 0


def test_what_lies_outside_is_filled_and_ignored():
    chosen = drawn((0, 0), (60, 80), **AS_IT_IS | {"scale": (0.3, 0.3)})
    (image,), (mask,) = cut([squares()], [chosen], 32)
    assert (mask[18:] == 255).all() and (mask[:, 24:] == 255).all() and (mask[:18, :24] != 255).all()
    assert image[20, 28].tolist() == list(FILL)


def test_mirroring_mirrors():
    picture, mask = squares()
    options = Augmentation(80, 80, **AS_IT_IS | {"mirror": True})
    draws = [draw(60, 80, options, default_rng(seed)) for seed in range(20)]
    assert {cut([(picture, mask)], [one], 80)[1][0, :60].tobytes() for one in draws} == {
        mask.tobytes(),
        mask[:, ::-1].tobytes(),
    }


def test_draws_cover_their_ranges():
    options = Augmentation(32, 80, scale=(0.5, 2.0), rotation=10.0, jitter=0.3)
    draws = [draw_for((epoch, 0), (60, 80), options, 0) for epoch in range(400)]
    zooms = numpy.array([1 / numpy.hypot(one.matrix[0], one.matrix[3]) for one in draws])
    assert 0.5 <= zooms.min() < 0.55 and 1.95 < zooms.max() <= 2 and abs(zooms.mean() - 1.25) < 0.08
    angles = numpy.degrees([numpy.arctan2(one.matrix[1], one.matrix[4]) for one in draws])
    assert -10 <= angles.min() < -9.5 and 9.5 < angles.max() <= 10
    assert 0.4 < numpy.mean([one.matrix[0] < 0 for one in draws]) < 0.6, "mirrored"
    assert len({one.order for one in draws}) == 6
    amounts = numpy.array([one.amounts for one in draws])
    assert 0.7 <= amounts.min() < 0.71 and 1.29 < amounts.max() <= 1.3


def test_curves_cover_their_ranges():
    gamma = Augmentation(32, 80, gamma=1.0)
    middles = numpy.array([draw_for((epoch, 0), (60, 80), gamma, 0).curves[:, 128] for epoch in range(400)])
    assert 64 <= middles.min() < 66 and 178 < middles.max() <= 181, "powers from 2 to 1/2"
    assert (middles == middles[:, :1]).all(), "one for the three channels"
    balance = Augmentation(32, 80, white_balance=0.2)
    hundreds = numpy.array([draw_for((epoch, 0), (60, 80), balance, 0).curves[:, 100] for epoch in range(400)])
    assert (hundreds.min(0) == 80).all() and (hundreds.max(0) == 120).all()
    assert (hundreds[:, 0] != hundreds[:, 1]).mean() > 0.9, "each channel by itself"
