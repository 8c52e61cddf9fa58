"""Runs train.py or a tool in a forked child of the test process, which has torch loaded: no start of three seconds.

A child is a process as a shell would start it: its own standard output and error, usual signals, logging that is not
set up yet, and an exit code that the system reports.  It must not run a test's clean-up, so it ends with ``os._exit``.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import logging
import multiprocessing.util
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, NoReturn

from tqdm import tqdm

from utils.signals import SIGNALS

#: What train.py imports when it needs it: loaded before the fork, it is not part of each run.
LATE_IMPORTS = (
    "torch._dynamo", "torch.utils.tensorboard.summary", "tensorboard.compat.proto.event_pb2",
    "tensorboard.summary.writer.record_writer",
)  # fmt: skip


class Forked:
    """A child that runs; a context manager, after which nothing of it is left.

    Args:
        argv: the program and its flags: ``["train.py", "--name", "a"]``, ``["tools.predict", "a.png"]``.
        env: variables of the environment beside the test's own; None takes one away.
        cwd: the folder it starts in; by default the test's.
        prepare: called in the child before the program, to limit its memory, say.
    """

    def __init__(
        self,
        argv: Sequence[str],
        env: Mapping[str, str | None] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        prepare: Callable[[], object] | None = None,
    ) -> None:
        self._argv, self._code = list(argv), None
        self._output: list[IO[bytes]] = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115
        main = _load(argv[0])
        if tqdm.monitor is not None:  # a thread, which would not be there after the fork
            tqdm.monitor.exit()
            tqdm.monitor = None
        self.pid = os.fork()
        if not self.pid:
            _run_and_exit(main, self._argv, env or {}, cwd, prepare, [f.fileno() for f in self._output])
        with contextlib.suppress(OSError):  # the child does so as well: whoever comes first
            os.setpgid(self.pid, self.pid)

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # it, and the processes that it started
            os.killpg(self.pid, signal.SIGKILL)
        self.poll(block=True)
        for f in self._output:
            f.close()

    def stdout(self) -> str:
        """Returns what it has printed so far."""
        return _text(self._output[0])

    def stderr(self) -> str:
        """Returns what it has printed to standard error so far."""
        return _text(self._output[1])

    def poll(self, block: bool = False) -> int | None:
        """Returns its exit code, or minus the signal that ended it; None while it runs."""
        if self._code is None:
            pid, status = os.waitpid(self.pid, 0 if block else os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def wait(self, timeout: float = 60) -> int:
        """Returns its exit code when it is over.

        Raises:
            TimeoutError: it takes longer; says what its threads were at.
        """
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{' '.join(self._argv)} takes longer than {timeout} s: {self._stacks()}")
            time.sleep(0.002)
        return code

    def _stacks(self) -> str:
        """Returns where its threads are, after what it printed last."""
        before, deadline = len(self.stderr()), time.monotonic() + 5
        os.kill(self.pid, signal.SIGQUIT)
        while "most recent call first" not in self.stderr()[before:] and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)  # the other threads
        return self.stderr()[max(before - 2000, 0) :]

    def wait_for(self, text: str, timeout: float = 60) -> None:
        """Waits until it has printed something to standard error; fails if it ends or takes too long before that."""
        deadline = time.monotonic() + timeout
        while text not in self.stderr():
            assert self.poll() is None, self.stderr()[-5000:]
            assert time.monotonic() < deadline, self.stderr()[-5000:]
            time.sleep(0.002)


def run_forked(
    argv: Sequence[str],
    env: Mapping[str, str | None] | None = None,
    cwd: str | os.PathLike[str] | None = None,
    timeout: float = 60,
    prepare: Callable[[], object] | None = None,
) -> tuple[int, str, str]:
    """Runs a program to its end, as ``Forked`` starts it.

    Returns:
        The exit code, or minus the signal that ended it; what it printed; what it printed to standard error.
    """
    with Forked(argv, env, cwd, prepare) as child:
        return child.wait(timeout), child.stdout(), child.stderr()


def _load(program: str) -> Callable[[list[str]], int]:
    """Returns the main function of a program, all that it needs loaded once, not in every child."""
    for name in LATE_IMPORTS if program == "train.py" else ():
        importlib.import_module(name)
    return importlib.import_module(program.removesuffix(".py")).main


def _run_and_exit(
    main: Callable[[list[str]], int],
    argv: list[str],
    env: Mapping[str, str | None],
    cwd: str | os.PathLike[str] | None,
    prepare: Callable[[], object] | None,
    output: Sequence[int],
) -> NoReturn:
    """Runs the program in the child, and ends it; nothing of the test process's must run after this."""
    code = 1
    try:
        os.setpgid(0, 0)
        multiprocessing.util._run_after_forkers()  # else its workers would ask the test process's thread for tensors
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output[0], 1)
        os.dup2(output[1], 2)
        sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
        faulthandler.register(signal.SIGQUIT)
        for number in SIGNALS:  # these tests may be under nohup
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        for handler in list(logging.root.handlers):  # pytest's
            logging.root.removeHandler(handler)
        logging.root.setLevel(logging.WARNING)
        for name, value in env.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        os.chdir(cwd or ".")
        if prepare:
            prepare()
        sys.argv = argv
        code = main(argv[1:])
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
        except OSError:  # as the interpreter does
            traceback.print_exc()
            code = 120
        finally:
            sys.stderr.flush()
            os._exit(code)


def _text(file: IO[bytes]) -> str:
    """Returns all that a file holds, whoever writes it where."""
    return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode(errors="backslashreplace")


@contextlib.contextmanager
def holding(path: str | os.PathLike[str]) -> Iterator[int]:
    """Holds the lock of a file, as another process does that trains or downloads; gives that process's id."""
    import fcntl  # as utils.files has it: not on every system

    ready, write = os.pipe()
    pid = os.fork()
    if not pid:
        with contextlib.suppress(BaseException), open(path, "w") as f:
            fcntl.lockf(f, fcntl.LOCK_EX)
            f.write(f"{os.getpid()}\n")
            f.flush()
            os.write(write, b"x")
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.pause()
        os._exit(1)
    try:
        os.close(write)
        assert os.read(ready, 1), f"{Path(path)} could not be locked"
        yield pid
    finally:
        os.close(ready)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def as_nobody(body: Callable[[], object]) -> str:
    """Calls a function in a child that is not root, who may read everything; returns its result or error as text."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            text = str(body())
        except BaseException as e:
            text = f"{type(e).__name__}: {e}"
        os.write(write, text.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as f:
        text = f.read()
    os.waitpid(pid, 0)
    return text
