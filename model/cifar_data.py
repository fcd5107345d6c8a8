"""CIFAR-10 in its own layouts, and the training crops."""

import pickle
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from numpy.random import Generator
from torch import Tensor
from torch.nn import functional as F

from model.cifar import CLASSES
from model.data import DataError
from model.pictures import send

SIDE, CHANNELS, PADDING = 32, 3, 4
RECORD = 1 + CHANNELS * SIDE * SIDE
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
BATCHES = ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch")
LAYOUTS = (("cifar-10-batches-bin", ".bin"), ("cifar-10-batches-py", ""))


class Pictures(NamedTuple):
    """images: uint8 (N, 3, 32, 32) RGB; labels: int64 (N,), indices into `model.cifar.CLASSES`."""

    images: Tensor
    labels: Tensor


def open_cifar(root: Path) -> tuple[Pictures, Pictures]:
    """The train and the test pictures under `root`, which is one of LAYOUTS' folders or holds one.

    Raises DataError where files are missing or are not what CIFAR-10's binary or Python version consists of.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such data folder")
    for name, suffix in LAYOUTS:
        for folder in (root / name, root):
            paths = [folder / f"{batch}{suffix}" for batch in BATCHES]
            missing = [path.name for path in paths if not path.is_file()]
            if len(missing) == len(paths):
                continue
            if missing:
                raise DataError(f"{folder}: CIFAR-10 lacks {', '.join(missing)}")
            *train, test = (read_binary(path) if suffix else read_python(path) for path in paths)
            return Pictures(*(torch.cat(parts) for parts in zip(*train, strict=True))), test
    raise DataError(
        f"{root}: no CIFAR-10; expected cifar-10-batches-bin with data_batch_1.bin to data_batch_5.bin and "
        "test_batch.bin, or cifar-10-batches-py with the same without .bin"
    )


def read_binary(path: Path) -> Pictures:
    """A file of records: the label in a byte, then 1024 bytes each of red, green and blue, row by row."""
    values = numpy.fromfile(path, dtype=numpy.uint8)
    if not len(values) or len(values) % RECORD:
        raise DataError(f"{path}: must be records of {RECORD} bytes, found {len(values)} bytes (cut short?)")
    records = values.reshape(-1, RECORD)
    return checked(path, records[:, 1:], records[:, 0])


class Inert(pickle.Unpickler):
    """Makes NumPy arrays and Python's own data, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("numpy", "ndarray"):
            return numpy.ndarray
        if (module, name) == ("numpy", "dtype"):
            return numpy.dtype
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return numpy.empty(0).__reduce__()[0]
        raise pickle.UnpicklingError(f"it would make a {module}.{name}")


def read_python(path: Path) -> Pictures:
    """A pickled dict: `data`, uint8 (N, 3072), and `labels`, a list. No code in the file is run."""
    try:
        with path.open("rb") as file:
            document = Inert(file, encoding="bytes").load()
        data, labels = numpy.asarray(document[b"data"]), numpy.asarray(document[b"labels"])
    except Exception as error:
        raise DataError(f"{path}: not readable as a batch of CIFAR-10's Python version: {error}") from error
    if data.dtype != numpy.uint8 or data.ndim != 2 or data.shape[1] != RECORD - 1 or labels.shape != data.shape[:1]:
        raise DataError(
            f"{path}: must hold data, uint8 (N, {RECORD - 1}), and N labels, "
            f"found {data.dtype} {data.shape} and {labels.shape}"
        )
    return checked(path, data, labels)


def checked(path: Path, pixels: numpy.ndarray, labels: numpy.ndarray) -> Pictures:
    """uint8 (N, 3072) and integers (N,) of a file as Pictures. Raises DataError for a label that is no class."""
    if labels.dtype.kind not in "iu" or not ((labels >= 0) & (labels < len(CLASSES))).all():
        raise DataError(f"{path}: labels must be 0..{len(CLASSES) - 1}, found {numpy.unique(labels)[-3:].tolist()}")
    images = torch.from_numpy(pixels.reshape(-1, CHANNELS, SIDE, SIDE).copy())
    return Pictures(images, torch.from_numpy(labels.astype(numpy.int64)))


def crops(images: Tensor, random: Generator) -> Tensor:
    """Mirror half of the pictures, pad them with 4 black pixels and cut 32x32 anywhere.

    images: uint8 (B, 3, 32, 32) on any device -> uint8 (B, 32, 32, 3).
    """
    count = len(images)
    top, left = random.integers(0, 2 * PADDING + 1, (2, count, 1))
    steps = numpy.arange(SIDE)
    columns = numpy.where(random.random((count, 1)) < 0.5, steps[::-1], steps)
    padded = F.pad(images, [PADDING] * 4)
    picture, y, x = (
        send(torch.from_numpy(numpy.ascontiguousarray(part)), images.device)
        for part in (numpy.arange(count)[:, None, None], (top + steps)[:, :, None], (left + columns)[:, None, :])
    )
    return padded[picture, :, y, x]
