"""Decides by measuring if a CPU computes a model's matrix products in half precision or in float32.

Processors differ by a factor of a hundred: those with bfloat16 instructions are up to several times faster in half
precision, those without are slower, and torch does not tell.  So products of the model's own shapes are timed, for a
tenth of a second.  This module must not know models, which its callers describe by the shapes of their layers.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import grad

from utils import dist_util
from utils.precision import Precision

logger = logging.getLogger("train")

#: Positions of an image by (shape of a layer's weight, stride); see ``measure``.
Shapes = Mapping[tuple[tuple[int, ...], int], int]

#: How much faster float32 must be: less is noise, and half precision saves memory.
WORTH_IT = 1.2
#: How much slower half precision is where looking on is a waste of time.
HOPELESS = 2.0

BUDGET_SECS = 0.1
#: A product has 16, 64 and 256 rows, or pixels in a square, in turn: what few take tells if more fit into the budget.
SIDES = (4, 8, 16)
#: Calls of each product, in turns; the fastest counts.  The first one compiles.
NUM_CALLS = 2
#: The share of the work that is measured: hybrids have many layers that hardly count.
MEASURED_SHARE = 0.9


def choose(precision: Precision, shapes: Shapes, training: bool = True, kept: str | None = None) -> None:
    """Lets a precision compute in float32 where that is faster and the flags leave it open, and logs the rates.

    All ranks come to the same choice; every rank must call it, within ``all_ranks_or_none``.

    Args:
        precision: not prepared yet.
        shapes: of the model's layers; see ``measure``.
        training: measure the products of the backward pass, too.
        kept: the choice of a training that resumes on the same processor, as ``Precision.number_format``.
    """
    level, half, loss_scale = precision.opt_level, precision.number_format, precision.static_scale
    measures = precision.is_open and kept is None
    rates = dist_util.gather(measure(shapes, precision.half, training) if measures else None)
    if not precision.is_open or (measures and None in rates):  # by other flags of other ranks, which are refused later
        return
    if measures:
        # Ranks wait for each other: what counts is the time that all take.
        in_half, in_float32 = (len(rates) / sum(1 / rate for rate in of_ranks) for of_ranks in zip(*rates))
        if in_float32 > WORTH_IT * in_half:
            precision.compute_in_float32()
        reason = (
            f"this processor computes the model's matrix products at {in_half:.3g} GFLOP/s in {half}, "
            f"{in_float32:.3g} in float32"
        )
    else:
        if kept == "float32":
            precision.compute_in_float32()
        reason = "as before on this processor"
    if precision.static_scale != loss_scale:
        logger.warning("--loss_scale has no effect in float32")
    chosen = precision.number_format
    text = f"--amp_dtype auto: {reason}: {level} computes in {chosen}"
    logger.info("%s", text if chosen == half else f"{text} (--amp_dtype {half} forces the other)")


@dataclass(frozen=True)
class Layer:
    """A linear layer, weight (outputs, inputs), or a convolution, weight (outputs, inputs, height, width).

    Attributes:
        weight: its shape.
        stride: of a convolution.
        num_positions: tokens, or pixels of the output, that it computes of an image.
    """

    weight: tuple[int, ...]
    stride: int
    num_positions: int

    def flops(self, num_positions: int) -> int:
        """Returns the floating-point operations of its product for so many positions."""
        return 2 * math.prod(self.weight) * num_positions

    def tensors(self, side: int, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns an input, the weight, and an output that has ``side`` x ``side`` positions."""
        num_outputs, num_inputs, *kernel = self.weight
        if not kernel:
            return w.new_ones(side**2, num_inputs), w, w.new_ones(side**2, num_outputs)
        x = w.new_ones(1, num_inputs, *((side - 1) * self.stride + k for k in kernel))
        return x, w, w.new_ones(1, num_outputs, side, side)


def measure(shapes: Shapes, half: torch.dtype, training: bool) -> tuple[float, float]:
    """Returns the GFLOP/s at which this process computes a model's products, in ``half`` and in float32.

    It takes ``BUDGET_SECS`` at most, but for a call that turns out to take longer: small products come before large
    ones, forward passes before backward ones.  It ends as soon as half precision is hopeless.

    Args:
        shapes: positions of an image, by the shape of the weight and the stride of the layer that computes them; see
            ``Layer``.
        half: the half-precision type.
        training: measure the products of the backward pass, too.
    """
    deadline = time.perf_counter() + BUDGET_SECS
    products = list(itertools.product(PRODUCTS[: 3 if training else 1], _largest(shapes)))
    total, secs = 0.0, [1e-12, 1e-12]  # clocks may be coarse
    for i, (product, layer) in enumerate(products):
        left, work = deadline - time.perf_counter(), layer.flops(layer.num_positions)
        if NUM_CALLS * layer.flops(SIDES[1] ** 2) * sum(secs) > left * total > 0:
            continue  # it would be measured with so few rows that memory decides
        fair = left / (len(products) - i)
        for j, secs_per_flop in enumerate(_secs_per_flop(product, layer, half, deadline, fair)):
            secs[j] += work * secs_per_flop
        total += work
        if secs[0] >= HOPELESS * secs[1] or time.perf_counter() >= deadline:
            break
    return total / secs[0] / 1e9, total / secs[1] / 1e9


def _largest(shapes: Shapes) -> list[Layer]:
    """Returns the layers that do most of the work, those with small weights first."""
    layers = [Layer(*key, num_positions) for key, num_positions in shapes.items()]
    layers.sort(key=lambda layer: -layer.flops(layer.num_positions))
    done = list(itertools.accumulate(layer.flops(layer.num_positions) for layer in layers))
    most = [layer for layer, so_far in zip(layers, [0, *done]) if so_far < MEASURED_SHARE * done[-1]]
    return sorted(most, key=lambda layer: math.prod(layer.weight))


@torch.inference_mode()
def _secs_per_flop(product: Product, layer: Layer, half: torch.dtype, deadline: float, fair: float) -> list[float]:
    """Returns the seconds that a floating-point operation of a product takes, in half precision and in float32.

    Args:
        product: one of ``PRODUCTS``.
        layer: whose product it is.
        half: the half-precision type.
        deadline: when to be done, by the clock.
        fair: seconds beyond which the most positions are not worth it.
    """
    weights = [torch.ones(layer.weight, dtype=dtype) for dtype in (half, torch.float32)]
    secs = per_flop = [0.0, 0.0]
    for last, side in zip((0, *SIDES), SIDES):
        left = deadline - time.perf_counter()
        expected = NUM_CALLS * sum(secs) * side**2 / last**2 if last else 0.0
        if last and expected > (min(left, fair) if side == SIDES[-1] else left):
            break
        secs, tensors = [math.inf, math.inf], [layer.tensors(side, w) for w in weights]
        for _ in range(NUM_CALLS):
            for i, (x, w, y) in enumerate(tensors):
                began = time.perf_counter()
                product(layer, x, w, y)
                secs[i] = min(secs[i], time.perf_counter() - began)
            if time.perf_counter() >= deadline:
                break
        per_flop = [s / layer.flops(side**2) for s in secs]
    return per_flop


# ---- the products of a layer, as autograd computes them: its own interface imports compilers, for half a second ----


def _forward(layer: Layer, x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.conv2d(x, w, stride=layer.stride) if w.ndim == 4 else F.linear(x, w)


def _input_grad(layer: Layer, x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return grad.conv2d_input(x.shape, w, y, layer.stride) if w.ndim == 4 else y @ w


def _weight_grad(layer: Layer, x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return grad.conv2d_weight(x, w.shape, y, layer.stride) if w.ndim == 4 else y.t() @ x


Product = Callable[[Layer, Tensor, Tensor, Tensor], Tensor]
PRODUCTS: tuple[Product, ...] = (_forward, _input_grad, _weight_grad)
