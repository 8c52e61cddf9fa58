"""Standard output and error of a program that must outlive whoever reads them: streams, log lines, progress.

This module must not know what is shown.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

from tqdm.contrib.logging import logging_redirect_tqdm

#: After these a stream may take text again later: its reader is slow, or a file's disk is full.
PASSING = (errno.EAGAIN, errno.ENOSPC, errno.EDQUOT)
#: Seconds between two lines of progress where there is no terminal.
LINE_SECS = 10


class _Lasting:
    """A stream of text that never fails: what nobody can read is dropped.

    Args:
        stream: the one written to.  Its descriptor becomes the null device's once its reader is gone, so that
            libraries and other processes live on as well.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Writes a text; returns its length."""
        with _dropping(self.stream):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Hands over what has been written."""
        with _dropping(self.stream):
            self.stream.flush()


@contextlib.contextmanager
def _dropping(stream: Any) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        if e.errno not in PASSING:
            _to_null(stream)


def _to_null(stream: Any) -> None:
    """Gives a stream's descriptor to the null device, which takes what is still to be written."""
    with contextlib.suppress(OSError), open(os.devnull, "w") as null:
        os.dup2(null.fileno(), stream.fileno())


@contextlib.contextmanager
def lasting_streams() -> Iterator[None]:
    """Lets the block write to standard output and error whatever becomes of them: a pipe that closes, a terminal's end.

    Streams that were closed from the start lead to the null device; their descriptors stay so, for else the next file
    that is opened would get one, and what libraries print.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it gets the lowest number that is free
    with open(os.devnull, "w") as null:
        out, err = _Lasting(sys.stdout or null), _Lasting(sys.stderr or null)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):  # type: ignore[type-var]
            yield


def flush_at_exit() -> None:
    """Hands over what is still to be written, or drops it: Python would end with another exit code."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            _to_null(stream)


@contextlib.contextmanager
def log_lines(level: int) -> Iterator[None]:
    """Shows log lines on standard error, each once, whoever has set logging up before; all is as it was afterwards.

    Handlers of the root logger that write to standard output or error make room for one; others, such as those of
    files, get the lines too.

    Args:
        level: the least that is logged.
    """
    root, pillow = logging.root, logging.getLogger("PIL")  # which utils/images.py silences
    before = root.level, root.handlers, pillow.level
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s - %(levelname)s - %(name)s - %(message)s", "%m/%d/%Y %H:%M:%S"))
    root.handlers = [h for h in root.handlers if not _is_of_console(h)] + [handler]
    root.setLevel(level)
    try:
        with logging_redirect_tqdm():
            yield
    finally:
        root.handlers = before[1]
        root.setLevel(before[0])
        pillow.setLevel(before[2])


def _is_of_console(handler: logging.Handler) -> bool:
    streams = (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
    own = getattr(handler, "stream", None)
    return own is not None and any(own in (s, getattr(s, "stream", None)) for s in streams)


# ---- progress ----


def on_terminal() -> bool:
    """Tells if standard error is a terminal that a bar fits on: those that programs make may have no width."""
    try:
        return sys.stderr is not None and sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except OSError:  # it is gone, or not the system's
        return False


def bar_options() -> dict[str, Any]:
    """Returns tqdm's options for standard error: a bar on a terminal, elsewhere lines of what takes long."""
    if on_terminal():
        return {"disable": False, "mininterval": 0.1, "dynamic_ncols": True}
    line = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]"
    return {"disable": False, "file": _Lines(), "mininterval": LINE_SECS, "delay": LINE_SECS, "bar_format": line}


class _Lines:
    """The file of a tqdm bar where there is no terminal: makes each state a line, and none of a bar's end."""

    def write(self, text: str) -> None:
        """Writes what tqdm draws, without what moves a cursor."""
        line = text.replace("\x1b[A", "").strip()
        with contextlib.suppress(OSError):  # of a tool, whose streams do not last
            if line and sys.stderr is not None:  # else it would go to standard output
                sys.stderr.write(f"{line}\n")

    def flush(self) -> None:
        """Does nothing: a line of standard error is not kept back."""
