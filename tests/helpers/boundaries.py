"""Names every boundary of a run at which it could be killed or get a signal, and does so there.

A boundary is the moment before a file of the run is opened to be written, renamed, linked, cut or removed (Python's
audit events: none can be left out), before an fsync, a ``torch.save``, a line or a record of the logs and a forward
pass, and both ends of an evaluation and of a step's entry in the log.  A name says after which step it is, and counts
what comes again: ``after step 2: os.rename a_last.pt``, ``after step 2: forward #3``.
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import train
from models.modeling import VisionTransformer
from tests.helpers import runs
from tests.helpers.forked import Forked, run_forked
from utils import log_files, metrics

KILLED = 77  # the exit code of a child that was killed
#: Events that tell of a change to files, and which of their arguments is the file's name.
CHANGES = {"open": 0, "os.rename": 1, "os.remove": 0, "os.link": 1, "os.truncate": 0, "os.mkdir": 0, "os.rmdir": 0}


class Watch:
    """Calls ``reached`` with the name of each boundary; to be made in a forked child, for nothing takes it away."""

    def __init__(self, reached: Callable[[str], object]) -> None:
        self._reached, self._where, self._counts = reached, "start", Counter[str]()
        os.fsync = self._before("fsync", os.fsync, _name)
        torch.save = self._before("save", torch.save, lambda state, f: _name(f.fileno()))
        for owner, name in (
            (log_files.MetricsWriter, "write"), (log_files.EventFile, "add_summary"), (VisionTransformer, "forward"),
        ):  # fmt: skip
            setattr(owner, name, self._before(name, getattr(owner, name)))
        train.evaluate = self._around("evaluation", train.evaluate, lambda *_: self._where)
        metrics.TrainLog.step = self._around("step", metrics.TrainLog.step, lambda log, step, *_: f"after step {step}")
        sys.addaudithook(self._audit)

    def _at(self, what: str) -> None:
        name = f"{self._where}: {what}"
        self._counts[name] += 1
        self._reached(name if self._counts[name] == 1 else f"{name} #{self._counts[name]}")

    def _before(self, what: str, real: Callable[..., Any], file: Callable[..., str] = lambda *_: "") -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            self._at(f"{what} {file(*args)}".rstrip())
            return real(*args, **kwargs)

        return wrapper

    def _around(self, what: str, real: Callable[..., Any], where: Callable[..., str]) -> Any:
        def wrapper(*args: Any) -> Any:
            self._where = where(*args)
            self._at(f"{what} begins")
            result = real(*args)
            self._at(f"{what} ends")
            return result

        return wrapper

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event in CHANGES and not (event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR)):
            path = args[CHANGES[event]]
            if isinstance(path, str) and os.path.relpath(path).startswith(("output", "logs")):
                self._at(f"{event} {_name(path)}")


def _name(file: str | int) -> str:
    """Returns the name of a file, by its path or its number, without what is random in it."""
    name = os.path.basename(os.readlink(f"/proc/self/fd/{file}") if isinstance(file, int) else file)
    return re.sub(r"^\.(a_.+)\.\w+\.tmp$", r"\1.tmp", re.sub(r"^(events)\.out.*", r"\1", name))


def killed_at(boundary: str, *flags: str, prepare: Callable[[], object] = lambda: None) -> None:
    """Runs ``runs.SHORT`` in a forked child that ends at a boundary as if it were killed: nothing is tidied up."""
    code, err = _watched(lambda name: os._exit(KILLED) if name == boundary else None, flags, prepare)
    assert code == KILLED, f"{boundary} was not reached: {err[-3000:]}"


def signalled_at(boundary: str, number: signal.Signals, *flags: str, times: int = 1) -> tuple[int, str]:
    """Runs ``runs.SHORT`` in a forked child that gets a signal at a boundary.

    Returns:
        Its exit code, or minus the signal that ended it, and what it printed to standard error.
    """

    def reached(name: str) -> None:
        if name == boundary:
            os.mkdir("reached")
            for _ in range(times):
                os.kill(os.getpid(), number)
                time.sleep(0.001)  # signals of one number do not queue

    code, err = _watched(reached, flags)
    os.rmdir("reached")  # else it was not
    return code, err


def _watched(
    reached: Callable[[str], object], flags: tuple[str, ...], prepare: Callable[[], object] = lambda: None
) -> tuple[int, str]:
    code, _, err = run_forked(["train.py", *runs.SHORT, *flags], prepare=lambda: (prepare(), Watch(reached)))
    runs.every_name_is_whole()
    return code, err


@contextlib.contextmanager
def killed_everywhere(only: str, *flags: str) -> Iterator[Iterator[str]]:
    """Kills ``runs.SHORT`` at each of its boundaries in turn; gives their names, each once the process is gone.

    Before a process ends it forks another that is the same; that one waits until the next name is asked for, and runs
    on to the next boundary.  What it will write to must stay as it is meanwhile: look at a copy.

    Args:
        only: a pattern of the boundaries' names.
        flags: beside those of the run.
    """
    (names, tell), (wait, go_on) = os.pipe(), os.pipe()

    def reached(name: str) -> None:
        if re.search(only, name):
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
        assert "Best Accuracy:" in child.stderr(), child.stderr()[-3000:]  # the last process came to the end

    with Forked(["train.py", *runs.SHORT, *flags], prepare=lambda: Watch(reached)) as child, open(names) as reader:
        os.close(tell)  # the last process closes the other end
        yield each()
    os.close(wait)
    os.close(go_on)


def every_kill_is_harmless(*flags: str, only: str = "", check: Callable[[], object] = lambda: None) -> list[str]:
    """Kills a run at each boundary and starts it again: it must end as if it had not been killed.

    Args:
        flags, only: as for ``killed_everywhere``.
        check: fails if the files that a killed run left, or those of the run that ended, are not as they should be.

    Returns:
        The names of the boundaries.
    """
    names: list[str] = []
    before: dict[str, bytes] = {}
    with killed_everywhere(only, *flags) as boundaries:
        for name in boundaries:
            print(f"killed at {name}")  # shown if the test fails
            names.append(name)
            paths = [p for folder in ("output", "logs") for p in Path(folder).rglob("*") if p.is_file()]
            if (files := {str(p): p.read_bytes() for p in paths}) == before:
                continue  # the next run would do the same
            before = files
            shutil.rmtree("trial", ignore_errors=True)
            for folder in filter(os.path.exists, ("output", "logs", "pets")):
                shutil.copytree(folder, f"trial/{folder}")
            with runs.working_in("trial"):
                runs.every_name_is_whole()
                check()
                assert runs.run(*flags) == 0
                check()
                runs.assert_same(runs.outcome(), runs.undisturbed())
                assert [f for f in os.listdir("output") if f.endswith((".tmp", ".lock"))] == []
    return names
