"""The processes that decode images for a rank: how they live through signals, and how their errors arrive.

A worker hands a batch over in shared memory, and sends that memory's file descriptor through a socket.  Each of these
may fail, and by itself torch would then wait for ever: here an error comes in the place of its batch, and ends the run.

This module must not know what they decode.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import functools
import math
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator, Sequence
from multiprocessing import connection, queues, util
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from types import TracebackType
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from utils import hardware, signals

#: Seconds between a worker's looks at its run, which may have ended.
LOOK_SECS = 0.5
#: No more open files for a process, or for the system: also a worker's exit code.
NO_FILES = (errno.EMFILE, errno.ENFILE)
#: Seconds in which a worker that broke off a connection is seen to be dead.
DEATH_SECS = 2


@contextlib.contextmanager
def _signals_later() -> Iterator[None]:
    """Holds back signals while workers start: they inherit that, and would die of one until they are ready."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals.SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def outlive_signals(worker: int) -> None:
    """Keeps a worker alive on what stops a run and may reach all processes: the current step needs its images."""
    sys.excepthook = _print_unless_cut_off
    with contextlib.suppress(OSError):
        for fd in (os.dup(2), os.dup(2)):  # with which one that has no more files removes its temporary folder
            util.Finalize(None, os.close, (fd,), exitpriority=-50)
    for number in set(signals.SIGNALS) - {signal.SIGTERM}:  # by which the run ends it
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigtimedwait"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_the_run, daemon=True).start()


def _print_unless_cut_off(kind: type[BaseException], error: BaseException, stack: TracebackType | None) -> None:
    """Leaves out the stack of the thread that hands tensors over, when the run ends in the middle of that.

    Without file descriptors that thread would try again for ever: it ends its process, as ``explain_death`` tells.
    """
    if isinstance(error, OSError) and error.errno in NO_FILES:
        os._exit(error.errno)
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, stack)


def _end_with_the_run() -> None:
    """Ends this worker when its run asks for it, or soon after the run ended (torch looks every five seconds)."""
    run, parent = multiprocessing.parent_process(), os.getppid()  # these differ where a server forks the workers
    while os.getppid() == parent:
        asked = signal.sigtimedwait({signal.SIGTERM}, LOOK_SECS)
        if asked is not None and run is not None and asked.si_pid == run.pid:
            break
    os._exit(0)


# ---- batches on their way ----


class _Lost(Exception):
    """Stands for a batch that did not come through; ``error`` is why."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


class _Queue(queues.Queue):
    """A queue of numbered batches whose every number arrives, with an error where the batch cannot be sent or received.

    Python's pickles in a thread of the sender, which prints such an error's stack and drops the item.
    """

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        """Sends a pair of a number and a batch, or None for the end."""
        super().put(item and (item[0], _pickled(item[1])), block, timeout)

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """Returns what ``put`` sent."""
        item = super().get(block, timeout)
        try:
            return item and (item[0], ForkingPickler.loads(item[1]))
        except Exception as e:  # whatever it is, it is told under the batch's number; its frames would keep the loader
            return item[0], _Lost(e.with_traceback(None))


def _pickled(batch: Any) -> bytes:
    try:
        return bytes(ForkingPickler.dumps(batch))
    except Exception as e:  # as in ``get``
        return bytes(ForkingPickler.dumps(_Lost(e)))


def context(num_workers: int) -> BaseContext | None:
    """Returns what a DataLoader makes its processes and queues with; None if it has none."""
    if not num_workers:
        return None
    made = copy.copy(multiprocessing.get_context())
    vars(made)["Queue"] = functools.partial(_Queue, ctx=made)
    return made


def share(batch: tuple[Tensor, ...], smaller: str) -> tuple[Tensor, ...]:
    """Moves a batch of a worker into shared memory, from where the run takes it; one of the run itself stays.

    Args:
        batch: images and labels.
        smaller: the flag that makes it smaller, for the message.

    Raises:
        OSError: there is no room, or another reason.
        MemoryError: the system has no memory.
    """
    worker = get_worker_info()
    if worker is None:
        return batch
    try:
        for x in batch:
            x.share_memory_()
    except RuntimeError as e:  # it ends as the system says it: "No space left on device (28)"
        if not str(e).endswith(f"({errno.ENOSPC})"):
            raise _not_handed_over(e) from e
        num_bytes = sum(x.nbytes for x in batch)
        raise OSError(_no_room(2 * worker.num_workers, num_bytes, smaller)) from e  # each prepares two
    return batch


def _no_room(num_batches: int, num_bytes: int, smaller: str) -> str:
    """Explains that so many batches do not fit into the shared memory."""
    disk, need = os.statvfs("/dev/shm"), num_batches * num_bytes
    total, free = (_megabytes(blocks * disk.f_frsize) for blocks in (disk.f_blocks, disk.f_bavail))
    num_ranks = hardware.local_world_size()
    enough = math.ceil(2 * num_ranks * need / 2**30)  # twice: an evaluation's batches come beside the training's
    return (
        f"/dev/shm is too small for the batches that worker processes decode: {num_batches} of {_megabytes(num_bytes)} "
        f"(two for each of --num_workers) need {_megabytes(need)}{' on each rank' if num_ranks > 1 else ''}; it has "
        f"{total}, {free} of them free; enlarge it (Docker: --shm-size {enough}g; Kubernetes: an emptyDir of medium "
        f"Memory at /dev/shm), or give --num_workers 0 or {smaller}"
    )


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.0f} MB"  # as Docker and mount count them


def _not_handed_over(error: Exception) -> Exception:
    """Returns what is raised where workers cannot hand over their batches: the reason and a remedy."""
    text, remedy = str(error) or type(error).__name__, ""
    if isinstance(error, MemoryError) or os.strerror(errno.ENOMEM) in text:
        return MemoryError(text)
    if os.strerror(errno.EMFILE) in text or "items of ancdata" in text:
        text, remedy = "too many open files", "raise the limit (ulimit -n), or "
    elif "AF_UNIX path too long" in text:
        remedy = f"set TMPDIR to a shorter path than {tempfile.gettempdir()}, or "
    elif os.strerror(errno.ENOSPC) in text:
        remedy = f"make room in /dev/shm (Docker: --shm-size) and {tempfile.gettempdir()}, or "
    return OSError(
        f"worker processes cannot hand over the images that they decode: {text}; {remedy}give --num_workers 0"
    )


# ---- their ends ----


def worker_died(error: BaseException) -> bool:
    """Recognises the death of a worker, which torch raises wherever the program is then."""
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid")


def explain_death(error: BaseException) -> str:
    """Tells the user what ``worker_died`` recognised."""
    text = f"{error} {error.__cause__ or ''}"  # the cause is there if it came while the run waited for a batch
    if found := re.search(r"exit code (\d+)", text):
        if int(found[1]) in NO_FILES:
            return str(_not_handed_over(OSError(int(found[1]), os.strerror(int(found[1])))))
        return f"a process that decodes images ended with exit code {found[1]}; --num_workers 0 may show why"
    if (found := re.search(r"killed by signal: ([\w ]*\w)", text)) and found[1] != "Killed":
        return f"a process that decodes images was killed ({found[1]}): an image may crash what decodes it"
    return "a process that decodes images was killed, perhaps for lack of memory; fewer --num_workers need less"


def batches_of(loader: DataLoader) -> Iterator[Any]:
    """Starts the workers and yields their batches; an error that came in the place of a batch is raised.

    Raises:
        ChildProcessError: one of them died.
        OSError, MemoryError: they cannot be started, or a batch cannot be handed over.
    """
    others = multiprocessing.active_children()
    try:
        with _signals_later():
            batches = iter(loader)  # starts the workers
    except OSError as e:
        _free(e)
        raise _not_handed_over(e) from e
    workers = [p for p in multiprocessing.active_children() if p not in others]
    try:
        for batch in batches:
            if isinstance(batch, _Lost):
                raise _explained(batch.error, workers) from batch.error
            if isinstance(batch, OSError) and workers and batch.errno in (*NO_FILES, errno.ENOMEM):
                raise _not_handed_over(batch)
            if isinstance(batch, Exception):
                raise batch
            yield batch
    except RuntimeError as e:
        if not worker_died(e):
            raise
        raise _explained(e, workers) from e
    finally:
        del batches  # ends the workers, though an error that a batch was keeps this frame


def _free(error: OSError) -> None:
    """Ends what torch had started before an error; its clean-up is not made for that, and prints a stack."""
    before, sys.unraisablehook = sys.unraisablehook, lambda _: None
    traceback.clear_frames(error.__traceback__)
    sys.unraisablehook = before


def _explained(error: Exception, workers: Sequence[BaseProcess]) -> Exception:
    """Returns what is raised for a batch that did not come through.

    A worker's exit code is asked first: torch tells of it from a signal's handler, which a clean-up may swallow.
    """
    died = worker_died(error)
    if died or isinstance(error, ConnectionError | EOFError):  # of a worker that dies while it hands over a batch
        ended = connection.wait([p.sentinel for p in workers], DEATH_SECS)
        for p in workers:
            p.join(DEATH_SECS if p.sentinel in ended else 0)  # its files are closed a moment before it is gone
        if codes := [p.exitcode for p in workers if p.exitcode]:
            cause = f"exit code {codes[0]}" if codes[0] > 0 else f"killed by signal: {signal.strsignal(-codes[0])}"
            return ChildProcessError(explain_death(RuntimeError(cause)))
    if died:
        return ChildProcessError(explain_death(error))
    return _not_handed_over(error)
