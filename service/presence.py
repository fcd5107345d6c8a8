"""Which classes are in the picture: the scores of the network next to what the mask shows."""

from collections.abc import Sequence
from typing import Annotated

import numpy as np
from pydantic import Field
from typing_extensions import TypedDict

PresenceRow = TypedDict(
    "PresenceRow",
    {
        "class": Annotated[str, Field(description="Name of the class.")],
        "id": Annotated[int, Field(description="Its value in the mask.")],
        "score": Annotated[float, Field(description="Score of being in the scene, 0..1, from the Encoding branch.")],
        "present": Annotated[bool, Field(description="Whether the score reaches the threshold.")],
        "pixels": Annotated[int, Field(description="Pixels of the mask that have this class.")],
        "fraction": Annotated[float, Field(description="The same as a fraction of the picture, 0..1.")],
    },
)


def only_classes(mask: np.ndarray, ids: Sequence[int] | None) -> np.ndarray:
    """Label maps (..., H, W) with every other class replaced by the largest value of its dtype; None keeps all."""
    if ids is None:
        return mask
    other = np.iinfo(mask.dtype).max
    table = np.full(other + 1, other, mask.dtype)
    table[list(ids)] = ids
    return table[mask]


def presence_rows(
    mask: np.ndarray,
    presence: np.ndarray,
    classes: tuple[str, ...],
    threshold: float,
    ids: Sequence[int] | None = None,
) -> list[PresenceRow]:
    """One row for each class (of `ids`, where given), the highest score first.

    `mask` is uint8 or uint16 (H, W), `presence` float32 (C,) in 0..1, `threshold` the score from which on a class is
    present.
    """
    pixels = np.bincount(mask.ravel(), minlength=len(classes))
    rows: list[PresenceRow] = [
        {
            "class": name,
            "id": index,
            "score": float(presence[index]),
            "present": bool(presence[index] >= threshold),
            "pixels": int(pixels[index]),
            "fraction": int(pixels[index]) / mask.size,
        }
        for index, name in enumerate(classes)
        if ids is None or index in ids
    ]
    return sorted(rows, key=lambda row: -row["score"])
