"""Made-up data sets in the project's folder layout."""

import json
from pathlib import Path

import numpy
from PIL import Image

COLOURS = [(200, 30, 30), (30, 200, 30), (30, 30, 200)]


def write_scenes(root: Path, pictures: int = 6, size: int = 48) -> Path:
    """Pictures of three coloured bands with noise; the colour is the class, and the bands move."""
    random = numpy.random.default_rng(0)
    for name in ("images", "labels", "splits"):
        (root / name).mkdir(parents=True, exist_ok=True)
    classes = [{"id": i, "name": f"band {i}", "color": list(colour)} for i, colour in enumerate(COLOURS)]
    (root / "classes.json").write_text(json.dumps({"classes": classes}))
    ids = [f"scene_{index}" for index in range(pictures)]
    for index, identifier in enumerate(ids):
        rows = (numpy.arange(size) + index * 5) // (size // 3) % 3
        mask = numpy.repeat(rows[:, None], size, axis=1).astype(numpy.uint8)
        image = numpy.array(COLOURS)[mask] + random.integers(-30, 30, (size, size, 3))
        Image.fromarray(image.clip(0, 255).astype(numpy.uint8)).save(root / "images" / f"{identifier}.png")
        Image.fromarray(mask).save(root / "labels" / f"{identifier}.png")
    for split, part in (("train", ids), ("val", ids[:2]), ("test", ids[:2])):
        (root / "splits" / f"{split}.txt").write_text("\n".join(part) + "\n")
    return root
