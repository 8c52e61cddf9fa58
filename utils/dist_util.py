"""The ranks of a run: how they meet, which one this is, and the few things they do together.

The other modules of ``utils`` may import this one.  With a single rank the collective functions do nothing,
so no caller needs to ask which case it is in.

Hosts communicate by Gloo, devices by NCCL or Gloo.  In preparations (``all_ranks_or_none``, ``main_process_first``)
a rank waits an hour for a download of another; in the training it gives up after ``Group.timeout``.
"""

from __future__ import annotations

import contextlib
import io
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils import console, hardware, rendezvous
from utils.errors import UserError

T = TypeVar("T")

#: The least time for preparations: one rank downloads or decodes, the others wait.
PREPARATION_TIMEOUT = timedelta(hours=1)


@dataclass
class Group:
    """The ranks that a launcher started together.

    Args:
        store: a key-value store that all of them reach.
        timeout: how long a rank waits for another in the training.
        hosts: host names by rank, for messages; empty until all have met.
        machines: by rank, what tells one machine from another; empty until all have met.
        device_group, host_group: process groups, there after ``setup``.
        error_reporter: the answer of ``dist_errors.is_error_reporter``; None until it was asked.
    """

    store: dist.Store
    timeout: timedelta
    hosts: list[str] = field(default_factory=list)
    machines: list[str] = field(default_factory=list)
    device_group: Any = None
    host_group: Any = None
    error_reporter: bool | None = None


_group: Group | None = None  # of the whole process, as PyTorch's default group


class FailedElsewhere(Exception):
    """Another rank failed, and reports its error to the user.

    Args:
        input_error: the error is a UserError.
    """

    def __init__(self, input_error: bool) -> None:
        super().__init__("another rank failed")
        self.input_error = input_error


# ---- joining and leaving ----


def setup(device_name: str, local_rank: int) -> torch.device:
    """Picks this rank's device, and joins the group that a launcher describes in the environment.

    Args:
        device_name: auto, cpu, cuda or mps.
        local_rank: the launcher's ``--local_rank``, or -1.

    Returns:
        The device, with its index if it is a GPU.

    Raises:
        UserError: there is no such device, or what started this process contradicts itself or lacks a launcher.
        ConnectionError: the other ranks cannot be reached.
        FailedElsewhere: another rank raised one of these.
    """
    if not hardware.launched():
        rendezvous.check_tasks()
        return hardware.pick_device(device_name, local_rank)
    joined = _join(rendezvous.read_timeout())
    with all_ranks_or_none():
        device = hardware.pick_device(device_name, local_rank)
        places = _all_gather((os.environ.get("GROUP_RANK", ""), socket.gethostname()))
        joined.hosts, joined.machines = [host for _, host in places], ["/".join(place) for place in places]
        # Groups of NCCL and of Gloo would wait for each other.
        check_same({"--device": device.type}, "let every rank compute on the same kind of device")
        hardware.share_processors()
    joined.host_group = joined.device_group = dist.new_group(backend="gloo", timeout=joined.timeout)
    if device.type == "cuda":
        # NCCL's watchdog ends the process with a stack: it must not be faster than our message.
        later = joined.timeout + timedelta(minutes=1)
        joined.device_group = dist.new_group(backend="nccl", timeout=later, device_id=device)
    return device


def _join(timeout: timedelta) -> Group:
    """Meets the other ranks and makes them the default group, of hosts; raises as ``setup``."""
    global _group
    rendezvous.check_variables()
    try:
        store, own_rank, size = next(dist.rendezvous("env://", timeout=timeout))
        # Before all have met, each machine has an error reporter of its own, in each of the launcher's attempts.
        machine, attempt = (os.environ.get(name, "") for name in ("GROUP_RANK", "TORCHELASTIC_RESTART_COUNT"))
        _group = Group(dist.PrefixStore(f"alone/{machine or socket.gethostname()}/{attempt}", store), timeout)
        _group.store = rendezvous.fresh_store(store, own_rank, size, timeout)
        dist.init_process_group("gloo", store=dist.PrefixStore("group", _group.store), rank=own_rank, world_size=size,
                                timeout=max(timeout, PREPARATION_TIMEOUT))  # fmt: skip
    except ValueError as e:
        raise UserError(f"what the launcher set cannot be used: {e}") from e
    except RuntimeError as e:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ConnectionError(
            f"rank {rank()} on {socket.gethostname()} does not reach the others at {address} "
            f"({str(e).splitlines()[0]}); start {os.environ['WORLD_SIZE']} ranks, let the "
            "machines connect, and see docs/distributed.md if machines joined later"
        ) from e
    return _group


def cleanup() -> None:
    """Leaves the group."""
    global _group
    _group = None
    if dist.is_initialized():
        dist.destroy_process_group()


# ---- who and where ----


def rank() -> int:
    """Returns this rank, from 0.  Known from the launcher before ``setup``."""
    return dist.get_rank() if dist.is_initialized() else _variable("RANK", 0)


def _variable(name: str, default: int) -> int:
    """Returns what a launcher set, the default without one; ``setup`` raises if it makes no sense."""
    text = os.environ.get(name, "") if hardware.launched() else ""
    return int(text) if text.isdecimal() else default


def world_size() -> int:
    """Returns the number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Returns true on the main process, rank 0, which logs and writes."""
    return rank() == 0


def is_first_of_machine() -> bool:
    """Returns true on the rank that downloads what its machine lacks.  A guess before ``setup``."""
    if _group is None or not _group.machines:
        return _variable("LOCAL_RANK", rank()) == 0
    return _group.machines.index(_group.machines[rank()]) == rank()


def group() -> Group | None:
    """Returns the ranks that this one has joined; None if it is alone."""
    return _group


def several_machines() -> bool:
    """Returns true if ranks may see different files."""
    return _group is not None and len(set(_group.machines)) > 1


def describe(other: int) -> str:
    """Names a rank and its machine, for messages."""
    host = f" ({_group.hosts[other]})" if _group and _group.hosts else ""
    return f"rank {other}{host}"


def bar_options() -> dict[str, Any]:
    """Returns tqdm's options: progress is shown by the main process only, and in lines where there is no terminal."""
    return console.bar_options() if is_main() else {"disable": True}


# ---- together ----


def _all_gather(value: Any = None, error: Exception | None = None) -> list[Any]:
    """Returns the value of every rank, by rank; every rank must call it.

    A rank that failed calls this once more, with its error, and then no more: the others hear of it
    wherever they exchange something next.

    Raises:
        FailedElsewhere: another rank came with an error; only to those that come without.
    """
    gathered: list[Any] = [None] * world_size()
    mine = (value, error and (isinstance(error, UserError), str(error)))
    dist.all_gather_object(gathered, mine)
    errors = [error for _, error in gathered]
    if error is not None:
        return errors
    for first in filter(None, errors):
        raise FailedElsewhere(first[0])
    return [value for value, _ in gathered]


def gather(value: Any) -> list[Any]:
    """Returns the value of every rank, by rank; every rank must call it, within ``all_ranks_or_none``."""
    return _all_gather(value) if dist.is_initialized() else [value]


@contextlib.contextmanager
def all_ranks_or_none() -> Iterator[None]:
    """Lets all ranks complete the block, or none: an error of one ends it for all.

    Raises:
        FailedElsewhere: to all but the first rank that has an error, which raises its own.
    """
    if not dist.is_initialized():
        yield
        return
    try:
        yield
    except FailedElsewhere:
        raise
    except Exception as e:
        if is_lost_contact(e):
            raise
        errors = _all_gather(error=e)
        first = next(i for i, error in enumerate(errors) if error)
        if first != rank():
            raise FailedElsewhere(errors[first][0]) from e
        if len(set(errors)) > 1 and isinstance(e, UserError | OSError):  # not of all ranks: name the one
            kind = UserError if isinstance(e, UserError) else OSError
            raise kind(f"{e} (on rank {first} of {world_size()}, {socket.gethostname()})") from e
        raise
    _all_gather()


@contextlib.contextmanager
def main_process_first() -> Iterator[None]:
    """Runs the block on the main process, then on the first rank of each other machine, then on the rest.

    For what one must prepare for all, with or without a shared disk; within ``all_ranks_or_none``.
    """
    turns = 3 if dist.is_initialized() else 1
    mine = 0 if is_main() or turns == 1 else 1 if is_first_of_machine() else 2
    for _ in range(mine):
        _all_gather()
    yield
    for _ in range(mine + 1, turns):
        _all_gather()


def check_same(values: dict[str, Any], remedy: str) -> None:
    """Raises UserError if ranks have different values; every rank must call it.

    Args:
        values: what must be the same, by its name.
        remedy: ends the message.
    """
    if not dist.is_initialized():
        return
    first, *others = _all_gather(values)
    differences = [
        f"{name} is {first.get(name)} on {describe(0)} and {other.get(name)} on {describe(i)}"
        for name in values
        for i, other in enumerate(others, 1)
        if other.get(name) != first.get(name)
    ]
    if differences:
        raise UserError(f"{'; '.join(differences[:3])}; {remedy}")


def broadcast_newest(x: T, version: tuple[Any, ...]) -> T:
    """Returns the ``x`` of the first rank that has the highest version; every rank must call it.

    Args:
        x: tensors, numbers and texts, in lists and dictionaries.
        version: tells a newer x from an older, and one from another.
    """
    if not dist.is_initialized():
        return x
    versions = _all_gather(version)
    if versions.count(version) == len(versions):
        return x
    source = versions.index(max(versions))
    buffer = io.BytesIO()
    if rank() == source:
        torch.save(x, buffer)
    size = _all_gather(buffer.getbuffer().nbytes)[source]
    data = torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8) if rank() == source else torch.empty(size).byte()
    for piece in data.split(2**28):  # bytes
        dist.broadcast(piece, source)
    return x if rank() == source else torch.load(io.BytesIO(data.numpy().tobytes()), weights_only=True)


def is_lost_contact(error: BaseException) -> bool:
    """Returns true if PyTorch raised this because another rank is gone or does not answer."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and dist.is_initialized() and "gloo" in str(error).lower()
    )


# ---- numbers and gradients ----


def barrier() -> None:
    """Waits until every rank is here."""
    if dist.is_initialized():
        dist.barrier()


def sum_over_ranks(x: Tensor) -> Tensor:
    """Adds a tensor up over all ranks, in place."""
    if _group is not None:
        dist.all_reduce(x, group=_group.device_group)
    return x


def max_over_ranks(x: int) -> int:
    """Returns the largest number of all ranks.  Numbers stay on the host: costs no wait for the device."""
    if _group is None:
        return x
    largest = torch.tensor(x)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=_group.host_group)
    return int(largest)


def wrap(model: nn.Module, bucket_views: bool = True) -> nn.Module:
    """Lets the backward pass average gradients over all ranks.

    Args:
        model: on its device.
        bucket_views: the gradients lie in the memory that is sent, which the next reduction overwrites.
    """
    if _group is None:
        return model
    group = _group.device_group
    return nn.parallel.DistributedDataParallel(model, process_group=group, gradient_as_bucket_view=bucket_views)


def sync_gradients(model: nn.Module, now: bool) -> contextlib.AbstractContextManager[None]:
    """Returns the context of a micro-batch's passes, which reduce the gradients ``now``, or leave that to a later."""
    if now or not isinstance(model, nn.parallel.DistributedDataParallel):
        return contextlib.nullcontext()
    return model.no_sync()
