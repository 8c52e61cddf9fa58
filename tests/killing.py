"""A training that is killed again and again, as hard as the system can, until it is done.

    python -m tests.killing --runs 10 --seed 1

One run is never stopped; the others are killed (SIGKILL) at random moments, every second time while a file is being
saved, and started again by the same command.  After each kill every file that has its name must be whole; in the end
everything that a run leaves must be the same to the last bit.  The seed is printed: it gives the same moments again,
as far as a machine's speed does.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import glob
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests import runs

FLAGS = [
    "--name", "a", *runs.TINY, "--pretrained_dir", "", "--train_batch_size", "16", "--gradient_accumulation_steps", "2",
    "--num_steps", "40", "--warmup_steps", "5", "--log_every", "4", "--eval_every", "10", "--save_every", "3",
    "--learning_rate", "0.1", "--eval_batch_size", "90", "--num_workers", "0",
]  # fmt: skip
TIMEOUT_SECS = 120.0


@dataclass
class Count:
    """What a harness did."""

    runs: int = 0
    kills: int = 0
    while_saving: int = 0

    def __str__(self) -> str:
        return f"{self.runs} runs, {self.kills} kills, {self.while_saving} of them while a file was being saved"


class Starter:
    """Starts processes of train.py by forking one that has torch loaded: seconds less for each; a context manager."""

    def __init__(self, extra: tuple[str, ...] = ()) -> None:
        self._extra = extra

    def __enter__(self) -> Starter:
        command = [sys.executable, "-m", "tests.killing", "--serve", *FLAGS, *self._extra]
        self._server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=runs.ROOT,
            bufsize=0,  # else a line could wait in the buffer, where ``select`` does not see it
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.kill()
        self._server.communicate()

    def start(self, folder: str) -> Process:
        """The run, or what is left of it, in a folder; what it prints goes to a file there."""
        assert self._server.stdin
        self._server.stdin.write(f"{folder}\n".encode())
        return Process(self._server, folder)


class Process:
    """One process of train.py."""

    def __init__(self, server: subprocess.Popen, folder: str) -> None:
        self._server, self._folder = server, folder
        self._pid = int(server.stdout.readline())
        self.status: int | None = None

    def poll(self, timeout: float = 0) -> int | None:
        """Its exit status, or minus the signal that ended it, once it is over."""
        if self.status is None and select.select([self._server.stdout], [], [], timeout)[0]:
            self.status = int(self._server.stdout.readline())
        return self.status

    def kill(self) -> int:
        """Ends it as hard as the system can; returns its status, which may be that of a process that was done."""
        if self.status is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
            self.poll(TIMEOUT_SECS)
        assert self.status in (0, -signal.SIGKILL), Path(self._folder, "stderr").read_text()[-2000:]
        return self.status

    def where_it_is(self) -> str:
        """What its threads are at, for a run that hangs."""
        if self.status is None:
            os.kill(self._pid, signal.SIGUSR1)
            time.sleep(2)
        return Path(self._folder, "stderr").read_text()[-5000:]


def serve(flags: list[str]) -> None:
    """Forks a run for every folder that is named on standard input; tells its number, and later its status."""
    import train

    torch.set_num_threads(1)
    while folder := sys.stdin.readline().rstrip("\n"):
        if not (pid := os.fork()):
            os.chdir(folder)
            errors = os.open("stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(errors, 1)
            os.dup2(errors, 2)
            faulthandler.register(signal.SIGUSR1)
            os._exit(train.main(flags))
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def is_saving(folder: str) -> bool:
    """Whether a file has a temporary name at this moment."""
    return bool(glob.glob(os.path.join(glob.escape(folder), "output", ".*.tmp")))


def kill_once(starter: Starter, folder: str, moments: random.Random) -> tuple[bool, bool]:
    """Starts the run and kills it.

    Returns:
        Whether it was killed before it was done, and whether in the middle of a save.
    """
    at_a_save, which, delay = moments.random() < 0.5, moments.randint(1, 4), moments.uniform(0, 1.5)
    process, begin, saving = starter.start(folder), time.monotonic(), False
    while process.poll() is None:
        if time.monotonic() > begin + TIMEOUT_SECS:
            raise TimeoutError(process.where_it_is())
        time.sleep(0.0005)
        if at_a_save:
            before, saving = saving, is_saving(folder)
            which -= saving and not before
            if which == 0:
                break
        elif time.monotonic() > begin + delay:
            break
    killed = process.kill() < 0
    return killed, killed and is_saving(folder)


@contextlib.contextmanager
def working_in(folder: str) -> Iterator[None]:
    """Changes the working directory for a while."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def run_to_the_end(starter: Starter, folder: str) -> dict[str, Any]:
    """What the run leaves when it is let alone from now on."""
    process = starter.start(folder)
    assert process.poll(TIMEOUT_SECS) == 0, process.where_it_is()
    with working_in(folder):
        return runs.outcome()


def harness(root: str, num_runs: int, kills_per_run: int, seed: int, extra: tuple[str, ...] = ()) -> Count:
    """Kills ``num_runs`` runs up to ``kills_per_run`` times each; fails if one does not end as the one in peace."""
    print(f"seed {seed}", flush=True)
    count, moments = Count(), random.Random(seed)
    with Starter(extra) as starter:
        os.makedirs(peace := os.path.join(root, "peace"))
        expected = run_to_the_end(starter, peace)
        for number in range(num_runs):
            os.makedirs(folder := os.path.join(root, f"run-{number}"))
            for _ in range(kills_per_run):
                killed, saving = kill_once(starter, folder, moments)
                count.kills += killed
                count.while_saving += saving
                with working_in(folder):
                    runs.every_name_is_whole()
                if not killed:
                    break
            runs.assert_same(run_to_the_end(starter, folder), expected)
            assert not is_saving(folder), "a temporary file was left behind"
            count.runs += 1
            print(f"{count}: all whole, all the same", flush=True)
    return count


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--runs", type=int, default=10)
    p.add_argument("--kills", type=int, default=12, help="of one run, at most")
    p.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    p.add_argument("--serve", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.serve is not None:
        serve(args.serve)
        return
    with tempfile.TemporaryDirectory() as root:
        harness(root, args.runs, args.kills, args.seed)


if __name__ == "__main__":
    main()
