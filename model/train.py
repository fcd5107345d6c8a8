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
import gc
import math
import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import Progress

from model import evaluate as evaluate_command
from model.arguments import minutes
from model.backbone_weights import read_backbone_weights
from model.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from model.command import finish
from model.curves import write_curves
from model.data import SPLITS, DataError, open_dataset, problems, repeats
from model.figures import sample_row
from model.layouts.split import BrokenList
from model.metrics import mean_iou, pixel_accuracy
from model.pictures import StepSampler
from model.processes import group_id, restarted
from model.progress import training_progress
from model.recipe import Recipe, RecipeError, continued, options_table, read_recipe
from model.run import STATE, Run, evaluation_options, sizes_differ, validate
from model.stopping import stop_signals

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

BOOKKEEPING = {"cache", "workers", "log_every", "save_every", "evaluate_every"}
SAMPLE_PICTURES = 4


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
