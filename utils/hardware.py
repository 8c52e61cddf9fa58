"""The hardware of one process: its device, its share of the processors, and memory that it keeps.

Knows of other ranks only how many a launcher started on this machine, and which of them this one is.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import os
import platform

import torch

from utils.errors import UserError

#: What --device may be, in train.py and the tools.
DEVICES = ("auto", "cpu", "cuda", "mps")

#: The variables that a process, here the launcher, was started with; on Linux.
LAUNCHERS_ENVIRONMENT = "/proc/{}/environ"

#: Instruction sets that decide how fast a CPU's matrix products are.
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16", "bf16", "i8mm", "sve")

#: Settings with which cuBLAS adds up in one order; source: pytorch.org/docs/stable/notes/randomness.html.
CUBLAS_WORKSPACES = (":4096:8", ":16:8")


def launched() -> bool:
    """Returns true if a launcher started this process as one of several ranks, or as the only one but one to be met.

    Shells, containers and schedulers may set some of a launcher's variables, or empty ones: they make no ranks.
    """
    size = os.environ.get("WORLD_SIZE", "").strip()
    if size == "1":
        return bool(os.environ.get("RANK") and (os.environ.get("MASTER_ADDR") or os.environ.get("MASTER_PORT")))
    return bool(size)


def pick_device(name: str, local_rank: int) -> torch.device:
    """Returns the device that this process computes on, made ready for it; see ``dist_util.setup``.

    On CUDA it also takes attention from cuDNN, in the whole process: ``process_restored`` gives it back.

    Raises:
        UserError: there is no such device, or ``local_rank`` lacks a launcher or contradicts it.
    """
    kind = device_type(name)
    is_rank = launched()
    env_rank = _number("LOCAL_RANK", max(local_rank, 0)) if is_rank else 0  # some launchers pass the flag alone
    if not is_rank and local_rank > 0:
        raise UserError(
            f"--local_rank {local_rank} without a launcher; start several ranks with "
            "`torchrun --nproc_per_node=N` in place of `python`"
        )
    if is_rank and local_rank not in (-1, env_rank):
        raise UserError(f"--local_rank {local_rank} contradicts LOCAL_RANK={env_rank}; leave the flag to the launcher")
    if kind == "cuda":
        if env_rank >= torch.cuda.device_count():
            raise UserError(f"local rank {env_rank} finds {torch.cuda.device_count()} GPUs; start fewer ranks")
        torch.cuda.set_device(env_rank)
        # Of half-precision attention on Hopper, which torch leaves to cuDNN of itself.  There cuDNN's backward pass has
        # returned NaN for scores below -89: with a mask (github.com/pytorch/pytorch/issues/196678), and with a single
        # query and 128 keys (github.com/NVIDIA/cudnn-frontend/issues/1072).  This model has no mask and never 128
        # tokens, but such a query and such scores it may have; the flash kernel takes its place.
        torch.backends.cuda.enable_cudnn_sdp(False)
    if kind == "cpu":
        _keep_freed_memory()
    return torch.device("cuda", env_rank) if kind == "cuda" else torch.device(kind)


def device_type(name: str) -> str:
    """Returns the kind of device that --device means here; raises UserError if there is none."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if launched():
        if name == "mps":
            raise UserError("--device mps: several ranks reduce gradients on cuda or cpu only; use --device cpu")
        available["mps"] = False
    if name == "auto":
        return next(kind for kind, there in available.items() if there)
    if not available[name]:
        raise UserError(f"--device {name}: this machine or this PyTorch has none; use --device auto")
    return name


def make_deterministic() -> None:
    """Lets CUDA compute the same bits in every run; must come before it computes anything.

    Raises:
        UserError: the environment forbids it.
    """
    workspace = os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACES[0])
    if workspace not in CUBLAS_WORKSPACES:
        raise UserError(
            f"--deterministic: CUBLAS_WORKSPACE_CONFIG is {workspace}, "
            f"expected {' or '.join(CUBLAS_WORKSPACES)}; unset it"
        )
    torch.use_deterministic_algorithms(True)
    # Filling takes time, and nothing here reads such memory.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Moves a tensor to a device.  The host does not wait for CUDA, and may let go of the source at once."""
    return x.to(device, non_blocking=device.type == "cuda")


def _keep_freed_memory() -> None:
    """Lets the C library keep what tensors free, for the next ones.

    By default glibc gives blocks of megabytes back to the kernel at once, and every step faults its
    activations in anew: a tenth of its time.  Elsewhere than on glibc nothing happens.
    """
    m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(m_trim_threshold, 2**31 - 1)
        mallopt(m_mmap_max, 0)


def device_name(device: torch.device) -> str:
    """Returns the name of the hardware that computes, as its maker gives it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as f:
            for line in f:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def processor(device: torch.device) -> str:
    """Returns the kind of what computes: a device's name and, of a CPU on Linux, those of CPU_FLAGS that it has."""
    if device.type != "cpu":
        return device_name(device)
    flags: set[str] = set()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as f:
        for line in f:
            key, _, value = line.partition(":")
            if key.strip() in ("flags", "Features"):
                flags |= set(value.split())
    return f"{device_name(device)} ({', '.join(flag for flag in CPU_FLAGS if flag in flags) or 'no known flag'})"


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that compute, and the system."""
    known = {"Python": platform.python_version()}
    for package in ("torch", "torchvision", "numpy", "tensorboard", "Pillow"):
        try:
            known[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # built from source, without its metadata
            known[package] = "unknown"
    return {**known, "system": platform.platform(terse=True), "machine": platform.machine()}


# ---- processors ----


def num_cpus() -> int:
    """Counts the processors that this process may use: its share, where a launcher started several on this machine."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(there // local_world_size(), 1)


def local_world_size() -> int:
    """Returns the number of ranks that a launcher started on this machine."""
    return max(_number("LOCAL_WORLD_SIZE", 1), 1) if launched() else 1


def _number(variable: str, otherwise: int) -> int:
    text = os.environ.get(variable) or str(otherwise)
    if not text.isdecimal():
        raise UserError(f"{variable}={text}: expected a number, as launchers set it; unset it, or mend the launcher")
    return int(text)


def share_processors() -> None:
    """Gives each rank its share of the machine's threads, unless the user chose with OMP_NUM_THREADS."""
    if local_world_size() > 1 and ("OMP_NUM_THREADS" not in os.environ or _set_by_torchrun()):
        torch.set_num_threads(num_cpus())


def _set_by_torchrun() -> bool:
    """Recognises torchrun's own OMP_NUM_THREADS=1, which is not in the environment that torchrun was given."""
    if os.environ["OMP_NUM_THREADS"] != "1" or "TORCHELASTIC_RUN_ID" not in os.environ:
        return False
    try:
        with open(LAUNCHERS_ENVIRONMENT.format(os.getppid()), "rb") as f:
            return not any(line.startswith(b"OMP_NUM_THREADS=") for line in f.read().split(b"\0"))
    except OSError:  # another system, or another user's process
        return False
