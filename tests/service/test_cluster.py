"""Promise: on a Ray cluster the service answers as on one machine, grows with the load, and loses nothing it accepted.

A replica or a node that is killed takes its own requests along: each of them is answered, with a success or an error,
and none hangs; our client asks again, and gets its answer. A rolling update and a drain lose none.
"""

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import httpx
import live
import numpy as np
import pytest
from ray_nodes import Nodes, free_port, kill, nodes
from starlette.testclient import TestClient
from tiny_model import encoded
from typer.testing import CliRunner

import service
from service.cli import cli
from service.client import Client
from service.settings import Settings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray's own, about pydantic
    pytest.importorskip("ray.serve", reason="Ray is not installed (service/requirements-cluster.txt)")

import ray
from ray import serve
from ray.serve.schema import ReplicaState

from service.cluster import (
    NAME,
    ClusterError,
    Layout,
    Replica,
    _deployed,
    application,
    check_room,
    connected,
    for_worker,
)

ROOT = Path(service.__file__).parents[1]
WAIT = 240
until = partial(live.until, seconds=WAIT)


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "service", "cluster", *map(str, arguments)]


def environment(**changes: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("ENCNET_")}
    return {**clean, "ENCNET_TIMEOUT_MS": "240000", "PYTHONUNBUFFERED": "1", **changes}


def run(*arguments: object, **changes: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command(*arguments), cwd=ROOT, env=environment(**changes), capture_output=True, text=True, timeout=WAIT
    )


# ---- one cluster for all: a head with a proxy and no room, two nodes with room for a replica each


class Deployed:
    """The service on a cluster whose nodes come and go."""

    def __init__(self, cluster: Nodes) -> None:
        self.cluster = cluster
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"

    def deploy(self, *arguments: object, **changes: str) -> str:
        address = ["--address", self.cluster.address, "--port", self.port]
        done = run(*address, "--max-replicas", 2, "--ongoing-requests", 1.5, *arguments, **changes)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def replicas(self) -> int:
        return self.cluster.ask(running_replicas)

    def processes(self) -> list[int]:
        return self.cluster.workers("ray::ServeReplica")


def running_replicas() -> int:
    return serve.status().applications[NAME].deployments[NAME].replica_states.get(ReplicaState.RUNNING, 0)


@pytest.fixture(scope="module")
def deployed(model_file: Path) -> Iterator[Deployed]:
    with nodes(0, 1, 1) as cluster:
        deployed = Deployed(cluster)
        banner = deployed.deploy("--model", model_file, ENCNET_MODELS=f"again={model_file}")
        assert f"listens on {deployed.url}\n" in banner
        assert "1 now, from 1 to 2 by the load, each with 1 CPU" in banner
        yield deployed


@pytest.fixture(scope="module")
def picture() -> bytes:
    """One that takes the tiny model about a tenth of a second with SLOW."""
    return encoded(np.zeros((500, 500, 3), np.uint8))


SLOW = {"scales": "1,1,1,1,1,1,1,1", "flip": "true"}


@pytest.fixture(scope="module")
def ask(deployed: Deployed, picture: bytes) -> Iterator[Callable[[], int]]:
    """Sends the picture once: the status of the answer, 0 for a connection that broke."""
    with httpx.Client(base_url=deployed.url, timeout=WAIT, limits=httpx.Limits(max_connections=None)) as client:

        def ask() -> int:
            try:
                return client.post("/segment", params=SLOW, content=picture).status_code
            except httpx.RemoteProtocolError:
                return 0

        yield ask


@contextmanager
def load(clients: int, ask: Callable[[], int]) -> Iterator[list["Future[int]"]]:
    """Clients that ask one time after another for as long as the block lasts; yields what they were answered."""
    answers: list[Future[int]] = []
    stop = False

    def loop() -> None:
        while not stop:
            answer: Future[int] = Future()
            answers.append(answer)
            try:
                answer.set_result(ask())
            except Exception as error:
                answer.set_exception(error)

    with ThreadPoolExecutor(clients) as pool:
        loops = [pool.submit(loop) for _ in range(clients)]
        try:
            yield answers
        finally:
            stop = True
            for one in loops:
                one.result(WAIT)


def statuses(answers: list["Future[int]"]) -> Counter[int]:
    """Raises TimeoutError for a request that hangs."""
    return Counter(answer.result(WAIT) for answer in answers)


def test_answers_are_those_of_the_plain_service(
    deployed: Deployed, client_with: Callable[..., TestClient], model_file: Path, quadrants: np.ndarray
) -> None:
    client = client_with(models={"again": model_file})
    png = encoded(quadrants)
    for options in ({}, {"format": "rle", "scales": "0.5,1"}, {"model": "again"}, {"scales": "x"}, {"model": "none"}):
        here = client.post("/segment", params=options, content=png, headers={"X-Request-ID": "same"})
        there = httpx.post(f"{deployed.url}/segment", params=options, content=png, headers={"X-Request-ID": "same"})
        assert there.status_code == here.status_code
        assert there.headers.get_list("x-request-id") == ["same"]
        same, expected = there.json(), here.json()
        for answer in (same, expected):
            answer.pop("timing_ms", None)
            answer.get("cost", {}).pop("predicted_ms", None)
        assert same == expected
    for path in ("/segment?format=png", "/v2/models/tiny_encoded/infer"):
        headers = {"Inference-Header-Content-Length": "0"}
        here = client.post(path, content=png, headers=headers)
        there = httpx.post(f"{deployed.url}{path}", content=png, headers=headers)
        assert (there.status_code, there.content) == (200, here.content)
    assert httpx.get(f"{deployed.url}/readyz").json() == {"ok": True, "reasons": []}
    assert "encnet_ready" in httpx.get(f"{deployed.url}/metrics").text


def test_another_address_than_serve_listens_on_is_refused(deployed: Deployed, model_file: Path) -> None:
    done = run("--address", deployed.cluster.address, "--port", free_port(), "--model", model_file)
    assert done.returncode == 1
    assert f"Serve listens on 127.0.0.1 port {deployed.port} on this cluster already" in done.stderr


def test_more_replicas_under_load(deployed: Deployed, ask: Callable[[], int]) -> None:
    assert deployed.replicas() == 1
    with load(6, ask) as answers:
        until(lambda: deployed.replicas() == 2)
        time.sleep(0.5)
    assert set(statuses(answers)) == {200}


def test_a_killed_replica_takes_no_more_than_its_own_requests(deployed: Deployed, ask: Callable[[], int]) -> None:
    until(lambda: len(deployed.processes()) == 2)
    killed = deployed.processes()[0]
    with load(6, ask) as answers:
        until(lambda: sum(answer.done() for answer in answers) > 6)
        kill(killed)
        at_the_kill = len(answers)
        until(lambda: len(answers) > at_the_kill + 12)
        until(lambda: len(deployed.processes()) == 2 and killed not in deployed.processes())
    counts = statuses(answers)
    assert set(counts) <= {200, 500}
    assert counts[500] <= 12, "until the proxy has seen that the replica is gone"
    assert {answer.result() for answer in answers[-6:]} == {200}


def test_a_rolling_update_by_serves_own_command_loses_nothing(
    deployed: Deployed, ask: Callable[[], int], changed_model: Callable[..., Path], tmp_path: Path
) -> None:
    def model() -> str:
        return httpx.get(f"{deployed.url}/healthz", timeout=WAIT).json()["model"]["name"]

    assert model() == "encnet-tiny"
    with load(4, ask) as answers:
        serve_run = [Path(sys.executable).with_name("serve"), "run", "--non-blocking", "--name", NAME]
        done = subprocess.run(
            [*serve_run, "service.cluster:app", "min_replicas=2", "max_replicas=2"],
            cwd=ROOT,
            env=environment(ENCNET_MODEL=str(changed_model(name="encnet-new")), RAY_ADDRESS=deployed.cluster.address),
            capture_output=True,
            text=True,
            timeout=WAIT,
        )
        assert done.returncode == 0, done.stderr
        assert {model() for _ in range(8)} == {"encnet-new"}
    assert set(statuses(answers)) == {200}
    assert len(answers) > 8


def test_a_killed_node_takes_no_more_than_its_own_requests_and_our_client_asks_again(
    deployed: Deployed, picture: bytes, ask: Callable[[], int]
) -> None:
    until(lambda: len(deployed.processes()) == 2)
    with (
        Client(deployed.url, timeout=WAIT) as client,
        load(2, lambda: client.segment(picture, **SLOW).mask.shape[0]) as heights,
        load(4, ask) as answers,
    ):
        until(lambda: sum(answer.done() for answer in answers) > 6)
        at_the_kill = len(answers)
        node = next(one for one in deployed.cluster.raylets[1:] if one in parents(deployed.processes()))
        deployed.cluster.remove(node)
        until(lambda: sum(answer.done() for answer in answers) > at_the_kill + 12)
    counts = statuses(answers)
    assert set(counts) <= {200, 500}
    assert counts[500] <= 12, "until the proxy has seen that the node is gone"
    assert {answer.result() for answer in answers[-6:]} == {200}
    assert {height.result(WAIT) for height in heights} == {500}, "pixels, those of the picture"


def parents(processes: list[int]) -> list[int]:
    return [int(Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()[1]) for one in processes]


def test_a_drain_loses_nothing_and_removes_all(deployed: Deployed, picture: bytes) -> None:
    with ThreadPoolExecutor(8) as pool, httpx.Client(base_url=deployed.url, timeout=WAIT) as client:
        send = lambda: httpx.post(f"{deployed.url}/segment", params=SLOW, content=picture, timeout=WAIT)  # noqa: E731
        accepted = [pool.submit(send) for _ in range(8)]
        until(lambda: sum("encnet" in client.get("/metrics").text for _ in range(2)))
        done = run("--address", deployed.cluster.address, "--stop")
        assert done.returncode == 0, done.stderr
        assert Counter(answer.result().status_code for answer in accepted) == {200: 8}
    assert deployed.processes() == []
    again = run("--address", deployed.cluster.address, "--stop")
    assert (again.returncode, again.stderr) == (1, "error: nothing of this service is deployed on the cluster\n")
    with socket.create_server(("127.0.0.1", deployed.port)):  # its port is free, and a port that is held is told
        held = run("--address", deployed.cluster.address, "--port", deployed.port)
    assert held.returncode == 1
    assert f"Failed to bind to address '127.0.0.1:{deployed.port}'" in held.stderr
    deployed.port = free_port()
    assert f":{deployed.port}\n" in deployed.deploy()


# ---- the command


@contextmanager
def started(words: Sequence[str]) -> "Iterator[subprocess.Popen[str]]":
    """A command in a session of its own, which it must leave empty when it has ended."""
    process = subprocess.Popen(
        words,
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
        # Ray's last processes may still be ending, or wait for init to take note, when the command has.
        until(lambda: process.pid not in map(session, Path("/proc").glob("[0-9]*")))
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_a_cluster_of_this_machine_for_as_long_as_the_command_runs(changed_model: Callable[..., Path]) -> None:
    """SIGHUP brings a new model file in; SIGTERM finishes what was accepted, refuses the rest, and leaves nothing."""
    picture = encoded(np.zeros((700, 700, 3), np.uint8))
    words = command("--model", changed_model(name="encnet-old"), "--port", 0, "--max-replicas", 1)
    with started(words) as process:
        assert process.stdout
        banner = ""
        while "/docs" not in banner:
            line = process.stdout.readline()
            assert line, banner
            banner += line
        found = re.search(r"listens on (http://127\.0\.0\.1:\d+)\n", banner)
        assert found, banner
        assert len(banner.split("\n")) == 8, "nothing but the banner"
        url = found[1]
        assert httpx.get(f"{url}/healthz", timeout=WAIT).json()["model"]["name"] == "encnet-old"
        changed_model(name="encnet-new")
        process.send_signal(signal.SIGHUP)
        until(lambda: httpx.get(f"{url}/healthz", timeout=WAIT).json()["model"]["name"] == "encnet-new")
        # One client for all: making one for each request takes longer, on a busy machine, than the pictures do.
        with httpx.Client(timeout=WAIT) as client, ThreadPoolExecutor(4) as pool:
            accepted = [pool.submit(client.post, f"{url}/segment", params=SLOW, content=picture) for _ in range(4)]
            until(lambda: re.search(r"encnet_queue_requests\{.*\} 4", client.get(f"{url}/metrics").text))
            process.send_signal(signal.SIGTERM)
            until(lambda: httpx.get(f"{url}/readyz", timeout=WAIT).status_code == 503)
            refused = httpx.post(f"{url}/segment", content=picture, timeout=WAIT)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
            assert [answer.result().status_code for answer in accepted] == [200] * 4
        assert process.wait(WAIT) == 0
        assert process.stdout.read() == "\n"


def session(process: Path) -> int:
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[3])
    except OSError:
        return 0


WAITS = """
import time
from service import cluster

def wait(settings, layout, tell):
    print("connected", flush=True)
    time.sleep(600)

cluster.deploy = wait
from service.cli import main
main()
"""


def test_sigterm_before_the_replicas_are_there_ends_the_command_and_its_cluster() -> None:
    """Ray would abort the process, and print a stack."""
    with started([sys.executable, "-c", WAITS, "cluster", "--port", "0"]) as process:
        assert process.stdout
        assert process.stdout.readline() == "connected\n"
        process.terminate()
        assert process.communicate(timeout=WAIT) == ("", None)
        assert process.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "none.onnx"], "none.onnx does not exist"),
        (["--gpus", "1.5"], "gpus: must be a part of one GPU"),
        (["--gpus", "inf"], "gpus: Input should be a finite number"),
        (["--cpus", "0.00001"], "cpus: must be 0 or at least 0.0001"),
        (["--min-replicas", "3", "--max-replicas", "2"], "max_replicas 2 is below min_replicas 3"),
        (["--stop"], "--stop needs the --address"),
        (["--address", "127.0.0.1:1"], "no Ray cluster to be had at 127.0.0.1:1"),
    ],
)
def test_what_is_wrong_is_a_sentence(arguments: list[str], words: str, model_file: Path) -> None:
    done = CliRunner().invoke(cli, ["cluster", "--model", str(model_file), *arguments])
    assert done.exit_code in (1, 2)
    assert (done.stdout, len(done.stderr.splitlines())) == ("", 1)
    assert words in done.stderr


def test_a_cluster_of_another_version_is_told_with_the_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(*arguments: object, **options: object) -> None:
        raise RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.50.0\n    Python: 3.11.7\n")

    monkeypatch.setattr(ray, "init", init)
    with (
        pytest.raises(ClusterError, match=r"at auto: .* was started with: Ray: 2\.50\.0 Python: 3\.11\.7$"),
        connected("auto"),
    ):
        pass


def test_without_ray_the_command_says_what_to_install() -> None:
    script = "import sys; sys.modules['ray'] = None; from service.cli import main; main()"
    for arguments in (["cluster"], ["segment", "x.jpg", "--cluster"]):
        done = subprocess.run(
            [sys.executable, "-c", script, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=WAIT
        )
        assert done.returncode == 1
        assert done.stderr == "error: ray is not installed; pip install -r service/requirements-cluster.txt\n"


def test_a_worker_takes_the_device_and_the_threads_that_are_set_aside_for_it(model_file: Path) -> None:
    settings = Settings(model=model_file)
    assert for_worker(settings, Layout()).device == "cpu"
    assert for_worker(settings, Layout(cpus=4)).threads == 4
    assert for_worker(settings.model_copy(update={"threads": 3}), Layout(cpus=4)).threads == 3
    assert for_worker(settings, Layout(gpus=0.5)).device == "cuda"
    with pytest.raises(ClusterError, match="a GPU for each replica"):
        for_worker(settings.model_copy(update={"device": "cuda"}), Layout())
    with pytest.raises(ClusterError, match="leaves the GPUs unused"):
        for_worker(settings.model_copy(update={"device": "cpu"}), Layout(gpus=1))
    assert Layout(cpus=2, gpus=0.5).fits({"CPU": 9, "GPU": 1}) == 2
    with pytest.raises(ClusterError, match="no room here for 3 x 2 CPU and"):
        check_room(Layout(min_replicas=3, cpus=2, gpus=0.5), {"CPU": 9, "GPU": 1})


def test_a_service_that_is_removed_while_it_is_deployed_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "status", lambda: SimpleNamespace(applications={}))
    with pytest.raises(ClusterError, match="removed while it was deployed"):
        _deployed()


def test_a_replica_whose_model_does_not_run_is_not_healthy(settings: Settings) -> None:
    replica = Replica(settings, embedded=False)
    asyncio.run(replica.check_health())
    replica._models.pipeline().device.state = "failed"
    with pytest.raises(RuntimeError, match="model tiny is failed"):
        asyncio.run(replica.check_health())


def test_models_are_not_loaded_by_request_into_one_replica_of_many(model_file: Path) -> None:
    with pytest.raises(ClusterError, match="deploy again instead"):
        application(Settings(model=model_file, remote_control=True), Layout())
