"""Fitting scale and bias of presence: what made the labels is found again, and one-sided examples break nothing."""

import math

import pytest
import torch

from model.calibration import Calibration, fit_platt, fit_temperature, varying


def labelled(scale, bias, pictures=20_000, seed=0):
    """Logits of two spread-out classes, and truths that are drawn with sigmoid(scale * logit + bias)."""
    random = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(pictures, 2, generator=random, dtype=torch.float64)
    truth = torch.rand(pictures, 2, generator=random) < (logits * torch.tensor(scale) + torch.tensor(bias)).sigmoid()
    return logits, truth


def test_a_temperature_is_found_again():
    found = fit_temperature(*labelled([0.4, 0.4], [0.0, 0.0]))
    assert found.scale == pytest.approx((0.4, 0.4), rel=0.03)
    assert found.bias == (0.0, 0.0)
    assert (found.method, found.pictures) == ("temperature", 20_000)


def test_scale_and_bias_of_each_class_are_found_again():
    found = fit_platt(*labelled([0.3, 1.5], [1.0, -2.0]))
    assert found.scale == pytest.approx((0.3, 1.5), rel=0.05)
    assert found.bias == pytest.approx((1.0, -2.0), abs=0.1)


def test_logits_that_are_calibrated_stay_as_they_are():
    logits, truth = labelled([1.0, 1.0], [0.0, 0.0])
    for fit in (fit_temperature, fit_platt):
        found = fit(logits, truth)
        assert found.scale == pytest.approx((1.0, 1.0), rel=0.05)
        assert found.bias == pytest.approx((0.0, 0.0), abs=0.06)


@pytest.mark.parametrize("size", [1.0, 1000.0])
def test_classes_in_all_pictures_in_none_and_perfectly_separated(size):
    """Scales stay finite and positive, so that scores keep their order; what is one-sided follows the temperature."""
    pictures = 60
    logits = size * torch.linspace(2, 8, pictures, dtype=torch.float64)[:, None].repeat(1, 3)
    logits[:, 1] *= -1
    logits[:, 2] -= size * 5
    truth = torch.tensor([[True, False, False]]).repeat(pictures, 1)
    truth[:, 2] = logits[:, 2] > 0
    for fit in (fit_temperature, fit_platt):
        found = fit(logits, truth)
        assert all(0 < scale < math.inf for scale in found.scale)
        assert all(map(math.isfinite, found.bias))
    temperature = fit_temperature(logits, truth).scale[0]
    assert found.scale[:2] == (pytest.approx(temperature), pytest.approx(temperature))
    assert found.bias[:2] == (0, 0)
    scores = found.apply(logits).sigmoid()
    assert 0.9 < scores[truth[:, 2], 2].mean() < (pictures + 1) / (pictures + 2), "no surer than so few pictures allow"
    assert (scores[truth[:, 2], 2] > 0.5).all()
    assert (scores[~truth[:, 2], 2] < 0.5).all()


def test_where_no_class_varies_nothing_is_fitted():
    logits = torch.linspace(-3, 8, 20, dtype=torch.float64)[:, None].repeat(1, 2)
    truth = torch.tensor([[True, False]]).repeat(20, 1)
    assert varying(truth).tolist() == [False, False]
    for fit in (fit_temperature, fit_platt):
        assert (fit(logits, truth).scale, fit(logits, truth).bias) == ((1, 1), (0, 0))


def test_a_class_with_a_handful_of_examples_stays_near_the_temperature():
    logits, truth = labelled([0.4, 0.4], [0.0, 0.0], pictures=400)
    truth[:, 1] = False
    truth[logits[:, 1].argmin(), 1] = True
    found = fit_platt(logits, truth)
    assert 0.04 < found.scale[1] < 0.8
    assert -6 < found.bias[1] < 0


def test_apply_is_scale_times_logit_plus_bias():
    calibration = Calibration((2.0, 0.5), (1.0, -1.0), "platt", 3)
    logits = torch.tensor([[1.0, 2.0], [-3.0, 0.0]])
    torch.testing.assert_close(calibration.apply(logits), torch.tensor([[3.0, 0.0], [-5.0, -1.0]]))


def test_a_dictionary_and_back():
    calibration = Calibration((2.0, 0.5), (1.0, -1.0), "platt", 3)
    assert Calibration.from_dict(calibration.to_dict(), 2) == calibration


GOOD = {"scale": [1.0, 2.0], "bias": [0.0, 0.0], "method": "platt", "pictures": 3}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"scale": [1.0, 0.0]}, "scale must be finite numbers above 0"),
        ({"scale": [1.0, math.inf]}, "scale must be finite numbers above 0"),
        ({"scale": [1.0, math.nan]}, "scale must be finite numbers above 0"),
        ({"scale": [1.0, 10**400]}, "scale must be finite numbers above 0"),
        ({"bias": [0.0, math.nan]}, "bias must be finite numbers"),
        ({"bias": [0.0, -(10**400)]}, "bias must be finite numbers"),
        ({"bias": [0.0]}, "one number for each class, found 2 and 1"),
        ({"scale": [1.0] * 3, "bias": [0.0] * 3}, "scale must be 2 numbers, found 3"),
        ({"method": "guess"}, "method must be one of temperature, platt, found 'guess'"),
        ({"pictures": 0}, "pictures must be at least 1"),
        ({"scale": "1, 2"}, "scale is not"),
        ({"bias": [0.0, "1"]}, "bias is not"),
        ({"scale": [1.0, True]}, "scale is not"),
        ({"colour": 1}, "must have scale, bias, method, pictures, found scale, bias, method, pictures, colour"),
    ],
)
def test_a_malformed_one_is_refused_with_the_reason(changes, said):
    with pytest.raises(ValueError, match="calibration: ") as error:
        Calibration.from_dict({**GOOD, **changes}, 2)
    assert said in str(error.value)


def test_an_empty_one_is_refused():
    with pytest.raises(ValueError, match="found nothing"):
        Calibration.from_dict({}, 2)
