"""Memory that a call needs for a while, beyond what it is given and returns. Linux with the GNU C library only."""

import ctypes
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # benchmarks of serving do without it
    from torch import Tensor

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def kilobytes(entry: str) -> int:
    """A line of this process's status, such as VmRSS: resident memory, or VmHWM: its peak."""
    found = re.search(rf"{entry}:\s+(\d+) kB", STATUS.read_text())
    assert found
    return int(found[1])


def forget_peak() -> None:
    """Let the peak of resident memory begin anew from what is resident now."""
    CLEAR.write_text("5")


def extra_kilobytes(call: "Callable[[], Tensor | tuple[Tensor, ...]]", times: int = 4) -> int:
    """Peak of resident memory during the call, less what was resident before and the tensors it returns.

    The least of several calls: pages of code that are read for the first time, or anew, count as resident too.
    """
    return min(_extra_kilobytes(call) for _ in range(times))


def _extra_kilobytes(call: "Callable[[], Tensor | tuple[Tensor, ...]]") -> int:
    ctypes.CDLL(None).malloc_trim(0)  # else the call could live on memory that was freed but not given back
    forget_peak()
    before = kilobytes("VmRSS")
    result = call()
    returned = result if isinstance(result, tuple) else (result,)
    return kilobytes("VmHWM") - before - sum(tensor.nbytes for tensor in returned) // 1024
