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
from collections.abc import Callable, Iterator, Mapping
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

    def image(self, step: int, tag: str, image: Image.Image) -> None:
        """Adds an image to the events; ``metrics.jsonl`` holds numbers only."""
        if self.enabled:
            from torch.utils.tensorboard import summary

            pixels = np.asarray(image.convert("RGB"))
            self._events.add_summary(summary.image(tag, pixels, dataformats="HWC"), step)

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


class TrainLog:
    """The training's progress bar and log lines: loss, learning rate and speed, averaged between two lines.

    The losses stay on the device until a line is due, so that no step waits for a number; then every rank takes part
    in averaging them.  A context manager, which opens the files; ``load_state_dict`` comes before.

    Args:
        log_dir: the run's folder of logs.
        num_steps: steps of the whole run.
        images_per_step: images of one step, over all ranks.
        log_every: steps between two lines.
    """

    def __init__(self, log_dir: str, num_steps: int, images_per_step: int, log_every: int) -> None:
        self._log_dir = log_dir
        self._num_steps = num_steps
        self._images_per_step = images_per_step
        self._log_every = log_every
        self._first_step, self._lengths = 0, None  # of a resumed run: steps done, and bytes of its files
        self._losses: list[Tensor] = []
        self._applied: list[Tensor] = []
        self.train_secs, self.eval_secs = 0.0, 0.0  # since the run began, over all resumes
        self._timed_secs, self._timed_steps = 0.0, 0  # of all lines since this process started

    def __enter__(self) -> TrainLog:
        self._writer = MetricsWriter(self._log_dir, dist_util.is_main(), self._lengths, self._first_step)
        self._bar = tqdm(
            total=self._num_steps,
            initial=self._first_step,
            desc="Training",
            unit="step",
            **dist_util.bar_options(),
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} steps [{elapsed}<{remaining}{postfix}]",
        )
        self._start_clock()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()
        self._writer.close()

    def _start_clock(self) -> None:
        self._since = time.perf_counter()
        self._steps_since = 0

    def _count_secs(self) -> None:
        """Adds the time since the clock was started to the training's, and starts the clock anew."""
        self.train_secs += time.perf_counter() - self._since
        self._start_clock()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the block's time out of the training's: it evaluates or saves."""
        self._count_secs()
        yield
        self._start_clock()

    def step(self, step: int, loss: Tensor, learning_rate: float, applied: Tensor) -> None:
        """Counts one step, and writes a line if one is due.

        Args:
            step: its number, from 1.
            loss: its mean loss over this rank's images, a detached scalar still on the device.
            learning_rate: what it used.
            applied: False if it was skipped, for its scaled gradients overflowed; a bool scalar on the device.

        Raises:
            FloatingPointError: a loss since the last line is not finite, and its step was not skipped.
        """
        self._losses.append(loss)
        self._applied.append(applied)
        self._steps_since += 1
        self._bar.update(1)
        if step % self._log_every and step != self._num_steps:
            return
        losses = self._read_losses(step)
        values = {"train/loss": sum(losses) / len(losses)} if losses else {}
        secs, steps = max(time.perf_counter() - self._since, 1e-9), self._steps_since
        self._count_secs()
        speed = steps * self._images_per_step / secs
        self._timed_secs += secs
        self._timed_steps += steps
        loss_text = "".join(f"loss={mean:.4f}, " for mean in values.values())
        self._bar.set_postfix_str(f"{loss_text}{speed:.1f} images/s", refresh=False)  # shown with the next step
        self._writer.write(
            step, {**values, "train/lr": learning_rate, "images_per_sec": speed}, {"secs": self.train_secs}
        )

    def evaluation(self, step: int, accuracy: float, loss: float, secs: float) -> None:
        """Writes the line of an evaluation after a step, which took so many seconds."""
        self.eval_secs += secs
        values = {"test/accuracy": accuracy, "test/loss": loss}
        self._writer.write(step, values, {"secs": self.train_secs, "eval_secs": self.eval_secs})

    def image(self, step: int, tag: str, draw: Callable[[], Image.Image | None]) -> None:
        """Adds what ``draw`` makes to the TensorBoard events; it is called on the main process only."""
        if self._writer.enabled and (image := draw()) is not None:
            self._writer.image(step, tag, image)

    def hyperparameters(self, step: int, values: Mapping[str, object]) -> None:
        """Adds the run to TensorBoard's hparams tab; see ``MetricsWriter.hyperparameters``."""
        self._writer.hyperparameters(step, values)

    def _read_losses(self, step: int) -> list[float]:
        """Returns the losses of the steps since the last line, but for those that were skipped."""
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

    def state_dict(self) -> dict[str, Any]:
        """Returns the losses since the last line, the lengths of the files and the seconds so far; every rank must ask.

        The losses are sums over all ranks, and the files are on the disk.
        """
        self._count_secs()
        state: dict[str, Any] = {"losses": [], "applied": []}
        if self._losses:
            summed = dist_util.sum_over_ranks(torch.stack(self._losses))
            state = {"losses": summed.tolist(), "applied": torch.stack(self._applied).tolist()}
        return {**state, "files": self._writer.flush(), "secs": self.train_secs, "eval_secs": self.eval_secs}

    def load_state_dict(self, state: dict[str, Any], step: int, device: torch.device, own_files: bool) -> None:
        """Takes back what ``state_dict`` gave after a step, before the files are opened.

        Args:
            state: sums over all ranks: the main process takes them, the others zeros.
            step: steps done.
            device: where the losses are.
            own_files: the folder holds the files of which the state tells; else the logs begin anew.
        """
        mine = float(dist_util.is_main())
        self._losses = [torch.tensor(loss * mine, device=device) for loss in state["losses"]]
        self._applied = [torch.tensor(applied, device=device) for applied in state["applied"]]
        self._first_step, self._lengths = step, state.get("files", {}) if own_files else None
        self.train_secs, self.eval_secs = state.get("secs", 0.0), state.get("eval_secs", 0.0)

    def speed(self) -> float:
        """Returns the images per second of all lines since this process started, evaluations left out."""
        return self._timed_steps * self._images_per_step / max(self._timed_secs, 1e-9)
