"""Reckons the memory that a training needs, from a look at two and at three blocks of its model.

All blocks of an encoder take the same memory, and so do all images.  So a few images that pass forward and backward
through a few blocks, on the device and in the number formats of the training, tell what a whole model and any number
of images take, before the weights are there.  Nothing else is tried: an error for lack of memory comes only if the
memory has shrunk since.

This module must not know models, which its caller builds, nor how much memory there is (utils/memory.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from utils.batch import MOST_EVALUATED, Batch
from utils.precision import Precision

#: What a process on a CPU grows by, for each byte that its tensors hold in a forward and backward pass: the heap has
#: holes.  Measured by ``python -m benchmarks.once.memory``.
CPU_HEAP = 1.2

#: Images of the two looks: a single one may be computed otherwise.
FEW, ONE_MORE = 2, 3

#: Copies of its images in float32 that an evaluation holds beside the forward pass: those of the batch before, and two
#: while images are resized.
EVALUATED_COPIES = 3


@dataclass(frozen=True)
class Need:
    """The memory that a training needs on one rank, in bytes.

    Attributes:
        held: by what is there from the first step to the last: weights, float32 masters, momentum, images.
        gradients: by the gradients as the optimizer reads them.
        buckets: by those that ranks exchange; 0 for a single rank.
        image: by each image of a micro-batch, when its forward and backward pass hold the most.
        copies: by the passes then, however many images: weights that were cast or joined, gradients of half precision.
        heap: bytes that the process grows by for each of these.
    """

    held: int
    gradients: int
    buckets: int
    image: int
    copies: int = 0
    heap: float = 1.0

    def bytes(self, micro_batch: int, num_micro_batches: int) -> int:
        """Returns what the process takes at its peak with so many images at a time."""
        return int(self.heap * self.live_bytes(micro_batch, num_micro_batches))

    def fewest_micro_batches(self, num_images: int, free: int) -> int:
        """Returns the least number of parts of so many images that fits; all, where not even one image does."""
        fits = (n for n in range(1, num_images + 1) if self.bytes(-(-num_images // n), n) <= free)
        return next(fits, num_images)

    def explain(self, batch: Batch, num_micro_batches: int, free: int) -> tuple[int, str]:
        """Returns the level and the text of the log line about the choice that was made.

        Args:
            batch: before the choice.
            num_micro_batches: those chosen.
            free: bytes that may be taken.
        """
        most, chosen = batch.per_rank, batch.at_least(num_micro_batches)
        whole, part = self.bytes(most, 1), self.bytes(chosen.micro_batch, num_micro_batches)
        text = f"a step of {most} images at once needs {_size(whole)} of memory, {_size(free)} are free"
        if num_micro_batches > 1:
            text += f"; {chosen.micro_batch} at a time need {_size(part)}"
        text += f": --gradient_accumulation_steps {num_micro_batches}"
        if part > free:
            return logging.WARNING, f"{text}, which may be too much"
        if num_micro_batches > batch.num_micro_batches > 1:
            return logging.WARNING, f"{text}; it was {batch.num_micro_batches} when the run was saved"
        return logging.INFO, text

    def live_bytes(self, micro_batch: int, num_micro_batches: int) -> int:
        """Returns the bytes of the tensors that are there at the peak."""
        passes = self.copies + micro_batch * self.image
        if num_micro_batches == 1 and not self.buckets:  # gradients come as the images' memory goes
            return self.held + max(passes, self.gradients)
        return self.held + self.gradients + self.buckets + passes


def reckon(
    build: Callable[[int], nn.Module], num_blocks: int, precision: Precision, img_size: int, num_ranks: int
) -> Need:
    """Returns what training a model needs.

    Args:
        build: makes the model with so many blocks, on the "meta" device.
        num_blocks: of the model that is trained.
        precision: the number formats of the training, which stay as they are.
        img_size: side of the images, in pixels.
        num_ranks: that train together.
    """
    fresh = [_like(precision) for _ in range(3)]
    model = build(num_blocks)
    params = fresh[0].prepare(model)
    held = _num_bytes({*model.parameters(), *params}) + _num_bytes(params)  # the last is momentum
    buckets = _num_bytes(model.parameters()) if num_ranks > 1 else 0
    two, three = (_peak(build(n), p, img_size) for n, p in zip((2, 3), fresh[1:]))
    image, copies = (x + (num_blocks - 2) * (y - x) for x, y in zip(two, three))
    return Need(held, _num_bytes(params), buckets, image, copies, CPU_HEAP if precision.device.type == "cpu" else 1.0)


def evaluated_image(model: nn.Module, precision: Precision, img_size: int, num_pixels: int) -> int:
    """Returns the bytes that each image of an evaluation takes.

    Args:
        model: with two blocks of the model that is evaluated, on the "meta" device: the peak is that of one.
        precision, img_size: as for ``reckon``.
        num_pixels: of an image before it is resized on the device.
    """
    image, _ = _peak(model, _like(precision), img_size, training=False)
    return image + EVALUATED_COPIES * 4 * 3 * max(img_size**2, num_pixels)


def evaluated_at_once(image: int, free: int, most: int = MOST_EVALUATED) -> int:
    """Returns the images that fit into memory at once in an evaluation: ``most``, or fewer by a power of two.

    Args:
        image: bytes that each takes.
        free: bytes that may be taken, when the weights are there and what autocast casts of them.
        most: images that are taken at most.
    """
    fitting = max(free // image, 1)
    return most if fitting >= most else 2 ** (fitting.bit_length() - 1)


def explain_evaluation(image: int, free: int, number: int) -> tuple[int, str]:
    """Returns the level and the text of the log line about the images that an evaluation takes at once."""
    text = f"an evaluation needs {_size(image)} of memory for each image, {_size(max(free, 0))} are free"
    level, remark = (logging.WARNING, ", which may be too little") if number * image > free else (logging.INFO, "")
    return level, f"{text}: --eval_batch_size {number}{remark}"


def _like(precision: Precision) -> Precision:
    """Returns the same number formats for another model."""
    return Precision(precision.device, precision.opt_level, str(precision.half).removeprefix("torch."))


def _size(num_bytes: int) -> str:
    """Returns bytes as people read them."""
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(x.nbytes for x in tensors)


def _peak(model: nn.Module, precision: Precision, img_size: int, training: bool = True) -> tuple[int, int]:
    """Returns what a forward pass and, in training, a backward pass hold where each image adds the most.

    Returns:
        The bytes that each image adds there, and those that are held whatever the number of images.
    """
    device = precision.device
    # Zeros, for CPUs are slow with some numbers; without to_empty, for which torch imports sympy: 0.4 s.
    zeros = {name: torch.zeros(x.shape, dtype=x.dtype, device=device) for name, x in model.state_dict().items()}
    model.load_state_dict(zeros, assign=True)
    precision.prepare(model)
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(_drop_grad)  # gradients come as the rest goes: they are counted apart
    model.train(training)
    looks = [_held_after_operations(model, precision, img_size, n) for n in (FEW, ONE_MORE)]
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if len(looks[0]) != len(looks[1]):  # a library, or our dropout, computes the two batches in different ways
        return max(looks[1]) // ONE_MORE, 0
    image, held = max(((more - few) // (ONE_MORE - FEW), few) for few, more in zip(*looks))
    return image, held - FEW * image


def _held_after_operations(model: nn.Module, precision: Precision, img_size: int, num_images: int) -> list[int]:
    """Returns the bytes of all tensors but the weights that are there after each operation of a pass that adds some."""
    with _Watch(model.parameters(), precision.device.type == "cuda") as noted:
        images = torch.zeros(num_images, 3, img_size, img_size, device=precision.device)
        labels = torch.zeros(num_images, dtype=torch.long, device=precision.device)
        with torch.set_grad_enabled(model.training), precision.autocast():
            loss = model(images, labels)
        if model.training:
            loss.backward()
    return noted.bytes


def _drop_grad(p: Tensor) -> None:
    p.grad = None


class _HeldBytes:
    """Notes the bytes of those tensors that operations returned and that are still there, after each that adds some.

    Args:
        known: tensors that are not counted, nor their views.
        on_gpu: count what attention takes there for itself, too: its backward pass adds up in a buffer of its own.  Of
            convolutions that is not counted: cuDNN chooses another way, with another buffer, for other batches.
    """

    def __init__(self, known: Iterable[Tensor], on_gpu: bool) -> None:
        super().__init__()
        self._on_gpu = on_gpu
        self.bytes: list[int] = []
        self._known = {x.untyped_storage()._cdata for x in known}
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        looks_inside, inside = self._on_gpu and "attention" in func.name(), 0
        if looks_inside:
            torch.cuda.reset_peak_memory_stats()
        result = func(*args, **(kwargs or {}))
        if looks_inside:
            stats = torch.cuda.memory_stats()  # of bytes asked for: blocks may be larger than that by as many again
            inside = stats["requested_bytes.all.peak"] - stats["requested_bytes.all.current"]
        added = False
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                if storage._cdata not in self._known and storage._cdata not in self._storages:
                    self._storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                    added = True
        if added:  # only then there may be more than ever
            self._storages = {key: held for key, held in self._storages.items() if not held[0].expired()}
            self.bytes.append(inside + sum(size for _, size in self._storages.values()))
        return result


class _Watch(_HeldBytes, TorchDispatchMode):
    """Sees all operations.  For a method that a mode itself defines torch would import torch._dynamo: a second."""
