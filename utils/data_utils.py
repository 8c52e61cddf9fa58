"""Batches of a data set (utils/datasets.py) for each step and each evaluation.

Images in memory are transformed a batch at a time on the device that trains; those in files are decoded
by worker processes.  The images of a step and all random numbers of their crops are a function of the seed
and the step (``StepSampler``): a resumed run has nothing to restore.

The caller's ``Transform`` (utils/augment.py) turns images into the model's input.  This module must not know
models, and reads no flags: functions take the values they need.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from utils import dist_errors, photos, workers
from utils.datasets import FileImages, Images, MemoryImages
from utils.hardware import to_device
from utils.images import ImageError, read_image


class Transform(Protocol):
    """Makes the model's input of images; ``augment.EvalTransform`` explains each method."""

    @property
    def img_size(self) -> int: ...

    @property
    def num_draws(self) -> int: ...

    def part(self, draws: Tensor) -> Callable[[int, int], photos.Box] | None: ...

    def finish(self, part: Tensor, draws: Tensor) -> Tensor: ...

    def batch(self, images: Tensor, draws: Tensor) -> Tensor: ...

    def image(self, image: Image.Image, draws: Tensor) -> Tensor: ...

    def complete(self, images: Tensor) -> Tensor: ...


MicroBatch = tuple[Tensor, Tensor]  # images (B, 3, S, S) float32 in [-1, 1], labels (B,) int64

#: Purposes of random numbers: the first number after the run's seed in ``derive_seed``.
ORDER, DRAWS, DROPOUT = range(3)


def derive_seed(*numbers: int) -> int:
    """Returns one seed from several numbers, such as (seed, step): close numbers give unrelated seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


class StepSampler:
    """Chooses the images of each step: a pure function of the seed and the step.

    The order is a fresh permutation per epoch, read as one endless stream, so that every batch is
    full.  Each rank takes its slice of the global batch: one rank and two see the same images.

    Args:
        num_images: in the training split.
        batch_size: images of one step on this rank.
        num_draws: random numbers that one image takes.
        seed: of the run.
        rank, world_size: this rank among all.
    """

    def __init__(
        self, num_images: int, batch_size: int, num_draws: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self.num_images = num_images
        self.batch_size = batch_size
        self.num_draws = num_draws
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self._orders: dict[int, Tensor] = {}

    def _order(self, epoch: int) -> Tensor:
        if epoch not in self._orders:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, ORDER, epoch))
            self._orders = {e: order for e, order in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = torch.randperm(self.num_images, generator=generator)
        return self._orders[epoch]

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Returns the step's images as indices (batch_size,), and their random numbers (batch_size, num_draws)."""
        total = self.batch_size * self.world_size
        mine = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, DRAWS, step))
        draws = torch.rand(total, self.num_draws, generator=generator, dtype=torch.float64)[mine]
        start = (step - 1) * total + mine.start
        return self._stream(start, start + self.batch_size), draws

    def _stream(self, start: int, stop: int) -> Tensor:
        """Returns the images at positions start..stop of the endless stream of epochs."""
        pieces = []
        while start < stop:
            epoch, offset = divmod(start, self.num_images)
            piece = self._order(epoch)[offset : offset + stop - start]
            pieces.append(piece)
            start += len(piece)
        return torch.cat(pieces)


def train_batches(
    images: Images,
    sampler: StepSampler,
    steps: Iterable[int],
    micro_batch_sizes: int | list[int],
    transform: Transform,
    device: torch.device,
    num_workers: int,
) -> Iterator[MicroBatch]:
    """Yields the training's micro-batches: for each of ``steps`` in turn, its images, so many at a time.

    Args:
        images: of the training split.
        sampler, steps: choose the images of each step.
        micro_batch_sizes: of one step in their order, or one for all.
        transform: makes the model's input of images.
        device, num_workers: where the batches are needed, and processes that decode.

    Raises:
        ImageError: an image cannot be decoded, on whichever rank.
    """
    micro_batches = (
        pair
        for indices, draws in map(sampler, steps)
        for pair in zip(indices.split(micro_batch_sizes), draws.split(micro_batch_sizes))
    )
    if isinstance(images, MemoryImages):
        return _transformed(images, micro_batches, transform, device)
    batches = _decoded(images, micro_batches, transform, device, num_workers, "more --gradient_accumulation_steps")
    return _on_all_ranks(batches)


def eval_batches(
    images: Images,
    batch_size: int,
    transform: Transform,
    device: torch.device,
    num_workers: int,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[MicroBatch]:
    """Yields this rank's share of all images, each once, in order; the last batch may be smaller.

    Raises:
        ImageError: an image cannot be decoded, on whichever rank; after the last batch of the others.
    """
    mine = torch.arange(len(images))[rank::world_size]
    batches = [(indices, torch.empty(len(indices), 0)) for indices in mine.split(batch_size) if len(indices)]
    if isinstance(images, MemoryImages):
        return _transformed(images, batches, transform, device)
    return _to_the_end(_decoded(images, batches, transform, device, num_workers, "a smaller --eval_batch_size"))


def num_eval_batches(images: Images, batch_size: int, rank: int = 0, world_size: int = 1) -> int:
    """Returns the number of batches that ``eval_batches`` yields."""
    return math.ceil(len(range(rank, len(images), world_size)) / batch_size)


#: Batches to make: indices (B,) of images and their random numbers (B, num_draws).
Choices = Iterable[tuple[Tensor, Tensor]]


def _transformed(
    images: MemoryImages, choices: Choices, transform: Transform, device: torch.device
) -> Iterator[MicroBatch]:
    """Yields batches of images in memory."""
    here = images.to(device)
    for indices, draws in choices:
        at = to_device(indices, device)
        yield transform.batch(here.images[at], draws), here.labels[at]


def _decoded(
    images: FileImages,
    choices: Choices,
    transform: Transform,
    device: torch.device,
    num_workers: int,
    smaller: str,
) -> Iterator[MicroBatch]:
    """Yields batches of images in files; ``smaller`` is what makes them smaller, for messages."""
    # Workers get no tensors, for which the run would need shared memory and a socket, too.
    items = (list(zip(indices.tolist(), draws.tolist())) for indices, draws in choices)
    loader = DataLoader(
        _DecodeTask(images, transform),
        batch_sampler=cast(Sampler, items),
        num_workers=num_workers,
        collate_fn=functools.partial(_collate, smaller=smaller),
        worker_init_fn=workers.outlive_signals,
        multiprocessing_context=workers.context(num_workers),
        generator=torch.Generator(),  # else it would draw from the global one, which is dropout's
        pin_memory=device.type == "cuda",
    )
    for batch in workers.batches_of(loader):
        x, y = (to_device(t, device) for t in batch)
        yield transform.complete(x), y


def _on_all_ranks(batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
    """Yields as many batches on each rank, or raises ImageError on all: none waits in a reduction for another."""
    ready, failed = [], None
    while True:
        try:
            ready.append(next(batches))
        except StopIteration:
            return
        except ImageError as e:
            failed = e
        dist_errors.raise_together(failed, ImageError.joined)
        yield ready.pop()  # nothing here keeps it: on a GPU it would take its memory in every step


def _to_the_end(batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
    """Yields each rank's batches, however many, and raises ImageError on all of them at the end."""
    failed = None
    try:
        yield from batches
    except ImageError as e:
        failed = e
    dist_errors.raise_together(failed, ImageError.joined)


class _DecodeTask(Dataset):
    """Decodes and transforms one image in a worker process.

    What is wrong with an image or the machine comes back as an error: raised in a worker, it would reach the user as a
    stack.
    """

    def __init__(self, images: FileImages, transform: Transform) -> None:
        self.images = images
        self.transform = transform

    def __getitem__(self, item: tuple[int, list[float]]) -> tuple[Tensor, Tensor] | Exception:
        index, draws = item
        try:
            image = self._image(self.images.paths[index], torch.tensor(draws, dtype=torch.float64))
            return image, self.images.labels[index]
        except (ImageError, MemoryError, OSError) as e:
            return e

    def _image(self, path: str, draws: Tensor) -> Tensor:
        """Returns a finished image, (3, S, S) uint8."""
        choose = self.transform.part(draws)
        part = None if choose is None else photos.read_crop(path, choose, self.transform.img_size)
        if part is None:
            return self.transform.image(read_image(path), draws)
        return self.transform.finish(part, draws)


def _collate(items: Sequence[tuple[Tensor, Tensor] | Exception], smaller: str) -> tuple[Tensor, ...] | Exception:
    """Stacks images and labels, in a worker in shared memory; an error comes back in their place."""
    done: list[tuple[Tensor, Tensor]] = []
    reasons: dict[str, str] = {}
    for item in items:
        if isinstance(item, ImageError):
            reasons |= item.reasons
        elif isinstance(item, Exception):
            return item
        else:
            done.append(item)
    if reasons:
        return ImageError(reasons)
    images, labels = zip(*done)
    try:
        return workers.share((torch.stack(images), torch.stack(labels)), smaller)
    except (MemoryError, OSError) as e:
        return e
