"""Runs of several ranks: forked from a server that has imported everything, with or without torchrun's agent.

Everything is bounded in time, and nothing outlives its test.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import REPOSITORY
from tests.helpers.forked import LATE_IMPORTS

TINY = ["--dataset", "digits", "--model_type", "testing", "--img_size", "32", "--device", "cpu",
        "--pretrained_dir", "", "--dropout", "0", "--log_every", "1"]  # fmt: skip
#: train.py, paced by ``set_pace``.
PACED = str(REPOSITORY / "tests" / "helpers" / "paced.py")
RESUMED = "Resumed after step"  # what a run logs that resumes
MARK = "TRAIN_TEST_JOB"  # in the environment of all that a job starts
CLONE_NEWNET = 0x40000000  # linux/sched.h


def clean_environment(**more: str) -> dict[str, str]:
    """Returns the environment of a process that no launcher started, with one thread."""
    launchers = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "MASTER_", "TORCHELASTIC_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(launchers)}
    return {**env, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), **more}


# ---- what a job runs: a function of one value ----


def train_main(flags: Sequence[str]) -> int:
    """Does what ``python train.py`` does."""
    import train

    return train.main(list(flags))


def torchrun(flags: Sequence[str], namespace: str = "") -> int:
    """Does what ``torchrun`` does, but forks its ranks; in a network namespace of that name."""
    from torch.distributed.run import main

    if namespace:
        libc = ctypes.CDLL(None, use_errno=True)
        with open(f"/run/netns/{namespace}") as f:
            assert libc.setns(f.fileno(), CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
    main(["--run-path", "--start-method=fork", *flags])
    return 0


def real_torchrun(flags: Sequence[str], module: str = "torch.distributed.run") -> None:
    """Becomes the launcher that a user starts."""
    os.execv(sys.executable, [sys.executable, "-m", module, *flags])


# ---- jobs ----


@functools.cache
def _server() -> ForkServerContext:
    """Starts the server that jobs are forked from: each is there in a tenth of a second, not after the seconds
    of an interpreter's start, which depend on what else the machine does.

    The test process itself is no such server: on a machine with a GPU PyTorch refuses a backward pass in a
    child of a process that has done one.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["tests.helpers.launching", "tests.helpers.paced", "torch.distributed.run", "torchvision.datasets"]
        + [*LATE_IMPORTS]
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, value in clean_environment().items():
            patch.setenv(name, value)
        multiprocessing.forkserver.ensure_running()
    return context


def _enter(body: Callable[..., Any], args: tuple[Any, ...], env: dict[str, str], folder: Path, name: str) -> None:
    """Runs in the child: takes its place, environment and output, and leaves what the body returns in a file."""
    os.setsid()
    os.chdir(folder)
    fd = os.open(f"{name}.out", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = ["train.py"]
    torch.set_num_threads(1)
    try:
        result = body(*args)
    except SystemExit as e:
        result = e.code
    Path(folder, f"{name}.json").write_text(json.dumps(result))
    sys.stderr.flush()


class Job:
    """A process with all its descendants; its output goes to a file.

    Args:
        body: what it runs, a function of a module.
        args: the body's arguments.
        folder: where it works.
        name: names its files there.
        env: more variables of its environment.
    """

    def __init__(self, body: Callable[..., Any], args: tuple[Any, ...], folder: Path, name: str, **env: str) -> None:
        folder.mkdir(exist_ok=True)
        self._mark, self._path = uuid.uuid4().hex, folder / name
        full = clean_environment(**{MARK: self._mark}, **env)
        self._process = _server().Process(target=_enter, args=(body, args, full, folder, name))
        self._process.start()
        self.pid: int = self._process.pid  # type: ignore[assignment]

    def output(self) -> str:
        """Returns what was printed so far."""
        path = self._path.with_suffix(".out")
        return path.read_text(errors="replace") if path.exists() else ""

    def errors(self) -> list[str]:
        """Returns our lines that say what went wrong."""
        return [line for line in self.output().splitlines() if "train.py: error:" in line]

    def wait(self, secs: float) -> Any:
        """Returns what the body returned or exited with; else the exit code of the process."""
        self._process.join(secs)
        assert self._process.exitcode is not None, f"still running after {secs} s: {self.output()[-6000:]}"
        result = self._path.with_suffix(".json")
        return json.loads(result.read_text()) if result.exists() else self._process.exitcode

    def _descendants(self) -> list[int]:
        """Returns those that were started with the job's mark: torchrun gives its ranks sessions of their own."""
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if f"{MARK}={self._mark}".encode() in path.read_bytes().split(b"\0"):
                    found.append(int(path.parent.name))
        return found

    def kill(self) -> None:
        """Ends everything at once, as when a machine goes down."""
        self._process.kill()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)  # all that it forked
        for _ in range(3):  # a process may be starting another
            for pid in self._descendants():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self._process.join()


@contextlib.contextmanager
def job(body: Callable[..., Any], args: tuple[Any, ...], folder: Path, name: str = "job", **env: str) -> Iterator[Job]:
    """Runs a ``Job`` that ends with the block."""
    made = Job(body, args, folder, name, **env)
    try:
        yield made
    finally:
        made.kill()


class Ranks:
    """The jobs that are the ranks of one run."""

    def __init__(self, jobs: list[Job | None]) -> None:
        self._all = jobs
        self.jobs = [job for job in jobs if job is not None]

    def results(self, secs: float = 120) -> list[Any]:
        """Returns what each rank returned, within a time; None for a rank that was not started."""
        deadline = time.monotonic() + secs
        return [job and job.wait(max(deadline - time.monotonic(), 0.01)) for job in self._all]

    def output(self) -> str:
        """Returns what all of them printed."""
        return "".join(job.output() for job in self.jobs)

    def errors(self) -> list[str]:
        """Returns their lines that say what went wrong."""
        return [line for job in self.jobs for line in job.errors()]


@contextlib.contextmanager
def ranks(
    folder: Path, args: Sequence[Any], body: Callable[[Any], Any] = train_main, num_machines: int = 1, **env: str
) -> Iterator[Ranks]:
    """Runs one rank for each of ``args``, until the block ends.

    Args:
        folder: where they work.
        args: each rank's argument of the body; a rank whose argument is None is not started.
        body: what each of them runs.
        num_machines: pretend that so many machines have an equal part of them each.
        env: more variables of their environment.
    """
    # As torchrun does, this process keeps the store where they meet: its port cannot be taken in between.
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    local = len(args) // num_machines
    with contextlib.ExitStack() as held:
        jobs: list[Job | None] = []
        for rank, arg in enumerate(args):
            launchers = {
                "RANK": str(rank), "LOCAL_RANK": str(rank % local), "GROUP_RANK": str(rank // local),
                "WORLD_SIZE": str(len(args)), "LOCAL_WORLD_SIZE": str(local), "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
            }  # fmt: skip
            each = job(body, (arg,), folder, f"rank{rank}", **{**launchers, **env})
            jobs.append(None if arg is None else held.enter_context(each))
        yield Ranks(jobs)


# ---- what a run left, and how fast it goes ----


def lines_of(folder: Path, name: str) -> list[dict[str, float]]:
    """Returns metrics.jsonl of a run; empty if there is none yet."""
    path = folder / "logs" / name / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines() if line.endswith("}")]


def values_of(folder: Path, name: str, tag: str) -> list[float]:
    """Returns one curve of a run."""
    return [line[tag] for line in lines_of(folder, name) if tag in line]


def steps_done(folder: Path, name: str) -> float:
    """Returns the last step of a run that its log has."""
    return max((line["step"] for line in lines_of(folder, name)), default=0)


def weights_of(folder: Path, name: str) -> dict[str, Any]:
    """Returns the weights in a run's last saved state."""
    return torch.load(folder / "output" / f"{name}_last.pt", weights_only=True)["model"]


def set_pace(folder: Path, num_free: int) -> dict[str, str]:
    """Lets each process of ``PACED`` do so many steps as fast as it can, and then one a second.

    What a test does in between happens in the middle of the run, however slow the machine.

    Returns:
        The variable that the processes need.
    """
    (folder / "new").write_text(f"{num_free} 1")
    (folder / "new").replace(folder / "pace")
    return {"PACE": str(folder / "pace")}


def wait_for(condition: Callable[[], Any], secs: float, explain: Callable[[], str] = str) -> None:
    """Waits until something is so."""
    deadline = time.monotonic() + secs
    while not condition():
        assert time.monotonic() < deadline, f"not within {secs} s: {explain()[-6000:]}"
        time.sleep(0.05)
