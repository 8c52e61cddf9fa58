"""A run's life among others: alone under its name, stopped when a person or a scheduler asks, short of memory.

This module must not know what a run computes or saves.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import IO, NoReturn

import torch

from utils import dist_util

#: What cuBLAS must be told to add up in one order; source: pytorch.org/docs/stable/notes/randomness.html.
CUBLAS_WORKSPACES = (":4096:8", ":16:8")


class Stopped(KeyboardInterrupt):
    """The run ends because a signal asked for it.

    Args:
        number: the signal's.
        message: for the user.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


class StopSignal:
    """Notes the first SIGINT or SIGTERM, so that the update in hand can be finished and saved.

    A second one raises ``Stopped`` wherever the program is, and one that comes while a stopped run is
    tidied up ends the process on the spot.  A context manager; without a signal in it, and outside the
    main thread, signals do afterwards what they did before.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.number = 0

    def __enter__(self) -> StopSignal:
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, self._leave if self.number else handler)

    def _leave(self, number: int, frame: FrameType | None) -> None:
        os._exit(128 + number)  # an exception could come where Python would print it and go on

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            raise Stopped(number, f"stopped by {signal.Signals(number).name} at once")
        self.number = number
        if dist_util.is_main():  # logging is not made to be called from here
            name = signal.Signals(number).name
            os.write(2, f"\n{name}: finishing the update in hand and saving; once more stops at once\n".encode())

    def now(self) -> bool:
        """Whether this process, the only one of the run, should leave what it is at."""
        return bool(self.number) and dist_util.world_size() == 1

    def agreed(self) -> int:
        """The number of a signal that any process of the run got, or 0; every process must ask."""
        return dist_util.max_over_ranks(self.number)


#: What RuntimeErrors say that are one for lack of memory: torch's on CPUs, CUDA's, cuBLAS's.
OUT_OF_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


class OutOfMemory(RuntimeError):
    """There is not enough memory; the message has the remedy."""


@contextlib.contextmanager
def memory_remedy(remedy: str) -> Iterator[None]:
    """Makes what torch, its libraries and Python raise for lack of memory an ``OutOfMemory`` that names a remedy."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError, RuntimeError) as e:
        known = isinstance(e, MemoryError | torch.OutOfMemoryError) or any(words in str(e) for words in OUT_OF_MEMORY)
        if not known:
            raise
        raise OutOfMemory(f"out of memory {remedy}") from e


def make_deterministic() -> None:
    """Lets CUDA compute the same bits in every run; must come before it computes anything.

    Raises:
        ValueError: the environment forbids it.
    """
    workspace = os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACES[0])
    if workspace not in CUBLAS_WORKSPACES:
        raise ValueError(
            f"--deterministic: CUBLAS_WORKSPACE_CONFIG is {workspace}, "
            f"expected {' or '.join(CUBLAS_WORKSPACES)}; unset it"
        )
    torch.use_deterministic_algorithms(True)
    # It takes time, and nothing here reads such memory.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False


@contextlib.contextmanager
def handlers_restored() -> Iterator[None]:
    """Lets signals do after the block what they did before it."""
    before = {number: signal.getsignal(number) for number in StopSignal.SIGNALS}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)


def leave(status: int) -> NoReturn:
    """Ends the process; a signal meanwhile ends it on the spot, where Python would print a stack."""
    for number in StopSignal.SIGNALS:
        signal.signal(number, lambda *_: os._exit(status))
    sys.exit(status)


TRAINING = "training under this name; wait for it, stop it, or give another --name"


@contextlib.contextmanager
def only_run(path: str, busy: str = TRAINING) -> Iterator[None]:
    """Holds a lock while the block runs; the system takes it away from a process that dies.

    Args:
        path: of the lock's file, which goes with the lock but stays behind a process that is killed.
        busy: what the other process is at, and what to do about it.

    Raises:
        ValueError: another process holds it.
    """
    with contextlib.closing(_locked(path, busy)) as f:
        f.truncate(0)
        f.write(f"{os.getpid()}\n")
        f.flush()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                os.unlink(path)


def _locked(path: str, busy: str) -> IO[str]:
    """The file, open and locked; open only, where the system or the file system has no locks."""
    while True:
        f = open(path, "a+", encoding="ascii")  # noqa: SIM115
        try:
            import fcntl

            fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, not inherited by worker processes
        except ImportError:
            return f
        except OSError as e:
            if e.errno not in (errno.EACCES, errno.EAGAIN):
                return f
            with f:
                f.seek(0)
                raise ValueError(f"process {f.read().strip() or 'unknown'} is {busy}") from e
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(f.fileno()), os.stat(path)):
                return f
        f.close()  # whoever held it has just removed it: lock the file that others will find
