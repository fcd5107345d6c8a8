"""Promise: `docker compose up` in docker/ serves, with the models and settings given, and its monitoring sees it."""

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import yaml
from containers import ROOT, inspect, is_ready, run, segment, until

from service.settings import EMBEDDED_MODEL, Settings, settings_table

FOLDER = ROOT / "docker"
FILE = yaml.safe_load((FOLDER / "compose.yaml").read_text(encoding="utf-8"))
OF_THE_IMAGE = {"ENCNET_HOST", "ENCNET_PORT", "ENCNET_DEVICE"}
BEYOND_SETTINGS = {"ENCNET_KERNELS", "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_SERVICE_NAME"}
PROJECT = "encnet-test"

PROMETHEUS = """
FROM debian:bookworm-slim
RUN apt-get update && apt-get install -y --no-install-recommends prometheus && rm -rf /var/lib/apt/lists/* \
 && mkdir -p /prometheus && chown nobody /prometheus
USER nobody
ENTRYPOINT ["prometheus"]
"""


def composers() -> list[list[str]]:
    """The commands that read compose files here."""
    known = [["docker", "compose"], ["docker-compose"]]
    there = [words for words in known if shutil.which(words[0])]
    return [words for words in there if subprocess.run([*words, "version"], capture_output=True).returncode == 0]


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return str(taken.getsockname()[1])


@pytest.mark.parametrize("service", ["serve", "gpu"])
def test_every_setting_reaches_the_service(service: str) -> None:
    names = {name for name, _, _ in settings_table()}
    assert set(FILE["services"][service]["environment"]) == names - OF_THE_IMAGE | BEYOND_SETTINGS


@pytest.mark.parametrize("service", ["serve", "gpu"])
def test_a_stop_waits_longer_than_the_service_takes_to_drain(service: str) -> None:
    assert int(FILE["services"][service]["stop_grace_period"].removesuffix("s")) > Settings().grace_seconds + 5


def test_the_file_is_valid_for_every_compose_here() -> None:
    if not composers():
        pytest.skip("neither `docker compose` nor docker-compose is here")
    for compose in composers():
        run(*compose, "--profile", "gpu", "--profile", "monitoring", "config", "--quiet", cwd=FOLDER)


@pytest.fixture(scope="module")
def up(image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., dict[str, str]]]:
    """A function that does `docker compose up` for some services and returns the ports they were given."""
    if not composers():
        pytest.skip("neither `docker compose` nor docker-compose is here")
    models = tmp_path_factory.mktemp("models")
    shutil.copy(EMBEDDED_MODEL, models / "second.onnx")
    models.chmod(0o755)
    ports = {name: free_port() for name in ("PORT", "PROMETHEUS_PORT")}
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("ENCNET_")},
        **ports,
        "MODELS": str(models),
        "ENCNET_MODELS": "second=/models/second.onnx",
        "PROMETHEUS_IMAGE": "encnet-test-prometheus",
    }
    compose = [*composers()[0], "--project-name", PROJECT, "--profile", "monitoring"]

    def started(*services: str) -> dict[str, str]:
        run(*compose, "up", "--detach", *services, cwd=FOLDER, env=environment)
        return {name: f"http://127.0.0.1:{port}" for name, port in ports.items()}

    yield started
    subprocess.run([*compose, "down", "--volumes"], cwd=FOLDER, env=environment, capture_output=True)


@pytest.fixture(scope="module")
def served(up: Callable[..., dict[str, str]]) -> str:
    """The address of a service that compose has started."""
    url = up("serve")["PORT"]
    until(lambda: is_ready(url))
    return url


def test_up_serves_the_embedded_model_and_those_of_the_folder(served: str) -> None:
    listed = httpx.get(f"{served}/models").json()["models"]
    assert [(entry["name"], entry["default"], entry["state"]) for entry in listed] == [
        ("camvid", True, "ready"),
        ("second", False, "ready"),
    ]
    for model in ("camvid", "second"):
        assert segment(served, model=model).status_code == 200


def test_the_container_is_limited_and_hardened(served: str) -> None:
    (name,) = run(
        "docker",
        "ps",
        "--quiet",
        "--filter",
        f"label=com.docker.compose.project={PROJECT}",
        "--filter",
        "label=com.docker.compose.service=serve",
    ).split()
    found = inspect(name)
    host = found["HostConfig"]
    assert (host["ReadonlyRootfs"], host["CapDrop"], host["SecurityOpt"]) == (True, ["ALL"], ["no-new-privileges:true"])
    assert (host["Memory"], host["PidsLimit"], host["RestartPolicy"]["Name"]) == (12 * 2**30, 4096, "unless-stopped")
    assert found["Config"]["StopTimeout"] == 45
    assert [mount["RW"] for mount in found["Mounts"] if mount["Destination"] == "/models"] == [False]


def test_prometheus_finds_the_service_and_fills_every_panel(
    served: str, up: Callable[..., dict[str, str]], tmp_path: Path
) -> None:
    (tmp_path / "Dockerfile").write_text(PROMETHEUS)
    run("docker", "build", "--network", "host", "--tag", "encnet-test-prometheus", str(tmp_path))
    api = f"{up('prometheus')['PROMETHEUS_PORT']}/api/v1"

    def ask(query: str) -> list[dict]:
        answer = httpx.get(f"{api}/query", params={"query": query}, timeout=20).raise_for_status().json()
        assert answer["status"] == "success", answer
        return answer["data"]["result"]

    def scraped() -> bool:
        try:
            return bool(ask('up{job="encnet"} == 1'))
        except httpx.HTTPError:  # it is not there yet, or starts and says 503
            return False

    until(scraped)
    assert segment(served).status_code == 200
    panels = json.loads((FOLDER / "monitoring" / "encnet.json").read_text(encoding="utf-8"))["panels"]
    queries = [target["expr"].replace("$__rate_interval", "1m") for panel in panels for target in panel["targets"]]
    filled = [query for query in queries if "gpu" not in query and "sum by (reason)" not in query]
    (share,) = [query for query in queries if "encnet_present_total" in query]

    def presence() -> dict[str, str]:
        return {row["metric"]["class"]: row["value"][1] for row in ask(share) if row["metric"]["model"] == "camvid"}

    until(lambda: presence().get("building") == "1")
    assert len(presence()) == 11
    assert segment(served).status_code == 200
    until(lambda: [query for query in filled if not ask(query)] == [])
