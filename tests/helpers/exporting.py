"""Shared by the tests of tools/export.py."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models import npz
from models.configs import CONFIGS
from models.modeling import VisionTransformer
from tests.helpers import fake_npz
from tests.helpers.tools import run_tool
from tools import export, predict
from utils import checkpoint

NUM_CLASSES = 10


def random_state(model_type: str, img_size: int) -> dict[str, Tensor]:
    """Random weights of any model."""
    config = CONFIGS[model_type]
    weights = fake_npz.arrays(config, img_size, num_classes=NUM_CLASSES)
    return npz.to_state_dict(weights, config, img_size, num_classes=NUM_CLASSES)


def make_checkpoint(
    folder: Path, model_type: str, img_size: int, gelu: str = "erf", state: dict[str, Tensor] | None = None
) -> str:
    """Writes weights, random ones if none are given, with metadata, without a training; returns their path."""
    names = [f"class {i}" for i in range(NUM_CLASSES)]
    path = str(folder / f"{model_type}_checkpoint.bin")
    metadata = checkpoint.CheckpointMetadata(model_type, img_size, names, gelu, "pets", 8, 0.5)
    checkpoint.save_weights(path, state or random_state(model_type, img_size), metadata)
    return path


def run(*args: object) -> tuple[int, str, list[str]]:
    """Runs tools.export; see ``run_tool``."""
    return run_tool(export, *args)


def export_as(kind: str, path: str, output: Path, *args: object) -> str:
    """Exports a checkpoint; returns the lines that the tool prints."""
    status, out, err = run("--load_model_dir", path, "--format", kind, "--output", output, *args)
    assert (status, err) == (0, [])
    return out


def variables_of(lines: str) -> dict[str, Any]:
    """Runs printed lines in the current folder, which has an image.jpg where they need one; returns their variables.

    What they print is under "printed".
    """
    variables: dict[str, Any] = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(lines, variables)
    return variables | {"printed": printed.getvalue().strip()}


def predicted(path: str, *images: str) -> list[dict[str, float]]:
    """The probabilities that ``tools.predict`` prints for images, by the names of the classes."""
    flags = ["--load_model_dir", path, "--json", "--top_k", NUM_CLASSES, "--device", "cpu"]
    status, out, _ = run_tool(predict, *flags, *images)
    assert status == 0
    return [x["probabilities"] for x in json.loads(out)]


def assert_as_predicted(path: str, images: list[str], classify: Callable[[str], dict[str, float]]) -> None:
    """``classify`` gives every image the probabilities that ``tools.predict`` gives it."""
    for image, expected in zip(images, predicted(path, *images)):
        answer = classify(image)
        assert answer.keys() == expected.keys()
        assert max(expected.values()) > 0.15  # answers that say something
        assert max(abs(answer[name] - p) for name, p in expected.items()) < 1e-4


def original(path: str) -> tuple[VisionTransformer, Tensor, Tensor]:
    """The fine-tuned model, five images for it and its logits."""
    metadata = json.loads(Path(path).with_suffix(".json").read_text())
    config = replace(CONFIGS[metadata["model_type"]], gelu=metadata["gelu"])
    model = VisionTransformer(config, metadata["img_size"], len(metadata["classes"])).eval()
    model.load_state_dict(torch.load(path, weights_only=True))
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(5, 3, model.img_size, model.img_size, generator=generator) * 2 - 1
    with torch.no_grad():
        return model, images, model(images)[0]


def assert_same_logits(path: str, compute: Callable[[Tensor], Any]) -> None:
    """``compute`` gives the original's logits, for any number of images."""
    _, images, expected = original(path)
    assert expected.std() > 0.05  # logits that say something
    for size in (5, 1, 2):
        with torch.no_grad():
            logits = compute(images[:size])
        assert (torch.as_tensor(logits) - expected[:size]).abs().max() < 1e-4
