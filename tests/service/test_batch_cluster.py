"""Promise: pictures segmented on a Ray cluster have one result each, whatever dies, as on one machine.

A run that is killed goes on where it stopped; a picture that takes every worker down is reported and stops nothing.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from moto.server import ThreadedMotoServer
from PIL import Image
from pyarrow.fs import FileSystem
from ray_nodes import Nodes, kill, nodes
from tiny_model import encoded

import service
from service import batch
from service.engine import Engine
from service.errors import InputError
from service.folders import Found, find_pictures
from service.options import Options
from service.record import open_record
from service.settings import Settings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray's own, about pydantic
    for needed in ("ray.serve", "ray.data"):
        pytest.importorskip(needed, reason="Ray is not installed (service/requirements-cluster.txt)")

from service import batch_cluster
from service.batch_cluster import SHARD
from service.bucket import find_in_buckets
from service.cluster import Layout

ROOT = Path(service.__file__).parents[1]
WAIT = 90
WORKER = "ray::MapWorker"
NUMBER = 6 * SHARD


@pytest.fixture(scope="module")
def cluster() -> Iterator[Nodes]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ACCESS_KEY_ID", "id")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        with nodes(2) as started:
            yield started


@pytest.fixture
def bucket() -> Iterator[tuple[FileSystem, str]]:
    """An empty bucket `photos` on a server that speaks S3, and what follows its URLs."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    query = f"?endpoint_override={host}:{port}&scheme=http&region=eu-west-1"
    files, _ = FileSystem.from_uri(f"s3://photos{query}&allow_bucket_creation=true")
    files.create_dir("photos")
    yield files, query
    server.stop()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Pictures of noise, large enough that a run can be stopped among them, and two that cannot be read."""
    folder = tmp_path / "photos"
    folder.mkdir()
    random = np.random.default_rng(3)
    for index in range(NUMBER):
        pixels = random.integers(0, 256, (300, 400, 3), np.uint8)
        (folder / f"{index:03}.png").write_bytes(encoded(pixels, compress_level=0))
    (folder / "cut.png").write_bytes((folder / "000.png").read_bytes()[:500])
    (folder / "empty.jpg").touch()
    return folder


def start(address: str, model: Path, *arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "service", "segment", *arguments, "--cluster", "--address", address]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "ENCNET_MODEL": str(model)}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def record(folder: Path) -> Counter[str]:
    """How often each picture is in the record as done."""
    entries = map(json.loads, (folder / batch.RECORD).read_text().splitlines())
    return Counter(Path(entry["source"]).name for entry in entries if "done" in entry)


def test_a_killed_worker_and_a_killed_run_leave_one_result_for_each_picture(
    cluster: Nodes, photos: Path, model_file: Path, engine: Engine, tmp_path: Path
) -> None:
    """By URL, as in a bucket; by path below."""
    address = cluster.address
    arguments = (f"file://{photos}", "--output", str(tmp_path / "out"), "--no-overlay")

    with start(address, model_file, *arguments) as process:
        assert process.stdout
        assert process.stdout.readline(), "it ended before it could be killed"
        process.kill()
    assert process.returncode == -signal.SIGKILL
    done_before = len(record(tmp_path / "out"))
    assert 0 < done_before < NUMBER

    with start(address, model_file, *arguments) as process:
        assert process.stdout
        assert process.stdout.readline()
        kill(cluster.workers(WORKER)[0])
        _, error = process.communicate(timeout=WAIT)
    assert process.returncode == 1
    assert f"{done_before} of {NUMBER + 2} pictures were done before" in error
    assert f"2 of {NUMBER + 2} inputs failed" in error
    assert record(tmp_path / "out") == dict.fromkeys((f"{index:03}.png" for index in range(NUMBER)), 1)
    tables = json.loads((tmp_path / "out" / batch.DOCUMENT).read_text())
    assert {Path(fault["file"]).name: fault["code"] for fault in tables["errors"]} == {
        "cut.png": "truncated",
        "empty.jpg": "empty",
    }
    assert [Path(entry["file"]).name for entry in tables["images"]] == [f"{index:03}.png" for index in range(NUMBER)]
    for entry in tables["images"]:
        mask = np.asarray(Image.open(tmp_path / "out" / entry["mask"]))
        pixels = np.asarray(Image.open(photos / Path(entry["file"]).name))
        np.testing.assert_array_equal(mask, engine.segment(pixels).mask)
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".png", ".json", ".csv", ".jsonl"}


def test_a_picture_that_kills_its_workers_is_reported_and_stops_nothing(
    cluster: Nodes, photos: Path, model_file: Path, tmp_path: Path
) -> None:
    """Killed from outside, as the system does it when memory runs out: whoever reads this picture dies."""
    poison = photos / "005.png"
    poison.unlink()
    os.mkfifo(poison)
    holder = os.open(poison, os.O_RDWR)  # so that it can be opened, and never ends
    stop = threading.Event()

    def executioner() -> None:
        while not stop.is_set():
            for one in cluster.workers(WORKER):
                if any(link == str(poison) for link in open_files(one)):
                    kill(one)
            time.sleep(0.02)

    thread = threading.Thread(target=executioner)
    thread.start()
    try:
        sources, faults = cluster.ask(segment_twenty, photos, tmp_path / "out", model_file)
    finally:
        stop.set()
        thread.join()
        os.close(holder)
    assert len(sources) == len(set(sources)) == 20
    assert faults == {"005.png": "worker_died"}
    assert sum(record(tmp_path / "out").values()) == 19


def segment_twenty(photos: Path, output: Path, model: Path) -> tuple[list[str], dict[str, str]]:
    """In two waves: the pictures that have an outcome, and the codes of those that failed."""
    batch_cluster.WAVE = 18
    settings = Settings(model=model, device="cpu", threads=1)
    run = batch.Run(Engine(model, "cpu", 1), settings, Options(), overlay=False)
    found = [Found(photos / f"{index:03}.png") for index in range(20)]
    with open_record(output) as kept:
        outcomes = list(batch_cluster.segment_pictures(batch.plan(found, kept), run, kept, Layout()))
    faults = {job.file.name: one.code for job, one in outcomes if isinstance(one, InputError)}
    return [job.source for job, _ in outcomes], faults


def test_a_file_that_others_made_is_kept(photos: Path, model_file: Path, engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "000.mask.png").write_bytes(b"weeks of work")
    run = batch.Run(engine, Settings(model=model_file), Options(), overlay=False)
    with open_record(tmp_path) as kept:
        jobs = batch.plan([Found(photos / "000.png")], kept)
        ((job, fault),) = batch_cluster.segment_pictures(jobs, run, kept, Layout())
    assert isinstance(fault, InputError)
    assert (job.name, fault.code) == ("000", "not_ours")
    assert (tmp_path / "000.mask.png").read_bytes() == b"weeks of work"


def test_pictures_in_s3_are_segmented_once_and_again_when_they_change(
    cluster: Nodes, bucket: tuple[FileSystem, str], photos: Path, model_file: Path, engine: Engine, tmp_path: Path
) -> None:
    files, query = bucket

    def put(key: str, source: str) -> None:
        with files.open_output_stream(f"photos/{key}") as stream:
            stream.write((photos / source).read_bytes())

    def segment(*more: str) -> tuple[int, str]:
        images = (f"s3://photos/2026{query}", *more)
        with start(cluster.address, model_file, *images, "--recursive", "--output", str(tmp_path / "out")) as process:
            _, error = process.communicate(timeout=WAIT)
        return process.returncode, error

    def same(mask: str, source: str) -> bool:
        pixels = np.asarray(Image.open(photos / source))
        return np.array_equal(np.asarray(Image.open(tmp_path / "out" / mask)), engine.segment(pixels).mask)

    for key, source in {"2026/a.png": "000.png", "2026/may/b.png": "001.png", "2026/may/cut.png": "cut.png"}.items():
        put(key, source)
    put("2025/old.png", "002.png")
    code, error = segment(f"s3://key:hidden@nowhere{query}")
    assert code == 1
    assert "s3://photos/2026/may/cut.png: the PNG file is cut short" in error
    assert f"s3://nowhere{query}: the bucket cannot be read" in error
    assert "hidden" not in error + (tmp_path / "out" / batch.DOCUMENT).read_text()
    assert "2 of 4 inputs failed" in error
    assert same("a.mask.png", "000.png")
    assert same("may/b.mask.png", "001.png")
    assert sorted(path.name for path in (tmp_path / "out").rglob("*.mask.png")) == ["a.mask.png", "b.mask.png"]

    put("2026/may/b.png", "003.png")
    put("2026/may/cut.png", "004.png")
    code, error = segment()
    assert code == 0, error
    assert "1 of 3 pictures were done before" in error
    assert same("may/b.mask.png", "003.png")
    assert same("may/cut.mask.png", "004.png")
    assert set(record(tmp_path / "out")) == {"a.png", "b.png", "cut.png"}


def test_pictures_in_buckets_are_found_like_those_in_folders(tmp_path: Path) -> None:
    for name in ("a.png", "more/b.JPG", "more/.hidden/c.png", "a.mask.png", ".d.png", "note.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"picture")
    url = f"file://{tmp_path}"
    for recursive in (False, True):
        here, _ = find_pictures([tmp_path], recursive)
        there, errors = find_in_buckets([url, url, f"{url}/a.png"], recursive)
        assert errors == []
        assert [(str(one.file), one.below) for one in there] == [(f"file://{one.file}", one.below) for one in here]
    for one in there:
        state = Path(str(one.file).removeprefix("file://")).stat()
        assert one.file.stat() == (state.st_size, state.st_mtime_ns)
        with one.file.open("rb") as stream:
            assert stream.read(4) == b"pict"
    (tmp_path / "bare").mkdir()
    _, errors = find_in_buckets([f"{url}/none", f"{url}/bare", "nothing://x"], True)
    assert [fault["code"] for fault in errors] == ["unreadable", "no_pictures", "unreadable"]


def open_files(process: int) -> list[str]:
    try:
        return [str(link.readlink()) for link in Path(f"/proc/{process}/fd").iterdir()]
    except OSError:
        return []
