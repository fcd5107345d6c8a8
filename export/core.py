"""The network alone as an ONNX graph: normalised picture in, logits and presence logits out."""

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator

import onnx
import torch
from torch import Tensor, nn

from export import encoding_op
from export.errors import ExportError
from export.half import convolutions_to_half
from model.encnet import EncNet
from model.wording import first_line

EXAMPLE_SIZE = (2, 3, 64, 96)


class Network(nn.Module):
    """What is exported of an EncNet: a plain tuple, without the heads that only training uses."""

    def __init__(self, network: EncNet) -> None:
        super().__init__()
        self.network = copy.deepcopy(network)
        self.network.aux = self.network.stage3 = None
        self.eval()

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        outputs = self.network(image)
        return outputs.logits, outputs.presence_logits


def core_model(network: EncNet, fp16: bool = False) -> onnx.ModelProto:
    """image float32 (N, 3, H, W) -> logits float32 (N, C, H, W), presence_logits float32 (N, C); N, H, W are free.

    fp16: weights and arithmetic of the convolutions in float16; inputs and outputs stay float32.
    Raises ExportError when PyTorch cannot translate the network.
    """
    dynamic = torch.export.Dim.DYNAMIC
    try:
        with quiet_exporter():
            program = torch.onnx.export(
                Network(network),
                (torch.zeros(EXAMPLE_SIZE),),
                dynamo=True,
                opset_version=encoding_op.OPSET,
                custom_translation_table=encoding_op.translations(),
                input_names=["image"],
                output_names=["logits", "presence_logits"],
                dynamic_shapes=({0: dynamic, 2: dynamic, 3: dynamic},),
                verbose=False,
            )
    except Exception as error:
        raise ExportError(f"PyTorch could not export the network: {first_line(error)}") from error
    if program is None:
        raise ExportError("PyTorch could not export the network")
    model: onnx.ModelProto = program.model_proto
    if fp16:
        convolutions_to_half(model.graph)
    declare_interface(model.graph, network.config.num_classes)
    remove_traces(model)
    encoding_op.add_function(model)
    return model


def declare_interface(graph: onnx.GraphProto, classes: int) -> None:
    """Name the free dimensions of the graph's input and outputs."""
    shapes = {
        "image": ("N", 3, "H", "W"),
        "logits": ("N", classes, "H", "W"),
        "presence_logits": ("N", classes),
    }
    for value in (*graph.input, *graph.output):
        value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, onnx.TensorProto.FLOAT, shapes[value.name]))


def remove_traces(model: onnx.ModelProto) -> None:
    """Drop what the exporter notes for its own debugging, such as the paths of the source files."""
    del model.graph.value_info[:], model.graph.metadata_props[:], model.metadata_props[:]
    model.graph.name, model.graph.doc_string = "encnet_core", ""
    for item in (*model.graph.node, *model.graph.initializer):
        del item.metadata_props[:]
        item.doc_string = ""


@contextlib.contextmanager
def quiet_exporter() -> Iterator[None]:
    """Keep the exporter's notes (no torchvision, deprecated internals) from the reader; errors are raised as ever."""
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        exporter.setLevel(level)
