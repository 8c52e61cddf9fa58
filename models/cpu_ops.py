"""Operations for CPUs: dropout whose masks cost little, and attention scores in float32.

Source: Srivastava et al., JMLR 15 (2014), in the scaled form that every framework uses: in training an
element is kept with probability 1 - rate and divided by it, in evaluation nothing happens.

torch's own dropout takes up to a third of a step: it draws one number per element, one after another on a single
core.  Here one 64-bit number decides on four elements, 16 bits each, so that the rate is met to within 1 / 65536.
This module must not know the model.
"""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

LANE_BITS = 16  # random bits an element
SAME_SIZE_INT = {2: torch.int16, 4: torch.int32, 8: torch.int64}


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
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, rate)
    return _CpuDropout.apply(x, rate)


def keep_mask(shape: torch.Size, rate: float) -> Tensor:
    """Returns an int16 mask: all bits set where an element is kept, none where it is dropped.

    The random numbers are numpy's, twice as fast as torch's, seeded by torch's generator, so that
    ``torch.manual_seed`` decides on them too.
    """
    seed = int(torch.randint(2**63 - 1, ()))
    size, lanes = shape.numel(), 64 // LANE_BITS
    words = np.random.SFC64(seed).random_raw(-(-size // lanes))
    draws = torch.from_numpy(words.view(np.int16))[:size].view(shape)
    threshold = round((1 - rate) * 2**LANE_BITS) - 2 ** (LANE_BITS - 1)  # kept: draws below, from -2**15 on
    if threshold == 2 ** (LANE_BITS - 1):  # so low a rate that no int16 reaches it
        return draws.fill_(-1)
    return draws.lt_(threshold).neg_()


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
    ints = SAME_SIZE_INT[x.element_size()]
    x = x * factor
    x.view(ints).bitwise_and_(mask.to(ints))
    return x


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
