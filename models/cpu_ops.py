"""Operations for CPUs: dropout whose masks cost little, and attention scores in float32.

Source: Srivastava et al., JMLR 15 (2014), in the scaled form that every framework uses: in training an
element is kept with probability 1 - rate and divided by it, in evaluation nothing happens.

torch's own dropout takes up to a third of a step: it draws one number per element, one after another on a single
core.  Here one 64-bit number decides on four elements, 16 bits each, so that the rate is met to within 1 / 65536.
A step's masks do not depend on its division into micro-batches, within ``StepMasks``.
This module must not know the model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

LANE_BITS = 16  # random bits an element
SAME_SIZE_INT = {2: torch.int16, 4: torch.int32, 8: torch.int64}
#: Elements that are masked at once where the mask is widened: what comes between stays in a core's cache.
CHUNK = 2**19


def dropout(x: Tensor, rate: float, training: bool) -> Tensor:
    """Drops elements in training.

    Args:
        x: of any shape and float type.
        rate: probability that an element is dropped, 0 <= rate < 1.
        training: False does nothing.

    Returns:
        A tensor like ``x``: zeros where dropped, ``x / (1 - rate)`` elsewhere.
    """
    if not training or rate == 0:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, rate)
    if torch.compiler.is_compiling():
        return torch.where(_compiled_mask(x, rate) != 0, x * (1 / (1 - rate)), 0)
    return _CpuDropout.apply(x, rate)


class StepMasks:
    """The dropout masks of one step, which are the same however its images are divided into micro-batches.

    Every call of ``dropout`` in a forward pass has a stream of random numbers of its own, which the micro-batches read
    one after the other: what the whole batch would read at once.  A forward pass that is repeated for the backward pass
    reads the same numbers again.  ``torch.manual_seed``, before the step, decides on them.
    """

    def __init__(self) -> None:
        self._start = torch.get_rng_state()
        self._before: dict[int, tuple[Any, np.ndarray]] = {}  # streams by seed, as the micro-batch found them
        self._after: dict[int, tuple[Any, np.ndarray]] = {}  # and as it leaves them

    @contextlib.contextmanager
    def next_micro_batch(self) -> Iterator[None]:
        """Returns the context of the forward and backward pass of the step's next images."""
        torch.set_rng_state(self._start)  # so that each micro-batch draws the same seeds
        token = _step_masks.set(self)
        try:
            yield
        finally:
            _step_masks.reset(token)
        self._before, self._after = self._after, {}

    def lanes(self, seed: int, size: int) -> np.ndarray:
        """Returns the next ``size`` int16 numbers of the stream with that seed."""
        stream, rest = np.random.SFC64(seed), np.empty(0, np.int16)
        if seed in self._before:
            stream.state, rest = self._before[seed]
        lanes = _lanes(stream, size - len(rest))
        if len(rest):  # of a word that was not read to its end
            lanes = np.concatenate((rest, lanes))
        self._after[seed] = (stream.state, lanes[size:].copy())
        return lanes[:size]


_step_masks: ContextVar[StepMasks | None] = ContextVar("step_masks", default=None)


def _lanes(stream: np.random.SFC64, size: int) -> np.ndarray:
    """Returns the next int16 numbers of a stream: ``size``, and what is left of their last word."""
    return stream.random_raw(max(-(-size * LANE_BITS // 64), 0)).view(np.int16)


def keep_mask(shape: torch.Size, rate: float) -> Tensor:
    """Returns an int16 mask: all bits set where an element is kept, none where it is dropped.

    The random numbers are numpy's, twice as fast as torch's, seeded by torch's generator, so that
    ``torch.manual_seed`` decides on them too.
    """
    seed, size, step = int(torch.randint(2**63 - 1, ())), shape.numel(), _step_masks.get()
    lanes = _lanes(np.random.SFC64(seed), size)[:size] if step is None else step.lanes(seed, size)
    draws = torch.from_numpy(lanes).view(shape)
    threshold = round((1 - rate) * 2**LANE_BITS) - 2 ** (LANE_BITS - 1)  # kept: draws below, from -2**15 on
    if threshold == 2 ** (LANE_BITS - 1):  # so low a rate that no int16 reaches it
        return draws.fill_(-1)
    return draws.lt_(threshold).neg_()


@torch.library.custom_op("vit::keep_mask", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def _compiled_mask(x: Tensor, rate: float) -> Tensor:
    """Is ``keep_mask`` as one node of a compiled graph, which takes ``x`` for its shape, and so keeps the order."""
    return keep_mask(x.shape, rate)


@_compiled_mask.register_fake
def _(x: Tensor, rate: float) -> Tensor:
    return torch.empty(x.shape, dtype=torch.int16)


class _CpuDropout(torch.autograd.Function):
    """Sets the bits of dropped elements to zero: one pass over memory, whatever the float type."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rate: float) -> Tensor:
        mask = keep_mask(x.shape, rate)
        ctx.save_for_backward(mask)
        ctx.factor = 1 / (1 - rate)
        return _masked(x, mask, ctx.factor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return _masked(grads[0], mask, ctx.factor), None


def _masked(x: Tensor, mask: Tensor, factor: float) -> Tensor:
    """Returns ``x * factor``, with the bits that ``mask`` lacks set to zero."""
    ints, out = SAME_SIZE_INT[x.element_size()], torch.empty_like(mask, dtype=x.dtype)
    size = out.numel() if ints == mask.dtype else CHUNK
    for part, kept, result in zip(*(t.reshape(-1).split(max(size, 1)) for t in (x, mask, out))):
        torch.mul(part, factor, out=result)
        result.view(ints).bitwise_and_(kept.to(ints))
    return out


def autocasts(kind: str) -> bool:
    """Tells if autocast casts matrix products on a kind of device; torch cannot be asked about "meta"."""
    return kind != "meta" and torch.is_autocast_enabled(kind)


def cast_for_matmul(x: Tensor) -> Tensor:
    """Casts a matrix product's input as autocast would: once here, not in every product that takes it."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if autocasts(kind) else x


def attention_scores(q: Tensor, k: Tensor) -> Tensor:
    """Scaled products of queries and keys, (B, A, T, K) each, in float32 at least: (B, A, T, T).

    The fused kernels do the same.  In bfloat16 the rounding of scores is a large part of the gradients' error, and
    this product is a hundredth of a block's work.
    """
    return _Scores.apply(q, k)


class _Scores(torch.autograd.Function):
    """Keeps queries and keys for the backward pass in their own type: float32 copies would take twice the memory."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor) -> Tensor:
        ctx.save_for_backward(q, k)
        with _no_autocast(q):
            return _scaled(q) @ _exact(k).transpose(-2, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        q, k = ctx.saved_tensors
        with _no_autocast(q):
            dq = grads[0] @ _exact(k) * q.shape[-1] ** -0.5
            dk = grads[0].transpose(-2, -1) @ _scaled(q)
        return dq.to(q.dtype), dk.to(k.dtype)


def _no_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if autocasts(kind) else contextlib.nullcontext()


def _exact(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _scaled(q: Tensor) -> Tensor:
    return _exact(q) * q.shape[-1] ** -0.5
