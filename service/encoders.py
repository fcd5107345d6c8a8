"""A segmentation for programs: COCO run lengths, NumPy arrays, and JSON and mask in one multipart body."""

import io
import secrets
import zipfile
from collections.abc import Callable, Sequence
from typing import IO, Any

import numpy as np
import pycocotools.mask

_ZIP_LEVEL = 1


def rle(mask: np.ndarray, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Label map -> one entry for each class that has pixels, with COCO's compressed run lengths, ready for JSON.

    `mask` is uint8 or uint16 (H, W); its dtype's largest value is no class and gets no entry. An entry has `class`,
    `id`, `segmentation` {`size`: [H, W], `counts`: text}, `area` in pixels and `bbox` [x, y, width, height].
    """
    height, width = mask.shape
    nobody = np.iinfo(mask.dtype).max
    flat = mask.ravel("F")  # COCO counts down the columns
    starts = np.flatnonzero(np.concatenate([[True], flat[1:] != flat[:-1]]))
    stops = np.append(starts[1:], flat.size)
    labels = flat[starts]
    by_label = np.argsort(labels, kind="stable")  # the runs of a class are neighbours then, still in order
    first_of_label = np.flatnonzero(np.diff(labels[by_label].astype(np.int64), prepend=-1))
    entries = []
    for runs in np.split(by_label, first_of_label[1:]):
        label = int(labels[runs[0]])
        if label == nobody:
            continue
        edges = np.column_stack([starts[runs], stops[runs]]).ravel()
        counts = np.diff(edges, prepend=0)  # outside, inside, outside, ...
        if edges[-1] < flat.size:
            counts = np.append(counts, flat.size - edges[-1])
        coded = pycocotools.mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
        entries.append(
            {
                "class": classes[label],
                "id": label,
                "segmentation": {"size": [height, width], "counts": coded["counts"].decode("ascii")},
                "area": int(pycocotools.mask.area(coded)),
                "bbox": [int(value) for value in pycocotools.mask.toBbox(coded)],
            }
        )
    return entries


def npz(
    mask: np.ndarray,
    probabilities: np.ndarray,
    presence: np.ndarray,
    classes: Sequence[str],
    abandoned: Callable[[], bool] = lambda: False,
) -> bytes:
    """A zip of .npy arrays that `numpy.load(file, allow_pickle=False)` reads.

    `mask` (H, W) as it is; `probabilities` (C, H, W) as float16, for it halves the largest part of the answer and is
    exact to 0.00025 (the label map is the argmax of the unrounded ones); `presence` float32 (C,); `classes` (C,) text.
    Once `abandoned`, what is returned is no whole file.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=_ZIP_LEVEL) as archive:
        for name, array in {
            "mask": mask,
            "presence": presence.astype(np.float32),
            "classes": np.array(classes),
        }.items():
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, array, allow_pickle=False)
        with archive.open("probabilities.npy", "w", force_zip64=True) as file:
            _write_float16(file, probabilities, abandoned)
    return buffer.getvalue()


def multipart(answer: bytes, png: bytes) -> tuple[bytes, str]:
    """A JSON text and a PNG file -> a multipart/mixed body with these two parts, and its content type."""
    boundary = secrets.token_hex(16)
    mark = f"--{boundary}".encode()
    body = b"\r\n".join(
        [
            mark,
            b"Content-Type: application/json",
            b"",
            answer,
            mark,
            b"Content-Type: image/png",
            b'Content-Disposition: attachment; filename="mask.png"',
            b"",
            png,
            mark + b"--",
            b"",
        ]
    )
    return body, f"multipart/mixed; boundary={boundary}"


def _write_float16(file: IO[bytes], array: np.ndarray, abandoned: Callable[[], bool]) -> None:
    """Write an array (C, H, W) as .npy of float16, a plane at a time so that no second copy of it is needed."""
    header = {"descr": "<f2", "fortran_order": False, "shape": array.shape}
    np.lib.format.write_array_header_1_0(file, header)
    for plane in array:
        if abandoned():
            return
        file.write(plane.astype("<f2").tobytes())
