"""The files that a run trains and tests on: what its training state remembers of them, and what a change of them means.

An image that cannot be read has to go, and the run must resume without it; any other change makes another run.  This
module must not know how images become batches.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from utils.images import ImageError, is_as_before, look
from utils.inspection import each
from utils.listing import listed

#: The endings that earlier versions read, whose states hold no names.
EARLIER_ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
#: What earlier versions did not heed in an image, by the traits of ``images.look``.
EARLIER_UNHEEDED = {
    "orientation": "with an EXIF orientation (they are turned now)",
    "transparency": "with transparency (they are put on white now)",
    "float": "of floating-point numbers (0 to 1 is black to white now)",
}


@dataclass(frozen=True)
class Manifest:
    """The files of a folder of images.

    Attributes:
        root: the folder.
        train, test: their names below it, in the order of the images.
        in_memory: all are decoded, so that the data's checksum is one of pixels; else it is one of names.
        fingerprint: of the names, sizes and times of those that are decoded when they are needed.
    """

    root: str
    train: Sequence[str]
    test: Sequence[str]
    in_memory: bool
    fingerprint: str

    def state_dict(self, unreadable: Iterable[str]) -> dict[str, Any]:
        """Returns what a training state holds of it, and of the images that the run could not read."""
        return {
            "train": "\0".join(self.train),  # one text is read a hundred times as fast as a list
            "test": "\0".join(self.test),
            "unreadable": sorted(unreadable),
            "fingerprint": self.fingerprint,
        }

    def names(self, paths: Iterable[str]) -> set[str]:
        """Returns the names of images by their paths; of other paths none."""
        return {os.path.relpath(path, self.root) for path in paths} & {*self.train, *self.test}

    def read_otherwise_before(self) -> list[str]:
        """Counts the images that earlier versions of this program did not find, or read otherwise, as texts."""
        counts = Counter(
            f"with an ending that is read now ({ending})"
            for ending in map(_ending, (*self.train, *self.test))
            if ending not in EARLIER_ENDINGS
        )
        paths = [os.path.join(self.root, name) for name in (*self.train, *self.test)]
        counts.update(EARLIER_UNHEEDED[trait] for traits in each(_traits, paths) for trait in traits)
        return [f"{count} {what}" for what, count in sorted(counts.items())]


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _traits(path: str) -> Collection[str]:
    try:
        found = look(path)
        return () if found and is_as_before(path) else found  # an opaque alpha channel, say
    except ImageError:  # said elsewhere
        return ()


def names_in(saved: Mapping[str, Any], part: str) -> list[str]:
    """Returns the names of a part, train or test, in what ``Manifest.state_dict`` gave."""
    return saved[part].split("\0") if saved[part] else []


def gone_without_harm(saved: Mapping[str, Any], now: Manifest) -> list[str]:
    """Returns the images that are gone since a state was saved, if the run could read none of them.

    Args:
        saved: by ``Manifest.state_dict``; empty in states of earlier versions.
        now: the files as they are.
    """
    if not saved:
        return []
    gone, new = _gone_and_new(saved, now)
    return gone if gone and not new and {*gone} <= {*saved["unreadable"]} else []


def _gone_and_new(saved: Mapping[str, Any], now: Manifest) -> tuple[list[str], list[str]]:
    """Returns the sorted names that only the state has, and those that only the folder has."""
    was, here = {*names_in(saved, "train"), *names_in(saved, "test")}, {*now.train, *now.test}
    return sorted(was - here), sorted(here - was)


def difference(saved: Mapping[str, Any], now: Manifest, same_checksum: bool) -> str:
    """Tells how a folder differs from the one that a state was saved for; "" if it does not.

    Args:
        saved, now: as for ``gone_without_harm``.
        same_checksum: the data's checksum is that of the state's settings.
    """
    of_pixels = same_checksum and now.in_memory
    if not saved and not of_pixels and (read_otherwise := now.read_otherwise_before()):
        return f"this version reads its folder otherwise than the earlier one did: {', '.join(read_otherwise)}"
    if same_checksum:
        return ""
    num_now = len(now.train) + len(now.test)
    if not saved:
        return f"its images were others (there are {num_now} now)"
    gone, new = _gone_and_new(saved, now)
    changes = [f"{what} {listed(names)}" for what, names in (("gone:", gone), ("new:", new)) if names]
    if not changes:
        moved = {*names_in(saved, "train")} ^ {*now.train}
        other_split = f"others to train on, of another --test_fraction: {listed(sorted(moved))}"
        changes = [other_split if moved else "other contents or classes"]
    return f"its folder had {num_now + len(gone) - len(new)} images then, {num_now} now ({'; '.join(changes)})"


def without(result: Mapping[str, Any], saved: Mapping[str, Any], now: Manifest) -> dict[str, Any]:
    """Returns an evaluation's result, by the names of ``EvalResult``, without the test images that are gone since.

    Returns an empty one where images moved between the parts, so that the rest is not in the order of the new ones.
    """
    was, here = names_in(saved, "test"), {*now.test}
    kept = [i for i, name in enumerate(was) if name in here]
    if [was[i] for i in kept] != list(now.test):
        return {}
    return {key: value if isinstance(value, float) else value[kept] for key, value in result.items()}
