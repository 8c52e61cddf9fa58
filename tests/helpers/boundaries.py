"""Names every boundary of a run at which it could be killed or get a signal, and does so at one of them.

A boundary is the moment before a file of the run is opened to be written, renamed, linked, cut or removed (Python's
audit events: none can be left out), before an fsync, a ``torch.save``, a line or a record of the logs, a forward pass,
and both ends of an evaluation and of a step's entry in the log.  A name says after which step it is, and counts what
comes again: ``after step 2: os.rename a_last.pt``, ``after step 2: forward #3``.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import train
from models.modeling import VisionTransformer
from tests.helpers import runs
from tests.helpers.forked import Forked, run_forked
from utils import metrics

KILLED = 77  # the exit code of a child that was killed
FOLDERS = ("output", "logs")
#: Events that tell of a change to files, and which of their arguments is the file's name.
CHANGES = {
    "open": 0, "os.rename": 1, "os.remove": 0, "os.link": 1, "os.truncate": 0, "os.mkdir": 0, "os.rmdir": 0,
}  # fmt: skip


class _Watch:
    """Calls ``reached`` with the name of each boundary; to be made in a forked child, for nothing takes it away."""

    def __init__(self, reached: Callable[[str], object]) -> None:
        self._reached, self._where, self._counts = reached, "start", Counter[str]()
        for owner, name, path in (
            (os, "fsync", _path_of), (torch, "save", lambda state, f: _path_of(f)),
            (metrics.MetricsWriter, "write", None), (metrics.EventFile, "add_summary", None),
            (VisionTransformer, "forward", None),
        ):  # fmt: skip
            setattr(owner, name, self._before(name, getattr(owner, name), path))
        train.evaluate = self._around("evaluation", train.evaluate)
        metrics.TrainLog.step = self._around("step", metrics.TrainLog.step, lambda log, step, *_: f"after step {step}")
        sys.addaudithook(self._audit)

    def at(self, what: str) -> None:
        """Names a boundary and tells that it is reached."""
        name = f"{self._where}: {what}"
        self._counts[name] += 1
        self._reached(name if self._counts[name] == 1 else f"{name} #{self._counts[name]}")

    def _before(self, what: str, real: Callable[..., Any], path: Callable[..., str] | None) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            self.at(f"{what} {path(*args)}" if path else what)
            return real(*args, **kwargs)

        return wrapper

    def _around(self, what: str, real: Callable[..., Any], where: Callable[..., str] | None = None) -> Any:
        def wrapper(*args: Any) -> Any:
            self._where = where(*args) if where else self._where
            self.at(f"{what} begins")
            result = real(*args)
            self.at(f"{what} ends")
            return result

        return wrapper

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event not in CHANGES or (event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        path = args[CHANGES[event]]
        if isinstance(path, str) and os.path.relpath(path).startswith(FOLDERS):
            self.at(f"{event} {_plain(path)}")


def _path_of(file: Any) -> str:
    """Returns the plain name of an open file, by its number or itself."""
    fd = file if isinstance(file, int) else file.fileno()
    return _plain(os.readlink(f"/proc/self/fd/{fd}"))


def _plain(path: str) -> str:
    """Returns a file's name without what is random in it."""
    name = re.sub(r"^(events)\.out.*", r"\1", os.path.basename(path))
    return re.sub(r"^\.(a_.+)\.\w+\.tmp$", r"\1.tmp", name)


@contextlib.contextmanager
def killed_everywhere(*flags: str) -> Iterator[Iterator[str]]:
    """Kills a short run at each of its boundaries in turn; gives their names, each once the process is gone.

    Before a process ends it forks another that is the same; that one waits until the next name is asked for, and goes
    on to the next boundary.  What it will write to must stay as it is meanwhile: look at a copy.
    """
    (names, tell), (wait, go_on) = os.pipe(), os.pipe()

    def reached(name: str) -> None:
        dying = os.getpid()
        if os.fork():
            os._exit(KILLED)
        while os.getppid() == dying:
            time.sleep(0.0005)
        os.write(tell, f"{name}\n".encode())
        os.read(wait, 1)

    def each() -> Iterator[str]:
        for line in reader:
            yield line.rstrip("\n")
            os.write(go_on, b"x")

    with Forked(["train.py", *runs.SHORT, *flags], prepare=lambda: _Watch(reached)), open(names) as reader:
        os.close(tell)  # the last process closes the other end
        yield each()
    os.close(wait)
    os.close(go_on)


def _files() -> dict[str, bytes]:
    """Returns all files of the runs, by their paths."""
    return {str(p): p.read_bytes() for root in ("output", "logs") for p in Path(root).rglob("*") if p.is_file()}


def every_kill_is_harmless(*flags: str, only: str = "", check: Callable[[], object] = lambda: None) -> list[str]:
    """Kills a run at each boundary and starts it again: it must end as if it had not been killed.

    Args:
        flags: beside those of a short run.
        only: a pattern of the names of boundaries after which it is started again.
        check: fails if the files that a killed run left, or those of the run that ended, are not as they should be.

    Returns:
        The names of all boundaries.
    """
    names: list[str] = []
    before: dict[str, bytes] = {}
    with killed_everywhere(*flags) as boundaries:
        for name in boundaries:
            print(f"killed at {name}")  # shown if the test fails
            names.append(name)
            if not re.search(only, name) or _files() == before:  # the same files: the next run would do the same
                continue
            before = _files()
            shutil.rmtree("trial", ignore_errors=True)
            for folder in filter(os.path.exists, ("output", "logs", "pets")):
                shutil.copytree(folder, f"trial/{folder}")
            with runs.working_in("trial"):
                runs.every_name_is_whole()
                check()
                assert runs.short_run(*flags) == 0
                check()
                runs.assert_same(runs.outcome(), runs.undisturbed())
                assert [f for f in os.listdir("output") if f.endswith((".tmp", ".lock"))] == []
    return names


def killed_at(boundary: str, *flags: str, prepare: Callable[[], object] = lambda: None) -> None:
    """Runs a short run in a forked child that ends at a boundary as if it were killed: nothing is tidied up.

    Fails unless the boundary is reached, and all files that have their names are whole then.
    """
    code, err = _forked(flags, prepare, lambda name: os._exit(KILLED) if name == boundary else None)
    assert code == KILLED, f"{boundary} was not reached: {err[-3000:]}"
    runs.every_name_is_whole()


def signalled_at(boundary: str, number: signal.Signals, *flags: str, times: int = 1) -> tuple[int, str]:
    """Runs a short run in a forked child that gets a signal at a boundary.

    Returns:
        Its exit code, or minus the signal that ended it, and what it printed to standard error.
    """

    def reached(name: str) -> None:
        if name == boundary:
            os.mkdir("reached")
            for _ in range(times):
                os.kill(os.getpid(), number)
                time.sleep(0.001)  # signals of one number do not queue

    code, err = _forked(flags, lambda: None, reached)
    os.rmdir("reached")  # else it was not
    runs.every_name_is_whole()
    return code, err


def _forked(flags: Sequence[str], prepare: Callable[[], object], reached: Callable[[str], object]) -> tuple[int, str]:
    """Runs a short run that is watched; returns its exit code and what it printed to standard error."""

    def begin() -> None:
        prepare()
        _Watch(reached)

    code, _, err = run_forked(["train.py", *runs.SHORT, *flags], prepare=begin)
    return code, err
