"""The folder of logs that is a run's, among runs of one name.

Runs of one name and different --output_dir share a folder of logs.  ``logs/<name>`` is of the first that logs there;
another's is ``logs/<name>-2``, and so on.  Its file ``.run`` says whose it is: the run's id, which is in its training
state as well, and the path of that state from ``logs``: both may move together.  This module must not know what logs
hold.
"""

from __future__ import annotations

import contextlib
import glob
import itertools
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

from utils import files
from utils.run_state import RunPaths

logger = logging.getLogger("train")

OWNER_FILE = ".run"


@dataclass(frozen=True)
class Owner:
    """The run that a folder of logs belongs to.

    Args:
        run_id: made when it first started, and kept in its state.
        state: the path of that state, which need not be there yet; see ``_place``.
    """

    run_id: str
    state: str


def sign(paths: RunPaths, run_id: str) -> None:
    """Notes in a run's folder of logs that it belongs to the run.

    Raises:
        OSError: the disk does not take it.
    """
    path, mine = os.path.join(paths.log_dir, OWNER_FILE), Owner(run_id, _place(paths))
    if _owner(paths) != mine:
        files.write_text(path, json.dumps(asdict(mine)))


def claim(paths: RunPaths, run_id: str, locks: contextlib.ExitStack) -> RunPaths:
    """Takes the folder of logs that belongs to a run, or else one that belongs to none, and locks it.

    Args:
        paths: the run's files.
        run_id: as its state has it; "" for a new run, and for a state that is older than these.
        locks: takes the lock.

    Returns:
        The run's files, with that folder.

    Raises:
        UserError: another process trains in it, or it cannot be written.
    """
    here = _place(paths)
    for found in _candidates(paths, run_id):
        files.check_writable(found.log_dir)
        try:
            locks.enter_context(files.file_lock(found.log_lock, note=here))
        except files.Locked as e:
            if e.holder in ("", here):
                raise
            continue  # another run has just started, and has not signed yet
        if found.log_number > 1:
            whose = f" ({_path(paths, owner)})" if (owner := _owner(paths)) else ""
            text = "%s is of another run of this name%s: the logs of this run are in %s"
            logger.warning(text, paths.log_dir, whose, found.log_dir)
        return found
    raise AssertionError("there is always one more")


def find(paths: RunPaths) -> RunPaths:
    """Returns a run's files with the folder where its logs are, in which nothing may be changed."""
    here = _place(paths)
    return next((x for x in _existing(paths) if (owner := _owner(x)) and owner.state == here), paths)


def _candidates(paths: RunPaths, run_id: str) -> Iterator[RunPaths]:
    """The folders that may be a run's: its own, then those of nobody."""
    here, existing = _place(paths), list(_existing(paths))
    owned = [(x, owner) for x in existing if (owner := _owner(x))]
    if run_id:
        yield from (x for x, owner in owned if owner == Owner(run_id, here))
        # Moved with its output; else this is a copy of it, and the logs are the original's.
        yield from (x for x, owner in owned if owner.run_id == run_id and not os.path.exists(_path(x, owner)))
    else:  # started over, or it was killed before its first save
        yield from (x for x, owner in owned if owner.state == here)
    taken = {x.log_number for x, _ in owned}
    if 1 not in taken:
        yield paths  # what earlier versions logged there is dealt with as they did
    taken |= {x.log_number for x in existing if _has_files(x)}  # maybe of a run of the name <name>-2
    yield from (replace(paths, log_number=n) for n in itertools.count(2) if n not in taken)


def _existing(paths: RunPaths) -> Iterator[RunPaths]:
    """The folders of a name that are there."""
    numbers = [path.rpartition("-")[2] for path in glob.glob(f"{glob.escape(paths.log_dir)}-*")]
    for n in [1, *sorted(int(text) for text in numbers if text.isdecimal() and text[0] != "0" and text != "1")]:
        if os.path.isdir((found := replace(paths, log_number=n)).log_dir):
            yield found


def _place(paths: RunPaths) -> str:
    """The path of a run's state from the folder of all runs' logs."""
    state = os.path.join(os.path.realpath(paths.output_dir), os.path.basename(paths.state))
    try:
        return os.path.relpath(state, os.path.realpath(paths.log_root))
    except ValueError:  # on another drive of Windows
        return state


def _path(paths: RunPaths, owner: Owner) -> str:
    """The absolute path of the state of a folder's owner."""
    return os.path.normpath(os.path.join(os.path.realpath(paths.log_root), owner.state))


def _owner(paths: RunPaths) -> Owner | None:
    """The run that a folder belongs to; None where nothing says so, as in those of earlier versions."""
    try:
        with open(os.path.join(paths.log_dir, OWNER_FILE), encoding="ascii") as f:
            found = Owner(**json.load(f))
    except (OSError, ValueError, TypeError):
        return None
    return found if isinstance(found.run_id, str) and isinstance(found.state, str) else None


def _has_files(paths: RunPaths) -> bool:
    return any(not name.startswith(".") for name in os.listdir(paths.log_dir))
