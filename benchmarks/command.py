"""What the commands here share: how their options are read, where results lie, and the facts beside every figure."""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

from model.files import check_writable, replacing

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
STREET = ROOT / "examples" / "street.jpg"


def option_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """For `python -m benchmarks.NAME`, whose --help shows the description as it is."""
    return argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """The arguments of a study of a network on a data set: a checkpoint and --data."""
    parser.add_argument("checkpoint", type=Path, help="a checkpoint that `python -m model.evaluate` reads")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="the data set's folder")


def add_output(parser: argparse.ArgumentParser, name: str) -> None:
    """The option --output: a JSON file for the figures, by default of this name among the results."""
    text = f"file for the figures (default: benchmarks/results/{name})"
    parser.add_argument("--output", type=result_file, default=RESULTS / name, metavar="FILE.json", help=text)


def result_file(text: str) -> Path:
    """The file of an option --output, once it is known that `write_json` can make it: now, not after long work."""
    path = Path(text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        check_writable(path.parent)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{path}: its folder cannot be used: {error.strerror or error}") from None
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path}: it is a folder; name a file")
    return path


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write figures, whole or not at all; folders on the way are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(json.dumps(document, indent=1).encode() + b"\n")


def conclude(name: str, command: str, result: dict[str, Any]) -> NoReturn:
    """End a run whose result has `promises`: print which were kept, write the result, exit with 1 where one was not."""
    for promise, kept in result["promises"].items():
        print(f"{'kept  ' if kept else 'BROKEN'} {promise}")
    write_json(RESULTS / name, {**facts(command), **result})
    sys.exit(0 if all(result["promises"].values()) else 1)


def commit() -> str:
    """The commit that is checked out; empty where there is no git or no repository, as in a copy of the files."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    except OSError:
        return ""
    return done.stdout.strip()


def hardware() -> str:
    """Such as "2 CPU cores, x86_64"."""
    return f"{os.cpu_count()} CPU cores, {platform.machine()}"


def processor() -> str:
    """The processor's name, as Linux tells it."""
    try:
        found = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1].strip() if found else "unknown"


def facts(command: str) -> dict[str, Any]:
    """What made a result of the service: command, commit, machine, versions."""
    import onnxruntime  # here, as benchmarks of training do without it

    return {
        "command": command,
        "commit": commit(),
        "hardware": hardware(),
        "python": platform.python_version(),
        "onnxruntime": onnxruntime.__version__,
    }
