"""A folder that Triton serves as it is: the graph of `export.batched` with its configuration.

Triton joins requests into a batch along the first dimension of every input, and its ONNX Runtime backend then allows no
optional inputs: with the whole graph as it is, whose scales and flip have no such dimension, every request would run
alone. `probabilities` is left out because the backend fetches every output it knows of from the device at every run,
asked for or not. These facts are from the sources of Triton's core and of its onnxruntime_backend.
"""

import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy
import onnx

from export.batched import LEAST_SCALE, MOST_SCALE, batched_model, check_same
from export.errors import ExportError
from export.metadata import FORMAT
from export.parity import session_options
from model.checkpoint import MOST_BASE_SIZE, is_positive
from model.files import check_writable, replacing
from model.foreign import are_names
from model.kernels.build import OUTPUT as KERNELS
from model.wording import is_text

MAX_BATCH = 8
MAX_QUEUE = 64  # requests that wait
QUEUE_SECONDS = 30  # that one of them waits; the service's default too

CONFIG = """\
# Written by `python -m export`, and yours to tune: a later export into this folder keeps it.
name: "{name}"
backend: "onnxruntime"
max_batch_size: {max_batch}
input [
  {{
    name: "image"  # RGB, upright
    data_type: TYPE_UINT8
    dims: [ -1, -1, 3 ]
  }},
  {{
    name: "scales"  # of the views, {least:g} to {most:g}; at 1 the long side has {base_size} pixels
    data_type: TYPE_FP32
    dims: [ -1 ]
  }},
  {{
    name: "flip"  # whether to average with the mirrored views
    data_type: TYPE_BOOL
    dims: [ 1 ]
  }}
]
output [
  {{
    name: "mask"  # class id of every pixel
    data_type: {mask}
    dims: [ -1, -1 ]
  }},
  {{
    name: "presence"  # of every class in the picture, 0 to 1
    data_type: TYPE_FP32
    dims: [ {classes} ]
    label_filename: "labels.txt"
  }}
]
version_policy {{ latest {{ num_versions: 1 }} }}
{instances}
# What waits is run together, and nothing waits for company. A full queue refuses, as does a wait that is too long.
dynamic_batching {{
  max_queue_delay_microseconds: 0
  default_queue_policy {{
    timeout_action: REJECT
    default_timeout_microseconds: {queue_microseconds}
    allow_timeout_override: true
    max_queue_size: {max_queue}
  }}
}}
optimization {{
  input_pinned_memory {{ enable: true }}
  output_pinned_memory {{ enable: true }}
}}
# On a GPU: no exhaustive search for convolutions at every new picture size, and no hoarding of memory for them.
parameters {{ key: "cudnn_conv_algo_search" value {{ string_value: "1" }} }}
parameters {{ key: "arena_extend_strategy" value {{ string_value: "1" }} }}
{library}{warmup}"""

INSTANCES = "instance_group [ {{ count: 1 kind: {kind} }} ]"

LIBRARY = """\
model_operations {{ op_library_filename: {path} }}
"""

WARMUP = """\
model_warmup [ {{
  name: "{name}"
  batch_size: {batch}
  inputs {{ key: "image" value {{ data_type: TYPE_UINT8 dims: [ {height}, {width}, 3 ] random_data: true }} }}
  inputs {{ key: "scales" value {{ data_type: TYPE_FP32 dims: [ {scales} ] input_data_file: "scales" }} }}
  inputs {{ key: "flip" value {{ data_type: TYPE_BOOL dims: [ 1 ] input_data_file: "flip" }} }}
}} ]
"""


@dataclass(frozen=True)
class Facts:
    """What the configuration says about a model; `scales` and `flip` are its default views."""

    name: str
    classes: tuple[str, ...]
    base_size: int
    scales: tuple[float, ...]
    flip: bool


@dataclass(frozen=True)
class Written:
    """Where a model stands in the repository. `new`: this version was made now; `config_kept`: there was one before.

    `to_add`, `instances`: what the configuration that was kept lacks to use the compiled kernel, and what to put in the
    place of its instances for that; or nothing.
    """

    version: Path
    new: bool
    config_kept: bool
    to_add: str = ""
    instances: str = ""


def facts(whole: onnx.ModelProto, source: Path, name: str | None = None) -> Facts:
    """What a file says about itself, under another name if one is given.

    Raises ExportError for a file that is no whole graph of this command, or a damaged one.
    """
    values = {entry.key: entry.value for entry in whole.metadata_props}
    if not all(map(is_text, (*values, *values.values()))):  # protobuf gives what is not UTF-8 as bytes
        raise ExportError(f"{source}: its metadata is damaged: not all of it is text in UTF-8")
    if values.get("format") != FORMAT or values.get("graph") != "whole":
        kind = {"core": "holds the network alone", "batched": "comes from such a repository already"}
        found = kind.get(values.get("graph", ""), "was not written by `python -m export`")
        raise ExportError(f"{source}: {found}; a repository is made from a file with the whole graph")
    try:
        described = Facts(
            values["name"] if name is None else name,
            tuple(json.loads(values["classes"])),
            int(values["base_size"]),
            tuple(json.loads(values["scales"])),
            json.loads(values["flip"]),
        )
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise ExportError(f"{source}: its metadata is damaged: {error!r}") from error
    rules = (
        (are_names(described.classes), "classes"),
        (1 <= described.base_size <= MOST_BASE_SIZE, "base_size"),
        (described.scales and all(map(is_positive, described.scales)), "scales"),
        (isinstance(described.flip, bool), "flip"),
    )
    wrong = [key for holds, key in rules if not holds]
    if wrong:
        raise ExportError(f"{source}: its metadata is damaged: wrong values of {', '.join(wrong)}")
    shapes = {value.name: value.type.tensor_type.shape.dim for value in whole.graph.output}
    presence = [dimension.dim_value for dimension in shapes.get("presence", ())]
    if "mask" not in shapes or presence[1:] != [len(described.classes)]:
        raise ExportError(
            f"{source}: must have outputs mask and presence, the latter of {len(described.classes)} classes"
        )
    return described


def compiled_kernel() -> Path:
    """The library for NVIDIA GPUs, which holds the kernel for CPUs too, or that for CPUs; ExportError without."""
    for library in (KERNELS / "libencnet_ort_cuda.so", KERNELS / "libencnet_ort.so"):
        if library.exists():
            return library
    raise ExportError("there is no compiled kernel to put into the repository; `make kernels` builds it")


def config(described: Facts, model: onnx.ModelProto, library: str | None, kind: str) -> str:
    """The text of config.pbtxt. `library`: the kernel's path where Triton runs; `kind`: of the instances."""
    mask = next(value.type.tensor_type.elem_type for value in model.graph.output if value.name == "mask")
    height = described.base_size * 3 // 4
    shape = {"height": height, "width": described.base_size, "scales": len(described.scales)}
    return CONFIG.format(
        name=described.name,
        max_batch=MAX_BATCH,
        base_size=described.base_size,
        least=LEAST_SCALE,
        most=MOST_SCALE,
        mask="TYPE_UINT16" if mask == onnx.TensorProto.UINT16 else "TYPE_UINT8",
        classes=len(described.classes),
        instances=INSTANCES.format(kind=kind),
        queue_microseconds=QUEUE_SECONDS * 1_000_000,
        max_queue=MAX_QUEUE,
        library=LIBRARY.format(path=json.dumps(library)) if library else "",
        warmup="".join(
            WARMUP.format(name=name, batch=batch, **shape)
            for name, batch in (("one picture", 1), ("a full batch", MAX_BATCH))
        ),
    )


def check_repository(repository: Path) -> None:
    """Raise ExportError, or OSError, for a place where no repository can be, before any work is done."""
    if repository.exists() and not repository.is_dir():
        raise ExportError(f"--triton-repository {repository}: is a file, not a folder")
    if not repository.parent.is_dir():
        raise ExportError(f"--triton-repository {repository}: the folder {repository.parent} does not exist")
    check_writable(repository if repository.exists() else repository.parent)


def check_model(repository: Path, name: str, classes: Sequence[str], *, mount: str | None = None) -> None:
    """Raise ExportError where `write` could not put a model of this name into the repository."""
    check_repository(repository)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ExportError(
            f"the model's name {name!r} cannot be that of a folder in a repository: letters, digits, '.', '_' and '-' "
            "can; choose one with --name"
        )
    if mount:
        session_options(compiled_kernel())
    folder = repository / name
    labels = folder / "labels.txt"
    same = labels.is_file() and labels.read_bytes() == _labels(classes)
    if not same and folder.exists() and _holds_a_model(folder):
        raise ExportError(f"{folder}: is a model with other classes; give this one a name of its own with --name")


def _labels(classes: Sequence[str]) -> bytes:
    return "".join(" ".join(label.split()) + "\n" for label in classes).encode()


def _holds_a_model(folder: Path) -> bool:
    return any(path.name in ("labels.txt", "config.pbtxt") or path.name.isdecimal() for path in folder.iterdir())


def write(
    whole: onnx.ModelProto, source: Path, repository: Path, *, name: str | None = None, mount: str | None = None
) -> Written:
    """Put a whole graph into a repository: as a new model, or as the next version of the model of its name.

    The same graph as the newest version's is not written again. `mount`: where Triton finds the repository; with it
    the compiled kernel goes along. Raises ExportError for what cannot be put there and ParityError as `check_same`;
    nothing half-written is left, and what was there stays as it was.
    """
    described = facts(whole, source, name)
    check_model(repository, described.name, described.classes, mount=mount)
    library = compiled_kernel() if mount else None
    model = batched_model(whole)
    data = model.SerializeToString(deterministic=True)
    check_same(whole.SerializeToString(), data, library)

    files = {
        "labels.txt": _labels(described.classes),
        "warmup/scales": numpy.array(described.scales, numpy.float32).tobytes(),
        "warmup/flip": numpy.array(described.flip).tobytes(),
    }
    path = None
    if library:
        files[library.name] = library.read_bytes()
        path = f"{str(mount).rstrip('/')}/{described.name}/{library.name}"
    # On a GPU the kernel for CPUs would fetch the features from it and bring the result back, at every view.
    kind = "KIND_CPU" if library and "cuda" not in library.name else "KIND_AUTO"
    files["config.pbtxt"] = config(described, model, path, kind).encode()
    written = _place(repository, described.name, files, data)
    if library and path and written.config_kept:
        folder = repository / described.name
        _write(folder / library.name, files[library.name])
        lines = (folder / "config.pbtxt").read_text(encoding="utf-8", errors="replace").splitlines()
        said = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
        if path not in said:
            written = replace(written, to_add=LIBRARY.format(path=json.dumps(path)).strip())
        if kind == "KIND_CPU" and kind not in said:
            written = replace(written, instances=INSTANCES.format(kind=kind))
    return written


def _place(repository: Path, name: str, files: dict[str, bytes], model: bytes) -> Written:
    folder = repository / name
    if not folder.exists():
        repository.mkdir(exist_ok=True)
        with _staged(repository, folder) as stage:
            for path, content in {**files, "1/model.onnx": model}.items():
                _write(stage / path, content)
        return Written(folder / "1", new=True, config_kept=False)

    config_kept = (folder / "config.pbtxt").exists()
    if not config_kept:
        for path, content in files.items():  # the configuration last: it names the others
            _write(folder / path, content)
    newest = max((int(path.name) for path in folder.iterdir() if path.name.isdecimal()), default=0)
    if (folder / str(newest) / "model.onnx").is_file() and (folder / str(newest) / "model.onnx").read_bytes() == model:
        return Written(folder / str(newest), new=False, config_kept=config_kept)
    with _staged(folder, folder / str(newest + 1)) as stage:
        _write(stage / "model.onnx", model)
    return Written(folder / str(newest + 1), new=True, config_kept=config_kept)


@contextmanager
def _staged(parent: Path, target: Path) -> Iterator[Path]:
    """A folder to fill that becomes `target` when the block ends; nothing is left behind when it fails."""
    stage = Path(tempfile.mkdtemp(dir=parent, prefix="."))
    try:
        yield stage
        stage.chmod(0o755)
        stage.rename(target)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise


def _write(path: Path, content: bytes) -> None:
    if not path.parent.exists():
        path.parent.mkdir()
        path.parent.chmod(0o755)
    with replacing(path) as file:
        file.write(content)
