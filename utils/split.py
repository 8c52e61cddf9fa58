"""Splits the images of a class into those to train on and those to test on, by a hash of their names.

An image's side depends on its own name alone: images that are added move no others, and every machine, rank and later
evaluation finds the same split.  This module must not read the images' folders.
"""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections.abc import Iterable

#: Share of the images that are tested on, in expectation.
DEFAULT_FRACTION = 0.2


def position(name: str) -> float:
    """Returns a number in [0, 1) that looks random and depends on a name alone.

    Args:
        name: an image's path below the folder of its class; macOS may write its letters in another Unicode form.
    """
    name = unicodedata.normalize("NFC", name).replace(os.sep, "/")
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return (int.from_bytes(digest[:7], "big") >> 3) / 2**53  # the first bits, as many as a float has


def to_test_on(names: Iterable[str], fraction: float) -> set[str]:
    """Returns those of the names in a class that are tested on; the others are trained on.

    They are those whose ``position`` is below the fraction.  A side without one gets the name whose position is nearest
    to the fraction: the only one that another image may move.

    Args:
        names: at least two, for both sides to have one; of one name it is that.
        fraction: above 0; 1 for all names.
    """
    positions = sorted((position(name), name) for name in names)
    if fraction >= 1:
        return {name for _, name in positions}
    count = sum(place < fraction for place, _ in positions)
    count = max(min(count, len(positions) - 1), 1)
    return {name for _, name in positions[:count]}
