"""The processes that decode images for a rank: how they live through signals, and how their errors arrive.

This module must not know what they decode.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from torch.utils.data import DataLoader

#: Seconds between a worker's looks at its run, which may have ended.
LOOK_SECS = 0.5


@contextlib.contextmanager
def _signals_later() -> Iterator[None]:
    """Holds back signals while workers start: they inherit that, and would die of one until they are ready."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def outlive_signals(worker: int) -> None:
    """Keeps a worker alive on Ctrl-C and SIGTERM, which may reach all processes: the current step needs its images."""
    sys.excepthook = _print_unless_cut_off
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigtimedwait"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_the_run, daemon=True).start()


def _print_unless_cut_off(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Leaves out the stack of the thread that hands tensors over, when the run ends in the middle of that."""
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, traceback)


def _end_with_the_run() -> None:
    """Ends this worker when its run asks for it, or soon after the run ended (torch looks every five seconds)."""
    run, parent = multiprocessing.parent_process(), os.getppid()  # these differ where a server forks the workers
    while os.getppid() == parent:
        asked = signal.sigtimedwait({signal.SIGTERM}, LOOK_SECS)
        if asked is not None and run is not None and asked.si_pid == run.pid:
            break
    os._exit(0)


def worker_died(error: RuntimeError) -> bool:
    """Recognises the death of a worker, which torch raises wherever the program is then."""
    return "DataLoader worker" in str(error)


WORKER_DIED = "a process that decodes images was killed, perhaps for lack of memory; fewer --num_workers need less"


def batches_of(loader: DataLoader) -> Iterator[Any]:
    """Starts the workers and yields their batches.

    Raises:
        ChildProcessError: one of them died.
    """
    try:
        with _signals_later():
            batches = iter(loader)  # starts the workers
        yield from batches
    except RuntimeError as e:
        if not worker_died(e):
            raise
        raise ChildProcessError(WORKER_DIED) from e
    except (ConnectionError, EOFError) as e:  # one that dies while it hands over a tensor, before torch sees its end
        raise ChildProcessError(WORKER_DIED) from e
