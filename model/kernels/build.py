"""Build the kernel's libraries into build/kernels/ with a C++ compiler alone: `python model/kernels/build.py`.

    libencnet_torch.so   for PyTorch: the kernel on OpenMP's threads
    libencnet_ort.so     for ONNX Runtime: the kernel as the custom op encnet::Encoding

Needs neither torch nor ONNX Runtime nor anything outside the standard library. What is up to date is left alone. Where a
library cannot be built the reason is printed and the exit status is still 0, because everything works without it: only
`--strict` makes that status 1. The compiler is $CXX, or g++.
"""

import argparse
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent
OUTPUT = SOURCES.parents[1] / "build" / "kernels"

FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti", "-fno-threadsafe-statics"]
FLAGS += ["-ffp-contract=fast", "-fno-math-errno", "-Wall", "-Wextra"]
LINK = ["-shared", "-static-libgcc", "-static-libstdc++", "-Wl,--no-undefined", "-s"]
X86_INSTRUCTIONS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mfma"],
}
HOSTS = {"torch": ["-fopenmp"], "ort": []}


class BuildError(Exception):
    """A library cannot be built; the message says why."""


def instructions() -> dict[str, list[str]]:
    """Instruction sets to compile the kernel for, and the compiler's options for each."""
    return X86_INSTRUCTIONS if platform.machine() in ("x86_64", "AMD64") else {"baseline": []}


def compiler() -> list[str]:
    """$CXX or g++; raises BuildError where there is none."""
    command = shlex.split(os.environ.get("CXX", "g++")) or ["g++"]
    if shutil.which(command[0]) is None:
        raise BuildError(f"there is no C++ compiler here ({command[0]}); on Debian: apt-get install g++")
    return command


def commands(cxx: list[str], host: str, library: Path, work: Path, extra: list[str]) -> list[list[str]]:
    """The compiler calls that make one host's library, in order; objects go to the folder `work`."""
    steps, objects = [], []

    def compile_to(name: str, source: str, options: list[str]) -> None:
        objects.append(str(work / f"{name}.o"))
        steps.append([*cxx, *FLAGS, *extra, *options, "-c", str(SOURCES / source), "-o", objects[-1]])

    x86 = ["-DENCNET_X86"] if len(instructions()) > 1 else []
    for name, options in instructions().items():
        compile_to(name, "encoding_cpu.cpp", [*x86, f"-DENCNET_INSTRUCTIONS={name}", *options])
    compile_to("dispatch", "cpu_dispatch.cpp", x86)
    compile_to(host, f"{host}_host.cpp", HOSTS[host])
    steps.append([*cxx, *extra, *objects, *LINK, *HOSTS[host], "-o", str(library)])
    return steps


def digest(cxx: list[str]) -> str:
    """What a library depends on: sources, this script, compiler and its version."""
    version = subprocess.run([*cxx, "--version"], capture_output=True).stdout
    parts = [path.read_bytes() for path in sorted(SOURCES.iterdir()) if path.suffix in (".h", ".cpp", ".py")]
    return hashlib.sha256(b"\0".join([version, *parts])).hexdigest()


def build(host: str, library: Path, cxx: list[str], extra: list[str] | None = None) -> None:
    """Make one library, complete or not at all. Raises BuildError with the compiler's first complaint."""
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as work:
        made = Path(work) / library.name
        for command in commands(cxx, host, made, Path(work), extra or []):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
                raise BuildError(lines[0] if lines else f"{command[0]} ended with status {done.returncode}")
        made.replace(library)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strict", action="store_true", help="end with status 1 where a library is missing")
    options = parser.parse_args()
    failed = False
    for host in HOSTS:
        library = OUTPUT / f"libencnet_{host}.so"
        stamp = library.with_suffix(".digest")
        try:
            cxx = compiler()
            wanted = digest(cxx)
            if library.exists() and stamp.exists() and stamp.read_text() == wanted:
                continue
            print(f"building {library.name} ...", flush=True)
            build(host, library, cxx)
            stamp.write_text(wanted)
        except (BuildError, OSError) as error:
            failed = True
            library.unlink(missing_ok=True)  # a stale library is worse than none
            print(f"{library.name} is not built: {error}\neverything works without it, only slower", file=sys.stderr)
    return int(failed and options.strict)


if __name__ == "__main__":
    sys.exit(main())
