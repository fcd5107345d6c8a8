"""Weights in parts: what is joined is what was split, and damage is told."""

import json

import pytest

from benchmarks.split_weights import MANIFEST, PART_BYTES, main, split


@pytest.fixture
def weights(tmp_path):
    file = tmp_path / "final.pt"
    file.write_bytes(bytes(range(256)) * 10)
    return file


@pytest.mark.parametrize(("part_bytes", "parts"), [(1000, 3), (2560, 1), (512, 5)])
def test_parts_make_the_file_again(weights, tmp_path, part_bytes, parts, capsys):
    paths = split(weights, tmp_path / "parts", part_bytes)
    assert len(paths) == parts and max(path.stat().st_size for path in paths) <= part_bytes
    assert main(["join", str(tmp_path / "parts"), str(tmp_path / "joined.pt")]) == 0
    assert (tmp_path / "joined.pt").read_bytes() == weights.read_bytes()
    assert "2560 bytes, as they were" in capsys.readouterr().out


def test_splitting_again_leaves_no_old_parts(weights, tmp_path):
    split(weights, tmp_path / "parts", 500)
    assert main(["split", str(weights), str(tmp_path / "parts")]) == 0
    assert {path.name for path in (tmp_path / "parts").iterdir()} == {"final.pt.part000", MANIFEST}
    assert PART_BYTES <= 15_000_000


def test_splitting_touches_nothing_else(weights, tmp_path):
    others = [tmp_path / "best.part1.pt", tmp_path / "notes.partial.txt"]
    for path in others:
        path.write_bytes(b"mine")
    split(others[0], tmp_path)
    assert all(path.read_bytes() == b"mine" for path in others)
    assert (tmp_path / "best.part1.pt.part000").exists()


def test_damage_is_told(weights, tmp_path, capsys):
    folder, joined = tmp_path / "parts", str(tmp_path / "joined.pt")
    second = split(weights, folder, 1000)[1]
    content = second.read_bytes()
    second.write_bytes(content[:-1] + b"!")
    assert main(["join", str(folder), joined]) == 2
    assert "part001: this part is not as it was written" in capsys.readouterr().err
    second.unlink()
    assert main(["join", str(folder), joined]) == 2
    assert "part001: this part is missing; there must be 3" in capsys.readouterr().err
    second.write_bytes(content)
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"sha256": "0"}))
    assert main(["join", str(folder), joined]) == 2
    assert "do not make final.pt" in capsys.readouterr().err
    assert main(["join", str(tmp_path), joined]) == 2
    assert "not the manifest of a split file" in capsys.readouterr().err
    assert not (tmp_path / "joined.pt").exists()
