"""Everything that is to be trained on one GPU, in pieces: `make gpu-train`, again and again until it is finished.

Each call goes on where the last one stopped. It begins nothing that --minutes leaves too little time for, training
stops and saves in time, what hangs is ended soon after, and what fails (exit status 2) leaves the rest alone.
The runs, in order: the best network for CamVid and for MSRC-21, what reference_positions gives the first of them, the
ablation on both data sets, and both best networks with other seeds, for their figures alone. OUT/RUN holds a run as
model.train and model.evaluate leave it; OUT/results is what is worth carrying away, small files only: figures and
their means over the seeds, curves, contact sheets and the ablation's tables of what is finished, and the weights of
the first seed in files of at most 15 MB (benchmarks/split_weights.py joins them).
"""

import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks import ablation
from benchmarks.command import ROOT, option_parser, write_json
from benchmarks.runs import Job, RunError, advance, call_until, refuse_seed, told_stopped
from benchmarks.split_weights import split
from model.arguments import minutes
from model.recipe import RecipeError

RECIPES = ROOT / "model" / "recipes"
PIECE_MINUTES = 9.0
COMPARISON_SECONDS = 120  # with less left of a piece the comparison is not begun
SEEDS = 3
MAIN = ("camvid", "msrc21")
COMPARED = "camvid"
COMPARISON = "reference-positions"
VIEWS = {
    "test": ("--split", "test", "--batch", "8"),
    "test-scales": ("--split", "test", "--batch", "8", "--scales", "0.75,1,1.25,1.5", "--flip"),
}
FILES = ("curves.json", "curves.png", "test/evaluation.json", "test/contact_sheet.png", "test-scales/evaluation.json")


def main_jobs(data: Path, options: tuple[str, ...], seed: int = 0) -> dict[str, Job]:
    """The best networks' runs by data set; the weights of those with seed 0 are kept."""
    return {
        name: Job(
            f"{name}-{seed}" if seed else name,
            data / name,
            RECIPES / f"{name}-gpu.toml",
            (*options, f"seed={seed}"),
            VIEWS,
        )
        for name in MAIN
    }


def main_figures(data: Path, out: Path, options: tuple[str, ...]) -> dict[str, Any]:
    """What is known of the best networks: figures of every finished run, and mean and deviation over its seeds."""
    seeds = [main_jobs(data, options, seed) for seed in range(SEEDS)]
    runs: dict[str, Any] = {}
    means: dict[str, Any] = {}
    for name in MAIN:
        done = [jobs[name] for jobs in seeds if not jobs[name].missing(out)]
        found = {job.name: {view: job.totals(out, view) for view in VIEWS} for job in done}
        runs |= found
        if found:
            means[name] = {
                view: {key: ablation.spread([run[view][key] for run in found.values()]) for key in ablation.FIGURES}
                for view in VIEWS
            }
    return {"runs": runs, "means": means}


def ablation_jobs(name: str, data: Path, options: tuple[str, ...]) -> dict[tuple[str, int], Job]:
    return ablation.jobs(data / name, RECIPES / f"ablation-{name}.toml", SEEDS, options)


def collect(job: Job, out: Path) -> None:
    """What is worth carrying away of a finished run."""
    target = out / "results" / job.name
    if (target / FILES[-1]).exists():
        return
    split(out / job.name / "final.pt", target / "weights")
    for name in FILES:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(out / job.name / name, target / name)


def compare_factor(data: Path, out: Path, until: float) -> None:
    """What reference_positions gives the finished run, where there is time for it."""
    output = out / "results" / f"{COMPARISON}.json"
    if output.exists() or until - time.monotonic() < COMPARISON_SECONDS:
        return
    words = [str((out / COMPARED / "final.pt").resolve()), "--data", str((data / COMPARED).resolve())]
    words += ["--batch", "8", "--output", str(output.resolve())]
    call_until(until, COMPARISON, "benchmarks.reference_positions", words)


def piece(
    data: Path, out: Path, options: tuple[str, ...], until: float, console: Console
) -> tuple[list[str], list[str]]:
    """Go on with the list until it is finished or the time is up; what is not finished, by name, and what failed."""
    best = main_jobs(data, options).values()
    ablations = {name: ablation_jobs(name, data, options) for name in MAIN}
    work = [(job, out) for job in best]
    work += [(job, out / f"ablation-{name}") for name, planned in ablations.items() for job in planned.values()]
    work += [(job, out) for seed in range(1, SEEDS) for job in main_jobs(data, options, seed).values()]
    for job, folder in work:
        job.check(folder)
    failed: list[str] = []
    for job, folder in work:
        try:
            if job.missing(folder):
                folder.mkdir(parents=True, exist_ok=True)
                if not advance(job, folder, until):
                    continue  # later ones may have room: only what is compiled needs minutes
            if job in best:
                collect(job, out)
            if job.name == COMPARED:
                compare_factor(data, out, until)
        except RunError as error:
            failed.append(str(error))
            print(f"error: {error}", file=sys.stderr, flush=True)
    for name, planned in ablations.items():
        folder = out / f"ablation-{name}"
        if folder.exists():
            about = ablation.describe(data / name, RECIPES / f"ablation-{name}.toml", options, SEEDS)
            ablation.write(out / "results" / f"ablation-{name}.json", planned, folder, about, console)
    left = [str((folder / job.name).relative_to(out)) for job, folder in work if job.missing(folder)]
    return left if (out / "results" / f"{COMPARISON}.json").exists() else [*left, COMPARISON], failed


def main(arguments: list[str] | None = None) -> int:
    parser = option_parser("gpu_train", __doc__)
    parser.add_argument("options", nargs="*", metavar="key=value", help="options of model.train, for every run")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder with camvid/ and msrc21/")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--minutes", type=minutes, default=PIECE_MINUTES, metavar="N", help="default: %(default)s")
    options = parser.parse_intermixed_args(arguments)
    until = time.monotonic() + 60 * options.minutes
    words, results = tuple(options.options), options.out / "results"
    try:
        if torch.cuda.is_available():
            subprocess.run([sys.executable, "model/kernels/build.py", "--quiet"], cwd=ROOT)
        refuse_seed(words)
        left, failed = piece(options.data, options.out, words, until, Console())
        figures = main_figures(options.data, options.out, words)
        write_json(results / "runs.json", {"left": left, "failed": failed, **figures})
    except (RunError, RecipeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return told_stopped()
    print(f"{len(left)} parts are not finished; the same command goes on" if left else f"all is in {results}")
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
