"""Who knows best what is in a picture: the presence head, the mask, or both?

    python -m benchmarks.presence_sources CHECKPOINT --data DIR

Three scores of each class, on whole pictures at scale 1: that of the presence head, the probability of the pixel that
is surest of the class (an FCN's presence), and the sigmoid of the mean of both in log-odds. The head's is calibrated
where `python -m model.calibrate` has put a calibration into the checkpoint. Mean average precision says how well a
score tells pictures with a class from those without, the expected calibration error how far its number can be believed.
"""

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from benchmarks.command import add_checkpoint, add_output, commit, hardware, option_parser, write_json
from model.calibrate import comparison_table, figures
from model.checkpoint import Checkpoint, CheckpointError, build_model, load_checkpoint
from model.data import SPLITS, DataError, SegmentationData, open_dataset
from model.encnet import EncNet, surest_pixel
from model.evaluation import EvaluationError, check_classes
from model.losses import presence_targets
from model.predict import normalise, presence_scores, view_of


def sources(head: Tensor, surest: Tensor) -> dict[str, Tensor]:
    """Scores (P, C) by their source, from the head's and from the surest pixels' log-odds (P, C)."""
    return {
        "presence head": head.sigmoid(),
        "surest pixel": surest.sigmoid(),
        "both": ((head + surest) / 2).sigmoid(),
    }


def study(checkpoint: Checkpoint, model: EncNet, data: SegmentationData) -> dict[str, dict[str, float]]:
    """The figures of every source over a split. Raises DataError for a broken file."""
    classes = checkpoint.config.num_classes
    head, surest = torch.zeros(2, len(data), classes, dtype=torch.float64)
    present = torch.zeros(len(data), classes, dtype=torch.bool)
    for index in track(range(len(data)), description=data.split):
        image, truth = data.load(index)
        pixels = normalise(torch.from_numpy(image)[None], checkpoint.mean, checkpoint.std)
        with torch.inference_mode():
            outputs = model(view_of(pixels, checkpoint.base_size, 1.0))
        head[index] = presence_scores(outputs.presence_logits, checkpoint.calibration)[0].double().logit(1e-12)
        surest[index] = surest_pixel(outputs.logits)[0]
        present[index] = presence_targets(torch.from_numpy(truth)[None], classes)[0] > 0
    return {name: figures(scores.numpy(), present.numpy()) for name, scores in sources(head, surest).items()}


def main() -> None:
    parser = option_parser("presence_sources", __doc__)
    add_checkpoint(parser)
    parser.add_argument("--split", choices=SPLITS, default="test", help="default: %(default)s")
    add_output(parser, "presence-sources.json")
    options = parser.parse_args()
    try:
        checkpoint = load_checkpoint(options.checkpoint)
        data = open_dataset(options.data, options.split)
        check_classes(checkpoint, data)
        found = study(checkpoint, build_model(checkpoint), data)
    except (CheckpointError, DataError, EvaluationError) as error:
        parser.error(str(error))
    result = {
        "command": "python -m benchmarks.presence_sources CHECKPOINT --data DIR",
        "commit": commit(),
        "checkpoint_sha256": checkpoint.sha256,
        "calibration": checkpoint.calibration.method if checkpoint.calibration else None,
        "data": options.data.resolve().name,
        "split": options.split,
        "hardware": hardware(),
        "torch": torch.__version__,
        "sources": found,
    }
    write_json(options.output, result)
    Console().print(comparison_table(found, f"{result['data']}, {options.split}: {len(data)} pictures"))


if __name__ == "__main__":
    main()
