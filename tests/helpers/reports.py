"""Contents of a report whose numbers are known, and the log that they are read from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils import datasets, report
from utils.evaluation import EvalResult

EVIL = '<script>alert("x")</script>&\' onerror=alert(1) "><img src=http://example.com/a.png>'
LINES = [
    {"step": 10, "train/loss": 2.0, "train/lr": 0.03, "images_per_sec": 900.0},
    {"step": 20, "train/loss": 1.0, "train/lr": 0.015, "images_per_sec": 1100.0},
    {"step": 20, "test/accuracy": 0.625, "test/loss": 0.75},
    {"step": 30, "train/loss": 0.5, "train/lr": 0.0, "images_per_sec": 1000.0},
    {"step": 30, "test/accuracy": 0.5, "test/loss": 0.875},
]
#: The same of a run that noted balanced accuracy, as earlier versions did not.
BALANCED = [{**line, "test/balanced_accuracy": 0.375} if "test/loss" in line else line for line in LINES]
#: The same of a run that noted the time: 40 seconds until the best evaluation, which took 2.
TIMED = [{**line, "secs": 2.0 * line["step"], **({"eval_secs": 2.0} if "test/loss" in line else {})} for line in LINES]
COMMANDS = [("Evaluate", "python train.py --name pets '--dataset=my pets' -v"), ("Predict", "python -m tools.predict")]


def make_contents(
    folder: Path,
    classes: Sequence[str] = ("ant", "bee", "cat"),
    matrix: Sequence[Sequence[int]] | np.ndarray = ((3, 1, 0), (0, 2, 0), (0, 2, 0)),
    lines: Sequence[dict[str, float]] = LINES,
    **changes: Any,
) -> report.Contents:
    """Contents whose best evaluation has that confusion matrix; its log is written into the folder."""
    pairs = [(i, j) for i, row in enumerate(matrix) for j, count in enumerate(row) for _ in range(count)]
    truth, predicted = torch.tensor(pairs).T
    confidence = torch.linspace(0.5, 0.75, len(pairs))  # the last mistake is the worst
    pixels = torch.arange(len(pairs))[:, None, None, None].expand(-1, 3, 7, 9).byte()
    test = datasets.MemoryImages(pixels, truth)
    train = datasets.MemoryImages(pixels[:4], torch.tensor([0, 0, 0, len(classes) - 1]))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    values: dict[str, Any] = dict(
        name="pets", subject="ViT-demo on pets", num_steps=30, step=30, log_dir=str(folder),
        data=datasets.DataSets(train, test, list(classes)), best=EvalResult(0.75, truth, predicted, confidence),
        best_step=20, flags={"--name": ("pets", None), "--seed": (42, 42), "--learning_rate": (0.05, 0.03)},
        facts={"torch": "1.2.3", "device": "cpu, a processor"}, timing={"wall time": "12.5 s"}, commands=COMMANDS,
    )  # fmt: skip
    return report.Contents(**{**values, **changes})
