"""What several commands read from their command lines."""

import argparse
import math
import re

import torch

from model.checkpoint import MOST_BASE_SIZE
from model.wording import first_line

LEAST_SCALE, MOST_SCALE = 0.1, 8.0
LEAST_SIDE = 8  # pixels, of views and windows


class DeviceError(ValueError):
    """A device that is not to be had here; the message says why."""


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


def pixels(text: str) -> int:
    """The long side of a view or the side of a window; raises argparse.ArgumentTypeError for none that can be."""
    if not text.isdecimal() or not LEAST_SIDE <= int(text) <= MOST_BASE_SIZE:
        raise argparse.ArgumentTypeError(
            f"expected a whole number of pixels, {LEAST_SIDE} to {MOST_BASE_SIZE}, got {text!r}"
        )
    return int(text)


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


def add_device(parser: argparse.ArgumentParser) -> None:
    """The option --device, whose text is for `choose_device`."""
    text = "auto, cpu, cuda or cuda:N; auto takes a GPU if there is one (default: %(default)s)"
    parser.add_argument("--device", default="auto", metavar="NAME", help=text)


def choose_device(name: str) -> torch.device:
    """The device of that name; "auto" is the GPU if there is one, else the CPU. Raises DeviceError for others."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise DeviceError(f"--device {name}: expected auto, cpu, cuda or cuda:N")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise DeviceError(f"--device {name}: not available here: {first_line(error)}") from error
    return device
