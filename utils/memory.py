"""Explains errors for lack of memory, and what to do about them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

#: What RuntimeErrors say that are one for lack of memory: torch's on CPUs, CUDA's, cuBLAS's.
OUT_OF_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


class OutOfMemory(RuntimeError):
    """There is not enough memory; the message has the remedy."""


@contextlib.contextmanager
def explain_out_of_memory(remedy: str) -> Iterator[None]:
    """Makes what torch, its libraries and Python raise for lack of memory an ``OutOfMemory`` that names a remedy."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError, RuntimeError) as e:
        known = isinstance(e, MemoryError | torch.OutOfMemoryError) or any(words in str(e) for words in OUT_OF_MEMORY)
        if not known:
            raise
        raise OutOfMemory(f"out of memory {remedy}") from e
