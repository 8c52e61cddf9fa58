"""The end of a run of several ranks: who raises an error, which of them are gone, and which one prints it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from utils import dist_util

T = TypeVar("T")
E = TypeVar("E", bound=Exception)

#: A rank that ends because it lost another is gone after so many seconds, whatever a library still waits for.
GRACE_SECS = 20
#: How long the store may take to answer.
STORE_SECS = 3


def raise_together(error: E | None, joined: Callable[[list[E]], E]) -> None:
    """Raises on every rank those that ranks have, ``joined`` to one; every rank must call it.

    For errors after which each rank still has something to do.  Where none has one, it costs one number of the hosts.
    """
    if dist_util.max_over_ranks(int(error is not None)) and dist.is_initialized():
        errors: list[E | None] = [None] * dist_util.world_size()
        dist.all_gather_object(errors, error)
        error = joined([e for e in errors if e is not None])
    if error is not None:
        vars(error)["on_all_ranks"] = True
        raise error.with_traceback(None)  # whose frames would keep the loader, and with it its processes


def is_on_all_ranks(error: Exception) -> bool:
    """Returns true if every rank has this error, so that they can still do something together."""
    return dist_util.world_size() == 1 or vars(error).get("on_all_ranks", False)


def is_error_reporter() -> bool:
    """Asks to be the rank that prints the error; returns true on one rank of the run, the first that asks.

    An action, not a getter: whoever asked and got true is expected to print.  Waits for the store at most
    ``STORE_SECS``; a rank whose store is gone returns true if it is the first of its machine.
    """
    group = dist_util.group()
    if group is None:  # alone, or it met no other
        return dist_util.is_first_of_machine()
    if group.error_reporter is None:
        store = group.store
        group.error_reporter = _ask(lambda: store.add("error reporters", 1) == 1, dist_util.is_first_of_machine())
    return group.error_reporter


def _ask(question: Callable[[], T], default: T) -> T:
    """Returns the store's answer, or the default: whoever keeps the store may be gone, or cut off and silent."""
    answers: list[T] = []

    def work() -> None:
        with contextlib.suppress(RuntimeError):
            answers.append(question())

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(STORE_SECS)
    return answers[0] if answers else default


def lost_contact(error: BaseException) -> str:
    """Explains a loss that ``is_lost_contact`` found, and names the ranks that do not notice it themselves.

    From here on this rank has ``GRACE_SECS`` to end.
    """
    watchdog = threading.Timer(GRACE_SECS, os._exit, [1])
    watchdog.daemon = True
    watchdog.start()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it as soon as it has seen the death, too
    # Without the place in Gloo's source, and its advice.
    reason = re.sub(r"^\[\S*\] ?", "", str(error).strip().splitlines()[0]).split(". ")[0]
    group = dist_util.group()
    if group is None:
        return f"lost contact with another rank ({reason})"
    return (
        f"lost contact with {_lost_ranks(group)}: ended, cut off, or without an answer "
        f"for {group.timeout.total_seconds():.0f} s ({reason})"
    )


def _lost_ranks(group: dist_util.Group) -> str:
    """Names the ranks that do not notice the loss themselves; only the error reporter, which prints them, waits."""
    store, others = group.store, set(range(dist_util.world_size())) - {dist_util.rank()}
    missing: set[int] = set()
    has_store = _ask(lambda: store.add(f"left/{dist_util.rank()}", 1), 0)
    if not has_store:  # it went with the others
        missing = others
        if group.error_reporter is None:
            group.error_reporter = dist_util.is_first_of_machine()
    if not is_error_reporter():
        return ""
    if has_store:
        time.sleep(1)  # those of the others that live notice at about the same time
        missing = _ask(lambda: {i for i in others if not store.check([f"left/{i}"])}, others)
    names = [dist_util.describe(i) for i in sorted(missing)]
    if not names or len(names) == len(others) > 1:
        return "the other ranks"
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
