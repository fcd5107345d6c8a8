"""Output stride 8 or 16 with the same weights: what the finer stride costs and what it gives.

    python -m benchmarks.stride CHECKPOINT --data DIR

Both networks are exported and timed in turns in one run (ONNX Runtime, CPU, one 480x360 picture, one view), so that the
ratio of their times means something on a shared machine; both are evaluated on the same split. A network trained at one
stride runs at the other, because dilation keeps the receptive fields (Chen et al., DeepLab, section 3.1).
"""

import dataclasses
import json
import statistics
import time
from typing import Any

import numpy
import onnxruntime
import torch
from rich.progress import Progress, track

from benchmarks.command import add_checkpoint, add_output, commit, hardware, option_parser, write_json
from export.core import core_model
from export.whole import whole_model
from model.arguments import at_least_one
from model.checkpoint import Checkpoint, CheckpointError, build_model, load_checkpoint
from model.data import SPLITS, DataError, SegmentationData, open_dataset
from model.evaluation import EvaluationError, Options, check_classes, evaluate
from model.metrics import mean_iou, pixel_accuracy

PICTURE = (360, 480)


def session_at(checkpoint: Checkpoint, stride: int) -> onnxruntime.InferenceSession:
    network = build_model(at_stride(checkpoint, stride))
    model = whole_model(
        core_model(network),
        mean=checkpoint.mean,
        std=checkpoint.std,
        base_size=checkpoint.base_size,
        align_corners=checkpoint.config.align_corners,
    )
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def at_stride(checkpoint: Checkpoint, stride: int) -> Checkpoint:
    return dataclasses.replace(checkpoint, config=dataclasses.replace(checkpoint.config, output_stride=stride))


def milliseconds(sessions: dict[int, onnxruntime.InferenceSession], rounds: int) -> dict[int, list[float]]:
    """Time of one picture, in turns over the sessions."""
    image = numpy.random.default_rng(0).integers(0, 256, (1, *PICTURE, 3), dtype=numpy.uint8)
    feeds = {"image": image, "scales": numpy.ones(1, numpy.float32), "flip": numpy.array(False)}
    times: dict[int, list[float]] = {stride: [] for stride in sessions}
    for turn in track(range(-2, rounds), description="timing"):
        for stride, session in sessions.items():
            start = time.perf_counter()
            session.run(["mask", "presence"], feeds)
            if turn >= 0:
                times[stride].append(1000 * (time.perf_counter() - start))
    return times


def accuracy(checkpoint: Checkpoint, stride: int, data: SegmentationData) -> dict[str, float]:
    options = Options(split=data.split, base_size=checkpoint.base_size)
    model = build_model(at_stride(checkpoint, stride))
    with Progress() as progress:
        bar = progress.add_task(f"evaluating at stride {stride}", total=len(data))
        result = evaluate(checkpoint, model, data, options, torch.device("cpu"), lambda: progress.advance(bar))
    return {
        "mIoU": round(100 * mean_iou(result.counts), 2),
        "pixel_accuracy": round(100 * pixel_accuracy(result.counts), 2),
    }


def main() -> None:
    parser = option_parser("stride", __doc__)
    add_checkpoint(parser)
    parser.add_argument("--split", choices=SPLITS, default="test", help="default: %(default)s")
    parser.add_argument(
        "--rounds", type=at_least_one, default=20, metavar="N", help="timings of each network (default: %(default)s)"
    )
    add_output(parser, "stride.json")
    options = parser.parse_args()
    try:
        checkpoint = load_checkpoint(options.checkpoint)
        data = open_dataset(options.data, options.split)
        check_classes(checkpoint, data)
        times = milliseconds({stride: session_at(checkpoint, stride) for stride in (8, 16)}, options.rounds)
        figures = {stride: accuracy(checkpoint, stride, data) for stride in times}
    except (CheckpointError, DataError, EvaluationError) as error:
        parser.error(str(error))
    medians = {stride: statistics.median(values) for stride, values in times.items()}
    result: dict[str, Any] = {
        "command": f"python -m benchmarks.stride CHECKPOINT --data DIR --split {options.split}",
        "commit": commit(),
        "checkpoint_sha256": checkpoint.sha256,
        "trained_at_stride": checkpoint.config.output_stride,
        "hardware": hardware(),
        "onnxruntime": onnxruntime.__version__,
        "strides": {
            str(stride): {"median_ms": round(median, 1), **figures[stride]} for stride, median in medians.items()
        },
        "time_ratio_8_over_16": round(medians[8] / medians[16], 2),
    }
    write_json(options.output, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
