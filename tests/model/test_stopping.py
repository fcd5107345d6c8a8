"""What stops a training command loses nothing and is told in a sentence: signals, a full disk, too little memory."""

import contextlib
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from model import train
from model.checkpoint import load_checkpoint
from model.command import finish
from model.files import replacing
from model.run import Run
from model.stopping import stop_signals
from tests.model.folders import write_scenes

pytestmark = pytest.mark.usefixtures("terminal_signals")

TINY = [
    "backbone=resnet18", "channels=16", "codewords=4", "batch=2", "crop=32", "base_size=48", "epochs=3",
    "learning_rate=0.01", "save_every=100", "evaluate_every=3", "reference_positions=16", "ema=0.9",
]  # fmt: skip


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("scenes"))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_is_told_to_stop_saves_after_its_step_and_goes_on_exactly(
    scenes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: int,
    status: int,
) -> None:
    step = Run.train_step

    def interrupted(run: Run, images: torch.Tensor, masks: torch.Tensor) -> object:
        if run.step == 4:
            signal.raise_signal(number)
        return step(run, images, masks)

    options = ["--data", str(scenes), "log_every=1", "--out"]
    with monkeypatch.context() as patch:
        patch.setattr(Run, "train_step", interrupted)
        assert train.main([*options, str(tmp_path / "stopped"), *TINY]) == status
    assert "stopped at step 5 of 9; --resume goes on" in capsys.readouterr().out
    assert train.main([*options, str(tmp_path / "stopped"), "--resume"]) == 0
    assert train.main([*options, str(tmp_path / "whole"), *TINY]) == 0
    stopped, whole = (load_checkpoint(tmp_path / name / "final.pt").weights for name in ("stopped", "whole"))
    assert all(torch.equal(stopped[key], whole[key]) for key in whole)
    events = EventAccumulator(str(tmp_path / "stopped" / "events")).Reload()
    assert [event.step for event in events.Scalars("loss/total")] == list(range(1, 10)), "each row once"


def test_a_second_signal_has_its_usual_effect() -> None:
    with pytest.raises(KeyboardInterrupt), stop_signals() as received:
        signal.raise_signal(signal.SIGINT)
        assert received == [signal.SIGINT]
        signal.raise_signal(signal.SIGINT)


def test_a_signal_that_is_ignored_stays_so() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with stop_signals() as received:
        signal.raise_signal(signal.SIGINT)
        assert not received
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The system refuses to write more bytes into any one file, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_checkpoint_that_cannot_be_written_to_its_end_is_a_sentence_and_keeps_the_last_one(
    scenes: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ["--data", str(scenes), "--out", str(tmp_path / "run")]
    assert train.main([*options, *TINY, "log_every=1", "--minutes", "0"]) == 0
    before = (tmp_path / "run" / "last.pt").read_bytes()
    with files_of_at_most(1_000_000):
        assert train.main([*options, "--resume", "save_every=2"]) == 2
    said = capfd.readouterr().err
    assert said.startswith("error: [Errno 27] File too large:")
    assert str(tmp_path / "run" / "last.pt") in said
    assert (tmp_path / "run" / "last.pt").read_bytes() == before
    assert not list((tmp_path / "run").glob(".*")), "nothing half-written is left"


def test_an_error_about_another_file_names_that_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"), replacing(tmp_path / "written"):
        (tmp_path / "absent").read_bytes()
    assert not list(tmp_path.iterdir())


def test_too_little_memory_is_a_sentence_that_says_what_needs_less(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        torch.empty(10**14)

    assert finish(work) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: memory does not suffice (")
    assert "a smaller batch" in said


def test_a_defect_of_ours_stays_a_traceback() -> None:
    def work() -> None:
        torch.ones(2) @ torch.ones(3)

    with pytest.raises(RuntimeError):
        finish(work)


def test_a_command_that_is_interrupted_says_so_and_ends_with_130(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        signal.raise_signal(signal.SIGINT)

    assert finish(work) == 130
    assert capsys.readouterr().err == "error: stopped before it was done\n"


def test_a_file_in_the_place_of_the_runs_folder_is_told_at_once(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").write_text("a file")
    assert train.main(["--data", str(scenes), "--out", str(tmp_path / "run"), *TINY]) == 2
    said = capsys.readouterr()
    assert "is a file, not a folder" in said.err
    assert "pictures" not in said.out, "before the data are read"
