"""Weights out of files whoever made them: read without running code from them, and checked key by key."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from model.wording import first_line, listing

NUMPY_MAKERS: list[Any] = [numpy.float64(0).__reduce__()[0], numpy.empty(0).__reduce__()[0]]
# What numpy scalars and arrays are pickled as; making one runs no code of the file.
INERT_NUMPY: list[Any] = [
    numpy.ndarray,
    numpy.dtype,
    *(getattr(numpy.dtypes, name) for name in numpy.dtypes.__all__),
    *(
        (function, f"numpy.{package}.multiarray.{function.__name__}")
        for function in NUMPY_MAKERS
        for package in ("core", "_core")
    ),
]

# Keys of mmsegmentation's `meta`, read in foreign.py.
DESCRIBING = ("cfg", "config", "dataset_meta", "CLASSES", "PALETTE")

REAL = {  # types of weights
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
}


class CheckpointError(ValueError):
    """A file that is no usable checkpoint; the message says what is wrong with it."""


def are_finite(state: Mapping[str, Tensor]) -> bool:
    """Whether no floating-point tensor has a NaN or an infinity; on a GPU it is waited for once."""
    return bool(torch.stack([value.isfinite().all() for value in state.values() if value.is_floating_point()]).all())


@contextmanager
def fitting(path: Path) -> Iterator[None]:
    """Make a CheckpointError about the file of what restoring a training state in it raises that does not fit."""
    try:
        yield
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: its training state does not fit the run: {first_line(error)}") from error


def read_pickle(path: Path) -> Any:
    """The object in a .pt / .pth file, tensors on the CPU; code in the file is never run.

    Besides what torch allows, numpy's scalars and arrays are read: training scripts leave them beside the weights.
    Raises CheckpointError, which for an object of another class says how to get the weights out.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        with torch.serialization.safe_globals(INERT_NUMPY):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        message = str(error).strip()
        refused = re.search(r"GLOBAL ([\w.]+)", message)
        if refused:
            raise CheckpointError(
                f"{path}: refused, because besides weights it holds an object of class {refused[1]}, and making one "
                "runs that class's code; where its library is installed, and if you trust the file, save only the "
                "weights and what describes them, and give names of classes that are not among it with --classes: "
                'python -c "import torch; '
                f"d = torch.load({str(path.absolute())!r}, map_location='cpu', weights_only=False); "
                "m = isinstance(d, dict) and d.get('meta') or {}; "
                "torch.save({'state_dict': d.state_dict() if hasattr(d, 'state_dict') else d.get('state_dict', d), "
                f"'meta': {{k: m[k] for k in {DESCRIBING} if k in m}}}}, 'weights.pth')\""
            ) from error
        advice = "weights_only"  # torch's advice to load it unsafely, which is not ours
        reason = message.splitlines()[0] if message and advice not in message else type(error).__name__
        raise CheckpointError(
            f"{path}: not readable as a PyTorch checkpoint (truncated, or no checkpoint): {reason}"
        ) from error


def check_state(
    expected: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    unknown: Iterable[str] = (),
    name: Callable[[str], str] = str,
) -> None:
    """Raise ValueError unless the weights are the expected ones by key and shape, dense and finite.

    Batch norms' counters may be missing. unknown: keys known to be left over; name: what to call a key in the message.
    """
    missing = [name(key) for key in expected if key not in weights and not key.endswith("num_batches_tracked")]
    left_over = [*unknown, *(name(key) for key in weights if key not in expected)]
    odd = [key for key, value in weights.items() if not _is_dense(value)]
    fitting = {key: value for key, value in weights.items() if key in expected and key not in odd}
    shapes = [
        f"{name(key)} (expected {tuple(expected[key].shape)}, got {tuple(value.shape)})"
        for key, value in fitting.items()
        if expected[key].shape != value.shape
    ]
    broken = [name(key) for key, value in fitting.items() if not value.isfinite().all()]
    raise_for(
        ("missing keys", missing),
        ("left-over keys", left_over),
        ("no dense tensors of real numbers", [name(key) for key in odd]),
        ("wrong shapes", shapes),
        ("NaN or infinite", broken),
    )


def _is_dense(value: Any) -> bool:
    if not isinstance(value, Tensor):
        return False
    return value.dtype in REAL and value.layout == torch.strided and value.device.type != "meta"


def raise_for(*findings: tuple[str, list[str]]) -> None:
    """Raise ValueError that lists the items of every finding (title, items) that has some."""
    problems = [f"{title}: {listing(items)}" for title, items in findings if items]
    if problems:
        raise ValueError("; ".join(problems))
