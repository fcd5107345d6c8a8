"""`python -m export` as a person runs it: the file, the report, the refusals, and nothing left behind."""

import dataclasses
import json
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import numpy
import onnx
import onnxruntime
import pytest
import torch
from networks import copy_of, exported_network, pictures, small_checkpoint, small_network

from export import cli, parity
from export.errors import ExportError, ParityError
from export.parity import TIE, Case, Comparison, equal_share, largest_error
from export.whole import subgraphs
from model.calibration import Calibration
from model.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from model.config import ModelConfig
from model.encnet import EncNet
from model.foreign import MMSEGMENTATION, inverse, rename, renaming

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "small.pt"
    save_checkpoint(path, small_checkpoint(small_network(), licence="CC0"))
    return path


def export(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def classes_file(path: Path, count: int) -> Path:
    entries = [{"id": index, "name": f"thing {index}", "color": [index, 0, 0]} for index in range(count)]
    path.write_text(json.dumps({"classes": entries}), encoding="utf-8")
    return path


def test_command_writes_a_file_and_reports(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "small.onnx"
    done = subprocess.run(
        [sys.executable, "-m", "export", str(checkpoint), "--output", str(output)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "equal labels" in done.stdout
    assert "largest error" in done.stdout
    assert "Warning" not in done.stdout + done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["small.onnx"]

    runtime = onnxruntime.InferenceSession(output, providers=["CPUExecutionProvider"])
    values = runtime.get_modelmeta().custom_metadata_map
    assert values["checkpoint_sha256"] == load_checkpoint(checkpoint).sha256
    assert values["licence"] == "CC0"
    feeds = {"image": pictures(1, 30, 40), "scales": numpy.array([1.0], numpy.float32), "flip": numpy.array(True)}
    mask, presence, _ = runtime.run(["mask", "presence", "probabilities"], feeds)
    assert mask.shape == (1, 30, 40)
    assert ((presence >= 0) & (presence <= 1)).all()
    assert output.stat().st_mode & 0o777 == 0o644


@pytest.fixture
def translated(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of what comes after the translation to ONNX: the checkpoint's network, translated before."""
    monkeypatch.setattr(cli, "core_model", lambda network, fp16: copy_of(exported_network()[1]))


def test_whole_in_half_precision_with_options(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "half.onnx"
    classes = classes_file(tmp_path / "classes.json", 5)
    options = ["--name", "street", "--classes", classes, "--base-size", 96, "--scales", "0.75,1", "--no-flip"]
    assert export(checkpoint, "--output", output, "--fp16", "--reference-positions", 50, *options) == 0
    model = onnx.load(output)
    values = {entry.key: entry.value for entry in model.metadata_props}
    assert values["graph"] == "whole"
    assert values["precision"] == "float16"
    assert values["name"] == "street"
    assert values["base_size"] == "96"
    assert json.loads(values["scales"]) == [0.75, 1.0]
    assert values["flip"] == "false"
    assert json.loads(values["classes"]) == [f"thing {index}" for index in range(5)]
    assert values["reference_positions"] == "50"
    nodes = [node for graph in subgraphs(model.graph) for node in graph.node if node.domain == "encnet"]
    assert [node.attribute[0].f for node in nodes] == [50]
    parameters = sum(p.numel() for n, p in small_network().named_parameters() if not n.startswith("aux."))
    assert output.stat().st_size < 2.1 * parameters + 50_000


@pytest.mark.usefixtures("translated")
def test_compact_halves_the_file_and_computes_in_float32(checkpoint: Path, tmp_path: Path) -> None:
    plain, compact = tmp_path / "plain.onnx", tmp_path / "compact.onnx"
    assert export(checkpoint, "--output", plain) == 0
    assert export(checkpoint, "--output", compact, "--compact") == 0
    assert compact.stat().st_size < 0.51 * plain.stat().st_size
    model = onnx.load(compact)
    values = {entry.key: entry.value for entry in model.metadata_props}
    assert values["precision"] == "float32"
    casts = [node for graph in subgraphs(model.graph) for node in graph.node if node.op_type == "Cast"]
    assert sum(node.input[0].endswith("/half") for node in casts) > 10
    feeds = {"image": pictures(1, 40, 56), "scales": numpy.ones(1, numpy.float32), "flip": numpy.array(False)}
    answers = [
        onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(["probabilities"], feeds)[0]
        for path in (plain, compact)
    ]
    assert 0 < numpy.abs(answers[0] - answers[1]).max() < 0.05, "rounded weights, nothing else"


@pytest.mark.usefixtures("translated")
def test_network_alone(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "core.onnx"
    assert export(checkpoint, "-o", output, "--core") == 0
    assert "network" in capsys.readouterr().out
    model = onnx.load(output)
    assert {entry.key: entry.value for entry in model.metadata_props}["graph"] == "core"
    assert [value.name for value in model.graph.output] == ["logits", "presence_logits"]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of mmsegmentation without their configuration."""
    state = small_network(backbone="resnet50").state_dict()
    table = inverse(renaming(MMSEGMENTATION, deep_stem=False))
    path = tmp_path_factory.mktemp("published") / "theirs.pth"
    torch.save({"meta": {}, "state_dict": {rename(key, table): value for key, value in state.items()}}, path)
    return path


@pytest.mark.parametrize(
    ("options", "aligned", "noted", "sized"),
    [
        ([], False, True, True),
        (["--align-corners"], True, False, True),
        (["--no-align-corners", "--base-size", "2048"], False, False, False),
    ],
    ids=["assumed", "aligned", "apart"],
)
def test_what_published_weights_do_not_say_is_noted_and_can_be_told(
    published: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    aligned: bool,
    noted: bool,
    sized: bool,
) -> None:
    built = []

    def build(checkpoint: Checkpoint) -> EncNet:
        built.append(checkpoint.config.align_corners)
        raise ExportError("enough for the test")

    monkeypatch.setattr(cli, "build_model", build)
    assert export(published, "--output", tmp_path / "theirs.onnx", *options) == 2
    assert built == [aligned]
    note = (
        "note: align_corners=False is assumed, as mmsegmentation has it, but for 769x769: the file does not say; "
        "if not so, give --align-corners\n"
    )
    error = capsys.readouterr().err
    assert (note in error, "assumed" in error) == (noted, noted)
    size = "note: a picture's long side has 512 pixels at scale 1, as is usual with mmsegmentation; "
    assert (size in error, "--base-size" in error) == (sized, sized)
    assert (
        "note: the file has no names for just these classes, which become class 0, class 1, ..; give --classes" in error
    )


def test_the_resize_rule_of_a_checkpoint_of_ours_stands(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same rule may be named; an assumption is never told of."""
    sentence = refused(capsys, tmp_path, checkpoint, "--no-align-corners")
    assert "was trained with align_corners=True" in sentence
    same = cli.parser().parse_args([str(checkpoint), "--align-corners"])
    loaded = load_checkpoint(checkpoint)
    assert not loaded.assumed
    assert cli.with_options(loaded, same).config == loaded.config


@pytest.mark.parametrize(
    ("name", "message"),
    [("small.pt", "must end in .onnx"), ("missing/small.onnx", "does not exist"), ("folder.onnx", "is a folder")],
)
def test_impossible_output(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, message: str
) -> None:
    (tmp_path / "folder.onnx").mkdir()
    assert export(checkpoint, "--output", tmp_path / name) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["folder.onnx"]


@pytest.mark.parametrize(
    "options", [["--output", "/proc/x.onnx"], ["--triton-repository", "/proc/models"], ["--triton-repository", "/proc"]]
)
def test_a_folder_that_takes_no_file_is_told_before_any_work(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    monkeypatch.setattr(cli, "load_checkpoint", lambda path: pytest.fail("nothing is read"))
    assert export(checkpoint, *options) == 2
    assert capsys.readouterr().err.startswith("error: /proc: nothing can be written there: ")


def test_an_fcn_has_no_reference_positions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = EncNet(ModelConfig(num_classes=3, backbone="resnet18", channels=16, encoding=False))
    save_checkpoint(tmp_path / "fcn.pt", small_checkpoint(network))
    sentence = refused(capsys, tmp_path, tmp_path / "fcn.pt", "--reference-positions", 50)
    assert "is an FCN, without an Encoding layer; leave out --reference-positions" in sentence


def refused(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: object) -> str:
    """The one sentence on standard error of a run that exits 2 and writes nothing."""
    output = folder / "refused.onnx"
    assert export(*arguments, "--output", output) == 2
    assert not [path for path in folder.iterdir() if "refused" in path.name]
    error = capsys.readouterr().err.strip()
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "Traceback" not in error
    return lines[0]


def test_what_is_no_checkpoint(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such file" in refused(capsys, tmp_path, tmp_path / "missing.pt")
    text = tmp_path / "text.pt"
    text.write_text("hello")
    assert "text.pt" in refused(capsys, tmp_path, text)
    half = tmp_path / "half.pt"
    half.write_bytes(checkpoint.read_bytes()[:1000])
    assert "half.pt" in refused(capsys, tmp_path, half)
    other = tmp_path / "other.pt"
    torch.save({"weight": torch.zeros(3)}, other)
    assert "other.pt" in refused(capsys, tmp_path, other)


def test_weights_that_are_missing_or_no_numbers(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = load_checkpoint(checkpoint)
    weights = {key: value for key, value in good.weights.items() if key != "head.presence.bias"}
    save_checkpoint(tmp_path / "lacking.pt", dataclasses.replace(good, weights=weights))
    assert "head.presence.bias" in refused(capsys, tmp_path, tmp_path / "lacking.pt")
    weights = {**good.weights, "head.presence.bias": torch.full((5,), torch.nan)}
    save_checkpoint(tmp_path / "nan.pt", dataclasses.replace(good, weights=weights))
    assert "head.presence.bias" in refused(capsys, tmp_path, tmp_path / "nan.pt")


def test_classes_that_do_not_fit(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    classes = classes_file(tmp_path / "classes.json", 7)
    assert "names 7 classes, the checkpoint has 5" in refused(capsys, tmp_path, checkpoint, "--classes", classes)
    classes.write_text("[1, 2]")
    assert "classes.json" in refused(capsys, tmp_path, checkpoint, "--classes", classes)


def test_a_name_that_is_no_text(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bytes of a command line that are not UTF-8 come as halves of surrogate pairs."""
    assert r"'r\udce9seau' is no text in UTF-8" in refused(capsys, tmp_path, checkpoint, "--name", "r\udce9seau")


@pytest.mark.parametrize(
    "options",
    [
        ["--scales", "1,x"],
        ["--scales", "0"],
        ["--base-size", "-3"],
        ["--base-size", "16385"],
        ["--reference-positions", "nan"],
    ],
)
def test_options_that_make_no_sense(checkpoint: Path, tmp_path: Path, options: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        export(checkpoint, "--output", tmp_path / "x.onnx", *options)
    assert stopped.value.code == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("translated")
@pytest.mark.parametrize("told", [signal.SIGINT, signal.SIGTERM])
def test_a_command_that_is_stopped_leaves_nothing(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    told: signal.Signals,
) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the suite runs in the background
    monkeypatch.setattr(parity, "compare_core", lambda *arguments: signal.raise_signal(told))
    try:
        assert export(checkpoint, "--output", tmp_path / "x.onnx") == 130
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert capsys.readouterr().err.splitlines()[-1] == "error: stopped before it was done"
    assert not list(tmp_path.iterdir())


def test_a_command_that_is_stopped_before_it_has_begun_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Interrupted:
        @staticmethod
        def find_spec(name: str, *more: object) -> None:
            if name == "export.cli":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "export.cli")
    monkeypatch.setattr(sys, "meta_path", [Interrupted, *sys.meta_path])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("export", run_name="__main__")
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "error: stopped before it was done\n"


@pytest.mark.usefixtures("translated")
def test_disagreement_fails_and_leaves_the_old_file(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(parity, "FLOAT32", dataclasses.replace(parity.FLOAT32, logits=0.0))
    output = tmp_path / "small.onnx"
    assert export(checkpoint, "--output", output, "--core") == 1
    assert not list(tmp_path.iterdir())
    captured = capsys.readouterr()
    assert "disagree" in captured.err
    assert "differs" in captured.out
    output.write_bytes(b"the old file")
    assert export(checkpoint, "--output", output, "--core") == 1
    assert output.read_bytes() == b"the old file"


@pytest.mark.usefixtures("translated")
def test_a_graph_that_does_not_run_is_told(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:

    def run(*given: object) -> None:
        raise onnxruntime.capi.onnxruntime_pybind11_state.RuntimeException("bad allocation")

    monkeypatch.setattr(onnxruntime.InferenceSession, "run", run)
    assert "ONNX Runtime cannot run the graph: bad allocation" in refused(capsys, tmp_path, checkpoint)


@pytest.mark.usefixtures("translated")
def test_a_broken_graph_is_noticed(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Corners aligned where the network does not: only the comparison can tell."""
    built = cli.whole_model
    monkeypatch.setattr(cli, "whole_model", lambda core, **options: built(core, **{**options, "align_corners": False}))
    assert export(checkpoint, "--output", tmp_path / "small.onnx") == 1
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calibrated") / "small.pt"
    calibration = Calibration((0.2,) * 5, (-1.0, 0.0, 1.0, 0.0, 0.0), "platt", 20)
    save_checkpoint(path, small_checkpoint(small_network(), calibration=calibration))
    return path


@pytest.mark.usefixtures("translated")
def test_a_calibrated_checkpoint_is_served_calibrated(checkpoint: Path, calibrated: Path, tmp_path: Path) -> None:
    feeds = {"image": pictures(1, 30, 40), "scales": numpy.ones(1, numpy.float32), "flip": numpy.array(False)}
    answers, metadata = [], []
    for name, source in (("plain.onnx", checkpoint), ("calibrated.onnx", calibrated)):
        assert export(source, "--output", tmp_path / name) == 0
        runtime = parity.session((tmp_path / name).read_bytes())
        metadata.append(runtime.get_modelmeta().custom_metadata_map)
        answers.append(runtime.run(["mask", "presence"], feeds))
    assert "presence_scale" not in metadata[0]
    scale, bias = (numpy.array(json.loads(metadata[1][key])) for key in ("presence_scale", "presence_bias"))
    (mask, before), (same_mask, after) = answers
    logits = numpy.log(before.astype(float) / (1 - before.astype(float)))
    numpy.testing.assert_allclose(after, 1 / (1 + numpy.exp(-(scale * logits + bias))), atol=1e-3)
    assert numpy.abs(after - before).max() > 0.1
    assert (mask == same_mask).all()


@pytest.mark.usefixtures("translated")
def test_a_graph_that_forgets_the_calibration_is_noticed(
    calibrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    built = cli.whole_model
    monkeypatch.setattr(cli, "whole_model", lambda core, **options: built(core, **{**options, "calibration": None}))
    assert export(calibrated, "--output", tmp_path / "small.onnx") == 1
    assert "presence differ" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_parity_runs_three_sizes_and_two_batches_with_scales_and_mirroring() -> None:
    for cases in (parity.CORE_CASES, parity.WHOLE_CASES):
        assert len({(case.height, case.width) for case in cases}) >= 3
        assert len({case.batch for case in cases}) >= 2
    assert any(len(case.scales) > 1 and case.flip for case in parity.WHOLE_CASES)
    assert parity.FLOAT32.logits <= 1e-3
    assert parity.FLOAT32.labels >= 0.999


def test_not_a_number_and_wrong_shapes_never_agree() -> None:
    nan = largest_error(numpy.array([1.0, numpy.nan]), numpy.array([1.0, 1.0]))
    shape = largest_error(numpy.zeros((2, 1)), numpy.zeros(2))
    for error in (nan, shape):
        comparison = Comparison("network", Case(1, 2, 3), {"logits": error}, {"logits": 1.0}, 1.0, 0.999)
        assert not comparison.agrees


def test_a_label_counts_as_equal_where_its_class_ties_with_the_best() -> None:
    """Of 150 classes that a network hardly tells apart float16 chooses others at one pixel in a hundred."""
    scores = numpy.zeros((1, 3, 1, 4), numpy.float32)
    scores[0, :, 0] = [[1, 1, 1, 0], [0.999, 0.98, 0.5, 0], [-1, -1, -1, -2]]
    best, second = numpy.zeros((2, 1, 1, 4), numpy.uint8)
    second += 1
    assert equal_share(best, scores) == 1
    assert 0.001 < TIE * scores.std() < 0.02
    assert equal_share(second, scores) == 0.5, "the first ties, and the last is the best as well"
    assert equal_share(best + 2, scores) == 0
    assert equal_share(best[..., :2], scores) == 0, "another shape"
    assert equal_share(best, numpy.full_like(scores, numpy.nan)) == 0


def test_small_errors_do_not_agree_where_they_change_too_many_labels() -> None:
    few, many = (
        Comparison("whole", Case(1, 2, 3), {"presence": 0.0}, {"presence": 1.0}, equal, 0.999)
        for equal in (0.999, 0.998)
    )
    parity.check([few])
    with pytest.raises(ParityError, match=r"99.800% equal labels \(at least 99.9%\)"):
        parity.check([few, many])


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        export("--help")
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "examples:" in text
    assert "exit code" in text
