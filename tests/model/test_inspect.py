"""`python -m model.inspect`: what the figure shows is what the network computes, and the figure is written."""

import dataclasses

import numpy
import pytest
import torch
from PIL import Image

from model import inspect
from model.calibration import Calibration
from model.checkpoint import Checkpoint, build_model, save_checkpoint
from model.config import ModelConfig
from model.encnet import EncNet, raise_channels
from model.predict import normalise, predict, view_of

CONFIG = ModelConfig(num_classes=3, backbone="resnet18", channels=16, codewords=5, auxiliary=False)


def make_checkpoint(config: ModelConfig = CONFIG, **values) -> Checkpoint:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = EncNet(config)
    names = [f"class {index}" for index in range(config.num_classes)]
    palette = [[60 * index % 256, 90, 200] for index in range(config.num_classes)]
    return Checkpoint(config, network.state_dict(), names, palette, base_size=64, name="small", **values)


@pytest.fixture(scope="module")
def image() -> numpy.ndarray:
    return numpy.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=numpy.uint8)


@pytest.fixture
def files(tmp_path, image):
    save_checkpoint(tmp_path / "net.pt", make_checkpoint())
    Image.fromarray(image).save(tmp_path / "street.jpg")
    return tmp_path / "net.pt", tmp_path / "street.jpg"


def head_inputs(model, checkpoint, image):
    pixels = normalise(torch.from_numpy(image)[None], checkpoint.mean, checkpoint.std)
    stages = model.backbone(view_of(pixels, checkpoint.base_size, 1.0))
    return stages, model.head.join(stages)


def test_assignment_maps_share_out_every_position_and_make_the_code(image):
    checkpoint = make_checkpoint()
    model = build_model(checkpoint)
    scene = inspect.look(model, checkpoint, image)
    assert scene.assignments.shape == (5, 6, 8), "46x64 pixels at stride 8"
    numpy.testing.assert_allclose(scene.assignments.sum(0), 1, atol=1e-5)
    with torch.no_grad():
        _, features = head_inputs(model, checkpoint, image)
        x = model.head.context.project(features)[0].flatten(1).T
        encoding = model.head.context.encoding
        residuals = x[:, None] - encoding.codewords
        shares = torch.from_numpy(scene.assignments).flatten(1).T
        torch.testing.assert_close(
            (shares[:, :, None] * residuals).sum(0)[None],
            encoding(model.head.context.project(features)),
            atol=1e-4,
            rtol=1e-4,
        )


def test_mask_and_presence_are_those_of_inference(image):
    checkpoint = make_checkpoint(calibration=Calibration((0.5, 1.0, 2.0), (1.0, 0.0, -1.0), "platt", 9))
    model = build_model(checkpoint)
    scene = inspect.look(model, checkpoint, image)
    expected = predict(
        model,
        torch.from_numpy(image)[None],
        mean=checkpoint.mean,
        std=checkpoint.std,
        base_size=64,
        calibration=checkpoint.calibration,
    )
    assert (scene.mask == expected.probabilities[0].argmax(0).numpy()).all()
    numpy.testing.assert_allclose(scene.presence, expected.presence[0].numpy())


def test_the_effects_of_the_gates_add_up_to_what_gating_changes(image):
    """Without the refinement the logits are linear in the gates, so the effects are exact."""
    checkpoint = make_checkpoint()
    model = build_model(checkpoint)
    scene = inspect.look(model, checkpoint, image)
    assert scene.effects.shape == (3, 16)
    with torch.no_grad():
        stages, features = head_inputs(model, checkpoint, image)
        gates = torch.from_numpy(scene.gates)[None]

        def mean_logits(gates):
            logits = model.head.classify(raise_channels(features, gates), stages).mean((0, 2, 3))
            return logits - logits.mean()

        whole = mean_logits(gates) - mean_logits(torch.zeros_like(gates))
        without_7 = gates.clone()
        without_7[0, 7] = 0
        of_7 = mean_logits(gates) - mean_logits(without_7)
    numpy.testing.assert_allclose(scene.effects.sum(1), whole.numpy(), atol=1e-5)
    numpy.testing.assert_allclose(scene.effects[:, 7], of_7.numpy(), atol=1e-5)
    numpy.testing.assert_allclose(scene.effects.sum(0), 0, atol=1e-5)


def test_with_the_refinement_the_effects_are_the_slope(image):
    checkpoint = make_checkpoint(dataclasses.replace(CONFIG, detail=8))
    model = build_model(checkpoint)
    scene = inspect.look(model, checkpoint, image)
    with torch.no_grad():
        stages, features = head_inputs(model, checkpoint, image)
        steps = []
        for sign in (1, -1):
            gates = torch.from_numpy(scene.gates)[None].clone()
            gates[0, 3] += sign * 0.01
            logits = model.head.classify(raise_channels(features, gates), stages).mean((0, 2, 3))
            steps.append(logits - logits.mean())
    slope = (steps[0] - steps[1]).numpy() / 0.02
    numpy.testing.assert_allclose(scene.effects[:, 3], slope * scene.gates[3], atol=1e-4)


def test_the_figure_is_written(files, tmp_path, capsys):
    output = tmp_path / "seen.png"
    assert inspect.main([*map(str, files), "--out", str(output)]) == 0
    assert str(output) in capsys.readouterr().out
    with Image.open(output) as figure:
        assert figure.format == "PNG"
        assert min(figure.size) > 800
        assert len(figure.convert("RGB").resize((200, 200)).getcolors(40000)) > 500, "not an empty sheet"


@pytest.mark.parametrize(("classes", "codewords"), [(1, 1), (40, 70)])
def test_any_number_of_classes_and_codes(classes, codewords, image):
    checkpoint = make_checkpoint(dataclasses.replace(CONFIG, num_classes=classes, codewords=codewords))
    scene = inspect.look(build_model(checkpoint), checkpoint, image)
    figure = inspect.inspection(scene, checkpoint, image, "street.jpg")
    figure.draw_without_rendering()
    titles = [
        text.get_text() for part in figure.subfigs for axes in part.axes for text in (axes.title, axes._left_title)
    ]
    assert sum(title.startswith("code ") for title in titles) == min(codewords, 32)


def test_names_with_dollar_signs_are_no_formulas(image):
    names = [f"$\\frac$ {index}" for index in range(3)]
    checkpoint = dataclasses.replace(make_checkpoint(), classes=names)
    scene = inspect.look(build_model(checkpoint), checkpoint, image)
    inspect.inspection(scene, checkpoint, image, "$\\frac$.jpg").draw_without_rendering()


@pytest.mark.parametrize("size", [(2, 200), (200, 2)])
def test_a_strip_is_drawn_on_a_figure_of_a_usual_size(size):
    checkpoint = make_checkpoint(dataclasses.replace(CONFIG, codewords=32))
    image = numpy.zeros((*size, 3), numpy.uint8)
    scene = inspect.look(build_model(checkpoint), checkpoint, image)
    figure = inspect.inspection(scene, checkpoint, image, "strip.png")
    assert max(figure.get_size_inches()) < 80


def test_weights_kept_in_half_precision_are_drawn(files, tmp_path):
    checkpoint = make_checkpoint()
    weights = {key: value.bfloat16() for key, value in checkpoint.weights.items()}
    save_checkpoint(files[0], dataclasses.replace(checkpoint, weights=weights))
    assert inspect.main([*map(str, files), "--out", str(tmp_path / "seen.png")]) == 0


def test_without_out_it_is_named_after_the_picture(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert inspect.main([*map(str, files)]) == 0
    assert (tmp_path / "street.inspection.png").is_file()


def refused(capsys, *arguments) -> str:
    assert inspect.main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def test_a_mistake_is_one_sentence_and_exit_code_2(files, tmp_path, capsys):
    checkpoint, picture = files
    text = tmp_path / "text.png"
    text.write_text("hello")
    assert "no such picture" in refused(capsys, checkpoint, tmp_path / "none.jpg")
    assert "not a readable picture" in refused(capsys, checkpoint, text)
    assert "text.png: not readable as a PyTorch checkpoint" in refused(capsys, text, picture)
    assert "must end in .png" in refused(capsys, checkpoint, picture, "--out", tmp_path / "x.jpg")
    assert "does not exist" in refused(capsys, checkpoint, picture, "--out", tmp_path / "no" / "x.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.pt", "street.jpg", "text.png"]


def test_an_fcn_has_nothing_to_look_at(image):
    checkpoint = make_checkpoint(dataclasses.replace(CONFIG, encoding=False))
    with pytest.raises(inspect.InspectError, match="is an FCN"):
        inspect.look(build_model(checkpoint), checkpoint, image)
