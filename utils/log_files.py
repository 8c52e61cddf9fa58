"""The files of a run's logs: TensorBoard events and ``metrics.jsonl``.

Only the main process's writer writes.  This module must not know what is trained.
"""

from __future__ import annotations

import contextlib
import glob
import json
import logging
import math
import os
import secrets
import socket
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image

from utils import files
from utils.errors import UserError

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
EVENT_FILES = "events.out.tfevents.*"  # the * begins with the second in which it was made


def check_tensorboard() -> None:
    """Raises UserError if TensorBoard's events could not be written for want of the package, or of a newer one."""
    try:
        import tensorboard  # noqa: F401
        from tensorboard.compat.proto import event_pb2  # noqa: F401
        from torch.utils.tensorboard import summary  # noqa: F401
    except Exception as e:  # old ones raise what their own imports raise: of pkg_resources, of protobuf
        raise UserError(
            f"the package tensorboard cannot be imported ({e}), which a training writes its log with; "
            "pip install --upgrade 'tensorboard>=2.21'"
        ) from e


class MetricsWriter:
    """Writes scalars as TensorBoard events and as one JSON object a line, under the same tags.

    Files of an earlier run in the folder are moved to ``earlier-N/`` below it, so that neither curve
    runs into the other.

    Args:
        log_dir: the run's folder, made if need be.
        enabled: False on processes that write nothing.
        lengths: what ``flush`` gave when the state was saved from which the run resumes: what was written
            later is cut off, for it will be written again.  None: a new run.
        step: the step of that state.
    """

    def __init__(
        self, log_dir: str, enabled: bool = True, lengths: Mapping[str, int] | None = None, step: int = 0
    ) -> None:
        self.enabled = enabled
        if not enabled:
            return
        os.makedirs(log_dir, exist_ok=True)
        if lengths is not None and not _cut_off(log_dir, lengths):
            logger.warning("%s does not hold the logs of the run up to step %d: they begin after it", log_dir, step)
            lengths = None
        if lengths is None:
            _set_aside_earlier(log_dir)
        self._lengths = {name: n for name, n in (lengths or {}).items() if name != METRICS_FILE}
        # TensorBoard, if it is looking, forgets what has been cut off from then on.
        self._events = EventFile(log_dir, purge_step=step + 1 if step else None)
        self._lines = open(os.path.join(log_dir, METRICS_FILE), "ab")  # noqa: SIM115
        self._end: int | None = None  # of the events that a longer run keeps

    def write(self, step: int, values: dict[str, float], notes: Mapping[str, float] | None = None) -> None:
        """Adds one line and its scalars, which are in the files when it returns.

        Args:
            step: of the line.
            values: by their tags.
            notes: what stands in the line only.

        Raises:
            FloatingPointError: a value is not finite; nothing is written.
            OSError: the files cannot take it.
        """
        check_finite(step, values)
        if not self.enabled:
            return
        with _named(self._lines.name):
            self._lines.write(json.dumps({"step": step, **values, **(notes or {})}).encode() + b"\n")
            self._lines.flush()
        self._events.add_scalars(values, step)

    def show(self, step: int, tag: str, make: Callable[[], Image.Image | str | None]) -> None:
        """Adds the image that ``make`` returns, or the text, as Markdown, to the events; nothing if it is empty.

        What cannot be made is a warning; what cannot be written ends the run, as it would with the next line.
        """
        summary = None
        if self.enabled:
            with only_a_warning(f"{tag} of step {step} is not in TensorBoard"):
                summary = _summary(tag, make())
        if summary is not None:
            self._events.add_summary(summary, step)

    def hyperparameters(self, step: int, values: Mapping[str, object]) -> None:
        """Adds the run to the hparams tab, which shows the last value of each of its scalars beside it.

        ``SummaryWriter.add_hparams`` would make a run of its own for it, and write down an experiment: the
        tab would then know the values of one run only.

        Args:
            step: the last step, of which all else must be written.  The entry counts as one later and is
                left out of what ``flush`` counts: a run that is resumed with more steps writes its own.
            values: the run's flags.
        """
        if not self.enabled:
            return
        from torch.utils.tensorboard.summary import hparams

        summaries = []
        with only_a_warning("the flags are not in TensorBoard"):
            plain = {name: x if type(x) in (int, float) else _as_utf8(str(x)) for name, x in values.items()}
            _, *summaries = hparams(plain, {})  # the begin and the end of a session
        self._end = self._events.file.tell()
        for summary in summaries:
            self._events.add_summary(summary, step + 1)

    def flush(self) -> dict[str, int]:
        """Has everything on the disk, for a state that is saved next must not be ahead of its logs.

        Returns:
            The bytes of each of the run's files so far, by their names.
        """
        if not self.enabled:
            return {}
        for file in (self._lines, self._events.file):
            with _named(file.name):
                files.flush(file)
        own = {os.path.basename(file.name): file.tell() for file in (self._lines, self._events.file)}
        if self._end is not None:
            own[os.path.basename(self._events.file.name)] = self._end
        return {**self._lengths, **own}

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the files; all that was written is in them already."""
        if self.enabled:
            for file in (self._lines, self._events.file):
                with contextlib.suppress(OSError):  # ``write`` has raised it already
                    file.close()


class EventFile:
    """TensorBoard's file of one run, written at once.

    torch's SummaryWriter writes from a thread: where the disk is full that prints a stack, and the run
    learns of it late.  Source of the names and of the first record: ``event_file_writer`` of tensorboard.

    Args:
        folder: where it is made.
        purge_step: from which step on TensorBoard is to forget what other files of the folder said.
    """

    def __init__(self, folder: str, purge_step: int | None = None) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        earlier = glob.glob(os.path.join(glob.escape(folder), EVENT_FILES))
        # TensorBoard reads files in the order of their names, those of one second in any.
        second = max([int(time.time()), *(int(path.split(".tfevents.")[-1].split(".")[0]) + 1 for path in earlier)])
        # The number at the end tells this run's files from those of any other.
        name = f"{EVENT_FILES[:-1]}{second:010d}.{socket.gethostname()}.{os.getpid()}.{secrets.randbits(32)}"
        self.file = open(os.path.join(folder, name), "xb")  # noqa: SIM115
        self._records = RecordWriter(self.file)
        self._add(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if purge_step is not None:
            start = SessionLog(status=SessionLog.START)
            self._add(Event(wall_time=time.time(), step=purge_step, session_log=start))

    def add_scalars(self, values: Mapping[str, float], step: int) -> None:
        """Adds a point to each tag's curve."""
        from torch.utils.tensorboard.summary import scalar  # half a second, not spent by evaluations

        for tag, value in values.items():
            self.add_summary(scalar(tag, value), step)

    def add_summary(self, summary: Any, step: int) -> None:
        """Adds what a function of ``torch.utils.tensorboard.summary`` gave."""
        from tensorboard.compat.proto.event_pb2 import Event

        self._add(Event(wall_time=time.time(), step=step, summary=summary))

    def _add(self, event: Any) -> None:
        with _named(self.file.name):
            self._records.write(event.SerializeToString())
            self._records.flush()


def _summary(tag: str, shown: Image.Image | str | None) -> Any:
    from torch.utils.tensorboard import summary

    if isinstance(shown, Image.Image):
        return summary.image(tag, np.asarray(shown.convert("RGB")), dataformats="HWC")
    return summary.text(tag, shown) if shown else None


def _as_utf8(text: str) -> str:
    """Spells out the bytes of file names that are no text, which events do not take."""
    return text.encode("utf-8", "backslashreplace").decode()


@contextlib.contextmanager
def only_a_warning(words: str) -> Iterator[None]:
    """Makes a warning of whatever fails in the block, but for signals: no training ends for want of an image.

    Lack of memory is one, too: if the training lacks it as well, it says so itself, with the remedy.  An error of the
    device that nothing can follow is none.
    """
    try:
        yield
    except torch.AcceleratorError:
        raise
    except Exception as e:
        # As a text: a record that is kept would keep what the error's frames hold, such as a batch on a GPU.
        logger.warning("%s (%s: %s)", words, type(e).__name__, " ".join(str(e).split()))
        logger.debug("%s", traceback.format_exc())


@contextlib.contextmanager
def _named(path: str) -> Iterator[None]:
    """Lets an error of the system say of which file it is."""
    try:
        yield
    except OSError as e:
        raise OSError(f"{path} could not be written ({e.strerror or e})") from e


def read_lines(log_dir: str) -> list[dict[str, float]]:
    """Returns the lines of a run's ``metrics.jsonl``, an object each.

    Raises:
        OSError, ValueError: it cannot be read.
    """
    with open(os.path.join(log_dir, METRICS_FILE), encoding="utf-8") as f:
        lines = [json.loads(line) for line in f]
    for number, line in enumerate(lines, 1):
        numbers = isinstance(line, dict) and all(isinstance(x, int | float) for x in line.values())
        if not numbers or "step" not in line:
            raise ValueError(f"line {number} of {METRICS_FILE} is no line of metrics")
    return lines


def check_finite(step: int, values: dict[str, float]) -> None:
    """Raises FloatingPointError that names the metric and the step, if one is NaN or infinite."""
    for tag, value in values.items():
        if not math.isfinite(value):
            raise FloatingPointError(
                f"{tag} is {value} at step {step}; a lower --learning_rate or a longer --warmup_steps may help"
            )


def _cut_off(log_dir: str, lengths: Mapping[str, int]) -> bool:
    """Brings a run's files back to what they were; False, and nothing done, if these are not they."""
    if any(os.path.basename(name) != name for name in lengths):
        return False  # only a file that somebody made up names others, and they would be cut
    paths = {os.path.join(log_dir, name): length for name, length in lengths.items()}
    if not all(os.path.isfile(path) and os.path.getsize(path) >= length for path, length in paths.items()):
        return False
    for path, length in paths.items():
        os.truncate(path, length)
    for path in glob.glob(os.path.join(glob.escape(log_dir), EVENT_FILES)):
        if path not in paths:
            os.unlink(path)  # begun after the state was saved
    return True


def _set_aside_earlier(log_dir: str) -> None:
    earlier = [f for f in glob.glob(os.path.join(glob.escape(log_dir), "*")) if os.path.isfile(f)]
    if not earlier:
        return
    number = 1
    while os.path.exists(target := os.path.join(log_dir, f"earlier-{number}")):
        number += 1
    os.mkdir(target)
    for f in earlier:
        os.rename(f, os.path.join(target, os.path.basename(f)))
    logger.warning("Moved the logs of an earlier run of this name to %s", target)
