"""Promise: a run over folders that is killed at any point goes on where it stopped, and its tables cover everything."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from live import heed_ctrl_c
from PIL import Image
from tiny_model import CLASSES, encoded
from typer.testing import CliRunner, Result

import service
from service.cli import cli
from service.engine import Engine
from service.files import whole
from service.folders import Found, find_pictures, output_names
from service.record import Record, open_record

ROOT = Path(service.__file__).parents[1]
pytestmark = pytest.mark.usefixtures("at_the_command_line")


def segment(*arguments: object) -> Result:
    result = CliRunner().invoke(cli, ["segment", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def segmented(result: Result) -> list[str]:
    """The pictures that a run says it has segmented."""
    return re.findall(r"^(.*) -> ", result.stdout, re.MULTILINE)


def summary(output: str = "segmented") -> dict[str, Any]:
    return json.loads(Path(output, "presence.json").read_text())


def covered(output: str = "segmented") -> list[str]:
    return [entry["file"] for entry in summary(output)["images"]]


@pytest.fixture
def photos(tmp_path: Path, quadrants: np.ndarray) -> Path:
    """Four pictures, two of them in a subfolder."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for index, name in enumerate(("a", "b", "more/a", "more/c")):
        (folder / f"{name}.png").write_bytes(encoded(np.roll(quadrants, index, axis=1)))
    return folder


# ---- killed and gone on


def start(*arguments: str) -> subprocess.Popen[bytes]:
    """`segment` in a process of its own, its output to be read line by line."""
    command = [sys.executable, "-m", "service", "segment", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=heed_ctrl_c
    )


@pytest.fixture
def noise() -> dict[str, np.ndarray]:
    """Thirty pictures in photos/, by their paths, large enough that a run can be stopped among them."""
    random = np.random.default_rng(3)
    pictures = {f"photos/{index:02}.png": random.integers(0, 256, (400, 500, 3), np.uint8) for index in range(30)}
    Path("photos").mkdir()
    for name, pixels in pictures.items():
        Path(name).write_bytes(encoded(pixels, compress_level=0))
    return pictures


def test_sigkill_loses_nothing_and_leaves_nothing_half_written(noise: dict[str, np.ndarray], engine: Engine) -> None:
    kept: dict[str, int] = {}
    for lines_before_the_kill in (2, 6):
        with start("photos") as process:
            assert process.stdout
            for _ in range(lines_before_the_kill):
                assert process.stdout.readline(), "it ended before it could be killed"
            process.kill()
        assert process.returncode == -signal.SIGKILL
        for path in Path("segmented").glob("[!.]*.*.*g"):
            Image.open(path).load()  # raises for half a file
        before = kept
        with open_record(Path("segmented")) as record:
            masks = [Path("segmented", f"{done.name}.mask.png") for done in record.done.values()]
        kept = {mask.name: mask.stat().st_mtime_ns for mask in masks}
        assert len(kept) >= len(before) + lines_before_the_kill
        assert before.items() <= kept.items(), "nothing is done twice"

    result = segment("photos")
    assert result.exit_code == 0, result.output
    assert f"{len(kept)} of 30 pictures were done before" in result.stderr
    assert len(segmented(result)) == 30 - len(kept) > 0
    assert covered() == sorted(noise)
    names = {Path(name).stem for name in noise}
    outputs = {name + end for name in names for end in (".mask.png", ".overlay.jpg")}
    tables = {"presence.csv", "presence.json", "presence.jsonl"}
    assert {path.name for path in Path("segmented").iterdir()} == outputs | tables
    for name, pixels in noise.items():
        mask = np.asarray(Image.open(Path("segmented", Path(name).stem + ".mask.png")))
        np.testing.assert_array_equal(mask, engine.segment(pixels).mask)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_ends_a_run_is_told_how_to_go_on(noise: dict[str, np.ndarray], number: int) -> None:
    with start("photos") as process:
        assert process.stdout
        assert process.stdout.readline()
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.decode() == "error: stopped; the same command goes on from here\n"
    assert 0 < len(segmented(segment("photos"))) < 30


def test_who_stops_reading_is_not_told_of_the_output_folder(noise: dict[str, np.ndarray]) -> None:
    with start("photos") as process:
        assert process.stdout and process.stderr
        assert process.stdout.readline()
        process.stdout.close()
        said = process.stderr.read().decode()
    assert process.returncode == 1
    assert said == "error: stopped, as nobody reads what is printed; the same command goes on from here\n"
    assert 0 < len(segmented(segment("photos"))) < 30


def test_a_record_cut_short_costs_one_picture(photos: Path) -> None:
    segment(photos)
    record = Path("segmented/presence.jsonl")
    *_, last = record.read_bytes().splitlines()
    with open_record(Path("segmented")) as kept:
        kept.take_back(json.loads(last)["source"], "b", ())
    with record.open("ab") as file:
        file.write(last[:-20])
    assert segmented(segment(photos)) == [f"{photos}/b.png"]
    assert covered() == [f"{photos}/a.png", f"{photos}/b.png"]
    assert segmented(segment(photos)) == []


def test_a_picture_taken_back_and_then_killed_is_not_done(photos: Path) -> None:
    segment(photos)
    with open_record(Path("segmented")) as record:
        first = next(iter(record.done))
        assert record.take_back(first, "a", ()) == {"a.mask.png", "a.overlay.jpg"}
    assert segmented(segment(photos)) == [f"{photos}/a.png"]


def test_files_that_a_killed_run_had_no_time_to_record_are_replaced(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Record, "replace", Mock(side_effect=KeyboardInterrupt))
        assert segment(photos).exit_code == 130
    assert Path("segmented/a.mask.png").exists()
    with open_record(Path("segmented")) as record:
        assert not record.done
    result = segment(photos)
    assert (result.exit_code, segmented(result)) == (0, [f"{photos}/a.png", f"{photos}/b.png"]), result.output


def test_files_of_a_picture_that_failed_since_are_replaced_once_it_is_mended(photos: Path) -> None:
    whole_picture = (photos / "a.png").read_bytes()
    segment(photos)
    (photos / "a.png").write_bytes(whole_picture[:60])
    for _ in range(2):
        assert segment(photos).exit_code == 1
    (photos / "a.png").write_bytes(whole_picture)
    result = segment(photos)
    assert (result.exit_code, segmented(result)) == (0, [f"{photos}/a.png"]), result.output


# ---- files of others


@pytest.mark.parametrize("taken", ["a.mask.png", "a.overlay.jpg"])
def test_a_file_that_others_made_is_kept_unless_it_may_be_overwritten(photos: Path, taken: str) -> None:
    ground_truth = photos / taken
    ground_truth.write_bytes(b"weeks of work")
    for _ in range(2):
        result = segment(photos, "--output", photos)
        assert result.exit_code == 1
        said = f"{taken} is there already, and not in the record of the output folder; --overwrite replaces it"
        assert f"{photos}/a.png: {said}\nerror: 1 of 2 inputs failed\n" in result.stderr
        assert ground_truth.read_bytes() == b"weeks of work"
        assert covered(str(photos)) == [f"{photos}/b.png"]
        assert [error["code"] for error in summary(str(photos))["errors"]] == ["not_ours"]
    assert segment(photos, "--output", photos, "--overwrite").exit_code == 0
    Image.open(ground_truth).load()
    assert len(segmented(segment(photos, "--output", photos, "--flip"))) == 2, "now it is ours"


def test_a_file_that_may_be_overwritten_is_not_ours_before_it_is(photos: Path) -> None:
    ground_truth = photos / "a.mask.png"
    ground_truth.write_bytes(b"weeks of work")
    whole_picture = (photos / "a.png").read_bytes()
    (photos / "a.png").write_bytes(whole_picture[:60])
    assert "the PNG file is cut short" in segment(photos, "--output", photos, "--overwrite").stderr
    (photos / "a.png").write_bytes(whole_picture)
    assert "a.mask.png is there already" in segment(photos, "--output", photos).stderr
    assert ground_truth.read_bytes() == b"weeks of work"


def test_an_overlay_that_others_made_is_no_matter_to_a_run_without_overlays(photos: Path) -> None:
    Path("segmented").mkdir()
    Path("segmented/a.overlay.jpg").write_bytes(b"weeks of work")
    assert segment(photos, "--no-overlay").exit_code == 0
    assert "a.overlay.jpg is there already" in segment(photos).stderr
    assert Path("segmented/a.overlay.jpg").read_bytes() == b"weeks of work"
    assert covered() == [f"{photos}/a.png", f"{photos}/b.png"], "what was recorded of the picture still holds"


def test_a_picture_that_was_stopped_between_its_files_is_not_done(photos: Path) -> None:
    """The mask is replaced, the overlay cannot be: the record must not vouch for the mask with its old options."""
    segment(photos, "--no-overlay")
    Path("segmented/a.overlay.jpg").mkdir()
    result = segment(photos, "--flip", "--overwrite")
    assert result.exit_code == 1
    assert "cannot write to segmented" in result.stderr
    assert f"{photos}/a.png" in segmented(segment(photos, "--no-overlay"))


def test_what_a_killed_run_was_writing_is_removed(photos: Path) -> None:
    Path("segmented").mkdir()
    for name in (".a.mask.png.part", ".a.overlay.jpg.part", ".presence.json.part", ".video.part"):
        Path("segmented", name).write_bytes(b"half")
    segment(photos, "--no-overlay")
    assert [path.name for path in Path("segmented").glob(".*")] == [".video.part"], "what is not ours stays"


def test_two_runs_do_not_share_an_output_folder(photos: Path) -> None:
    with open_record(Path("segmented")):
        result = segment(photos)
    assert result.exit_code == 1
    assert "another run is writing to segmented" in result.stderr


# ---- what is done again


def test_a_second_run_does_nothing_again(photos: Path) -> None:
    assert len(segmented(segment(photos))) == 2
    tables = [Path("segmented", name).read_bytes() for name in ("presence.json", "presence.csv", "presence.jsonl")]
    result = segment(photos)
    assert segmented(result) == []
    assert "2 of 2 pictures were done before; --overwrite segments them again" in result.stderr
    again = [Path("segmented", name).read_bytes() for name in ("presence.json", "presence.csv", "presence.jsonl")]
    assert again == tables


def test_overwrite_does_all_again(photos: Path) -> None:
    segment(photos)
    assert len(segmented(segment(photos, "--overwrite"))) == 2
    assert len(Path("segmented/presence.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    "arguments", [["--scales", "0.5,1"], ["--flip"], ["--max-side", "20"], ["--window", "32", "--stride", "16"]]
)
def test_other_options_are_done_again(photos: Path, arguments: list[str]) -> None:
    segment(photos, *(["--window", "32"] if "--window" in arguments else []))
    assert len(segmented(segment(photos, *arguments))) == 2
    assert len(segmented(segment(photos, *arguments))) == 0


def test_options_that_say_the_default_are_the_same_options(photos: Path) -> None:
    segment(photos)
    assert segmented(segment(photos, "--scales", "1", "--no-flip")) == []


def test_another_model_or_threshold_is_done_again(
    photos: Path, changed_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    segment(photos)
    model = ("--model", changed_model(name="other"))
    assert len(segmented(segment(photos, *model))) == 2
    assert len(segmented(segment(photos, *model))) == 0
    monkeypatch.setenv("ENCNET_THRESHOLD", "0.9")
    assert len(segmented(segment(photos, *model))) == 2


def test_a_changed_picture_and_a_lost_or_damaged_output_are_done_again(photos: Path, quadrants: np.ndarray) -> None:
    segment(photos, "--recursive")
    (photos / "a.png").write_bytes(encoded(quadrants[::-1]))
    Path("segmented/more/c.overlay.jpg").unlink()
    os.truncate("segmented/b.mask.png", 10)
    again = segmented(segment(photos, "--recursive"))
    assert again == [f"{photos}/a.png", f"{photos}/b.png", f"{photos}/more/c.png"]


def test_size_and_time_of_a_picture_tell_that_it_has_changed(photos: Path) -> None:
    segment(photos)
    times = {name: (photos / name).stat().st_mtime_ns for name in ("a.png", "b.png")}
    os.utime(photos / "a.png", ns=(0, times["a.png"] + 1_000_000_000))
    with (photos / "b.png").open("ab") as file:
        file.write(b"more")
    os.utime(photos / "b.png", ns=(0, times["b.png"]))
    assert segmented(segment(photos)) == [f"{photos}/a.png", f"{photos}/b.png"]


def test_overlays_can_be_had_later(photos: Path) -> None:
    segment(photos, "--no-overlay")
    assert len(segmented(segment(photos))) == 2
    assert Path("segmented/a.overlay.jpg").exists()
    assert segmented(segment(photos, "--no-overlay")) == []


def test_no_overlay_of_an_older_mask_stays(photos: Path) -> None:
    segment(photos)
    segment(photos, "--no-overlay", "--flip")
    assert not Path("segmented/a.overlay.jpg").exists()
    assert "overlay" not in summary()["images"][0]


def test_a_file_that_is_too_large_is_told_to_be(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {name: (photos / name).stat().st_size for name in ("a.png", "b.png")}
    monkeypatch.setenv("ENCNET_MAX_BYTES", str(min(sizes.values()) - 1))
    segment(photos)
    assert [error["code"] for error in summary()["errors"]] == ["too_many_bytes"] * 2


# ---- the tables


def test_the_tables_cover_earlier_runs(photos: Path) -> None:
    segment(photos / "a.png")
    segment(photos / "b.png")
    assert set(covered()) == {f"{photos}/a.png", f"{photos}/b.png"}
    (photos / "a.png").unlink()
    segment(photos)
    assert set(covered()) == {f"{photos}/a.png", f"{photos}/b.png"}, "its mask is still there"
    Path("segmented/a.mask.png").unlink()
    segment(photos)
    assert covered() == [f"{photos}/b.png"]


def test_the_tables_never_mix_options(photos: Path) -> None:
    segment(photos / "a.png")
    result = segment(photos / "b.png", "--flip")
    assert "1 more in segmented were made with another model or other options" in result.stderr
    assert covered() == [f"{photos}/b.png"]
    assert segmented(segment(photos)) == [f"{photos}/b.png"]
    assert covered() == [f"{photos}/a.png", f"{photos}/b.png"]


def test_the_table_has_a_row_for_each_picture_and_class(photos: Path) -> None:
    segment(photos)
    with Path("segmented/presence.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows].count("red") == 2
    assert len(rows) == 2 * len(CLASSES)
    (entry,) = (entry for entry in summary()["images"] if entry["file"] == f"{photos}/b.png")
    expected = {row["class"]: row for row in entry["presence"]}
    for row in (row for row in rows if row["file"] == f"{photos}/b.png"):
        same = expected[row["class"]]
        assert {key: row[key] for key in same} == {key: str(value) for key, value in same.items()}


def test_a_failed_picture_is_tried_again(photos: Path, quadrants: np.ndarray) -> None:
    (photos / "cut.png").write_bytes(encoded(quadrants)[:60])
    for _ in range(2):
        result = segment(photos)
        assert result.exit_code == 1
        assert "1 of 3 inputs failed" in result.stderr
        assert [error["code"] for error in summary()["errors"]] == ["truncated"]
    (photos / "cut.png").write_bytes(encoded(quadrants))
    result = segment(photos)
    assert (result.exit_code, segmented(result), summary()["errors"]) == (0, [f"{photos}/cut.png"], [])


# ---- which pictures, and their names


def test_subfolders_on_request_and_alike_in_the_output(photos: Path) -> None:
    (photos / ".hidden").mkdir()
    (photos / ".hidden" / "x.png").write_bytes((photos / "a.png").read_bytes())
    assert len(segmented(segment(photos, "--recursive"))) == 4
    masks = {path.relative_to("segmented").as_posix() for path in Path("segmented").rglob("*.mask.png")}
    assert masks == {"a.mask.png", "b.mask.png", "more/a.mask.png", "more/c.mask.png"}
    assert segmented(segment(photos, "-r")) == []
    assert segmented(segment(".", "-r")) == [], "the same pictures by another way, and none of our own outputs"


def test_a_folder_that_has_pictures_below_says_how_to_get_them(tmp_path: Path, photos: Path) -> None:
    Path("above").mkdir()
    photos.rename("above/photos")
    assert "--recursive" in segment("above").stderr
    assert len(segmented(segment("above", "--recursive"))) == 4


def test_an_output_keeps_its_name_when_pictures_are_added(photos: Path, quadrants: np.ndarray) -> None:
    segment(photos)
    (photos / "a.jpg").write_bytes(encoded(quadrants, "JPEG"))
    assert segmented(segment(photos)) == [f"{photos}/a.jpg"]
    assert {entry["file"][-5:]: entry["mask"] for entry in summary()["images"]} == {
        "a.jpg": "a.jpg.mask.png",
        "a.png": "a.mask.png",
        "b.png": "b.mask.png",
    }


def test_a_folder_tree_that_moved_as_a_whole_is_still_done(photos: Path) -> None:
    Path("work").mkdir()
    photos.rename("work/photos")
    segment("work/photos", "--output", "work/out")
    Path("work").rename("moved")
    assert segmented(segment("moved/photos", "--output", "moved/out")) == []


def test_a_name_that_is_not_utf8(photos: Path) -> None:
    (photos / "b.png").rename(photos / os.fsdecode(b"caf\xe9.png"))
    result = segment(photos)
    assert result.exit_code == 0, result.output
    assert [entry["mask"] for entry in summary()["images"]] == ["a.mask.png", "caf\\udce9.mask.png"]
    assert Path("segmented", "caf\\udce9.mask.png").exists()
    assert segmented(segment(photos)) == []


def test_names_as_long_as_a_file_system_has_them(photos: Path) -> None:
    long = photos / ("é" * 124)
    (photos / "a.png").rename(f"{long}a.png")
    (photos / "b.png").rename(f"{long}b.png")
    result = segment(photos)
    assert result.exit_code == 0, result.output
    masks = [entry["mask"] for entry in summary()["images"]]
    assert len(set(masks)) == 2
    assert all(Path("segmented", mask).exists() for mask in masks)
    assert segmented(segment(photos)) == []


def test_a_picture_that_the_model_fails_on_fails_alone(
    photos: Path, monkeypatch: pytest.MonkeyPatch, quadrants: np.ndarray
) -> None:
    (photos / "b.png").write_bytes(encoded(np.zeros((9, 9, 3), np.uint8)))
    run = Engine.run

    def failing(self: Engine, images: Any, *arguments: Any) -> Any:
        if images[0].shape == (9, 9, 3):
            raise RuntimeError("no memory")
        return run(self, images, *arguments)

    monkeypatch.setattr(Engine, "run", failing)
    result = segment(photos)
    assert result.exit_code == 1
    assert [error["code"] for error in summary()["errors"]] == ["model_failed"]
    assert "the model failed on this picture: no memory" in result.stderr
    assert len(segmented(result)) == 1


def test_a_link_is_its_picture_and_one_to_nowhere_is_told(photos: Path) -> None:
    (photos / "again.png").symlink_to("a.png")
    (photos / "lost.png").symlink_to("gone.png")
    result = segment(photos)
    assert result.exit_code == 1
    assert f"{photos}/lost.png: the file cannot be read: No such file" in result.stderr
    assert segmented(result) == [f"{photos}/a.png", f"{photos}/b.png"]


def test_a_pipe_is_refused_and_not_waited_for(photos: Path) -> None:
    os.mkfifo("p.jpg")
    os.mkfifo(photos / "c.png")
    (photos / "d.png").symlink_to("c.png")
    with start("p.jpg", "photos") as process:
        said, error = process.communicate(timeout=60)
    assert process.returncode == 1
    refused = ["p.jpg", "photos/c.png", "photos/d.png"]
    lines = "".join(f"{name}: this is no file, but a pipe, socket or device\n" for name in refused)
    assert error.decode() == f"{lines}error: 3 of 5 inputs failed\n"
    assert said.count(b" -> segmented/") == 2
    assert [(fault["file"], fault["code"]) for fault in summary()["errors"]] == [
        (name, "unreadable") for name in refused
    ]


def test_the_same_picture_twice_is_one(photos: Path) -> None:
    twice = [photos / "a.png", photos, photos / "." / "a.png"]
    assert find_pictures(twice) == ([Found(photos / "a.png"), Found(photos / "b.png")], [])


@pytest.mark.parametrize(
    ("files", "names"),
    [
        (["a.jpg", "b.jpg"], ["a", "b"]),
        (["a.jpg", "a.png"], ["a.jpg", "a.png"]),
        (["x/a.jpg", "y/a.jpg"], ["a.jpg", "a.jpg-2"]),
        (["x/a.jpg", "y/a.jpg", "a.jpg-2.png"], ["a.jpg", "a.jpg-2", "a.jpg-2-2"]),
        (["A.jpg", "a.png"], ["A.jpg", "a.png"]),
        (["x/A.jpg", "y/a.jpg"], ["A.jpg", "a.jpg-2"]),
    ],
)
def test_no_two_inputs_share_an_output(files: list[str], names: list[str]) -> None:
    assert output_names([Found(Path(file)) for file in files]) == names


def test_no_input_takes_the_output_of_another_run() -> None:
    assert output_names([Found(Path("y/a.jpg")), Found(Path("b.jpg"))], ["A", "a.jpg"]) == ["a.jpg-2", "b"]


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "mask.png"
    target.write_bytes(b"old")
    with pytest.raises(OSError, match="No space"), whole(target) as file:
        file.write(b"n")
        raise OSError(28, "No space left on device")
    assert target.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["mask.png"]
    with whole(target) as file:
        file.write(b"new")
    assert target.read_bytes() == b"new"
