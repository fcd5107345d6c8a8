"""The objective: what is counted, what is ignored, and that no batch makes it NaN."""

import pytest
import torch
from torch.nn import functional as F

from model.encnet import Outputs
from model.losses import encnet_loss, presence_targets


def batch():
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 5, 6, generator=random)
    mask = torch.randint(0, 4, (2, 5, 6), generator=random)
    mask[0, :2] = 255
    return logits, mask, torch.randn(2, 4, generator=random)


def test_presence_targets_by_hand():
    mask = torch.tensor([[[0, 0], [255, 3]], [[255, 255], [255, 255]]], dtype=torch.uint8)
    assert presence_targets(mask, 4).tolist() == [[1, 0, 0, 1], [0, 0, 0, 0]]


def test_total_is_the_weighted_sum_of_its_parts():
    logits, mask, presence = batch()
    losses = encnet_loss(Outputs(logits, presence, logits * 2, presence * 3), mask)
    assert losses.pixel == pytest.approx(float(F.cross_entropy(logits, mask, ignore_index=255)), rel=1e-5)
    assert losses.auxiliary == pytest.approx(float(F.cross_entropy(logits * 2, mask, ignore_index=255)), rel=1e-5)
    targets = presence_targets(mask, 4)
    expected = sum(F.binary_cross_entropy_with_logits(p, targets) for p in (presence, presence * 3))
    assert losses.presence == pytest.approx(float(expected), rel=1e-5)
    assert losses.total == pytest.approx(float(losses.pixel + 0.2 * losses.presence + 0.2 * losses.auxiliary), rel=1e-5)
    heavier = encnet_loss(Outputs(logits, presence, logits), mask, presence_weight=1, auxiliary_weight=0)
    assert heavier.total == pytest.approx(float(heavier.pixel + heavier.presence), rel=1e-5)


@pytest.mark.parametrize("weights", [None, torch.tensor([0.5, 1.0, 2.0, 3.0])])
def test_the_losses_of_all_parts_add_up_to_the_batchs(weights):
    logits, mask, presence = batch()
    outputs = Outputs(logits, presence, logits * 2, presence * 3)
    expected = encnet_loss(outputs, mask, class_weights=weights)
    parts = [
        encnet_loss(
            Outputs(*(field[i : i + 1] for field in outputs)), mask[i : i + 1], class_weights=weights, whole=mask
        )
        for i in range(2)
    ]
    for found, whole in zip(map(sum, zip(*parts, strict=True)), expected, strict=True):
        assert found == pytest.approx(float(whole), rel=1e-5)


def test_class_weights_are_those_of_cross_entropy():
    logits, mask, presence = batch()
    weights = torch.tensor([0.5, 1.0, 2.0, 3.0])
    losses = encnet_loss(Outputs(logits, presence), mask, class_weights=weights)
    assert losses.pixel == pytest.approx(float(F.cross_entropy(logits, mask, weights, ignore_index=255)), rel=1e-5)


def test_label_smoothing_is_that_of_cross_entropy():
    logits, mask, presence = batch()
    losses = encnet_loss(Outputs(logits, presence, 2 * logits), mask, label_smoothing=0.1)
    for found, scores in ((losses.pixel, logits), (losses.auxiliary, 2 * logits)):
        expected = F.cross_entropy(scores, mask, ignore_index=255, label_smoothing=0.1)
        assert found == pytest.approx(float(expected), rel=1e-5)


def test_a_smoothed_pixel_counts_the_weight_of_its_own_class():
    logits, mask, presence = batch()
    mask[mask == 3] = 0
    weights = torch.tensor([0.5, 1.0, 2.0, 1e6])
    losses = encnet_loss(Outputs(logits, presence), mask, class_weights=weights, label_smoothing=0.1)
    labelled = mask != 255
    own = weights[mask[labelled]]
    log_probabilities = logits.movedim(1, -1)[labelled].log_softmax(1)
    true = log_probabilities.gather(1, mask[labelled][:, None])[:, 0]
    expected = (own * -(0.9 * true + 0.1 * log_probabilities.mean(1))).sum() / own.sum()
    assert losses.pixel == pytest.approx(float(expected), rel=1e-5), "class 3, which no pixel has, does not count"


def test_ignored_pixels_have_no_gradient():
    logits, mask, presence = batch()
    logits.requires_grad_()
    encnet_loss(Outputs(logits, presence), mask).total.backward()
    assert (logits.grad[0, :, :2] == 0).all() and (logits.grad[0, :, 2:] != 0).all()


def test_a_batch_without_labels_costs_zero_for_its_pixels():
    logits, mask, presence = batch()
    losses = encnet_loss(Outputs(logits, presence), torch.full_like(mask, 255))
    assert losses.pixel == 0 and torch.isfinite(losses.total)


def test_presence_loss_survives_extreme_half_precision_logits():
    logits, mask, presence = batch()
    losses = encnet_loss(Outputs(logits.bfloat16(), (presence * 1e4).bfloat16()), mask)
    assert losses.total.dtype == torch.float32 and torch.isfinite(losses.total)


def test_losses_of_half_precision_logits_are_computed_in_single():
    logits, mask, presence = batch()
    halves = Outputs(logits.bfloat16(), presence.bfloat16(), logits.bfloat16(), presence.bfloat16())
    found = encnet_loss(halves, mask)
    expected = encnet_loss(Outputs(*(half.float() for half in halves)), mask)
    assert all(loss.dtype == torch.float32 for loss in found) and found == expected
