"""`python -m export ... --triton-repository`: what it writes is what Triton's ONNX Runtime backend loads and runs."""

import io
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import onnx
import onnxruntime
import pytest
import torch
from networks import copy_of, exported_network, pictures, small_checkpoint

from export import cli, triton
from export.whole import subgraphs
from model.checkpoint import save_checkpoint
from model.predict import predict
from service import kernels
from service.engine import Engine
from service.settings import Settings
from tests.service.tiny_model import CLASSES, METADATA, tiny_model

pytest.importorskip("tritonclient.grpc", reason="Triton's own protobuf is not installed (tritonclient[grpc])")
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig, ModelInstanceGroup, ModelQueuePolicy

ROOT = Path(__file__).parents[2]
EMBEDDED = ROOT / "service" / "models" / "camvid.onnx"
NUMPY = {"TYPE_UINT8": numpy.uint8, "TYPE_UINT16": numpy.uint16, "TYPE_FP32": numpy.float32, "TYPE_BOOL": numpy.bool_}
RUNTIME = {
    "TYPE_UINT8": "tensor(uint8)",
    "TYPE_UINT16": "tensor(uint16)",
    "TYPE_FP32": "tensor(float)",
    "TYPE_BOOL": "tensor(bool)",
}
needs_library = pytest.mark.skipif(not kernels.LIBRARY.exists(), reason="no compiled kernel (make kernels)")

Request = dict[str, numpy.ndarray]


class Backend:
    """What Triton's ONNX Runtime backend does with a model's folder: load it, check it, join requests, run, part."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = text_format.Parse((folder / "config.pbtxt").read_text(), ModelConfig())
        assert self.config.name == folder.name
        assert self.config.backend == "onnxruntime"
        newest = max(int(path.name) for path in folder.iterdir() if path.name.isdecimal())
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        for library in self.config.model_operations.op_library_filename:
            options.register_custom_ops_library(library)
        self.session = onnxruntime.InferenceSession(folder / str(newest) / "model.onnx", options)
        taken = {value.name: value for value in self.session.get_inputs()}
        given = {value.name: value for value in self.session.get_outputs()}
        assert {entry.name for entry in self.config.input} == set(taken), "every input is required with batching"
        for entry in self.config.input:
            assert not entry.optional, "the backend has no optional inputs with batching"
            self.check(entry, taken[entry.name])
        for entry in self.config.output:
            self.check(entry, given[entry.name])

    def check(self, entry: Any, value: Any) -> None:
        """Type and dimensions: one more than in the configuration, the first, for the batch; free ones are names."""
        assert RUNTIME[DataType.Name(entry.data_type)] == value.type
        assert isinstance(value.shape[0], str), "the batch dimension is free"
        assert list(entry.dims) == [-1 if isinstance(size, str) else size for size in value.shape[1:]]

    def infer(self, requests: list[Request]) -> list[Request]:
        """Requests that the dynamic batcher may join: equal shapes but for the batch dimension."""
        sizes = [len(request["image"]) for request in requests]
        assert sum(sizes) <= self.config.max_batch_size
        feeds = {}
        for entry in self.config.input:
            tensors = [request[entry.name] for request in requests]
            for tensor in tensors:
                assert tensor.dtype == NUMPY[DataType.Name(entry.data_type)]
                assert tensor.shape[1:] == tensors[0].shape[1:]
                assert len(tensor.shape) == 1 + len(entry.dims)
                assert all(wanted in (-1, got) for wanted, got in zip(entry.dims, tensor.shape[1:], strict=True))
            feeds[entry.name] = numpy.concatenate(tensors)
        names = [entry.name for entry in self.config.output]
        answers = dict(zip(names, self.session.run(names, feeds), strict=True))
        ends = numpy.cumsum(sizes)
        return [
            {name: answer[end - size : end] for name, answer in answers.items()}
            for size, end in zip(sizes, ends, strict=True)
        ]


def request(image: numpy.ndarray, scales: list[float], flip: bool) -> Request:
    """One picture, uint8 (H, W, 3), as a client of Triton sends it."""
    return {
        "image": image[None],
        "scales": numpy.array([scales], numpy.float32),
        "flip": numpy.array([[flip]]),
    }


def export(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "tiny.onnx"
    onnx.save(tiny_model(), path)
    return path


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository that the README's command makes of the embedded model."""
    line = next(line for line in (ROOT / "README.md").read_text().splitlines() if "--triton-repository" in line)
    _, *arguments, folder = shlex.split(line)
    assert folder == "models"
    repository = tmp_path_factory.mktemp("embedded") / folder
    done = subprocess.run(
        [sys.executable, *arguments, str(repository)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "models/encnet-camvid/1: written" in done.stdout
    return repository


def test_the_folder_has_what_triton_looks_for(embedded: Path) -> None:
    assert tree(embedded) == [
        "encnet-camvid/1/model.onnx",
        "encnet-camvid/config.pbtxt",
        "encnet-camvid/labels.txt",
        "encnet-camvid/warmup/flip",
        "encnet-camvid/warmup/scales",
    ]
    for path in embedded.rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644), "readable by Triton's own user"


def test_the_configuration_parses_as_tritons_own_and_says_what_the_graph_takes(embedded: Path) -> None:
    config = Backend(embedded / "encnet-camvid").config
    classes = json.loads(properties(EMBEDDED)["classes"])
    assert [entry.name for entry in config.input] == ["image", "scales", "flip"]
    assert [list(entry.dims) for entry in config.input] == [[-1, -1, 3], [-1], [1]]
    assert [entry.name for entry in config.output] == ["mask", "presence"]
    assert [list(entry.dims) for entry in config.output] == [[-1, -1], [len(classes)]]
    assert config.output[1].label_filename == "labels.txt"
    assert (embedded / "encnet-camvid" / "labels.txt").read_text().splitlines() == classes
    assert config.max_batch_size > 1
    assert config.HasField("dynamic_batching")
    policy = config.dynamic_batching.default_queue_policy
    assert policy.timeout_action == ModelQueuePolicy.REJECT
    assert policy.max_queue_size > 0
    assert policy.default_timeout_microseconds == 30_000_000
    assert config.version_policy.latest.num_versions == 1
    assert [group.kind for group in config.instance_group] == [ModelInstanceGroup.KIND_AUTO]
    assert {key: value.string_value for key, value in config.parameters.items()} == {
        "cudnn_conv_algo_search": "1",
        "arena_extend_strategy": "1",
    }
    assert not config.model_operations.op_library_filename
    assert config.optimization.input_pinned_memory.enable


def properties(file: Path) -> dict[str, str]:
    return {entry.key: entry.value for entry in onnx.load(file).metadata_props}


def test_the_warm_up_runs_as_triton_runs_it(embedded: Path) -> None:
    backend = Backend(embedded / "encnet-camvid")
    declared = {entry.name: entry for entry in backend.config.input}
    assert [sample.batch_size for sample in backend.config.model_warmup] == [1, backend.config.max_batch_size]
    for sample in backend.config.model_warmup:
        inputs: Request = {}
        for name, value in sample.inputs.items():
            assert value.data_type == declared[name].data_type
            count, kind = int(numpy.prod(value.dims)), NUMPY[DataType.Name(value.data_type)]
            if value.WhichOneof("input_data_type") == "input_data_file":
                data = (backend.folder / "warmup" / value.input_data_file).read_bytes()
            else:
                assert value.random_data
                data = numpy.random.default_rng(0).bytes(count)
            assert len(data) == count * kind().itemsize
            inputs[name] = numpy.frombuffer(data, kind).reshape(1, *value.dims)
        assert inputs["image"].shape == (1, 384, 512, 3), "a picture of the model's own size"
        assert inputs["scales"].tolist() == [json.loads(properties(EMBEDDED)["scales"])]
        assert inputs["flip"].tolist() == [[json.loads(properties(EMBEDDED)["flip"])]]
        if sample.batch_size == 1:
            (answer,) = backend.infer([inputs])
            assert answer["mask"].shape == (1, 384, 512)


@pytest.mark.parametrize("library", [False, pytest.param(True, marks=needs_library)], ids=["alone", "with the kernel"])
def test_requests_that_are_joined_get_the_answers_of_the_service(
    library: bool, embedded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three sets of views in one batch, through the embedded model, bit for bit what the service's engine says."""
    repository = embedded
    if library:
        monkeypatch.setattr(triton, "KERNELS", kernels.LIBRARY.parent)
        repository = tmp_path / "models"
        assert export(EMBEDDED, "--triton-repository", repository, "--triton-mount", repository) == 0
    else:
        monkeypatch.setenv("ENCNET_KERNELS", "off")
    backend = Backend(repository / "encnet-camvid")
    assert bool(backend.config.model_operations.op_library_filename) == library

    images = list(pictures(5, 72, 96))
    plain, mirrored, other = ([0.5, 0.25], False), ([0.5, 0.25], True), ([0.25, 0.375], True)
    views = [plain, other, plain, mirrored, other]
    answers = backend.infer([request(image, *view) for image, view in zip(images, views, strict=True)])

    engine = Engine(EMBEDDED, "cpu", 1)
    for image, (scales, flip), answer in zip(images, views, answers, strict=True):
        members = [other for other, view in zip(images, views, strict=True) if view == (scales, flip)]
        place = next(index for index, other in enumerate(members) if other is image)
        together = engine.run(members, engine.plan(scales, flip))[place]
        numpy.testing.assert_array_equal(answer["mask"][0], together.mask)
        numpy.testing.assert_array_equal(answer["presence"][0], together.presence)
        alone = engine.segment(image, scales, flip)
        numpy.testing.assert_array_equal(answer["mask"][0], alone.mask)
        numpy.testing.assert_allclose(answer["presence"][0], alone.presence, rtol=0, atol=1e-5)


def test_a_request_of_several_pictures_is_a_batch_of_its_own(tiny_file: Path, tmp_path: Path) -> None:
    assert export(tiny_file, "--triton-repository", tmp_path / "models") == 0
    backend = Backend(tmp_path / "models" / "encnet-tiny")
    images = pictures(3, 20, 30)
    one, two = (request(image, [1.0, 0.5], True) for image in images[:2])
    both = {name: numpy.concatenate([one[name], two[name]]) for name in one}
    answers = backend.infer([both, request(images[2], [2.0, 1.0], False)])
    assert [answer["mask"].shape for answer in answers] == [(2, 20, 30), (1, 20, 30)]
    engine = Engine(tiny_file, "cpu", 1)
    for index in range(2):
        numpy.testing.assert_array_equal(
            answers[0]["mask"][index], engine.segment(images[index], [1.0, 0.5], True).mask
        )
    numpy.testing.assert_array_equal(answers[1]["mask"][0], engine.segment(images[2], [2.0, 1.0], False).mask)


def test_a_scale_out_of_bounds_is_taken_as_the_bound(tiny_file: Path, tmp_path: Path) -> None:
    assert export(tiny_file, "--triton-repository", tmp_path / "models") == 0
    backend = Backend(tmp_path / "models" / "encnet-tiny")
    (image,) = pictures(1, 24, 32)
    wild = backend.infer([request(image, [1e9, -1.0], False)])
    bounded = backend.infer([request(image, [3.0, 0.25], False)])
    assert (wild[0]["presence"] == bounded[0]["presence"]).all()
    no_number = backend.infer([request(image, [numpy.nan, 3.0], False), request(image, [3.0, 0.25], False)])
    for answer in no_number:
        assert (answer["presence"] == bounded[0]["presence"]).all(), "a scale that is no number is no one else's"
    bounds = [Settings.model_fields[name].default for name in ("min_scale", "max_scale")]
    assert [triton.LEAST_SCALE, triton.MOST_SCALE] == bounds == [0.25, 3.0], "those of the service"


def test_masks_of_many_classes_are_wide(tmp_path: Path) -> None:
    names = [*CLASSES, *(f"class {index}" for index in range(4, 300))]
    model = tiny_model(300)
    values = {"classes": json.dumps(names), "palette": json.dumps([[0, 0, 0]] * 300)}
    onnx.helper.set_model_props(model, {**METADATA, **values})
    onnx.save(model, tmp_path / "wide.onnx")
    assert export(tmp_path / "wide.onnx", "--triton-repository", tmp_path / "models", "--name", "wide") == 0
    backend = Backend(tmp_path / "models" / "wide")
    assert DataType.Name(backend.config.output[0].data_type) == "TYPE_UINT16"
    (image,) = pictures(1, 24, 32)
    (answer,) = backend.infer([request(image, [1.0], False)])
    numpy.testing.assert_array_equal(answer["mask"][0], Engine(tmp_path / "wide.onnx").segment(image).mask)


def test_from_a_checkpoint_without_a_file_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    network, translated = exported_network()
    monkeypatch.setattr(cli, "core_model", lambda network, fp16: copy_of(translated))
    checkpoint = small_checkpoint(network)
    save_checkpoint(tmp_path / "small.pt", checkpoint)
    assert export(tmp_path / "small.pt", "--triton-repository", tmp_path / "models", "--name", "street") == 0
    said = capsys.readouterr().out
    assert "ONNX Runtime and PyTorch" in said
    assert f"{tmp_path}/models/street/1: written" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models", "small.pt"]
    images = pictures(1, 40, 56)
    (answer,) = Backend(tmp_path / "models" / "street").infer([request(images[0], [0.5, 1.0], True)])
    views = {"base_size": checkpoint.base_size, "scales": (0.5, 1.0), "flip": True}
    expected = predict(network, torch.from_numpy(images), mean=checkpoint.mean, std=checkpoint.std, **views)
    assert (answer["mask"] == expected.probabilities.argmax(1).numpy()).mean() > 0.999
    numpy.testing.assert_allclose(answer["presence"], expected.presence.numpy(), rtol=0, atol=1e-3)


def test_the_same_graph_is_not_written_twice_and_another_becomes_the_next_version(
    tiny_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models, tuned = tmp_path / "models", "# tuned by hand\n"
    assert export(tiny_file, "--triton-repository", models) == 0
    folder = models / "encnet-tiny"
    first = (folder / "1" / "model.onnx").read_bytes()
    with (folder / "config.pbtxt").open("a") as file:
        file.write(tuned)
    capsys.readouterr()

    assert export(tiny_file, "--triton-repository", models) == 0
    assert "encnet-tiny/1: there already, the same graph; config.pbtxt is kept" in capsys.readouterr().out
    changed = tiny_model()
    changed.doc_string = "retrained"
    next(item for item in changed.graph.initializer if item.name == "bias").raw_data = bytes(16)
    onnx.save(changed, tmp_path / "changed.onnx")
    assert export(tmp_path / "changed.onnx", "--triton-repository", models) == 0
    assert "encnet-tiny/2: written; config.pbtxt is kept" in capsys.readouterr().out
    assert (folder / "1" / "model.onnx").read_bytes() == first
    assert (folder / "config.pbtxt").read_text().endswith(tuned)

    assert export(tiny_file, "--triton-repository", models) == 0
    assert (folder / "3" / "model.onnx").read_bytes() == first, "what was exported last is what Triton serves"
    (folder / "config.pbtxt").unlink()
    assert export(tiny_file, "--triton-repository", models) == 0
    assert "kept" not in capsys.readouterr().out.splitlines()[-1]
    assert tuned not in (folder / "config.pbtxt").read_text()
    Backend(folder)


def test_a_path_that_is_no_text_is_told_all_the_same(
    tiny_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "utf-8", write_through=True))
    assert export(tiny_file, "--triton-repository", tmp_path / "mod\udce9les") == 0
    assert rb"mod\udce9les/encnet-tiny/1: written" in written.getvalue()


def refused(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: object, code: int = 2) -> str:
    """The one sentence on standard error of a run that fails; the folder's files are what they were."""
    before = tree(folder)
    assert export(*arguments) == code
    assert tree(folder) == before
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def test_other_classes_are_another_model(tiny_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = tmp_path / "models"
    assert export(tiny_file, "--triton-repository", models) == 0
    other = tiny_model()
    onnx.helper.set_model_props(other, {**METADATA, "classes": json.dumps(["void", *CLASSES[1:]])})
    onnx.save(other, tmp_path / "other.onnx")
    sentence = refused(capsys, tmp_path, tmp_path / "other.onnx", "--triton-repository", models)
    assert "other classes" in sentence
    assert "--name" in sentence


def test_what_cannot_be_put_into_a_repository(
    tiny_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = tmp_path / "models"
    assert export(tiny_file, "--triton-repository", models) == 0
    made = models / "encnet-tiny" / "1" / "model.onnx"
    core = tmp_path / "core.onnx"
    model = tiny_model()
    onnx.helper.set_model_props(model, {**METADATA, "graph": "core"})
    onnx.save(model, core)
    foreign = tmp_path / "foreign.onnx"
    onnx.save(copy_of(exported_network()[1]), foreign)
    text = tmp_path / "text.onnx"
    text.write_text("hello")
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(tiny_file.read_bytes()[:400])
    named = tmp_path / "named.onnx"
    model = tiny_model()
    onnx.helper.set_model_props(model, {**METADATA, "name": "street/scenes"})
    onnx.save(model, named)
    unsaid = tmp_path / "unsaid.onnx"
    onnx.helper.set_model_props(model, {**METADATA, "classes": "road, sky"})
    onnx.save(model, unsaid)
    for source, part in (
        (made, "comes from such a repository already"),
        (core, "holds the network alone"),
        (foreign, "was not written by `python -m export`"),
        (text, "is no ONNX file"),
        (damaged, "is no ONNX file"),
        (tmp_path / "missing.onnx", "missing.onnx"),
        (named, "--name"),
        (unsaid, "its metadata is damaged"),
    ):
        assert part in refused(capsys, tmp_path, source, "--triton-repository", models)


def test_a_damaged_file_is_refused(tiny_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = tmp_path / "damaged.onnx"
    for key, value in (
        ("name", None),
        ("classes", "[1, 2, 3, 4]"),
        ("classes", '["a", "a", "b", "c"]'),
        ("base_size", "0"),
        ("scales", "[]"),
        ("scales", '["1"]'),
        ("flip", "1"),
        ("classes", r'["\ud800", "a", "b", "c"]'),
        ("scales", "[1e300]"),
    ):
        values = {**METADATA, key: value}
        model = tiny_model()
        onnx.helper.set_model_props(model, {key: value for key, value in values.items() if value is not None})
        onnx.save(model, damaged)
        sentence = refused(capsys, tmp_path, damaged, "--triton-repository", tmp_path / "models")
        assert "its metadata is damaged" in sentence
        assert key in sentence
    for name in ("mask", "presence"):
        model = tiny_model()
        model.graph.output.remove(next(value for value in model.graph.output if value.name == name))
        onnx.save(model, damaged)
        sentence = refused(capsys, tmp_path, damaged, "--triton-repository", tmp_path / "models")
        assert "must have outputs mask and presence" in sentence
    model = tiny_model()
    onnx.helper.set_model_props(model, {**METADATA, "classes": "[" * 100_000})
    onnx.save(model, damaged)
    sentence = refused(capsys, tmp_path, damaged, "--triton-repository", tmp_path / "models")
    assert "its metadata is damaged" in sentence
    damaged.write_bytes(tiny_file.read_bytes().replace(b"encnet-tiny", b"encnet-tin\xff"))
    sentence = refused(capsys, tmp_path, damaged, "--triton-repository", tmp_path / "models")
    assert "not all of it is text in UTF-8" in sentence


def test_a_graph_that_does_not_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken.onnx"
    model = tiny_model()
    model.graph.node[0].op_type = "Bogus"
    onnx.save(model, broken)
    sentence = refused(capsys, tmp_path, broken, "--triton-repository", tmp_path / "models")
    assert "ONNX Runtime cannot load the graph: " in sentence
    model = tiny_model()
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 7
    onnx.save(model, broken)
    sentence = refused(capsys, tmp_path, broken, "--triton-repository", tmp_path / "models")
    assert "ONNX Runtime cannot run the graph: " in sentence


def test_weights_in_a_file_that_is_gone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    split = tmp_path / "split.onnx"
    onnx.save(tiny_model(), split, save_as_external_data=True, location="weights.bin", size_threshold=0)
    (tmp_path / "weights.bin").write_bytes(b"")
    assert "its weights cannot be read: " in refused(capsys, tmp_path, split, "--triton-repository", tmp_path / "m")
    (tmp_path / "weights.bin").unlink()
    assert "its weights cannot be read: " in refused(capsys, tmp_path, split, "--triton-repository", tmp_path / "m")


@pytest.mark.parametrize("fault", ["name", "kernel", "labels"])
def test_what_cannot_be_put_there_is_told_before_the_export(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(triton, "KERNELS", tmp_path)
    monkeypatch.setattr(cli, "core_model", None)
    save_checkpoint(tmp_path / "small.pt", small_checkpoint(exported_network()[0]))
    (tmp_path / "models" / "street").mkdir(parents=True)
    (tmp_path / "models" / "street" / "labels.txt").write_text("other\n")
    name = {"name": "a/b", "kernel": "new", "labels": "street"}[fault]
    options = ["--triton-mount", "/models"] if fault == "kernel" else []
    output = ["--output", tmp_path / "x.onnx", "--triton-repository", tmp_path / "models", "--name", name]
    sentence = refused(capsys, tmp_path, tmp_path / "small.pt", *output, *options)
    assert {"name": "cannot be that of a folder", "kernel": "make kernels", "labels": "other classes"}[
        fault
    ] in sentence


def test_a_folder_without_a_model_takes_one_that_all_can_read(tiny_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models" / "encnet-tiny"
    folder.mkdir(parents=True)
    mask = os.umask(0o077)
    try:
        assert export(tiny_file, "--triton-repository", tmp_path / "models") == 0
        assert export(tiny_file, "--triton-repository", tmp_path / "models", "--name", "another") == 0
    finally:
        os.umask(mask)
    Backend(folder)
    for path in (*folder.rglob("*"), *(tmp_path / "models" / "another").rglob("*")):
        assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644)


def test_options_that_do_not_go_together(tiny_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = tmp_path / "models"
    for arguments, part in (
        ([], "nothing to write"),
        (["--output", tmp_path / "again.onnx"], "is exported already: --output"),
        (["--triton-repository", models, "--fp16", "--no-flip"], "--fp16, --flip"),
        (["--triton-repository", models, "--no-align-corners"], "--align-corners can only be had from its checkpoint"),
        (["--triton-repository", models, "--core"], "leave out --core"),
        (["--triton-repository", models, "--triton-mount", "models"], "full path"),
        (["--output", tmp_path / "again.onnx", "--triton-mount", "/models"], "--triton-repository"),
        (["--triton-repository", tmp_path / "no" / "models"], "does not exist"),
        (["--triton-repository", tiny_file], "is a file"),
    ):
        assert part in refused(capsys, tmp_path, tiny_file, *arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fault", ["missing", "damaged"])
def test_without_a_sound_kernel_nothing_is_written(
    fault: str, tiny_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(triton, "KERNELS", tmp_path)
    if fault == "damaged":
        (tmp_path / "libencnet_ort.so").write_text("not a library")
    sentence = refused(capsys, tmp_path, tiny_file, "--triton-repository", tmp_path / "m", "--triton-mount", "/models")
    assert {"missing": "make kernels", "damaged": "does not load"}[fault] in sentence
    assert not (tmp_path / "m").exists()


@needs_library
def test_the_kernel_goes_along_and_is_named_where_triton_finds_it(
    tiny_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton, "KERNELS", tmp_path)
    for name, kind in (("libencnet_ort.so", "KIND_CPU"), ("libencnet_ort_cuda.so", "KIND_AUTO")):
        shutil.copy(kernels.LIBRARY, tmp_path / name)
        repository = tmp_path / f"models for {kind}"
        assert export(tiny_file, "--triton-repository", repository, "--triton-mount", "/models/") == 0
        config = text_format.Parse((repository / "encnet-tiny" / "config.pbtxt").read_text(), ModelConfig())
        assert list(config.model_operations.op_library_filename) == [f"/models/encnet-tiny/{name}"]
        assert (repository / "encnet-tiny" / name).read_bytes() == kernels.LIBRARY.read_bytes()
        assert ModelInstanceGroup.Kind.Name(config.instance_group[0].kind) == kind


@needs_library
def test_a_configuration_that_is_kept_is_told_what_the_kernel_needs(
    tiny_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(triton, "KERNELS", tmp_path)
    shutil.copy(kernels.LIBRARY, tmp_path)
    models = tmp_path / "models"
    folder = models / "encnet-tiny"
    assert export(tiny_file, "--triton-repository", models) == 0
    with (folder / "config.pbtxt").open("ab") as file:
        file.write(f"# KIND_CPU, {folder / kernels.LIBRARY.name}\n# gepr\u00fcft\n".encode("latin-1"))
    assert export(tiny_file, "--triton-repository", models, "--triton-mount", models) == 0
    *_, line, other = capsys.readouterr().out.splitlines()
    said, _, to_add = line.partition("config.pbtxt: ")
    assert said == "to use the compiled kernel, add to "
    said, _, instances = other.partition("config.pbtxt: ")
    assert said == "to use the compiled kernel, replace instance_group in "
    text = (folder / "config.pbtxt").read_text(encoding="latin-1")
    assert text.count(instances.replace("KIND_CPU", "KIND_AUTO")) == 1
    (folder / "config.pbtxt").write_text(text.replace(instances.replace("KIND_CPU", "KIND_AUTO"), instances) + to_add)
    assert list(Backend(folder).config.model_operations.op_library_filename) == [str(folder / kernels.LIBRARY.name)]
    assert export(tiny_file, "--triton-repository", models, "--triton-mount", models) == 0
    assert "to use" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("value", "instead"),
    [
        ("group_options", onnx.helper.make_node("Gather", ["groups", "last"], ["group_options"], axis=0)),
        ("group_flip", onnx.helper.make_node("Not", ["yes"], ["group_flip"])),
    ],
    ids=["views of another picture", "nothing mirrored"],
)
def test_a_graph_that_answers_differently_is_not_written(
    value: str,
    instead: onnx.NodeProto,
    tiny_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Wrong for some of the pictures of a batch: only running both graphs can tell."""
    made = triton.batched_model

    def mixed_up(whole: onnx.ModelProto) -> onnx.ModelProto:
        model = made(whole)
        node = next(node for graph in subgraphs(model.graph) for node in graph.node if node.output[0] == value)
        node.CopyFrom(instead)
        return model

    monkeypatch.setattr(triton, "batched_model", mixed_up)
    assert "differ" in refused(capsys, tmp_path, tiny_file, "--triton-repository", tmp_path / "models", code=1)
    assert not (tmp_path / "models").exists()
