"""Docker from Python, by its command line: is there an engine, start a container, ask it, remove it."""

import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parents[2]
IMAGE = "encnet-serve:cpu"
BASE = "python:3.11-slim-bookworm"
STREET = (ROOT / "examples" / "street.jpg").read_bytes()
WAIT = 120


def engine_fault() -> str | None:
    """Why no Docker engine answers here; None where one does."""
    if shutil.which("docker") is None:
        return "there is no docker command"
    done = subprocess.run(["docker", "info", "--format", "{{.ServerVersion}}"], capture_output=True, text=True)
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["docker info fails"])[-1]


def run(*command: str, **more: Any) -> str:
    """What a command prints; AssertionError with its last words where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, **more)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def inspect(name: str) -> dict[str, Any]:
    """What the engine knows about a container or an image."""
    return json.loads(run("docker", "inspect", name))[0]


def readme_commands() -> list[str]:
    """The commands in the README's section on Docker, without their comments."""
    section = re.search(r"\n## Docker\n(.*?)\n## ", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    assert section
    lines = re.sub(r"\\\n\s*", "", section[1]).splitlines()
    return [re.sub(r"\s+#\s.*", "", line).strip() for line in lines if line.startswith("    ")]


def readme_command(words: str) -> str:
    """The one of them that has these words."""
    (command,) = [command for command in readme_commands() if words in command]
    return command


def until(condition: Callable[[], object], seconds: float = WAIT) -> None:
    """Wait until it holds; AssertionError after so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def segment(url: str, **options: str) -> httpx.Response:
    """The street's answer."""
    return httpx.post(f"{url}/segment", params=options, files={"image": STREET}, timeout=WAIT)


def python(name: str, script: str) -> str:
    """What a script prints that a container's Python runs, as the service's own user."""
    return run("docker", "exec", name, "python", "-c", script).strip()


def child_of_first(name: str) -> str:
    """The process id, inside, of the server under the supervisor."""
    return python(name, "print(open('/proc/1/task/1/children').read())")
