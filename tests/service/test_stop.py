"""Promise: SIGTERM under load loses nothing that was accepted, and a killed server is replaced by its supervisor."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import uvicorn
from live import heed_ctrl_c, until
from prometheus_client import Counter
from tiny_model import encoded

import service
from service.app import create_app
from service.connections import Connection
from service.models import Models
from service.server import DIED, Server, listen
from service.settings import Settings
from service.supervisor import QUICK_DEATHS

ROOT = Path(service.__file__).parents[1]
WAIT = 90
SLOW = {"scales": "1,1,1,1,1,1,1,1", "flip": "true"}

Serve = Callable[..., tuple["subprocess.Popen[str]", str]]


@pytest.fixture(scope="module")
def big() -> bytes:
    """A picture whose segmentation takes a good part of a second with the tiny model."""
    return encoded(np.zeros((1000, 1000, 3), np.uint8))


@pytest.fixture
def serve(model_file: Path) -> Iterator[Serve]:
    """A function that starts a server and returns its process and address once it answers."""
    started = []

    def start(
        *arguments: str, command: list[str] | None = None, process_group: int | None = None, **environment: str
    ) -> tuple["subprocess.Popen[str]", str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("ENCNET_")}
        process = subprocess.Popen(
            command
            or [sys.executable, "-m", "service", "serve", "--model", str(model_file), "--port", "0", *arguments],
            cwd=ROOT,
            env={
                **clean,
                "ENCNET_DEVICE": "cpu",
                "ENCNET_THREADS": "1",
                "ENCNET_TIMEOUT_MS": "240000",
                "PYTHONUNBUFFERED": "1",
                **environment,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            process_group=process_group,
        )
        started.append(process)
        assert process.stdout
        for line in process.stdout:
            if found := re.search(r"listens on (http://127\.0\.0\.1:\d+)", line):
                return process, found[1]
        raise AssertionError("the server ended before it was ready")

    yield start
    for process in started:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()


def queued(url: str) -> int:
    found = re.search(r"encnet_queue_requests\{.*\} (\d+)", httpx.get(f"{url}/metrics", timeout=WAIT).text)
    return int(found[1]) if found else 0


def test_sigterm_under_load_finishes_what_was_accepted(serve: Serve, big: bytes) -> None:
    process, url = serve()
    with ThreadPoolExecutor(8) as pool, httpx.Client(base_url=url, timeout=WAIT) as client:
        client.get("/livez")  # a connection that is open before the signal
        answers = [pool.submit(httpx.post, f"{url}/segment", params=SLOW, content=big, timeout=WAIT) for _ in range(8)]
        until(lambda: queued(url) == 8)
        process.send_signal(signal.SIGTERM)
        until(lambda: client.get("/readyz").status_code == 503)
        assert client.get("/livez").status_code == 200
        refused = client.post("/segment", content=encoded(np.zeros((4, 4, 3), np.uint8)))
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "draining"
        assert "retry-after" in refused.headers
        assert [answer.result(WAIT).status_code for answer in answers] == [200] * 8
    assert process.wait(WAIT) == 0


def test_a_stop_in_the_moment_of_the_start_is_a_stop(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start_up = uvicorn.Server.startup

    async def told_to_stop_at_its_end(self: uvicorn.Server, sockets: list[socket.socket] | None = None) -> None:
        await start_up(self, sockets)
        self.handle_exit(signal.SIGTERM, None)

    monkeypatch.setattr(uvicorn.Server, "startup", told_to_stop_at_its_end)
    models = Models(settings)
    models.start()
    config = uvicorn.Config(create_app(models=models), http=Connection, lifespan="off", log_config=None)
    with listen(Settings(port=0)) as listener:
        Server(config, models, Counter("cut", "-", registry=None), lambda: print("ready")).run([listener])
    models.close()
    assert (models.draining, capsys.readouterr().out) == (True, "ready\n")


def test_with_nothing_in_flight_a_stop_does_not_wait_for_the_grace_period(serve: Serve) -> None:
    process, _ = serve(ENCNET_GRACE_SECONDS="600")
    process.terminate()
    assert process.wait(WAIT) == 0


def test_a_port_can_be_taken_again_at_once() -> None:
    """Connections that the server before closed keep the port for a minute, for all who do not say that they know."""
    with listen(Settings(port=0)) as before:
        port = before.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port), WAIT):
            before.accept()[0].close()
    with listen(Settings(port=port)) as after:
        assert after.getsockname()[1] == port


HUNG_SERVER = """
import sys, time
from service import server
from service.engine import Engine
from service.settings import Settings

def ready(models):
    Engine.run = lambda *arguments: time.sleep(600)
    print(f"listens on http://127.0.0.1:{listener.getsockname()[1]}", flush=True)

settings = Settings(model=sys.argv[1], device="cpu", threads=1, port=0, grace_seconds=0.2)
listener = server.listen(settings)
server.run(settings, listener, ready)
"""


def test_the_grace_period_ends_a_stop_that_would_never_end(serve: Serve, model_file: Path) -> None:
    process, url = serve(command=[sys.executable, "-c", HUNG_SERVER, str(model_file)])
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(httpx.post, f"{url}/segment", content=encoded(np.zeros((4, 4, 3), np.uint8)), timeout=WAIT)
        until(lambda: queued(url) == 1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT) == 0
        assert answer.exception() is not None or answer.result().status_code >= 500


def unfinished_upload(address: str) -> socket.socket:
    """A connection with a request of which the body's end is missing."""
    host, port = address.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), WAIT)
    connection.sendall(b"POST /segment HTTP/1.1\r\nHost: x\r\nContent-Length: 9000\r\n\r\nabc")
    return connection


def test_an_upload_that_does_not_end_is_told_that_the_service_stops(serve: Serve) -> None:
    process, address = serve(ENCNET_GRACE_SECONDS="1")
    with unfinished_upload(address) as connection:
        time.sleep(0.5)
        process.terminate()
        answer = connection.recv(4096)
        assert answer.startswith(b"HTTP/1.1 503 ")
    output, _ = process.communicate(timeout=WAIT)
    assert process.returncode == 0
    assert "Traceback" not in output


def test_a_second_signal_ends_the_wait_for_an_upload_too(serve: Serve) -> None:
    process, address = serve(ENCNET_GRACE_SECONDS="600")
    host, port = address.removeprefix("http://").split(":")

    def refuses() -> bool:
        try:
            socket.create_connection((host, int(port)), WAIT).close()
        except ConnectionRefusedError:
            return True
        return False

    with unfinished_upload(address):
        time.sleep(0.5)
        process.terminate()
        until(refuses)  # nothing is in flight: uvicorn shuts down, and soon waits for the connection
        time.sleep(1)
        assert process.poll() is None
        process.terminate()
        process.wait(10)


def test_an_upload_that_does_not_end_is_given_up(serve: Serve) -> None:
    _, address = serve(ENCNET_UPLOAD_TIMEOUT_MS="300", ENCNET_MAX_BUFFERED_BYTES="9000")
    with unfinished_upload(address) as connection:
        answer = connection.recv(4096)
        assert answer.startswith(b"HTTP/1.1 408 ")
    assert httpx.post(f"{address}/segment", content=b"x" * 8999).status_code == 415, "its bytes are let go"


@pytest.mark.parametrize("again", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_stops_at_once(serve: Serve, model_file: Path, again: signal.Signals) -> None:
    script = HUNG_SERVER.replace("grace_seconds=0.2", "grace_seconds=600")
    process, url = serve(command=[sys.executable, "-c", script, str(model_file)])
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(httpx.post, f"{url}/segment", content=encoded(np.zeros((4, 4, 3), np.uint8)), timeout=WAIT)
        until(lambda: queued(url) == 1)
        process.send_signal(signal.SIGTERM)
        until(lambda: httpx.get(f"{url}/readyz", timeout=WAIT).status_code == 503)
        process.send_signal(again)
        process.wait(10)
        assert answer.exception() is not None or answer.result().status_code >= 500


def test_a_server_whose_model_is_gone_for_good_ends_for_its_supervisor(model_file: Path) -> None:
    script = (
        "import sys\n"
        "from service import server\n"
        "from service.settings import Settings\n"
        "def ready(models):\n"
        "    models.pipeline().device.state = 'failed'\n"
        "settings = Settings(model=sys.argv[1], device='cpu', threads=1, port=0)\n"
        "server.run(settings, server.listen(settings), ready)"
    )
    command = [sys.executable, "-c", script, str(model_file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=WAIT)
    assert done.returncode == DIED
    assert "could not be started again" in done.stderr


def test_sighup_loads_the_model_anew(serve: Serve) -> None:
    process, url = serve()
    process.send_signal(signal.SIGHUP)
    assert process.stdout
    assert any("is loaded from" in line for line in process.stdout)
    assert httpx.get(f"{url}/readyz", timeout=WAIT).status_code == 200


def test_sighup_before_the_server_is_ready_does_not_kill_it(serve: Serve, model_file: Path) -> None:
    script = HUNG_SERVER.replace(
        "settings =",
        "import os, signal\n"
        "load = Engine.__init__\n"
        "Engine.__init__ = lambda *given: (os.kill(os.getpid(), signal.SIGHUP), load(*given))[1]\n"
        "settings =",
    )
    _, url = serve(command=[sys.executable, "-c", script, str(model_file)])
    assert httpx.get(f"{url}/readyz", timeout=WAIT).status_code == 200


def test_ctrl_c_in_the_terminal_of_a_supervisor_finishes_what_was_accepted(serve: Serve, big: bytes) -> None:
    process, url = serve("--supervise", process_group=0)
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(httpx.post, f"{url}/segment", params=SLOW, content=big, timeout=WAIT) for _ in range(4)]
        until(lambda: queued(url) == 4)
        os.killpg(process.pid, signal.SIGINT)
        until(lambda: httpx.get(f"{url}/readyz", timeout=5).status_code == 503)
        assert [answer.result(WAIT).status_code for answer in answers] == [200] * 4
    assert process.wait(WAIT) == 0


def test_a_killed_server_is_replaced_on_the_same_port(serve: Serve) -> None:
    process, url = serve("--supervise")
    (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(child), signal.SIGKILL)
    picture = encoded(np.zeros((4, 4, 3), np.uint8))
    assert httpx.post(f"{url}/segment", content=picture, timeout=WAIT).status_code == 200, "the connection waited"
    (second,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert second != child
    process.send_signal(signal.SIGTERM)
    assert process.wait(WAIT) == 0
    assert not Path(f"/proc/{second}").exists()


def test_a_supervisor_does_not_insist_on_a_model_that_cannot_be_loaded(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "service", "serve", "--supervise", "--port", "0", "--model", "nowhere.onnx"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=WAIT)
    assert done.returncode == 1
    assert done.stderr.count("does not exist") == 1


@pytest.mark.parametrize(
    ("end", "told"),
    [
        ("os._exit(9)", "exit code 9"),
        ("os.kill(os.getpid(), 9)", "signal 9"),
        ("os.kill(os.getpid(), 35)", "signal 35"),
    ],
)
def test_a_supervisor_gives_up_on_a_server_that_dies_at_once(end: str, told: str) -> None:
    script = (
        "import socket, sys\n"
        "from service.supervisor import supervise\n"
        f"sys.exit(supervise([sys.executable, '-c', 'import os; print(\"born\", flush=True); {end}'], "
        "socket.create_server(('127.0.0.1', 0))))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=WAIT)
    assert done.returncode == 1
    assert done.stdout.count("born") == QUICK_DEATHS
    assert f"died {QUICK_DEATHS} times in a row ({told}" in done.stderr


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def started() -> Iterator[Start]:
    """A function that starts a Python process, which heeds Ctrl-C; its stdout and stderr are one."""
    processes = []

    def start(*words: str) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=ROOT,
            env={**os.environ, "ENCNET_LOG_LEVEL": "error"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=heed_ctrl_c,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:  # one that a failed test left would load for ever
        process.kill()
        process.wait()
        assert process.stdout
        process.stdout.close()


LOADS_FOR_EVER = """
from service import cli, models
from service.engine import Engine

def load(path, settings):
    print("loading", flush=True)
    while True:
        Engine(path, "cpu", 1)

models._open_engine = load
cli.main()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_while_the_model_loads_is_no_crash(number: signal.Signals, model_file: Path, started: Start) -> None:
    process = started("-c", LOADS_FOR_EVER, "serve", "--port", "0", "--model", str(model_file))
    assert process.stdout
    assert process.stdout.readline() == "loading\n"
    process.send_signal(number)
    assert process.communicate(timeout=WAIT) == ("", None)
    assert process.returncode == 0


IN_A_LOCK = """
import time
from service import device

def wait(self):
    print("waiting", flush=True)
    while True:
        try:
            time.sleep(0.1)
        except BaseException:
            pass

device.Device.wait_until_started = wait
"""


def test_a_stop_while_the_model_loads_needs_no_exception(model_file: Path, started: Start) -> None:
    """One that came while Python started a thread left a lock in disorder, and a traceback."""
    process = started("-c", IN_A_LOCK + LOADS_FOR_EVER, "serve", "--port", "0", "--model", str(model_file))
    assert process.stdout
    told = process.stdout.readline() + process.stdout.readline()  # by two threads, perhaps into each other's lines
    assert "loading" in told
    assert "waiting" in told
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=WAIT) == ("", None)
    assert process.returncode == 0


LOADS_FOR_EVER_AGAIN = """
from service import cli, models
from service.engine import Engine

loaded = []

class Mortal(Engine):
    def run(self, images, plan, *options):
        if plan.flip:
            raise SystemExit
        return super().run(images, plan, *options)

def load(path, settings):
    if loaded:
        print("loading again", flush=True)
    while loaded:
        Engine(path, "cpu", 1)
    loaded.append(Mortal(path, "cpu", 1))
    return loaded[0]

models._open_engine = load
cli.main()
"""


@pytest.mark.parametrize("cause", ["a reload", "a death"])
def test_a_stop_does_not_wait_for_a_model_that_loads_again(serve: Serve, model_file: Path, cause: str) -> None:
    arguments = ["serve", "--port", "0", "--model", str(model_file)]
    process, url = serve(command=[sys.executable, "-c", LOADS_FOR_EVER_AGAIN, *arguments])
    if cause == "a reload":
        process.send_signal(signal.SIGHUP)
    else:
        picture = encoded(np.zeros((4, 4, 3), np.uint8))
        assert httpx.post(f"{url}/segment?flip=true", content=picture, timeout=WAIT).status_code == 503
    assert process.stdout
    assert "loading again\n" in process.stdout
    process.terminate()
    output, _ = process.communicate(timeout=WAIT)
    assert process.returncode == 0, output


@pytest.mark.parametrize(
    ("number", "handler", "code"),
    [
        (signal.SIGTERM, "signal.SIG_DFL", 0),
        (signal.SIGTERM, "lambda *_: sys.exit(143)", 0),
        (signal.SIGINT, "signal.SIG_DFL", 0),
        (signal.SIGQUIT, "signal.SIG_DFL", 131),
    ],
)
def test_a_supervisor_told_to_stop_during_the_start_up_says_how_it_ended(
    number: signal.Signals, handler: str, code: int
) -> None:
    script = (
        "import socket, sys\n"
        "from service.supervisor import supervise\n"
        f"born = 'import signal, sys, time; signal.signal({int(number)}, {handler}); print(1, flush=True); '\n"
        "born += 'time.sleep(60)'\n"
        "sys.exit(supervise([sys.executable, '-c', born], socket.create_server(('127.0.0.1', 0))))"
    )
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout
    assert process.stdout.readline()
    process.send_signal(number)
    process.stdout.close()
    assert process.wait(WAIT) == code


IMPORTS_SLOWLY = """
import runpy, sys, time, types

class Slow(types.ModuleType):
    def __getattr__(self, name):
        print("importing", flush=True)
        while True:  # a signal in the moment before a sleep is heeded after it
            time.sleep(0.1)

sys.modules["service.cli"] = Slow("service.cli")
runpy.run_module("service", run_name="__main__")
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stop_is_obeyed_before_the_imports_are_done(number: int, code: int, started: Start) -> None:
    """A container's first process would otherwise not be ended by SIGTERM, and Ctrl-C print a traceback."""
    process = started("-c", IMPORTS_SLOWLY)
    assert process.stdout
    assert process.stdout.readline() == "importing\n"
    process.send_signal(number)
    assert process.communicate(timeout=WAIT) == ("", None)
    assert process.returncode == code


BECOMES_FIRST_PROCESS = """
import ctypes, socket, sys
from service.supervisor import supervise
ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: orphans come here, as to a container's first process
sys.exit(supervise([sys.executable, "-c", sys.argv[1]], socket.create_server(("127.0.0.1", 0))))
"""
LEAVES_AN_ORPHAN = """
import pathlib, subprocess, sys, time
parent = "import subprocess; print(subprocess.Popen(['sleep', '0.1'], stdout=-3, stderr=-3).pid)"
orphan = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True).stdout.strip()
end = time.monotonic() + 20
while (buried := not pathlib.Path("/proc", orphan).exists()) is False and time.monotonic() < end:
    time.sleep(0.02)
sys.exit(not buried)
"""


def test_a_supervisor_buries_the_orphans_it_is_given() -> None:
    command = [sys.executable, "-c", BECOMES_FIRST_PROCESS, LEAVES_AN_ORPHAN]
    assert subprocess.run(command, cwd=ROOT, timeout=WAIT).returncode == 0
