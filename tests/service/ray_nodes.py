"""A real Ray cluster of several nodes on this machine, each a raylet of its own, for tests that need one."""

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MEMORY = 200_000_000  # bytes of each node's object store, of which next to nothing is used

# Scale by the load of the last second, as no test can wait for that of ten; where nodes share one machine, only the
# head's proxy may have the port.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.5",
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.5",
}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@contextmanager
def nodes(cpus_of_head: int, *cpus_of_others: int) -> Iterator[tuple[Any, list[Any]]]:
    """A cluster, this process connected to it, and its nodes, the head first."""
    import ray
    from ray.cluster_utils import Cluster

    before = {name: os.environ.get(name) for name in (*ENVIRONMENT, "RAY_SERVE_WORKER_PROXY_HTTP_PORT")}
    os.environ.update(ENVIRONMENT, RAY_SERVE_WORKER_PROXY_HTTP_PORT=str(free_port()))
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": cpus_of_head, "object_store_memory": MEMORY, "include_dashboard": False},
    )
    try:
        others = [cluster.add_node(num_cpus=cpus, object_store_memory=MEMORY) for cpus in cpus_of_others]
        ray.init(cluster.address, log_to_driver=False, logging_level="error")
        yield cluster, [cluster.head_node, *others]
    finally:
        ray.shutdown()
        cluster.shutdown()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def workers(node: Any, title: str) -> list[int]:
    """The processes of a node whose title begins so, as in `ray::ServeReplica`."""
    raylet = node.all_processes["raylet"][0].process.pid
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(file.read_text().rpartition(")")[2].split()[1])
            if parent == raylet and file.with_name("cmdline").read_bytes().startswith(title.encode()):
                found.append(int(file.parent.name))
        except OSError:
            continue
    return found


def kill(process: int) -> None:
    os.kill(process, signal.SIGKILL)
