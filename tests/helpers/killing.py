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
import importlib
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

from tests.helpers import runs
from utils import files

FLAGS = [
    "--name", "a", *runs.TINY, "--pretrained_dir", "", "--train_batch_size", "16", "--gradient_accumulation_steps", "2",
    "--num_steps", "40", "--warmup_steps", "5", "--log_every", "4", "--eval_every", "10", "--save_every", "3",
    "--learning_rate", "0.1", "--eval_batch_size", "90", "--num_workers", "0",
]  # fmt: skip
#: A run hangs if no file of its folder has changed at so many looks, a second apart, however long it takes in all.
#: A machine that sleeps meanwhile, or stops both processes, does not count.
MAX_IDLE_LOOKS = 120
#: What train.py imports when it needs it: loaded once, before the forks, it is not part of each run.
LATE_IMPORTS = (
    "torch._dynamo", "torch.utils.tensorboard.summary", "tensorboard.compat.proto.event_pb2",
    "tensorboard.summary.writer.record_writer",
)  # fmt: skip


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
            env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True,
        )  # fmt: skip
        return self

    def __exit__(self, *exception: object) -> None:
        os.killpg(self._server.pid, signal.SIGKILL)  # a run that hangs, too
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
        self._seen, self._idle_looks = traces(folder), 0
        self.status: int | None = None

    def poll(self, timeout: float = 0) -> int | None:
        """Its exit status, or minus the signal that ended it, once it is over."""
        if self.status is None and select.select([self._server.stdout], [], [], timeout)[0]:
            self.status = int(self._server.stdout.readline())
        return self.status

    def wait(self) -> int:
        """Its status, when it is over.

        Raises:
            TimeoutError: it does not come any further.
        """
        while self.poll(timeout=1) is None:
            self.check_progress()
        return self.status

    def check_progress(self) -> None:
        """To be called once a second; raises TimeoutError with what its threads are at, if the run hangs."""
        before, self._seen = self._seen, traces(self._folder)
        self._idle_looks = self._idle_looks + 1 if self._seen == before else 0
        if self._idle_looks > MAX_IDLE_LOOKS:
            os.kill(self._pid, signal.SIGUSR1)
            time.sleep(1)  # it writes down where it is
            raise TimeoutError(f"no progress for {self._idle_looks} s: {self.errors()}")

    def kill(self) -> int:
        """Ends it as hard as the system can; returns its status, which may be that of a process that was done."""
        if self.status is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
            self.wait()
        assert self.status in (0, -signal.SIGKILL), self.errors()
        return self.status

    def errors(self) -> str:
        """The end of what it printed."""
        return Path(self._folder, "stderr").read_text()[-5000:]


def traces(folder: str) -> dict[str, tuple[int, int]]:
    """What shows that a run goes on: the sizes and times of its files."""
    found = {}
    for parent, _, names in os.walk(folder):
        for path in (os.path.join(parent, name) for name in names):
            with contextlib.suppress(FileNotFoundError):
                found[path] = (os.stat(path).st_size, os.stat(path).st_mtime_ns)
    return found


def serve(flags: list[str]) -> None:
    """Forks a run for every folder that is named on standard input; tells its number, and later its status."""
    import train

    torch.set_num_threads(1)
    for name in LATE_IMPORTS:
        importlib.import_module(name)
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
    with contextlib.suppress(FileNotFoundError):
        return any(name.endswith(files.TEMPORARY) for name in os.listdir(os.path.join(folder, "output")))
    return False


def kill_once(starter: Starter, folder: str, moments: random.Random, secs: float) -> tuple[bool, bool]:
    """Starts the run, which takes about so many seconds if nothing stops it, and kills it.

    Half the time that is as soon as it begins to save a file, the n-th from now; else some time after it did, or
    after the start.  Counted in saves a slow machine is killed as often as a fast one.

    Returns:
        Whether it was killed before it was done, and whether in the middle of a save.
    """
    at_a_save = moments.random() < 0.5
    saves = moments.randint(1, 4) if at_a_save else moments.randint(0, 3)
    delay = 0 if at_a_save else moments.uniform(0, secs / 8)
    process, saving = starter.start(folder), False
    since = looked = time.monotonic()
    while process.poll(timeout=0.0005) is None:
        now = time.monotonic()
        if now > looked + 1:
            process.check_progress()
            looked = now
        if saves:
            before, saving = saving, is_saving(folder)
            if saving and not before:
                saves, since = saves - 1, now
        if not saves and now >= since + delay:
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


def run_to_the_end(starter: Starter, folder: str) -> float:
    """Lets the run alone from now on; returns the seconds that it takes."""
    begin = time.monotonic()
    process = starter.start(folder)
    assert process.wait() == 0, process.errors()
    return time.monotonic() - begin


def outcome_in(folder: str) -> dict[str, Any]:
    """What a run left in a folder."""
    with working_in(folder):
        return runs.outcome()


def harness(
    root: str, num_runs: int, kills_per_run: int, seed: int, extra: tuple[str, ...] = (), num_kills: int = 0
) -> Count:
    """Kills runs up to ``kills_per_run`` times each, until there were so many runs and kills.

    Fails if one does not end as the one in peace.
    """
    print(f"seed {seed}", flush=True)
    count, moments = Count(), random.Random(seed)
    with Starter(extra) as starter:
        os.makedirs(peace := os.path.join(root, "peace"))
        secs, expected = run_to_the_end(starter, peace), outcome_in(peace)
        while count.runs < num_runs or count.kills < num_kills:
            os.makedirs(folder := os.path.join(root, f"run-{count.runs}"))
            for _ in range(kills_per_run):
                killed, saving = kill_once(starter, folder, moments, secs)
                count.kills += killed
                count.while_saving += saving
                with working_in(folder):
                    runs.every_name_is_whole()
                if not killed:
                    break
            run_to_the_end(starter, folder)
            runs.assert_same(outcome_in(folder), expected)
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
