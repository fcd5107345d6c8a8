"""Lists of runs: the ablation and everything for one GPU, rehearsed with small networks; nothing is done twice."""

import contextlib
import json
import math
import os
import signal
import subprocess
import threading
import time

import pytest
from rich.console import Console

from benchmarks import ablation, gpu_train, reference_positions, runs, trials
from benchmarks.command import commit, write_json
from benchmarks.split_weights import join
from model import evaluate, train
from model.checkpoint import load_checkpoint
from tests.model.folders import write_scenes

TINY = [
    "backbone=resnet18", "output_stride=16", "channels=8", "codewords=2", "detail=0", "lateral=false", "crop=32",
    "base_size=48", "batch=3", "epochs=1", "warmup=0", "precision=fp32", "compile=false", "log_every=1",
    "evaluate_every=1", "reference_positions=4", "optimizer=sgd", "ema=0.0",
]  # fmt: skip
MODULES = {
    "model.train": train.main,
    "model.evaluate": evaluate.main,
    "benchmarks.reference_positions": reference_positions.main,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for name in ("camvid", "msrc21"):
        write_scenes(root / name)
    return root


@pytest.fixture
def called(monkeypatch):
    """The commands that were run: by the same functions, without the seconds that a process of its own takes."""
    commands = []

    def call(module, words, seconds):
        commands.append((module, words))
        return MODULES[module](words)

    monkeypatch.setattr(runs, "call", call)
    return commands


def test_a_job_in_processes_of_its_own_goes_on_where_its_time_was_up(data, tmp_path, monkeypatch):
    options = (*TINY, "seed=0")
    job = runs.Job(
        "one", data / "camvid", gpu_train.RECIPES / "ablation-camvid.toml", options, {"test": ("--limit", "1")}
    )
    assert job.missing(tmp_path) == ["training", "test"]
    assert not runs.advance(job, tmp_path, time.monotonic() + 10), "too little time to begin"
    assert not (tmp_path / "one").exists()
    monkeypatch.setattr(runs, "RESERVE_SECONDS", 1000)
    assert not runs.advance(job, tmp_path, time.monotonic() + 900), "no time left when the first step is done"
    assert load_checkpoint(tmp_path / "one" / "last.pt").step == 1
    monkeypatch.undo()
    assert runs.advance(job, tmp_path, math.inf)
    assert job.missing(tmp_path) == []
    assert job.totals(tmp_path, "test")["pictures"] == 1
    broken = runs.Job("broken", job.data, job.config, (*options, "batch=1000"), {})
    with pytest.raises(runs.RunError, match="broken: training failed with exit status 2"):
        runs.advance(broken, tmp_path, math.inf)


def test_an_evaluation_that_its_piece_is_too_short_for_begins_again_in_the_next(data, tmp_path, monkeypatch, capsys):
    job = runs.Job("one", data / "camvid", gpu_train.RECIPES / "ablation-camvid.toml", (), {"test": ()})
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "final.pt").touch()
    monkeypatch.setattr(runs, "call", lambda *given: None)
    assert not runs.advance(job, tmp_path, time.monotonic() + 600)
    assert "one: test was ended with the time; it begins again" in capsys.readouterr().out
    (tmp_path / "one" / "final.pt").unlink()
    with pytest.raises(runs.RunError, match="one: training hung and was ended"):
        runs.advance(job, tmp_path, time.monotonic() + 600)


def test_a_command_that_hangs_is_ended():
    assert runs.call("timeit", ["-n1", "-r1", "import time; time.sleep(60)"], 2) is None


STOPPED = "stopped; the same command goes on from here\n"
# A command that saves and ends with 130 a second after Ctrl-C, longer than subprocess.run would wait.
SAVES = """
import pathlib, signal, sys, time
def save(*_):
    time.sleep(1)
    pathlib.Path(sys.argv[1], "saved").touch()
    sys.exit(130)
signal.signal(signal.SIGINT, save)
pathlib.Path(sys.argv[1], "begun").touch()
time.sleep(60)
"""


def interrupted_once_there(file):
    """Ctrl-C for this process alone as soon as the file is there; what a terminal would tell the child is up to it."""
    while not file.exists():
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGINT)


def child_of(module, monkeypatch):
    """The next process that is begun, in a list."""
    begun = []

    class Begun(subprocess.Popen):
        def __init__(self, *given, **options):
            super().__init__(*given, **options)
            begun.append(self)

    monkeypatch.setattr(module.subprocess, "Popen", Begun)
    return begun


@pytest.fixture
def saving(tmp_path, monkeypatch):
    """The module name of a command that takes a second to save, which its own folder as the working folder finds."""
    (tmp_path / "saving.py").write_text(SAVES)
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    return "saving"


def test_ctrl_c_waits_for_a_command_that_saves(saving, tmp_path, monkeypatch):
    begun = child_of(runs, monkeypatch)

    def both():
        interrupted_once_there(tmp_path / "begun")
        begun[0].send_signal(signal.SIGINT)

    thread = threading.Thread(target=both)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        runs.call(saving, [str(tmp_path)], 30)
    thread.join()
    assert (tmp_path / "saved").exists() and begun[0].returncode == 130


@pytest.mark.usefixtures("terminal_signals")
def test_a_second_ctrl_c_ends_a_command_that_does_not(saving, tmp_path, monkeypatch):
    begun = child_of(runs, monkeypatch)

    def twice():
        interrupted_once_there(tmp_path / "begun")
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=twice)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        runs.call(saving, [str(tmp_path)], 30)
    thread.join()
    assert begun[0].returncode == -signal.SIGKILL and not (tmp_path / "saved").exists()


@pytest.mark.usefixtures("terminal_signals")
@pytest.mark.parametrize("statement", ["raise SystemExit(130)", "import os; os.kill(os.getpid(), 2)"])
def test_a_command_that_was_interrupted_alone_interrupts_the_list(tmp_path, monkeypatch, statement):
    (tmp_path / "interrupted.py").write_text(statement)
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    with pytest.raises(KeyboardInterrupt):
        runs.call("interrupted", [], 30)


def test_lists_of_runs_end_on_ctrl_c_with_a_line(data, tmp_path, monkeypatch, capsys):
    def stopped(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "call", stopped)
    config = ["--config", str(gpu_train.RECIPES / "ablation-camvid.toml")]
    out = ["--out", str(tmp_path / "out"), *TINY]
    assert ablation.main(["--data", str(data / "camvid"), *config, *out]) == 130
    assert capsys.readouterr().err == STOPPED
    assert trials.main(["--data", str(data / "camvid"), *config, "--out", str(tmp_path / "trials"), "epochs=1"]) == 130
    assert capsys.readouterr().err == STOPPED
    assert gpu_train.main(["--data", str(data), *out]) == 130
    assert capsys.readouterr().err == STOPPED


def test_the_ablation_runs_every_variant_with_every_seed_once(data, tmp_path, called, capsys):
    config = gpu_train.RECIPES / "ablation-msrc21.toml"
    options = ["--data", str(data / "msrc21"), "--config", str(config), "--out", str(tmp_path / "runs")]
    options += ["--output", str(tmp_path / "ablation.json")]
    assert ablation.main([*options, "--seeds", "1", *TINY]) == 0
    assert [module for module, _ in called] == ["model.train", "model.evaluate"] * 3
    assert ablation.main([*options, "--seeds", "2", *TINY]) == 0
    assert len(called) == 12, "finished runs are not done again"
    document = json.loads((tmp_path / "ablation.json").read_text())
    assert [(row["variant"], row["seed"]) for row in document["rows"]] == [
        (variant, seed) for seed in (0, 1) for variant in ("FCN", "+ Encoding", "+ Encoding + SE-loss")
    ]
    assert document["means"]["FCN"]["miou"]["runs"] == 2
    assert document["means"]["+ Encoding"].keys() == {"miou", "pixel_accuracy", "class_accuracy"}
    assert "presence_map" in document["means"]["+ Encoding + SE-loss"]
    assert "msrc21: 6 of 6 runs" in capsys.readouterr().out

    configs = {name: load_checkpoint(tmp_path / "runs" / f"{name}-0" / "last.pt") for name in ablation.FOLDERS.values()}
    assert [checkpoint.config.encoding for checkpoint in configs.values()] == [False, True, True]
    recipes = [checkpoint.training["recipe"] for checkpoint in configs.values()]
    assert [recipe["presence_weight"] for recipe in recipes] == [0.0, 0.0, 0.2]
    for recipe in recipes:
        del recipe["presence_weight"], recipe["encoding"]
    assert recipes[0] == recipes[1] == recipes[2], "all else is equal"


def test_each_trial_is_the_recipe_but_for_its_change_and_is_compared_with_it(data, tmp_path, called, capsys):
    config = gpu_train.RECIPES / "msrc21-resnet18c.toml"
    options = ["--data", str(data / "msrc21"), "--config", str(config), "--out", str(tmp_path / "runs")]
    options += ["--base", " ".join(TINY)]
    assert trials.main([*options, "jitter=0 gamma=0"]) == 0
    assert [module for module, _ in called] == ["model.train", "model.evaluate", "model.evaluate"] * 2
    assert trials.main([*options, "jitter=0 gamma=0", "class_balance=0"]) == 0
    assert len(called) == 9, "finished runs are not done again"
    document = json.loads((tmp_path / "runs" / "trials.json").read_text())
    as_it_is, *changed = document["trials"]
    assert [row["trial"] for row in changed] == ["jitter=0 gamma=0", "class_balance=0"]
    assert as_it_is["val_gain"] is None
    for row in changed:
        for split in ("val", "test"):
            gain = row[split]["mean"] - as_it_is[split]["mean"]
            assert row[f"{split}_gain"] == {"mean": pytest.approx(gain), "std": None, "runs": 1}
    assert "msrc21: 3 of 3 runs" in capsys.readouterr().out

    names = ("recipe-0", "gamma=0+jitter=0-0", "class_balance=0-0")
    recipes = [load_checkpoint(tmp_path / "runs" / name / "last.pt").training["recipe"] for name in names]
    differing = [{key for key in recipes[0] if recipe[key] != recipes[0][key]} for recipe in recipes]
    assert differing == [set(), {"jitter", "gamma"}, {"class_balance"}]
    for wrong, said in (
        ("colour=1", "unknown option 'colour'"),
        ("seed=3", "a seed of its own"),
        (" ", "one is empty"),
    ):
        assert trials.main([*options, wrong]) == 2
        assert said in capsys.readouterr().err
    assert trials.main([*options[:-1], "seed=3", "class_balance=0"]) == 2
    assert "a seed of its own" in capsys.readouterr().err
    assert len(called) == 9


def test_the_ablation_keeps_runs_of_other_options_apart(data, tmp_path, called, capsys):
    config = gpu_train.RECIPES / "ablation-msrc21.toml"
    options = ["--data", str(data / "msrc21"), "--config", str(config), "--out", str(tmp_path / "runs")]
    options += ["--output", str(tmp_path / "ablation.json"), "--seeds", "1", *TINY]
    assert ablation.main([*options, "layout=folder"]) == 0
    evaluations = [words for module, words in called if module == "model.evaluate"]
    assert [words[-2:] for words in evaluations] == [["--layout", "folder"]] * 3
    assert ablation.main([*options, "layout=folder", "learning_rate=0.5"]) == 2
    assert "fcn-0: holds a run with learning_rate=" in capsys.readouterr().err
    assert ablation.main([*options, "layout=folder", "seed=3"]) == 2
    assert "every run has a seed of its own" in capsys.readouterr().err
    assert len(called) == 6


def test_the_ablation_writes_into_its_own_folder_once_a_run_is_finished(data, tmp_path, called, capsys):
    config = gpu_train.RECIPES / "ablation-msrc21.toml"
    options = ["--data", str(data / "msrc21"), "--config", str(config), "--out", str(tmp_path / "runs")]
    assert ablation.main([*options, "--seeds", "1", "--minutes", "0", *TINY]) == 0
    assert not list((tmp_path / "runs").iterdir()), "no run is finished"
    assert ablation.main([*options, "--seeds", "1", *TINY]) == 0
    assert len(json.loads((tmp_path / "runs" / "ablation.json").read_text())["rows"]) == 3
    with pytest.raises(SystemExit):
        ablation.main([*options, "--seeds", "0", *TINY])
    assert "argument --seeds: expected a whole number, at least 1, got '0'" in capsys.readouterr().err


def test_figures_that_could_not_be_written_are_refused_before_the_work(tmp_path, capsys):
    (tmp_path / "file").touch()
    for output, told in ((tmp_path, "it is a folder; name a file"), (tmp_path / "file" / "a.json", "File exists")):
        with pytest.raises(SystemExit) as ended:
            reference_positions.main(["none.pt", "--data", "none", "--output", str(output)])
        assert ended.value.code == 2
        printed = capsys.readouterr().err
        assert "error: argument --output: " in printed and told in printed


def test_deltas_pair_runs_of_one_seed():
    values = {"FCN": (0.5, 0.6), "+ Encoding": (0.55, 0.67), "+ Encoding + SE-loss": (0.56,)}
    rows = [
        {"variant": variant, "seed": seed, "miou": value, "pixel_accuracy": 0.5, "class_accuracy": 0.5}
        | {"presence_map": None if variant == "+ Encoding" else 0.5}
        for variant, column in values.items()
        for seed, value in enumerate(column)
    ]
    found = ablation.summary(rows)
    assert found["means"]["FCN"]["miou"] == {"mean": 0.55, "std": pytest.approx(0.05 * math.sqrt(2)), "runs": 2}
    first, both, second = found["miou_deltas"].values()
    assert first == {"mean": pytest.approx(0.06), "std": pytest.approx(0.01 * math.sqrt(2)), "runs": 2}
    assert second == {"mean": pytest.approx(0.01), "std": None, "runs": 1}
    assert both == {"mean": pytest.approx(0.06), "std": None, "runs": 1}
    shown = ablation.table(found, "made up")
    _, _, _, above, over_the_first, *_ = (list(column.cells) for column in shown.columns)
    assert above == ["", "+6.0 ± 1.4", "+1.0"] and over_the_first == ["", "+6.0 ± 1.4", "+6.0"]


def test_the_comparison_is_begun_only_where_there_is_time_for_it(tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr(runs, "call", lambda module, words, seconds: begun.append(seconds))
    gpu_train.compare_factor(tmp_path, tmp_path, time.monotonic() + 60)
    assert not begun
    with pytest.raises(runs.RunError, match="reference-positions hung and was ended"):
        gpu_train.compare_factor(tmp_path, tmp_path, time.monotonic() + 600)
    assert begun == [pytest.approx(600 + runs.HANG_SECONDS, abs=60)]


def test_a_run_that_fails_leaves_the_others_alone(data, tmp_path, monkeypatch, capsys):
    begun = []

    def fails_first(job, folder, until):
        begun.append(job.name)
        if job.name == "camvid":
            raise runs.RunError("camvid: training failed with exit status 1")
        return True

    monkeypatch.setattr(gpu_train, "advance", fails_first)
    monkeypatch.setattr(gpu_train, "collect", lambda job, out: None)
    monkeypatch.setattr(gpu_train, "compare_factor", lambda data, out, until: None)
    assert gpu_train.main(["--data", str(data), "--out", str(tmp_path), *TINY]) == 2
    assert begun[:4] == ["camvid", "msrc21", "fcn-0", "encoding-0"]
    assert "error: camvid: training failed with exit status 1" in capsys.readouterr().err
    assert json.loads((tmp_path / "results" / "runs.json").read_text())["failed"]


def test_without_a_data_set_its_runs_are_not_begun(tmp_path, called, capsys):
    assert gpu_train.main(["--data", str(tmp_path / "absent"), "--out", str(tmp_path), *TINY]) == 2
    assert f"camvid: {tmp_path / 'absent' / 'camvid'}: no such data folder" in capsys.readouterr().err
    assert not called


def test_only_what_is_compiled_is_left_time_to_compile(data, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(runs, "call", lambda *given: 1)
    config = gpu_train.RECIPES / "ablation-camvid.toml"
    for words, begun in ((("compile=true",), False), (("compile=false",), True)):
        job = runs.Job("one", data / "camvid", config, words, {})
        with pytest.raises(runs.RunError) if begun else contextlib.nullcontext():
            assert not runs.advance(job, tmp_path, time.monotonic() + 60)


def test_what_is_too_long_for_the_rest_of_a_piece_leaves_it_to_what_is_not(data, tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "a GPU")
    monkeypatch.setattr(runs, "call", lambda module, words, seconds: begun.append(words[words.index("--out") + 1]) or 0)
    until = time.monotonic() + 100
    left, failed = gpu_train.piece(data, tmp_path / "gpu", (), until, Console())
    assert not failed and {"camvid", "msrc21"} <= set(left)
    assert begun[0] == str(tmp_path / "gpu" / "ablation-camvid" / "fcn-0"), "the first that is not compiled"

    begun.clear()
    jobs = [
        runs.Job(name, data / "camvid", gpu_train.RECIPES / "ablation-camvid.toml", (f"compile={name}",), {})
        for name in ("true", "false")
    ]
    runs.work_off(jobs, tmp_path, until, lambda: None)
    assert begun == [str(tmp_path / "false")]


def test_the_commit_is_empty_where_there_is_no_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert commit() == ""


def test_everything_for_one_gpu_is_worked_off_in_pieces(data, tmp_path, called, monkeypatch, capsys):
    monkeypatch.setattr(gpu_train, "SEEDS", 1)
    monkeypatch.setattr(gpu_train, "MAIN", ("camvid",))
    monkeypatch.setattr(reference_positions, "SCALES", (0.5, 1.0))
    out = tmp_path / "gpu"
    options = ["--data", str(data), "--out", str(out), *TINY]
    assert gpu_train.main([*options, "--minutes", "0.1"]) == 0
    assert "5 parts are not finished; the same command goes on" in capsys.readouterr().out
    assert not called

    whole_advance = runs.advance
    fits = ("camvid", "fcn-0")
    monkeypatch.setattr(gpu_train, "advance", lambda job, *given: job.name in fits and whole_advance(job, *given))
    assert gpu_train.main(options) == 0
    assert "2 parts are not finished" in capsys.readouterr().out
    monkeypatch.setattr(gpu_train, "advance", whole_advance)
    assert gpu_train.main(options) == 0
    assert f"all is in {out / 'results'}" in capsys.readouterr().out
    assert len(called) == 3 + 1 + 3 * 2, "nothing is done twice"

    results = out / "results"
    document = json.loads((results / "runs.json").read_text())
    assert document["left"] == []
    assert document["runs"].keys() == {"camvid"}
    assert document["runs"]["camvid"].keys() == {"test", "test-scales"}
    for view, means in document["means"]["camvid"].items():
        assert means["miou"] == {"mean": document["runs"]["camvid"][view]["miou"], "std": None, "runs": 1}
    assert len(json.loads((results / "ablation-camvid.json").read_text())["rows"]) == 3
    weights = results / "camvid" / "weights"
    join(weights, tmp_path / "joined.pt")
    assert (tmp_path / "joined.pt").read_bytes() == (out / "camvid" / "final.pt").read_bytes()
    assert max(path.stat().st_size for path in weights.iterdir()) <= 15_000_000
    assert (results / "camvid" / "curves.png").exists() and (results / "camvid/test/contact_sheet.png").exists()
    factor = json.loads((results / "reference-positions.json").read_text())
    assert factor["reference_positions"] == 4.0
    for name in ("with", "without"):
        assert [row["scale"] for row in factor[name]] == list(reference_positions.SCALES)
    assert factor["with"] != factor["without"]
    assert (results / "reference-positions.png").exists()


def test_other_seeds_of_the_best_networks_come_last_and_give_figures_alone(data, tmp_path, monkeypatch, capsys):
    begun = []

    def finished(job, folder, until):
        begun.append(job.name)
        for view in job.views:
            miou = 0.5 + 0.1 * job.recipe().seed + (0.01 if view == "test-scales" else 0)
            totals = dict.fromkeys(("pixel_accuracy", "class_accuracy", "presence_map"), 0.5) | {"miou": miou}
            write_json(folder / job.name / view / "evaluation.json", {"totals": totals})
        (folder / job.name / "final.pt").touch()
        return True

    monkeypatch.setattr(gpu_train, "SEEDS", 2)
    monkeypatch.setattr(gpu_train, "advance", finished)
    collected = []
    monkeypatch.setattr(gpu_train, "collect", lambda job, out: collected.append(job.name))
    monkeypatch.setattr(gpu_train, "compare_factor", lambda data, out, until: None)
    options = ["--data", str(data), "--out", str(tmp_path)]
    assert gpu_train.main([*options, *TINY]) == 0
    ablations = [f"{variant}-{seed}" for seed in (0, 1) for variant in ablation.FOLDERS.values()]
    assert begun == ["camvid", "msrc21", *ablations, *ablations, "camvid-1", "msrc21-1"]
    assert collected == ["camvid", "msrc21"]
    document = json.loads((tmp_path / "results" / "runs.json").read_text())
    assert document["runs"].keys() == {"camvid", "camvid-1", "msrc21", "msrc21-1"}
    assert document["runs"]["msrc21-1"]["test-scales"]["miou"] == pytest.approx(0.61)
    means = document["means"]["camvid"]
    deviation = pytest.approx(0.05 * math.sqrt(2))
    assert means["test"]["miou"] == {"mean": pytest.approx(0.55), "std": deviation, "runs": 2}
    assert means["test-scales"]["miou"] == {"mean": pytest.approx(0.56), "std": deviation, "runs": 2}

    assert gpu_train.main([*options, "seed=1"]) == 2
    assert "every run has a seed of its own" in capsys.readouterr().err


def test_reference_positions_are_compared_only_where_there_are_some(data, tmp_path, capsys):
    options = ["--data", str(data / "camvid"), "--out", str(tmp_path), *TINY, "reference_positions=0"]
    assert train.main(options) == 0
    file = tmp_path / "final.pt"
    assert reference_positions.main([str(file), "--data", str(data / "camvid")]) == 2
    assert f"error: {file}: no reference_positions to compare" in capsys.readouterr().err
