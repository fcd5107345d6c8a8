"""Promise: a container serves, hardened as documented; it loses nothing when stopped and recovers when killed."""

import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import httpx
import pytest
from containers import (
    STREET,
    WAIT,
    child_of_first,
    inspect,
    python,
    readme_command,
    run,
    segment,
    until,
)
from PIL import Image

MAKES_AN_ORPHAN = """
import os, subprocess, sys, time
parent = [sys.executable, "-c", "import subprocess; print(subprocess.Popen(['sleep', '99'], stdout=-3, stderr=-3).pid)"]
orphan = int(subprocess.run(parent, capture_output=True, text=True).stdout)
given_to = open(f"/proc/{orphan}/stat").read().split()[3]
os.kill(orphan, 9)
end = time.monotonic() + 20
while os.path.exists(f"/proc/{orphan}") and time.monotonic() < end:
    time.sleep(0.02)
print(f"given to {given_to}, gone {not os.path.exists(f'/proc/{orphan}')}")
"""

Start = Callable[..., tuple[str, str]]
Container = tuple[str, str]


def test_a_picture_is_segmented_through_the_published_port(container: Container) -> None:
    answer = segment(container[1])
    assert answer.status_code == 200
    rows = {row["class"]: row for row in answer.json()["presence"]}
    assert rows["building"]["present"] and rows["building"]["fraction"] > 0.1
    with (
        Image.open(BytesIO(STREET)) as picture,
        Image.open(BytesIO(segment(container[1], format="png").content)) as mask,
    ):
        assert mask.size == picture.size


def test_readyz_metrics_and_the_health_check_say_so(container: Container) -> None:
    name, url = container
    segment(url)
    assert httpx.get(f"{url}/readyz", timeout=WAIT).json() == {"ok": True, "reasons": []}
    metrics = httpx.get(f"{url}/metrics", timeout=WAIT).text
    assert 'encnet_ready{model="camvid"} 1.0' in metrics
    assert re.search(r'encnet_present_total\{class="building",model="camvid"\} [1-9]', metrics)
    until(lambda: inspect(name)["State"]["Health"]["Status"] == "healthy")
    check = inspect(name)["Config"]["Healthcheck"]["Test"][1:]
    assert '"ok":true' in run("docker", "exec", name, *check)
    with pytest.raises(AssertionError, match="no answer"):
        run("docker", "exec", "--env", "ENCNET_PORT=9", name, *check)


def test_it_has_no_rights_and_cannot_write(container: Container) -> None:
    name, _ = container
    status = dict(line.split(":\t", 1) for line in python(name, "print(open('/proc/1/status').read())").splitlines())
    assert status["Uid"].split() == ["10001"] * 4
    assert status["Gid"].split() == ["10001"] * 4
    assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0
    assert status["NoNewPrivs"] == "1"
    for place in ("/tmp/x", "/var/tmp/x", "/app/x", "/opt/venv/x"):
        fault = python(name, f"try: open({place!r}, 'w')\nexcept OSError as error: print(error.strerror)")
        assert fault == "Read-only file system"


def test_nothing_is_reported_to_the_makers_of_the_runtime(container: Container) -> None:
    name, _ = container
    child = child_of_first(name)
    assert "ORT_DISABLE_TELEMETRY=1" in python(name, f"print(open('/proc/{child}/environ').read())").split("\0")
    log = run("docker", "logs", name)
    assert "listens on" in log and "telemetry" not in log


def test_the_compiled_kernel_is_in_use(container: Container) -> None:
    child = child_of_first(container[0])
    assert "libencnet_ort.so" in python(container[0], f"print(open('/proc/{child}/maps').read())")


def test_a_killed_server_is_replaced_in_the_same_container(container: Container) -> None:
    name, url = container
    before, child = inspect(name)["State"], child_of_first(name)
    python(name, f"import os; os.kill({child}, 9)")
    assert segment(url).status_code == 200
    assert child_of_first(name) != child
    assert inspect(name)["State"]["StartedAt"] == before["StartedAt"]


def test_orphans_are_buried(container: Container) -> None:
    assert python(container[0], MAKES_AN_ORPHAN) == "given to 1, gone True"


def test_docker_stop_under_load_loses_nothing_that_was_accepted(start: Start) -> None:
    name, url = start("--env", "ENCNET_GRACE_SECONDS=100", "--stop-timeout", "115")  # for machines with much else to do
    slow = {"scales": "1,1", "flip": "true", "timeout_ms": "240000"}

    # One client for all: making one for each request takes longer, on a busy machine, than the pictures do.
    with httpx.Client(base_url=url, timeout=WAIT) as client, ThreadPoolExecutor(5) as pool:
        client.get("/livez")  # a connection that is open before the signal

        def accepted() -> int:
            found = re.search(r"encnet_queue_requests\{.*\} (\d+)", client.get("/metrics").text)
            return int(found[1]) if found else 0

        answers = [pool.submit(client.post, "/segment", params=slow, files={"image": STREET}) for _ in range(4)]
        until(lambda: accepted() == 4)
        stop = pool.submit(run, "docker", "stop", name)
        until(lambda: client.get("/readyz").status_code == 503)
        assert client.post("/segment", content=STREET).json()["error"]["code"] == "draining"
        assert [answer.result(WAIT).status_code for answer in answers] == [200] * 4
        stop.result(WAIT)
    state = inspect(name)["State"]
    assert (state["ExitCode"], state["OOMKilled"]) == (0, False)


def test_folders_are_segmented_by_the_documented_command(image: str, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "street.jpg").write_bytes(STREET)
    run("bash", "-c", readme_command("mkdir"), cwd=tmp_path)
    command = readme_command("segment /photos")
    assert "street.jpg -> /segmented/street.mask.png" in run("bash", "-c", command, cwd=tmp_path)
    mask = tmp_path / "segmented" / "street.mask.png"
    assert mask.stat().st_uid == os.getuid()
    with Image.open(BytesIO(STREET)) as picture, Image.open(mask) as labels:
        assert labels.size == picture.size
