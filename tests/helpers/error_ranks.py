"""Errors of several ranks, and of what a launcher sets: each rank is a forked child."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import torch

from tests.helpers.error_inputs import pretend_gpus, trained
from tests.helpers.errors import Case, Group, Launch
from tests.helpers.forked import Forked
from tests.helpers.runs import RUN, every_name_is_whole


def launched(*ranks: list[str], gpus: int | None = None, **env: str | None) -> Callable[[], Launch]:
    """As many ranks as have flags here, each with its own."""
    return lambda: Launch(ranks=ranks, env=env, prepare=None if gpus is None else pretend_gpus(gpus))


def mps_of_a_launcher() -> Launch:
    def patch() -> None:
        torch.backends.mps.is_available = lambda: True

    return Launch(ranks=[["--device", "mps"]], prepare=patch)


def unequal_shares() -> Launch:
    trained()
    return Launch(["--num_steps", "5"], ranks=[[], [], []])


def kill_second(children: list[Forked]) -> None:
    deadline = time.monotonic() + 60
    while not os.path.exists("output/a_last.pt"):
        assert time.monotonic() < deadline, children[0].stderr()
        time.sleep(0.01)
    os.kill(children[1].pid, signal.SIGKILL)


def lost_rank() -> Launch:
    flags = ["--num_steps", "100000", "--warmup_steps", "1"]
    return Launch(flags, ranks=[[], []], during=kill_second, after=every_name_is_whole)


RANKS = [
    Group("Several ranks", flags=RUN, cases=[
        Case("rank-without-launcher", "a rank without a launcher", "--local_rank 1", "torchrun"),
        Case("rank-contradicts", "a rank that contradicts the launcher", launched(["--local_rank", "1"]),
             "LOCAL_RANK"),
        Case("launcher-no-number", "a variable of the launcher that is no number", launched([], LOCAL_RANK="x"),
             "LOCAL_RANK=x"),
        Case("launcher-incomplete", "a variable of the launcher is missing", launched([], MASTER_PORT=None),
             "MASTER_PORT", do="Start with torchrun, which sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT."),
        Case("launcher-empty", "or empty", launched([], [], MASTER_ADDR=""), "MASTER_ADDR"),
        Case("srun-without-torchrun", "several processes of `srun` or `mpirun`, and no launcher of ranks",
             lambda: Launch(env={"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}), "torchrun"),
        Case("gpus-too-few", "more ranks than GPUs", launched(["--device", "auto"], gpus=2, LOCAL_RANK="2"), "2"),
        Case("device-mps-ranks", "several ranks on Apple's GPU", mps_of_a_launcher, "--device mps"),
        Case("devices-differ", "ranks on different kinds of device",
             launched(["--device", "cpu"], ["--device", "cuda"], gpus=2), "--device",
             do="One of the machines has no GPU, or its PyTorch finds none."),
        Case("timeout-no-number", "a time to wait that is none", launched([], TRAIN_TIMEOUT_SECS="0"),
             "TRAIN_TIMEOUT_SECS=0"),
        Case("ranks-differ", "ranks with different flags, data or weights", launched(["--seed", "0"], ["--seed", "1"]),
             "--seed", do="Machines with disks of their own may have different files: compare them."),
        Case("rank-alone-fails", "an error that not all ranks have",
             launched([], ["--pretrained_dir", "nosuch.npz"]), "nosuch.npz", do="Look at that rank's machine."),
        Case("ranks-cannot-share", "a number of ranks that cannot share the run's batch", unequal_shares, "1, 2, 4"),
        Case("ranks-not-met", "a rank that does not come", launched([], WORLD_SIZE="2", TRAIN_TIMEOUT_SECS="1"),
             "127.0.0.1", code=1, do="An address, a port or a firewall, or fewer ranks than announced."),
        Case("rank-lost", "another rank is killed", lost_rank, "output/a_last.pt", 1,
             "Look for what ended that rank; the same command resumes."),
    ]),
]  # fmt: skip
