"""The time that a training waits for images that are decoded as it needs them, and advice where that is much.

This module decides what is said, never what is computed; it must not know what the batches hold.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from typing import Any, TypeVar

import torch

from utils import advice, hardware

T = TypeVar("T")

#: Of so much of the time, advice is given; a training of fewer seconds, its first step apart, tells too little.
LARGE_SHARE, ENOUGH_SECS = 0.2, 10


class InputWait(Iterator[T]):
    """Gives batches, and counts the seconds that the training spends inside ``next``.

    On CUDA they are the GPU's, by events before and after: the host is ahead of it, and as long as the GPU has steps to
    compute, it costs nothing that the host waits.  Nothing here waits for the GPU.

    Args:
        batches: made of images that processes decode.
        device: where they are and are needed.
        num_workers: processes that decode for this rank.
    """

    def __init__(self, batches: Iterator[T], device: torch.device, num_workers: int) -> None:
        self._batches, self._num_workers = batches, num_workers
        self._on_gpu = device.type == "cuda"
        self._pending: deque[tuple[Any, Any]] = deque()  # events around each ``next`` that are not counted yet
        self._secs = 0.0
        self._first: tuple[float, float] | None = None  # seconds trained and waited after this process's first step
        self._told = False

    def __next__(self) -> T:
        before = self._now()
        batch = next(self._batches)
        self._pending.append((before, self._now()))
        return batch

    def _now(self) -> Any:
        event = torch.cuda.Event(enable_timing=True) if self._on_gpu else _HostEvent()
        event.record()
        return event

    def secs(self) -> float:
        """Returns the seconds so far, as far as the device has come."""
        while self._pending and self._pending[0][1].query():
            before, after = self._pending.popleft()
            self._secs += before.elapsed_time(after) / 1000
        return self._secs

    def advice(self, train_secs: float) -> str:
        """Returns, once, what helps where the share is large; else "".

        Args:
            train_secs: since this process began with its steps; asked after each.  The first does not count, for
                which workers start.
        """
        waited = self.secs()
        if self._pending:  # the GPU is behind the seconds of the host
            return ""
        first_secs, first_waited = self._first = self._first or (train_secs, waited)
        secs, waited = train_secs - first_secs, waited - first_waited
        if self._told or secs < ENOUGH_SECS or waited <= LARGE_SHARE * secs:
            return ""
        self._told = True
        num_ranks = hardware.local_world_size()
        return advice.for_slow_images(waited / secs, self._num_workers, hardware.num_cpus(), num_ranks)


class _HostEvent:
    """A point of the host's time that is asked as CUDA's events are."""

    def record(self) -> None:
        self._at = time.perf_counter()

    def query(self) -> bool:
        return True

    def elapsed_time(self, later: _HostEvent) -> float:
        return 1000 * (later._at - self._at)
