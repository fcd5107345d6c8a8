"""Promise: `python -m service segment` does without HTTP what POST /segment does, and never leaves half a result."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_model import CLASSES, encoded
from typer.testing import CliRunner, Result

from service import __version__
from service.cli import cli
from service.engine import Engine

pytestmark = pytest.mark.usefixtures("at_the_command_line")


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture
def picture(tmp_path: Path, quadrants: np.ndarray) -> Path:
    path = tmp_path / "street.png"
    path.write_bytes(encoded(quadrants))
    return path


def test_segment_writes_mask_overlay_and_presence(
    picture: Path, tmp_path: Path, engine: Engine, quadrants_mask: np.ndarray
) -> None:
    result = run("segment", picture, "--output", "out")
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "presence.csv",
        "presence.json",
        "presence.jsonl",
        "street.mask.png",
        "street.overlay.jpg",
    ]
    np.testing.assert_array_equal(np.asarray(Image.open("out/street.mask.png")), quadrants_mask)
    assert Image.open("out/street.overlay.jpg").size == (40, 30)
    summary = json.loads(Path("out/presence.json").read_text())
    assert summary["model"] == {"name": "encnet-tiny", "sha256": engine.sha256}
    assert (summary["scales"], summary["flip"], summary["errors"]) == ([1.0], False, [])
    (entry,) = summary["images"]
    assert entry["file"] == str(picture)
    assert entry["image"] == {"width": 40, "height": 30, "exif_applied": False, "mode": "RGB"}
    assert {row["class"] for row in entry["presence"]} == set(CLASSES)
    assert "street.mask.png" in result.stdout
    assert "red" in result.stdout


def test_options_reach_the_engine(picture: Path, engine: Engine) -> None:
    noisy = np.random.default_rng(2).integers(0, 255, (20, 30, 3), np.uint8)
    picture.write_bytes(encoded(noisy))
    assert run("segment", picture, "--scales", "0.5,1", "--flip", "--no-overlay").exit_code == 0
    direct = engine.segment(noisy, (0.5, 1.0), True)
    np.testing.assert_array_equal(np.asarray(Image.open("segmented/street.mask.png")), direct.mask)
    assert not Path("segmented/street.overlay.jpg").exists()
    summary = json.loads(Path("segmented/presence.json").read_text())
    assert (summary["scales"], summary["flip"]) == ([0.5, 1.0], True)


def test_a_bad_picture_is_told_and_the_others_go_on(picture: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.png").write_bytes(picture.read_bytes()[:60])
    (tmp_path / "note.jpg").write_text("hello")
    (tmp_path / "nothing.jpg").touch()
    result = run("segment", "cut.png", "note.jpg", "nothing.jpg", "missing.jpg", picture)
    assert result.exit_code == 1
    assert Path("segmented/street.mask.png").exists()
    summary = json.loads(Path("segmented/presence.json").read_text())
    assert [entry["file"] for entry in summary["images"]] == [str(picture)]
    assert {error["file"]: error["code"] for error in summary["errors"]} == {
        "cut.png": "truncated",
        "note.jpg": "not_an_image",
        "nothing.jpg": "empty",
        "missing.jpg": "unreadable",
    }
    for error in summary["errors"]:
        assert f"{error['file']}: {error['message']}" in result.stderr
    assert "4 of 5 inputs failed" in result.stderr


def test_a_picture_too_long_for_its_overlay_is_told_and_the_others_go_on(picture: Path) -> None:
    Path("long.png").write_bytes(encoded(np.zeros((1, 70_000, 3), np.uint8)))
    result = run("segment", "long.png", picture)
    assert result.exit_code == 1
    assert "long.png: an overlay as JPEG has at most 65500 pixels a side" in result.stderr
    summary = json.loads(Path("segmented/presence.json").read_text())
    assert [entry["file"] for entry in summary["images"]] == [str(picture)]
    assert run("segment", "long.png", picture, "--no-overlay").exit_code == 0


def test_folders_are_taken_without_our_own_outputs(picture: Path, tmp_path: Path) -> None:
    assert run("segment", tmp_path, "--output", tmp_path).exit_code == 0
    assert run("segment", tmp_path, "--output", tmp_path).exit_code == 0
    summary = json.loads((tmp_path / "presence.json").read_text())
    assert [entry["file"] for entry in summary["images"]] == [str(picture)]


def test_a_folder_without_pictures(picture: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = run("segment", "empty")
    assert result.exit_code == 1
    assert "no pictures" in result.stderr
    assert not Path("segmented").exists()
    assert run("segment", "empty", picture).exit_code == 1
    assert Path("segmented/street.mask.png").exists()


def test_two_pictures_of_one_name_both_get_their_masks(tmp_path: Path, quadrants: np.ndarray) -> None:
    for folder, pixels in (("x", quadrants), ("y", quadrants[::-1])):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.png").write_bytes(encoded(pixels))
    assert run("segment", "x", "y").exit_code == 0
    entries = json.loads(Path("segmented/presence.json").read_text())["images"]
    masks = {entry["file"]: np.asarray(Image.open(Path("segmented") / entry["mask"])) for entry in entries}
    np.testing.assert_array_equal(masks["x/a.png"], masks["y/a.png"][::-1])


def test_an_output_that_cannot_be_written_is_a_sentence(picture: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    result = run("segment", picture, "--output", "taken")
    assert result.exit_code == 1
    assert "cannot write to taken" in result.stderr


def test_a_missing_model_is_a_sentence(picture: Path) -> None:
    result = run("segment", picture, "--model", "none.onnx")
    assert result.exit_code == 1
    assert "none.onnx does not exist" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--scales", "9"], "0.25 to 3"),
        (["--device", "tpu"], "device"),
        (["--threads", "-1"], "threads"),
        (["--threads", "2000"], "threads"),
    ],
)
def test_a_wrong_option_is_a_sentence(picture: Path, arguments: list[str], words: str) -> None:
    result = run("segment", picture, *arguments)
    assert result.exit_code == 2
    assert words in result.stderr


@pytest.mark.parametrize("name", ["ENCNET_GRACE_SECONDS", "ENCNET_MAX_SCALE", "ENCNET_MIN_SCALE"])
def test_a_setting_that_must_be_finite_is_refused_where_it_is_not(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "inf")
    result = run("warm")
    assert result.exit_code == 2
    assert f"{name}: Input should be a finite number" in result.stderr


def test_a_wrong_environment_variable_is_named(picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENCNET_MAX_PIXELS", "many")
    result = run("segment", picture)
    assert result.exit_code == 2
    assert "ENCNET_MAX_PIXELS" in result.stderr


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ENCNET_API_KEY", "ENCNET_API_KEY is no setting, and is ignored; did you mean ENCNET_API_KEYS?"),
        ("encnet_max_pixles", "ENCNET_MAX_PIXLES is no setting, and is ignored; did you mean ENCNET_MAX_PIXELS?"),
        ("ENCNET_WORKERS", "ENCNET_WORKERS is no setting, and is ignored\n"),
    ],
)
def test_a_name_that_no_setting_has_is_told(monkeypatch: pytest.MonkeyPatch, name: str, words: str) -> None:
    monkeypatch.setenv(name, "1")
    result = run("warm", "--size", "64x48")
    assert result.exit_code == 0
    assert result.stderr.startswith(f"warning: {words}")


def test_a_name_in_the_settings_file_that_no_setting_has_is_told() -> None:
    Path("encnet.env").write_text("MAX_PIXELS=1\nENCNET_KERNELS=off\nENCNET_MAX_SIDE=5\nENCNET_LANES=1\n")
    assert run("warm", "--size", "64x48").stderr.splitlines() == [
        "warning: ENCNET_KERNELS in encnet.env is ignored: it is read from the environment alone",
        "warning: ENCNET_MAX_SIDE in encnet.env is no setting, and is ignored; did you mean ENCNET_MAX_SCALE?",
        "warning: MAX_PIXELS in encnet.env is no setting, and is ignored; did you mean ENCNET_MAX_PIXELS?",
    ]


def test_what_others_set_is_no_misspelt_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ENCNET_KERNELS", "ENCNET_SERVE_PORT", "ENCNET_SERVE_PORT_80_TCP_ADDR", "ENCNET_SERVE_SERVICE_HOST"):
        monkeypatch.setenv(name, "off")
    assert run("warm", "--size", "64x48").stderr == ""


def test_a_checkpoint_in_a_models_place_is_told_how_it_becomes_one(tmp_path: Path) -> None:
    (tmp_path / "final.pt").write_bytes(b"PK\x03\x04 a checkpoint")
    result = run("warm", "--model", tmp_path / "final.pt")
    assert result.exit_code == 1
    assert "final.pt is no ONNX file; `python -m export CHECKPOINT" in result.stderr


def test_the_version() -> None:
    assert run("--version").stdout == f"EncNet Serve {__version__}\n"


def test_a_model_that_fails_while_it_is_warmed_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("no memory\nat a place in the source")

    monkeypatch.setattr(Engine, "segment", fail)
    result = run("warm", "--size", "64x48")
    assert result.exit_code == 1
    assert result.stderr == "error: the model failed on a picture of 64x48: no memory\n"


def test_a_settings_file_that_is_not_text_is_a_sentence(picture: Path) -> None:
    Path("encnet.env").write_bytes("ENCNET_MODELS=größe=a.onnx".encode("latin-1"))
    result = run("segment", picture)
    assert result.exit_code == 2
    assert "encnet.env is not text in UTF-8" in result.stderr


@pytest.fixture
def closed_settings() -> None:
    """A settings file that nobody may read."""
    Path("encnet.env").touch(0)


def test_a_settings_file_that_may_not_be_read_is_a_sentence(
    picture: Path, closed_settings: None, powerless: None
) -> None:
    result = run("segment", picture)
    assert result.exit_code == 2
    assert "encnet.env cannot be read by user" in result.stderr


def test_a_host_that_is_none_is_a_sentence() -> None:
    result = run("serve", "--host", "a" * 70)
    assert result.exit_code == 2
    assert "host: " in result.stderr
    assert "name of a host" in result.stderr


def test_limits_of_the_environment_apply(picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENCNET_MAX_PIXELS", "1199")
    result = run("segment", picture)
    assert result.exit_code == 1
    assert "1199" in result.stderr


def test_help_teaches_by_example() -> None:
    for command in ("segment", "serve", "bench", "warm"):
        text = re.sub(r"\x1b\[[0-9;]*m", "", run(command, "--help").stdout)
        assert f"python -m service {command}" in text
    assert command in run("--help").stdout
