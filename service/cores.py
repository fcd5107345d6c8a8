"""How many cores this process has, which in a container may be fewer than the machine's."""

import math
import os
from pathlib import Path

CONTROL_GROUP = Path("/sys/fs/cgroup")  # a container's own


def available() -> int:
    """The cores that this process may run on, but no more than its container is given the time of, rounded up."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return math.ceil(min(allowed, _share()))


def _share() -> float:
    """Of how many cores the container has the time; infinite where there is no limit."""
    # Version 2 of control groups, and version 1.
    for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            quota, period = " ".join((CONTROL_GROUP / file).read_text() for file in files).split()
        except OSError:
            continue
        return int(quota) / int(period) if quota not in ("max", "-1") else math.inf
    return math.inf
