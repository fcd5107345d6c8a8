"""What several commands read from their command lines."""

import argparse
import math

LEAST_SCALE, MOST_SCALE = 0.1, 8.0


def scales(text: str) -> tuple[float, ...]:
    """Scales separated by commas; raises argparse.ArgumentTypeError for anything else."""
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or not all(LEAST_SCALE <= number <= MOST_SCALE for number in numbers):
        raise argparse.ArgumentTypeError(
            f"expected scales from {LEAST_SCALE:g} to {MOST_SCALE:g}, separated by commas, got {text!r}"
        )
    return numbers


def minutes(text: str) -> float:
    """Minutes, 0 or more; raises argparse.ArgumentTypeError for anything else."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not number >= 0:
        raise argparse.ArgumentTypeError(f"expected minutes, 0 or more, got {text!r}")
    return number


def at_least_one(text: str) -> int:
    """A whole number, 1 or more; raises argparse.ArgumentTypeError for anything else."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number, at least 1, got {text!r}")
    return int(text)
