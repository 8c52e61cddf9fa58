"""The processes of a run: who this one is, and the few things they do together.

The module of ``utils`` that its neighbours may import.  With a single process the collective
functions do nothing, so that no caller needs to ask which case it is in.

Hosts talk by Gloo, devices by NCCL or Gloo.  What may take as long as a download (``all_ranks_or_none``,
``main_process_first``) has an hour; in the training, who waits for another for more than ``timeout()`` gives up.
"""

from __future__ import annotations

import contextlib
import io
import os
import socket
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils import hardware
from utils.errors import UserError

T = TypeVar("T")

#: Seconds that a process waits for another in the training; what launchers set cannot say it.
TIMEOUT_VARIABLE = "TRAIN_TIMEOUT_SECS"
#: At least so long in preparations: one downloads or decodes, the others wait.
PATIENCE = timedelta(hours=1)


@dataclass
class Group:
    """The processes that a launcher started together: where they meet, and which machines they are on."""

    store: dist.Store
    hosts: list[str] = field(default_factory=list)  # by rank, their names for messages; empty until all have met
    machines: list[str] = field(default_factory=list)  # by rank, what tells one machine from another
    device_group: Any = None  # process groups, once ``setup`` is through
    host_group: Any = None
    tells: bool | None = None  # once ``dist_errors.is_error_reporter`` was asked


_group: Group | None = None  # as the default group, which PyTorch keeps the same way


class FailedElsewhere(Exception):
    """Another process of the run found an error, which it tells the user.

    Args:
        input_error: it was a UserError.
    """

    def __init__(self, input_error: bool) -> None:
        super().__init__("another process failed")
        self.input_error = input_error


# ---- joining and leaving ----


def setup(device_name: str, local_rank: int) -> torch.device:
    """Picks this process's device, and joins the group that a launcher describes in the environment.

    Args:
        device_name: auto, cpu, cuda or mps.
        local_rank: what the launcher passed as ``--local_rank``, or -1.

    Returns:
        The device, with its number if it is a GPU.

    Raises:
        UserError: there is no such device, or ``local_rank`` lacks a launcher or contradicts it.
        ConnectionError: the other processes cannot be reached.
        FailedElsewhere: another process raised one of these.
    """
    if "WORLD_SIZE" not in os.environ:
        return hardware.pick_device(device_name, local_rank)
    longest, run = timeout(), _join()
    with all_ranks_or_none():
        device = hardware.pick_device(device_name, local_rank)
        found = _exchange((os.environ.get("GROUP_RANK", ""), socket.gethostname()))
        run.hosts, run.machines = [host for _, host in found], ["/".join(pair) for pair in found]
        # Groups of NCCL and of Gloo would wait for each other.
        check_same({"--device": device.type}, "let every process compute on the same kind of device")
        hardware.share_processors()
    run.host_group = run.device_group = dist.new_group(backend="gloo", timeout=longest)
    if device.type == "cuda":
        # Its own watchdog, which ends the process with a stack, must not be faster than our message.
        later = longest + timedelta(minutes=1)
        run.device_group = dist.new_group(backend="nccl", timeout=later, device_id=device)
    return device


def timeout() -> timedelta:
    """How long a process waits for another while training.

    Raises:
        UserError: ``TRAIN_TIMEOUT_SECS`` is not a number of seconds.
    """
    text = os.environ.get(TIMEOUT_VARIABLE, "600")
    if not text.isdecimal() or not 0 < int(text) <= 86400:
        raise UserError(f"{TIMEOUT_VARIABLE}={text}: expected seconds, from 1 to 86400")
    return timedelta(seconds=int(text))


def _join() -> Group:
    """Meets the other processes and makes them the default group, of hosts.

    Raises:
        UserError, ConnectionError: as ``setup``.
    """
    global _group
    try:
        store, number, size = next(dist.rendezvous("env://", timeout=timeout()))
        # Who fails before all have met tells for its machine, in each of the launcher's attempts once.
        machine, attempt = (os.environ.get(name, "") for name in ("GROUP_RANK", "TORCHELASTIC_RESTART_COUNT"))
        _group = Group(dist.PrefixStore(f"alone/{machine or socket.gethostname()}/{attempt}", store))
        _group.store = _fresh(store, number, size)
        dist.init_process_group("gloo", store=dist.PrefixStore("group", _group.store), rank=number, world_size=size,
                                timeout=max(timeout(), PATIENCE))  # fmt: skip
    except ValueError as e:
        raise UserError(f"what the launcher set cannot be used: {e}") from e
    except RuntimeError as e:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ConnectionError(
            f"process {rank()} on {socket.gethostname()} does not reach the others by {where} "
            f"({str(e).splitlines()[0]}); start {os.environ['WORLD_SIZE']} processes, let the "
            "machines connect, and see docs/distributed.md if machines joined later"
        ) from e
    return _group


def _fresh(store: dist.Store, number: int, size: int) -> dist.Store:
    """A part of the store that nobody used before.

    torchrun keeps its store when it starts the processes again, and PyTorch (2.14) would read there where
    those before them listened.  The count of restarts is no remedy: each machine has its own.  So the first
    process makes a name up, and gives it to whoever asks with a word that is new as well.
    """
    if number:
        word = uuid.uuid4().hex
        store.set(f"word/{number}", word)
        name = store.get(f"name/{word}").decode()
        store.add(f"{name}/here", 1)
        return dist.PrefixStore(name, store)
    name, missing = uuid.uuid4().hex, range(1, size)
    deadline = time.monotonic() + timeout().total_seconds()
    while store.add(f"{name}/here", 0) < size - 1:
        for other in missing:
            if store.check([f"word/{other}"]):
                store.set(f"name/{store.get(f'word/{other}').decode()}", name)
        if time.monotonic() > deadline:
            raise RuntimeError(f"{store.add(f'{name}/here', 0) + 1} of {size} processes came")
        time.sleep(0.02)
    return dist.PrefixStore(name, store)


def cleanup() -> None:
    """Leaves the process group."""
    global _group
    _group = None
    if dist.is_initialized():
        dist.destroy_process_group()


# ---- who and where ----


def rank() -> int:
    """This process's number among all, from 0.  Known from the launcher before ``setup``."""
    return dist.get_rank() if dist.is_initialized() else _number("RANK", 0)


def _number(variable: str, otherwise: int) -> int:
    """What a launcher set; whether it makes sense is for ``setup`` to say."""
    text = os.environ.get(variable, "")
    return int(text) if text.isdecimal() else otherwise


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process is the one that logs and writes."""
    return rank() == 0


def is_first_of_machine() -> bool:
    """Whether this process is the one that downloads what its machine lacks.  A guess before ``setup``."""
    if _group is None or not _group.machines:
        return _number("LOCAL_RANK", rank()) == 0
    return _group.machines.index(_group.machines[rank()]) == rank()


def group() -> Group | None:
    """Returns what this process knows of the others; None if it is alone."""
    return _group


def several_machines() -> bool:
    """Whether processes may see different files."""
    return _group is not None and len(set(_group.machines)) > 1


def bar_options() -> dict[str, Any]:
    """How tqdm shows progress: on the main process only, and rarely where the bar goes to a file."""
    return {"disable": not is_main(), "mininterval": 0.1 if sys.stderr.isatty() else 10, "dynamic_ncols": True}


# ---- one fate ----


def _exchange(value: Any = None, error: Exception | None = None) -> list[Any]:
    """What every process gave, by rank; every process must take part.

    A process that failed calls this once more, with its error, and then no more: the others, wherever
    they exchange something next, hear of it.

    Raises:
        FailedElsewhere: another process came with an error; only to those who come without.
    """
    found: list[Any] = [None] * world_size()
    mine = (value, error and (isinstance(error, UserError), str(error)))
    dist.all_gather_object(found, mine)
    errors = [error for _, error in found]
    if error is not None:
        return errors
    for first in filter(None, errors):
        raise FailedElsewhere(first[0])
    return [value for value, _ in found]


@contextlib.contextmanager
def all_ranks_or_none() -> Iterator[None]:
    """All processes come out of the block well, or none: an error of one ends it for all.

    Raises:
        FailedElsewhere: to all but the first process that has an error, which raises its own.
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
        errors = _exchange(error=e)
        first = next(i for i, error in enumerate(errors) if error)
        if first != rank():
            raise FailedElsewhere(errors[first][0]) from e
        if len(set(errors)) > 1 and isinstance(e, UserError | OSError):  # say whose it is
            kind = UserError if isinstance(e, UserError) else OSError
            raise kind(f"{e} (says process {first} of {world_size()}, on {socket.gethostname()})") from e
        raise
    _exchange()


@contextlib.contextmanager
def main_process_first() -> Iterator[None]:
    """The main process runs the block alone, then the first of each other machine, then the rest.

    For what one must prepare for all, whether or not the machines share a disk; within ``all_ranks_or_none``.
    """
    turns = 3 if dist.is_initialized() else 1
    mine = 0 if is_main() or turns == 1 else 1 if is_first_of_machine() else 2
    for _ in range(mine):
        _exchange()
    yield
    for _ in range(mine + 1, turns):
        _exchange()


def check_same(values: dict[str, Any], what: str) -> None:
    """Raises UserError if processes have different values; every process must take part.

    Args:
        values: what must be the same, by its name.
        what: ends the message: the remedy.
    """
    if not dist.is_initialized():
        return
    found = _exchange(values)
    differences = [
        f"{name} is {found[0].get(name)} on {place(0)} and {other.get(name)} on {place(i)}"
        for name in values
        for i, other in list(enumerate(found))
        if other.get(name) != found[0].get(name)
    ]
    if differences:
        raise UserError(f"{'; '.join(differences[:3])}; {what}")


def place(number: int) -> str:
    """Names a process and its machine, for messages."""
    host = f" ({_group.hosts[number]})" if _group and _group.hosts else ""
    return f"process {number}{host}"


def broadcast_newest(x: T, version: tuple[Any, ...]) -> T:
    """The ``x`` of the process that has the highest version, the first of them, for all; every process must ask.

    Args:
        x: tensors, numbers and texts, in lists and dictionaries.
        version: tells a newer x from an older, and one from another.
    """
    if not dist.is_initialized():
        return x
    versions = _exchange(version)
    if versions.count(version) == len(versions):
        return x
    source = versions.index(max(versions))
    buffer = io.BytesIO()
    if rank() == source:
        torch.save(x, buffer)
    size = _exchange(buffer.getbuffer().nbytes)[source]
    data = torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8) if rank() == source else torch.empty(size).byte()
    for part in data.split(2**28):  # bytes
        dist.broadcast(part, source)
    return x if rank() == source else torch.load(io.BytesIO(data.numpy().tobytes()), weights_only=True)


# ---- the end of others ----


def is_lost_contact(error: BaseException) -> bool:
    """Whether PyTorch raised this because another process is gone or does not answer."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and dist.is_initialized() and "gloo" in str(error).lower()
    )


# ---- numbers and gradients ----


def barrier() -> None:
    """Waits until every process is here."""
    if dist.is_initialized():
        dist.barrier()


def sum_over_ranks(x: Tensor) -> Tensor:
    """Adds a tensor up over all processes, in place."""
    if _group is not None:
        dist.all_reduce(x, group=_group.device_group)
    return x


def max_over_ranks(x: int) -> int:
    """The largest of all processes' numbers, which stay on the host: costs no wait for the device."""
    if _group is None:
        return x
    largest = torch.tensor(x)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=_group.host_group)
    return int(largest)


def wrap(model: nn.Module) -> nn.Module:
    """Lets the backward pass average gradients over all processes."""
    if _group is None:
        return model
    return nn.parallel.DistributedDataParallel(model, process_group=_group.device_group, gradient_as_bucket_view=True)


def unwrap(model: nn.Module) -> nn.Module:
    """The model that ``wrap`` wrapped."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def sync_gradients(model: nn.Module, now: bool) -> contextlib.AbstractContextManager[None]:
    """Context of one forward and backward pass: reduces gradients only in an update's last one."""
    if now or not isinstance(model, nn.parallel.DistributedDataParallel):
        return contextlib.nullcontext()
    return model.no_sync()
