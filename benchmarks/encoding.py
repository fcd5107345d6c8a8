"""The compiled Encoding kernel on the CPU, side by side with what else computes the same.

    make kernels && python -m benchmarks.encoding

Both sides of a ratio are timed in turns in one process, so that it means something on a shared machine; times are
medians over the rounds. Compared are the broadcast form that most published code uses (it materialises B·N·K·D
numbers), the matmul twin in PyTorch, and the op's body in ONNX Runtime's standard operators. Memory is that of one call
beyond its arguments and results.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper
from torch import Tensor

from benchmarks.command import add_output, commit, hardware, option_parser, write_json
from benchmarks.memory import extra_kilobytes
from export import encoding_op
from model import kernels
from model.arguments import at_least_one
from model.encoding import backend, encode, encode_backward, encode_backward_reference, encode_reference
from service import kernels as service_kernels

CHANNELS, CODEWORDS = 512, 32
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

Row = dict[str, Any]


def arguments(positions: int, layout: str = "contiguous") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (1, 512, N, 1), codewords (32, 512), scale (32,) and the gradient (1, 32, 512), as at first."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(1, CHANNELS, positions, 1, generator=random).relu()
    bound = (CODEWORDS * CHANNELS) ** -0.5
    codewords = bound * (2 * torch.rand(CODEWORDS, CHANNELS, generator=random) - 1)
    scale = -torch.rand(CODEWORDS, generator=random)
    grad = torch.randn(1, CODEWORDS, CHANNELS, generator=random)
    return x.contiguous(memory_format=LAYOUTS[layout]), codewords, scale, grad


def broadcast_form(x: Tensor, codewords: Tensor, scale: Tensor) -> Tensor:
    """Equation 1 as it is written, every residual in memory."""
    residuals = x.flatten(2).transpose(1, 2).unsqueeze(2) - codewords
    weights = torch.softmax(scale * residuals.square().sum(-1), dim=-1)
    return (weights.unsqueeze(-1) * residuals).sum(1)


def in_turns(ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> Row:
    """Milliseconds of both, medians and best, and the ratio of the medians."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(-1, rounds):
        for call, taken in zip((ours, theirs), times, strict=True):
            start = time.perf_counter()
            call()
            if turn >= 0:
                taken.append(1000 * (time.perf_counter() - start))
    medians = [statistics.median(taken) for taken in times]
    return {
        "ours_ms": round(medians[0], 3),
        "theirs_ms": round(medians[1], 3),
        "ours_best_ms": round(min(times[0]), 3),
        "theirs_best_ms": round(min(times[1]), 3),
        "ratio": round(medians[1] / medians[0], 2),
    }


def with_backward(forward: Callable[..., Tensor], backward: Callable[..., object], inputs: tuple[Tensor, ...]) -> None:
    x, codewords, scale, grad = inputs
    forward(x, codewords, scale)
    backward(grad, x, codewords, scale, 0.0)


def against_the_broadcast_form(positions: int, rounds: int) -> Row:
    """Forward and backward, the broadcast form's by autograd."""
    x, codewords, scale, grad = inputs = arguments(positions)
    leaves = [tensor.clone().requires_grad_() for tensor in (x, codewords, scale)]
    return {
        "against": "broadcast form",
        "pass": "forward + backward",
        "positions": positions,
        "threads": 1,
        "instructions": kernels.instructions(),
        **in_turns(
            lambda: with_backward(encode, encode_backward, inputs),
            lambda: torch.autograd.grad(broadcast_form(*leaves), leaves, grad),
            rounds,
        ),
    }


def against_the_twin(positions: int, layout: str, rounds: int) -> list[Row]:
    """Forward, and forward with backward, the twin's in closed form: nothing is kept between the two."""
    inputs = arguments(positions, layout)
    passes = {
        "forward": (lambda: encode(*inputs[:3]), lambda: encode_reference(*inputs[:3])),
        "forward + backward": (
            lambda: with_backward(encode, encode_backward, inputs),
            lambda: with_backward(encode_reference, encode_backward_reference, inputs),
        ),
    }
    return [
        {
            "against": "matmul twin",
            "pass": name,
            "positions": positions,
            "layout": layout,
            "threads": 1,
            "instructions": kernels.instructions(),
            **in_turns(ours, theirs, rounds),
        }
        for name, (ours, theirs) in passes.items()
    ]


def tail_nodes() -> list[onnx.NodeProto]:
    """What follows the Encoding layer in evaluation: BatchNorm over codes, ReLU, mean over codes."""
    ones = helper.make_tensor("ones", TensorProto.FLOAT, [CODEWORDS], [1.0] * CODEWORDS)
    zeros = helper.make_tensor("zeros", TensorProto.FLOAT, [CODEWORDS], [0.0] * CODEWORDS)
    return [
        helper.make_node("Constant", [], ["ones"], value=ones),
        helper.make_node("Constant", [], ["zeros"], value=zeros),
        helper.make_node("BatchNormalization", ["encoded", "ones", "zeros", "zeros", "ones"], ["normed"]),
        helper.make_node("Relu", ["normed"], ["rectified"]),
        helper.make_node("Constant", [], ["codes"], value_ints=[1]),
        helper.make_node("ReduceMean", ["rectified", "codes"], ["scene"], keepdims=0),
    ]


def session(threads: int, with_kernel: bool, with_tail: bool = False) -> onnxruntime.InferenceSession:
    """One node encnet::Encoding, run by the kernel or by the function in the file, with or without what follows it."""
    float32 = TensorProto.FLOAT
    output = helper.make_tensor_value_info("encoded", float32, ["B", "K", "D"])
    if with_tail:
        output = helper.make_tensor_value_info("scene", float32, ["B", "D"])
    graph = helper.make_graph(
        [
            helper.make_node("Encoding", ["x", "codewords", "scale"], ["encoded"], domain=encoding_op.DOMAIN),
            *(tail_nodes() if with_tail else []),
        ],
        "encoding",
        [
            helper.make_tensor_value_info("x", float32, ["B", "D", "H", "W"]),
            helper.make_tensor_value_info("codewords", float32, ["K", "D"]),
            helper.make_tensor_value_info("scale", float32, ["K"]),
        ],
        [output],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", encoding_op.OPSET)], ir_version=9)
    encoding_op.add_function(model)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")  # else one's threads slow the other's turn
    if with_kernel and not service_kernels.register(options):
        raise SystemExit("ONNX Runtime's library is missing: make kernels")
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def against_the_function_body(positions: int, threads: int, rounds: int) -> Row:
    x, codewords, scale, _ = arguments(positions)
    feeds = {"x": x.numpy(), "codewords": codewords.numpy(), "scale": scale.numpy()}
    ours, theirs = session(threads, True), session(threads, False)
    return {
        "against": "function body in ONNX Runtime",
        "pass": "forward",
        "positions": positions,
        "threads": threads,
        **in_turns(lambda: ours.run(None, feeds), lambda: theirs.run(None, feeds), rounds),
    }


def with_the_tail(positions: int, rounds: int) -> Row:
    """The op and the tail after it, where the ratio bounds what a kernel that fuses both could gain."""
    x, codewords, scale, _ = arguments(positions)
    feeds = {"x": x.numpy(), "codewords": codewords.numpy(), "scale": scale.numpy()}
    alone, followed = session(1, True), session(1, True, with_tail=True)
    return {
        "against": "op and evaluation tail",
        "pass": "forward",
        "positions": positions,
        "threads": 1,
        **in_turns(lambda: alone.run(None, feeds), lambda: followed.run(None, feeds), rounds),
    }


def extra_memory(positions: int) -> Row:
    """Kilobytes of scratch on one thread."""
    x, codewords, scale, grad = arguments(positions)
    return {
        "positions": positions,
        "forward_kb": extra_kilobytes(lambda: encode(x, codewords, scale)),
        "backward_kb": extra_kilobytes(lambda: encode_backward(grad, x, codewords, scale, 0.0)),
    }


def line(row: Row) -> str:
    where = ", ".join(str(row[key]) for key in ("instructions", "layout") if key in row)
    return (
        f"{row['against']:30} {row['pass']:19} N={row['positions']:<6} {row['threads']} thread(s) {where:24}"
        f"{row['ours_ms']:10.2f} ms {row['theirs_ms']:10.2f} ms {row['ratio']:8.2f}x"
    )


def main() -> None:
    parser = option_parser("encoding", __doc__)
    parser.add_argument(
        "--rounds",
        type=at_least_one,
        default=30,
        metavar="N",
        help="timings of each, five at most of the broadcast form (default: %(default)s)",
    )
    parser.add_argument(
        "--positions",
        type=at_least_one,
        nargs="+",
        default=[2700, 3600, 8100, 16384],
        metavar="N",
        help="numbers of positions to measure at (default: 2700 3600 8100 16384)",
    )
    add_output(parser, "encoding-cpu.json")
    options = parser.parse_args()
    if backend() == "twin":
        raise SystemExit("the kernel is missing or switched off: make kernels, ENCNET_KERNELS unset")
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    memory = extra_memory(max(options.positions))
    rows: list[Row] = []

    def add(*new: Row) -> None:
        rows.extend(new)
        for row in new:
            print(line(row), flush=True)

    usual = kernels.instructions()
    assert usual
    with torch.enable_grad():
        add(against_the_broadcast_form(min(3600, max(options.positions)), min(5, options.rounds)))
    for instructions in ("avx512", "avx2", "baseline"):
        if kernels.choose_instructions(instructions):
            for positions in options.positions:
                for layout in LAYOUTS:
                    add(*against_the_twin(positions, layout, options.rounds))
    kernels.choose_instructions(usual)
    for threads in (1, 2):
        for positions in options.positions:
            add(against_the_function_body(positions, threads, options.rounds))
    add(*(with_the_tail(positions, 3 * options.rounds) for positions in options.positions))
    print(f"memory beyond arguments and results: {memory}")

    result = {
        "command": f"python -m benchmarks.encoding --rounds {options.rounds}",
        "commit": commit(),
        "shapes": {"batch": 1, "channels": CHANNELS, "codewords": CODEWORDS, "dtype": "float32"},
        "hardware": f"{hardware()}, {torch.backends.cpu.get_cpu_capability()}",
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
        "memory": memory,
        "rows": rows,
    }
    write_json(options.output, result)


if __name__ == "__main__":
    main()
