"""What a run tells its user: TensorBoard events, ``metrics.jsonl``, and the progress bar.

Only the main process's writer writes; this module decides what is shown, never what is computed.
"""

from __future__ import annotations

import contextlib
import glob
import json
import logging
import math
import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from utils import dist_util

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
EVENT_FILES = "events.out.tfevents.*"  # the * begins with the second in which it was made


class MetricsWriter:
    """Writes scalars as TensorBoard events and as one JSON object a line, under the same tags.

    Files of an earlier run in the folder are moved to ``earlier-N/`` below it, so that neither curve
    runs into the other.

    Args:
        log_dir: the run's folder, made if need be.
        enabled: False on processes that write nothing.
        lengths: what ``flush`` gave when the state was saved from which the run goes on: what was written
            later is cut off, for it will be written again.  None: a new run.
        step: the update of that state.
    """

    def __init__(
        self, log_dir: str, enabled: bool = True, lengths: Mapping[str, int] | None = None, step: int = 0
    ) -> None:
        self.enabled = enabled
        if not enabled:
            return
        os.makedirs(log_dir, exist_ok=True)
        if lengths is not None and not _cut_off(log_dir, lengths):
            logger.warning("%s does not hold the logs of the run up to update %d: they begin after it", log_dir, step)
            lengths = None
        if lengths is None:
            _set_aside_earlier(log_dir)
        self._lengths = {name: n for name, n in (lengths or {}).items() if name != METRICS_FILE}
        # TensorBoard, if it is looking, forgets what has been cut off from then on.
        self._events = EventFile(log_dir, purge_step=step + 1 if step else None)
        self._lines = open(os.path.join(log_dir, METRICS_FILE), "ab")  # noqa: SIM115
        self._end: int | None = None  # of the events that a run that goes on longer keeps

    def write(self, step: int, values: dict[str, float]) -> None:
        """Adds one line and its scalars, which are in the files when it returns.

        Raises:
            FloatingPointError: a value is not finite; nothing is written.
            OSError: the files cannot take it.
        """
        check_finite(step, values)
        if not self.enabled:
            return
        with _named(self._lines.name):
            self._lines.write(json.dumps({"step": step, **values}).encode() + b"\n")
            self._lines.flush()
        self._events.add_scalars(values, step)

    def picture(self, step: int, tag: str, picture: Image.Image) -> None:
        """Adds a picture to the events; ``metrics.jsonl`` holds numbers only."""
        if self.enabled:
            from torch.utils.tensorboard.summary import image

            self._events.add_summary(image(tag, np.asarray(picture.convert("RGB")), dataformats="HWC"), step)

    def text(self, step: int, tag: str, text: str) -> None:
        """Adds a text, as Markdown, to the events."""
        if self.enabled:
            from torch.utils.tensorboard.summary import text as summary

            self._events.add_summary(summary(tag, text), step)

    def hyperparameters(self, step: int, values: Mapping[str, object]) -> None:
        """Adds the run to the hparams tab, which shows the last value of each of its scalars beside it.

        ``SummaryWriter.add_hparams`` would make a run of its own for it, and write down an experiment: the
        tab would then know the values of one run only.

        Args:
            step: the last update, of which all else must be written.  The entry counts as one later and is
                left out of what ``flush`` counts: a run that goes on longer writes its own.
            values: the run's flags.
        """
        if not self.enabled:
            return
        from torch.utils.tensorboard.summary import hparams

        plain = {name: x if type(x) in (int, float) else str(x) for name, x in values.items()}
        _, begin, end = hparams(plain, {})
        self._end = self._events.file.tell()
        for summary in (begin, end):
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
                os.fsync(file.fileno())
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
                with contextlib.suppress(OSError):  # a line that the disk did not take was told of by ``write``
                    file.close()


class EventFile:
    """TensorBoard's file of one run, written at once.

    torch's SummaryWriter writes from a thread: where the disk is full that prints a stack, and the run
    learns of it late.  Source of the names and of the first record: ``event_file_writer`` of tensorboard.

    Args:
        folder: where it is made.
        purge_step: from which update on TensorBoard is to forget what other files of the folder said.
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


@contextlib.contextmanager
def _named(path: str) -> Iterator[None]:
    """Lets an error of the system say of which file it is."""
    try:
        yield
    except OSError as e:
        raise OSError(f"{path} could not be written ({e.strerror or e})") from e


def read_lines(log_dir: str) -> list[dict[str, float]]:
    """What a run's ``metrics.jsonl`` holds, a line an object.

    Raises:
        OSError, ValueError: it cannot be read.
    """
    with open(os.path.join(log_dir, METRICS_FILE), encoding="utf-8") as f:
        return [json.loads(line) for line in f]


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
        shutil.move(f, target)
    logger.warning("Moved the logs of an earlier run of this name to %s", target)


class TrainingLog:
    """The training's bar and lines: loss, learning rate and speed, averaged between two log lines.

    The losses stay on the device until a line is due, so that no update waits for a number; then every
    process takes part in averaging them.

    Args:
        writer: where the lines go.
        num_steps: updates of the whole run.
        images_per_step: pictures of one update, over all processes.
        log_every: updates between two lines.
        first_step: updates that are already done.
    """

    def __init__(
        self, writer: MetricsWriter, num_steps: int, images_per_step: int, log_every: int, first_step: int = 0
    ) -> None:
        self._writer = writer
        self._num_steps = num_steps
        self._images_per_step = images_per_step
        self._log_every = log_every
        self._losses: list[Tensor] = []
        self._applied: list[Tensor] = []
        self._bar = tqdm(
            total=num_steps,
            initial=first_step,
            desc="Training",
            unit="step",
            **dist_util.bar_options(),
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} steps [{elapsed}<{remaining}{postfix}]",
        )
        self._total_secs, self._total_steps = 0.0, 0
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leaves out the time since the last update, which was not spent on training."""
        self._since = time.perf_counter()
        self._steps_timed = 0

    def update(self, step: int, loss: Tensor, learning_rate: float, applied: Tensor) -> None:
        """Counts one update, and writes a line if one is due.

        Args:
            step: the update's number, from 1.
            loss: its mean loss over this process's pictures, a detached scalar still on the device.
            learning_rate: what it used.
            applied: False if it was skipped, for its scaled gradients overflowed; a scalar there too.

        Raises:
            FloatingPointError: a loss since the last line is not finite, and its update was not skipped.
        """
        self._losses.append(loss)
        self._applied.append(applied)
        self._steps_timed += 1
        self._bar.update(1)
        if step % self._log_every and step != self._num_steps:
            return
        losses = self._read_losses(step)
        values = {"train/loss": sum(losses) / len(losses)} if losses else {}
        secs = max(time.perf_counter() - self._since, 1e-9)
        speed = self._steps_timed * self._images_per_step / secs
        self._total_secs += secs
        self._total_steps += self._steps_timed
        self.restart_clock()
        loss_text = "".join(f"loss={mean:.4f}, " for mean in values.values())
        self._bar.set_postfix_str(f"{loss_text}{speed:.1f} images/s", refresh=False)  # shown with the next update
        self._writer.write(step, {**values, "train/lr": learning_rate, "images_per_sec": speed})

    def _read_losses(self, step: int) -> list[float]:
        """The losses of the updates since the last line, but for those that were skipped."""
        summed = dist_util.sum_over_ranks(torch.stack(self._losses)) / dist_util.world_size()
        rows = torch.stack((summed, torch.stack(self._applied).to(summed.dtype)))
        both = rows.tolist()  # the one wait for the device between two lines
        losses = []
        for at, (value, applied) in enumerate(zip(*both), step - len(self._losses) + 1):
            if applied:
                check_finite(at, {"train/loss": value})
                losses.append(value)
            else:
                logger.warning("Step %d was skipped: its scaled gradients overflowed", at)
        self._losses.clear()
        self._applied.clear()
        return losses

    def training_state(self) -> dict[str, Any]:
        """The updates since the last line, for a run that goes on from here; every process must ask."""
        if not self._losses:
            return {"losses": [], "applied": []}
        summed = dist_util.sum_over_ranks(torch.stack(self._losses))
        return {"losses": summed.tolist(), "applied": torch.stack(self._applied).tolist()}

    def load_training_state(self, state: dict[str, Any], device: torch.device) -> None:
        """Goes on from what ``training_state`` gave, which is of all processes: one of them takes it."""
        mine = float(dist_util.is_main())
        self._losses = [torch.tensor(loss * mine, device=device) for loss in state["losses"]]
        self._applied = [torch.tensor(applied, device=device) for applied in state["applied"]]

    def speed(self) -> float:
        """Images per second of all lines so far, evaluations left out."""
        return self._total_steps * self._images_per_step / max(self._total_secs, 1e-9)

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Leaves the bar as it stands."""
        self._bar.close()
