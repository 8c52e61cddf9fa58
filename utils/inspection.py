"""All images of a run, looked at before it starts, so that a bad one costs minutes and not the run.

Ranks of a machine share its images, and every machine looks at its own copy of all.  This module must not know which
images are trained on, nor end a run: it reports.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from tqdm import tqdm

from utils import dist_util
from utils.images import ImageError, look

#: Images are looked at one after the other until so many in a row take so many times the processor's time: these wait
#: for a slow disk, and from there on so many threads wait at once.  Where 5 ms pass before a file is open, 100,000 take
#: 22 s instead of 570; where the files are in memory, one thread takes 5 s, and many 9 (AMD EPYC, 2 cores, Pillow 13).
ROW, SLOW, THREADS = 128, 8, 64

#: An image's path, and its traits or its error.
Look = tuple[str, frozenset[str] | ImageError]


@dataclass(frozen=True)
class Inspection:
    """The images that cannot be read, and how many others have which trait.

    Attributes:
        reasons: why an image cannot be read, by its path.
        traits: the number of images that have each trait, by the names of ``images.look``.
    """

    reasons: dict[str, str]
    traits: Counter[str]


def inspect_images(paths: Sequence[str]) -> Inspection:
    """Looks at the header and the end of every image; every rank must call it, and all get the same.

    Args:
        paths: of the images, the same on every rank.

    Raises:
        OSError, MemoryError: this machine cannot look.
    """
    group = dist_util.group()
    machines, own_rank = (group.machines, dist_util.rank()) if group else ([""], 0)
    here = [rank for rank, machine in enumerate(machines) if machine == machines[own_rank]]
    mine = paths[here.index(own_rank) :: len(here)]
    bar = tqdm(_look_at_all(mine), "Looking at images", len(mine), unit="image", leave=False, **dist_util.bar_options())
    reasons: dict[str, str] = {}
    traits: Counter[str] = Counter()
    for _, found in bar:
        if isinstance(found, ImageError):
            reasons |= found.reasons
        else:
            traits.update(found)
    return _merge(dist_util.gather((reasons, traits)), machines)


def _merge(found: list[tuple[dict[str, str], Counter[str]]], machines: list[str]) -> Inspection:
    """Adds up what ranks found: the bad images of all, and traits as the first machine has them."""
    reasons = {path: reason for bad, _ in found for path, reason in bad.items()}
    of_one_machine = [traits for (_, traits), machine in zip(found, machines) if machine == machines[0]]
    return Inspection(dict(sorted(reasons.items())), sum(of_one_machine, Counter()))


def _look_at_all(paths: Sequence[str]) -> Iterator[Look]:
    """Looks at images in order: in one thread, which is the fastest where the disk is, else in many."""
    done, slow = 0, False
    while done < len(paths) and not slow:
        start, start_cpu = time.perf_counter(), time.thread_time()
        row = [_look(path) for path in paths[done : done + ROW]]
        slow = time.perf_counter() - start > SLOW * (time.thread_time() - start_cpu)
        done += len(row)
        yield from row
    with ThreadPoolExecutor(THREADS) as pool:
        for first in range(done, len(paths), ROW * THREADS):  # a few at a time, so that an error ends all soon
            yield from pool.map(_look, paths[first : first + ROW * THREADS])


def _look(path: str) -> Look:
    try:
        return path, look(path)
    except ImageError as e:
        return path, e


def fingerprint(paths: Sequence[str], root: str) -> str:
    """Returns a checksum of images' names below ``root``, their sizes and the times of their last change.

    Reads none of them.
    """
    checksum, prefix = hashlib.sha256(), os.path.join(root, "")
    for path in paths:
        try:
            found = os.stat(path)
            state = f"{found.st_size} {found.st_mtime_ns}"
        except OSError:  # gone, or not to be reached: looking at it says why
            state = "none"
        checksum.update(os.fsencode(f"{path.removeprefix(prefix)}\0{state}\0"))
    return checksum.hexdigest()
