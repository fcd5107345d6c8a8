"""Batches of crops: the same wherever the decoded pictures stay, from wherever a run goes on, however it is shared."""

import dataclasses
import json
import threading
import weakref

import numpy
import pytest
import torch
from PIL import Image

from model import pictures
from model.augment import Augmentation
from model.data import AHEAD, SegmentationData, open_dataset, read
from model.pictures import StepSampler, TrainingCrops, choose_cache, decoded_bytes, in_memory

SIZES = [(40, 60), (61, 37), (40, 60), (50, 50), (40, 60)]
OPTIONS = Augmentation(24, 48, gamma=0.2)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Five pictures of three sizes."""
    root = tmp_path_factory.mktemp("sizes")
    random = numpy.random.default_rng(0)
    for folder in ("images", "labels", "splits"):
        (root / folder).mkdir()
    for index, size in enumerate(SIZES):
        Image.fromarray(random.integers(0, 256, (*size, 3), dtype=numpy.uint8)).save(root / f"images/p{index}.png")
        Image.fromarray(random.integers(0, 3, size, dtype=numpy.uint8)).save(root / f"labels/p{index}.png")
    (root / "splits" / "train.txt").write_text("\n".join(f"p{index}" for index in range(len(SIZES))))
    classes = [{"id": i, "name": f"class {i}", "color": [i, i, i]} for i in range(4)]
    (root / "classes.json").write_text(json.dumps({"classes": classes}))
    return open_dataset(root, "train")


def batches(data, cache, workers=0, first_step=0):
    crops = TrainingCrops(data, OPTIONS, 7, (1, 2, 3), "cpu", cache, workers)
    return list(crops.batches(StepSampler(len(data), 2, 3, 7, first_step)))


def same(first, second):
    assert len(first) == len(second)
    return all(torch.equal(a, b) for pair in zip(first, second, strict=True) for a, b in zip(*pair, strict=True))


@pytest.mark.parametrize(("cache", "workers"), [("host", 0), ("off", 0), ("off", 1), ("auto", 1)])
def test_crops_are_the_same_wherever_the_pictures_stay(data, cache, workers):
    expected = batches(data, "device")
    assert len(expected) == 6 and expected[0][0].shape == (2, 3, 24, 24) and expected[0][1].shape == (2, 24, 24)
    assert same(expected, batches(data, cache, workers))


@pytest.mark.parametrize("cache", ["device", "off"])
def test_batches_go_on_in_the_middle(data, cache):
    assert same(batches(data, "device")[3:], batches(data, cache, first_step=3))


def test_a_batch_sent_from_the_host_is_cut_like_one_on_the_device(data, monkeypatch):
    """What a GPU gets from cache=host: only the batch's pictures, collated."""
    crops = TrainingCrops(data, OPTIONS, 7, (1, 2, 3), "cpu", "host")
    keys = [(0, 3), (0, 1)]
    sent = pictures.collate([crops[key] for key in keys])
    assert len(sent.packed) == 50 * 50 + 61 * 37
    cut = pictures.crops(sent.packed, sent.places, sent.draws, 24, crops.fill)
    (expected,) = crops.batches([keys])
    assert all(torch.equal(*pair) for pair in zip(cut, expected, strict=True))


def test_workers_are_given_nothing_of_the_device(data):
    """Where processes are not forked, as from Python 3.14 on, each worker would begin by using the GPU."""
    held = vars(TrainingCrops(data, OPTIONS, 7, (1, 2, 3), "meta", "off"))
    assert not [name for name, value in held.items() if isinstance(value, torch.Tensor) and value.is_meta]


@pytest.mark.parametrize("cache", ["device", "off"])
def test_labels_are_counted(data, cache):
    labels = numpy.concatenate([data.load(index)[1].ravel() for index in range(len(data))])
    counts = TrainingCrops(data, OPTIONS, 7, (1, 2, 3), "cpu", cache).label_counts(4)
    assert counts.tolist() == numpy.bincount(labels, minlength=4).tolist()
    assert counts[3] == 0


def test_the_cache_is_on_the_host_where_there_is_room_and_off_where_not(data, monkeypatch, tmp_path):
    cpu = torch.device("cpu")
    assert decoded_bytes(data) == 4 * sum(height * width for height, width in SIZES)
    assert choose_cache(data, cpu) == "host"
    monkeypatch.setattr(pictures, "decoded_bytes", lambda data: 1 << 60)
    assert choose_cache(data, cpu) == "off"
    monkeypatch.undo()
    (tmp_path / "memory.max").write_text("30000\n")
    (tmp_path / "unlimited").write_text("max\n")
    limits = tmp_path / "absent", tmp_path / "unlimited", tmp_path / "memory.max"
    monkeypatch.setattr(pictures, "CONTAINER_LIMITS", limits)
    assert choose_cache(data, cpu) == "off", "a container's limit counts, not what its host has"


def test_reading_a_split_holds_it_once(data, monkeypatch):
    loaded, alive = SegmentationData.load, []

    def load(self, index):
        image, mask = loaded(self, index)
        image = image.view(Watched)
        alive.append(weakref.ref(image))
        most.append(sum(reference() is not None for reference in alive))
        return image, mask

    class Watched(numpy.ndarray):
        pass

    most = []
    many = dataclasses.replace(data, ids=data.ids * 20, pairs=data.pairs * 20)
    monkeypatch.setattr(SegmentationData, "load", load)
    assert len(TrainingCrops(many, OPTIONS, 7, (1, 2, 3)).packed) == 20 * sum(h * w for h, w in SIZES)
    assert len(most) > 100 and max(most) <= AHEAD + 2


def test_pictures_are_read_ahead_by_other_threads_and_come_in_order(data, monkeypatch):
    both, loaded = threading.Barrier(2, timeout=60), SegmentationData.load

    def load(self, index):
        both.wait()
        return loaded(self, index)

    monkeypatch.setattr(SegmentationData, "load", load)
    monkeypatch.setattr("model.data.READERS", 2)
    assert [mask.shape for _, mask in read(data, 4)] == SIZES[:4]


def test_a_split_in_memory_reads_no_file(data, monkeypatch):
    kept = in_memory(data)
    expected = [data.load(index) for index in range(len(data))]
    monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("read a file"))
    assert len(kept) == len(data) and kept.ids == data.ids
    for index, pair in enumerate(expected):
        assert all((a == b).all() for a, b in zip(pair, kept.load(index), strict=True))


def test_a_sampler_resumes_in_the_middle_of_an_epoch():
    whole = list(StepSampler(10, 4, 3, seed=0))
    assert len(whole) == 6 and list(StepSampler(10, 4, 3, seed=0, first_step=3)) == whole[3:]
    assert {epoch for epoch, _ in whole[2] + whole[3]} == {1}
    assert whole[0] != [(0, index) for _, index in whole[2]], "every epoch has its own order"


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_share_every_batch(processes):
    shares = [list(StepSampler(10, 4, 2, seed=0, rank=rank, processes=processes)) for rank in range(processes)]
    joined = [[key for batch in batches for key in batch] for batches in zip(*shares, strict=True)]
    assert joined == list(StepSampler(10, 4, 2, seed=0))


def test_processes_share_every_part_of_a_batch():
    one = next(iter(StepSampler(20, 8, 1, seed=0, parts=2)))
    ranks = [next(iter(StepSampler(20, 8, 1, seed=0, rank=rank, processes=2, parts=2))) for rank in (0, 1)]
    for part in (slice(0, 2), slice(2, 4)):
        together = slice(2 * part.start, 2 * part.stop)
        assert [key for rank in ranks for key in rank[part]] == one[together]
