"""Build the kernel's libraries into build/kernels/ with a C++ compiler alone: `python model/kernels/build.py`.

    libencnet_torch.so   for PyTorch: the kernel on OpenMP's threads
    libencnet_ort.so     for ONNX Runtime: the kernel as the custom op encnet::Encoding

Needs neither torch nor ONNX Runtime nor anything outside the standard library. What is up to date is left alone. Where
a library cannot be built the reason is printed and the exit status is still 0, because everything works without, only
slower. The compiler is $CXX, or g++.
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

FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti"]
FLAGS += ["-ffp-contract=fast", "-fno-math-errno", "-Wall", "-Wextra"]
LINK = ["-shared", "-static-libgcc", "-static-libstdc++", "-Wl,--no-undefined,--exclude-libs,ALL", "-s"]
X86_INSTRUCTIONS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mfma"],
}
HOSTS = {"torch": ["-fopenmp"], "ort": []}


class BuildError(Exception):
    """A library cannot be built; the message says why."""


class NoCompiler(BuildError):
    """There is none; the message says which was looked for."""


def instructions() -> dict[str, list[str]]:
    """Instruction sets to compile the kernel for, and the compiler's options for each."""
    return X86_INSTRUCTIONS if platform.machine() in ("x86_64", "AMD64") else {"baseline": []}


def compiler() -> list[str]:
    """$CXX or g++; raises NoCompiler where there is none."""
    command = shlex.split(os.environ.get("CXX", "g++")) or ["g++"]
    if shutil.which(command[0]) is None:
        raise NoCompiler(f"there is no C++ compiler here ({command[0]}); on Debian: apt-get install g++")
    return command


def run(command: list[str]) -> None:
    """Raises BuildError with the command's first complaint."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise BuildError(lines[0] if lines else f"{command[0]} ended with status {done.returncode}")


def compile_kernel(cxx: list[str], folder: Path, extra: list[str] | None = None) -> list[str]:
    """The kernel for every instruction set, and the choice among them, as object files in `folder`: their paths."""
    x86 = ["-DENCNET_X86"] if len(instructions()) > 1 else []
    sources = {name: ("encoding_cpu.cpp", options) for name, options in instructions().items()}
    objects = []
    for name, (source, options) in {**sources, "dispatch": ("cpu_dispatch.cpp", [])}.items():
        objects.append(str(folder / f"{name}.o"))
        macros = [*x86, f"-DENCNET_INSTRUCTIONS={name}"]
        run([*cxx, *FLAGS, *(extra or []), *macros, *options, "-c", str(SOURCES / source), "-o", objects[-1]])
    return objects


def link(cxx: list[str], host: str, objects: list[str], library: Path) -> None:
    """One host's library from its source and the kernel's objects, complete or not at all."""
    made = Path(objects[0]).with_name(library.name)
    run([*cxx, *FLAGS, *HOSTS[host], str(SOURCES / f"{host}_host.cpp"), *objects, *LINK, "-o", str(made)])
    made.replace(library)


def digest(cxx: list[str]) -> str:
    """What the libraries depend on: sources, this script, compiler and its version."""
    version = subprocess.run([*cxx, "--version"], capture_output=True).stdout
    files = [path for path in sorted(SOURCES.iterdir()) if path.suffix in (".h", ".cpp")]
    parts = [path.read_bytes() for path in [Path(__file__), *files]]
    return hashlib.sha256(b"\0".join([" ".join(cxx).encode(), version, *parts])).hexdigest()


def build(cxx: list[str]) -> bool:
    """Make the libraries that are missing or out of date; whether all are there now."""
    libraries = {host: OUTPUT / f"libencnet_{host}.so" for host in HOSTS}
    stamp = OUTPUT / "digest"
    wanted = digest(cxx)
    if stamp.exists() and stamp.read_text() == wanted and all(path.exists() for path in libraries.values()):
        return True
    print("building the Encoding kernels ...", flush=True)
    OUTPUT.mkdir(parents=True, exist_ok=True)
    for path in (stamp, *libraries.values()):
        path.unlink(missing_ok=True)  # a stale library is worse than none
    complete = True
    with tempfile.TemporaryDirectory(dir=OUTPUT) as folder:
        objects = compile_kernel(cxx, Path(folder))
        for host, path in libraries.items():
            try:
                link(cxx, host, objects, path)
            except BuildError as error:
                complete = False
                print(f"{path.name} is not built: {error}", file=sys.stderr)
    if complete:
        stamp.write_text(wanted)
    return complete


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quiet", action="store_true", help="say nothing where there is no compiler")
    parser.add_argument("--strict", action="store_true", help="end with status 1 where a library is missing")
    options = parser.parse_args()
    complete = False
    try:
        complete = build(compiler())
    except NoCompiler as error:
        if not options.quiet:
            print(f"the Encoding kernels are not built: {error}", file=sys.stderr)
    except (BuildError, OSError) as error:
        print(f"the Encoding kernels are not built: {error}", file=sys.stderr)
    return int(options.strict and not complete)


if __name__ == "__main__":
    sys.exit(main())
