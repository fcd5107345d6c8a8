"""Crops: decided by their key alone, geometry equal for picture and mask, padding ignored."""

import numpy
import pytest
import torch
from numpy.random import default_rng

from model.augment import Augmentation, StepSampler, TrainingCrops, augment

FILL = (1, 2, 3)


class Pair:
    """A data set of one picture whose red channel is its label."""

    def __len__(self):
        return 1

    def load(self, index):
        rows, columns = numpy.mgrid[0:60, 0:80]
        mask = ((rows // 12) * 7 + columns // 16).astype(numpy.uint8)
        return numpy.stack([mask, mask, mask], -1), mask


def crops(seed=0, **options):
    return TrainingCrops(Pair(), Augmentation(32, 80, **options), seed, FILL)


def test_the_same_key_gives_the_same_crop_and_others_do_not():
    first, again = crops()[(3, 0)], crops()[(3, 0)]
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], crops()[(4, 0)][0])
    assert not torch.equal(first[0], crops(seed=1)[(3, 0)][0])


def test_shapes_and_dtypes():
    image, mask = crops()[(0, 0)]
    assert image.shape == (3, 32, 32) and mask.shape == (32, 32)
    assert image.dtype == mask.dtype == torch.uint8


def test_picture_and_mask_are_warped_alike():
    for epoch in range(20):
        image, mask = crops(jitter=0.0)[(epoch, 0)]
        labelled = mask != 255
        difference = (image[0][labelled].int() - mask[labelled].int()).abs()
        assert (difference <= 1).float().mean() > 0.6, "only interpolated edges may differ"
        assert difference.float().median() == 0


def test_what_lies_outside_is_filled_and_ignored():
    image, mask = crops(scale=(0.3, 0.3), rotation=0.0, mirror=False, jitter=0.0)[(0, 0)]
    assert (mask[18:] == 255).all() and (mask[:, 24:] == 255).all() and (mask[:18, :24] != 255).all()
    assert image[:, 20, 28].tolist() == list(FILL)


def test_mirroring_mirrors():
    picture, mask = Pair().load(0)
    plain = Augmentation(80, 80, (1.0, 1.0), mirror=True, rotation=0.0, jitter=0.0)
    seen = {augment(picture, mask, plain, default_rng(seed), FILL)[1][:60].tobytes() for seed in range(20)}
    assert seen == {mask.tobytes(), mask[:, ::-1].tobytes()}


def test_a_sampler_resumes_in_the_middle_of_an_epoch():
    whole = list(StepSampler(10, 4, 3, seed=0))
    assert len(whole) == 6 and list(StepSampler(10, 4, 3, seed=0, first_step=3)) == whole[3:]
    assert {epoch for epoch, _ in whole[2] + whole[3]} == {1}
    assert whole[0] != [(0, index) for _, index in whole[2]], "every epoch has its own order"


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_share_every_batch(processes):
    shares = [list(StepSampler(10, 4, 2, seed=0, rank=rank, processes=processes)) for rank in range(processes)]
    joined = [[key for batch in batches for key in batch] for batches in zip(*shares, strict=True)]
    assert joined == list(StepSampler(10, 4, 2, seed=0))
