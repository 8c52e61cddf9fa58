"""Signals that ask a run to stop: the step in hand is finished and saved first.

A signal that the process was started to ignore, as ``nohup`` does with SIGHUP and a shell's background job with SIGINT,
stays ignored.  This module must not know what a run computes or saves.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

from utils import console, dist_util

#: Of Ctrl-C, of `kill` and schedulers, of a terminal that closes, and what schedulers may send ahead of time.
SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)
)
#: A terminal that closes sends several of these: the shell one, the kernel another when the shell has gone.
HANG_UP = getattr(signal, "SIGHUP", None)


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
    """Notes the first of ``SIGNALS``, so that the step in hand can be finished and saved.

    A second one raises ``Stopped`` wherever the program is, and one that comes while a stopped run is
    tidied up ends the process on the spot; SIGHUP counts as neither.  A context manager; without a signal in it, and
    outside the main thread, signals do afterwards what they did before, but for SIGTERM in a rank that lost another.
    """

    def __init__(self) -> None:
        self.number = 0

    def __enter__(self) -> StopSignal:
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in _not_ignored()}
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        lost = isinstance(error, Exception) and dist_util.is_lost_contact(error)
        for number, handler in self._previous.items():
            if lost and number == signal.SIGTERM:  # of torchrun, which has seen the death, too: the message comes first
                signal.signal(number, signal.SIG_IGN)
            else:
                signal.signal(number, self._leave if self.number else handler)

    def _leave(self, number: int, frame: FrameType | None) -> None:
        if number != HANG_UP:
            os._exit(128 + number)  # an exception could come where Python would print it and continue

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == HANG_UP and self.number:
            return
        if self.number not in (0, HANG_UP):
            raise Stopped(number, f"stopped by {signal.Signals(number).name} at once")
        self.number = number
        # Logging is not made to be called from here.  Without an error stream at the start, 2 is another file's.
        if dist_util.is_main() and sys.__stderr__ is not None:
            name = signal.Signals(number).name
            with contextlib.suppress(OSError):  # the terminal that closes, or nobody reads
                os.write(2, f"\n{name}: finishing the step in hand and saving; once more stops at once\n".encode())

    def now(self) -> bool:
        """Tells if this rank, the only one of the run, should leave its evaluation."""
        return bool(self.number) and dist_util.world_size() == 1

    def any_rank(self) -> int:
        """Returns the number of a signal that any rank got, or 0; every rank must ask."""
        return dist_util.max_over_ranks(self.number)


def _not_ignored() -> list[int]:
    """Returns those of ``SIGNALS`` that do something here, by a handler that Python could give back (else None)."""
    return [number for number in SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None)]


@contextlib.contextmanager
def handlers_restored() -> Iterator[None]:
    """Lets signals do after the block what they did before it."""
    before = {number: handler for number in SIGNALS if (handler := signal.getsignal(number)) is not None}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)


def leave(status: int) -> NoReturn:
    """Ends the process; a signal meanwhile ends it on the spot, where Python would print a stack.

    Where Python takes commands, as in a notebook or after ``python -i``, the process stays, and so do its handlers.
    """
    if not hasattr(sys, "ps1") and not sys.flags.interactive:
        for number in _not_ignored():
            signal.signal(number, lambda *_: os._exit(status))
        console.flush_at_exit()
    sys.exit(status)
