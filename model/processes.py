"""Processes started by torchrun: how they find each other, and whether they are a restarted group."""

import os
import time
from datetime import timedelta
from pathlib import Path
from uuid import uuid4

import torch.distributed as dist

MEETING_SECONDS = 600.0
LONGEST_WAIT = timedelta(hours=1)  # of processes for the first one, which validates alone; NCCL's own is 10 minutes
NO_NAME = "none"


def group_id() -> str:
    """What torchrun calls the group, the same after a restart and on every node; "" without torchrun.

    A group of one node that was given no name has that of torchrun's folder of logs, which it makes at every start.
    """
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    logs = os.environ.get("TORCHELASTIC_ERROR_FILE", "")  # FOLDER/attempt_N/LOCAL_RANK/error.json
    if name == NO_NAME and logs and os.environ.get("GROUP_WORLD_SIZE") == "1":
        return Path(logs).parents[2].name
    return name


def restarted(last_group: str) -> bool:
    """Whether a run's last checkpoint, which names the group that wrote it, is of this group before a restart.

    Of several nodes without a name, one that was started again is told by torchrun's count of restarts, which is that
    of a node.
    """
    counted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    return last_group == group_id() and (counted or last_group != NO_NAME)


def init_process_group(backend: str) -> None:
    """Initialise torch.distributed from torchrun's environment variables, also in a group that was restarted.

    torchrun gives a restarted group the store of the one before it, where a process may find the addresses of dead
    ones and wait for them. Here the group first agrees on a name, under which it keeps everything. Every other process
    says hello with a number of its own; the first one answers whatever hellos it finds, until all have heard it.
    """
    store, rank, size = next(dist.rendezvous("env://"))
    if rank:
        number = uuid4().hex
        store.set(f"hello/{rank}", number)
        name = store.get(f"answer/{number}").decode()
        store.set(f"heard/{name}/{rank}", "")
    else:
        name, others = uuid4().hex, range(1, size)
        until = time.monotonic() + MEETING_SECONDS
        while not store.check([f"heard/{name}/{other}" for other in others]):
            if time.monotonic() > until:
                raise TimeoutError(f"not all of {size} processes have met within {MEETING_SECONDS:.0f} seconds")
            for other in others:
                if store.check([f"hello/{other}"]):
                    store.set(f"answer/{store.get(f'hello/{other}').decode()}", name)
            time.sleep(0.02)
    dist.init_process_group(
        backend, store=dist.PrefixStore(name, store), rank=rank, world_size=size, timeout=LONGEST_WAIT
    )
