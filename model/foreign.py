"""EncNet weights that others published: recognised by their keys and renamed to this project's.

Two formats are known: PyTorch-Encoding, the paper's authors' (`pretrained.*`, `head.encmodule.*`), and mmsegmentation
(`backbone.*`, `decode_head.*`). The weights say how wide and deep the network is; what they cannot say is assumed:
output stride 8, the resize rule of the publishing code (corners aligned in PyTorch-Encoding, not in mmsegmentation,
of which only the 769x769 configurations align them; where the file has its configuration, that decides), the plain sum
over positions as they were trained with, and the base size of the publishers' usual recipe (520 and 512 pixels).
"""

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from numbers import Integral
from typing import Any, NamedTuple

import numpy
from torch import Tensor

from model.config import ModelConfig
from model.resnet import BLOCKS, DEEP_STEM_WIDTHS, BasicBlock, Bottleneck
from model.wording import is_text, listing

PYTORCH_ENCODING = "PyTorch-Encoding"
MMSEGMENTATION = "mmsegmentation"
BASE_SIZES = {PYTORCH_ENCODING: 520, MMSEGMENTATION: 512}


class Foreign(NamedTuple):
    """A foreign file in this project's terms.

    weights: by our keys; unknown: their keys that stand for nothing in an EncNet; table: their prefixes -> ours;
    base_size: pixels; step: training iterations where the file tells, else 0; assumed: a sentence about a resize rule
    that the file does not tell, else "".
    """

    source: str
    config: ModelConfig
    weights: dict[str, Tensor]
    unknown: list[str]
    table: dict[str, str]
    classes: list[str]
    palette: list[list[int]]
    base_size: int
    step: int
    assumed: str


def read_foreign(document: Mapping[str, Any]) -> Foreign:
    """Recognise and translate what a .pth file held: a state dict, or a dict with `state_dict` beside other things.

    Raises ValueError when it is of neither format, or is not of an EncNet that can be built here.
    """
    state = unwrap(document)
    source = recognise(state)
    if source == PYTORCH_ENCODING:  # the ImageNet classifier, which segmentation does not use
        state = {key: value for key, value in state.items() if not key.startswith("pretrained.fc.")}
    refuse_pooled_shortcuts(state)
    table = renaming(source, deep_stem="backbone.stem.0.weight" in state)
    renamed = {key: rename(key, table) for key in state}
    unknown = [theirs for theirs, ours in renamed.items() if ours is None]
    weights = {ours: state[theirs] for theirs, ours in renamed.items() if ours is not None}
    missing = [rename(key, inverse(table)) or key for key in TELLING_KEYS if key not in weights]
    if missing:
        raise ValueError(
            f"its keys are those of {source}, but not of an EncNet with a presence head; "
            f"missing keys: {listing(missing)}" + (f"; left-over keys: {listing(unknown)}" if unknown else "")
        )
    numbers = [
        theirs
        for theirs, ours in renamed.items()
        if ours is not None and state[theirs].dim() == 0 and not ours.endswith("num_batches_tracked")
    ]
    if numbers:
        raise ValueError(f"single numbers where tensors belong: {listing(numbers)}")
    meta = document.get("meta")
    meta = meta if isinstance(meta, Mapping) else {}
    align_corners, assumed = resize_rule(source, meta)
    config = infer_config(weights, align_corners)
    if source == MMSEGMENTATION and "backbone.layer1.0.conv3.weight" not in weights:
        raise ValueError(
            f"an EncNet of {source} on ResNet-18 or -34, which dilates only the first convolution of a block where "
            "networks here dilate both; its weights would compute something else"
        )
    classes, palette = described_classes(meta, config.num_classes)
    step = meta.get("iter")
    step = step if isinstance(step, int) else 0
    return Foreign(source, config, weights, unknown, table, classes, palette, BASE_SIZES[source], step, assumed)


def unwrap(document: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict in a file's object, without the `module.` that DataParallel puts before every key.

    Raises ValueError when it is not a dict of tensors.
    """
    state = document.get("state_dict", document)
    if not isinstance(state, Mapping) or not state:
        raise ValueError("its state_dict is empty or no dict")
    others = [str(key) for key, value in state.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(f"not a state dict: no tensors under {listing(others)}")
    return {str(key).removeprefix("module."): value for key, value in state.items()}


def refuse_pooled_shortcuts(state: Mapping[str, Tensor]) -> None:
    """Raise ValueError where a ResNet's shortcuts have average pooling before their convolution."""
    pooled = [key for key in state if re.search(r"layer\d\.\d+\.downsample\.2\.", key)]
    if pooled:
        raise ValueError(
            "shortcuts with average pooling (resnet50d, ResNetV1d) are not supported; left-over keys: "
            + listing(pooled)
        )


def recognise(state: Mapping[str, Tensor]) -> str:
    """PYTORCH_ENCODING or MMSEGMENTATION; raises ValueError with the first keys when it looks like neither."""
    if any(key.startswith("pretrained.") for key in state):
        return PYTORCH_ENCODING
    if any(key.startswith("decode_head.") for key in state):
        return MMSEGMENTATION
    raise ValueError(
        f"neither this project's, nor {PYTORCH_ENCODING}'s, nor {MMSEGMENTATION}'s checkpoint; its first keys are "
        + ", ".join(list(state)[:8])
    )


def renaming(source: str, deep_stem: bool) -> dict[str, str]:
    """Their key prefix -> ours, module by module; one-to-one. deep_stem matters to mmsegmentation only."""
    if source == PYTORCH_ENCODING:
        return {
            "pretrained.conv1.": "backbone.conv1.",
            "pretrained.bn1.": "backbone.bn1.",
            **{f"pretrained.layer{n}.": f"backbone.layer{n}." for n in (1, 2, 3, 4)},
            **_conv_norm("head.conv5.", "0", "1", "head.bottleneck."),
            **_conv_norm("head.connect.0.", "0", "1", "head.lateral.0."),
            **_conv_norm("head.connect.1.", "0", "1", "head.lateral.1."),
            **_conv_norm("head.fusion.", "0", "1", "head.fusion."),
            **_conv_norm("head.encmodule.encoding.", "0", "1", "head.context.project."),
            "head.encmodule.encoding.3.": "head.context.encoding.",
            "head.encmodule.encoding.4.": "head.context.code_norm.",
            "head.encmodule.fc.0.": "head.context.gate.",
            "head.encmodule.selayer.": "head.presence.",
            "head.conv6.1.": "head.classifier.",
            **_conv_norm("auxlayer.conv5.", "0", "1", "aux.bottleneck."),
            "auxlayer.conv5.4.": "aux.classifier.",
        }
    stem = {"backbone.conv1.": "backbone.conv1.", "backbone.bn1.": "backbone.bn1."}
    if deep_stem:
        stem = {f"backbone.stem.{n}.": f"backbone.conv1.{n}." for n in (0, 1, 3, 4, 6)}
        stem["backbone.stem.7."] = "backbone.bn1."
    return {
        **stem,
        **{f"backbone.layer{n}.": f"backbone.layer{n}." for n in (1, 2, 3, 4)},
        **_conv_norm("decode_head.bottleneck.", "conv", "bn", "head.bottleneck."),
        **_conv_norm("decode_head.lateral_convs.0.", "conv", "bn", "head.lateral.0."),
        **_conv_norm("decode_head.lateral_convs.1.", "conv", "bn", "head.lateral.1."),
        **_conv_norm("decode_head.fusion.", "conv", "bn", "head.fusion."),
        **_conv_norm("decode_head.enc_module.encoding_project.", "conv", "bn", "head.context.project."),
        "decode_head.enc_module.encoding.0.": "head.context.encoding.",
        "decode_head.enc_module.encoding.1.": "head.context.code_norm.",
        "decode_head.enc_module.fc.0.": "head.context.gate.",
        "decode_head.se_layer.": "head.presence.",
        "decode_head.conv_seg.": "head.classifier.",
        **_conv_norm("auxiliary_head.convs.0.", "conv", "bn", "aux.bottleneck."),
        "auxiliary_head.conv_seg.": "aux.classifier.",
    }


def _conv_norm(theirs: str, conv: str, norm: str, ours: str) -> dict[str, str]:
    return {f"{theirs}{conv}.": f"{ours}conv.", f"{theirs}{norm}.": f"{ours}bn."}


def inverse(table: Mapping[str, str]) -> dict[str, str]:
    """The table from our prefixes to theirs, or back."""
    return {ours: theirs for theirs, ours in table.items()}


def rename(key: str, table: Mapping[str, str]) -> str | None:
    """The key with its prefix replaced; None for a key with none of the table's prefixes."""
    for prefix, replacement in table.items():
        if key.startswith(prefix):
            return replacement + key[len(prefix) :]
    return None


TELLING_KEYS = (
    "backbone.layer1.0.conv1.weight",
    "head.bottleneck.conv.weight",
    "head.context.encoding.codewords",
    "head.presence.weight",
    "head.classifier.weight",
)


def infer_config(weights: Mapping[str, Tensor], align_corners: bool) -> ModelConfig:
    """The configuration that has these weights (by our keys, TELLING_KEYS among them).

    Raises ValueError for a backbone that is none of `model.config.BACKBONES`.
    """
    return ModelConfig(
        num_classes=weights["head.classifier.weight"].shape[0],
        backbone=backbone_name(weights),
        output_stride=8,
        channels=weights["head.bottleneck.conv.weight"].shape[0],
        codewords=weights["head.context.encoding.codewords"].shape[0],
        lateral=any(key.startswith("head.lateral.") for key in weights),
        auxiliary=any(key.startswith("aux.") for key in weights),
        align_corners=align_corners,
    )


def backbone_name(weights: Mapping[str, Tensor]) -> str:
    """Which of `model.config.BACKBONES` has these weights (by our keys); ValueError where it is none of them."""
    block: type[BasicBlock] | type[Bottleneck] = BasicBlock
    if "backbone.layer1.0.conv3.weight" in weights:
        block = Bottleneck
    blocks = {match.groups() for key in weights if (match := re.match(r"backbone\.layer(\d)\.(\d+)\.", key))}
    depths = tuple(sum(1 for stage, _ in blocks if stage == str(number)) for number in (1, 2, 3, 4))
    depth = next((depth for depth, layout in BLOCKS.items() if layout == (block, depths)), None)
    if depth is None:
        known = ", ".join(f"ResNet-{number}" for number in BLOCKS)
        raise ValueError(f"a backbone of {depths} {block.__name__} blocks is none of {known}")
    if "backbone.conv1.weight" in weights:
        return f"resnet{depth}"
    convolutions = [weights.get(f"backbone.conv1.{index}.weight") for index in (0, 3, 6)]
    widths = tuple(convolution.shape[0] for convolution in convolutions if convolution is not None)
    stem = next((letter for letter, known_widths in DEEP_STEM_WIDTHS.items() if known_widths == widths), None)
    if stem is None:
        known = ", ".join("-".join(map(str, known_widths)) for known_widths in DEEP_STEM_WIDTHS.values())
        found = "-".join(map(str, widths)) or "nothing"
        raise ValueError(f"a stem of {found} channels is neither a 7x7 convolution nor one of {known}")
    return f"resnet{depth}{stem}"


def resize_rule(source: str, meta: Mapping[str, Any]) -> tuple[bool, str]:
    """Whether the network aligns corners, and a sentence where that is the publishers' usual rule for want of better.

    meta: mmsegmentation's, whose `config` (from version 1 on `cfg`) is the text of the training's configuration.
    """
    texts = [meta.get(key) for key in ("config", "cfg")] if source == MMSEGMENTATION else []
    said = {value for text in texts if isinstance(text, str) for value in said_of_corners(text)}
    if len(said) == 1:
        return said.pop(), ""
    usual = source == PYTORCH_ENCODING
    why = "the configuration in the file says both" if said else "the file does not say"
    exception = ", but for 769x769" if source == MMSEGMENTATION else ""
    return usual, f"align_corners={usual} is assumed, as {source} has it{exception}: {why}"


def said_of_corners(config: str) -> set[bool]:
    """Each `align_corners` of a `decode_head` in a configuration in Python's syntax, which is parsed and never run."""
    try:
        nodes = list(ast.walk(ast.parse(config)))
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # the last two of nesting without end
        return set()
    heads = [value for node in nodes for key, value in _entries(node) if key == "decode_head"]
    values = [value for head in heads for key, value in _entries(head) if key == "align_corners"]
    return {value.value for value in values if isinstance(value, ast.Constant) and isinstance(value.value, bool)}


def _entries(node: ast.AST) -> Iterator[tuple[str | None, ast.expr]]:
    """Keys and values of `dict(key=value)` or `{"key": value}`."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        yield from ((keyword.arg, keyword.value) for keyword in node.keywords)
    elif isinstance(node, ast.Dict):
        for key, value in zip(node.keys, node.values, strict=True):
            if isinstance(key, ast.Constant):
                yield str(key.value), value


def described_classes(meta: Mapping[str, Any], num_classes: int) -> tuple[list[str], list[list[int]]]:
    """Names and colours from mmsegmentation's `meta` where they fit, else "class 0".. and distinct colours."""
    described = meta.get("dataset_meta")
    described = described if isinstance(described, Mapping) else {}
    classes = _plain(described.get("classes")) or _plain(meta.get("CLASSES"))
    palette = _plain(described.get("palette")) or _plain(meta.get("PALETTE"))
    if not isinstance(classes, list) or len(classes) != num_classes or not are_names(classes):
        classes = [f"class {index}" for index in range(num_classes)]
    if not isinstance(palette, list) or not is_palette(palette, num_classes):
        palette = distinct_palette(num_classes)
    return [str(name) for name in classes], [[int(value) for value in colour] for colour in palette]


def _plain(value: Any) -> Any:
    """The value with lists in place of arrays, tensors and tuples."""
    if isinstance(value, (numpy.ndarray, Tensor)):
        return value.tolist()
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def are_names(classes: Iterable[Any]) -> bool:
    """Whether they are texts, none empty and none twice."""
    names = list(classes)
    return all(is_text(name) and name.strip() for name in names) and len(set(names)) == len(names)


def is_palette(palette: Iterable[Any], num_classes: int) -> bool:
    """Whether it is `num_classes` triples of whole numbers in 0..255."""
    colours = list(palette)
    return len(colours) == num_classes and all(
        isinstance(colour, (list, tuple))
        and len(colour) == 3
        and all(isinstance(value, Integral) and 0 <= int(value) <= 255 for value in colour)
        for colour in colours
    )


def distinct_palette(count: int) -> list[list[int]]:
    """Colours by PASCAL VOC's formula, from its number 1 on: its number 0 is black, which hides what it covers.

    Bits 0, 3, 6, .. of the number, from the most significant bit of a byte down, make red; the next ones green, blue.
    """
    palette = []
    for number in range(1, count + 1):
        colour = [0, 0, 0]
        for bit in range(8):
            for channel in range(3):
                colour[channel] |= (number >> (3 * bit + channel) & 1) << (7 - bit)
        palette.append(colour)
    return palette
