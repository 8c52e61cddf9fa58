"""Lists folders: what lies in one, the images below one, and a count of what is left out of them.

Hidden names, and those that systems and archives add, need no word.  This module must not know classes or data sets,
and reads no file.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from utils import images
from utils.errors import UserError

#: Names, in lower case, that a Synology NAS, macOS's archives, Windows and the roots of disks add.
SILENT = frozenset({
    "@eadir", "__macosx", "thumbs.db", "desktop.ini", "lost+found", "$recycle.bin", "system volume information",
})  # fmt: skip


@dataclass
class LeftOut:
    """Counts of what is not read.

    Attributes:
        endings: files that are not read, by their ending in lower case; "" for none.
        loose: images that lie outside of the folders of classes.
        denied: folders that may not be read.
    """

    endings: Counter[str] = field(default_factory=Counter)
    loose: list[str] = field(default_factory=list)
    denied: list[str] = field(default_factory=list)

    def add(self, other: LeftOut) -> None:
        """Adds what was left out elsewhere."""
        self.endings += other.endings
        self.loose += other.loose
        self.denied += other.denied

    def add_loose(self, contents: Contents) -> None:
        """Adds the files that lie beside folders of classes."""
        self.endings += contents.others
        self.loose += contents.images

    def warnings(self) -> list[str]:
        """Returns a line about what may have been meant to be read; none where there is no such thing."""
        by_remedy: dict[str, list[str]] = {}
        for ending, count in _most_common(self.endings):
            if remedy := images.remedy(ending):
                by_remedy.setdefault(remedy, []).append(f"{count:,} {_shown(ending)}")
        said = []
        for remedy, counts in by_remedy.items():
            is_one = len(counts) == 1 and counts[0].startswith("1 ")
            said.append(f"{' and '.join(counts)} {'was' if is_one else 'were'} not read: {remedy}")
        for paths, what in ((self.loose, "outside of the class folders"), (self.denied, "may not be read")):
            if paths:
                kind = "image" if paths is self.loose else "folder"
                said.append(f"{counted(len(paths), kind)} {what}, such as {_shown(min(paths))}")
        return ["; ".join(said)] if said else []

    def notes(self) -> list[str]:
        """Returns a line about the other files, by ending; none without them."""
        counts = [(ending, n) for ending, n in _most_common(self.endings) if not images.remedy(ending)]
        said = [f"{n:,} {_shown(ending) or 'without an ending'}" for ending, n in counts[:10]]
        said += [f"{sum(n for _, n in counts[10:]):,} of other endings"] if counts[10:] else []
        return [f"{', '.join(said)} left out"] if said else []


def counted(number: int, noun: str) -> str:
    """Returns a number and its noun."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def listed(names: Iterable[str]) -> str:
    """Returns some of the names, as a message has them."""
    names = list(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} others" if names[5:] else "")


def _most_common(endings: Counter[str]) -> list[tuple[str, int]]:
    """Returns endings and their counts, the largest first, in an order that is the same on every disk."""
    return sorted(endings.items(), key=lambda item: (-item[1], item[0]))


def _shown(name: str) -> str:
    """Returns a name as one line of a log can have it."""
    return name if name.isprintable() else ascii(name)


@dataclass(frozen=True)
class Contents:
    """Folders and files that lie in a folder itself.

    Attributes:
        folders: the names of the folders in it, sorted.
        images: the paths of the images in it.
        others: its other files, by ending.
    """

    folders: list[str]
    images: list[str]
    others: Counter[str]


def look_into(folder: str) -> Contents:
    """Returns what lies in a folder; folders that links lead back to are left out.

    Raises:
        UserError: it may not be read.
    """
    subfolders, files = _sorted_out(folder)
    contents, endings = Contents(subfolders, [], Counter()), images.endings()
    for entry in files:
        if (ending := _ending(entry.name)) in endings:
            contents.images.append(entry.path)
        else:
            contents.others[ending] += 1
    return contents


def folders_in(folder: str) -> list[str]:
    """Returns the sorted names of the folders in a folder, without those that links lead back to.

    Raises:
        UserError: it may not be read.
    """
    return _sorted_out(folder)[0]


def _sorted_out(folder: str) -> tuple[list[str], list[os.DirEntry[str]]]:
    """Returns the names as ``folders_in`` does, and the files."""
    subfolders: list[os.DirEntry[str]] = []
    files: list[os.DirEntry[str]] = []
    try:
        for entry in _entries(folder):
            (subfolders if _is_folder(entry) else files).append(entry)
    except PermissionError as e:
        raise _denied(folder) from e
    above = _itself_and_above(folder)
    return sorted(x.name for x in subfolders if not (x.is_symlink() and os.path.realpath(x.path) in above)), files


def has_image(folder: str) -> bool:
    """Tells whether an image lies in a folder itself."""
    endings = images.endings()
    return any(_ending(entry.name) in endings and not _is_folder(entry) for entry in _entries(folder))


def images_below(folder: str, left_out: LeftOut) -> list[str]:
    """Returns the paths of the images of a folder and of those in it, sorted.

    Args:
        folder: where to look; links in it are followed, but not to where they come from.
        left_out: takes what is not read.

    Raises:
        UserError: the folder itself may not be read.
    """
    found: list[str] = []
    endings, others = images.endings(), left_out.endings
    seen, waiting = _itself_and_above(folder), [folder]
    while waiting:
        parent, subfolders = waiting.pop(), []
        seen.add(os.path.realpath(parent))
        try:
            for entry in _entries(parent):
                if _is_folder(entry):
                    if os.path.realpath(entry.path) not in seen:
                        subfolders.append(entry.path)
                elif (ending := _ending(entry.name)) in endings:
                    found.append(entry.path)
                else:
                    others[ending] += 1
        except PermissionError as e:
            if parent == folder:
                raise _denied(folder) from e
            left_out.denied.append(parent)
        waiting += reversed(subfolders)  # one after the other, to its bottom
    return sorted(found)


def _denied(folder: str) -> UserError:
    return UserError(f"the folder {folder} may not be read; change its permissions")


def _entries(folder: str) -> Iterator[os.DirEntry[str]]:
    """Yields what lies in a folder and may be meant to be read."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name[0] != "." and entry.name.lower() not in SILENT:
                yield entry


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Tells folders and links to them; a link that leads nowhere, or where one may not look, is a file's."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _ending(name: str) -> str:
    dot = name.rfind(".")
    return name[dot:].lower() if dot > 0 else ""


def _itself_and_above(folder: str) -> set[str]:
    """Returns the real paths of a folder and of those it is in."""
    paths = {path := os.path.realpath(folder)}
    while (parent := os.path.dirname(path)) != path:
        paths.add(path := parent)
    return paths
