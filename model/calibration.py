"""Calibration of presence: scores that hold what they say, from logits on pictures that training has not seen.

The calibrated score of class c is sigmoid(scale_c * logit_c + bias_c). Temperature scaling (Guo et al., "On Calibration
of Modern Neural Networks", ICML 2017) has one scale for all classes and no bias; Platt's ("Probabilistic outputs for
support vector machines", 1999) has both for each class. Scales are positive, so that a class's scores keep their order.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

METHODS = ("temperature", "platt")
MOST = torch.finfo(torch.float32).max
LOG_SCALE_SPREAD, BIAS_SPREAD = 1.0, 3.0


@dataclass(frozen=True)
class Calibration:
    """scale, bias: one number for each class; method: one of METHODS; pictures: how many it was fitted on.

    Raises ValueError for numbers that are not finite, a scale that is not positive, or lists of different lengths.
    """

    scale: tuple[float, ...]
    bias: tuple[float, ...]
    method: str
    pictures: int

    def __post_init__(self) -> None:
        rules = (
            (all(0 < value <= MOST for value in self.scale), "scale must be finite numbers above 0"),
            (all(abs(value) <= MOST for value in self.bias), "bias must be finite numbers"),
            (
                len(self.scale) == len(self.bias),
                f"scale and bias must have one number for each class, found {len(self.scale)} and {len(self.bias)}",
            ),
            (self.method in METHODS, f"method must be one of {', '.join(METHODS)}, found {self.method!r}"),
            (self.pictures >= 1, f"pictures must be at least 1, found {self.pictures}"),
        )
        broken = [message for holds, message in rules if not holds]
        if broken:
            raise ValueError("calibration: " + "; ".join(broken))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], num_classes: int) -> "Calibration":
        """What `to_dict` made of one for so many classes. Raises ValueError that says what is wrong with it."""
        known = {"scale": list, "bias": list, "method": str, "pictures": int}
        if set(values) != set(known):
            found = ", ".join(map(str, values)) or "nothing"
            raise ValueError(f"calibration: must have {', '.join(known)}, found {found}")
        wrong = [key for key, kind in known.items() if not isinstance(values[key], kind)]
        wrong += [
            key
            for key in ("scale", "bias")
            if key not in wrong and not all(isinstance(n, Real) and not isinstance(n, bool) for n in values[key])
        ]
        if wrong:
            raise ValueError(
                f"calibration: scale and bias must be lists of numbers, method text and pictures a number; "
                f"{', '.join(wrong)} is not"
            )
        if len(values["scale"]) != num_classes:
            raise ValueError(f"calibration: scale must be {num_classes} numbers, found {len(values['scale'])}")
        return cls(tuple(values["scale"]), tuple(values["bias"]), values["method"], values["pictures"])

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "scale": list(self.scale), "bias": list(self.bias)}

    def apply(self, logits: Tensor) -> Tensor:
        """(..., C) presence logits -> calibrated ones."""
        return logits * logits.new_tensor(self.scale) + logits.new_tensor(self.bias)


def varying(present: Tensor) -> Tensor:
    """(P, C) bool -> (C,) bool: the classes that some pictures have and others have not.

    Only they tell anything: where every picture has a class, the likeliest score is 1 whatever the picture shows.
    """
    return present.any(0) & ~present.all(0)


def fit_temperature(logits: Tensor, present: Tensor) -> Calibration:
    """The one scale 1/T that makes the truth of the varying classes likeliest; 1 where no class varies.

    logits: (P, C) float, one row for each picture; present: (P, C) bool. Targets are `platt_targets`; a normal prior of
    log scale around 0, with the weight of one observation, decides what the pictures leave open.
    """
    pictures, classes = logits.shape
    known = varying(present)
    logits, targets = logits[:, known].double(), platt_targets(present[:, known])
    log_scale = torch.zeros((), dtype=torch.float64, requires_grad=True)

    def cost() -> Tensor:
        likelihood = F.binary_cross_entropy_with_logits(logits * log_scale.exp(), targets, reduction="sum")
        return likelihood + (log_scale / LOG_SCALE_SPREAD).square() / 2

    _minimise([log_scale], cost)
    return Calibration((log_scale.exp().item(),) * classes, (0.0,) * classes, "temperature", pictures)


def fit_platt(logits: Tensor, present: Tensor) -> Calibration:
    """Scale and bias for each varying class; the others have the temperature's. Arguments as in `fit_temperature`.

    Normal priors, of log scale around the temperature's and of the bias around 0, hold a class with few examples near
    the temperature.
    """
    centre = math.log(fit_temperature(logits, present).scale[0])
    pictures, classes = logits.shape
    known = varying(present)
    logits, targets = logits[:, known].double(), platt_targets(present[:, known])
    shift = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)

    def cost() -> Tensor:
        scaled = logits * (centre + shift[known]).exp() + bias[known]
        likelihood = F.binary_cross_entropy_with_logits(scaled, targets, reduction="sum")
        priors = (shift / LOG_SCALE_SPREAD).square() + (bias / BIAS_SPREAD).square()
        return likelihood + priors.sum() / 2

    _minimise([shift, bias], cost)
    scale = (centre + shift).exp()
    return Calibration(tuple(scale.tolist()), tuple(bias.tolist()), "platt", pictures)


def platt_targets(present: Tensor) -> Tensor:
    """(P, C) bool -> float64: (P+ + 1) / (P+ + 2) for the P+ pictures with a class, 1 / (P- + 2) for the P- without.

    So many pictures support no more certainty than that, however well the logits separate them.
    """
    having = present.sum(0).double()
    return torch.where(present, (having + 1) / (having + 2), 1 / (len(present) - having + 2))


FITS = {"temperature": fit_temperature, "platt": fit_platt}


def _minimise(parameters: list[Tensor], cost: Callable[[], Tensor]) -> None:
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=1000, tolerance_grad=1e-9, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = cost()
        value.backward()
        return value

    optimizer.step(closure)  # type: ignore[no-untyped-call]
