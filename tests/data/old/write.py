"""Writes the files of this folder with the code of commit 0652f6f; README.md here has the commands.

It must run on that commit alone: files of the past are not written anew.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
from pathlib import Path
from unittest import mock

import torch

import train
from utils.metrics import TrainingLog

#: 40 steps; evaluations after 10, 20, 30 and 40.
FLAGS = [
    "--dataset", "digits", "--model_type", "testing", "--img_size", "32", "--device", "cpu", "--pretrained_dir", "",
    "--train_batch_size", "64", "--gradient_accumulation_steps", "2", "--num_steps", "40", "--warmup_steps", "3",
    "--eval_every", "10", "--eval_batch_size", "90", "--learning_rate", "0.2", "--num_workers", "0",
]  # fmt: skip
HALF = ["--fp16", "--fp16_opt_level", "O2"]
#: Runs whose logs are kept as well: the others begin new ones.
LOGGED = ("float32", "between_lines")
#: Flags of each run, and the step during which SIGTERM arrives: the step is finished, then the state is saved.
RUNS = {
    "float32": (["--log_every", "1"], 23),
    "bfloat16": (["--log_every", "1", *HALF], 23),
    "float16_skipped": (["--log_every", "1", *HALF, "--amp_dtype", "float16"], 23),
    "between_lines": (["--log_every", "10"], 23),  # the losses of steps 21 to 23 are in no line yet
    "evaluation_due": (["--log_every", "1"], 30),  # a run that is stopped leaves out the evaluation after step 30
}


def stop_during(step: int) -> mock._patch:
    """Sends this process SIGTERM when the step is logged."""
    real = TrainingLog.update

    def update(log: TrainingLog, at: int, *values: object) -> None:
        if at == step:
            os.kill(os.getpid(), signal.SIGTERM)
        real(log, at, *values)

    return mock.patch.object(TrainingLog, "update", update)


def high_scale() -> mock._patch:
    """Begins dynamic scaling where float16 overflows: the first steps are skipped."""
    real = torch.amp.GradScaler
    return mock.patch.object(torch.amp, "GradScaler", lambda *args, **kw: real(*args, init_scale=2.0**20, **kw))


def keep(target: Path, name: str) -> None:
    """Copies a run's files, but for its report, which no run reads."""
    (target / "output").mkdir(parents=True, exist_ok=True)
    for ending in ("last.pt", "checkpoint.bin", "checkpoint.json"):
        shutil.copy(f"output/{name}_{ending}", target / "output")
    if name in LOGGED:
        shutil.copytree(f"logs/{name}", target / "logs" / name, ignore=shutil.ignore_patterns(".lock"))


def main(target: Path) -> None:
    """Writes each run's files as SIGTERM leaves them, and what the same command makes of them."""
    torch.set_num_threads(1)
    expected = {}
    for name, (more, step) in RUNS.items():
        flags = ["--name", name, *FLAGS, *more]
        with stop_during(step), high_scale(), mock.patch.object(socket, "gethostname", return_value="localhost"):
            assert train.main(flags) == 128 + signal.SIGTERM
        keep(target, name)
        metrics = Path(f"logs/{name}/metrics.jsonl")
        num_before = len(metrics.read_text().splitlines())
        began = torch.load(f"output/{name}_last.pt", weights_only=True)["model"]
        assert train.main(flags) == 0
        ended = torch.load(f"output/{name}_checkpoint.bin", weights_only=True)
        best = json.loads(Path(f"output/{name}_checkpoint.json").read_text())
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
        expected[name] = {
            "flags": flags,
            "stopped": step,
            "best": {"step": best["step"], "accuracy": best["accuracy"]},
            "lines": [{k: x for k, x in line.items() if k != "images_per_sec"} for line in lines[num_before:]],
            "moved": {key: float((x - began[key]).norm()) for key, x in ended.items()},
        }
    (target / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
