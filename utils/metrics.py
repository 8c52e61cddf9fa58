"""What a run tells its user: TensorBoard events, ``metrics.jsonl``, and the progress bar.

Only the main process's writer writes; this module decides what is shown, never what is computed.
"""

from __future__ import annotations

import glob
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Mapping
from typing import IO, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from utils import dist_util

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
EVENT_FILES = "events.out.tfevents.*"


class MetricsWriter:
    """Writes scalars as TensorBoard events and as one JSON object a line, under the same tags.

    Files of an earlier run in the folder are moved to ``earlier-N/`` below it, so that neither curve
    runs into the other.

    Args:
        log_dir: the run's folder, made if need be.
        enabled: False on processes that write nothing.
        resume_after: the last update whose lines stay, if the run goes on from there; what it wrote about
            later ones before it was stopped is cut off, for it will be written again.
    """

    def __init__(self, log_dir: str, enabled: bool = True, resume_after: int | None = None) -> None:
        self.enabled = enabled
        if not enabled:
            return
        from torch.utils.tensorboard import SummaryWriter  # half a second, not spent by evaluations

        os.makedirs(log_dir, exist_ok=True)
        if resume_after is None:
            _set_aside_earlier(log_dir)
        else:
            _cut_off(log_dir, resume_after)
        # TensorBoard, if it is looking, forgets what has been cut off from purge_step on.
        self._events = SummaryWriter(log_dir, purge_step=None if resume_after is None else resume_after + 1)
        self._lines = open(os.path.join(log_dir, METRICS_FILE), "a", encoding="utf-8")  # noqa: SIM115

    def write(self, step: int, values: dict[str, float]) -> None:
        """Adds one line and its scalars.

        Raises:
            FloatingPointError: a value is not finite; nothing is written.
        """
        check_finite(step, values)
        if not self.enabled:
            return
        for tag, value in values.items():
            self._events.add_scalar(tag, value, step)
        self._lines.write(json.dumps({"step": step, **values}) + "\n")
        self._lines.flush()

    def picture(self, step: int, tag: str, picture: Image.Image) -> None:
        """Adds a picture to the events; ``metrics.jsonl`` holds numbers only."""
        if self.enabled:
            self._events.add_image(tag, np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def hyperparameters(self, step: int, values: Mapping[str, object]) -> None:
        """Adds the run to the hparams tab, which shows the last value of each of its scalars beside it.

        ``SummaryWriter.add_hparams`` would make a run of its own for it, and write down an experiment: the
        tab would then know the values of one run only.

        Args:
            step: the last update.  The entry counts as one later, so that a run that goes on from there
                cuts it off and writes its own.
            values: the run's flags.
        """
        if not self.enabled:
            return
        from torch.utils.tensorboard.summary import hparams

        plain = {name: x if type(x) in (int, float) else str(x) for name, x in values.items()}
        _, begin, end = hparams(plain, {})
        for summary in (begin, end):
            self._events._get_file_writer().add_summary(summary, step + 1)

    def flush(self) -> None:
        """Has everything on the disk: a state that is saved next must not be ahead of its logs."""
        if not self.enabled:
            return
        self._events.flush()
        self._lines.flush()
        os.fsync(self._lines.fileno())
        for path in glob.glob(os.path.join(glob.escape(self._events.get_logdir()), EVENT_FILES)):
            with open(path, "rb") as f:
                os.fsync(f.fileno())

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Writes out what is buffered."""
        if self.enabled:
            self._events.close()
            self._lines.close()


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


def _cut_off(log_dir: str, step: int) -> None:
    """Shortens the folder's files to what they say up to an update."""
    path = os.path.join(log_dir, METRICS_FILE)
    if os.path.exists(path):
        with open(path, "rb+") as f:
            f.truncate(_length_up_to(f, step))
    for path in glob.glob(os.path.join(glob.escape(log_dir), EVENT_FILES)):
        with open(path, "rb+") as f:
            f.truncate(_events_length_up_to(f, step))


def _length_up_to(file: IO[bytes], step: int) -> int:
    """Bytes of the lines of ``metrics.jsonl`` up to an update; a line that is not whole ends them."""
    length = 0
    for line in file:
        try:
            if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                break
        except (ValueError, KeyError, TypeError):
            break
        length += len(line)
    return length


def _events_length_up_to(file: IO[bytes], step: int) -> int:
    """Bytes of the records of an event file up to an update; a record that is not whole ends them.

    Source of the format: tensorflow.org/tutorials/load_data/tfrecord; length (8 bytes) and its checksum (4),
    the record and its checksum (4).
    """
    from tensorboard.compat.proto.event_pb2 import Event

    length, size = 0, os.fstat(file.fileno()).st_size
    while len(header := file.read(12)) == 12:
        num_bytes = int.from_bytes(header[:8], "little")
        if length + 16 + num_bytes > size:
            break
        event = Event.FromString(file.read(num_bytes))
        if event.step > step:
            break
        file.read(4)
        length += 16 + num_bytes
    return length


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
        self._bar.set_postfix_str(f"{loss_text}{speed:.1f} images/s")
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
        losses = dist_util.sum_over_ranks(torch.stack(self._losses)) / dist_util.world_size()
        return {"losses": losses.tolist(), "applied": torch.stack(self._applied).tolist()}

    def load_training_state(self, state: dict[str, Any], device: torch.device) -> None:
        """Goes on from what ``training_state`` gave."""
        self._losses = [torch.tensor(loss, device=device) for loss in state["losses"]]
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
