"""The training's progress: a bar on a terminal, plain lines elsewhere, and the lines of the logs' files.

This module decides what is shown, never what is computed.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from utils import console, dist_util
from utils.evaluation import EvalResult
from utils.input_wait import InputWait
from utils.log_files import MetricsWriter, check_finite
from utils.outlook import Outlook

logger = logging.getLogger(__name__)


class TrainLog:
    """The training's progress and log lines: loss, learning rate and speed, averaged between two lines of the files.

    Without a terminal to show a bar on, the main process logs a line after the first step and the last, and after one
    that ends ``console.LINE_SECS`` or more after the line before.  The losses stay on the device until a line is due,
    so that no step waits for a number; for the files every rank takes part in averaging them.  A context manager, which
    opens the files; ``load_state_dict`` comes before.

    Args:
        log_dir: the run's folder of logs.
        num_steps: steps of the whole run.
        images_per_step: images of one step, over all ranks.
        log_every: steps between two lines.
        outlook: reckons the time left; by default as for a run without evaluations.

    Attributes:
        input_wait: whose share of the time is shown, where processes decode the images.
    """

    def __init__(
        self, log_dir: str, num_steps: int, images_per_step: int, log_every: int, outlook: Outlook | None = None
    ) -> None:
        self.input_wait: InputWait | None = None
        self._outlook = outlook or Outlook(num_steps, num_steps, 0.0)
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
            disable=not (dist_util.is_main() and console.on_terminal()),
            dynamic_ncols=True,
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} steps [{elapsed}{postfix}]",
        )
        self._logs_progress = dist_util.is_main() and self._bar.disable
        self._shown: float | None = None  # when the last line of progress was
        self._text = ""  # loss, speed and waiting of the last line
        self._opened, self._opened_secs = time.perf_counter(), (self.train_secs, self.eval_secs)
        self._start_clock()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()
        self._writer.close()

    def _start_clock(self) -> None:
        self._since = time.perf_counter()
        self._steps_since = 0
        self._waited = self.input_wait.secs() if self.input_wait else 0.0

    def _count_secs(self) -> None:
        """Adds the time since the clock was started to the training's, and starts the clock anew."""
        self.train_secs += time.perf_counter() - self._since
        self._start_clock()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the block's time out of the training's: it evaluates or saves."""
        self._count_secs()
        try:
            yield
        finally:  # a run that an image ends is saved with its seconds
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
        is_last = step == self._num_steps
        is_due = is_last or step % self._log_every == 0
        text = self._write_line(step, learning_rate) if is_due else None
        self._look_ahead(step, is_due)  # after the wait for the device, where there is one
        if self._logs_progress:
            now = time.perf_counter()
            if is_last or self._shown is None or now - self._shown >= console.LINE_SECS:
                text = self._progress() if text is None else text
                logger.info("Training: %d/%d steps, %s, %s", step, self._num_steps, text, self._outlook.text())
                self._shown = now

    def _write_line(self, step: int, learning_rate: float) -> str:
        """Writes the line of the files that is due after a step; returns what it tells as a text."""
        losses = self._read_losses(step)
        values = {"train/loss": sum(losses) / len(losses)} if losses else {}
        secs, speed, share = self._since_line()
        self._timed_secs += secs
        self._timed_steps += self._steps_since
        self._count_secs()
        self._text = _text(values.get("train/loss"), speed, share)
        notes = {"secs": self.train_secs} | ({} if share is None else {"input_share": share})
        self._writer.write(step, {**values, "train/lr": learning_rate, "images_per_sec": speed}, notes)
        return self._text

    def _since_line(self) -> tuple[float, float, float | None]:
        """Returns the seconds since the last line of the files, images per second, and the share spent waiting."""
        secs = max(time.perf_counter() - self._since, 1e-9)
        share = min((self.input_wait.secs() - self._waited) / secs, 1.0) if self.input_wait else None
        return secs, self._steps_since * self._images_per_step / secs, share

    def _progress(self) -> str:
        """Returns what a line of the files would tell; the loss only if no other rank has a part in it."""
        mean = None
        if dist_util.world_size() == 1:
            losses = torch.stack(self._losses)[torch.stack(self._applied)]
            mean = float(losses.cpu().numpy().mean()) if len(losses) else None
        _, speed, share = self._since_line()
        return _text(mean, speed, share)

    def _look_ahead(self, step: int, is_due: bool) -> None:
        """Shows how long the run still takes: in the bar, in lines, and once in words; warns of slow images."""
        now = time.perf_counter()
        trained = self.train_secs - self._opened_secs[0] + now - self._since
        self._outlook.step(step, trained, now - self._opened, sum(self._opened_secs))
        self._bar.set_postfix_str(", ".join(filter(None, (self._text, self._outlook.text()))), refresh=False)
        if words := self._outlook.first_words(is_due):
            logger.info("%s", words)
        if self.input_wait and (words := self.input_wait.advice(trained)):
            logger.warning("%s", words)

    def evaluation(self, step: int, result: EvalResult, secs: float) -> None:
        """Writes the line of an evaluation after a step, which took so many seconds."""
        self.eval_secs += secs
        self._outlook.evaluated()
        values = {"test/accuracy": result.accuracy, "test/loss": result.loss,
                  "test/balanced_accuracy": result.balanced_accuracy}  # fmt: skip
        self._writer.write(step, values, {"secs": self.train_secs, "eval_secs": self.eval_secs})

    def show(self, step: int, tag: str, make: Callable[[], Image.Image | str | None]) -> None:
        """Adds what ``make`` returns to the TensorBoard events; it is called on the main process only."""
        self._writer.show(step, tag, make)

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

    def load_state_dict(
        self, state: dict[str, Any], step: int, device: torch.device, own_files: bool, num_ranks: int
    ) -> None:
        """Takes back what ``state_dict`` gave after a step, before the files are opened.

        Args:
            state: sums over all ranks: the main process takes them, the others zeros.
            step: steps done.
            device: where the losses are.
            own_files: the folder holds the files that the state names; else the logs begin anew.
            num_ranks: that the sums are over.
        """
        mine = dist_util.world_size() / num_ranks if dist_util.is_main() else 0.0
        self._losses = [torch.tensor(loss * mine, device=device) for loss in state["losses"]]
        self._applied = [torch.tensor(applied, device=device) for applied in state["applied"]]
        self._first_step, self._lengths = step, state.get("files", {}) if own_files else None
        self.train_secs, self.eval_secs = state.get("secs", 0.0), state.get("eval_secs", 0.0)

    def wall_secs(self) -> float:
        """Returns the seconds since the files were opened, with evaluations and saves."""
        return time.perf_counter() - self._opened

    def speed(self) -> float:
        """Returns the images per second of all lines since this process started, evaluations left out."""
        return self._timed_steps * self._images_per_step / max(self._timed_secs, 1e-9)


def _text(loss: float | None, speed: float, share: float | None) -> str:
    """Returns a loss, if there is one, images per second and the share of waiting as bar and lines show them."""
    waits = "" if share is None else f", {100 * share:.0f} % waiting for images"
    return f"{'' if loss is None else f'loss={loss:.4f}, '}{speed:.1f} images/s{waits}"
