"""Build the CUDA kernels, check them against the float64 twin, measure them: `make gpu-check`, in under nine minutes.

Needs an NVIDIA GPU, PyTorch with CUDA and nvcc; every other package is optional, and what is missing is reported as
not run. Each part (benchmarks/gpu_parts.py) runs in a process of its own, so that one that fails or hangs leaves the
others alone; one whose time is up is cut, which is told as not run. Results are written to benchmarks/results/<name of
the GPU>.json as they come, and as a table at the end. With --only, the file's other parts are kept where they are
of the same code, machine and versions. The exit status is that of the parts that were run now: 0 where every check
passed, 1 where one failed, and 2 without a GPU or where nothing was run.
"""

import argparse
import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.command import RESULTS, ROOT, commit, option_parser, write_json
from model.files import replacing

# Parts in the order of their worth, with the most seconds each may take, and all together.
SECONDS = {
    "build": 200,
    "correctness": 90,
    "operator": 80,
    "memory": 25,
    "overhead": 20,
    "speed": 220,
    "onnx_runtime": 40,
    "service": 150,
    "sanitized": 240,
}
TOTAL_SECONDS = 520
SANITIZER = "compute-sanitizer"
SANITIZER_TOOLS = ("memcheck", "racecheck")
SANITIZER_FOUND = 9  # its exit status where it found an error
# torch cuts tensors out of blocks of 2 MB and more, and memcheck sees only what leaves a block: let each have its own.
WITHOUT_CACHE = "PYTORCH_NO_CUDA_MEMORY_CACHING=1"

CODE_FOLDERS = ("benchmarks", "export", "model", "service")
CODE_SUFFIXES = {".py", ".cpp", ".cu", ".h"}

Part = dict[str, Any]


def empty(**more: Any) -> Part:
    return {"checks": {}, "rows": [], "not_run": [], **more}


def run_command(command: list[str], seconds: float) -> tuple[int | None, str]:
    """Exit status (None: it took too long and was ended, with all it had started) and what it printed."""
    with tempfile.TemporaryFile("w+", errors="replace") as printed:
        process = subprocess.Popen(command, cwd=ROOT, stdout=printed, stderr=subprocess.STDOUT, start_new_session=True)
        status = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = process.wait(seconds)
        if status is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        printed.seek(0)
        return status, printed.read()


def build(seconds: float) -> Part:
    """Compile for the GPU that is here."""
    part = empty()
    if shutil.which("nvidia-smi") is None:
        part["not_run"].append("build: no nvidia-smi, so that the GPU's architecture is not known")
        return part
    status, printed = run_command([sys.executable, "model/kernels/build.py", "--strict"], seconds)
    if status is None:
        part["not_run"].append(f"build: cut after {seconds:.0f} s")
        return part
    words = printed.strip().splitlines()
    wrong = None if status == 0 else (words[-1][:300] if words else f"exit status {status}")
    part["checks"]["every library is built"] = wrong
    return part


def child(name: str, device: str, seconds: float, before: tuple[str, ...] = ()) -> Part:
    """One part in a process of its own; `before` is a program that watches over it.

    Where its time is up, that has not failed, but the part says so and what it was at; where it crashes, that has.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "part.json"
        inner = [
            sys.executable,
            "-m",
            "benchmarks.gpu_check",
            "--part",
            name,
            "--device",
            device,
            "--output",
            str(file),
        ]
        status, printed = run_command([*before, *inner], seconds)
        part: Part = json.loads(file.read_text()) if file.exists() else empty()
    under_way = part.pop("under_way", None)
    during = f", during: {under_way}" if under_way else ""
    if status is None:
        part["not_run"].append(f"{name}: cut after {seconds:.0f} s{during}")
    elif status:
        lines = printed.strip().splitlines()
        part["checks"][f"{name} ends well"] = f"exit status {status}{during}: {lines[-1][:300] if lines else ''}"
    return {**part, "exit_status": status, "printed": excerpt(printed)}


def excerpt(printed: str) -> str:
    """What is worth keeping of a program's output: its end, and the first that a sanitizer found."""
    lines = printed.strip().splitlines()
    found = [line for line in lines if line.startswith("=========")][:30]
    return "\n".join(line[:200] for line in [*found, *(line for line in lines[-15:] if line not in found)])


def sanitizer(device: str, seconds: float) -> Part:
    """The part `sanitized` under compute-sanitizer's tools."""
    program = shutil.which(SANITIZER) or shutil.which(f"/usr/local/cuda/bin/{SANITIZER}")
    if program is None:
        return empty(not_run=[f"sanitizer: no {SANITIZER}"])
    part = empty()
    until = time.monotonic() + seconds
    for done, tool in enumerate(SANITIZER_TOOLS):
        watched = (
            "env",
            WITHOUT_CACHE,
            program,
            "--tool",
            tool,
            "--report-api-errors",  # torch's own calls would count as errors
            "no",
            "--error-exitcode",
            str(SANITIZER_FOUND),
            "--kernel-regex",
            "kns=encode",
            "--kernel-regex",
            "kns=add_",
        )
        share = (until - time.monotonic()) / (len(SANITIZER_TOOLS) - done)
        found = child("sanitized", device, share, watched)
        judged = judge(tool, found)
        part["checks"] |= judged["checks"]
        part["not_run"] += judged["not_run"]
        part["printed"] = f"{part.get('printed', '')}--- {tool}\n{found['printed']}\n"
    return part


def judge(tool: str, found: Part) -> Part:
    """What a tool of the sanitizer says of the part it watched, which only its own lines and its exit status tell."""
    said = [line for line in found["printed"].splitlines() if re.match(r"=========\s+(?!COMPUTE-SANITIZER)\S", line)]
    errors = found["exit_status"] == SANITIZER_FOUND or any(re.search(r"\b[1-9]\d* error", line) for line in said)
    refusals = [line for line in said if "not supported" in line]
    if refusals and not errors:
        return empty(not_run=[f"{SANITIZER} {tool} does not work here: {refusals[0]}"])
    part = empty()
    cut = found["exit_status"] is None
    if said or not cut:
        clean = not cut and not errors and any(re.search(r"SUMMARY: .*\b0 errors", line) for line in said)
        first = said[0] if said else f"no summary, exit status {found['exit_status']}"
        part["checks"][f"{tool} finds no error"] = None if clean else first
    part["checks"] |= {f"{tool}: {name}": wrong for name, wrong in found["checks"].items()}
    part["not_run"] += [f"{tool}: {reason}" for reason in found["not_run"]]
    return part


def run_part(name: str, device: str, output: Path) -> int:
    """In the child: run one part and write what it found, also while it is under way."""
    from benchmarks import gpu_parts

    class Writing(gpu_parts.Report):
        def write(self, under_way: str | None = None) -> None:
            with replacing(output) as file:  # the parent may end this process at any time
                file.write(json.dumps({**self.plain(), "under_way": under_way}).encode())

        def check(self, name: str):  # type: ignore[no-untyped-def]
            self.write(name)
            return super().check(name)

        def add(self, **row: Any) -> None:
            super().add(**row)
            self.write()

    report = Writing()
    try:
        gpu_parts.PARTS[name](device, report)
    finally:
        report.write()
    return 0


# -------------------------------------------------------------------------------------------------------- report


def columns(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def speed_table(rows: list[Part]) -> str:
    """Milliseconds on the GPU alone, the ratio of each contender to ours, and the share of the copy's rate."""
    lines = [["pass", "x", "N", "ours ms", "called ms", "twin", "compiled", "broadcast", "of copy rate"]]
    for row in rows:
        if row["what"] != "speed":
            continue
        ratio = {key: row.get(f"{key}_over_ours_gpu_ms", "") for key in ("twin", "compiled", "broadcast")}
        lines.append(
            [
                row["pass"],
                f"{row['dtype']} {row['layout']}",
                str(row["positions"]),
                str(row.get("ours_gpu_ms", "")),
                str(row.get("ours_ms", "")),
                *(f"{value}x" if value else "-" for value in ratio.values()),
                f"{row['share_percent']} %" if "share_percent" in row else "-",
            ]
        )
    return columns(lines) if len(lines) > 1 else "no speed was measured"


def table(result: dict[str, Any]) -> str:
    lines = []
    for name, part in result["parts"].items():
        failed = {check: wrong for check, wrong in part["checks"].items() if wrong is not None}
        first = f"; first failure: {part['first_failure']}" if failed else ""
        lines.append(f"{name}: {len(part['checks']) - len(failed)} of {len(part['checks'])} checks passed{first}")
        lines += [f"    FAILED {check}: {wrong}" for check, wrong in failed.items()]
        lines += [f"    not run: {reason}" for reason in part["not_run"]]
        for row in part["rows"]:
            if row["what"] not in ("speed", "error"):
                lines.append("    " + ", ".join(f"{key} {value}" for key, value in row.items()))
    rows = [row for part in result["parts"].values() for row in part["rows"]]
    worst: dict[str, list[float]] = {}
    for row in rows:
        if row["what"] == "error":
            errors = [row[key] for key in ("encoded", "grad_x", "grad_codewords", "grad_scale")]
            worst[row["dtype"]] = [max(pair) for pair in zip(worst.get(row["dtype"], [0] * 4), errors, strict=True)]
    for dtype, errors in worst.items():
        lines.append(f"largest relative errors, {dtype}: " + ", ".join(f"{error:.1e}" for error in errors))
    return "\n".join([*lines, "", speed_table(rows)])


def code_digest() -> str:
    """Of all code here: a copy of the files has no commit, and a checkout may have been edited since its own."""
    found = hashlib.sha256()
    for path in sorted(path for folder in CODE_FOLDERS for path in (ROOT / folder).rglob("*")):
        if path.suffix in CODE_SUFFIXES:
            found.update(path.read_bytes())
    return found.hexdigest()[:16]


def describe_machine(gpu: str) -> dict[str, Any]:
    import torch

    def last_line(*command: str) -> str:
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            return ""
        lines = done.stdout.strip().splitlines()
        return lines[-1] if lines else ""

    return {
        "command": "make gpu-check",
        "commit": commit(),
        "code": code_digest(),
        "gpu": gpu,
        "driver": last_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "nvcc": last_line(os.environ.get("NVCC", "nvcc"), "--version"),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def earlier_parts(output: Path, machine: dict[str, Any]) -> dict[str, Part]:
    """The parts that an earlier call left in the file; none, and a line about it, where they are of another machine."""
    if not output.exists():
        return {}
    try:
        document = json.loads(output.read_text(encoding="utf-8"))
        differing = [key for key, value in machine.items() if document[key] != value]
        parts: dict[str, Part] = document["parts"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"{output}: begun anew, as it holds no results of this command: {error!r}", flush=True)
        return {}
    if differing:
        print(f"{output}: begun anew, as what it holds is of another {', '.join(differing)}", flush=True)
        return {}
    return parts


def check(device: str, gpu: str, output: Path, only: list[str]) -> int:
    """Run the parts, write and print what they find; 1 where a check failed, 2 where nothing was run."""
    started = time.monotonic()
    machine = describe_machine(gpu)
    parts = earlier_parts(output, machine) if only else {}
    chosen = only or list(SECONDS)
    output.parent.mkdir(parents=True, exist_ok=True)
    for name, most in SECONDS.items():
        if name not in chosen:
            continue
        seconds = min(most, TOTAL_SECONDS - (time.monotonic() - started))
        begun = time.monotonic()
        if seconds < 5:
            part = empty(not_run=[f"{name}: no time was left"])
        elif name == "build":
            part = build(seconds)
        elif name == "sanitized":
            part = sanitizer(device, seconds)
        else:
            part = child(name, device, seconds)
        part["seconds"] = round(time.monotonic() - begun, 1)
        failed = [check for check, wrong in part["checks"].items() if wrong is not None]
        part["first_failure"] = failed[0] if failed else None  # an error of CUDA's makes all that follow fail, too
        parts[name] = part
        result = {**machine, "parts": {known: parts[known] for known in SECONDS if known in parts}}
        write_json(output, result)
        print(f"{name}: {part['seconds']} s, {len(part['checks'])} checks, {len(failed)} failed", flush=True)
    print(table(result))
    print(f"written to {output}")
    run_now = [parts[name] for name in chosen]
    if not any(part["checks"] or part["rows"] for part in run_now):
        return 2
    return int(any(part["first_failure"] for part in run_now))


def main() -> int:
    parser = option_parser("gpu_check", __doc__)
    parser.add_argument("--only", nargs="+", choices=list(SECONDS), default=[], metavar="PART", help=", ".join(SECONDS))
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="instead of benchmarks/results/<GPU>.json")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # what this command tells its own children
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        return run_part(options.part, options.device, options.output)
    try:
        import torch
    except ImportError:
        print("PyTorch is needed to check the CUDA kernels, and it is not installed here", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("no NVIDIA GPU is visible to PyTorch here; run this on a machine with one", file=sys.stderr)
        return 2
    gpu = torch.cuda.get_device_name(0)
    output = options.output or RESULTS / f"{re.sub(r'[^a-z0-9]+', '-', gpu.lower()).strip('-')}.json"
    return check("cuda", gpu, output, options.only)


if __name__ == "__main__":
    sys.exit(main())
