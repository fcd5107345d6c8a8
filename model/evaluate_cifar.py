"""Test error of a CIFAR-10 classifier: `python -m model.evaluate_cifar CHECKPOINT --data DIR`."""

import argparse
import sys
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from model.arguments import DeviceError, add_device, choose_device
from model.cifar import CLASSES, CifarEncNet, load_cifar
from model.cifar_data import open_cifar
from model.command import finish
from model.data import DataError
from model.train_cifar import predictions
from model.weights import CheckpointError


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m model.evaluate_cifar",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
        epilog="example:\n  python -m model.evaluate_cifar runs/cifar/final.pt --data cifar-10-batches-bin",
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="final.pt or last.pt of a run")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder of CIFAR-10")
    add_device(parser)
    return parser.parse_args(arguments)


def run(options: argparse.Namespace, console: Console) -> None:
    """Load, evaluate, print the table. Raises DeviceError, CheckpointError, DataError and OSError."""
    device = choose_device(options.device)
    checkpoint = load_cifar(options.checkpoint)
    _, test = open_cifar(options.data)
    network = CifarEncNet(checkpoint.variant)
    network.load_state_dict(checkpoint.weights)
    right = predictions(network.to(device), test.images.to(device), "fp32").cpu() == test.labels
    table = Table("class", "pictures", "error %")
    for index, name in enumerate(CLASSES):
        of_class = right[test.labels == index]
        share = f"{100 * (1 - of_class.double().mean().item()):.2f}" if len(of_class) else "-"
        table.add_row(name, str(len(of_class)), share)
    console.print(table)
    wrong = int(torch.count_nonzero(~right))
    console.print(
        f"{checkpoint.variant}, step {checkpoint.step}: test error {100 * wrong / len(right):.2f} % "
        f"({wrong} of {len(right)} pictures)"
    )


def main(arguments: list[str] | None = None) -> int:
    """The exit status; see `finish`."""
    work = partial(run, parse(arguments), Console(highlight=False))
    return finish(work, DeviceError, CheckpointError, DataError)


if __name__ == "__main__":
    sys.exit(main())
