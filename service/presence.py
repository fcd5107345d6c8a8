"""Which classes are in the picture: the scores of the network next to what the mask shows."""

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


def presence_rows(
    mask: np.ndarray, presence: np.ndarray, classes: tuple[str, ...], threshold: float
) -> list[PresenceRow]:
    """One row for each class, the highest score first.

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
    ]
    return sorted(rows, key=lambda row: -row["score"])
