"""The processes of a run: who this one is, and the few things they do together.

The only module of ``utils`` that its neighbours may import.  With a single process the collective
functions do nothing, so that no caller needs to ask which case it is in.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def setup(device_name: str, local_rank: int) -> torch.device:
    """Picks this process's device, and joins the group that a launcher describes in the environment.

    Args:
        device_name: auto, cpu, cuda or mps.
        local_rank: what the launcher passed as ``--local_rank``, or -1.

    Returns:
        The device, with its number if it is a GPU.

    Raises:
        ValueError: there is no such device, or ``local_rank`` lacks a launcher or contradicts it.
    """
    kind = device_type(device_name)
    env_rank = int(os.environ.get("LOCAL_RANK", max(local_rank, 0)))  # some launchers pass the flag alone
    if "WORLD_SIZE" not in os.environ and local_rank > 0:
        raise ValueError(
            f"--local_rank {local_rank} without a launcher; start several processes with "
            "`torchrun --nproc_per_node=N train.py ...`"
        )
    if "WORLD_SIZE" in os.environ and local_rank not in (-1, env_rank):
        raise ValueError(f"--local_rank {local_rank} contradicts LOCAL_RANK={env_rank}; leave the flag to the launcher")
    if kind == "cuda":
        if env_rank >= torch.cuda.device_count():
            raise ValueError(f"process {env_rank} of this machine finds {torch.cuda.device_count()} GPUs; start fewer")
        torch.cuda.set_device(env_rank)
    if kind == "cpu":
        _keep_freed_memory()
    device = torch.device("cuda", env_rank) if kind == "cuda" else torch.device(kind)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", device_id=device if kind == "cuda" else None)
    return device


def device_type(name: str) -> str:
    """The kind of device that --device means here; see ``setup``."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if "WORLD_SIZE" in os.environ:
        if name == "mps":
            raise ValueError("--device mps: several processes reduce gradients on cuda or cpu only; use --device cpu")
        available["mps"] = False
    if name == "auto":
        return next(kind for kind, there in available.items() if there)
    if not available[name]:
        raise ValueError(f"--device {name}: this machine or this PyTorch has none; use --device auto")
    return name


def _keep_freed_memory() -> None:
    """Lets the C library keep what tensors free, for the next ones.

    By default glibc gives blocks of megabytes back to the kernel at once, and every update faults its
    activations in anew: a tenth of its time.  Elsewhere than on glibc nothing happens.
    """
    m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(m_trim_threshold, 2**31 - 1)
        mallopt(m_mmap_max, 0)


def cleanup() -> None:
    """Leaves the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process's number among all, from 0.  Known from the launcher before ``setup``."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process is the one that logs, writes and downloads."""
    return rank() == 0


def num_cpus() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device_name(device: torch.device) -> str:
    """What a person calls the hardware that computes."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as f:
            for line in f:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def bar_options() -> dict[str, Any]:
    """How tqdm shows progress: on the main process only, and rarely where the bar goes to a file."""
    return {"disable": not is_main(), "mininterval": 0.1 if sys.stderr.isatty() else 10, "dynamic_ncols": True}


def barrier() -> None:
    """Waits until every process is here."""
    if dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """The main process runs the block alone, then the others do: for what one must prepare for all."""
    if not is_main():
        barrier()
    try:
        yield
    finally:  # the others must not wait for one that failed
        if is_main():
            barrier()


def sum_over_ranks(x: Tensor) -> Tensor:
    """Adds a tensor up over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


@functools.cache
def _host_group() -> Any:
    """A group whose reductions do not wait for a GPU; None is the default group."""
    return None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")


def max_over_ranks(x: int) -> int:
    """The largest of all processes' numbers, which stay on the host: costs no wait for the device."""
    if not dist.is_initialized():
        return x
    largest = torch.tensor(x)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=_host_group())
    return int(largest)


def wrap(model: nn.Module) -> nn.Module:
    """Lets the backward pass average gradients over all processes."""
    if not dist.is_initialized():
        return model
    return nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)


def unwrap(model: nn.Module) -> nn.Module:
    """The model that ``wrap`` wrapped."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def sync_gradients(model: nn.Module, now: bool) -> contextlib.AbstractContextManager[None]:
    """Context of one forward and backward pass: reduces gradients only in an update's last one."""
    if now or not isinstance(model, nn.parallel.DistributedDataParallel):
        return contextlib.nullcontext()
    return model.no_sync()
