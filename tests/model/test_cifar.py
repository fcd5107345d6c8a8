"""The paper's CIFAR-10 classifier: its size, its layers, its data, its training."""

import io
import math
import os
import pickle
import signal
from pathlib import Path

import numpy
import pytest
import torch
from torch.nn import functional as F

from model import cifar, evaluate_cifar, train_cifar
from model.checkpoint import CheckpointError
from model.cifar import CifarEncNet, load_cifar
from model.cifar_data import BATCHES, MEAN, STD, crops, open_cifar
from model.data import DataError
from model.recipe import RecipeError, read_recipe
from model.train_cifar import CifarRecipe

TINY = ["variant=2k8d", "epochs=3", "batch=8", "learning_rate=0.05", "log_every=1", "save_every=3", "evaluate_every=3"]


def parameters(variant: str) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in CifarEncNet(variant).parameters())


@pytest.mark.parametrize(("variant", "millions"), [("16k64d", "3.514"), ("32k128d", "16.788")])
def test_the_papers_networks_have_their_numbers_of_parameters(variant, millions):
    assert f"{parameters(variant) / 1e6:.3f}" == millions


def test_the_network_computes_what_is_spelt_out_here():
    """Spelt out in float64, every residual of every position; the smoothing factors are 1/2 in evaluation."""
    torch.manual_seed(0)
    network = CifarEncNet("3k8d").double()
    for name, buffer in network.named_buffers():
        if name.endswith("running_mean"):
            buffer.uniform_(-0.2, 0.2)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    for name in weights:
        if name.endswith("codewords"):
            weights[name].mul_(20)
    network.load_state_dict(weights)
    x = image = torch.randn(2, 3, 32, 32, dtype=torch.float64)

    def norm(x, key):
        return F.batch_norm(x, *(weights[f"{key}.{k}"] for k in ("running_mean", "running_var", "weight", "bias")))

    def conv(x, key, stride=1, padding=1):
        return F.conv2d(x, weights[f"{key}.weight"], weights.get(f"{key}.bias"), stride=stride, padding=padding)

    x = F.relu(norm(conv(x, "conv"), "bn1"))
    assert x.shape == (2, 8, 32, 32)
    for index, (channels, stride) in enumerate([(8, 1), (8, 1), (16, 2), (16, 1), (32, 2), (32, 1)]):
        key = f"blocks.{index}"
        y = F.relu(norm(conv(x, f"{key}.conv1", stride), f"{key}.bn1"))
        y = norm(conv(y, f"{key}.conv2"), f"{key}.bn2")
        z = F.relu(norm(conv(y, f"{key}.gate.project", padding=0), f"{key}.gate.norm"))
        assert z.shape[1] == channels // 4
        residuals = z.flatten(2).transpose(1, 2)[:, :, None] - weights[f"{key}.gate.encoding.codewords"]
        assignment = (-0.5 * residuals.square().sum(-1)).softmax(2)
        codes = (assignment[..., None] * residuals).sum(1).flatten(1)
        codes = codes / codes.norm(dim=1, keepdim=True)
        gate = torch.sigmoid(codes @ weights[f"{key}.gate.gate.weight"].T + weights[f"{key}.gate.gate.bias"])
        if f"{key}.shortcut.weight" in weights:
            x = conv(x, f"{key}.shortcut", stride, padding=0)
        x = F.relu(y * gate[:, :, None, None] + x)
    assert x.shape == (2, 32, 8, 8)
    features = F.avg_pool2d(F.relu(norm(x, "bn2")), 8).flatten(1)
    expected = features @ weights["classifier.weight"].T + weights["classifier.bias"]
    with torch.no_grad():
        torch.testing.assert_close(network.eval()(image), expected, rtol=1e-9, atol=1e-9)


def test_smoothing_factors_are_drawn_anew_in_training_only(monkeypatch):
    drawn = []

    def encode(x, codewords, scale, reference_positions):
        drawn.append(scale)
        return torch.zeros(len(x), *codewords.shape)

    monkeypatch.setattr(cifar, "encode", encode)
    layer = cifar.DropEncoding(4, 1000)
    for training in (True, True, False, False):
        layer.train(training)(torch.zeros(1, 4, 2, 2))
    first, second, *evaluation = drawn
    assert not torch.equal(first, second)
    for scale in (first, second):
        assert -1 <= scale.min() < -0.95 and -0.05 < scale.max() <= 0 and abs(scale.mean() + 0.5) < 0.05
    assert all((scale == -0.5).all() for scale in evaluation)
    assert list(dict(layer.named_parameters())) == ["codewords"], "no smoothing factor is learned"


@pytest.mark.parametrize("variant", ["16k64", "k64d", "0k64d", "16k30d", "16K64D"])
def test_variants_that_cannot_be_are_refused(variant):
    with pytest.raises(ValueError, match="variant must be codewords and channels, a multiple of 4, as in 16k64d"):
        CifarEncNet(variant)


class Python2Pickler(pickle._Pickler):
    """Writes byte strings the way Python 2 did, whose pickles CIFAR-10's files are."""

    dispatch = dict(pickle._Pickler.dispatch)  # noqa: RUF012

    def save_string(self, value):
        raw = value if isinstance(value, bytes) else value.encode("ascii")
        self.write(b"T" + len(raw).to_bytes(4, "little") + raw)

    dispatch[bytes] = dispatch[str] = save_string


def python2_pickle(document: dict) -> bytes:
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(document)
    return file.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def write_cifar(root: Path, python: bool = False, per_file: int = 8) -> Path:
    """Every file has `per_file` pictures: noise around a colour that tells the class."""
    random = numpy.random.default_rng(3)
    colours = random.integers(30, 225, (10, 3))
    folder = root / ("cifar-10-batches-py" if python else "cifar-10-batches-bin")
    folder.mkdir(parents=True)
    for name in BATCHES:
        labels = random.integers(0, 10, per_file)
        noise = random.integers(-25, 25, (per_file, 3, 32, 32))
        pixels = (colours[labels][:, :, None, None] + noise).clip(0, 255).astype(numpy.uint8).reshape(per_file, -1)
        if python:
            document = {"data": pixels, "labels": labels.tolist(), "batch_label": "made up", "filenames": ["a.png"]}
            (folder / name).write_bytes(python2_pickle(document))
        else:
            records = numpy.concatenate([labels[:, None].astype(numpy.uint8), pixels], axis=1)
            (folder / f"{name}.bin").write_bytes(records.tobytes())
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_cifar(tmp_path_factory.mktemp("cifar"))


def test_both_layouts_hold_the_same_pictures(tmp_path):
    binary, python = write_cifar(tmp_path / "binary"), write_cifar(tmp_path / "python", python=True)
    train, test = open_cifar(binary)
    assert train.images.shape == (40, 3, 32, 32) and train.images.dtype == torch.uint8
    assert test.images.shape == (8, 3, 32, 32) and test.labels.dtype == torch.int64
    for root in (binary / "cifar-10-batches-bin", python, python / "cifar-10-batches-py"):
        for ours, theirs in zip((train, test), open_cifar(root), strict=True):
            assert torch.equal(ours.images, theirs.images) and torch.equal(ours.labels, theirs.labels)
    raw = (binary / "cifar-10-batches-bin" / "data_batch_2.bin").read_bytes()
    assert train.labels[8] == raw[0] and train.images[8, 1, 2, 3] == raw[1 + 1024 + 2 * 32 + 3]


def test_wrong_trees_are_explained(tmp_path):
    def sentence(root):
        with pytest.raises(DataError) as error:
            open_cifar(root)
        return str(error.value)

    assert "no such data folder" in sentence(tmp_path / "absent")
    assert "no CIFAR-10; expected cifar-10-batches-bin with data_batch_1.bin to data_batch_5.bin" in sentence(tmp_path)
    root = write_cifar(tmp_path / "binary")
    folder = root / "cifar-10-batches-bin"
    whole = (folder / "data_batch_3.bin").read_bytes()
    (folder / "data_batch_3.bin").write_bytes(whole[:-1])
    assert "data_batch_3.bin: must be records of 3073 bytes, found 24583 bytes" in sentence(root)
    (folder / "data_batch_3.bin").write_bytes(b"\x0a" + whole[1:])
    assert "data_batch_3.bin: labels must be 0..9, found" in sentence(root)
    (folder / "data_batch_3.bin").unlink()
    (folder / "test_batch.bin").unlink()
    assert f"{folder}: CIFAR-10 lacks data_batch_3.bin, test_batch.bin" in sentence(root)

    root = write_cifar(tmp_path / "python", python=True)
    batch = root / "cifar-10-batches-py" / "data_batch_1"
    batch.write_bytes(batch.read_bytes()[:1000])
    assert "data_batch_1: not readable as a batch of CIFAR-10's Python version" in sentence(root)
    batch.write_bytes(python2_pickle({"data": numpy.zeros((2, 5), numpy.uint8), "labels": [1, 2]}))
    assert "must hold data, uint8 (N, 3072), and N labels, found uint8 (2, 5) and (2,)" in sentence(root)


def test_a_pickle_that_would_run_code_is_refused_unrun(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    root = write_cifar(tmp_path / "python", python=True)
    (root / "cifar-10-batches-py" / "data_batch_4").write_bytes(pickle.dumps(Payload(), protocol=2))
    with pytest.raises(DataError, match=r"data_batch_4: .* it would make a posix\.mkdir"):
        open_cifar(root)
    assert not (tmp_path / "executed").exists()


def test_a_crop_is_a_window_of_the_padded_picture_mirrored_half_of_the_time():
    images = torch.arange(1, 200 * 3 * 1024 + 1).reshape(200, 3, 32, 32).remainder(251).to(torch.uint8)
    cut = crops(images, numpy.random.default_rng(1))
    assert cut.shape == (200, 32, 32, 3) and cut.dtype == torch.uint8
    places, mirrored = set(), 0
    for image, crop in zip(images, cut.permute(0, 3, 1, 2), strict=True):
        padded = F.pad(image, [4] * 4)
        windows = {(top, left): padded[:, top : top + 32, left : left + 32] for top in range(9) for left in range(9)}
        found = [
            (place, flip)
            for place, window in windows.items()
            for flip in (False, True)
            if torch.equal(crop, window.flip(-1) if flip else window)
        ]
        assert len(found) == 1
        places.add(found[0][0])
        mirrored += found[0][1]
    assert 60 < mirrored < 140 and len(places) > 60
    assert {top for top, _ in places} == {left for _, left in places} == set(range(9))


def test_it_learns_and_the_evaluation_agrees(data, tmp_path, capsys):
    out = tmp_path / "run"
    given = ["--data", str(data), "--device", "cpu"]
    assert train_cifar.main([*given, "--out", str(out), *TINY, "epochs=12", "evaluate_every=12"]) == 0
    printed = capsys.readouterr().out
    assert "train: 40 pictures, test: 8; 2k8d: 0.0" in printed and "step 60/60" in printed
    losses = [float(line.split("loss ")[1].split()[0]) for line in printed.splitlines() if " loss " in line]
    assert len(losses) == 60 and sum(losses[-10:]) < 0.6 * sum(losses[:10])
    error = printed.split("epoch 12: ")[1].splitlines()[0]
    assert evaluate_cifar.main([str(out / "final.pt"), *given]) == 0
    printed = capsys.readouterr().out
    assert f"2k8d, step 60: {error} (" in printed and "of 8 pictures)" in printed
    assert load_cifar(out / "final.pt").training is None and list((out / "events").iterdir())


def test_resume_in_mid_epoch_is_exact(data, tmp_path, monkeypatch):
    class Stop(Exception):
        pass

    step = train_cifar.CifarRun.train_step

    def until_step_8(run, indices):
        if run.step == 8:
            raise Stop
        return step(run, indices)

    given, recipe = ["--data", str(data), "--device", "cpu"], [*TINY, "precision=bf16"]
    assert train_cifar.main([*given, "--out", str(tmp_path / "whole"), *recipe]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(train_cifar.CifarRun, "train_step", until_step_8)
        with pytest.raises(Stop):
            train_cifar.main([*given, "--out", str(tmp_path / "stopped"), *recipe])
    assert load_cifar(tmp_path / "stopped" / "last.pt").step == 6, "an epoch has 5 steps"
    torch.manual_seed(99)
    assert train_cifar.main([*given, "--out", str(tmp_path / "stopped"), "--resume", "log_every=2"]) == 0
    whole, resumed = (load_cifar(tmp_path / name / "last.pt") for name in ("whole", "stopped"))
    assert whole.step == resumed.step == 15
    assert all(torch.equal(whole.weights[key], resumed.weights[key]) for key in whole.weights)
    moments = [checkpoint.training["optimizer"]["state"] for checkpoint in (whole, resumed)]
    assert all(
        torch.equal(moments[0][key]["momentum_buffer"], moments[1][key]["momentum_buffer"]) for key in moments[0]
    )


def test_a_run_that_is_told_to_stop_saves_after_its_step(data, tmp_path, monkeypatch, capsys, terminal_signals):
    step = train_cifar.CifarRun.train_step

    def interrupted(run, indices):
        if run.step == 7:
            signal.raise_signal(signal.SIGINT)
        return step(run, indices)

    given = ["--data", str(data), "--device", "cpu", "--out", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        patch.setattr(train_cifar.CifarRun, "train_step", interrupted)
        assert train_cifar.main([*given, *TINY]) == 130
    assert "stopped at step 8 of 15; --resume goes on" in capsys.readouterr().out
    assert load_cifar(tmp_path / "run" / "last.pt").step == 8
    assert not (tmp_path / "run" / "final.pt").exists()
    assert train_cifar.main([*given, "--resume"]) == 0
    assert (tmp_path / "run" / "final.pt").exists()


def test_a_run_that_diverges_leaves_the_last_good_checkpoint(data, tmp_path, monkeypatch, capsys):
    given = ["--data", str(data), "--out", str(tmp_path / "run"), *TINY, "log_every=1000", "save_every=1"]
    step = train_cifar.CifarRun.train_step

    def train_step(run, indices):
        loss = step(run, indices)
        if run.step == 2:
            with torch.no_grad():
                next(run.network.parameters()).fill_(math.nan)
        return loss

    monkeypatch.setattr(train_cifar.CifarRun, "train_step", train_step)
    assert train_cifar.main(given) == 2
    assert "weights are NaN or infinite at step 2: lower learning_rate" in capsys.readouterr().err
    assert load_cifar(tmp_path / "run" / "last.pt").step == 1
    assert not (tmp_path / "run" / "final.pt").exists()


def test_the_learning_rate_is_a_cosine_over_all_steps(data):
    run = train_cifar.CifarRun(
        CifarRecipe(variant="1k4d", epochs=2, batch=10, learning_rate=0.2), open_cifar(data), torch.device("cpu")
    )
    rates = []
    for _ in range(run.steps):
        run.train_step([0, 1])
        rates.append(run.optimizer.param_groups[0]["lr"])
    assert len(rates) == 8 and rates[0] == pytest.approx(0.2) and rates[4] == pytest.approx(0.1)
    assert rates[2] == pytest.approx(0.1 * (1 + 0.5**0.5)) and rates == sorted(rates, reverse=True)


def test_pictures_are_normalised_by_their_own_statistics():
    class Probe(torch.nn.Module):
        def forward(self, x):
            return x

    white = train_cifar.logits(Probe(), torch.full((1, 32, 32, 3), 255, dtype=torch.uint8), "fp32")
    expected = [(1 - mean) / std for mean, std in zip(MEAN, STD, strict=True)]
    assert white[0, :, 5, 5].tolist() == pytest.approx(expected, rel=1e-5)


def test_mistakes_get_a_sentence(data, tmp_path, capsys):
    given = ["--data", str(data), "--out", str(tmp_path / "run")]

    def refused(*arguments):
        assert train_cifar.main([str(argument) for argument in arguments]) == 2
        return capsys.readouterr().err

    assert "batch=41 is more than the 40 train pictures" in refused(*given, "batch=41")
    assert "as in 16k64d, got 'wide'" in refused(*given, "batch=8", "variant=wide")
    assert "unknown option 'backbone'; known: variant, " in refused(*given, "backbone=resnet18")
    assert "nothing to resume from" in refused(*given, "--resume")
    assert "--device tpu: expected auto, cpu, cuda or cuda:N" in refused(*given, "--device", "tpu")
    assert not (tmp_path / "run").exists()
    assert train_cifar.main([*given, *TINY, "epochs=1"]) == 0
    assert "already holds a run; add --resume" in refused(*given, *TINY)
    assert "it has batch=8 (given 9)" in refused(*given, "--resume", "batch=9")
    (tmp_path / "run" / "last.pt").write_bytes((tmp_path / "run" / "final.pt").read_bytes())
    assert "holds weights only, nothing to resume from" in refused(*given, "--resume")
    assert evaluate_cifar.main([str(tmp_path / "none.pt"), "--data", str(data)]) == 2
    assert "none.pt: no such file" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_refused(tmp_path):
    path = tmp_path / "final.pt"
    torch.save({"weights": {}}, path)
    with pytest.raises(CheckpointError, match="not a checkpoint of a CIFAR-10 classifier"):
        load_cifar(path)
    weights = CifarEncNet("2k8d").state_dict()
    del weights["conv.weight"]
    cifar.save_cifar(path, cifar.CifarCheckpoint("2k8d", weights, 3))
    with pytest.raises(CheckpointError, match=r"final\.pt: missing keys: conv\.weight"):
        load_cifar(path)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished")
    assert train_cifar.main(["--data", str(data), "--device", "cpu", "--out", str(out), *TINY, "epochs=1"]) == 0
    return out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda document: document["training"].pop("optimizer"), "its training state lacks optimizer"),
        (lambda document: document["training"]["recipe"].update(colour=1), "unknown option 'colour'"),
        (lambda document: document["training"].update(optimizer={}), "its training state does not fit the run"),
        (lambda document: document["training"].update(random=[1]), "its training state does not fit the run"),
        (lambda document: document.update(training=7), "fields that are missing or of a wrong type: training"),
        (lambda document: document.update(weights=7), "fields that are missing or of a wrong type: weights"),
        (lambda document: document.pop("step"), "fields that are missing or of a wrong type: step"),
        (lambda document: document["weights"].update({"conv.weight": 7}), "no dense tensors of real numbers: conv.w"),
    ],
)
def test_a_run_that_cannot_be_resumed_says_why(data, finished, tmp_path, capsys, change, said):
    document = torch.load(finished / "last.pt", weights_only=True)
    change(document)
    torch.save(document, tmp_path / "last.pt")
    assert train_cifar.main(["--data", str(data), "--device", "cpu", "--out", str(tmp_path), "--resume"]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("precision=fp16", "precision must be fp32 or bf16"),
        ("momentum=1", r"momentum must be in \[0, 1\)"),
        ("epochs=0", "epochs must be at least 1"),
    ],
)
def test_wrong_options_are_named(word, message):
    with pytest.raises(RecipeError, match=message):
        CifarRecipe(**read_recipe(None, [word], CifarRecipe))
