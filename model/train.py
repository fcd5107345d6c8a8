"""Train EncNet: `python -m model.train --data DIR --out DIR [--config RECIPE.toml] [key=value ...]`.

Several processes: `torchrun --nproc-per-node=N -m model.train ...` (DDP with synchronised batch norm; `batch` is the
number of crops over all processes together). After a crash `torchrun --max-restarts=N` starts the processes again,
and they go on from last.pt; on several nodes DIR must be a folder that all of them see.

DIR of --out receives last.pt (weights and everything `--resume` needs), best.pt (weights that did best on the
validation split), final.pt (weights at the end), curves.json and curves.png, TensorBoard events, and at the end
final.evaluation/ with the validation split's figures, table and contact sheet.
"""

import argparse
import contextlib
import copy
import dataclasses
import gc
import hashlib
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn

from model import evaluate as evaluate_command
from model import sync_batchnorm
from model.arguments import minutes
from model.backbone_weights import BackboneWeights, read_backbone_weights
from model.checkpoint import IMAGENET_MEAN, IMAGENET_STD, Checkpoint, CheckpointError, load_checkpoint, save_checkpoint
from model.command import finish
from model.curves import write_curves
from model.data import SPLITS, DataError, open_dataset, problems, repeats
from model.encnet import EncNet
from model.evaluation import Evaluation, Options, evaluate
from model.figures import sample_row
from model.fine_tuning import frozen_parts, hold, parameter_groups
from model.layouts.split import BrokenList
from model.losses import Losses, encnet_loss
from model.metrics import mean_iou, pixel_accuracy
from model.pictures import StepSampler, TrainingCrops, in_memory
from model.predict import normalise
from model.processes import group_id, init_process_group, restarted
from model.progress import training_progress
from model.recipe import Recipe, RecipeError, continued, options_table, read_recipe
from model.stopping import stop_signals
from model.weights import are_finite, fitting
from model.wording import listing

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

BOOKKEEPING = {"cache", "workers", "log_every", "save_every", "evaluate_every"}
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
SAMPLE_PICTURES = 4
STATE = ("recipe", "model", "optimizer", "scaler", "random", "best")  # what --resume needs of a training state


def learning_rate_factor(step: int, steps: int, recipe: Recipe) -> float:
    """Factor on the base rates at a step, 0-based: linear warm-up, then poly or cosine to 0, where it stays."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    progress = min((step - recipe.warmup) / max(steps - recipe.warmup, 1), 1.0)
    if recipe.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return (1 - progress) ** recipe.power


def make_optimizer(model: EncNet, recipe: Recipe) -> torch.optim.Optimizer:
    """SGD or AdamW over `parameter_groups`, whose base_rate times `learning_rate_factor` is the rate of a step."""
    groups = parameter_groups(model, recipe.learning_rate, recipe.layer_decay, recipe.head_rate, recipe.unfreeze_every)
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True)
    return torch.optim.SGD(
        groups, lr=recipe.learning_rate, momentum=recipe.momentum, weight_decay=recipe.weight_decay, fused=True
    )


def class_weights(crops: TrainingCrops, num_classes: int, exponent: float) -> Tensor | None:
    """(C,) float: (1 / pixel frequency)^exponent, scaled so that the mean over pixels is 1; None for exponent 0.

    A class without a pixel weighs 1.
    """
    if not exponent:
        return None
    counts = crops.label_counts(num_classes).double()
    present = counts > 0
    frequency = counts[present] / counts.sum()
    weights = torch.ones_like(counts)
    weights[present] = frequency**-exponent
    weights[present] /= (weights[present] * frequency).sum()
    return weights.float()


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Move averaged weights and statistics towards the model's; the decay grows into its value over the first steps."""
    pairs = list(zip(average.state_dict().values(), model.state_dict().values(), strict=True))
    means, values = zip(*(pair for pair in pairs if pair[0].is_floating_point()), strict=True)
    get_ema_multi_avg_fn(min(decay, (1 + step) / (10 + step)))(list(means), list(values), None)
    for mean, value in pairs:
        if not mean.is_floating_point():
            mean.copy_(value)


def evaluation_options(recipe: Recipe, processes: int) -> dict[str, Any]:
    """batch and precision of a run's own evaluations.

    A batch has as many pictures as a process has crops in a part of a step; half precision is bfloat16.
    """
    batch = max(recipe.batch // (recipe.accumulate * processes), 1)
    return {"batch": batch, "precision": "fp32" if recipe.precision == "fp32" else "bf16"}


@contextlib.contextmanager
def sizes_differ() -> Iterator[None]:
    """For pictures of any size: cuDNN does not try out each convolution's algorithms for every size that comes."""
    searching = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = searching


def validate(run: "Run") -> Evaluation:
    """The weights worth serving on the validation split, whole pictures at a single scale."""
    chosen = evaluation_options(run.recipe, run.processes)
    options = Options(split="val", base_size=run.recipe.base_size, **chosen)
    run.average.eval()
    try:
        with sizes_differ():
            return evaluate(run.checkpoint(), run.average, run.validation, options, run.device)
    finally:
        run.training_mode()


class Run:
    """One training run: what is trained, where it stands, and how to save and restore exactly that."""

    def __init__(self, recipe: Recipe, data: Path, out: Path, console: Console) -> None:
        self.recipe, self.out, self.console = recipe, out, console
        self.rank, self.processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if recipe.batch % (self.processes * recipe.accumulate):
            times = f" times accumulate={recipe.accumulate}" if recipe.accumulate > 1 else ""
            raise RecipeError(f"batch={recipe.batch} must be a multiple of the {self.processes} processes{times}")
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
        if recipe.precision == "fp16" and not cuda:
            raise RecipeError("precision=fp16 needs a CUDA device; use bf16 or fp32 here")
        if cuda:
            here, gpus = self.device.index + 1, torch.cuda.device_count()
            if here > gpus:
                raise RecipeError(
                    f"process {here} of this machine finds no GPU of its own, there are {gpus}; "
                    f"start {gpus} by --nproc-per-node"
                )
            torch.cuda.set_device(self.device)
            torch.backends.cudnn.benchmark = True
        if self.processes > 1 and not dist.is_initialized():
            init_process_group("nccl" if cuda else "gloo")

        self.validation = open_dataset(data, "val", recipe.layout)
        train = open_dataset(data, "train", recipe.layout)
        fill = [round(255 * value) for value in IMAGENET_MEAN]
        augmentation = recipe.augmentation()
        self.crops = TrainingCrops(train, augmentation, recipe.seed, fill, self.device, recipe.cache, recipe.workers)
        if self.rank == 0 and self.crops.cache != "off":
            self.validation = in_memory(self.validation)
        self.mean, self.std = (torch.tensor(values, device=self.device) for values in (IMAGENET_MEAN, IMAGENET_STD))
        self.steps_per_epoch = len(train) // recipe.batch
        if not self.steps_per_epoch:
            raise RecipeError(f"batch={recipe.batch} is more than the {len(train)} pictures of the train split")
        self.steps = self.steps_per_epoch * recipe.epochs
        self.classes, self.palette = train.classes, train.palette
        self.train_ids = hashlib.sha256("\n".join(train.ids).encode()).hexdigest()

        torch.manual_seed(recipe.seed)
        memory = torch.channels_last if recipe.channels_last else torch.contiguous_format
        self.network = EncNet(recipe.model_config(len(train.classes))).to(self.device, memory_format=memory)  # type: ignore[call-overload]
        self.average = copy.deepcopy(self.network).eval() if recipe.ema else self.network
        self.frozen: list[str] = []
        self.objective = encnet_loss
        self.model: nn.Module = self.network
        if self.processes > 1:
            self.network = sync_batchnorm.convert(self.network)  # type: ignore[assignment]
            self.model = self.parallel()
        if recipe.compile:
            self.network.compile()
            if self.processes == 1:  # with several, the loss talks to the others
                self.objective = torch.compile(encnet_loss)
        self.optimizer = make_optimizer(self.network, recipe)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=recipe.precision == "fp16")
        weights = class_weights(self.crops, len(self.classes), recipe.class_balance)
        self.class_weights = weights.to(self.device) if weights is not None else None
        self.step, self.best = 0, 0.0
        self.curves: dict[str, list[dict[str, float]]] = {"training": [], "validation": []}
        torch.manual_seed(recipe.seed + 1 + self.rank)

    def parallel(self) -> nn.Module:
        """The network under DDP; every process must call it."""
        return DistributedDataParallel(
            self.network, device_ids=[self.device.index] if self.device.type == "cuda" else None
        )

    def checkpoint(self, training: dict[str, Any] | None = None) -> Checkpoint:
        """The weights worth serving (averaged if the recipe averages) as a checkpoint."""
        recipe = self.recipe
        return Checkpoint(
            config=self.network.config,
            weights={key: value.contiguous().cpu().clone() for key, value in self.average.state_dict().items()},
            classes=self.classes,
            palette=self.palette,
            base_size=recipe.base_size,
            name=recipe.name,
            licence=recipe.licence,
            description=recipe.description,
            step=self.step,
            training=training,
        )

    def save(self) -> None:
        """Write last.pt from rank 0; every process must call it."""
        state = [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if self.device.type == "cuda" else [])]
        states: list[Any] = [state]
        if self.processes > 1:
            states = [None] * self.processes
            dist.all_gather_object(states, state)
        if self.rank:
            return
        training = {
            "recipe": dataclasses.asdict(self.recipe),
            "model": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": states,
            "best": self.best,
            "curves": self.curves,
            "group": group_id(),
            "train_ids": self.train_ids,
        }
        save_checkpoint(self.out / "last.pt", self.checkpoint(training))

    def check_finite(self, losses: Losses) -> None:
        """Raise RecipeError where the last step's loss or a weight is NaN or infinite; waits for a GPU."""
        loss = losses.total.item()
        advice = "lower learning_rate, raise warmup or set clip"
        if not math.isfinite(loss):
            raise RecipeError(f"the loss is {loss} at step {self.step}: {advice}")
        if not are_finite(self.network.state_dict()):
            raise RecipeError(f"weights are NaN or infinite at step {self.step}: {advice}")

    def start_from(self, checkpoint: Checkpoint) -> None:
        """Take another run's weights instead of random ones. Raises RecipeError where they are for another network.

        Dropout and stochastic depth may differ: a later stage may be trained with more or less of them.
        """
        theirs, ours = dataclasses.asdict(checkpoint.config), dataclasses.asdict(self.network.config)
        must_agree = [key for key in ours if key not in ("dropout", "drop_path")]
        differing = [f"{key}={theirs[key]} (here {ours[key]})" for key in must_agree if theirs[key] != ours[key]]
        if differing:
            raise RecipeError(f"--initial holds another network: {', '.join(differing)}")
        if self.rank == 0:
            evaluate_command.print_differing_names(checkpoint, self.classes, self.console)
        self.network.load_state_dict(checkpoint.weights)
        self.average.load_state_dict(checkpoint.weights)

    def take_backbone(self, found: BackboneWeights) -> None:
        """Start from these weights of the backbone instead of random ones."""
        self.network.backbone.load_state_dict(found.weights)
        self.average.backbone.load_state_dict(found.weights)
        if self.rank == 0:
            left_out = f", without {listing(found.left_out, 4)}" if found.left_out else ""
            self.console.print(f"the backbone starts from weights of a {found.backbone}{left_out}", highlight=False)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on where another process stopped.

        Raises DataError for another data set than the run was started with, RecipeError for another number of
        processes, and CheckpointError for a state that does not fit the run.
        """
        training = checkpoint.training
        assert training is not None
        if checkpoint.classes != self.classes:
            raise DataError(
                f"--resume: the run was started with the classes {listing(checkpoint.classes, 8)}, "
                f"the data set has {listing(self.classes, 8)}"
            )
        if training.get("train_ids", self.train_ids) != self.train_ids:
            raise DataError("--resume: the run was started with other pictures, or another order, in the train split")
        if len(training["random"]) != self.processes:
            raise RecipeError(
                f"this run was started with {len(training['random'])} processes; "
                f"resume it with as many, not with {self.processes}"
            )
        with fitting(self.out / "last.pt"):
            self.network.load_state_dict(training["model"])
            if self.recipe.ema:
                self.average.load_state_dict(checkpoint.weights)
            self.optimizer.load_state_dict(training["optimizer"])
            self.scaler.load_state_dict(training["scaler"])
            cpu, *cuda = training["random"][self.rank]
            torch.set_rng_state(cpu)
            for state in cuda:
                torch.cuda.set_rng_state(state)
        self.step, self.best = checkpoint.step, training["best"]
        self.curves = training.get("curves", self.curves)
        if self.rank == 0:
            self.console.print(f"continuing at step {self.step} of {self.steps}", highlight=False)

    def training_mode(self) -> None:
        """Everything learns but the frozen parts of the backbone."""
        self.network.train()
        hold(self.network.backbone, self.frozen)

    def freeze(self) -> None:
        """Freeze what the recipe keeps in the epoch at hand; every process must call it."""
        epoch = self.step // self.steps_per_epoch
        frozen = frozen_parts(self.recipe.freeze, self.recipe.unfreeze_every, epoch)
        if frozen == self.frozen:
            return
        self.frozen = frozen
        self.training_mode()
        if self.processes > 1:  # DDP averages the gradients that there were when it was made
            self.model = self.parallel()
        if self.rank == 0:
            text = f"frozen are {', '.join(frozen)}" if frozen else "all of the backbone is trained"
            self.console.print(f"epoch {epoch + 1}: {text}", highlight=False)

    def train_step(self, images: Tensor, masks: Tensor) -> Losses:
        """One optimizer step on uint8 (B, 3, H, W) and (B, H, W) on the device, in `accumulate` parts.

        Returns the losses of this process's crops; nothing here waits for a GPU.
        """
        self.freeze()
        factor = learning_rate_factor(self.step, self.steps, self.recipe)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_rate"] * factor
        count = self.recipe.accumulate
        shares = []
        for part, crops in enumerate(zip(images.chunk(count), masks.chunk(count), strict=True), start=1):
            # Until the last part the gradients stay with their process.
            parallel = self.model if isinstance(self.model, DistributedDataParallel) else None
            with parallel.no_sync() if parallel and part < count else contextlib.nullcontext():
                losses = self.losses_of(*crops, masks)
                self.scaler.scale(losses.total).backward()
            shares.append([value.detach() for value in losses])
        self.update_weights()
        return Losses(*(torch.stack(values).sum() for values in zip(*shares, strict=True)))

    def losses_of(self, images: Tensor, masks: Tensor, whole: Tensor) -> Losses:
        """Forward pass and losses of a part of a step's crops; whole: the masks of all parts."""
        recipe = self.recipe
        batch = normalise(images.permute(0, 2, 3, 1), self.mean, self.std)
        memory = torch.channels_last if recipe.channels_last else torch.contiguous_format
        half = HALF.get(recipe.precision)
        with torch.autocast(self.device.type, dtype=half, enabled=half is not None):
            outputs = self.model(batch.contiguous(memory_format=memory))
        return self.objective(
            outputs,
            masks,
            presence_weight=recipe.presence_weight,
            auxiliary_weight=recipe.auxiliary_weight,
            class_weights=self.class_weights,
            label_smoothing=recipe.label_smoothing,
            whole=whole,
        )

    def update_weights(self) -> None:
        """Step the optimizer with the gradients that were added up, and the averaged weights."""
        recipe = self.recipe
        if recipe.clip:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.network.parameters(), recipe.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if recipe.ema:
            update_average(self.average, self.network, recipe.ema, self.step)


def is_over(run: Run, until: float) -> bool:
    """Whether the time is up by the clock of the first process, for all of them."""
    over = time.monotonic() >= until
    if run.processes > 1 and until < math.inf:
        flag = torch.tensor(int(over), device=run.device)
        dist.broadcast(flag, 0)
        over = bool(flag)
    return over


def record_step(run: Run, epoch: int, values: dict[str, float], rate: float, writer: "SummaryWriter") -> None:
    """Keep what a step's losses were, by their names, and the rate in crops per second; print them off a terminal."""
    if not run.console.is_terminal:
        run.console.print(
            f"epoch {epoch}/{run.recipe.epochs} step {run.step}/{run.steps} loss {values['total']:.4f} "
            f"{rate:.1f} crops/s",
            highlight=False,
        )
    for key, value in values.items():
        writer.add_scalar(f"loss/{key}", value, run.step)
    writer.add_scalar("learning_rate", run.optimizer.param_groups[0]["lr"], run.step)
    writer.add_scalar("crops_per_second", rate, run.step)
    run.curves["training"].append({"step": run.step, **values, "crops_per_second": rate})


def record_validation(run: Run, epoch: int, writer: "SummaryWriter") -> None:
    """Validate, keep the figures and a few pictures, and write best.pt where mIoU and accuracy are the best yet."""
    result = validate(run)
    miou, accuracy = mean_iou(result.counts), pixel_accuracy(result.counts)
    run.console.print(
        f"epoch {epoch}: validation mIoU {100 * miou:.2f}, pixel accuracy {100 * accuracy:.2f}", highlight=False
    )
    writer.add_scalar("validation/mIoU", miou, run.step)
    writer.add_scalar("validation/pixel_accuracy", accuracy, run.step)
    run.curves["validation"].append({"step": run.step, "miou": miou, "pixel_accuracy": accuracy})
    write_curves(run.out, run.recipe.name, run.curves)
    for sample in result.samples[:SAMPLE_PICTURES]:
        row = sample_row(sample.image, sample.truth, sample.mask, run.palette)
        writer.add_image(f"validation/{sample.name}", row, run.step, dataformats="HWC")
    if (miou + accuracy) / 2 > run.best:
        run.best = (miou + accuracy) / 2
        save_checkpoint(run.out / "best.pt", run.checkpoint())


def train(run: Run, until: float = math.inf, asked: Sequence[int] = ()) -> bool:
    """From where the run stands to its end, saving, logging and evaluating on the way; whether the end was reached.

    until: a time of `time.monotonic()` at which to save and stop, looked at every `log_every` steps.
    asked: signals that were received; with one, the run saves and stops after its step.
    Raises RecipeError where the loss or a weight becomes NaN or infinite.
    """
    recipe, first = run.recipe, run.rank == 0
    sampler = StepSampler(
        len(run.crops), recipe.batch, recipe.epochs, recipe.seed, run.step, run.rank, run.processes, recipe.accumulate
    )
    writer = None
    if first:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(run.out / "events"), purge_step=run.step + 1)
    run.training_mode()
    with training_progress(run.console, recipe.epochs, "crops", first and run.console.is_terminal) as progress:
        bar = progress.add_task("", total=run.steps, completed=run.step, epoch=0, loss=math.nan, rate=0.0)
        since, since_step = time.monotonic(), run.step
        for images, masks in run.crops.batches(sampler):
            losses = run.train_step(images, masks)
            epoch = -(-run.step // run.steps_per_epoch)
            if writer and (run.step % recipe.log_every == 0 or run.step == run.steps):
                values = dict(zip(losses._fields, torch.stack(losses).tolist(), strict=True))  # waits for a GPU
                rate = (run.step - since_step) * recipe.batch / (time.monotonic() - since)
                since, since_step = time.monotonic(), run.step
                run.check_finite(losses)
                progress.update(bar, completed=run.step, epoch=epoch, loss=values["total"], rate=rate)
                record_step(run, epoch, values, rate, writer)
            at_epoch_end = run.step % run.steps_per_epoch == 0
            if writer and at_epoch_end and (epoch % recipe.evaluate_every == 0 or epoch == recipe.epochs):
                run.check_finite(losses)
                record_validation(run, epoch, writer)
                since, since_step = time.monotonic(), run.step
            over = bool(asked) or (run.step % recipe.log_every == 0 and is_over(run, until))
            stopping = over and run.step < run.steps
            if run.step % recipe.save_every == 0 or run.step == run.steps or stopping:
                run.check_finite(losses)
                run.save()
            if stopping:
                break
    if writer:
        writer.close()
    if run.step < run.steps:
        if first:
            why = "stopped" if asked else "time is up"
            run.console.print(f"{why} at step {run.step} of {run.steps}; --resume goes on", highlight=False)
        return False
    if first:
        save_checkpoint(run.out / "final.pt", run.checkpoint())
        run.console.print(f"wrote {run.out / 'final.pt'}", highlight=False)
    return True


def report(run: Run, data: Path) -> None:
    """The final weights' evaluation on the validation split, in final.evaluation/."""
    words = ["--split", "val", "--device", str(run.device)]
    for option, value in evaluation_options(run.recipe, run.processes).items():
        words += [f"--{option}", str(value)]
    words += ["--layout", run.recipe.layout] if run.recipe.layout else []
    arguments = evaluate_command.parser().parse_args([str(run.out / "final.pt"), "--data", str(data), *words])
    with sizes_differ():
        evaluate_command.run(arguments, run.console, run.console)


def check_data(root: Path, console: Console, layout: str) -> int:
    """Read every pair of every split that exists; print what is wrong; the number of broken pairs.

    The train and val splits must exist; test may be absent. A picture that is in two splits is told, and not broken.
    """
    broken, splits = 0, []
    for split in SPLITS:
        try:
            data = open_dataset(root, split, layout)
        except DataError as error:
            if split == "test" and not isinstance(error, BrokenList):
                continue
            console.print(str(error), highlight=False, soft_wrap=True)
            return 1
        with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
            for problem in progress.track(problems(data), total=len(data), description=f"checking {split}"):
                if problem:
                    broken += 1
                    console.print(problem, highlight=False, soft_wrap=True)
        console.print(f"{split}: {len(data)} pictures, {len(data.classes)} classes ({data.layout})", highlight=False)
        splits.append(data)
    for sentence in repeats(splits):
        console.print(f"note: {sentence}", highlight=False, soft_wrap=True)
    return broken


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m model.train",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
        epilog="options, given as key=value or in the recipe file (defaults shown):\n"
        + options_table()
        + "\n\nexample:\n  python -m model.train --data camvid --out runs/a "
        "--config model/recipes/camvid-resnet18c.toml epochs=50",
    )
    parser.add_argument("options", nargs="*", metavar="key=value", help="recipe options, see below")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="data set folder")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the run (made if absent)")
    parser.add_argument("--config", type=Path, metavar="FILE", help="recipe file (TOML)")
    parser.add_argument("--initial", type=Path, metavar="FILE", help="checkpoint whose weights the run starts from")
    parser.add_argument(
        "--backbone-weights", type=Path, metavar="FILE", help="ResNet weights (timm, torchvision, ...) to start from"
    )
    parser.add_argument("--resume", action="store_true", help="continue the run in --out exactly where it was saved")
    parser.add_argument(
        "--minutes", type=minutes, default=math.inf, metavar="N", help="save and stop after so long; --resume goes on"
    )
    parser.add_argument("--check-data", action="store_true", help="only check the data set, then stop")
    return parser.parse_intermixed_args(arguments)


def check_start(options: argparse.Namespace, last: Path) -> None:
    """Raise RecipeError where --resume and what a run starts from exclude each other, or do not fit the folder."""
    if options.out.exists() and not options.out.is_dir():
        raise RecipeError(f"--out {options.out}: is a file, not a folder")
    if last.exists() and not options.resume:
        raise RecipeError(f"{options.out} already holds a run; add --resume, or choose another folder")
    if options.resume and not last.exists():
        raise RecipeError(f"{last}: nothing to resume from")
    if options.initial and options.resume:
        raise RecipeError("--resume continues a run and --initial starts one; give one of them")
    if options.backbone_weights and (options.resume or options.initial):
        other = "--resume" if options.resume else "--initial"
        raise RecipeError(f"{other} brings a backbone of its own, and --backbone-weights another; give one of them")


def work(options: argparse.Namespace) -> int:
    """Check, set up, train, report; 1 where --check-data found something wrong, 128 + N after signal N, else 0.

    Raises RecipeError, DataError, CheckpointError and OSError.
    """
    started = time.monotonic()
    console = Console(soft_wrap=True, markup=False, emoji=False)
    run: Run | None = None
    try:
        given = read_recipe(options.config, options.options)
        if options.check_data:
            return 1 if check_data(options.data, console, Recipe(**given).layout) else 0
        if options.out is None:
            raise RecipeError("--out DIR is needed: the folder that receives the checkpoints")
        last = options.out / "last.pt"
        if last.exists() and group_id() and restarted((load_checkpoint(last).training or {}).get("group", "")):
            options.resume, options.initial, options.backbone_weights = True, None, None
        check_start(options, last)
        saved = load_checkpoint(last) if options.resume else None
        initial = load_checkpoint(options.initial) if options.initial else None
        recipe = continued(Recipe, last, saved.training, STATE, given, BOOKKEEPING) if saved else Recipe(**given)
        if (recipe.freeze or recipe.unfreeze_every) and not (saved or initial or options.backbone_weights):
            raise RecipeError(
                "freeze and unfreeze_every would keep random weights; give --backbone-weights or --initial"
            )
        backbone = None
        if options.backbone_weights:
            backbone = read_backbone_weights(options.backbone_weights, recipe.backbone)
        if int(os.environ.get("RANK", 0)) == 0 and check_data(options.data, console, recipe.layout):
            raise DataError(f"{options.data}: training does not start on a broken data set")
        options.out.mkdir(parents=True, exist_ok=True)
        run = Run(recipe, options.data, options.out, console)
        if saved:
            run.restore(saved)
        if initial:
            run.start_from(initial)
        if backbone:
            run.take_backbone(backbone)
        del saved, initial, backbone
        with contextlib.ExitStack() as stack:
            # Several processes are ended by torchrun, which does not wait until all of them have saved.
            asked = stack.enter_context(stop_signals()) if run.processes == 1 else []
            reached = train(run, started + 60 * options.minutes, asked)
        if asked and not reached:
            return 128 + asked[0]
        if reached and run.rank == 0:
            report(run, options.data)
    finally:
        if dist.is_available() and dist.is_initialized():
            # Before the group, what uses it: freed after it, a Reducer takes gloo's threads along and can wait forever.
            run = None
            gc.collect()
            dist.destroy_process_group()
    return 0


def main(arguments: list[str] | None = None) -> int:
    """The exit status; see `finish` and `work`."""
    return finish(partial(work, parse(arguments)), RecipeError, DataError, CheckpointError)


if __name__ == "__main__":
    sys.exit(main())
