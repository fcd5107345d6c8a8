"""What several commands read from their command lines."""

import argparse
import math


def positive_numbers(text: str) -> tuple[float, ...]:
    """Positive numbers separated by commas; raises argparse.ArgumentTypeError for anything else."""
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or not all(0 < number < math.inf for number in numbers):
        raise argparse.ArgumentTypeError(f"expected positive numbers separated by commas, got {text!r}")
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
