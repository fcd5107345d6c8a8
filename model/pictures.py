"""Where a split's decoded pictures stay while they are trained on, the order they come in, and batches of crops."""

import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
from numpy.random import SeedSequence, default_rng
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from model.augment import Augmentation, Draw, Draws, bytes_of, crops, draw_for, pack, stack
from model.data import SegmentationData, read
from model.layouts.split import read_image

DEVICE_SHARE, HOST_SHARE = 1 / 4, 1 / 3  # of the memory that decoded pictures may take where cache=auto decides
SAMPLED_PICTURES = 16
CONTAINER_LIMITS = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")

Key = tuple[int, int]  # epoch and index


@dataclass(frozen=True)
class InMemory(SegmentationData):
    """A split that has been read: `load` reads no file."""

    samples: list[tuple[numpy.ndarray, numpy.ndarray]] = field(default_factory=list)

    def load(self, index: int) -> tuple[numpy.ndarray, numpy.ndarray]:
        return self.samples[index]


def in_memory(data: SegmentationData) -> InMemory:
    """The split with every picture read. Raises DataError as `load` does."""
    return InMemory(**vars(data), samples=list(read(data, len(data))))


def decoded_bytes(data: SegmentationData) -> int:
    """What all pictures take decoded, four bytes a pixel, judged by a few of them."""
    indexes = sorted(set(numpy.linspace(0, len(data) - 1, SAMPLED_PICTURES).round().astype(int).tolist()))
    return round(4 * sum(data.load(index)[1].size for index in indexes) / len(indexes) * len(data))


def choose_cache(data: SegmentationData, device: torch.device) -> str:
    """What cache=auto means here: the first of device, host and off that has room; the host reads for both."""
    wanted = decoded_bytes(data)
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if wanted > HOST_SHARE * host_memory() / processes:
        return "off"
    return "device" if device.type == "cuda" and wanted <= DEVICE_SHARE * torch.cuda.mem_get_info(device)[0] else "host"


def host_memory() -> int:
    """Bytes of memory that this machine has, or this container may use."""
    amounts = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for limit in CONTAINER_LIMITS:
        with suppress(OSError, ValueError):  # there is none, or it says "max"
            amounts.append(int(limit.read_text()))
    return min(amounts)


def read_packed(data: SegmentationData, device: torch.device) -> tuple[Tensor, list[tuple[int, int]]]:
    """Every picture packed, end to end on the device, and their sizes. Raises DataError as `load` does.

    There is one copy of the whole, and of pictures only those that are being read.
    """
    pixels = sum(prod(read_image(picture, "picture", pixels=False).size) for picture, _ in data.pairs)
    packed, sizes, start = torch.empty(pixels, dtype=torch.int32, device=device), [], 0
    for image, mask in read(data, len(data)):
        packed[start : start + mask.size] = pack(image, mask)
        sizes.append(mask.shape)
        start += mask.size
    return packed, sizes


class Sample(NamedTuple):
    """A picture as `pack` gives it, its size (height, width) and what was drawn for its crop."""

    packed: Tensor
    size: tuple[int, int]
    draw: Draw


class Material(NamedTuple):
    """All that a batch of crops is made of; see `crops`."""

    packed: Tensor
    places: Tensor
    draws: Draws


def places_of(sizes: Sequence[tuple[int, int]]) -> Tensor:
    """(P, 3) int64: start, height and width of pictures that lie end to end."""
    starts = accumulate((height * width for height, width in sizes[:-1]), initial=0)
    return torch.tensor([(start, *size) for start, size in zip(starts, sizes, strict=True)])


def collate(samples: Sequence[Sample]) -> Material:
    """What a batch of crops is made of, from what each of them is."""
    places = places_of([sample.size for sample in samples])
    return Material(torch.cat([sample.packed for sample in samples]), places, stack([s.draw for s in samples]))


class StepSampler(Sampler):
    """Batches of (epoch, index) keys from `first_step` to the last; each process takes its share of every batch.

    Every epoch is a fresh seeded permutation; an epoch's incomplete last batch is dropped. A batch that is worked off
    in `parts` is divided first into these and then among the processes, so that part for part all processes together
    have the crops that one process would have.
    """

    def __init__(
        self,
        size: int,
        batch: int,
        epochs: int,
        seed: int,
        first_step: int = 0,
        rank: int = 0,
        processes: int = 1,
        parts: int = 1,
    ) -> None:
        self.size, self.batch, self.epochs, self.seed = size, batch, epochs, seed
        self.first_step, self.rank, self.processes, self.parts = first_step, rank, processes, parts
        self.steps_per_epoch = size // batch

    def __len__(self) -> int:
        return self.steps_per_epoch * self.epochs - self.first_step

    def __iter__(self) -> Iterator[list[Key]]:
        first_epoch, skip = divmod(self.first_step, self.steps_per_epoch)
        for epoch in range(first_epoch, self.epochs):
            order = default_rng(SeedSequence([self.seed, epoch])).permutation(self.size)
            for step in range(skip, self.steps_per_epoch):
                batch = order[step * self.batch : (step + 1) * self.batch]
                mine = batch.reshape(self.parts, self.processes, -1)[:, self.rank].ravel()
                yield [(epoch, int(index)) for index in mine]
            skip = 0


class TrainingCrops(Dataset):
    """Crops by (epoch, index), made on `device`: the same key gives the same crop in any run, process and order.

    fill: red, green and blue of what lies outside a picture, 0..255.
    cache: "device" keeps all decoded pictures there, "host" keeps them in the host's memory and sends each batch's,
    "off" has worker processes read each batch's files again; "auto" takes the first of these that has room. Crops are
    the same with each. On a CPU "device" and "host" are one.
    """

    def __init__(
        self,
        data: SegmentationData,
        options: Augmentation,
        seed: int,
        fill: Sequence[int],
        device: torch.device | str = "cpu",
        cache: str = "auto",
        workers: int = 0,
    ) -> None:
        self.data, self.options, self.seed, self.workers = data, options, seed, workers
        self.device = torch.device(device)
        self.fill = torch.tensor(fill, dtype=torch.uint8)  # on the host, as workers are given all that is here
        self.cache = choose_cache(data, self.device) if cache == "auto" else cache
        self.packed: Tensor | None = None
        if self.cache != "off":
            where = self.device if self.cache == "device" else torch.device("cpu")
            self.packed, self.sizes = read_packed(data, where)
            self.places = places_of(self.sizes)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: Key) -> Sample:
        index = key[1]
        if self.packed is None:
            image, mask = self.data.load(index)
            packed, size = pack(image, mask), mask.shape
        else:
            start, size = int(self.places[index, 0]), self.sizes[index]
            packed = self.packed[start : start + size[0] * size[1]]
        return Sample(packed, size, draw_for(key, size, self.options, self.seed))

    def label_counts(self, classes: int) -> Tensor:
        """(C,) int64: pixels of each class in all pictures."""
        packed = [self.packed] if self.packed is not None else (pack(*self.data.load(i)) for i in range(len(self)))
        return torch.stack([bytes_of(p)[:, 3].flatten().bincount(minlength=256).cpu() for p in packed]).sum(0)[:classes]

    def batches(self, keys: Iterable[list[Key]]) -> Iterator[tuple[Tensor, Tensor]]:
        """uint8 (B, 3, crop, crop) and (B, crop, crop) on the device, for every list of keys.

        On a GPU nothing here waits for it: while it works, the host prepares the next batch.
        """
        fill = send(self.fill, self.device)
        for material in self._material(keys):
            packed, places = send(material.packed, self.device), send(material.places, self.device)
            draws = Draws(*(send(part, self.device) for part in material.draws))
            # On a CPU crop by crop, which then fit its cache: half as long again otherwise.
            share = 1 if self.device.type == "cpu" else len(places)
            parts = zip(places.split(share), *(part.split(share) for part in draws), strict=True)
            cut = [crops(packed, place, Draws(*rest), self.options.crop, fill) for place, *rest in parts]
            images, masks = zip(*cut, strict=True)
            yield torch.cat(images), torch.cat(masks)

    def _material(self, keys: Iterable[list[Key]]) -> Iterator[Material]:
        if self.packed is not None and (self.cache == "device" or self.device.type == "cpu"):
            for batch in keys:
                draws = [draw_for(key, self.sizes[key[1]], self.options, self.seed) for key in batch]
                yield Material(self.packed, self.places[[index for _, index in batch]], stack(draws))
            return
        workers = self.workers if self.packed is None else 0
        yield from DataLoader(
            self,
            batch_sampler=keys,  # type: ignore[arg-type]
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            pin_memory=self.device.type == "cuda",
            collate_fn=collate,
            worker_init_fn=leave_signals,
            generator=torch.Generator(),  # its own: the global one decides dropout and must not depend on restarts
        )


def leave_signals(_: int) -> None:
    """In a worker: Ctrl-C is for the process that trains, which goes on until it has saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device, without waiting for the copy."""
    if device.type == "cpu" or tensor.device == device:
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
