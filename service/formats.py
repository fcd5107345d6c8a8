"""Temporary: the formats that exist."""

from typing import Any

from service.render import mask_png as mask_png
from service.render import overlay_jpeg as overlay_jpeg


def choose_format(accept: str | None, format_: str | None) -> str:
    """Temporary."""
    return format_ or ("png" if (accept or "").startswith("image/png") else "json")


def rle(mask: Any, classes: Any) -> Any:
    """Temporary."""


def polygons(mask: Any, classes: Any) -> Any:
    """Temporary."""


def npz(mask: Any, probabilities: Any, presence: Any, classes: Any) -> Any:
    """Temporary."""


def multipart_body(answer: bytes, png: bytes) -> Any:
    """Temporary."""
