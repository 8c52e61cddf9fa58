"""The batches that each update and each evaluation takes from a data set (utils/datasets.py has those).

Images in memory are transformed a batch at a time on the device that trains; those in files are decoded
by worker processes.  Which pictures an update takes, and every random number of their crops, is a function
of the seed and the update's number (``StepSampler``): nothing is carried along that a resumed run would
have to restore.

What is done to a picture is the caller's ``Transform`` (utils/augment.py has them).  This module must
not know models, and reads flags from nobody: functions take the values they need.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from typing import Any, Protocol, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from utils.datasets import FileImages, ImageError, Images, MemoryImages, read_image
from utils.hardware import to_device

#: How often a process that decodes looks whether its run is still there.
LOOK_SECS = 0.5


class Transform(Protocol):
    """Makes the model's input of pictures; ``augment.EvalTransform`` says what each method does."""

    @property
    def num_draws(self) -> int: ...

    def batch(self, pictures: Tensor, draws: Tensor) -> Tensor: ...

    def picture(self, picture: Image.Image, draws: Tensor) -> Tensor: ...

    def complete(self, pictures: Tensor) -> Tensor: ...


Batch = tuple[Tensor, Tensor]  # pictures (B, 3, S, S) float32 in [-1, 1], labels (B,) int64

#: What random numbers are for: the first number after the run's seed in ``derive_seed``.
ORDER, DRAWS, DROPOUT = range(3)


def derive_seed(*numbers: int) -> int:
    """One seed from several numbers, such as (seed, step): close numbers give unrelated seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


class StepSampler:
    """What each update takes: a pure function of the seed and the update's number.

    The order is a fresh permutation per epoch, read as one endless stream, so that every batch is
    full.  Each process takes its slice of the global batch: one process and two see the same pictures.

    Args:
        num_pictures: in the training split.
        batch_size: pictures of one update on this process.
        num_draws: random numbers that one picture takes.
        seed: of the run.
        rank, world_size: this process among all.
    """

    def __init__(
        self, num_pictures: int, batch_size: int, num_draws: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self.num_pictures = num_pictures
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
            self._orders[epoch] = torch.randperm(self.num_pictures, generator=generator)
        return self._orders[epoch]

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """The pictures' indices (batch_size,) and their random numbers (batch_size, num_draws) in update ``step``."""
        total = self.batch_size * self.world_size
        mine = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, DRAWS, step))
        draws = torch.rand(total, self.num_draws, generator=generator, dtype=torch.float64)[mine]
        start = (step - 1) * total + mine.start
        return self._stream(start, start + self.batch_size), draws

    def _stream(self, start: int, stop: int) -> Tensor:
        """The pictures at positions start..stop of the endless stream of epochs."""
        parts = []
        while start < stop:
            epoch, offset = divmod(start, self.num_pictures)
            part = self._order(epoch)[offset : offset + stop - start]
            parts.append(part)
            start += len(part)
        return torch.cat(parts)


def train_batches(
    pictures: Images,
    sampler: StepSampler,
    steps: Iterable[int],
    micro_batch_size: int,
    transform: Transform,
    device: torch.device,
    num_workers: int,
) -> Iterator[Batch]:
    """The training's batches: for each of ``steps`` in turn, its pictures in parts of ``micro_batch_size``.

    Raises:
        ImageError: a picture cannot be decoded.
    """
    return _batches(pictures, _train_parts(sampler, steps, micro_batch_size), transform, device, num_workers)


def eval_batches(
    pictures: Images,
    batch_size: int,
    transform: Transform,
    device: torch.device,
    num_workers: int,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """This process's share of all pictures, each once, in order; the last batch may be smaller.

    Raises:
        ImageError: a picture cannot be decoded.
    """
    mine = torch.arange(len(pictures))[rank::world_size]
    parts = [(indices, torch.empty(len(indices), 0)) for indices in mine.split(batch_size) if len(indices)]
    return _batches(pictures, parts, transform, device, num_workers)


def num_eval_batches(pictures: Images, batch_size: int, rank: int = 0, world_size: int = 1) -> int:
    """How many batches ``eval_batches`` gives."""
    return math.ceil(len(range(rank, len(pictures), world_size)) / batch_size)


#: The indices (B,) and random numbers (B, num_draws) of one batch after the other.
Parts = Iterable[tuple[Tensor, Tensor]]


def _train_parts(sampler: StepSampler, steps: Iterable[int], micro_batch_size: int) -> Parts:
    """The micro-batches of ``steps``."""
    for step in steps:
        indices, draws = sampler(step)
        yield from zip(indices.split(micro_batch_size), draws.split(micro_batch_size))


def _batches(
    pictures: Images, parts: Parts, transform: Transform, device: torch.device, num_workers: int
) -> Iterator[Batch]:
    if isinstance(pictures, MemoryImages):
        here = pictures.to(device)
        for indices, draws in parts:
            at = to_device(indices, device)
            yield transform.batch(here.images[at], draws), here.labels[at]
        return
    items = (list(zip(indices.tolist(), draws)) for indices, draws in parts)
    loader = DataLoader(
        _DecodeTask(pictures, transform),
        batch_sampler=cast(Sampler, items),
        num_workers=num_workers,
        collate_fn=_collate,
        worker_init_fn=_outlive_signals,
        generator=torch.Generator(),  # else it would draw from the global one, which is dropout's
        pin_memory=device.type == "cuda",
    )
    for batch in _worker_errors(loader):
        if isinstance(batch, str):
            raise ImageError(batch)
        x, y = (to_device(t, device) for t in batch)
        yield transform.complete(x), y


@contextlib.contextmanager
def _signals_later() -> Iterator[None]:
    """Holds back what stops a run while worker processes start: they inherit that, and would die of it until ready."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _outlive_signals(worker: int) -> None:
    """Ctrl-C, and many a scheduler's SIGTERM, reach every process; the update in hand still needs its pictures."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigtimedwait"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_the_run, daemon=True).start()


def _end_with_the_run() -> None:
    """Ends this process when the run's asks for it, and soon after that one's end: torch looks every five seconds."""
    run, parent = multiprocessing.parent_process(), os.getppid()  # these differ where a server forks the workers
    while os.getppid() == parent:
        asked = signal.sigtimedwait({signal.SIGTERM}, LOOK_SECS)
        if asked is not None and run is not None and asked.si_pid == run.pid:
            break
    os._exit(0)


def worker_died(error: RuntimeError) -> bool:
    """Whether this tells that a process that decodes was killed: torch raises it wherever the program is then."""
    return "DataLoader worker" in str(error)


WORKER_DIED = "a process that decodes pictures was killed, perhaps for lack of memory; fewer --num_workers need less"


def _worker_errors(loader: DataLoader) -> Iterator[Any]:
    try:
        with _signals_later():
            batches = iter(loader)  # starts the workers
        yield from batches
    except RuntimeError as e:
        if not worker_died(e):
            raise
        raise ChildProcessError(WORKER_DIED) from e
    except (ConnectionError, EOFError) as e:  # one that dies while it hands over a tensor, before torch sees its end
        raise ChildProcessError(WORKER_DIED) from e


class _DecodeTask(Dataset):
    """Decodes and transforms one picture in a worker process.

    An unreadable picture comes back as its error's text: raised in a worker, it would reach the user
    as a stack.
    """

    def __init__(self, pictures: FileImages, transform: Transform) -> None:
        self.pictures = pictures
        self.transform = transform

    def __getitem__(self, item: tuple[int, Tensor]) -> tuple[Tensor, Tensor] | str:
        index, draws = item
        try:
            picture = read_image(self.pictures.paths[index])
        except ImageError as e:
            return str(e)
        return self.transform.picture(picture, draws), self.pictures.labels[index]


def _collate(items: list[tuple[Tensor, Tensor] | str]) -> tuple[Tensor, Tensor] | str:
    done: list[tuple[Tensor, Tensor]] = []
    for item in items:
        if isinstance(item, str):
            return item
        done.append(item)
    images, labels = zip(*done)
    return torch.stack(images), torch.stack(labels)
