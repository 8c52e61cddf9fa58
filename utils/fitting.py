"""Chooses how many images a run takes at once, as its memory allows, where the flags leave that open.

What a training needs is reckoned in utils/reckoning.py; what is free, utils/memory.py reads.  This module must not know
args or models.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import nn

from utils import dist_util, memory, reckoning
from utils.batch import EVALUATED, MOST_EVALUATED, Batch
from utils.datasets import DataSets, FileImages, MemoryImages
from utils.precision import Precision

logger = logging.getLogger("train")

#: What helps where not even the few images of the reckoning fit.
REMEDY = "with a few images; give a smaller --img_size or --model_type"


@dataclass(frozen=True)
class Fitting:
    """Finds out how many images of a run fit into memory; every rank must call its methods, in the same order.

    Args:
        build: makes the model with so many blocks, on the "meta" device.
        num_blocks: of the model of the run.
        precision: the number formats of the run, and its device.
        img_size: side of the images that the model sees, in pixels.
        data: the images.
        num_ahead: micro-batches that processes decode ahead, where images are in files.
    """

    build: Callable[[int], nn.Module]
    num_blocks: int
    precision: Precision
    img_size: int
    data: DataSets
    num_ahead: int

    def micro_batches(self, batch: Batch, num_loaded: int, *, is_finished: bool) -> Batch:
        """Returns the batch in as many micro-batches as the memory asks for, if it leaves their number open.

        Args:
            batch: as the flags and the saved run have it.
            num_loaded: bytes that the host holds already of what the training needs; on a GPU they do not count.
            is_finished: no step is left: then nothing is reckoned.

        Raises:
            OutOfMemory: not even a few images fit.
        """
        device, number = self.precision.device, batch.num_micro_batches
        is_open = batch.is_auto and not is_finished
        free, need = memory.free_bytes(device) if is_open else None, None
        if free is not None:
            with memory.explain_out_of_memory(REMEDY):
                need = self._need
            if device.type == "cuda":
                free = memory.free_bytes(device) or 0  # now that its libraries have taken what they need
            else:
                free += num_loaded
            number = max(number, need.fewest_micro_batches(batch.per_rank, free))
        number = max(dist_util.gather(number))  # of every rank, whatever its flags: they are compared later
        if need is not None and free is not None:
            logger.log(*need.explain(batch, number, free))
        elif is_open:
            logger.info("%s does not tell how much memory is free: --gradient_accumulation_steps %d", device, number)
        return batch.at_least(number) if batch.is_auto else batch

    def evaluated(self, given: int | str, saved: int | None = None) -> int:
        """Returns how many images an evaluation takes at once: on a GPU, with "auto", as many as fit.

        Args:
            given: their number, or "auto".
            saved: images that the saved run took: on a GPU more are not taken now, so that the digits stay.

        Raises:
            OutOfMemory: not even a few images fit.
        """
        size, image, free = EVALUATED if given == "auto" else int(given), 0, 0
        if given == "auto" and self.precision.device.type == "cuda":
            pixels = self.data.test.images[0, 0].numel() if isinstance(self.data.test, MemoryImages) else 0
            with memory.explain_out_of_memory(REMEDY):
                need = self._need
                free = (memory.free_bytes(self.precision.device) or 0) - need.held - need.buckets - need.copies
                image = reckoning.evaluated_image(self.build(2), self.precision, self.img_size, pixels)
            size = reckoning.evaluated_at_once(image, free, min(saved or MOST_EVALUATED, MOST_EVALUATED))
        size = min(dist_util.gather(size))  # of every rank
        if image:
            logger.log(*reckoning.explain_evaluation(image, free, size))
        return size

    @functools.cached_property
    def _need(self) -> reckoning.Need:
        """Reckons what a training takes on its device from here on, once for both methods."""
        ranks = dist_util.world_size()
        need = reckoning.reckon(self.build, self.num_blocks, self.precision, self.img_size, ranks)
        if self.precision.device.type == "cuda":  # where the images in memory move
            images = [x.images.nbytes for x in (self.data.train, self.data.test) if isinstance(x, MemoryImages)]
            return replace(need, held=need.held + sum(images))
        ahead = self.num_ahead if isinstance(self.data.train, FileImages) else 0
        return replace(need, image=need.image + ahead * 4 * 3 * self.img_size**2)
