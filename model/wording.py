"""How messages put long things shortly, and what is text."""

from collections.abc import Iterable
from typing import Any


def is_text(value: Any) -> bool:
    """Whether it is a text that can be written as UTF-8: half of a surrogate pair cannot."""
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


def listing(items: Iterable[str], most: int = 20) -> str:
    """Comma-separated, the tail of a long list as a count."""
    items = list(items)
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


def first_line(error: Exception) -> str:
    """The first line of what an exception says, or the name of its type where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
