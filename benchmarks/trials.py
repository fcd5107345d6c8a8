"""What a change of a recipe gives: the recipe as it is, and each trial beside it, all else equal.

    python -m benchmarks.trials --data msrc21 --config model/recipes/msrc21-resnet18c.toml --out runs/trials \\
        --base "epochs=16" "class_balance=0" "drop_path=0.1" "jitter=0 gamma=0 white_balance=0"

A trial is one or several options of model.train in quotes. Recipes are chosen by the validation split; the test split
is told beside it. Started again, it goes on where it was stopped, and trials may be added: runs that are finished are
not done again. After every run the table is printed and everything so far is written to OUT/trials.json. Gains are
means over the seeds of the differences between runs of the same seed, with their standard deviations.
"""

import math
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.ablation import cell, spread
from benchmarks.command import option_parser, write_json
from benchmarks.runs import Job, RunError, refuse_seed, run_facts, told_stopped, work_off
from model.arguments import at_least_one, minutes
from model.recipe import RecipeError

AS_IT_IS = "the recipe"
SPLITS = ("val", "test")


def jobs(data: Path, config: Path, base: str, trials: list[str], seeds: int) -> dict[tuple[str, int], Job]:
    """The runs by trial and seed, every trial once before the next seed."""
    views = {split: ("--split", split, "--batch", "16") for split in SPLITS}
    found = {}
    for seed in range(seeds):
        for trial in (AS_IT_IS, *trials):
            changes = [] if trial == AS_IT_IS else trial.split()
            name = "+".join(sorted(changes) or ["recipe"])
            options = (*base.split(), *changes, f"seed={seed}")
            found[trial, seed] = Job(f"{name}-{seed}", data, config, options, views)
    return found


def summary(planned: dict[tuple[str, int], Job], root: Path) -> list[dict[str, Any]]:
    """For each trial with a finished run: mIoU on each split, and its gain over the recipe with the same seeds."""
    miou: dict[str, dict[int, dict[str, float]]] = {}
    for (trial, seed), job in planned.items():
        if not job.missing(root):
            miou.setdefault(trial, {})[seed] = {split: job.totals(root, split)["miou"] for split in SPLITS}
    reference = miou.get(AS_IT_IS, {})
    rows = []
    for trial, runs in miou.items():
        row: dict[str, Any] = {"trial": trial}
        for split in SPLITS:
            row[split] = spread([run[split] for run in runs.values()])
            gains = [runs[seed][split] - reference[seed][split] for seed in sorted(runs.keys() & reference.keys())]
            row[f"{split}_gain"] = spread(gains) if gains and trial != AS_IT_IS else None
        rows.append(row)
    return rows


def write(planned: dict[tuple[str, int], Job], root: Path, about: dict[str, Any], console: Console) -> None:
    """Write and print what the finished runs say; nothing where none is finished."""
    rows = summary(planned, root)
    if not rows:
        return
    write_json(root / "trials.json", {**about, "trials": rows})
    done = sum(row[SPLITS[0]]["runs"] for row in rows)
    shown = Table(title=f"{about['data']}: {done} of {len(planned)} runs")
    for heading in ("trial", "runs", *(f"{split} {what}" for split in SPLITS for what in ("mIoU %", "gain"))):
        shown.add_column(heading, justify="left" if heading == "trial" else "right")
    for row in rows:
        cells = [cell(row[key]) for split in SPLITS for key in (split, f"{split}_gain")]
        shown.add_row(row["trial"], str(row[SPLITS[0]]["runs"]), *cells)
    console.print(shown)


def main(arguments: list[str] | None = None) -> int:
    parser = option_parser("trials", __doc__)
    parser.add_argument("trials", nargs="+", metavar='"key=value ..."', help="what to change, for each trial")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="data set folder")
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="recipe file (TOML)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of all runs")
    parser.add_argument("--base", default="", metavar='"key=value ..."', help="options for every run, as epochs=16")
    text = "runs of each trial (default: %(default)s)"
    parser.add_argument("--seeds", type=at_least_one, default=1, metavar="N", help=text)
    text = "stop after so long (default: never)"
    parser.add_argument("--minutes", type=minutes, default=math.inf, metavar="N", help=text)
    options = parser.parse_intermixed_args(arguments)
    until, console = time.monotonic() + 60 * options.minutes, Console()
    try:
        for words in (options.base, *options.trials):
            refuse_seed(words.split())
        if not all(trial.split() for trial in options.trials):
            raise RunError('a trial is one or several options in quotes, as "class_balance=0"; one is empty')
        planned = jobs(options.data, options.config, options.base, options.trials, options.seeds)
        for job in planned.values():
            job.recipe()
        quoted = " ".join(f'"{trial}"' for trial in options.trials)
        words = f'--out runs/trials --seeds {options.seeds} --base "{options.base}" {quoted}'
        about = run_facts("benchmarks.trials", words, options.data, options.config, options.base.split())
        tell = partial(write, planned, options.out, about, console)
        work_off(planned.values(), options.out, until, tell)
    except (RunError, RecipeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return told_stopped()
    return 0


if __name__ == "__main__":
    sys.exit(main())
