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
