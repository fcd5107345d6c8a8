"""Training runs and their evaluations, worked off piece by piece: what is finished is not done again."""

import dataclasses
import json
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.command import ROOT, commit
from model.recipe import Recipe, read_recipe
from model.train import BOOKKEEPING

LEAST_SECONDS = 20  # with less left of a piece nothing new is begun
COMPILE_SECONDS = 130  # more than that, on a GPU: torch.compile may take so long before the first step
RESERVE_SECONDS = 15  # of a piece, to save and stop in
HANG_SECONDS = 40
INTERRUPTED = (130, -signal.SIGINT)  # exit statuses after Ctrl-C: where it is caught, and where it is not


class RunError(RuntimeError):
    """A run that did not end well; the message says which."""


@dataclass(frozen=True)
class Job:
    """A training run and what its final weights are evaluated on.

    name: its folder below the folder of all runs; data: the data set's folder; config: recipe file; options: key=value
    words for it; views: by a name, words for `model.evaluate`.
    """

    name: str
    data: Path
    config: Path
    options: tuple[str, ...]
    views: Mapping[str, tuple[str, ...]]

    def missing(self, root: Path) -> list[str]:
        """What is still to do, "training" and views."""
        folder = root / self.name
        views = [view for view in self.views if not (folder / view / "evaluation.json").exists()]
        return views if (folder / "final.pt").exists() else ["training", *views]

    def recipe(self) -> Recipe:
        """What the run is trained by."""
        return Recipe(**read_recipe(self.config, list(self.options)))

    def check(self, root: Path) -> None:
        """Raise RunError where the job's folder holds a run that was started with other options."""
        folder = root / self.name
        if not (folder / "last.pt").exists():
            return
        try:
            document = torch.load(folder / "last.pt", map_location="cpu", weights_only=True, mmap=True)
            stored = Recipe(**document["training"]["recipe"])
        except (RuntimeError, ValueError, KeyError, TypeError, EOFError, pickle.UnpicklingError) as error:
            raise RunError(f"{folder}: last.pt holds no run that can be compared with {self.name}") from error
        theirs, ours = dataclasses.asdict(stored), dataclasses.asdict(self.recipe())
        differing = [key for key in ours if theirs[key] != ours[key] and key not in BOOKKEEPING]
        if differing:
            listed = ", ".join(f"{key}={theirs[key]} (now {ours[key]})" for key in differing)
            raise RunError(f"{folder}: holds a run with {listed}; choose another --out")

    def totals(self, root: Path, view: str) -> dict[str, Any]:
        """The figures over all classes of a view that has been evaluated."""
        document = json.loads((root / self.name / view / "evaluation.json").read_text(encoding="utf-8"))
        return dict(document["totals"])


def run_facts(module: str, words: str, data: Path, config: Path, options: Sequence[str]) -> dict[str, Any]:
    """What a table of runs says beside its figures: command, commit, device, data set, and the recipe of every run.

    words: of the command, but for --data and --config; options: the key=value words that all runs have.
    """
    recipe = config.resolve()
    shown = recipe.relative_to(ROOT) if recipe.is_relative_to(ROOT) else recipe.name
    return {
        "command": f"python -m {module} --data {data.name} --config {shown} {words}",
        "commit": commit(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "data": data.resolve().name,
        "recipe": read_recipe(config, list(options)),
    }


def call(module: str, words: list[str], seconds: float) -> int | None:
    """Run `python -m module` with these words in a process of its own; its exit status, None where it was ended.

    Ctrl-C reaches that process too: KeyboardInterrupt is raised once it has saved and ended, and where it alone was
    interrupted. A second Ctrl-C ends it at once.
    """
    process = subprocess.Popen([sys.executable, "-m", module, *words], cwd=ROOT)
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    except KeyboardInterrupt:
        process.wait()
        raise
    finally:
        process.kill()  # does nothing to one that has ended
        process.wait()
    if status in INTERRUPTED:
        raise KeyboardInterrupt
    return status


def call_until(until: float, what: str, module: str, words: list[str], hangs: bool = True) -> bool:
    """Run `python -m module` with these words, ended HANG_SECONDS after `time.monotonic()` until; whether it was done.

    Raises RunError, which calls it `what`, where it fails, and where it `hangs` when it is not done by then.
    """
    status = call(module, words, until - time.monotonic() + HANG_SECONDS)
    if status is None and not hangs:
        print(f"{what} was ended with the time; it begins again", flush=True)
        return False
    if status != 0:
        ended = "hung and was ended" if status is None else f"failed with exit status {status}"
        raise RunError(f"{what} {ended}")
    return True


def advance(job: Job, root: Path, until: float) -> bool:
    """Go on with a job until it is finished or, by `time.monotonic()`, the time is up; whether it is finished.

    Training is told to save and stop in time and goes on from there at the next call. Raises RunError where the
    data are missing or a command fails, and where training hangs, which is ended HANG_SECONDS after its time.
    """
    if not job.data.is_dir():
        raise RunError(f"{job.name}: {job.data}: no such data folder")
    folder, data = root.resolve() / job.name, str(job.data.resolve())
    for step in job.missing(root):
        seconds = until - time.monotonic()
        compiles = step == "training" and torch.cuda.is_available() and job.recipe().compile
        if seconds < LEAST_SECONDS + COMPILE_SECONDS * compiles:
            return False
        if step == "training":
            module, resume = "model.train", ["--resume"] if (folder / "last.pt").exists() else []
            minutes = f"{max(seconds - RESERVE_SECONDS, 0) / 60:.2f}"
            words = ["--data", data, "--out", str(folder), "--config", str(job.config.resolve())]
            words += [*resume, "--minutes", minutes, *job.options]
        else:
            module = "model.evaluate"
            words = [str(folder / "final.pt"), "--data", data, "--output", str(folder / step), *job.views[step]]
            if layout := job.recipe().layout:
                words += ["--layout", layout]
        if not call_until(until, f"{job.name}: {step}", module, words, hangs=step == "training"):
            return False
        if step == "training" and not (folder / "final.pt").exists():
            return False
    return True


def work_off(jobs: Collection[Job], root: Path, until: float, tell: Callable[[], None]) -> None:
    """Go on with the jobs in their order, by `time.monotonic()` until the time is up for all that are not finished.

    `tell` is called when one is finished, and at the end. Raises RunError as `Job.check` and `advance` do.
    """
    root.mkdir(parents=True, exist_ok=True)
    for job in jobs:
        job.check(root)
    for job in jobs:
        if job.missing(root) and advance(job, root, until):
            tell()
    tell()


def told_stopped() -> int:
    """Say on standard error that Ctrl-C was the end; its exit status."""
    print("stopped; the same command goes on from here", file=sys.stderr)
    return 130


def refuse_seed(words: Sequence[str]) -> None:
    """Raise RunError where key=value words choose a seed, which the list of runs does; RecipeError for no options."""
    if "seed" in read_recipe(None, list(words)):
        raise RunError("every run has a seed of its own, from 0 on; leave seed= out")
