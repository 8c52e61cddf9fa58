"""Signals that ask a run to stop: the step in hand is finished and saved first.

This module must not know what a run computes or saves.
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

from utils import dist_util


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
    """Notes the first SIGINT or SIGTERM, so that the step in hand can be finished and saved.

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
        os._exit(128 + number)  # an exception could come where Python would print it and continue

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            raise Stopped(number, f"stopped by {signal.Signals(number).name} at once")
        self.number = number
        if dist_util.is_main():  # logging is not made to be called from here
            name = signal.Signals(number).name
            os.write(2, f"\n{name}: finishing the step in hand and saving; once more stops at once\n".encode())

    def now(self) -> bool:
        """Tells if this rank, the only one of the run, should leave its evaluation."""
        return bool(self.number) and dist_util.world_size() == 1

    def any_rank(self) -> int:
        """Returns the number of a signal that any rank got, or 0; every rank must ask."""
        return dist_util.max_over_ranks(self.number)


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
