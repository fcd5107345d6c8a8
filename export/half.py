"""Convolutions in float16, by rewriting the exported network: the parameters halve, the scene encoding stays float32.

Of the scene encoding only the features come in float16, as the convolution made them; in float32 they would be no more
exact, and copied once a view. The op's kernel for CPUs and its function widen each number as they read it, and give the
same bits either way. Its CUDA kernel rounds codewords and weights to float16, too, and adds up in float32.

The converters that come with ONNX Runtime store every initialiser as float16, also those that stay float32 in use, and
write one name twice where two inputs share an initialiser (ONNX Runtime 1.31); here a value's type follows from the
node that makes it.
"""

import numpy
import onnx
from onnx import TensorProto, numpy_helper

HALF = {"Conv"}
HALF_IF_FED_HALF = {"Relu", "MaxPool", "Add", "Mul", "Concat"}
ANY_TYPE = {"Shape"}
ANY_TYPE_FIRST = {"Encoding"}  # its first input only


def convolutions_to_half(graph: onnx.GraphProto) -> None:
    """Rewrite a float32 graph in place; its inputs and outputs keep their type.

    Convolutions take and make float16, what only joins or rectifies their results follows them, the Encoding takes its
    features as they come, and any other node is given float32. Raises ValueError for an output that a float16 node
    makes.
    """
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    halves: set[str] = set()
    twins: set[str] = set()
    nodes: list[onnx.NodeProto] = []

    def as_type(name: str, to: int) -> str:
        """The value of that name in type `to`: itself, or its twin in the other type, which is made once."""
        if (name in halves) == (to == TensorProto.FLOAT16):
            return name
        twin = f"{name}/{'half' if to == TensorProto.FLOAT16 else 'float'}"
        if twin not in twins:
            twins.add(twin)
            if name in initializers:
                array = numpy_helper.to_array(initializers[name]).astype(numpy.float16)
                graph.initializer.append(numpy_helper.from_array(array, twin))
            else:
                nodes.append(onnx.helper.make_node("Cast", [name], [twin], to=to))
        return twin

    for node in graph.node:
        half = node.op_type in HALF or (node.op_type in HALF_IF_FED_HALF and any(i in halves for i in node.input))
        if half:
            node.input[:] = [as_type(name, TensorProto.FLOAT16) if name else "" for name in node.input]
            halves.update(node.output)
        elif node.op_type not in ANY_TYPE:
            free = 1 if node.op_type in ANY_TYPE_FIRST else 0
            node.input[free:] = [as_type(name, TensorProto.FLOAT) for name in node.input[free:]]
        nodes.append(node)

    for value in graph.output:
        if value.name in halves:
            raise ValueError(f"the graph's output {value.name} is made by a float16 node; expected a resize to float32")
    del graph.node[:]
    graph.node.extend(nodes)
    read = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend(kept)
