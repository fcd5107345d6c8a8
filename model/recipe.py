"""A training recipe: one flat set of options, from a TOML file and key=value words, checked before anything starts."""

import ast
import dataclasses
import difflib
import math
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.augment import Augmentation
from model.checkpoint import MOST_BASE_SIZE
from model.config import ModelConfig
from model.fine_tuning import PARTS, part_names
from model.weights import CheckpointError

LEAST_CROP, MOST_CROP = 32, 16384  # pixels
MOST_GAMMA = 4  # beyond it pictures are black and white


class RecipeError(ValueError):
    """An option that does not exist or a value that does not fit it."""


def option(default: Any, text: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Recipe:
    """Every option of `python -m model.train`; the help texts below are the documentation."""

    name: str = option("encnet", "name the model travels under")
    licence: str = option("", "licence note that travels with the weights")
    description: str = option("", "one sentence that travels with the weights")
    layout: str = option("", "how the data set lies on disk (README, Data sets); empty: recognised")

    backbone: str = option("resnet50s", "resnet{18,34,50,101} + '' (7x7 stem), 's' (64-64-128) or 'c' (32-32-64)")
    output_stride: int = option(8, "8 or 16, pixels per feature position")
    channels: int = option(512, "D, width of the head")
    codewords: int = option(32, "K, number of codewords")
    encoding: bool = option(True, "the Context Encoding Module; false: an FCN, which needs presence_weight=0")
    lateral: bool = option(False, "fuse stages 2 and 3 into the head")
    detail: int = option(0, "channels of the stride-4 refinement before the classifier; 0: none")
    auxiliary: bool = option(True, "FCN head on stage 3 while training")
    stage3_presence: bool = option(False, "the paper's second SE-loss, on stage 3")
    dropout: float = option(0.1, "probability, before each pixel classifier")
    drop_path: float = option(0.0, "probability of skipping the last residual block, in proportion for those before it")
    align_corners: bool = option(True, "bilinear resizes map corner to corner")
    reference_positions: float = option(0.0, "N_ref of the Encoding layer, (crop / stride)^2 is usual; 0: plain sum")

    base_size: int = option(520, "long side in pixels at scale 1")
    crop: int = option(480, "side of a training crop in pixels")
    scale_min: float = option(0.5, "smallest random scale")
    scale_max: float = option(2.0, "largest random scale")
    mirror: bool = option(True, "mirror half of the crops")
    rotation: float = option(10.0, "largest rotation in degrees, either way")
    jitter: float = option(0.3, "largest relative change of brightness, contrast and saturation")
    gamma: float = option(0.0, "values are raised to a power from 2^-gamma to 2^gamma")
    white_balance: float = option(0.0, "largest relative change of each colour channel by itself")

    epochs: int = option(120, "passes over the train split")
    batch: int = option(16, "crops per step, over all processes together")
    optimizer: str = option("sgd", "sgd or adamw")
    learning_rate: float = option(0.01, "at the end of the warm-up")
    head_rate: float = option(10.0, "multiplies the learning rate of everything but the backbone")
    layer_decay: float = option(1.0, "a backbone part's rate over that of the next part; stage4 has learning_rate")
    freeze: str = option("", "backbone parts that do not learn: some of stem,stage1,stage2,stage3,stage4")
    unfreeze_every: int = option(0, "epochs until one more backbone part learns, stage4 first; 0: all from the start")
    momentum: float = option(0.9, "of sgd; adamw keeps its betas (0.9, 0.999)")
    weight_decay: float = option(1e-4, "on every parameter, decoupled with adamw")
    schedule: str = option("poly", "poly or cosine, per step, to 0")
    power: float = option(0.9, "exponent of poly")
    warmup: int = option(0, "steps of linear warm-up")
    clip: float = option(0.0, "largest gradient norm; 0: no clipping")
    ema: float = option(0.0, "decay per step of the averaged weights that are evaluated and kept; 0: none")
    accumulate: int = option(1, "parts of a step, worked off one after the other; batch norm sees a part at a time")
    compile: bool = option(False, "run the network and the loss through torch.compile")
    precision: str = option("fp32", "fp32, bf16 or fp16 (fp16: CUDA only)")
    channels_last: bool = option(True, "channels_last memory")
    presence_weight: float = option(0.2, "weight of the SE-loss")
    auxiliary_weight: float = option(0.2, "weight of the auxiliary head's loss")
    label_smoothing: float = option(0.0, "share of a pixel's target that is spread over all classes")
    class_balance: float = option(0.0, "class weights are (1 / pixel frequency) to this power; 0: none")
    seed: int = option(0, "of weights, order, crops and dropout")

    cache: str = option("auto", "decoded pictures stay on the device, on the host, or off (read by workers each time)")
    workers: int = option(1, "processes that read pictures where cache is off; 0: none")
    log_every: int = option(20, "steps between log lines")
    save_every: int = option(200, "steps between saves of last.pt")
    evaluate_every: int = option(5, "epochs between evaluations; the last epoch is always evaluated")

    def __post_init__(self) -> None:
        rules = (
            (self.optimizer in ("sgd", "adamw"), f"optimizer must be sgd or adamw, got {self.optimizer!r}"),
            (self.schedule in ("poly", "cosine"), f"schedule must be poly or cosine, got {self.schedule!r}"),
            (
                self.cache in ("auto", "device", "host", "off"),
                f"cache must be auto, device, host or off, got {self.cache!r}",
            ),
            (
                self.precision in ("fp32", "bf16", "fp16"),
                f"precision must be fp32, bf16 or fp16, got {self.precision!r}",
            ),
            (self.encoding or not self.presence_weight, "encoding=false needs presence_weight=0"),
            (0 < self.scale_min <= self.scale_max, "scales must satisfy 0 < scale_min <= scale_max"),
            *(
                (0 <= getattr(self, key) < 1, f"{key} must be in [0, 1), got {getattr(self, key)}")
                for key in ("ema", "momentum", "jitter", "white_balance", "label_smoothing")
            ),
            (0 < self.layer_decay <= 1, f"layer_decay must be in (0, 1], got {self.layer_decay}"),
            (
                set(part_names(self.freeze)) <= set(PARTS),
                f"freeze must name parts out of {', '.join(PARTS)}, separated by commas, got {self.freeze!r}",
            ),
            (self.learning_rate > 0, f"learning_rate must be positive, got {self.learning_rate}"),
            *(
                (getattr(self, key) >= 1, f"{key} must be at least 1, got {getattr(self, key)}")
                for key in (
                    "epochs",
                    "batch",
                    "accumulate",
                    "log_every",
                    "save_every",
                    "evaluate_every",
                )
            ),
            *(
                (getattr(self, key) >= 0, f"{key} must not be negative, got {getattr(self, key)}")
                for key in (
                    "warmup",
                    "clip",
                    "workers",
                    "weight_decay",
                    "rotation",
                    "seed",
                    "unfreeze_every",
                    "head_rate",
                    "power",
                    "presence_weight",
                    "auxiliary_weight",
                    "class_balance",
                )
            ),
            (0 <= self.gamma <= MOST_GAMMA, f"gamma must be 0 to {MOST_GAMMA}, got {self.gamma}"),
            (LEAST_CROP <= self.crop <= MOST_CROP, f"crop must be {LEAST_CROP} to {MOST_CROP} pixels, got {self.crop}"),
            (
                1 <= self.base_size <= MOST_BASE_SIZE,
                f"base_size must be 1 to {MOST_BASE_SIZE} pixels, got {self.base_size}",
            ),
            (self.seed < 2**63, f"seed must be less than 2^63, got {self.seed}"),
        )
        broken = [message for holds, message in rules if not holds]
        if broken:
            raise RecipeError("; ".join(broken))

    def augmentation(self) -> Augmentation:
        """What is drawn for the training crops."""
        return Augmentation(
            crop=self.crop,
            base_size=self.base_size,
            scale=(self.scale_min, self.scale_max),
            mirror=self.mirror,
            rotation=self.rotation,
            jitter=self.jitter,
            gamma=self.gamma,
            white_balance=self.white_balance,
        )

    def model_config(self, num_classes: int) -> ModelConfig:
        """The network's configuration for so many classes. Raises RecipeError for options that fit no network."""
        shared = {field.name for field in dataclasses.fields(ModelConfig)} - {"num_classes"}
        try:
            return ModelConfig(num_classes=num_classes, **{key: getattr(self, key) for key in shared})
        except ValueError as error:
            raise RecipeError(str(error)) from error


def read_recipe(path: Path | None, words: list[str], kind: type = Recipe) -> dict[str, Any]:
    """The options of that kind of recipe which a TOML file and key=value words set; words win. Raises RecipeError."""
    values: dict[str, Any] = {}
    if path is not None:
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise RecipeError(f"{path}: not a readable recipe: {error}") from error
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise RecipeError(f"{word!r}: options are given as key=value, for example epochs=50")
        values[key] = _literal(text)
    return {key: _checked(key, value, kind) for key, value in values.items()}


def continued(
    kind: type,
    last: Path,
    training: dict[str, Any] | None,
    state: Iterable[str],
    given: dict[str, Any],
    bookkeeping: set[str],
) -> Any:
    """The recipe of that kind a run was started with, from the training state in `last`.

    Raises CheckpointError where that is not there, or lacks one of `state`, and RecipeError for options given again
    that do not agree, those of bookkeeping aside.
    """
    if training is None:
        raise CheckpointError(f"{last}: holds weights only, nothing to resume from")
    missing = [key for key in state if key not in training]
    if missing:
        raise CheckpointError(f"{last}: its training state lacks {', '.join(missing)}, so nothing can resume from it")
    try:
        stored = {key: _checked(key, value, kind) for key, value in training["recipe"].items()}
    except RecipeError as error:
        raise RecipeError(f"--resume: the run's recipe is damaged, or of another version: {error}") from error
    values = {field.name: field.default for field in dataclasses.fields(kind)} | stored
    differing = {key for key, value in given.items() if values[key] != value} - bookkeeping
    if differing:
        listed = ", ".join(f"{key}={values[key]} (given {given[key]})" for key in sorted(differing))
        raise RecipeError(f"--resume continues the run as it was started; it has {listed}")
    return kind(**stored | {key: value for key, value in given.items() if key in bookkeeping})


def _literal(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError):
        return text


def _checked(key: str, value: Any, kind: type) -> Any:
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if key not in fields:
        close = difflib.get_close_matches(key, fields, n=1)
        hint = f", did you mean {close[0]}?" if close else ";"
        raise RecipeError(f"unknown option {key!r}{hint} known: {', '.join(fields)}")
    wanted = type(fields[key].default)
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 2**1000 else math.inf
    if type(value) is not wanted:
        raise RecipeError(f"{key} must be {wanted.__name__}, got {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise RecipeError(f"{key} must be a finite number, got {value}")
    return value


def options_table(kind: type = Recipe) -> str:
    """One line an option: name, default as it would be typed, meaning."""

    def typed(default: Any) -> str:
        return str(default).lower() if isinstance(default, bool) else str(default)

    return "\n".join(
        f"  {field.name + '=' + typed(field.default):<28} {field.metadata['help']}"
        for field in dataclasses.fields(kind)
    )
