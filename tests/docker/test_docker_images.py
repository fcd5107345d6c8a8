"""Promise: the serving image is small, has neither torch nor a compiler, and adds only what was meant to be added."""

import json
import re
import tarfile

import pytest
from containers import BASE, ROOT, inspect, readme_commands, run

import service

LIMIT = 260 * 10**6  # bytes on top of the base image
EPOCH = 315532800
TRIED = ("--target cpu", "docker run --rm -p", "mkdir", "segment /photos", "docker compose up")
NOT_HERE = {
    "--target train": "gigabytes of PyTorch",
    "model.train": "needs the train image",
    "--profile gpu": "needs an NVIDIA GPU",
    "--profile monitoring": "needs Grafana's image from a registry; its Prometheus is tried",
}
LOOK = """
import importlib.metadata, importlib.util, json, shutil
tools = "gcc g++ cc c++ cpp clang as ld make cmake nvcc curl wget git".split()
print(json.dumps({
    "tools": [tool for tool in tools if shutil.which(tool)],
    "modules": [name for name in "torch onnx pip model export tests".split() if importlib.util.find_spec(name)],
    "distributions": {d.name.lower().replace("_", "-"): d.version for d in importlib.metadata.distributions()},
}))
"""


def test_every_command_of_the_readme_is_tried_or_told_why_not() -> None:
    words = (*TRIED, *NOT_HERE)
    for command in readme_commands():
        assert [word for word in words if word in command] or command == "cd docker", command
    for word in words:
        assert any(word in command for command in readme_commands()), word


@pytest.fixture(scope="module")
def inside(image: str) -> dict:
    return json.loads(run("docker", "run", "--rm", "--entrypoint", "python", image, "-c", LOOK))


@pytest.fixture(scope="module")
def added(image: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tarfile.TarInfo]:
    """Every file of the layers on top of the base image's, by its path."""
    archive = tmp_path_factory.mktemp("image") / "image.tar"
    run("docker", "save", "--output", str(archive), image)
    found = {}
    with tarfile.open(archive) as whole:
        (manifest,) = json.load(whole.extractfile("manifest.json"))  # type: ignore[arg-type]
        layers = manifest["Layers"][len(inspect(BASE)["RootFS"]["Layers"]) :]
        for layer in layers:
            with tarfile.open(fileobj=whole.extractfile(layer)) as files:
                found |= {f"/{member.name.strip('/.')}": member for member in files if not member.isdir()}
    archive.unlink()
    return found


def test_it_adds_at_most_260_megabytes_to_its_base(image: str) -> None:
    assert inspect(image)["Size"] - inspect(BASE)["Size"] <= LIMIT


def test_no_torch_and_no_compiler_are_inside(inside: dict) -> None:
    assert inside["tools"] == []
    assert inside["modules"] == []


def test_what_is_installed_is_what_is_locked(inside: dict) -> None:
    lock = (ROOT / "docker" / "cpu.lock").read_text(encoding="utf-8")
    assert inside["distributions"] == dict(re.findall(r"^([a-z0-9-]+)==([^ ]+)", lock, re.M))


def test_only_the_service_and_what_it_needs_are_added(added: dict[str, tarfile.TarInfo]) -> None:
    places = (
        "/opt/venv/",
        "/app/service/",
        "/app/build/kernels/libencnet_ort.so",
        "/app/ready.py",
        "/app/__pycache__/",
    )
    assert [path for path in added if not path.startswith(places)] == ["/etc/group", "/etc/passwd"]
    assert "/app/service/models/camvid.onnx" in added
    assert not [path for path in added if re.search(r"\.cache|/pip/|\.git/|\.env$|\.whl$|\.log$", path)]


def test_layers_have_one_time_and_rights_that_do_not_depend_on_the_build_machine(
    added: dict[str, tarfile.TarInfo],
) -> None:
    assert {member.mtime for member in added.values()} == {EPOCH}
    assert {member.uid for member in added.values()} == {0}
    assert {oct(member.mode & 0o777) for member in added.values() if member.isfile()} == {"0o644", "0o755"}


def test_nothing_of_the_build_machine_is_kept(image: str) -> None:
    def settings(name: str) -> set[str]:
        text = run("docker", "history", "--no-trunc", "--format", "{{.CreatedBy}}", name)
        text += json.dumps(inspect(name)["Config"])
        return set(re.findall(r"PIP_\w+|https?://[^\"\s]+|[a-z_]*proxy[a-z_]*", text, re.I))

    assert settings(image) <= settings(BASE)


def test_labels_say_what_it_is(image: str) -> None:
    labels = inspect(image)["Config"]["Labels"]
    assert labels["org.opencontainers.image.title"] == "EncNet Serve"
    assert labels["org.opencontainers.image.version"] == service.__version__
    assert labels["org.opencontainers.image.base.name"] == BASE
