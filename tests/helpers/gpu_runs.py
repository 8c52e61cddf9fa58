"""Trainings on a GPU, and what they asked of it."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from benchmarks import null_gpu
from utils import figures
from utils.metrics import TrainLog

#: Eight steps and two evaluations of the testing model.
RUN = [
    "--dataset", "digits", "--model_type", "testing", "--img_size", "32", "--pretrained_dir", "", "--dropout", "0",
    "--train_batch_size", "32", "--num_steps", "8", "--warmup_steps", "2", "--eval_every", "4", "--log_every", "1",
    "--device", "cuda",
]  # fmt: skip
#: Levels, each with the half types that it may have.
HALF = [(level, dtype) for level in ("O1", "O2", "O3") for dtype in ("float16", "bfloat16")]
LEVELS = [("O0", ""), *HALF]

needs_counts = pytest.mark.skipif(
    not null_gpu.is_null(), reason="needs the null GPU, which tells what it was asked to do"
)


def precision_flags(level: str, dtype: str = "") -> list[str]:
    """Returns the flags of a level."""
    return ["--fp16", "--fp16_opt_level", level, *(["--amp_dtype", dtype] if dtype else [])] if level != "O0" else []


def run(*flags: str) -> None:
    """Trains with the flags of ``RUN`` and these; fails unless it ends well."""
    assert train.main(["--name", "a", *RUN, *flags]) == 0


class Enough(BaseException):
    """Ends a training after its first steps."""


def steps(*flags: str, stop_after: int | None = None) -> list[list[str]]:
    """Trains on the null GPU; returns the lines of its log, step by step.

    A step reaches from the end of the one before, or the beginning, to its own in the training's log; what is due after
    it, such as an evaluation, counts to the one after it.  What comes after the last step is the list's last entry.

    Args:
        flags: beside those of ``RUN``.
        stop_after: ends the training, which then has no log, after so many steps.  What is read back from the null GPU
            may be any number; a process that is to read it must run without PyTorch's cache of memory, for zeros.
    """
    log_step = TrainLog.step

    def step(self: TrainLog, number: int, *args: Any) -> None:
        if stop_after is None:
            log_step(self, number, *args)
        null_gpu.note("stepped")
        if number == stop_after:
            raise Enough

    with pytest.MonkeyPatch.context() as patch, null_gpu.log() as lines, contextlib.suppress(Enough):
        patch.setattr(TrainLog, "step", step)
        if stop_after is not None:
            patch.setattr(figures, "training_batch", lambda *args: None)
        run(*flags)
    found: list[list[str]] = [[]]
    for line in lines:
        if line == "NOTE stepped":
            found.append([])
        else:
            found[-1].append(line)
    return found


def kernels(*flags: str) -> set[str]:
    """Trains, and returns the names of the kernels that the GPU was asked for."""
    if null_gpu.is_null():
        lines = itertools.chain(*steps(*flags, stop_after=2))
        return {line.split()[1] for line in lines if line.startswith("KERNEL")}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run(*flags)
    return {event.name for event in profile.events()}


if __name__ == "__main__":  # a rank: leaves what ``steps`` returns in a file of its own
    Path(f"rank{os.environ['RANK']}.json").write_text(json.dumps(steps(*sys.argv[1:])))
