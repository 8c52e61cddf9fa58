"""All images of a run, looked at before it starts, so that a bad one costs minutes and not the run.

Ranks of a machine share its images, and every machine looks at its own copy of all.  This module must not know which
images are trained on, nor end a run: it reports.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from tqdm import tqdm

from utils import dist_util
from utils.images import ImageError, look

#: Images are looked at one after the other until so many in a row take so many times the processor's time: these wait
#: for a slow disk, and from there on so many threads wait at once.  Where 5 ms pass before a file is open, 100,000 take
#: 22 s instead of 570; where the files are in memory, one thread takes 5 s, and many 9 (AMD EPYC, 2 cores, Pillow 13).
ROW, SLOW, THREADS = 128, 8, 64
#: Less than this for each is no slow disk, but other work on the processor.
WAIT_SECS = 0.0005

T = TypeVar("T")


def inspect_images(paths: Sequence[str]) -> dict[str, str]:
    """Looks at the header and the end of every image; every rank must call it, and all get the same.

    Args:
        paths: of the images, the same on every rank.

    Returns:
        Why images cannot be read, by their paths.

    Raises:
        OSError, MemoryError: this machine cannot look.
    """
    group = dist_util.group()
    machines, own_rank = (group.machines, dist_util.rank()) if group else ([""], 0)
    here = [rank for rank, machine in enumerate(machines) if machine == machines[own_rank]]
    mine = paths[here.index(own_rank) :: len(here)]
    looks = each(_look, mine)
    bar = tqdm(looks, "Looking at images", len(mine), unit="image", leave=False, **dist_util.bar_options())
    found = {path: reason for reasons in bar for path, reason in reasons.items()}
    of_all_ranks = [item for reasons in dist_util.gather(found) for item in reasons.items()]
    return dict(sorted(of_all_ranks))


def each(function: Callable[[str], T], paths: Sequence[str]) -> Iterator[T]:
    """Calls a function for files in order: in one thread, which is the fastest where the disk is, else in many."""
    done, slow = 0, False
    while done < len(paths) and not slow:
        start, start_cpu = time.perf_counter(), time.thread_time()
        row = [function(path) for path in paths[done : done + ROW]]
        slow = time.perf_counter() - start > max(SLOW * (time.thread_time() - start_cpu), ROW * WAIT_SECS)
        done += len(row)
        yield from row
    with ThreadPoolExecutor(THREADS) as pool:
        for first in range(done, len(paths), ROW * THREADS):  # a few at a time, so that an error ends all soon
            yield from pool.map(function, paths[first : first + ROW * THREADS])


def _look(path: str) -> dict[str, str]:
    """Returns why an image cannot be read, by its path; nothing of a good one."""
    try:
        look(path)
    except ImageError as e:
        return e.reasons
    return {}


def fingerprint(paths: Sequence[str], root: str) -> str:
    """Returns a checksum of images' names below ``root``, their sizes and the times of their last change.

    Reads none of them.
    """
    checksum, prefix = hashlib.sha256(), os.path.join(root, "")
    for path, state in zip(paths, each(_size_and_time, paths)):
        checksum.update(os.fsencode(f"{path.removeprefix(prefix)}\0{state}\0"))
    return checksum.hexdigest()


def _size_and_time(path: str) -> str:
    try:
        found = os.stat(path)
        return f"{found.st_size} {found.st_mtime_ns}"
    except OSError:  # gone, or not to be reached: looking at it says why
        return "none"
