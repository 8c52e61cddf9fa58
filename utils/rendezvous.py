"""Lets the ranks that a launcher started meet, also after a restart, and not wait for ever.

``dist_util`` alone calls this.
"""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

from utils.errors import UserError

#: Sets the seconds that a rank waits for another in the training; launchers have no setting for it.
TIMEOUT_VARIABLE = "TRAIN_TIMEOUT_SECS"


#: What a launcher tells each rank; source: pytorch.org/docs/stable/distributed.html.
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

#: By these srun, Open MPI and MPICH tell a process how many they started; sbatch and salloc set SLURM_NTASKS only.
TASKS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


def check_variables() -> None:
    """Raises UserError if a launcher told only a part of ``VARIABLES``."""
    if missing := [name for name in VARIABLES if not os.environ.get(name)]:
        size = os.environ["WORLD_SIZE"]
        raise UserError(
            f"what the launcher set cannot be used: {', '.join(missing)} missing or empty, with WORLD_SIZE={size}; "
            "start with torchrun, or unset WORLD_SIZE to train with one process"
        )


def check_tasks() -> None:
    """Raises UserError if a scheduler started several processes, each of which takes itself for the only one.

    Whoever means that, for trainings with names of their own, says it with WORLD_SIZE=1.
    """
    counts = {name: int(text) for name in TASKS if (text := os.environ.get(name, "")).isdecimal()}
    several = next((name for name, number in counts.items() if number > 1), None)
    if several is not None and not os.environ.get("WORLD_SIZE"):
        raise UserError(
            f"{several}={counts[several]}: this is one of {counts[several]} processes that do not know of one another; "
            "start one a machine and let torchrun start the ranks (srun --ntasks-per-node=1 torchrun "
            "--nproc_per_node=N train.py, see docs/distributed.md), or set WORLD_SIZE=1 where each trains on its own"
        )


def read_timeout() -> timedelta:
    """Reads ``TRAIN_TIMEOUT_SECS``; raises UserError if it is not a number of seconds."""
    text = os.environ.get(TIMEOUT_VARIABLE, "600")
    if not text.isdecimal() or not 0 < int(text) <= 86400:
        raise UserError(f"{TIMEOUT_VARIABLE}={text}: expected seconds, from 1 to 86400")
    return timedelta(seconds=int(text))


def fresh_store(store: dist.Store, own_rank: int, size: int, timeout: timedelta) -> dist.Store:
    """Returns a part of the store that no rank used before.

    torchrun keeps its store when it restarts the ranks, and PyTorch (2.14) would read there where those
    before them listened.  The count of restarts is no remedy: each machine has its own.  So rank 0 makes a
    name up, and gives it to each rank under a key that this rank has made up as well.
    """
    if own_rank:
        key = uuid.uuid4().hex
        store.set(f"key/{own_rank}", key)
        name = store.get(f"name/{key}").decode()
        store.add(f"{name}/joined", 1)
        return dist.PrefixStore(name, store)
    name, deadline = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    while (joined := 1 + store.add(f"{name}/joined", 0)) < size:
        for other in range(1, size):
            if store.check([f"key/{other}"]):
                store.set(f"name/{store.get(f'key/{other}').decode()}", name)
        if time.monotonic() > deadline:
            raise RuntimeError(f"{joined} of {size} ranks joined")
        time.sleep(0.02)
    return dist.PrefixStore(name, store)
