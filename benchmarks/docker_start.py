"""How long `docker compose up` takes from nothing running to a service that is ready, and how large the images are.

    python -m benchmarks.docker_start [--rounds N] [--json FILE]

Needs a Docker engine, the image of docker/ built, and port 8000 free, or another in $PORT. Each round starts after
`down`; where this runs as root the kernel's file cache is emptied first, so that every file comes from the disk. Exit
status 1 where a round takes longer than LIMIT seconds.
"""

import http.client
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.command import ROOT, commit, option_parser, write_json

IMAGE = "encnet-serve:cpu"
LIMIT = 10.0  # seconds
GIVE_UP = 120.0  # seconds


def compose_command() -> list[str]:
    """`docker compose` where it is there, or docker-compose."""
    plugin = ["docker", "compose"]
    there = shutil.which("docker") and subprocess.run([*plugin, "version"], capture_output=True).returncode == 0
    return plugin if there else ["docker-compose"]


def run(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT / "docker", capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout.strip()


def ready() -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", int(os.environ.get("PORT", "8000")), timeout=5)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def empty_file_cache() -> bool:
    """Whether it could be emptied."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


def main() -> int:
    parser = option_parser("docker_start", __doc__)
    parser.add_argument(
        "--rounds", type=int, default=5, metavar="N", help="times that it is started (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the figures (default: none)")
    options = parser.parse_args()
    if shutil.which("docker") is None or subprocess.run(["docker", "info"], capture_output=True).returncode:
        sys.exit("no Docker engine answers here; start one, or give this user access to it")
    if subprocess.run(["docker", "image", "inspect", IMAGE], capture_output=True).returncode:
        sys.exit(f"there is no image {IMAGE}; docker build -f docker/Dockerfile --target cpu -t {IMAGE} .")
    compose = compose_command()
    seconds, emptied = [], False
    for number in range(options.rounds):
        run(*compose, "down")
        emptied = empty_file_cache()
        started = time.monotonic()
        run(*compose, "up", "--detach", "--no-build", "serve")
        created = time.monotonic() - started
        while not ready():
            if time.monotonic() - started > GIVE_UP:
                sys.exit(f"not ready after {GIVE_UP:g} s; {run(*compose, 'logs', 'serve')}")
            time.sleep(0.02)
        seconds.append(time.monotonic() - started)
        print(
            f"round {number + 1}: ready after {seconds[-1]:.2f} s, {created:.2f} s of them for compose itself",
            flush=True,
        )
    memory = run("docker", "stats", "--no-stream", "--format", "{{.MemUsage}}", run(*compose, "ps", "--quiet", "serve"))
    run(*compose, "down")
    facts = {
        "command": f"python -m benchmarks.docker_start --rounds {options.rounds}",
        "commit": commit(),
        "seconds_to_ready": [round(value, 2) for value in seconds],
        "median_seconds": round(statistics.median(seconds), 2),
        "file_cache_emptied": emptied,
        "memory_when_ready": memory.split(" /")[0],
        "image_bytes": int(run("docker", "image", "inspect", "--format", "{{.Size}}", IMAGE)),
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "engine": run("docker", "version", "--format", "{{.Server.Version}}"),
    }
    print(json.dumps(facts, indent=2))
    if options.json:
        write_json(options.json, facts)
    return int(max(seconds) > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
