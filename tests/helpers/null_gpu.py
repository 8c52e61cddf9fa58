"""A GPU that is none: PyTorch's own CUDA code runs on it, and its kernels are counted and do nothing.

Devices, waits, launches, memory and the choice of kernels are those of a real GPU; what is read back is zeros or
garbage.  It is not part of the repository: the environment variable NULL_GPU names its folder, ../shared/nullgpu beside
the repository by default.  The fixture ``null_gpu`` builds it for the tests that need it, and skips them elsewhere.

``benchmarks.null_gpu`` is for the process that runs with it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
#: Variables that would make a process a rank, or part of the tests that start it.
OTHERS = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "MASTER_", "TORCHELASTIC_", "PYTEST_")


class NullGpu:
    """The null GPU, built for this PyTorch.

    Args:
        sources: its folder.
        built: the folder of its libraries.
    """

    def __init__(self, sources: Path, built: Path) -> None:
        self._run, self._built = sources / "run.sh", built

    def run(
        self,
        argv: Sequence[str],
        cwd: Path,
        capability: int = 90,
        gib: float = 79.1,
        count: int = 1,
        variables: Mapping[str, str] | None = None,
        timeout: int = 280,
    ) -> subprocess.CompletedProcess[str]:
        """Runs Python with it, one thread.

        Args:
            argv: Python's arguments.
            cwd: the current folder.
            capability: compute capability, such as 75, 80 or 90.
            gib: memory of each device.
            count: number of devices.
            variables: more of the environment.
            timeout: in seconds.
        """
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(OTHERS)}
        own = {"NULLGPU": str(self._built), "NULLGPU_CC": str(capability), "NULLGPU_GIB": str(gib)}
        own |= {"NULLGPU_COUNT": str(count), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(variables or {})}
        words = [str(self._run), sys.executable, *argv]
        return subprocess.run(words, cwd=cwd, env={**inherited, **own}, text=True, capture_output=True, timeout=timeout)


def build(folder: Path) -> NullGpu:
    """Builds the null GPU in a folder, unless it is there; skips the test, with the reason, where that cannot be."""
    sources = Path(os.environ.get("NULL_GPU") or ROOT.parent / "shared" / "nullgpu")
    if not (sources / "build.sh").is_file():
        pytest.skip(f"needs the null GPU of {sources}, which is absent (NULL_GPU names another folder)")
    if sys.platform != "linux" or not shutil.which("gcc"):
        pytest.skip("needs Linux and gcc, for the null GPU")
    if torch.version.cuda is None:
        pytest.skip("needs a PyTorch with CUDA, for the null GPU")
    import fcntl  # which not every system has

    with open(f"{folder}.lock", "w") as lock:  # another process of the tests may come at the same time
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            unfinished = folder.with_suffix(".unfinished")
            words = [str(sources / "build.sh"), str(unfinished), sys.executable]
            done = subprocess.run(words, text=True, capture_output=True, timeout=120)
            assert done.returncode == 0, f"the null GPU cannot be built: {done.stderr}"
            unfinished.rename(folder)
    return NullGpu(sources, folder)
