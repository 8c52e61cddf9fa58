"""Disks as some people have them: they refuse permissions, locks or the waiting for the disk."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.helpers.runs import ROOT

SOURCE = Path(__file__).with_name("failing_disk.c")


def failing_disk(folder: Path) -> str:
    """Compiles failing_disk.c; returns the path of the library."""
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs Linux and a C compiler")
    library = str(folder / "failing_disk.so")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, str(SOURCE), "-ldl"], check=True)
    return library


def run_on(library: str, argv: Sequence[str], cwd: Path, **errors: str) -> subprocess.CompletedProcess[str]:
    """Runs Python on a disk on which calls fail.

    Args:
        library: of ``failing_disk``.
        argv: Python's arguments.
        cwd: the current folder.
        errors: names of error numbers, by those of the calls: chmod, fsync, fsync_folder, close, lock.
    """
    failing = {f"FAIL_{call.upper()}": str(getattr(errno, name)) for call, name in errors.items()}
    env = {**os.environ, "LD_PRELOAD": library, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", **failing}
    return subprocess.run([sys.executable, *argv], cwd=cwd, env=env, text=True, capture_output=True, timeout=120)


@contextlib.contextmanager
def bindfs(folder: Path, *options: str) -> Iterator[None]:
    """Puts a file system with other rules over a folder."""
    folder.mkdir(exist_ok=True)
    words = ["bindfs", *options, str(folder), str(folder)]
    if not shutil.which("bindfs") or subprocess.run(words, capture_output=True).returncode:
        pytest.skip("needs bindfs, and the right to mount")
    try:
        yield
    finally:
        unmount = ["umount"] if os.geteuid() == 0 else ["fusermount", "-u"]
        subprocess.run([*unmount, "-z" if os.geteuid() else "-l", str(folder)], check=True)
