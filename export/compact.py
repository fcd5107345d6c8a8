"""Weights stored in float16 and used in float32: half the file at the full precision of the arithmetic."""

import numpy
import onnx
from onnx import TensorProto, numpy_helper

SMALLEST = 1024


def store_weights_in_half(graph: onnx.GraphProto) -> None:
    """Rewrite a float32 graph in place: the weights of convolutions and linear layers become float16 with a Cast.

    ONNX Runtime folds the casts when it loads the file, so that it computes as with float32 weights. Tensors of fewer
    than SMALLEST numbers, or with one that float16 cannot hold, stay as they are.
    """
    read_by_layers = {name for node in graph.node if node.op_type in ("Conv", "Gemm", "MatMul") for name in node.input}
    casts = []
    for position, tensor in enumerate(graph.initializer):
        weights = numpy_helper.to_array(tensor)
        if tensor.name not in read_by_layers or weights.dtype != numpy.float32 or weights.size < SMALLEST:
            continue
        if numpy.abs(weights).max() > numpy.finfo(numpy.float16).max:
            continue
        stored = numpy_helper.from_array(weights.astype(numpy.float16), f"{tensor.name}/half")
        casts.append(onnx.helper.make_node("Cast", [stored.name], [tensor.name], to=TensorProto.FLOAT))
        graph.initializer[position].CopyFrom(stored)
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
