"""The machine's own peak: the best rate of its matrix products."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch

from benchmarks import common


def matmul_peak(device: str, dtype: torch.dtype, rows: int, width: int, hidden: int, quick: bool) -> float:
    """Returns the best rate of one matrix product on this machine, in FLOP/s.

    Tried are the products of a ViT's linear layers and large squares, with either layout of the second factor.

    Args:
        device, dtype: where and in what to multiply.
        rows: B * T, tokens of a batch.
        width, hidden: D and the width of the MLP.
        quick: smaller squares and fewer repetitions.
    """
    sides = (256, 512) if quick else (1024, 2048, 4096) if device == "cpu" else (2048, 4096, 8192)
    secs = 0.002 if quick else 0.05
    shapes = [(rows, width, width), (rows, width, hidden), (rows, hidden, width), *((n, n, n) for n in sides)]
    best = 0.0
    for m, k, n in shapes:
        a = torch.randn(m, k, device=device).to(dtype)
        out = torch.empty(m, n, device=device, dtype=dtype)
        for b in (torch.randn(k, n, device=device).to(dtype), torch.randn(n, k, device=device).to(dtype).T):
            product = functools.partial(torch.mm, a, b, out=out)
            first = common.timed(product, 1, device)  # warms up
            repeats = max(1, round(secs / (first if first > secs else common.timed(product, 1, device))))
            fastest = min(common.timed(product, repeats, device) for _ in range(3))
            best = max(best, 2 * m * k * n / fastest)
    return best


def matmul_peaks(
    device: str, dtypes: Iterable[torch.dtype], rows: int, width: int, hidden: int, quick: bool
) -> dict[torch.dtype, float]:
    """Returns ``matmul_peak`` in each number format, computed once where some are the same."""
    return {dtype: matmul_peak(device, dtype, rows, width, hidden, quick) for dtype in dict.fromkeys(dtypes)}
