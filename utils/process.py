"""Gives back what a run changes in its process: for notebooks, and whoever calls ``train.main`` in a program.

utils/signals.py gives signals back, utils/console.py streams and logging.  What can only be set stays: the settings of
malloc in utils/hardware.py, and what is imported.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.backends import cuda, cudnn, mkldnn

from utils.apex import undo_patches

CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"

#: Parts of torch whose float32 products may be TF32.
_WITH_TF32: tuple[Any, ...] = (
    cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul,  # type: ignore[attr-defined]
)  # fmt: skip
#: A function that tells a value, and one that sets it.
Switch = tuple[Callable[[], Any], Callable[[Any], Any]]


@contextlib.contextmanager
def process_restored() -> Iterator[None]:
    """Gives back after the block torch's threads and switches, random numbers, warnings' filters and ``excepthook``."""
    has_workspace = CUBLAS_WORKSPACE in os.environ
    before = []
    for value, give_back in _switches():
        with contextlib.suppress(RuntimeError):  # torch refuses one that was set by two of its interfaces
            before.append((give_back, value()))
    try:
        with warnings.catch_warnings():
            yield
    finally:
        undo_patches()
        for give_back, value in before:
            give_back(value)
        if not has_workspace:
            os.environ.pop(CUBLAS_WORKSPACE, None)


def _attribute(owner: Any, name: str) -> Switch:
    return functools.partial(getattr, owner, name), functools.partial(setattr, owner, name)


def _switches() -> list[Switch]:
    """Returns what is given back, but for warnings and the environment."""
    pairs: list[Switch] = [
        (random.getstate, random.setstate),
        (np.random.get_state, np.random.set_state),
        (torch.get_rng_state, torch.set_rng_state),
        (torch.get_num_threads, torch.set_num_threads),
        (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),  # before its parts
        _attribute(cudnn, "allow_tf32"),
        (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
        *(_attribute(owner, "fp32_precision") for owner in _WITH_TF32),
        _attribute(cudnn, "benchmark"),
        _attribute(torch.utils.deterministic, "fill_uninitialized_memory"),  # type: ignore[attr-defined]
        _attribute(sys, "excepthook"),
        _attribute(torch.nn.modules.rnn, "_VF"),  # which apex replaces, and does not give back
        (cuda.flash_sdp_enabled, cuda.enable_flash_sdp),
        (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp),
        (cuda.math_sdp_enabled, cuda.enable_math_sdp),
        (cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp),
    ]
    if torch.cuda.is_initialized():
        pairs += [
            (torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all),
            (torch.cuda.current_device, torch.cuda.set_device),
        ]
    return pairs
