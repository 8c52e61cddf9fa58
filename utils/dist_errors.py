"""Explains the end of a run of several ranks: which are gone, and which one tells the user."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from utils import dist_util

T = TypeVar("T")


#: A process that ends for want of another is gone after so many seconds, whatever a library still waits for.
GRACE_SECS = 20


def is_error_reporter() -> bool:
    """Whether this process is the one that tells the user how the run ended: the first of all that asks."""
    group = dist_util.group()
    if group is None:  # alone, or it met nobody
        return dist_util.is_first_of_machine()
    if group.tells is None:
        store = group.store
        group.tells = _within(3, lambda: store.add("told", 1) == 1, dist_util.is_first_of_machine())
    return group.tells


def _within(secs: float, ask: Callable[[], T], otherwise: T) -> T:
    """What a question to the store gives; whoever keeps the store may be gone, or cut off and silent."""
    answers: list[T] = []

    def work() -> None:
        with contextlib.suppress(RuntimeError):
            answers.append(ask())

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(secs)
    return answers[0] if answers else otherwise


def lost_contact(error: BaseException) -> str:
    """Explains a loss that ``is_lost_contact`` found, and names the processes that do not notice it themselves.

    From here on this process has ``GRACE_SECS`` to end.
    """
    watchdog = threading.Timer(GRACE_SECS, os._exit, [1])
    watchdog.daemon = True
    watchdog.start()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it as soon as it has seen the death, too
    # Without the place in Gloo's source, and its advice.
    reason = re.sub(r"^\[\S*\] ?", "", str(error).strip().splitlines()[0]).split(". ")[0]
    return (
        f"lost contact with {_who_is_lost()}: ended, cut off, or without an answer "
        f"for {dist_util.timeout().total_seconds():.0f} s ({reason})"
    )


def _who_is_lost() -> str:
    group = dist_util.group()
    if group is None:
        return "another process"
    store, others = group.store, set(range(dist_util.world_size())) - {dist_util.rank()}
    missing: set[int] = set()
    here = _within(3, lambda: store.add(f"left/{dist_util.rank()}", 1), 0)
    if not here:  # it went with the others
        group.tells, missing = dist_util.is_first_of_machine() if group.tells is None else group.tells, others
    if not is_error_reporter():
        return ""
    if here:
        time.sleep(1)  # those of the others that live notice at about the same time
        missing = _within(3, lambda: {i for i in others if not store.check([f"left/{i}"])}, others)
    names = [dist_util.place(i) for i in sorted(missing)]
    if not names or len(names) == len(others) > 1:
        return "the other processes"
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
