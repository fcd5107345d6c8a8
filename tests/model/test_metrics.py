"""Metrics against values worked by hand, and against scikit-learn's definition of average precision."""

import numpy
import pytest
import torch

from model.metrics import (
    average_precision,
    class_accuracy,
    confusion,
    expected_calibration_error,
    f1,
    intersection_over_union,
    mean_defined,
    mean_iou,
    mean_iou_authors,
    negative_log_likelihood,
    pixel_accuracy,
    reliability,
)

# truth: 0 0 1 1 255, prediction: 0 1 1 1 0; class 2 occurs nowhere
COUNTS = numpy.array([[1, 1, 0], [0, 2, 0], [0, 0, 0]])


def test_confusion_leaves_ignored_pixels_out():
    mask, truth = torch.tensor([[0, 1, 1, 1, 0]]), torch.tensor([[0, 0, 1, 1, 255]], dtype=torch.uint8)
    counts = confusion(mask, truth, 3)
    assert counts.dtype == numpy.int64
    assert (counts == COUNTS).all()
    assert confusion(mask, torch.full_like(mask, 255), 3).sum() == 0


def test_rates_of_a_small_example():
    numpy.testing.assert_allclose(intersection_over_union(COUNTS), [1 / 2, 2 / 3, numpy.nan])
    numpy.testing.assert_allclose(class_accuracy(COUNTS), [1 / 2, 1, numpy.nan])
    assert pixel_accuracy(COUNTS) == 3 / 4
    assert pixel_accuracy(numpy.diag([1, 0])) == 1
    assert mean_iou(COUNTS) == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert mean_iou_authors(COUNTS) == pytest.approx((1 / 2 + 2 / 3) / 3)


def test_a_class_only_predicted_counts_zero_in_both_means():
    counts = numpy.array([[3, 1], [0, 0]])
    assert mean_iou(counts) == mean_iou_authors(counts) == pytest.approx(3 / 8)


def test_no_labelled_pixel_at_all():
    nothing = numpy.zeros((2, 2), dtype=int)
    assert (mean_iou(nothing), mean_iou_authors(nothing), pixel_accuracy(nothing)) == (0, 0, 0)
    assert mean_defined(numpy.array([numpy.nan, numpy.nan])) == 0


def test_average_precision_by_hand():
    scores = numpy.array([0.9, 0.8, 0.7, 0.6])
    # hits at ranks 1 and 3: precisions 1 and 2/3, each gaining half the recall
    assert average_precision(scores, numpy.array([True, False, True, False])) == pytest.approx(5 / 6)
    assert average_precision(scores, numpy.array([False, False, False, True])) == pytest.approx(1 / 4)


def test_equal_scores_are_one_threshold_in_any_order():
    scores = numpy.full(4, 0.5)
    for present in ([1, 0, 0, 0], [0, 0, 0, 1]):
        assert average_precision(scores, numpy.array(present, dtype=bool)) == pytest.approx(1 / 4)


def test_average_precision_of_classes_in_no_and_in_every_picture():
    scores = numpy.array([0.1, 0.9, 0.3])
    assert numpy.isnan(average_precision(scores, numpy.zeros(3, dtype=bool)))
    assert average_precision(scores, numpy.ones(3, dtype=bool)) == 1


def test_average_precision_is_that_of_scikit_learn():
    sklearn = pytest.importorskip("sklearn.metrics")
    random = numpy.random.default_rng(0)
    for size in (1, 2, 7, 50):
        scores = random.integers(0, 10, size) / 10  # many ties
        present = random.random(size) < 0.4
        present[0] = True
        assert average_precision(scores, present) == pytest.approx(sklearn.average_precision_score(present, scores))


def test_f1():
    scores, present = numpy.array([0.5, 0.4, 0.9, 0.1]), numpy.array([True, True, False, False])
    assert f1(scores, present) == pytest.approx(2 * 1 / (2 + 2))
    assert f1(scores, present, threshold=0.3) == pytest.approx(2 * 2 / (3 + 2))
    assert f1(scores, present, threshold=0.95) == 0
    assert numpy.isnan(f1(numpy.zeros(2), numpy.zeros(2, dtype=bool)))
    assert f1(numpy.ones(2), numpy.zeros(2, dtype=bool)) == 0


def test_reliability_counts_by_bins_of_equal_width():
    scores = numpy.array([0.0, 0.19, 0.2, 0.999, 1.0])
    found = reliability(scores, numpy.array([False, True, True, True, False]), bins=5)
    assert found.counts.tolist() == [2, 1, 0, 0, 2]
    numpy.testing.assert_allclose(found.scores, [0.095, 0.2, numpy.nan, numpy.nan, 0.9995])
    numpy.testing.assert_allclose(found.frequencies, [0.5, 1, numpy.nan, numpy.nan, 0.5])
    assert len(reliability(scores, scores > 0.5).counts) == 15, "published figures are with as many"


def test_expected_calibration_error_by_hand():
    scores = numpy.array([0.95, 0.95, 0.95, 0.95, 0.1])
    present = numpy.array([True, True, True, False, False])
    assert expected_calibration_error(scores, present) == pytest.approx(4 / 5 * 0.2 + 1 / 5 * 0.1)
    assert expected_calibration_error(scores, present, bins=1) == pytest.approx(abs(3.9 / 5 - 3 / 5))
    assert expected_calibration_error(numpy.array([0.0, 1.0]), numpy.array([False, True])) == 0
    assert expected_calibration_error(numpy.array([0.0, 1.0]), numpy.array([True, False])) == 1


def test_scores_that_are_probabilities_have_next_to_no_calibration_error():
    random = numpy.random.default_rng(0)
    scores = random.random(100_000)
    present = random.random(100_000) < scores
    assert expected_calibration_error(scores, present) < 0.01
    assert expected_calibration_error(scores**2, present) > 0.1


def test_negative_log_likelihood():
    scores, present = numpy.array([0.8, 0.8]), numpy.array([True, False])
    assert negative_log_likelihood(scores, present) == pytest.approx(-(numpy.log(0.8) + numpy.log(0.2)) / 2)
    sure_and_wrong = negative_log_likelihood(numpy.zeros(1), numpy.ones(1, dtype=bool))
    assert sure_and_wrong == pytest.approx(12 * numpy.log(10)), "scores are kept 1e-12 away from 0 and 1"
