"""Does presence help the mask? Classes that are said to be absent lose their pixels, and mIoU is compared.

    python -m benchmarks.presence_suppression CHECKPOINT --data DIR

Three rules, on whole pictures at scale 1: `remove T` takes the classes with presence below T out of the choice of each
pixel (where all are below, none); `weight G` multiplies probabilities by presence to the power G; `oracle` takes out
the classes that the truth does not have, which is what a presence without errors would give. T or G is chosen on the
validation split, and the figure that counts is the test split's. Presence is taken as trained and, where
`python -m model.calibrate` has put a calibration into the checkpoint, calibrated too.
"""

from typing import Any

import numpy
import torch
from rich.progress import track
from torch import Tensor

from benchmarks.command import add_checkpoint, add_output, commit, hardware, option_parser, write_json
from model.checkpoint import Checkpoint, CheckpointError, build_model, load_checkpoint
from model.data import DataError, SegmentationData, open_dataset
from model.encnet import EncNet
from model.evaluation import EvaluationError, check_classes
from model.losses import presence_targets
from model.metrics import confusion, mean_iou, pixel_accuracy
from model.predict import predict

THRESHOLDS = (0.001, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
POWERS = (0.05, 0.1, 0.25, 0.5, 1.0)


def rules(probabilities: Tensor, presence: dict[str, Tensor], truth: Tensor) -> dict[str, Tensor]:
    """The labels (P,) that each rule gives to P pixels of probabilities (P, C); presence: (C,) by kind; truth: (P,)."""
    has = presence_targets(truth[None], probabilities.shape[1])[0] > 0
    labels = {"none": probabilities.argmax(1), "oracle": without(probabilities, ~has)}
    for kind, scores in presence.items():
        labels |= {f"remove {t:g}, {kind}": without(probabilities, scores < t) for t in THRESHOLDS}
        labels |= {f"weight {power:g}, {kind}": (probabilities * scores**power).argmax(1) for power in POWERS}
    return labels


def without(probabilities: Tensor, absent: Tensor) -> Tensor:
    """The likeliest class of each pixel among those that are not absent; among all, where all are absent."""
    return (probabilities - 2 * absent.float()).argmax(1)


def study(checkpoint: Checkpoint, model: EncNet, data: SegmentationData) -> dict[str, dict[str, float]]:
    """mIoU and pixel accuracy in per cent of every rule over a split."""
    classes = len(data.classes)
    counts: dict[str, numpy.ndarray] = {}
    for index in track(range(len(data)), description=data.split):
        image, labels = data.load(index)
        truth = torch.from_numpy(labels).flatten()
        pixels = torch.from_numpy(image)[None]
        views: dict[str, Any] = {"mean": checkpoint.mean, "std": checkpoint.std, "base_size": checkpoint.base_size}
        answer = predict(model, pixels, **views)
        presence = {"as trained": answer.presence[0]}
        if checkpoint.calibration:
            presence["calibrated"] = checkpoint.calibration.apply(answer.presence[0].double().logit(1e-12)).sigmoid()
        probabilities = answer.probabilities[0].flatten(1).T.contiguous()
        for rule, found in rules(probabilities, presence, truth).items():
            counts[rule] = counts.get(rule, 0) + confusion(found, truth, classes)
    return {
        rule: {"mIoU": round(100 * mean_iou(count), 3), "pixel_accuracy": round(100 * pixel_accuracy(count), 3)}
        for rule, count in counts.items()
    }


def chosen(val: dict[str, dict[str, float]], family: str) -> str:
    """The rule of a family ("remove", "weight") that does best on the validation split."""
    return max((rule for rule in val if rule.startswith(family)), key=lambda rule: val[rule]["mIoU"])


def main() -> None:
    parser = option_parser("presence_suppression", __doc__)
    add_checkpoint(parser)
    add_output(parser, "presence_suppression.json")
    options = parser.parse_args()
    try:
        checkpoint = load_checkpoint(options.checkpoint)
        splits = {split: open_dataset(options.data, split) for split in ("val", "test")}
        check_classes(checkpoint, splits["val"])
        model = build_model(checkpoint)
        found = {split: study(checkpoint, model, data) for split, data in splits.items()}
    except (CheckpointError, DataError, EvaluationError) as error:
        parser.error(str(error))
    best = {family: chosen(found["val"], family) for family in ("remove", "weight")}
    result: dict[str, Any] = {
        "command": "python -m benchmarks.presence_suppression CHECKPOINT --data DIR",
        "commit": commit(),
        "checkpoint_sha256": checkpoint.sha256,
        "calibration": checkpoint.calibration.method if checkpoint.calibration else None,
        "data": options.data.resolve().name,
        "hardware": hardware(),
        "torch": torch.__version__,
        "chosen_on_val": {
            family: {
                "rule": rule,
                **{
                    f"{split}_gain": round(rows[rule]["mIoU"] - rows["none"]["mIoU"], 3)
                    for split, rows in found.items()
                },
            }
            for family, rule in best.items()
        },
        **found,
    }
    write_json(options.output, result)
    print(f"{'mIoU %':<28}{'val':>8}{'test':>8}")
    for rule in found["val"]:
        mark = "  chosen on val" if rule in best.values() else ""
        print(f"{rule:<28}{found['val'][rule]['mIoU']:>8.2f}{found['test'][rule]['mIoU']:>8.2f}{mark}")


if __name__ == "__main__":
    main()
