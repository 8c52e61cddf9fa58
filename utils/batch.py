"""The division of a step's images between ranks and micro-batches."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from utils.errors import UserError

logger = logging.getLogger("train")


#: Images that an evaluation takes at once where its flag leaves that open: on CPUs more are no faster; on GPUs at most.
EVALUATED, MOST_EVALUATED = 64, 512


@dataclass(frozen=True)
class Batch:
    """The division of a step's images.

    Attributes:
        per_rank: images of one step on each rank.
        num_micro_batches: parts into which a rank splits them, one after the other.
        num_ranks: ranks that share the step.
        given: per_rank as its flag has it.
        is_auto: the memory decides on the number of micro-batches.
        evaluated: images that an evaluation takes at once on each rank.
    """

    per_rank: int
    num_micro_batches: int
    num_ranks: int
    given: int
    is_auto: bool = False
    evaluated: int = EVALUATED

    @property
    def total(self) -> int:
        """Images of one step on all ranks."""
        return self.per_rank * self.num_ranks

    @property
    def micro_batch(self) -> int:
        """Images that a rank computes at once, at most."""
        return -(-self.per_rank // self.num_micro_batches)

    @property
    def sizes(self) -> list[int]:
        """Images of each micro-batch of a step, in their order: equal numbers, or two that differ by one."""
        size, larger = divmod(self.per_rank, self.num_micro_batches)
        return [size + 1] * larger + [size] * (self.num_micro_batches - larger)

    @classmethod
    def from_flags(cls, per_rank: int, num_micro_batches: int | str, num_ranks: int) -> Batch:
        """Returns the division that the flags ask for; "auto" is one micro-batch, until ``at_least`` knows better."""
        given = isinstance(num_micro_batches, int)
        return cls(per_rank, int(num_micro_batches) if given else 1, num_ranks, per_rank, not given)

    def at_least(self, num_micro_batches: int) -> Batch:
        """Returns the division with no fewer micro-batches than these."""
        return replace(self, num_micro_batches=max(self.num_micro_batches, num_micro_batches))

    def smaller(self, most: int) -> Batch:
        """Returns a division of at most so many images, if there are not more ranks: a power of two on each rank."""
        per_rank = 2 ** (max(most // self.num_ranks, 1).bit_length() - 1)
        return Batch(per_rank, self._parts(per_rank), self.num_ranks, per_rank, self.is_auto)

    def _parts(self, per_rank: int) -> int:
        """Returns the least number of equal micro-batches that are no larger than this division's: they fit."""
        return next(n for n in range(1, per_rank + 1) if per_rank % n == 0 and per_rank // n <= self.micro_batch)

    def resumed(self, saved: Mapping[str, Any], was_ranks: int, was_micro_batches: int = 1) -> Batch:
        """Returns the division that keeps a saved run's step when the same command resumes, also with other ranks.

        Micro-batches do not grow: what fitted into memory still does.  Where the flags leave their number open, the run
        keeps its own.

        Args:
            saved: the state's "batch": its ``total``, and ``given``.
            was_ranks: ranks that the run had.
            was_micro_batches: of each of them.

        Raises:
            UserError: so many ranks cannot share the step's images.
        """
        total, n = saved["total"], self.num_ranks
        was_per_rank = (total or self.total) // was_ranks
        if not total or total == self.total or saved["given"] != self.given:
            # If it is another command, the comparison of the settings says so.
            return self._as_before(was_per_rank, was_micro_batches)
        if total % n:
            fitting = [m for m in range(1, min(total, 2 * max(was_ranks, n)) + 1) if total % m == 0]
            raise UserError(
                f"{n} ranks cannot share equally the {total} images of a step, with which this run began; "
                f"numbers that can: {', '.join(map(str, fitting))}"
            )
        per_rank = total // n
        batch = replace(self, per_rank=per_rank)._as_before(was_per_rank, was_micro_batches)
        parts = batch.num_micro_batches if self.is_auto else self._parts(per_rank)
        logger.log(
            logging.INFO if was_ranks == n else logging.WARNING,
            "--train_batch_size %d --gradient_accumulation_steps %d: %d ranks share the %d images of a step",
            per_rank, parts, n, total,
        )  # fmt: skip
        return replace(batch, num_micro_batches=parts)

    def _as_before(self, was_per_rank: int, was_micro_batches: int) -> Batch:
        """Returns, if the flags leave it open, the division whose micro-batches are no larger than those before."""
        if not self.is_auto:
            return self
        largest = max(-(-was_per_rank // was_micro_batches), 1)
        parts = was_micro_batches if self.per_rank == was_per_rank else -(-self.per_rank // largest)
        return self.at_least(min(parts, self.per_rank))

    def out_of_memory_advice(self) -> str:
        """Returns what a training that is short of memory can do about it."""
        text = f"with {self.micro_batch} images at a time (--train_batch_size {self.per_rank}); "
        more = range(2 * self.num_micro_batches, self.per_rank + 1)
        parts = next((n for n in more if self.per_rank % n == 0), None)
        if parts is None:
            return f"{text}give a smaller --train_batch_size, --img_size or --model_type"
        return f"{text}--gradient_accumulation_steps {parts} computes the same step {self.per_rank // parts} at a time"
