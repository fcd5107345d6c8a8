"""Build the kernels' libraries into build/kernels/ with compilers alone: `python model/kernels/build.py`.

    libencnet_torch.so      for PyTorch on CPUs: the kernel on OpenMP's threads
    libencnet_ort.so        for ONNX Runtime on CPUs: the kernel as the custom op encnet::Encoding
    libencnet_cuda.so       for PyTorch on NVIDIA GPUs
    libencnet_ort_cuda.so   for ONNX Runtime on NVIDIA GPUs

The last two are built where nvidia-smi shows a GPU, for that GPU; with --cuda also where there is none, for every
architecture from sm_80 on (several minutes on few cores), or for those named, as in --cuda 90. Needs neither torch nor
ONNX Runtime nor anything outside the standard library. What is up to date is left alone. Where a library cannot be
built the reason is printed and the exit status is still 0, because everything works without, only slower. The compilers
are $CXX, or g++, and $NVCC, or nvcc.
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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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

CUDA_HOSTS = ["cuda", "ort_cuda"]
CUDA_ARCHITECTURES = ["80", "86", "89", "90", "100", "120"]  # of the fat library, which adds PTX of first and last
LEAST_ARCHITECTURE = 80
NVCC_FLAGS = ["-std=c++17", "-O3", "-cudart", "static"]
NVCC_HOST_FLAGS = ["-fPIC", "-fvisibility=hidden", "-Wall"]
NVCC_PLACES = ("nvcc", "/usr/local/cuda/bin/nvcc")
ELEMENTS = {"float32": "float", "float16": "Half", "bfloat16": "BFloat"}
PASSES = ("forward", "backward")

Objects = Callable[[Path], list[str]]  # compiles into a folder; paths of the object files
Link = Callable[[str, list[str], Path], None]  # links one host's library from them


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


def digest(compiler: list[str], *more: str) -> str:
    """What libraries depend on: sources, this script, compiler and its version, and what else is given."""
    version = subprocess.run([*compiler, "--version"], capture_output=True).stdout
    files = [path for path in sorted(SOURCES.iterdir()) if path.suffix in (".h", ".cpp", ".cu")]
    parts = [path.read_bytes() for path in [Path(__file__), *files]]
    return hashlib.sha256(b"\0".join([" ".join([*compiler, *more]).encode(), version, *parts])).hexdigest()


def update(title: str, hosts: list[str], stamp: Path, wanted: str, objects: Objects, link: Link) -> bool:
    """Make the libraries of these hosts where one is missing or out of date; whether all are there now."""
    libraries = {host: OUTPUT / f"libencnet_{host}.so" for host in hosts}
    if stamp.exists() and stamp.read_text() == wanted and all(path.exists() for path in libraries.values()):
        return True
    print(f"building {title} ...", flush=True)
    OUTPUT.mkdir(parents=True, exist_ok=True)
    for path in (stamp, *libraries.values()):
        path.unlink(missing_ok=True)  # a stale library is worse than none
    complete = True
    with tempfile.TemporaryDirectory(dir=OUTPUT) as folder:
        made = objects(Path(folder))
        for host, path in libraries.items():
            try:
                link(host, made, path)
            except BuildError as error:
                complete = False
                print(f"{path.name} is not built: {error}", file=sys.stderr)
    if complete:
        stamp.write_text(wanted)
    return complete


def build(cxx: list[str]) -> bool:
    """The libraries for CPUs; whether all are there now."""
    return update(
        "the Encoding kernels",
        list(HOSTS),
        OUTPUT / "digest",
        digest(cxx),
        lambda folder: compile_kernel(cxx, folder),
        lambda host, objects, path: link(cxx, host, objects, path),
    )


# ------------------------------------------------------------------------------------------------------------ CUDA


def visible_architectures() -> list[str]:
    """Compute capabilities of the GPUs that nvidia-smi shows here, such as "90", as far as the kernels run on them."""
    try:
        command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    found = {line.strip().replace(".", "") for line in done.stdout.splitlines()} if done.returncode == 0 else set()
    return sorted((cap for cap in found if cap.isdigit() and int(cap) >= LEAST_ARCHITECTURE), key=int)


def cuda_compiler() -> list[str]:
    """$NVCC or nvcc; raises NoCompiler where there is none."""
    command = shlex.split(os.environ.get("NVCC", ""))
    for candidate in [command] if command else [[place] for place in NVCC_PLACES]:
        if shutil.which(candidate[0]):
            return candidate
    raise NoCompiler(
        f"there is no CUDA compiler here ({command[0] if command else 'nvcc'}); it is in NVIDIA's CUDA toolkit"
    )


def architecture_flags(architectures: list[str]) -> list[str]:
    """Machine code for each, and PTX of the first and the last, from which a driver compiles for all others."""
    codes = [f"arch=compute_{cap},code=sm_{cap}" for cap in architectures]
    codes += [f"arch=compute_{cap},code=compute_{cap}" for cap in dict.fromkeys((architectures[0], architectures[-1]))]
    return [part for code in codes for part in ("-gencode", code)]


def nvcc_command(nvcc: list[str]) -> list[str]:
    cxx = shlex.split(os.environ.get("CXX", ""))
    return [*nvcc, *NVCC_FLAGS, "-Xcompiler", ",".join(NVCC_HOST_FLAGS), *(["-ccbin", cxx[0]] if cxx else [])]


def kernel_units() -> dict[str, list[str]]:
    """encoding_cuda.cu's compilations: a name for each and the macros that choose it."""
    return {
        f"{name}_{when}": [
            f"-DENCNET_ELEMENT={element}",
            f"-DENCNET_BACKWARD={number}",
            f"-DENCNET_KERNELS=cuda_{when}_{name}",
        ]
        for number, when in enumerate(PASSES)
        for name, element in ELEMENTS.items()
    }


def compile_cuda(nvcc: list[str], architectures: list[str], folder: Path) -> list[str]:
    """The kernels for every type, pass and architecture as object files in `folder`, with one compiler per core."""
    units = {name: [*macros, str(SOURCES / "encoding_cuda.cu")] for name, macros in kernel_units().items()}
    units["cuda_dispatch"] = [str(SOURCES / "cuda_dispatch.cpp")]
    common = [*nvcc_command(nvcc), *architecture_flags(architectures)]
    commands = [[*common, *unit, "-c", "-o", str(folder / f"{name}.o")] for name, unit in units.items()]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(run, commands))
    return [command[-1] for command in commands]


def link_cuda(nvcc: list[str], host: str, objects: list[str], library: Path) -> None:
    made = Path(objects[0]).with_name(library.name)
    sources = []
    if host == "ort_cuda":  # holds the CPU kernel as well
        sources = [str(SOURCES / "ort_cuda_host.cpp"), *compile_kernel(compiler(), made.parent)]
    run([*nvcc_command(nvcc), "-shared", *sources, *objects, "-Xlinker", "--exclude-libs,ALL", "-o", str(made)])
    made.replace(library)


def build_cuda(nvcc: list[str], architectures: list[str]) -> bool:
    """The libraries for NVIDIA GPUs of these architectures; whether all are there now."""
    return update(
        f"the Encoding kernels for CUDA (sm_{', sm_'.join(architectures)})",
        CUDA_HOSTS,
        OUTPUT / "digest-cuda",
        digest(nvcc, *architectures),
        lambda folder: compile_cuda(nvcc, architectures, folder),
        lambda host, objects, path: link_cuda(nvcc, host, objects, path),
    )


# ------------------------------------------------------------------------------------------------------------------


def attempt(title: str, make: Callable[[], bool], quiet: bool) -> bool:
    """Whether `make` made everything; what stopped it is printed."""
    try:
        return make()
    except NoCompiler as error:
        if not quiet:
            print(f"{title} are not built: {error}", file=sys.stderr)
    except (BuildError, OSError) as error:
        print(f"{title} are not built: {error}", file=sys.stderr)
    return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quiet", action="store_true", help="say nothing where there is no compiler")
    parser.add_argument("--strict", action="store_true", help="end with status 1 where a library is missing")
    parser.add_argument(
        "--cuda",
        nargs="?",
        const=",".join(CUDA_ARCHITECTURES),
        metavar="CAP,CAP",
        help="build for CUDA also where no GPU is visible, for these compute capabilities (%(const)s)",
    )
    options = parser.parse_args()
    complete = attempt("the Encoding kernels", lambda: build(compiler()), options.quiet)
    architectures = options.cuda.split(",") if options.cuda else visible_architectures()
    if architectures:
        title = "the Encoding kernels for CUDA"
        complete &= attempt(title, lambda: build_cuda(cuda_compiler(), architectures), options.quiet)
    return int(options.strict and not complete)


if __name__ == "__main__":
    sys.exit(main())
