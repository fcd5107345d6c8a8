"""How messages put long things shortly."""

from collections.abc import Iterable


def listing(items: Iterable[str], most: int = 20) -> str:
    """Comma-separated, the tail of a long list as a count."""
    items = list(items)
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


def first_line(error: Exception) -> str:
    """The first line of what an exception says, or the name of its type where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
