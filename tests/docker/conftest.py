"""Fixtures of the images' tests: the built image, and containers that are gone afterwards."""

import subprocess
import uuid
from collections.abc import Callable, Iterator

import pytest
from containers import BASE, IMAGE, ROOT, engine_fault, is_ready, readme_command, run, until


@pytest.fixture(scope="session")
def engine() -> None:
    """Skips what needs a Docker engine where none answers."""
    if fault := engine_fault():
        pytest.skip(f"no Docker engine answers here: {fault}")


@pytest.fixture(scope="session")
def image(engine: None) -> str:
    """The serving image for CPUs, built by the README's command, with this machine's network."""
    if subprocess.run(["docker", "image", "inspect", BASE], capture_output=True).returncode:
        run("docker", "pull", BASE)  # BuildKit alone would not keep it under its name, by which the tests ask for it
    build = readme_command("--target cpu")
    run("bash", "-c", f"{build} --network host --build-arg PIP_INDEX_URL --build-arg PIP_EXTRA_INDEX_URL", cwd=ROOT)
    return IMAGE


@pytest.fixture(scope="session")
def start(image: str) -> Iterator[Callable[..., tuple[str, str]]]:
    """A function that starts a container by the README's command for that and returns its name and its address."""
    names = []

    def started(*options: str) -> tuple[str, str]:
        command = readme_command("docker run --rm -p")
        names.append(f"encnet-test-{uuid.uuid4().hex[:8]}")
        ours = ["--detach", "--name", names[-1], "--publish", "127.0.0.1::8000", *options, IMAGE]
        run("bash", "-c", command.replace("--rm -p 8000:8000", "").replace(IMAGE, " ".join(ours)), cwd=ROOT)
        url = f"http://{run('docker', 'port', names[-1], '8000').split()[0]}"
        try:
            until(lambda: is_ready(url))
        except AssertionError:
            raise AssertionError(run("docker", "logs", names[-1])) from None
        return names[-1], url

    yield started
    for name in names:
        subprocess.run(["docker", "rm", "--force", "--volumes", name], capture_output=True)


@pytest.fixture(scope="module")
def container(start: Callable[..., tuple[str, str]]) -> tuple[str, str]:
    """A container's name and address, for tests that leave it as it was."""
    return start("--health-interval", "1s")
