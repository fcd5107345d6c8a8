"""Committed recipes: their figures are the authors', and their networks fit their data sets."""

from pathlib import Path

import pytest
import torch

from model.encnet import EncNet
from model.layouts import LAYOUTS
from model.layouts.camvid import NAMES
from model.layouts.split import CLASSES, read_classes
from model.recipe import Recipe, read_recipe
from model.train_cifar import CifarRecipe

RECIPES = Path(__file__).parents[2] / "model" / "recipes"
FILES = sorted(RECIPES.glob("*.toml"))
NUMBER_OF_CLASSES = {
    "ade20k": 150, "voc-aug": 21, "voc": 21, "context": 59, "cityscapes": 19, "coco-stuff": 171, "camvid": 11,
    "msrc21": 21,
}  # fmt: skip
# By PyTorch-Encoding's train_dist.py: rate for batch 16, epochs, base size, crop; by its encnet.py: lateral.
AUTHORS = {
    "ade20k-resnet50s": (0.01, 120, 520, 480, False),
    "ade20k-resnet101s": (0.01, 120, 640, 576, False),
    "voc-aug-resnet50s": (0.001, 80, 520, 480, True),
    "voc-resnet50s": (0.0001, 50, 520, 480, True),
    "context-resnet50s": (0.001, 80, 520, 480, True),
    "cityscapes-resnet50s": (0.01, 240, 2048, 768, False),
    "coco-stuff-resnet50s": (0.004, 30, 520, 480, True),
}
# What they do not have, as it is when it is off.
NOT_THE_AUTHORS = {
    "detail": 0, "stage3_presence": False, "drop_path": 0, "gamma": 0, "white_balance": 0, "layer_decay": 1,
    "freeze": "", "unfreeze_every": 0, "clip": 0, "ema": 0, "accumulate": 1, "label_smoothing": 0, "class_balance": 0,
}  # fmt: skip


def read(stem: str) -> Recipe:
    return Recipe(**read_recipe(RECIPES / f"{stem}.toml", []))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_recipes_network_has_a_score_for_every_class_of_its_data_set(path):
    recipe = read(path.stem)
    (classes,) = {NUMBER_OF_CLASSES[name] for name in NUMBER_OF_CLASSES if name in path.stem}
    with torch.device("meta"):
        weights = EncNet(recipe.model_config(classes)).state_dict()
    scores = [len(value) for name, value in weights.items() if name.endswith(("classifier.bias", "presence.bias"))]
    assert len(weights["head.classifier.bias"]) == classes and set(scores) == {classes}
    assert recipe.layout == "" or recipe.layout in LAYOUTS


@pytest.mark.parametrize(
    ("stem", "classes", "millions"),
    [("ade20k-resnet50s", 150, 36.16), ("ade20k-resnet101s", 150, 55.16), ("context-resnet50s", 59, 43.92)],
)
def test_the_authors_networks_have_as_many_parameters_as_theirs(stem, classes, millions):
    with torch.device("meta"):
        network = EncNet(read(stem).model_config(classes))
    assert sum(value.numel() for value in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)


def test_the_class_files_have_as_many_classes():
    numbers = {path.stem: len(read_classes(path)[0]) for path in CLASSES.glob("*.json")}
    assert numbers == {"ade20k": 150, "voc": 21, "context": 59, "cityscapes": 19, "coco-stuff": 171}
    assert len(NAMES) == NUMBER_OF_CLASSES["camvid"]


@pytest.mark.parametrize("stem", AUTHORS)
def test_the_authors_recipes_have_their_figures(stem):
    rate, epochs, base_size, crop, lateral = AUTHORS[stem]
    recipe = read(stem)
    assert recipe.learning_rate == pytest.approx(rate * recipe.batch / 16)
    assert (recipe.epochs, recipe.base_size, recipe.crop, recipe.lateral) == (epochs, base_size, crop, lateral)
    assert (recipe.batch, recipe.optimizer, recipe.momentum, recipe.weight_decay) == (16, "sgd", 0.9, 1e-4)
    assert (recipe.head_rate, recipe.schedule, recipe.power, recipe.warmup) == (10, "poly", 0.9, 0)
    assert (recipe.scale_min, recipe.scale_max, recipe.mirror, recipe.rotation, recipe.jitter) == (0.5, 2, True, 0, 0)
    assert (recipe.presence_weight, recipe.auxiliary_weight, recipe.dropout) == (0.2, 0.2, 0.1)
    assert (recipe.channels, recipe.codewords, recipe.output_stride) == (512, 32, 8)
    assert recipe.align_corners and recipe.auxiliary and not recipe.reference_positions
    assert {name: getattr(recipe, name) for name in NOT_THE_AUTHORS} == NOT_THE_AUTHORS


def test_the_cifar_recipe_is_the_authors():
    recipe = CifarRecipe()
    assert (recipe.learning_rate, recipe.momentum, recipe.weight_decay) == (0.1, 0.9, 1e-4)
    assert (recipe.batch, recipe.epochs) == (128, 600)


@pytest.mark.parametrize("stem", ["camvid-full-resnet18c", "msrc21-resnet18c"])
def test_recipes_from_scratch_encode_as_many_positions_as_a_crop_has(stem):
    recipe = read(stem)
    assert recipe.lateral and recipe.reference_positions == (recipe.crop / 8) ** 2


def test_every_public_data_set_has_a_recipe_that_names_its_layout():
    assert {read(path.stem).layout for path in FILES} >= {
        "ade20k", "voc", "voc-aug", "context", "cityscapes", "coco-stuff", "camvid-full",
    }  # fmt: skip
