"""The whole road: pictures are trained on, the checkpoint is exported, the file is served, the mask is right."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from model.checkpoint import load_checkpoint
from model.data import open_dataset
from service.app import create_app
from service.engine import Engine
from service.settings import Settings
from tests.model.folders import COLOURS, write_scenes

ROOT = Path(__file__).parents[1]
EMBEDDED = ROOT / "service" / "models" / "camvid.onnx"
DATA = ROOT.parent / "shared" / "data"
RECIPE = [
    "backbone=resnet18c", "output_stride=16", "lateral=true", "detail=8", "align_corners=false", "channels=16",
    "codewords=4", "reference_positions=16", "crop=32", "base_size=48", "rotation=0", "batch=3", "epochs=25",
    "optimizer=adamw", "learning_rate=0.003", "head_rate=1.0", "evaluate_every=25", "save_every=50", "workers=0",
    "name=bands",
]  # fmt: skip


def run(*arguments):
    process = subprocess.run(
        [sys.executable, "-m", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert process.returncode == 0, process.stdout + process.stderr


def test_train_export_serve(tmp_path):
    scenes = write_scenes(tmp_path / "scenes")
    Image.new("RGB", (48, 48), COLOURS[0]).save(scenes / "images" / "plain.png")  # classes must vary to be calibrated
    Image.new("L", (48, 48), 0).save(scenes / "labels" / "plain.png")
    with (scenes / "splits" / "val.txt").open("a") as split:
        split.write("plain\n")
    run("model.train", "--data", scenes, "--out", tmp_path / "run", *RECIPE)
    run("model.calibrate", tmp_path / "run" / "final.pt", "--data", scenes, "--out", tmp_path / "run" / "final.pt")
    run("model.evaluate", tmp_path / "run" / "final.pt", "--data", scenes, "--output", tmp_path / "evaluation")
    run("export", tmp_path / "run" / "final.pt", "--output", tmp_path / "bands.onnx")

    calibration = load_checkpoint(tmp_path / "run" / "final.pt").calibration
    assert calibration is not None
    assert Engine(tmp_path / "bands.onnx").metadata.presence_scale == calibration.scale
    evaluation = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    data = open_dataset(scenes, "test")
    with TestClient(create_app(Settings(model=tmp_path / "bands.onnx"))) as client:
        agreement = []
        for index, (picture, _) in enumerate(data.pairs):
            answer = client.post("/segment?format=png", content=picture.read_bytes())
            mask = numpy.asarray(Image.open(io.BytesIO(answer.content)))
            agreement.append((mask == data.load(index)[1]).mean())
        names = [entry["name"] for entry in client.get("/classes").json()["classes"]]
    assert names == data.classes
    assert numpy.mean(agreement) > 0.8, "three coloured bands are easily learned"
    assert numpy.mean(agreement) == pytest.approx(evaluation["totals"]["pixel_accuracy"], abs=0.01), (
        "the service is the network"
    )


@pytest.mark.parametrize(("file", "folder"), [(EMBEDDED, "camvid"), (ROOT / "examples" / "msrc21.onnx", "msrc21")])
def test_the_committed_models_segment_their_test_pictures(file, folder):
    if not (DATA / folder).is_dir():
        pytest.skip(f"the pictures are not beside this checkout (../shared/data/{folder})")
    engine, data = Engine(file), open_dataset(DATA / folder, "test")
    assert list(engine.metadata.classes) == data.classes
    correct = labelled = 0
    for index in range(0, len(data), 20):
        image, truth = data.load(index)
        known = truth != 255
        correct += ((engine.segment(image).mask == truth) & known).sum()
        labelled += known.sum()
    assert correct / labelled > 0.85
