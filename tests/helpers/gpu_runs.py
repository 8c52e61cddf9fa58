"""Trainings on a GPU, and what they made it do."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import train
from tests.helpers import null_gpu
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

needs_counts = pytest.mark.skipif(not null_gpu.is_null(), reason="needs the null GPU, which tells what it was asked to do")


def precision_flags(level: str, dtype: str = "") -> list[str]:
    """Returns the flags of a level."""
    return ["--fp16", "--fp16_opt_level", level, *(["--amp_dtype", dtype] if dtype else [])] if level != "O0" else []


def run(*flags: str) -> None:
    """Trains with the flags of ``RUN`` and these; fails unless it ends well."""
    assert train.main(["--name", "a", *RUN, *flags]) == 0


def steps(*flags: str) -> list[list[str]]:
    """Does the same on the null GPU; returns the lines of its log, step by step.

    A step reaches from the end of the one before, or the beginning, to its own in the training's log; what is due after
    it, such as an evaluation, counts to the one after it.  What comes after the last step is the list's last entry.
    """
    log_step = TrainLog.step

    def step(self: TrainLog, *args: Any) -> None:
        log_step(self, *args)
        null_gpu.note("stepped")

    with pytest.MonkeyPatch.context() as patch, null_gpu.log() as lines:
        patch.setattr(TrainLog, "step", step)
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
        with null_gpu.log() as lines:
            run(*flags)
        return {line.split()[1] for line in lines if line.startswith("KERNEL")}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run(*flags)
    return {event.name for event in profile.events()}
