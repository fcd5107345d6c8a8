"""What the recipe says is what a training step does: every expected number is worked out here from the options."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

from model.augment import Augmentation
from model.checkpoint import load_checkpoint
from model.encnet import Outputs
from model.losses import Losses
from model.recipe import Recipe
from model.run import Run
from tests.model.folders import write_scenes

PIXELS = (36, 9, 3)  # of every 48 in the data set, by class
TINY: dict[str, Any] = {
    "backbone": "resnet18", "channels": 8, "codewords": 2, "batch": 2, "crop": 32, "base_size": 48, "epochs": 1,
    "learning_rate": 0.3, "head_rate": 1.0, "power": 1.0, "momentum": 0.0, "weight_decay": 0.0, "workers": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pictures, so that an epoch has three steps; their classes are not equally frequent."""
    root = write_scenes(tmp_path_factory.mktemp("scenes"))
    mask = numpy.repeat(numpy.arange(3, dtype=numpy.uint8), PIXELS)[:, None].repeat(48, axis=1)
    for path in (root / "labels").iterdir():
        Image.fromarray(mask).save(path)
    return root


def start(data: Path, out: Path = Path(), **options: Any) -> Run:
    return Run(Recipe(**TINY | options), data, out, Console(quiet=True))


def crops(run: Run) -> tuple[Tensor, Tensor]:
    """Noise, labelled 0 in its upper half and 1 in its lower."""
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, device=run.device)
    masks = torch.zeros(2, 32, 32, dtype=torch.uint8, device=run.device)
    masks[:, 16:] = 1
    return images, masks


def total_loss(run: Run) -> float:
    """Of a step whose network gives each pixel the probabilities 1/2, 1/4, 1/4 and is undecided otherwise.

    So the loss is log 2 at pixels of class 0, log 4 at those of class 1, log 3 at the auxiliary head's, and log 2 for
    presence.
    """
    probabilities = torch.tensor([0.5, 0.25, 0.25], device=run.device)
    logits = probabilities.log()[:, None, None].repeat(2, 1, 32, 32).requires_grad_()
    outputs = Outputs(logits, torch.zeros(2, 3, device=run.device), torch.zeros_like(logits))

    class Network(nn.Module):
        def forward(self, images: Tensor) -> Outputs:
            return outputs

    run.model = Network()
    return float(run.train_step(*crops(run)).total)


def step_with(run: Run, gradients: Mapping[str, Tensor | float]) -> None:
    """A training step whose loss has these gradients at the parameters of these names, and none at others."""

    def objective(outputs: Outputs, mask: Tensor, **options: Any) -> Losses:
        terms = [(run.network.get_parameter(name) * gradient).sum() for name, gradient in gradients.items()]
        return Losses(*4 * [torch.stack(terms).sum()])

    run.model, run.objective = nn.Identity(), objective
    run.train_step(*crops(run))


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def mixture(share: float, old: dict[str, Tensor], new: dict[str, Tensor]) -> dict[str, Tensor]:
    """That share of the old and the rest of the new; of whole numbers, which count batches, the new."""
    return {
        name: share * old[name] + (1 - share) * new[name] if new[name].is_floating_point() else new[name]
        for name in new
    }


def test_the_presence_loss_has_the_recipes_weight(scenes: Path) -> None:
    run = start(scenes, presence_weight=0.7, auxiliary_weight=0.0)
    assert total_loss(run) == pytest.approx((1.5 + 0.7) * math.log(2))


def test_the_auxiliary_loss_has_the_recipes_weight(scenes: Path) -> None:
    run = start(scenes, presence_weight=0.0, auxiliary_weight=0.7)
    assert total_loss(run) == pytest.approx(1.5 * math.log(2) + 0.7 * math.log(3))


def test_the_recipes_share_of_a_pixels_target_is_spread_over_all_classes(scenes: Path) -> None:
    run = start(scenes, presence_weight=0.0, auxiliary_weight=0.0, label_smoothing=0.3)
    own, mean_of_classes = 1.5 * math.log(2), (1 + 2 + 2) / 3 * math.log(2)
    assert total_loss(run) == pytest.approx(0.7 * own + 0.3 * mean_of_classes)


def test_pixels_of_a_class_a_quarter_as_frequent_count_twice_where_the_balance_is_a_half(scenes: Path) -> None:
    run = start(scenes, presence_weight=0.0, auxiliary_weight=0.0, class_balance=0.5)
    assert total_loss(run) == pytest.approx((math.log(2) + 2 * math.log(4)) / (1 + 2))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_weight_decay_shrinks_every_parameter_by_its_share_of_the_rate(scenes: Path, optimizer: str) -> None:
    run = start(scenes, optimizer=optimizer, weight_decay=0.5)
    before = {name: parameter.detach().clone() for name, parameter in run.network.named_parameters()}
    step_with(run, dict.fromkeys(before, 0.0))
    expected = {name: (1 - 0.3 * 0.5) * value for name, value in before.items()}
    torch.testing.assert_close(dict(run.network.named_parameters()), expected)


def test_momentum_repeats_its_share_of_the_last_gradient_at_the_rate_of_the_step(scenes: Path) -> None:
    run = start(scenes, momentum=0.5)
    bias = run.network.head.classifier.bias
    before = bias.detach().clone()
    first, second = torch.tensor([[1.0, -2.0, 4.0], [3.0, 3.0, -1.0]], device=run.device)
    for gradient in (first, second):
        step_with(run, {"head.classifier.bias": gradient})
    torch.testing.assert_close(bias, before - 0.3 * first - 0.2 * (second + 0.5 * first))


def test_clip_scales_a_gradient_over_all_parameters_down_to_its_norm(scenes: Path) -> None:
    """64 times 0.5 and one time 3 have the norm 5."""
    run = start(scenes, clip=1.0)
    scale, bias = run.network.backbone.bn1.weight, run.network.head.classifier.bias
    before = [scale.detach().clone(), bias.detach().clone()]
    gradient = torch.tensor([3.0, 0.0, 0.0], device=run.device)
    step_with(run, {"backbone.bn1.weight": 0.5, "head.classifier.bias": gradient})
    torch.testing.assert_close([scale, bias], [before[0] - 0.3 * 0.5 / 5, before[1] - 0.3 * gradient / 5])


def test_the_average_keeps_the_recipes_share_of_itself_once_it_has_grown_into_it(scenes: Path) -> None:
    """2/11 at the first step; at the second it would be 3/12, which is more than the recipe's 0.2."""
    run = start(scenes, ema=0.2)
    states = [state(run.network)]
    for _ in range(2):
        run.train_step(*crops(run))
        states.append(state(run.network))
    after_one = mixture(2 / 11, states[0], states[1])
    torch.testing.assert_close(state(run.average), mixture(0.2, after_one, states[2]))


@pytest.mark.parametrize(("ema", "share"), [(0.9, 2 / 11), (0.0, 0.0)])
def test_a_checkpoint_serves_the_averaged_weights_and_resumes_from_the_trained(
    scenes: Path, tmp_path: Path, ema: float, share: float
) -> None:
    run = start(scenes, tmp_path, ema=ema)
    before = state(run.network)
    run.train_step(*crops(run))
    run.save()
    trained = {name: value.cpu() for name, value in state(run.network).items()}
    expected = mixture(share, {name: value.cpu() for name, value in before.items()}, trained)
    saved = load_checkpoint(tmp_path / "last.pt")
    torch.testing.assert_close(saved.weights, expected)
    assert saved.training is not None
    torch.testing.assert_close(saved.training["model"], trained, rtol=0, atol=0)


@pytest.mark.parametrize("mirror", [True, False])
def test_training_crops_are_drawn_by_the_recipes_augmentation(scenes: Path, mirror: bool) -> None:
    run = start(
        scenes, scale_min=0.75, scale_max=1.5, mirror=mirror, rotation=7.0, jitter=0.2, gamma=0.4, white_balance=0.1
    )
    assert run.crops.options == Augmentation(32, 48, (0.75, 1.5), mirror, 7.0, 0.2, 0.4, 0.1)


def test_processes_begin_with_the_same_weights_and_draw_dropout_each_for_itself(
    scenes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = []
    for rank in ("0", "1", "0"):
        monkeypatch.setenv("RANK", rank)
        run = start(scenes, seed=4)
        begun.append((state(run.network), torch.rand(8, device=run.device)))
    for weights, _ in begun:
        torch.testing.assert_close(weights, begun[0][0], rtol=0, atol=0)
    first, second, again = (drawn for _, drawn in begun)
    assert torch.equal(first, again) and not torch.equal(first, second)
