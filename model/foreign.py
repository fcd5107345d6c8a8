"""EncNet weights that others published: recognised by their keys and renamed to this project's.

Two formats are known: PyTorch-Encoding, the paper's authors' (`pretrained.*`, `head.encmodule.*`), and mmsegmentation
(`backbone.*`, `decode_head.*`). The weights say how wide and deep the network is; what they cannot say is assumed:
output stride 8, ImageNet's mean and deviation, the resize rule of the publishing code (corners aligned in
PyTorch-Encoding, not in mmsegmentation, of which only the 769x769 configurations align them), the plain sum over
positions as they were trained with, and the base size of the publishers' usual recipe (520 and 512 pixels). Where the
file has its configuration, as mmsegmentation's training leaves it there, that decides about the first three.
"""

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
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
# What mmsegmentation takes a ResNet to be where its configuration does not say, and what it says of those here.
RESNET = {
    "strides": [1, 2, 2, 2],
    "dilations": [1, 1, 1, 1],
    "contract_dilation": False,
    "style": "pytorch",
    "multi_grid": None,
}
KNOWN_RESNETS = {
    8: {**RESNET, "strides": [1, 2, 1, 1], "dilations": [1, 1, 2, 4], "contract_dilation": True},
    16: {**RESNET, "strides": [1, 2, 2, 1], "dilations": [1, 1, 1, 2], "contract_dilation": True},
}

Configured = list[dict[str | None, ast.expr]]


class Foreign(NamedTuple):
    """A foreign file in this project's terms.

    weights: by our keys; unknown: their keys that stand for nothing in an EncNet; table: their prefixes -> ours;
    normalisation: mean and deviation of RGB in 0..1, None where the file does not tell; base_size: pixels;
    step: training iterations where the file tells, else 0; assumed: a sentence about a resize rule that the file does
    not tell, else "".
    """

    source: str
    config: ModelConfig
    weights: dict[str, Tensor]
    unknown: list[str]
    table: dict[str, str]
    classes: list[str]
    palette: list[list[int]]
    normalisation: tuple[tuple[float, ...], tuple[float, ...]] | None
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
    configured = configuration(meta) if source == MMSEGMENTATION else []
    align_corners, assumed = resize_rule(source, configured)
    config = infer_config(weights, align_corners)
    if source == MMSEGMENTATION and "backbone.layer1.0.conv3.weight" not in weights:
        raise ValueError(
            f"an EncNet of {source} on ResNet-18 or -34, which dilates only the first convolution of a block where "
            "networks here dilate both; its weights would compute something else"
        )
    config = replace(config, output_stride=output_stride(configured, config.lateral))
    classes, palette = described_classes(meta, config.num_classes)
    step = meta.get("iter")
    step = step if isinstance(step, int) else 0
    return Foreign(
        source,
        config,
        weights,
        unknown,
        table,
        classes,
        palette,
        normalisation(configured),
        BASE_SIZES[source],
        step,
        assumed,
    )


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


def configuration(meta: Mapping[str, Any]) -> Configured:
    """The keys and expressions of every dict in the training's configuration.

    mmsegmentation leaves it in `config`, from version 1 on in `cfg`, as text in Python's syntax, which is parsed and
    never run.
    """
    nodes: list[ast.AST] = []
    for text in (meta.get("config"), meta.get("cfg")):
        with suppress(SyntaxError, ValueError, RecursionError, MemoryError):  # the last two of nesting without end
            nodes += ast.walk(ast.parse(text)) if isinstance(text, str) else ()
    return [entries for node in nodes if (entries := dict(_entries(node)))]


def resize_rule(source: str, configured: Configured) -> tuple[bool, str]:
    """Whether the network aligns corners, and a sentence where that is only the publishers' usual rule."""
    found = [_literal(head.get("align_corners")) for head in _under("decode_head", configured)]
    said = {value for value in found if isinstance(value, bool)}
    if len(said) == 1:
        return said.pop(), ""
    usual = source == PYTORCH_ENCODING
    why = "the configuration in the file says both" if said else "the file does not say"
    exception = ", but for 769x769" if source == MMSEGMENTATION else ""
    return usual, f"align_corners={usual} is assumed, as {source} has it{exception}: {why}"


def output_stride(configured: Configured, lateral: bool) -> int:
    """The backbone's output stride, 8 where the configuration does not say.

    Raises ValueError for a backbone that strides and dilates as none here does, with which the weights would compute
    something else, and for output stride 16 with lateral connections, which are joined at another stride here.
    """
    strides = set()
    for backbone in _under("backbone", configured):
        if not str(_literal(backbone.get("type"))).startswith("ResNet"):  # of an optimizer's rates, perhaps
            continue
        found = {key: _plain(_literal(backbone[key])) if key in backbone else usual for key, usual in RESNET.items()}
        known = [stride for stride, theirs in KNOWN_RESNETS.items() if theirs == found]
        if not known:
            first, second = (_spelt(theirs) for theirs in KNOWN_RESNETS.values())
            raise ValueError(
                f"a backbone with {_spelt(found)}, as its configuration says; networks here have {first}, or {second}"
            )
        strides.update(known)
    if len(strides) > 1:
        raise ValueError("its configuration has backbones of several output strides")
    stride = strides.pop() if strides else 8
    if stride == 16 and lateral:
        raise ValueError(
            "lateral connections at output stride 16, as its configuration says, which are joined at stride 16 there "
            "and at stride 8 here; its weights would compute something else"
        )
    return stride


def _spelt(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in settings.items())


def normalisation(configured: Configured) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and deviation of RGB in 0..1 that the configuration gives for levels of 0 to 255; None where it gives none.

    Raises ValueError where it gives several, and for a network that reads BGR.
    """
    found: set[tuple[tuple[float, ...], tuple[float, ...]]] = set()
    for entries in configured:
        mean, std = (_plain(_literal(entries.get(key))) for key in ("mean", "std"))
        if not (_are_three_numbers(mean) and _are_three_numbers(std) and min(std) > 0):
            continue
        if any(_literal(entries.get(key)) is False for key in ("to_rgb", "bgr_to_rgb")):
            raise ValueError("it reads pictures in BGR, as its configuration says; networks here read RGB")
        found.add((_in_units(mean), _in_units(std)))
    if len(found) > 1:
        raise ValueError("its configuration normalises pictures in several ways, so that none can be chosen")
    return found.pop() if found else None


def _in_units(levels: list[float]) -> tuple[float, ...]:
    return tuple(float(f"{level / 255:.9g}") for level in levels)


def _are_three_numbers(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(type(n) in (int, float) and abs(n) <= 1e6 for n in value)


def _under(key: str, configured: Configured) -> list[dict[str | None, ast.expr]]:
    """The entries of each dict that stands under this key."""
    return [dict(_entries(entries[key])) for entries in configured if key in entries]


def _literal(node: ast.expr | None) -> Any:
    """The value of a literal; None for any other expression."""
    try:
        return None if node is None else ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return None


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
        classes = unnamed(num_classes)
    if not isinstance(palette, list) or not is_palette(palette, num_classes):
        palette = distinct_palette(num_classes)
    return [str(name) for name in classes], [[int(value) for value in colour] for colour in palette]


def unnamed(num_classes: int) -> list[str]:
    """What classes are called whose names are not known."""
    return [f"class {index}" for index in range(num_classes)]


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
