"""A real Ray cluster of several nodes on this machine, each a raylet of its own, for tests that need one.

Ray's driver lives in a process of its own, so that whatever it leaves behind is gone with it.
"""

import multiprocessing
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

MEMORY = 200_000_000  # bytes of each node's object store, of which next to nothing is used

# No telemetry; half a minute for a proxy to start, as on a busy core; scaling by the load of the last second, as no
# test can wait for that of ten.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "30",
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.5",
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.5",
}

_here: dict[str, Any] = {}  # the cluster, in the driver's process
_spawn = multiprocessing.get_context("spawn")


class Nodes:
    """A running cluster. `raylets` are the processes of its nodes, the head's first."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.address: str
        self.raylets: list[int]
        self.address, self.raylets = connection.recv()

    def ask(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What the function returns in the driver's process, which is connected to the cluster."""
        self._connection.send((function, arguments))
        return self._connection.recv()

    def remove(self, raylet: int) -> None:
        """Kill all processes of a node that is not the head."""
        self.raylets.remove(raylet)
        self.ask(_remove, raylet)

    def workers(self, title: str) -> list[int]:
        """The processes whose title begins so, as in `ray::ServeReplica`."""
        found = []
        for file in Path("/proc").glob("[0-9]*/stat"):
            try:
                parent = int(file.read_text().rpartition(")")[2].split()[1])
                if parent in self.raylets and file.with_name("cmdline").read_bytes().startswith(title.encode()):
                    found.append(int(file.parent.name))
            except OSError:
                continue
        return found


@contextmanager
def nodes(*cpus: int) -> Iterator[Nodes]:
    """A cluster of as many nodes, the head first."""
    ours, theirs = _spawn.Pipe()
    driver = _spawn.Process(target=_drive, args=(theirs, cpus))
    driver.start()
    theirs.close()
    try:
        yield Nodes(ours)
    finally:
        ours.close()
        driver.join(60)
        driver.kill()


def _drive(connection: Connection, cpus: tuple[int, ...]) -> None:
    # Where nodes share one machine, only the head's proxy may have the port.
    os.environ.update(ENVIRONMENT, RAY_SERVE_WORKER_PROXY_HTTP_PORT=str(free_port()))
    import ray
    from ray.cluster_utils import Cluster

    head = {"num_cpus": cpus[0], "object_store_memory": MEMORY, "include_dashboard": False}
    cluster = _here["cluster"] = Cluster(initialize_head=True, head_node_args=head)
    try:
        others = [cluster.add_node(num_cpus=number, object_store_memory=MEMORY) for number in cpus[1:]]
        ray.init(cluster.address, log_to_driver=False, logging_level="error")
        raylets = [_raylet(node) for node in (cluster.head_node, *others)]
        connection.send((cluster.address, raylets))
        while True:
            function, arguments = connection.recv()
            connection.send(function(*arguments))
    except EOFError:
        pass
    finally:
        ray.shutdown()
        cluster.shutdown()


def _raylet(node: Any) -> int:
    return node.all_processes["raylet"][0].process.pid


def _remove(raylet: int) -> None:
    cluster = _here["cluster"]
    node = next(node for node in cluster.worker_nodes if _raylet(node) == raylet)
    cluster.remove_node(node, allow_graceful=False)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def kill(process: int) -> None:
    os.kill(process, signal.SIGKILL)
