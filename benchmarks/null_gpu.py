"""The null GPU (CONTRIBUTING.md) as seen from the process that runs with it: what it was asked to do."""

from __future__ import annotations

import contextlib
import ctypes
import os
import tempfile
from collections.abc import Iterator


def is_null() -> bool:
    """Tells if this process runs with the null GPU."""
    return "libnullgpu" in os.environ.get("LD_PRELOAD", "")


def note(text: str) -> None:
    """Writes a line of its own into the ``log``."""
    ctypes.CDLL(None).nullgpu_note(text.encode())


@contextlib.contextmanager
def log() -> Iterator[list[str]]:
    """Gives the lines that the null GPU writes in the block, once it is over.

    They begin with what was done: KERNEL (launched), GEMM (a product), COPY, SYNC (waited for), MALLOC, NCCL, NOTE.
    """
    lines: list[str] = []
    null = ctypes.CDLL(None)
    with tempfile.NamedTemporaryFile("r") as file:
        null.nullgpu_open(file.name.encode())
        null.nullgpu_log(1)
        try:
            yield lines
        finally:
            null.nullgpu_log(0)
            null.nullgpu_open(None)
            lines += file.read().splitlines()
