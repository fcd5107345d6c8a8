"""Training as a user meets it: learns, resumes exactly after kill -9, agrees over processes, refuses nonsense."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from model import evaluate, evaluation, train
from model.checkpoint import build_model, load_checkpoint
from model.config import ModelConfig
from model.encnet import EncNet, Outputs
from model.losses import encnet_loss
from model.processes import restarted
from model.recipe import Recipe, RecipeError, read_recipe
from model.run import Run, class_weights, evaluation_options, learning_rate_factor
from tests.model.folders import write_scenes

ROOT = Path(__file__).parents[2]
TINY = [
    "backbone=resnet18", "channels=16", "codewords=4", "batch=2", "crop=32", "base_size=48", "epochs=3",
    "optimizer=adamw", "learning_rate=0.002", "head_rate=1.0", "save_every=3", "evaluate_every=3", "log_every=1",
    "workers=0", "reference_positions=16",
]  # fmt: skip
KILLED_AT_STEP_5 = """
import os, signal, sys
from model import train
from model.run import Run
step = Run.train_step
def train_step(run, images, masks):
    if run.step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(run, images, masks)
Run.train_step = train_step
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("scenes"))


def run(*arguments, program=("-m", "model.train"), check=True):
    process = subprocess.run(
        [sys.executable, *program, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    if check:
        assert process.returncode == 0, process.stdout + process.stderr
    return process


def identical(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("cache", ["device", "off"])
def test_resume_after_kill_9_in_mid_epoch_is_exact(scenes, tmp_path, cache):
    options = [*TINY, "ema=0.9", "dropout=0.3", "clip=1.0", "precision=bf16", "warmup=4"]
    options += ["class_balance=0.3", "accumulate=2", "save_every=4", f"cache={cache}", "workers=1"]
    assert train.main(["--data", str(scenes), "--out", str(tmp_path / "whole"), *options]) == 0
    killed = run(
        "--data", scenes, "--out", tmp_path / "killed", *options, program=("-c", KILLED_AT_STEP_5), check=False
    )
    assert killed.returncode == -signal.SIGKILL
    assert load_checkpoint(tmp_path / "killed" / "last.pt").step == 4, "killed at 5; an epoch has 3"
    assert not (tmp_path / "killed" / "final.pt").exists()
    assert train.main(["--data", str(scenes), "--out", str(tmp_path / "killed"), "--resume"]) == 0
    whole, resumed = (load_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "killed"))
    assert identical(whole.weights, resumed.weights), "averaged weights"
    assert identical(whole.training["model"], resumed.training["model"]), "trained weights"
    assert whole.step == resumed.step == 9
    steps = [[row["step"] for row in run.training["curves"]["training"]] for run in (whole, resumed)]
    assert steps[0] == steps[1] == list(range(1, 10))


def test_a_run_is_worked_off_in_pieces_and_its_figures_stand_beside_its_weights(scenes, tmp_path, capsys):
    options = ["--data", str(scenes), "--out", str(tmp_path / "pieces")]
    assert train.main([*options, *TINY, "--minutes", "0"]) == 0
    assert "time is up at step 1 of 9; --resume goes on" in capsys.readouterr().out
    assert not (tmp_path / "pieces" / "final.pt").exists()
    assert train.main([*options, "--resume", "--minutes", "9"]) == 0
    assert "continuing at step 1 of 9" in capsys.readouterr().out
    assert train.main(["--data", str(scenes), "--out", str(tmp_path / "whole"), *TINY]) == 0
    pieces, whole = (load_checkpoint(tmp_path / name / "final.pt") for name in ("pieces", "whole"))
    assert identical(pieces.weights, whole.weights)

    folder = tmp_path / "pieces"
    curves = json.loads((folder / "curves.json").read_text())
    assert [row["step"] for row in curves["training"]] == list(range(1, 10))
    assert curves["validation"][-1]["step"] == 9
    for name in ("curves.png", "final.evaluation/contact_sheet.png"):
        with Image.open(folder / name) as figure:
            assert min(figure.size) > 200
    totals = json.loads((folder / "final.evaluation" / "evaluation.json").read_text())["totals"]
    assert totals["miou"] == pytest.approx(curves["validation"][-1]["miou"], abs=1e-6)


def test_only_training_searches_the_fastest_algorithms_for_a_size(scenes, tmp_path, monkeypatch):
    """As on a GPU: crops have one size, and the pictures of an evaluation many."""
    searched = {}

    def noting(name, function):
        def note(*given, **options):
            searched.setdefault(name, set()).add(torch.backends.cudnn.benchmark)
            return function(*given, **options)

        return note

    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setattr(Run, "train_step", noting("step", Run.train_step))
    monkeypatch.setattr("model.run.evaluate", noting("validation", evaluation.evaluate))
    monkeypatch.setattr(evaluate, "evaluate", noting("report", evaluate.evaluate))
    assert train.main(["--data", str(scenes), "--out", str(tmp_path / "run"), *TINY, "evaluate_every=1"]) == 0
    assert searched == {"step": {True}, "validation": {False}, "report": {False}}
    assert torch.backends.cudnn.benchmark


def test_a_run_of_fewer_steps_than_log_every_has_its_last_loss(scenes, tmp_path):
    out = tmp_path / "run"
    assert train.main(["--data", str(scenes), "--out", str(out), *TINY, "epochs=1", "log_every=20"]) == 0
    (row,) = json.loads((out / "curves.json").read_text())["training"]
    assert row["step"] == 3


GRADIENTS = """
import sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from model import sync_batchnorm
from model.config import ModelConfig
from model.encnet import EncNet
from model.losses import encnet_loss

dist.init_process_group("gloo")
rank, processes = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)
network = EncNet(ModelConfig(3, "resnet18", channels=16, codewords=4, dropout=0.0, stage3_presence=True)).double()
images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
masks = torch.randint(0, 3, (4, 32, 32))
masks[0, :20] = 255  # the processes have different numbers of labelled pixels
model = DistributedDataParallel(sync_batchnorm.convert(network) if processes > 1 else network)
share = slice(rank * 4 // processes, (rank + 1) * 4 // processes)
weights = torch.tensor([1.0, 2.0, 3.0])
encnet_loss(model(images[share]), masks[share], class_weights=weights).total.backward()
if rank == 0:
    values = {name: parameter.grad for name, parameter in network.named_parameters()}
    torch.save(values | {f"buffer {name}": value for name, value in network.named_buffers()}, sys.argv[1])
dist.destroy_process_group()
"""


def launch(processes, *arguments):
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}")
    run(*arguments, program=launcher)


def test_two_processes_with_half_the_batch_have_the_gradients_of_one_with_all_of_it(tmp_path):
    script = tmp_path / "gradients.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{GRADIENTS}")
    for processes in (1, 2):
        launch(processes, script, tmp_path / f"{processes}.pt")
    one, two = (torch.load(tmp_path / f"{processes}.pt") for processes in (1, 2))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_torchrun_trains_and_resumes(scenes, tmp_path):
    options = ["-m", "model.train", "--data", scenes, "--out", tmp_path / "run"]
    launch(2, *options, *TINY, "epochs=1")
    assert load_checkpoint(tmp_path / "run" / "final.pt").step == 3
    refused = run(*options[2:], "--resume", check=False)
    assert refused.returncode == 2
    assert "started with 2 processes; resume it with as many, not with 1" in refused.stderr


KILLED_ONCE = """
import os, signal, sys
sys.path.insert(0, sys.argv.pop(1))
from model import train
from model.run import Run
step = Run.train_step
def train_step(run, images, masks):
    if run.step == 5 and run.rank == run.processes - 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return step(run, images, masks)
Run.train_step = train_step
sys.exit(train.main(sys.argv[1:]))
"""
STEPS = ["batch=4", "accumulate=1", "epochs=8", "optimizer=sgd", "learning_rate=0.01", "workers=0"]


def launch_and_kill_once(processes, scenes, out, *options):
    script = out.with_suffix(".py")
    script.write_text(KILLED_ONCE)
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "--max-restarts=1")
    printed = run(script, ROOT, "--data", scenes, "--out", out, *TINY, *STEPS, *options, program=launcher).stdout
    assert "continuing at step 3 of 8" in printed
    return load_checkpoint(out / "last.pt")


def test_two_processes_of_which_one_is_killed_end_with_the_weights_of_an_unbroken_run(scenes, tmp_path):
    launch(2, "-m", "model.train", "--data", scenes, "--out", tmp_path / "whole", *TINY, *STEPS)
    whole = load_checkpoint(tmp_path / "whole" / "last.pt")
    killed = launch_and_kill_once(2, scenes, tmp_path / "killed")
    assert whole.step == killed.step == 8
    assert identical(whole.weights, killed.weights), "bit for bit"


def test_four_processes_of_which_one_is_killed_end_with_the_weights_of_one_process(scenes, tmp_path):
    """Sums in another order move the last bits, and steps multiply that; dropout differs with the process."""
    options = ["dropout=0.0", "learning_rate=0.00003"]
    assert train.main(["--data", str(scenes), "--out", str(tmp_path / "one"), *TINY, *STEPS, *options]) == 0
    one = load_checkpoint(tmp_path / "one" / "last.pt")
    killed = launch_and_kill_once(4, scenes, tmp_path / "killed", *options)
    assert killed.step == one.step == 8
    torch.manual_seed(0)
    network = EncNet(one.config)
    names = [name for name, _ in network.named_parameters()]
    first, alone, four = (
        torch.cat([weights[name].flatten() for name in names])
        for weights in (network.state_dict(), one.weights, killed.weights)
    )
    assert (four - alone).norm() < 0.05 * (alone - first).norm(), "a lost step or momentum would be far more"
    for name, _ in network.named_buffers():
        torch.testing.assert_close(killed.weights[name], one.weights[name], rtol=1e-2, atol=1e-3)


def test_a_step_in_parts_has_the_gradients_of_the_parts_together():
    """Without batch norm and dropout a step does not depend on its division."""
    random = torch.Generator().manual_seed(0)
    masks = torch.randint(0, 3, (4, 8, 8), generator=random)
    masks[0] = 255
    masks[1, :6] = 255
    weights = torch.tensor([1.0, 2.0, 3.0])

    def gradients(parts):
        logits = torch.linspace(-1, 1, 4 * 3 * 8 * 8).view(4, 3, 8, 8).requires_grad_()
        presence = torch.linspace(-2, 1, 12).view(4, 3).requires_grad_()
        for part in torch.arange(4).chunk(parts):
            outputs = Outputs(logits[part], presence[part], 2 * logits[part], 3 * presence[part])
            encnet_loss(outputs, masks[part], class_weights=weights, whole=masks).total.backward()
        return logits.grad, presence.grad

    for parts in (2, 4):
        for ours, expected in zip(gradients(parts), gradients(1), strict=True):
            torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("exponent", [0.3, 1.0])
def test_class_weights_balance_the_classes_that_occur(exponent):
    class Crops:
        def label_counts(self, classes):
            return torch.tensor([900, 0, 100])

    weights = class_weights(Crops(), 3, exponent)
    assert float(weights[1]) == 1
    assert float(0.9 * weights[0] + 0.1 * weights[2]) == pytest.approx(1)
    assert float(weights[2] / weights[0]) == pytest.approx(9**exponent)
    assert class_weights(Crops(), 3, 0.0) is None


def test_a_batch_that_cannot_be_divided_is_refused(scenes, tmp_path, capsys):
    assert train.main(["--data", str(scenes), "--out", str(tmp_path / "run"), *TINY, "accumulate=3"]) == 2
    assert "batch=2 must be a multiple of the 1 processes times accumulate=3" in capsys.readouterr().err


def test_more_processes_than_gpus_are_told(scenes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in (("RANK", "2"), ("LOCAL_RANK", "2"), ("WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    assert train.main(["--data", str(scenes), "--out", str(tmp_path / "run"), *TINY, "batch=4"]) == 2
    said = capsys.readouterr().err
    assert "process 3 of this machine finds no GPU of its own, there are 2; start 2 by --nproc-per-node" in said


def test_the_network_compiles_whole_and_computes_the_same():
    """Without the code generator, which takes minutes on a CPU; `make gpu-check` and benchmarks.training use it."""
    torch.manual_seed(0)
    network = EncNet(ModelConfig(3, "resnet18", channels=16, codewords=4, dropout=0.0)).train()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    objective = torch.compile(encnet_loss, fullgraph=True, backend="aot_eager")
    images, masks = torch.randn(2, 3, 32, 32), torch.randint(0, 3, (2, 32, 32))
    found = []
    for model, loss in ((network, encnet_loss), (compiled, objective)):
        network.zero_grad()
        loss(model(images), masks, whole=masks).total.backward()
        found.append([parameter.grad.clone() for parameter in network.parameters()])
    for plain, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)


def test_it_learns_and_its_checkpoint_is_complete(scenes, tmp_path, capsys):
    out = tmp_path / "run"
    assert train.main(["--data", str(scenes), "--out", str(out), *TINY, "epochs=12", "name=bands"]) == 0
    printed = capsys.readouterr().out
    assert "validation mIoU" in printed and "step 36/36" in printed
    checkpoint = load_checkpoint(out / "final.pt")
    assert checkpoint.classes == ["band 0", "band 1", "band 2"] and checkpoint.base_size == 48
    assert checkpoint.name == "bands" and checkpoint.step == 36 and checkpoint.training is None
    assert checkpoint.versions["torch"] == torch.__version__ and checkpoint.config.reference_positions == 16
    build_model(checkpoint)
    losses = [float(line.split("loss ")[1].split()[0]) for line in printed.splitlines() if " loss " in line]
    assert sum(losses[-6:]) < 0.75 * sum(losses[:6])
    assert list((out / "events").iterdir()) and (out / "best.pt").exists()


def test_reference_positions_of_the_crop_change_no_weight(scenes, tmp_path):
    """So that a network and its plain sum are one run; benchmarks/reference_positions.py relies on it."""
    weights = []
    for positions in (0, (32 // 8) ** 2):
        out = tmp_path / str(positions)
        options = [*TINY, "epochs=2", f"reference_positions={positions}"]
        assert train.main(["--data", str(scenes), "--out", str(out), *options]) == 0
        weights.append(load_checkpoint(out / "final.pt").weights)
    assert identical(*weights)


def test_a_run_that_diverged_is_not_saved(scenes, tmp_path, capsys):
    options = [*TINY, "optimizer=sgd", "learning_rate=1e30", "log_every=1000"]
    assert train.main(["--data", str(scenes), "--out", str(tmp_path / "run"), *options]) == 2
    assert "at step 3: lower learning_rate, raise warmup or set clip" in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("*.pt"))


@pytest.mark.parametrize("minutes", ["nan", "-1", "soon"])
def test_minutes_that_are_none(scenes, capsys, minutes):
    with pytest.raises(SystemExit):
        train.main(["--data", str(scenes), f"--minutes={minutes}"])
    assert f"expected minutes, 0 or more, got '{minutes}'" in capsys.readouterr().err


def test_paths_are_printed_as_they_are(tmp_path, capsys):
    assert train.main(["--data", str(tmp_path / "[red]a[/b]:car:"), "--out", str(tmp_path / "x")]) == 2
    printed = capsys.readouterr()
    assert "[red]a[/b]:car:: no such data folder" in printed.out
    assert "[red]a[/b]:car:: training does not start" in printed.err


def test_a_run_is_not_overwritten_and_resume_needs_one(scenes, tmp_path, capsys):
    out = tmp_path / "run"
    out.mkdir()
    (out / "last.pt").write_bytes(b"")
    assert train.main(["--data", str(scenes), "--out", str(out), *TINY]) == 2
    assert "already holds a run; add --resume, or choose another folder" in capsys.readouterr().err
    assert train.main(["--data", str(scenes), "--out", str(tmp_path / "none"), "--resume"]) == 2
    assert "nothing to resume from" in capsys.readouterr().err
    assert train.main(["--data", str(scenes), "--out", str(out), "--resume"]) == 2
    assert "not readable as a PyTorch checkpoint" in capsys.readouterr().err


def test_a_run_can_start_from_anothers_weights(scenes, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    assert train.main(["--data", str(scenes), "--out", str(first), *TINY, "epochs=1"]) == 0
    given = ["--data", str(scenes), "--out", str(second), "--initial", str(first / "final.pt")]
    still = ["epochs=1", "learning_rate=1e-12", "weight_decay=0.0", "drop_path=0.1", "dropout=0.2"]
    assert train.main([*given, *TINY, *still]) == 0
    weights = [
        load_checkpoint(folder / "final.pt").weights["head.bottleneck.conv.weight"] for folder in (first, second)
    ]
    torch.testing.assert_close(*weights, rtol=0, atol=1e-6)
    capsys.readouterr()
    assert train.main([*given, "--resume"]) == 2
    assert "give one of them" in capsys.readouterr().err
    given[3] = str(tmp_path / "third")
    assert train.main([*given, *TINY, "codewords=5"]) == 2
    assert "codewords=4 (here 5)" in capsys.readouterr().err
    assert not (tmp_path / "third" / "last.pt").exists()


def test_resume_refuses_another_recipe(scenes, tmp_path, capsys):
    out = tmp_path / "run"
    assert train.main(["--data", str(scenes), "--out", str(out), *TINY, "epochs=1"]) == 0
    assert train.main(["--data", str(scenes), "--out", str(out), "--resume", "epochs=9"]) == 2
    assert "it has epochs=1 (given 9)" in capsys.readouterr().err


@pytest.fixture(scope="module")
def finished(scenes, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished")
    assert train.main(["--data", str(scenes), "--out", str(out), *TINY, "epochs=1"]) == 0
    return out


def rename_classes(root, *names):
    classes = [{"id": i, "name": name, "color": [9 * i, 0, 0]} for i, name in enumerate(names)]
    (root / "classes.json").write_text(json.dumps({"classes": classes}))


def test_resume_refuses_another_data_set(finished, tmp_path, capsys):
    data = write_scenes(tmp_path / "data")
    resume = ["--data", str(data), "--out", str(finished), "--resume"]
    for names in (("band 0", "band 1", "sea"), ("band 0", "band 1", "band 2", "band 3")):
        rename_classes(data, *names)
        assert train.main(resume) == 2
        assert "the run was started with the classes band 0, band 1, band 2, the data" in capsys.readouterr().err
    write_scenes(data, pictures=5)
    assert train.main(resume) == 2
    assert "the run was started with other pictures" in capsys.readouterr().err


def test_initial_weights_of_other_class_names_are_told(finished, tmp_path, capsys):
    data = write_scenes(tmp_path / "data")
    rename_classes(data, "band 0", "band 1", "sea")
    given = ["--data", str(data), "--out", str(tmp_path / "run"), "--initial", str(finished / "final.pt")]
    assert train.main([*given, *TINY, "epochs=1"]) == 0
    assert "note: the checkpoint and the data set name classes differently: band 2 / sea" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda document: document.update(training=None), "holds weights only, nothing to resume from"),
        (lambda document: document["training"].pop("optimizer"), "its training state lacks optimizer"),
        (lambda document: document["training"]["recipe"].update(colour=1), "unknown option 'colour'"),
        (lambda document: document["training"]["recipe"].update(epochs="1"), "epochs must be int, got '1'"),
        (lambda document: document["training"].update(optimizer={}), "its training state does not fit the run"),
        (lambda document: document["training"]["model"].popitem(), "its training state does not fit the run"),
    ],
)
def test_a_run_that_cannot_be_resumed_says_why(scenes, finished, tmp_path, capsys, change, said):
    document = torch.load(finished / "last.pt", weights_only=True)
    change(document)
    torch.save(document, tmp_path / "last.pt")
    assert train.main(["--data", str(scenes), "--out", str(tmp_path), "--resume"]) == 2
    assert said in capsys.readouterr().err


def test_broken_data_stops_before_training(tmp_path, capsys):
    root = write_scenes(tmp_path / "data")
    (root / "labels" / "scene_1.png").unlink()
    assert train.main(["--data", str(root), "--out", str(tmp_path / "run"), *TINY]) == 2
    assert "scene_1.png: no such label map" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_check_data(tmp_path, capsys):
    root = write_scenes(tmp_path / "data")
    assert train.main(["--data", str(root), "--check-data"]) == 0
    assert "train: 6 pictures, 3 classes" in capsys.readouterr().out
    (root / "images" / "scene_0.png").write_bytes(b"not a picture")
    assert train.main(["--data", str(root), "--check-data"]) == 1
    assert "images/scene_0.png: not a readable picture" in capsys.readouterr().out
    assert train.main(["--data", str(tmp_path / "absent"), "--check-data"]) == 1
    assert "no such data folder" in capsys.readouterr().out


@pytest.mark.parametrize(("listed", "said"), [(b"", "is empty"), (b"a\na\n", "more than once"), (b"\xff", "UTF-8")])
def test_a_broken_list_of_the_test_split_is_told_and_an_absent_one_is_not(tmp_path, capsys, listed, said):
    root = write_scenes(tmp_path / "data")
    (root / "splits" / "test.txt").write_bytes(listed)
    assert train.main(["--data", str(root), "--check-data"]) == 1
    assert said in capsys.readouterr().out
    (root / "splits" / "test.txt").unlink()
    assert train.main(["--data", str(root), "--check-data"]) == 0


def test_a_restart_of_a_nameless_group_goes_on_with_what_its_own_launch_wrote_only(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "/tmp/logs/none_b/attempt_1/0/error.json")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "1")
    assert restarted("none_b")
    assert not restarted("none_a"), "an older run, which the first attempt has refused to overwrite"
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    assert restarted("none"), "every node has a folder of its own"


def test_a_restart_goes_on_with_its_own_run_only(monkeypatch):
    for group, count, last_group, goes_on in (
        ("a", "0", "a", True),  # a process of another node was restarted
        ("none", "1", "none", True),
        ("none", "0", "none", False),
        ("a", "1", "b", False),
        ("a", "1", "", False),  # a run without torchrun
    ):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", group)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        assert restarted(last_group) == goes_on, (group, count, last_group)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["epoch=3"], r"unknown option 'epoch', did you mean epochs\? known: name, "),
        (["epochs=many"], "epochs must be int, got 'many'"),
        (["epochs={[]}"], r"epochs must be int, got '\{\[\]\}'"),
        (["epochs"], "options are given as key=value"),
        (["epochs=0"], "epochs must be at least 1, got 0"),
        (["optimizer=lion"], "optimizer must be sgd or adamw"),
        (["lateral=1"], "lateral must be bool, got 1"),
        (["head_rate=-1"], "head_rate must not be negative, got -1"),
        (["presence_weight=-1"], "presence_weight must not be negative"),
        (["auxiliary_weight=-1"], "auxiliary_weight must not be negative"),
        (["class_balance=-1"], "class_balance must not be negative"),
        (["power=-1"], "power must not be negative"),
        (["momentum=-0.5"], r"momentum must be in \[0, 1\), got -0.5"),
        (["seed=99999999999999999999"], r"seed must be less than 2\^63"),
        (["rotation=1e999"], "rotation must be a finite number, got inf"),
        (["learning_rate=1" + 400 * "0"], "learning_rate must be a finite number, got inf"),
        (["gamma=15"], "gamma must be 0 to 4, got 15"),
        (["gamma=-1"], "gamma must be 0 to 4, got -1"),
        (["crop=4"], "crop must be 32 to 16384 pixels, got 4"),
        (["base_size=0"], "base_size must be 1 to 16384 pixels, got 0"),
        (["base_size=16385"], "base_size must be 1 to 16384 pixels, got 16385"),
        (["crop=1000000"], "crop must be 32 to 16384 pixels"),
    ],
)
def test_wrong_options_are_named(words, message):
    with pytest.raises(RecipeError, match=message):
        Recipe(**read_recipe(None, words))


def test_words_win_over_the_recipe_file(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text('epochs = 7\nlearning_rate = 1\noptimizer = "adamw"\n')
    recipe = Recipe(**read_recipe(path, ["epochs=9", "lateral=true"]))
    assert (recipe.epochs, recipe.learning_rate, recipe.optimizer, recipe.lateral) == (9, 1.0, "adamw", True)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_recipe(path, [])["epochs"] == 7, "with a byte order mark"
    path.write_text("rotation = inf")
    with pytest.raises(RecipeError, match="rotation must be a finite number"):
        read_recipe(path, [])
    path.write_text("epochs = ")
    with pytest.raises(RecipeError, match="not a readable recipe"):
        read_recipe(path, [])


@pytest.mark.parametrize("path", sorted((ROOT / "model" / "recipes").glob("*.toml")), ids=lambda path: path.stem)
def test_committed_recipes_are_valid(path):
    Recipe(**read_recipe(path, [])).model_config(11)


def test_learning_rate_schedules():
    poly = Recipe(warmup=10, power=0.9)
    assert learning_rate_factor(0, 110, poly) == pytest.approx(0.1)
    assert learning_rate_factor(9, 110, poly) == pytest.approx(1.0)
    assert learning_rate_factor(60, 110, poly) == pytest.approx(0.5**0.9)
    cosine = Recipe(schedule="cosine")
    assert learning_rate_factor(50, 100, cosine) == pytest.approx(0.5)
    for recipe in (poly, cosine):
        assert learning_rate_factor(150, 100, recipe) == 0, "past the end"


@pytest.mark.parametrize(("accumulate", "processes", "pictures"), [(1, 1, 16), (2, 4, 2), (4, 8, 1)])
def test_evaluations_run_as_many_pictures_as_training_does(accumulate, processes, pictures):
    assert evaluation_options(Recipe(batch=16, accumulate=accumulate), processes)["batch"] == pictures


@pytest.mark.parametrize(("training", "evaluating"), [("fp32", "fp32"), ("bf16", "bf16"), ("fp16", "bf16")])
def test_evaluations_have_the_precision_that_the_command_offers(training, evaluating):
    assert evaluation_options(Recipe(precision=training), 1)["precision"] == evaluating


def test_help_names_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    text = capsys.readouterr().out
    assert "reference_positions=0.0" in text and "--check-data" in text and "example:" in text
