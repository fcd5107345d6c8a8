"""What the parts of EncNet give: an FCN, + Encoding, + the SE-loss, all else equal, over several seeds.

    python -m benchmarks.ablation --data camvid --config model/recipes/ablation-camvid.toml --out runs/ablation-camvid
    python -m benchmarks.ablation --data msrc21 --config model/recipes/ablation-msrc21.toml --out runs/ablation-msrc21

Started again, it goes on where it was stopped; runs that are finished are not done again. After every run the table is
printed and everything so far is written to --output, OUT/ablation.json without it. Deltas are means over the seeds that
both variants have, of the differences between runs of the same seed, with their standard deviations.
"""

import math
import statistics
import sys
import time
from functools import partial
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.command import option_parser, write_json
from benchmarks.runs import Job, RunError, refuse_seed, run_facts, told_stopped, work_off
from model.arguments import at_least_one, minutes
from model.recipe import Recipe, RecipeError, read_recipe

VIEW = "test"
FOLDERS = {"FCN": "fcn", "+ Encoding": "encoding", "+ Encoding + SE-loss": "se"}
VARIANTS: dict[str, tuple[str, ...]] = {
    "FCN": ("encoding=false", "presence_weight=0"),
    "+ Encoding": ("presence_weight=0",),
    "+ Encoding + SE-loss": (),
}
FIGURES = ("miou", "pixel_accuracy", "class_accuracy", "presence_map")


def jobs(data: Path, config: Path, seeds: int, options: tuple[str, ...]) -> dict[tuple[str, int], Job]:
    """The runs by variant and seed, every variant once before the next seed."""
    found = {}
    for seed in range(seeds):
        for variant, words in VARIANTS.items():
            name, views = f"{FOLDERS[variant]}-{seed}", {VIEW: ("--split", "test", "--batch", "16")}
            found[variant, seed] = Job(name, data, config, (*options, *words, f"seed={seed}"), views)
    return found


def row(job: Job, root: Path, variant: str, seed: int) -> dict[str, Any]:
    """The figures of a finished run; presence is left out where nothing trained its head."""
    totals = job.totals(root, VIEW)
    figures = {key: totals[key] for key in FIGURES}
    if variant == "+ Encoding":
        figures["presence_map"] = None
    return {"variant": variant, "seed": seed, **figures}


def spread(values: list[float]) -> dict[str, float | int | None]:
    """Mean and sample standard deviation, None for that of a single value."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.mean(values), "std": deviation, "runs": len(values)}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation of every figure by variant, and the deltas of mIoU from each to all that follow."""
    by_variant: dict[str, dict[int, dict[str, Any]]] = {variant: {} for variant in VARIANTS}
    for one in rows:
        by_variant[one["variant"]][one["seed"]] = one
    means = {
        variant: {
            key: spread([one[key] for one in runs.values()])
            for key in FIGURES
            if all(one[key] is not None for one in runs.values())
        }
        for variant, runs in by_variant.items()
        if runs
    }
    deltas = {}
    for before, after in combinations(VARIANTS, 2):
        seeds = by_variant[before].keys() & by_variant[after].keys()
        if seeds:
            gains = [by_variant[after][seed]["miou"] - by_variant[before][seed]["miou"] for seed in sorted(seeds)]
            deltas[step(before, after)] = spread(gains)
    return {"means": means, "miou_deltas": deltas}


def step(before: str, after: str) -> str:
    """What a delta is called."""
    return f"{before} -> {after}"


def cell(figure: dict[str, Any] | None) -> str:
    if figure is None:
        return "–"
    deviation = "" if figure["std"] is None else f" ± {100 * figure['std']:.1f}"
    return f"{100 * figure['mean']:.1f}{deviation}"


def table(found: dict[str, Any], title: str) -> Table:
    shown = Table(title=title)
    first, *_ = VARIANTS
    shown.add_column("variant", no_wrap=True)
    gains = "over the row above", f"over {first}"
    for heading in ("runs", "mIoU %", *gains, "pixel acc. %", "class acc. %", "presence mAP %"):
        shown.add_column(heading, justify="right", min_width=max(map(len, heading.split())))
    above = {after: before for before, after in pairwise(VARIANTS)}

    def gain(before: str | None, after: str) -> str:
        delta = found["miou_deltas"].get(step(before, after)) if before else None
        return "" if delta is None else ("+" if delta["mean"] >= 0 else "") + cell(delta)

    for variant, figures in found["means"].items():
        cells = [cell(figures.get(key)) for key in FIGURES]
        over = gain(above.get(variant), variant), gain(first, variant)
        shown.add_row(variant, str(figures["miou"]["runs"]), cells[0], *over, *cells[1:])
    return shown


def write(
    output: Path, planned: dict[tuple[str, int], Job], root: Path, about: dict[str, Any], console: Console
) -> None:
    """Write and print what the finished runs say; nothing where none is finished."""
    rows = [row(job, root, *key) for key, job in planned.items() if not job.missing(root)]
    if not rows:
        return
    found = summary(rows)
    write_json(output, {**about, **found, "rows": rows})
    console.print(table(found, f"{about['data']}: {len(rows)} of {len(planned)} runs"))


def describe(data: Path, config: Path, options: tuple[str, ...], seeds: int) -> dict[str, Any]:
    words = " ".join(["--out runs/ablation", f"--seeds {seeds}", *options])
    return {**run_facts("benchmarks.ablation", words, data, config, options), "split": VIEW}


def main(arguments: list[str] | None = None) -> int:
    parser = option_parser("ablation", __doc__)
    parser.add_argument("options", nargs="*", metavar="key=value", help="options of model.train, for every run")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="data set folder")
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="recipe file (TOML)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of all runs")
    parser.add_argument(
        "--seeds", type=at_least_one, default=3, metavar="N", help="runs of each variant (default: %(default)s)"
    )
    parser.add_argument(
        "--minutes", type=minutes, default=math.inf, metavar="N", help="stop after so long (default: never)"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE.json", help="file for the figures (default: OUT/ablation.json)"
    )
    options = parser.parse_intermixed_args(arguments)
    until, words, console = time.monotonic() + 60 * options.minutes, tuple(options.options), Console()
    try:
        Recipe(**read_recipe(options.config, list(words)))
        refuse_seed(words)
        planned = jobs(options.data, options.config, options.seeds, words)
        about = describe(options.data, options.config, words, options.seeds)
        output = options.output or options.out / "ablation.json"
        tell = partial(write, output, planned, options.out, about, console)
        work_off(planned.values(), options.out, until, tell)
    except (RunError, RecipeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return told_stopped()
    return 0


if __name__ == "__main__":
    sys.exit(main())
