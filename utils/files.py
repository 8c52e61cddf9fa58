"""Files that appear whole or not at all, folders that can be written, and locks.

This module must not know what the files hold.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import tempfile
from collections.abc import Iterator
from typing import IO

from utils.errors import UserError

TEMPORARY = ".tmp"  # what the names of files end with that are not whole yet


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
            f.flush()
            os.fsync(f.fileno())
        set_usual_mode(temporary, 0o666)  # mkstemp's own is 0600 whatever the user's umask
        os.replace(temporary, path)
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
    """Gives a file or folder the permissions ``mode`` as far as the user's umask lets new ones have them."""
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(path, mode & ~umask)


def sync(path: str) -> None:
    """Waits until a file, or a folder's list of files where the system can, is on the disk."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError:  # not every system lets a folder be opened
        return
    try:
        os.fsync(fd)
    except OSError:
        if not os.path.isdir(path):
            raise
    finally:
        os.close(fd)


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


@contextlib.contextmanager
def file_lock(path: str, busy: str = TRAINING) -> Iterator[None]:
    """Holds a lock while the block runs; the system takes it away from a process that dies.

    Args:
        path: of the lock's file, which goes with the lock but stays behind a process that is killed.
        busy: what the other process is at, and what to do about it.

    Raises:
        UserError: another process holds it.
    """
    with contextlib.closing(_locked(path, busy)) as f:
        f.truncate(0)
        f.write(f"{os.getpid()}\n")
        f.flush()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                os.unlink(path)


def _locked(path: str, busy: str) -> IO[str]:
    """The file, open and locked; open only, where the system or the file system has no locks."""
    while True:
        f = open(path, "a+", encoding="ascii")  # noqa: SIM115
        try:
            import fcntl

            fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, not inherited by worker processes
        except ImportError:
            return f
        except OSError as e:
            if e.errno not in (errno.EACCES, errno.EAGAIN):
                return f
            with f:
                f.seek(0)
                raise UserError(f"process {f.read().strip() or 'unknown'} is {busy}") from e
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(f.fileno()), os.stat(path)):
                return f
        f.close()  # whoever held it has just removed it: lock the file that others will find
