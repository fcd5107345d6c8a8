"""ResNet weights that others published, as a backbone to start from.

Read are the names of timm, torchvision and PyTorch-Encoding, which are ours, and those of OpenMMLab (mmpretrain,
mmsegmentation), where a deep stem is called `stem`: as a bare state dict, wrapped as training scripts do, or inside a
whole network, whose heads are left out. Checkpoints of this project are such networks too.

What keys cannot tell is assumed: stride on the 3x3 convolution of a bottleneck, and pictures in RGB with ImageNet's
mean and standard deviation. OpenMMLab's "caffe" files have neither.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.foreign import backbone_name, inverse, refuse_pooled_shortcuts, rename, unwrap
from model.resnet import DEEP_STEM_WIDTHS, ResNet
from model.weights import CheckpointError, check_state, read_pickle
from model.wording import listing

WRAPPERS = ("state_dict", "model", "weights")
NETWORKS = ("backbone.", "pretrained.")
HEADS = (
    "fc.", "head.", "neck.", "classifier.", "aux_classifier.", "decode_head.", "auxiliary_head.", "auxlayer.", "aux.",
    "stage3.",
)  # fmt: skip
OPENMMLAB_STEM = {**{f"stem.{index}.": f"conv1.{index}." for index in (0, 1, 3, 4, 6)}, "stem.7.": "bn1."}


class BackboneWeights(NamedTuple):
    """backbone: one of `model.config.BACKBONES`; weights: state dict of that `ResNet`; left_out: heads' keys."""

    backbone: str
    weights: dict[str, Tensor]
    left_out: list[str]


def read_backbone_weights(path: Path, wanted: str) -> BackboneWeights:
    """The weights in a .pth, .pt or .safetensors file for the backbone `wanted`.

    Raises CheckpointError for a file that is missing, damaged or no ResNet's, for another backbone than the wanted one
    (saying which would be right), and for keys that are missing or left over, wrong shapes and values not finite.
    """
    document = read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)
    if not isinstance(document, Mapping):
        raise CheckpointError(f"{path}: holds a {type(document).__name__}, not a state dict")
    try:
        return translate(document, wanted)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Raises CheckpointError where the file or the safetensors package is missing, or the file is damaged."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise CheckpointError(
            f"{path}: reading .safetensors needs the safetensors package: pip install safetensors"
        ) from error
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not readable as safetensors: {error}") from error


def translate(document: Mapping[str, Any], wanted: str) -> BackboneWeights:
    """The weights in what a file held, by our names. Raises ValueError as `read_backbone_weights` does."""
    wrapper = next((key for key in WRAPPERS if isinstance(document.get(key), Mapping)), None)
    state = unwrap(document if wrapper is None else document[wrapper])
    refuse_pooled_shortcuts(state)
    network = next((prefix for prefix in NETWORKS if any(key.startswith(prefix) for key in state)), "")
    left_out = [key for key in state if key.removeprefix(network).startswith(HEADS)]
    names = {ours(key.removeprefix(network)): key for key in state if key not in left_out}
    if "layer1.0.conv1.weight" not in names:
        raise ValueError(f"not a ResNet's weights; its first keys are {listing(list(state)[:8])}")
    weights = {name: state[key] for name, key in names.items()}

    found = backbone_name({f"backbone.{name}": value for name, value in weights.items()})
    if found != wanted:
        raise ValueError(
            f"the file is {described(found)}, and backbone={wanted} is {described(wanted)}; use backbone={found}"
        )
    with torch.device("meta"):
        expected = ResNet(found).state_dict()
    theirs = inverse(OPENMMLAB_STEM) if any(key.startswith(f"{network}stem.") for key in state) else {}
    check_state(expected, weights, name=lambda key: names.get(key) or network + (rename(key, theirs) or key))
    counters = {key: torch.tensor(0) for key in expected if key.endswith("num_batches_tracked")}
    return BackboneWeights(found, {**counters, **weights}, left_out)


def ours(key: str) -> str:
    """Our name for a key of any of the formats, whose network's prefix is off."""
    return rename(key, OPENMMLAB_STEM) or key


def described(backbone: str) -> str:
    """ "resnet50s" -> "a ResNet-50 with a 64-64-128 stem"."""
    depth = "".join(filter(str.isdigit, backbone))
    widths = DEEP_STEM_WIDTHS.get(backbone.removeprefix(f"resnet{depth}"))
    return f"a ResNet-{depth} with a {'-'.join(map(str, widths)) if widths else '7x7'} stem"
