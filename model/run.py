"""A training run: what is trained, how it takes a step, where it stands, and how to save and restore exactly that."""

import contextlib
import copy
import dataclasses
import hashlib
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn

from model import sync_batchnorm
from model.backbone_weights import BackboneWeights
from model.checkpoint import IMAGENET_MEAN, IMAGENET_STD, Checkpoint, save_checkpoint
from model.data import DataError, open_dataset
from model.encnet import EncNet
from model.evaluate import print_differing_names
from model.evaluation import Evaluation, Options, evaluate
from model.fine_tuning import frozen_parts, hold, parameter_groups
from model.losses import Losses, encnet_loss
from model.pictures import TrainingCrops, in_memory
from model.predict import normalise
from model.processes import group_id, init_process_group
from model.recipe import Recipe, RecipeError
from model.weights import are_finite, fitting
from model.wording import listing

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
STATE = ("recipe", "model", "optimizer", "scaler", "random", "best")  # what `Run.restore` needs of a training state


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
            print_differing_names(checkpoint, self.classes, self.console)
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
