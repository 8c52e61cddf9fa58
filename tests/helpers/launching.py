"""Runs of train.py in several processes: quick ones without a launcher, and real ones under torchrun.

Everything is bounded in time, and nothing outlives its test.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from tests.conftest import REPOSITORY

TINY = ["--dataset", "digits", "--model_type", "testing", "--img_size", "32", "--device", "cpu",
        "--pretrained_dir", "", "--dropout", "0", "--log_every", "1"]  # fmt: skip
LAUNCHER = [sys.executable, "-m", "torch.distributed.run"]
#: torchrun that imports everything before its turn comes, and forks its processes: each is there at once, not
#: after the seconds of another interpreter's start, which depend on what else the machine does.
READY = """
import os, sys, time
import torch, torch.utils.tensorboard, train
from torch.distributed.run import main
torch.set_num_threads(1)
turn = sys.argv.pop(1)
while not os.path.exists(turn):
    time.sleep(0.05)
main(["--run-path", "--start-method=fork", *sys.argv[1:]])
"""
MARK = "TRAIN_TEST_JOB"  # in the environment of all that a test starts, torchrun's own children included


def clean_environment(**more: str) -> dict[str, str]:
    """The environment of a process that no launcher started, with one thread."""
    launchers = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "MASTER_", "TORCHELASTIC_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(launchers)}
    return {**env, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), **more}


def _enter(body: Callable[..., Any], args: tuple[Any, ...], env: dict[str, str], output: str) -> None:
    """In the child: takes its environment and its output, and leaves what the body returned in a file."""
    fd = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.environ.clear()
    os.environ.update(env)
    torch.set_num_threads(1)
    try:
        result = body(*args)
    except SystemExit as e:
        result = e.code
    Path(f"{output}.json").write_text(json.dumps(result))
    sys.stderr.flush()


def train_main(flags: Sequence[str]) -> int:
    """What ``python train.py`` does."""
    import train

    return train.main(list(flags))


class Ranks:
    """Processes of one run, forked from a server that has imported everything: a second, not ten.

    Args:
        number: of processes.
        body, args: what each of them runs; what it returns is JSON.
        folder: where their output goes, and which they work in.
        nodes: pretend that so many machines have a part of them each.
        env: more variables, or one dictionary for each.
    """

    def __init__(
        self, number: int, body: Callable[..., Any], args: Sequence[tuple[Any, ...]] | tuple[Any, ...], folder: Path,
        nodes: int = 1, env: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.number, self.folder = number, folder
        folder.mkdir(exist_ok=True)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.helpers.launching", "train", "torch.utils.tensorboard", "torchvision.datasets"])
        # As torchrun does, this process keeps the store where they meet: its port cannot be taken in between.
        self._store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        local = number // nodes
        self.processes = []
        for rank in range(number):
            mine = {
                "RANK": str(rank), "LOCAL_RANK": str(rank % local), "GROUP_RANK": str(rank // local),
                "WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(local), "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(self._store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
            }  # fmt: skip
            values = args if isinstance(args, tuple) else args[rank]
            full = clean_environment(**{**mine, **(env or {})})
            process = context.Process(
                target=_enter, args=(body, values, full, str(folder / f"{rank}.txt")), daemon=True
            )
            self.processes.append(process)
        before = os.getcwd()
        os.chdir(folder)
        try:
            for process in self.processes:
                process.start()
        finally:
            os.chdir(before)

    def results(self, seconds: float = 60) -> list[Any]:
        """What each process returned, within a time."""
        deadline = time.monotonic() + seconds
        for rank, process in enumerate(self.processes):
            process.join(max(deadline - time.monotonic(), 0.01))
            assert process.exitcode is not None, f"process {rank} takes more than {seconds} s: {self.output()}"
        return [json.loads(p.read_text()) if (p := self.folder / f"{rank}.txt.json").exists() else None
                for rank in range(self.number)]  # fmt: skip

    def output(self) -> str:
        """What all of them printed."""
        return "".join((self.folder / f"{rank}.txt").read_text() for rank in range(self.number))

    def errors(self) -> list[str]:
        """The lines that say what went wrong."""
        return [line for line in self.output().splitlines() if "error: " in line and "gloo" not in line]

    def close(self) -> None:
        """Ends all that is left."""
        for process in self.processes:
            if process.pid is not None:
                process.kill()
                process.join()


@contextlib.contextmanager
def ranks(number: int, body: Callable[..., Any], args: Any, folder: Path, **options: Any) -> Iterator[Ranks]:
    """``Ranks`` that end with the block."""
    run = Ranks(number, body, args, folder, **options)
    try:
        yield run
    finally:
        run.close()


def train_ranks(number: int, flags: Sequence[str], folder: Path, **options: Any) -> list[Any]:
    """Exit statuses of ``python train.py`` in so many processes."""
    with ranks(number, train_main, (list(flags),), folder, **options) as run:
        return run.results()


class Job:
    """A command with all its descendants; its output goes to a file.

    Args:
        command: as for Popen.
        folder: where it works; ``name`` names its output there.
    """

    def __init__(self, command: Sequence[str], folder: Path, name: str = "job", **env: str) -> None:
        folder.mkdir(exist_ok=True)
        self._mark, self._output = uuid.uuid4().hex, folder / f"{name}.out"
        with open(self._output, "w") as f:
            self.process = subprocess.Popen(
                command, cwd=folder, stdout=f, stderr=f, env=clean_environment(**{MARK: self._mark}, **env)
            )

    def output(self) -> str:
        """What was printed so far."""
        return self._output.read_text(errors="replace")

    def errors(self) -> list[str]:
        """Our lines that say what went wrong."""
        return [line for line in self.output().splitlines() if "train.py: error:" in line]

    def wait(self, seconds: float) -> int:
        """The exit status."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s: {self.output()[-6000:]}") from None

    def pids(self) -> list[int]:
        """The living processes of the job: those that were started with its mark, or forked from one."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                with contextlib.suppress(OSError):
                    if f"{MARK}={self._mark}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                        found.append(int(entry.name))
        return found

    def kill(self) -> None:
        """Ends everything at once, as when a machine goes down."""
        for _ in range(3):  # a process may be starting another
            for pid in self.pids():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.process.wait()


@contextlib.contextmanager
def job(command: Sequence[str], folder: Path, name: str = "job", **env: str) -> Iterator[Job]:
    """A ``Job`` that ends with the block."""
    made = Job(command, folder, name, **env)
    try:
        yield made
    finally:
        made.kill()


def ready_torchrun(turn: Path, flags: Sequence[str]) -> list[str]:
    """A command line that waits until there is the file ``turn``; then it is as fast as can be."""
    return [sys.executable, "-c", READY, str(turn), *flags]


def torchrun(flags: Sequence[str], train_flags: Sequence[str]) -> list[str]:
    """A command line."""
    return [*LAUNCHER, *flags, str(REPOSITORY / "train.py"), *train_flags]


def lines_of(folder: Path, name: str) -> list[dict[str, float]]:
    """metrics.jsonl of a run; empty if there is none yet."""
    path = folder / "logs" / name / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines() if line.endswith("}")]


def values_of(folder: Path, name: str, tag: str) -> list[float]:
    """One curve of a run."""
    return [line[tag] for line in lines_of(folder, name) if tag in line]


def wait_for(condition: Callable[[], Any], seconds: float, what: Callable[[], str] = str) -> None:
    """Waits until something is so."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what()[-6000:]}"
        time.sleep(0.05)


def weights_of(folder: Path, name: str) -> dict[str, Any]:
    """The weights in a run's last saved state."""
    return torch.load(folder / "output" / f"{name}_last.pt", weights_only=True)["model"]


def have(program: str) -> bool:
    """Whether a program is installed."""
    return shutil.which(program) is not None
