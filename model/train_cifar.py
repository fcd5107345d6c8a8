"""Train the paper's CIFAR-10 classifier: `python -m model.train_cifar --data DIR --out DIR [key=value ...]`.

The options' defaults are the authors' recipe. DIR of --out receives last.pt (weights and everything `--resume` needs),
final.pt (weights at the end) and TensorBoard events. CIFAR-10 has no validation split, so no checkpoint is called best.
"""

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from numpy.random import SeedSequence, default_rng
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

from model.arguments import DeviceError, add_device, choose_device
from model.cifar import CifarCheckpoint, CifarEncNet, load_cifar, save_cifar
from model.cifar_data import MEAN, STD, Pictures, crops, open_cifar
from model.command import finish
from model.data import DataError
from model.pictures import StepSampler, send
from model.predict import normalise
from model.progress import training_progress
from model.recipe import RecipeError, continued, option, options_table, read_recipe
from model.stopping import stop_signals
from model.weights import CheckpointError, are_finite, fitting

BOOKKEEPING = {"log_every", "save_every", "evaluate_every"}
STATE = ("recipe", "optimizer", "random")  # what --resume needs of a training state
EVALUATION_BATCH = 500


@dataclass(frozen=True)
class CifarRecipe:
    """Every option of `python -m model.train_cifar`; the help texts below are the documentation."""

    variant: str = option("16k64d", "codewords and channels of the first stage; the paper's: 16k64d and 32k128d")
    epochs: int = option(600, "passes over the train pictures")
    batch: int = option(128, "pictures per step")
    learning_rate: float = option(0.1, "at the start; it falls to 0 by a cosine, per step")
    momentum: float = option(0.9, "of SGD")
    weight_decay: float = option(1e-4, "on every parameter")
    precision: str = option("fp32", "fp32 or bf16")
    seed: int = option(0, "of weights, order, crops and smoothing factors")

    log_every: int = option(100, "steps between log lines")
    save_every: int = option(1000, "steps between saves of last.pt")
    evaluate_every: int = option(10, "epochs between evaluations; the last epoch is always evaluated")

    def __post_init__(self) -> None:
        rules = (
            (self.precision in ("fp32", "bf16"), f"precision must be fp32 or bf16, got {self.precision!r}"),
            (self.learning_rate > 0, f"learning_rate must be positive, got {self.learning_rate}"),
            (0 <= self.momentum < 1, f"momentum must be in [0, 1), got {self.momentum}"),
            *(
                (getattr(self, key) >= 0, f"{key} must not be negative, got {getattr(self, key)}")
                for key in ("weight_decay", "seed")
            ),
            *(
                (getattr(self, key) >= 1, f"{key} must be at least 1, got {getattr(self, key)}")
                for key in ("epochs", "batch", "log_every", "save_every", "evaluate_every")
            ),
        )
        broken = [message for holds, message in rules if not holds]
        if broken:
            raise RecipeError("; ".join(broken))


def logits(network: CifarEncNet, images: Tensor, precision: str) -> Tensor:
    """uint8 (B, 32, 32, 3) on the network's device -> float32 (B, 10)."""
    mean, std = (send(torch.tensor(values), images.device) for values in (MEAN, STD))
    batch = normalise(images, mean, std).contiguous(memory_format=torch.channels_last)
    with torch.autocast(batch.device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        return network(batch).float()


@torch.no_grad()
def predictions(network: CifarEncNet, images: Tensor, precision: str) -> Tensor:
    """The classes, int64 (N,), of uint8 (N, 3, 32, 32) on the network's device; leaves it in evaluation mode."""
    network.eval()
    return torch.cat(
        [logits(network, part.permute(0, 2, 3, 1), precision).argmax(1) for part in images.split(EVALUATION_BATCH)]
    )


class CifarRun:
    """One training run: what is trained, where it stands, and how to save and restore exactly that."""

    def __init__(self, recipe: CifarRecipe, data: tuple[Pictures, Pictures], device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        self.train, self.test = (Pictures(*(part.to(device) for part in split)) for split in data)
        self.steps_per_epoch = len(self.train.labels) // recipe.batch
        if not self.steps_per_epoch:
            raise RecipeError(f"batch={recipe.batch} is more than the {len(self.train.labels)} train pictures")
        self.steps = self.steps_per_epoch * recipe.epochs
        torch.manual_seed(recipe.seed)
        try:
            network = CifarEncNet(recipe.variant)
        except ValueError as error:
            raise RecipeError(str(error)) from error
        self.network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = torch.optim.SGD(
            self.network.parameters(),
            recipe.learning_rate,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
            fused=True,
        )
        self.step = 0
        torch.manual_seed(recipe.seed + 1)

    def checkpoint(self, training: dict[str, Any] | None = None) -> CifarCheckpoint:
        """The weights as they are, on the CPU."""
        weights = {key: value.contiguous().cpu().clone() for key, value in self.network.state_dict().items()}
        return CifarCheckpoint(self.recipe.variant, weights, self.step, training)

    def save(self, path: Path) -> None:
        """Write the weights and everything `restore` needs, atomically."""
        random = [torch.get_rng_state()]
        if self.device.type == "cuda":
            random.append(torch.cuda.get_rng_state(self.device))
        training = {
            "recipe": dataclasses.asdict(self.recipe),
            "optimizer": self.optimizer.state_dict(),
            "random": random,
        }
        save_cifar(path, self.checkpoint(training))

    def check_finite(self, loss: Tensor) -> None:
        """Raise RecipeError where the last step's loss or a weight is NaN or infinite; waits for a GPU."""
        if not math.isfinite(loss):
            raise RecipeError(f"the loss is {float(loss)} at step {self.step}: lower learning_rate")
        if not are_finite(self.network.state_dict()):
            raise RecipeError(f"weights are NaN or infinite at step {self.step}: lower learning_rate")

    def restore(self, checkpoint: CifarCheckpoint) -> None:
        """Go on where another process saved."""
        assert checkpoint.training is not None
        self.network.load_state_dict(checkpoint.weights)
        self.optimizer.load_state_dict(checkpoint.training["optimizer"])
        self.step = checkpoint.step
        cpu, *cuda = checkpoint.training["random"]
        torch.set_rng_state(cpu)
        if self.device.type == "cuda" and cuda:
            torch.cuda.set_rng_state(cuda[0], self.device)

    def train_step(self, indices: list[int]) -> Tensor:
        """One optimizer step on these train pictures; the crops are decided by the seed and the step. The loss, ()."""
        recipe = self.recipe
        rate = recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * self.step / self.steps))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        chosen = send(torch.tensor(indices), self.device)
        images = crops(self.train.images[chosen], default_rng(SeedSequence([recipe.seed, self.step, 1])))
        loss = F.cross_entropy(logits(self.network, images, recipe.precision), self.train.labels[chosen])
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.step += 1
        return loss.detach()

    def test_error(self) -> float:
        """The share of test pictures classified wrongly."""
        wrong = predictions(self.network, self.test.images, self.recipe.precision) != self.test.labels
        self.network.train()
        return wrong.double().mean().item()


def train(run: CifarRun, out: Path, console: Console, asked: Sequence[int] = ()) -> bool:
    """From where the run stands to its end, saving, logging and evaluating on the way; whether the end was reached.

    asked: signals that were received; with one, the run saves and stops after its step.
    """
    from torch.utils.tensorboard import SummaryWriter

    recipe = run.recipe
    writer = SummaryWriter(str(out / "events"), purge_step=run.step + 1)
    sampler = StepSampler(len(run.train.labels), recipe.batch, recipe.epochs, recipe.seed, run.step)
    run.network.train()
    with training_progress(console, recipe.epochs, "pictures", console.is_terminal) as progress:
        bar = progress.add_task("", total=run.steps, completed=run.step, epoch=0, loss=math.nan, rate=0.0)
        since, since_step = time.monotonic(), run.step
        for keys in sampler:
            loss = run.train_step([index for _, index in keys])
            epoch = -(-run.step // run.steps_per_epoch)
            if run.step % recipe.log_every == 0:
                run.check_finite(loss)
                value = float(loss)
                rate = (run.step - since_step) * recipe.batch / (time.monotonic() - since)
                since, since_step = time.monotonic(), run.step
                progress.update(bar, completed=run.step, epoch=epoch, loss=value, rate=rate)
                if not console.is_terminal:
                    console.print(
                        f"epoch {epoch}/{recipe.epochs} step {run.step}/{run.steps} loss {value:.4f} "
                        f"{rate:.1f} pictures/s",
                        highlight=False,
                    )
                writer.add_scalar("loss", value, run.step)
                writer.add_scalar("learning_rate", run.optimizer.param_groups[0]["lr"], run.step)
            if run.step % run.steps_per_epoch == 0 and (epoch % recipe.evaluate_every == 0 or epoch == recipe.epochs):
                error = run.test_error()
                console.print(f"epoch {epoch}: test error {100 * error:.2f} %", highlight=False)
                writer.add_scalar("test_error", error, run.step)
                since, since_step = time.monotonic(), run.step
            if run.step % recipe.save_every == 0 or run.step == run.steps or asked:
                run.check_finite(loss)
                run.save(out / "last.pt")
            if asked and run.step < run.steps:
                break
    writer.close()
    if run.step < run.steps:
        console.print(f"stopped at step {run.step} of {run.steps}; --resume goes on", highlight=False)
        return False
    save_cifar(out / "final.pt", run.checkpoint())
    console.print(f"wrote {out / 'final.pt'}", highlight=False)
    return True


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m model.train_cifar",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
        epilog="options, given as key=value or in the recipe file (defaults shown):\n"
        + options_table(CifarRecipe)
        + "\n\nexample:\n  python -m model.train_cifar --data cifar-10-batches-bin --out runs/cifar variant=32k128d "
        "precision=bf16",
    )
    parser.add_argument("options", nargs="*", metavar="key=value", help="recipe options, see below")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder of CIFAR-10")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the run (made if absent)")
    parser.add_argument("--config", type=Path, metavar="FILE", help="recipe file (TOML)")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out exactly where it was saved")
    add_device(parser)
    return parser.parse_intermixed_args(arguments)


def work(options: argparse.Namespace, console: Console) -> int:
    """Set up and train; 128 + N after signal N, else 0.

    Raises RecipeError, DataError, CheckpointError, DeviceError and OSError.
    """
    given = read_recipe(options.config, options.options, CifarRecipe)
    last = options.out / "last.pt"
    if last.exists() and not options.resume:
        raise RecipeError(f"{options.out} already holds a run; add --resume, or choose another folder")
    if options.resume and not last.exists():
        raise RecipeError(f"{last}: nothing to resume from")
    saved = load_cifar(last) if options.resume else None
    recipe = continued(CifarRecipe, last, saved.training, STATE, given, BOOKKEEPING) if saved else CifarRecipe(**given)
    device = choose_device(options.device)
    data = open_cifar(options.data)
    run = CifarRun(recipe, data, device)
    console.print(
        f"train: {len(run.train.labels)} pictures, test: {len(run.test.labels)}; {recipe.variant}: "
        f"{sum(p.numel() for p in run.network.parameters()) / 1e6:.3f} M parameters on {device}",
        highlight=False,
    )
    if saved:
        with fitting(last):
            run.restore(saved)
    options.out.mkdir(parents=True, exist_ok=True)
    with stop_signals() as asked:
        reached = train(run, options.out, console, asked)
    return 0 if reached else 128 + asked[0]


def main(arguments: list[str] | None = None) -> int:
    """The exit status; see `finish` and `work`."""
    run = partial(work, parse(arguments), Console(soft_wrap=True, markup=False, emoji=False))
    return finish(run, RecipeError, DataError, CheckpointError, DeviceError)


if __name__ == "__main__":
    sys.exit(main())
