"""How a command ends: with a sentence and an exit status, whatever stopped it."""

import sys
from collections.abc import Callable

import torch

from model.wording import first_line

MISTAKE, INTERRUPTED = 2, 130


def finish(work: Callable[[], int | None], *mistakes: type[Exception]) -> int:
    """The exit status of a command whose work this is: what the work says, or after a sentence on standard error:

    2 for these mistakes, for a file that cannot be read or written, and for memory that does not suffice;
    130 where it was told to stop (Ctrl-C).
    """
    expected: tuple[type[Exception], ...] = (OSError, *mistakes)
    try:
        return work() or 0
    except expected as error:
        sentence, status = str(error), MISTAKE
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        advice = "a smaller batch, smaller crops or pictures, or half precision need less"
        sentence, status = f"memory does not suffice ({first_line(error)}): {advice}", MISTAKE
    except KeyboardInterrupt:
        sentence, status = "stopped before it was done", INTERRUPTED
    print(f"error: {sentence}", file=sys.stderr)
    return status


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this says that a GPU's memory, or the host's, was not enough."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
