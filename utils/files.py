"""Files that appear whole or not at all, folders that can be written, and locks.

Disks differ: network shares, exFAT and some FUSE file systems refuse permissions, the waiting for the disk, or locks.
A file is written without these; a disk that is full or broken is an error.  This module must not know what the files
hold.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import glob
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from typing import IO, Any

from utils.errors import UserError

logger = logging.getLogger(__name__)

TEMPORARY = ".tmp"  # what the names of files end with that are not whole yet
#: Errors of fsync on a file system that has none; any other is the disk's.
NO_FSYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


@contextlib.contextmanager
def atomic_write(path: str) -> Iterator[IO[bytes]]:
    """Opens a temporary file beside ``path`` that takes its place when the block ends well.

    Whoever looks at ``path``, even after a power cut, finds the old file or the whole new one.

    Raises:
        OSError: the file could not be written, and says so; the old one is untouched.
    """
    folder = os.path.dirname(path) or "."
    try:
        fd, temporary = tempfile.mkstemp(prefix=f".{os.path.basename(path)}.", suffix=TEMPORARY, dir=folder)
    except OSError as e:
        raise _cannot_write(path, e) from e
    try:
        with os.fdopen(fd, "wb") as f:
            yield f
            flush(f)
        set_usual_mode(temporary, 0o666)  # mkstemp's own is 0600 whatever the user's umask
        replace(temporary, path)
    except BaseException as e:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(cause := _cause(e), OSError):
            raise _cannot_write(path, cause) from e
        if cause is e:
            raise
        raise cause from e
    with contextlib.suppress(OSError):  # the file itself is on the disk
        sync(folder)


def set_usual_mode(path: str, mode: int) -> None:
    """Gives a file or folder the permissions ``mode`` as far as the user's umask and the file system let it."""
    umask = os.umask(0)
    os.umask(umask)
    with contextlib.suppress(OSError):  # some have permissions of their own
        os.chmod(path, mode & ~umask)


def flush(file: IO[Any]) -> None:
    """Waits until all that was written to an open file is on the disk, where the file system can wait.

    Raises:
        OSError: the disk does not take it.
    """
    file.flush()
    _fsync(file.fileno())


def sync(path: str) -> None:
    """Waits until a file, or a folder's list of files, is on the disk, where the file system can wait."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError:  # not every system lets a folder be opened
        return
    try:
        _fsync(fd)
    except OSError:
        if not os.path.isdir(path):
            raise
    finally:
        os.close(fd)


def _fsync(fd: int) -> None:
    try:
        os.fsync(fd)
    except OSError as e:
        if e.errno not in NO_FSYNC:
            raise


def replace(path: str, target: str) -> None:
    """Gives a file or folder another name, whoever has that, as ``os.replace``, and tries for a second.

    Network shares, WSL and Windows refuse it while another program, such as a virus scanner, has the target open.

    Raises:
        OSError: it cannot be done.
    """
    for pause in (0.1, 0.3, 0.6):
        try:
            return os.replace(path, target)
        except PermissionError:
            time.sleep(pause)
    os.replace(path, target)


def write_text(path: str, text: str) -> None:
    """Writes a text as UTF-8; see ``atomic_write``.  Bytes of file names that are no text are spelled out."""
    with atomic_write(path) as f:
        f.write(text.encode("utf-8", "backslashreplace"))


class NotWritten(OSError):
    """A file could not be written; the message is for the user."""


def _cause(error: BaseException) -> BaseException:
    """Finds the cause: torch.save reports a full disk, and a signal in the middle, as RuntimeErrors that came of it."""
    while isinstance(error, RuntimeError) and error.__context__ is not None:
        error = error.__context__
    return error


def _cannot_write(path: str, error: OSError) -> OSError:
    if isinstance(error, NotWritten):  # of a file written within the block
        return error
    untouched = "; what was there before is untouched" if os.path.exists(path) else ""
    return NotWritten(f"{path} could not be written ({error.strerror or error}){untouched}")


def remove_stale(*paths: str) -> None:
    """Removes what a process that was killed while it wrote ``paths`` left behind; nobody may be writing them."""
    for path in paths:
        folder, name = os.path.split(path)
        for temporary in glob.glob(os.path.join(glob.escape(folder or "."), f".{glob.escape(name)}.*{TEMPORARY}")):
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def check_writable(folder: str) -> None:
    """Makes a folder if need be.

    Raises:
        UserError: files cannot be written there.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as e:
        raise UserError(f"the folder {folder} cannot be written ({e.strerror}); name another, or free it") from e


TRAINING = "training under this name; wait for it, stop it, or give another --name"


class Locked(UserError):
    """Another process holds a lock.

    Args:
        message: for the user.
        holder: the note that it left in the lock's file; "" if there is none.
    """

    def __init__(self, message: str, holder: str) -> None:
        super().__init__(message)
        self.holder = holder


@contextlib.contextmanager
def file_lock(path: str, busy: str = TRAINING, note: str = "") -> Iterator[None]:
    """Holds a lock while the block runs; the system takes it away from a process that dies.

    Args:
        path: of the lock's file, which goes with the lock but stays behind a process that is killed.
        busy: what the other process is at, and what to do about it.
        note: one line for those who find the lock taken.

    Raises:
        Locked: another process holds it.
    """
    with contextlib.closing(_locked(path, busy)) as f:
        f.truncate(0)
        f.write(f"{os.getpid()}\n{note}\n")
        f.flush()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                os.unlink(path)


@contextlib.contextmanager
def turn(path: str) -> Iterator[None]:
    """Waits for the lock of a file, which stays, and holds it while the block runs."""
    with open(path, "a", encoding="ascii") as f:
        _lock(f, wait=True)
        yield


def _locked(path: str, busy: str) -> IO[str]:
    """The file, open and locked; open only, where the system or the file system has no locks."""
    while True:
        f = open(path, "a+", encoding="utf-8", errors="surrogateescape")  # noqa: SIM115
        try:
            has_locks = _lock(f)
        except OSError as e:
            with f:
                pid, _, note = _text_of(f).partition("\n")
                raise Locked(f"process {pid or 'unknown'} is {busy}", note.rstrip("\n")) from e
        with contextlib.suppress(FileNotFoundError):
            if not has_locks or os.path.samestat(os.fstat(f.fileno()), os.stat(path)):
                return f
        f.close()  # whoever held it has just removed it: lock the file that others will find


def _text_of(f: IO[str]) -> str:
    """Returns what the process that has a lock wrote into its file, which it may be about to do."""
    for _ in range(5):
        f.seek(0)
        if text := f.read():
            return text
        time.sleep(0.02)
    return ""


def _lock(f: IO[str], wait: bool = False) -> bool:
    """Locks an open file; returns false, with a warning, where the system or the file system has no locks.

    Raises:
        OSError: another process holds it, and this one does not wait.
    """
    try:
        import fcntl

        fcntl.lockf(f, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))  # unlike flock's, not inherited by workers
    except ImportError:
        _warn_of_no_locks("the system has none")
    except OSError as e:
        if e.errno in (errno.EACCES, errno.EAGAIN):
            raise
        _warn_of_no_locks(e.strerror)
    else:
        return True
    return False


@functools.cache  # once a process, whatever it locks
def _warn_of_no_locks(reason: str) -> None:
    logger.warning(
        "Files cannot be locked here (%s): nothing keeps two processes from writing the same; start one at a time",
        reason,
    )
