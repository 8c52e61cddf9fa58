"""The memory that a process may still take; errors for lack of it, and what to do about them.

Sources of the files: man 5 proc; docs.kernel.org/admin-guide/cgroup-v2.html and cgroup-v1/memory.html.
This module must not know what takes the memory (utils/reckoning.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from utils import hardware

with contextlib.suppress(ImportError):  # Windows has none
    import resource

#: The share of the free memory that may be taken: on GPUs the rest is for the libraries' workspaces and kernels, and
#: for blocks that are larger than what was asked for.
CPU_SHARE, GPU_SHARE = 0.9, 0.95

#: Addresses that a process takes beside its tensors, once it trains: stacks and heaps of threads, modules.
OTHER_ADDRESSES = 2**28

#: Files of a control group, by version: limits, memory in use, and the key of what the kernel gives back when asked.
CGROUP_FILES = {
    2: (("memory.max", "memory.high"), "memory.current", "inactive_file"),
    1: (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"),
}

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


def free_bytes(device: torch.device, proc: str = "/proc", cgroups: str = "/sys/fs/cgroup") -> int | None:
    """Returns the bytes that this rank may still take on its device; None where nobody tells.

    Args:
        device: where the run computes.
        proc, cgroups: where the system shows its processes and its control groups.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(GPU_SHARE * (torch.cuda.mem_get_info(device)[0] + unused))
    if device.type != "cpu":
        return None
    shared = [*_of_machine(Path(proc)), *_of_control_groups(Path(proc), Path(cgroups))]
    each = [x // hardware.local_world_size() for x in shared]  # ranks of a machine all take as much
    found = [*each, *_of_limits(Path(proc))]
    return int(CPU_SHARE * max(min(found), 0)) if found else None


def _of_machine(proc: Path) -> list[int]:
    """Returns what the machine has to give, if it tells."""
    return [1024 * x for x in [_value(proc / "meminfo", "MemAvailable:")] if x is not None]


def _of_limits(proc: Path) -> list[int]:
    """Returns what is left below the limits of this process (``ulimit -v``, ``ulimit -d``)."""
    left = []
    for name, key in (("RLIMIT_AS", "VmSize:"), ("RLIMIT_DATA", "VmData:")):
        used = _value(proc / "self" / "status", key)
        if used is None:
            continue
        limit, _ = resource.getrlimit(getattr(resource, name))
        if limit != resource.RLIM_INFINITY:
            left.append(limit - 1024 * used - OTHER_ADDRESSES)
    return left


def _of_control_groups(proc: Path, cgroups: Path) -> list[int]:
    """Returns what is left below the limits of this process's control group and of those around it.

    A container may see the names that its groups have outside: then only the outermost folder is there, its own.
    """
    left = []
    for line in _text(proc / "self" / "cgroup").splitlines():
        number, controllers, name = line.split(":", 2)
        if number != "0" and "memory" not in controllers.split(","):
            continue
        version, root = (2, cgroups) if number == "0" else (1, cgroups / "memory")
        limits, current, unneeded = CGROUP_FILES[version]
        group = root / name.lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(root):
                break
            used = _value(folder / current)
            if used is not None:
                used -= _value(folder / "memory.stat", unneeded) or 0
                left += [x - used for x in (_value(folder / limit) for limit in limits) if x is not None]
    return left


def _value(path: Path, key: str = "") -> int | None:
    """Returns the number that a line of a file has after a key; None where there is none, such as "max"."""
    for line in _text(path).splitlines():
        words = line.split()
        if key:
            if words[:1] != [key]:
                continue
            words = words[1:]
        return int(words[0]) if words and words[0].isdecimal() else None
    return None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:  # another system or version, or not ours to see
        return ""
