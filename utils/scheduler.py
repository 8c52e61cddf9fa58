"""Learning-rate schedules: the factor of the peak learning rate that a step uses.

Source: the reference script's WarmupCosineSchedule and WarmupLinearSchedule, as functions of the
step's number, so that a schedule has no state to save and no order to call it in.
"""

from __future__ import annotations

import math
from collections.abc import Callable

Schedule = Callable[[int], float]

DECAY_TYPES = ("cosine", "linear")


def make_schedule(decay_type: str, warmup_steps: int, num_steps: int) -> Schedule:
    """Returns a function from the step's number k = 1..num_steps to the factor of the peak learning rate.

    It rises linearly to 1 at ``warmup_steps`` and falls to 0 at ``num_steps``, along half a cosine or
    a line.

    Raises:
        ValueError: unknown ``decay_type``.
    """
    if decay_type not in DECAY_TYPES:
        raise ValueError(f"unknown decay type {decay_type!r}; known: {', '.join(DECAY_TYPES)}")

    def factor(k: int) -> float:
        if k < warmup_steps:
            return k / max(1, warmup_steps)
        num_decay_steps = max(1, num_steps - warmup_steps)
        if decay_type == "linear":
            return max(0.0, (num_steps - k) / num_decay_steps)
        return max(0.0, 0.5 * (1 + math.cos(math.pi * (k - warmup_steps) / num_decay_steps)))

    return factor
