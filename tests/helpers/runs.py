"""Small trainings that are stopped and go on, and what they leave: for the tests of resuming and of faults."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

import train
from utils import checkpoint

ROOT = Path(__file__).resolve().parent.parent.parent
TINY = ["--dataset", "digits", "--model_type", "testing", "--img_size", "32", "--device", "cpu"]
#: 13 updates; lines of metrics after 4, 8, 12 and 13, evaluations after 5, 10 and 13, two parts an update.
RUN = [
    "--name", "a", *TINY, "--pretrained_dir", "", "--train_batch_size", "16", "--gradient_accumulation_steps", "2",
    "--num_steps", "13", "--warmup_steps", "3", "--log_every", "4", "--eval_every", "5", "--learning_rate", "0.1",
    "--eval_batch_size", "90", "--num_workers", "0",
]  # fmt: skip


class Killed(BaseException):
    """The end of a run that had no time for anything."""


def last_state(name: str = "a") -> SimpleNamespace:
    """Returns what ``output/<name>_last.pt`` holds."""
    return SimpleNamespace(**checkpoint.load_state(f"output/{name}_last.pt"))


def lines(name: str = "a") -> list[dict[str, float]]:
    """The lines of metrics but for their times."""
    with open(f"logs/{name}/metrics.jsonl", encoding="utf-8") as f:
        return [
            {k: x for k, x in json.loads(line).items() if k not in ("images_per_sec", "secs", "eval_secs")}
            for line in f
        ]


def event_files(name: str = "a") -> list[str]:
    """In TensorBoard's order."""
    return sorted(map(str, Path("logs", name).glob("events.out.tfevents.*")))


def events(name: str = "a") -> list[tuple[int, str, float, bytes]]:
    """Every record of every event file, as it stands there, but for times: (step, tag, value, picture)."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    found = []
    for path in event_files(name):
        for event in LegacyEventFileLoader(path).Load():
            values = [v for v in event.summary.value if v.tag != "images_per_sec"]
            found += [(event.step, v.tag, v.simple_value, v.image.encoded_image_string) for v in values]
    return found


def curves(name: str = "a") -> dict[str, list[tuple[int, float]]]:
    """The curves as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(f"logs/{name}", size_guidance={"scalars": 0})
    accumulator.Reload()
    tags = set(accumulator.Tags()["scalars"]) - {"images_per_sec"}
    return {tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in tags}


def outcome(name: str = "a") -> dict[str, Any]:
    """Everything that a run leaves and that two runs can have in common, weights as bytes."""
    state = last_state(name)
    return {
        "best": Path(f"output/{name}_checkpoint.bin").read_bytes(),
        "metadata": Path(f"output/{name}_checkpoint.json").read_bytes(),
        "lines": lines(name),
        "events": events(name),
        "curves": curves(name),
        **{key: flat(getattr(state, key)) for key in ("step", "last_eval_step", "best_accuracy", "settings")},
        **{key: flat(getattr(state, key)) for key in ("model", "optimizer", "precision")},
        "found": (state.best_step, flat(state.best_result)),
    }


def undisturbed(folder: Path, *flags: str, prepare: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """What a run in the folder leaves that nothing stops; ``prepare`` makes there what it needs."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        prepare()
        assert run(*flags) == 0
        return outcome()
    finally:
        os.chdir(before)


def flat(value: Any) -> Any:
    """The same with tensors as types and bytes, to be compared with ==."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return {key: flat(x) for key, x in value.items()}
    return [flat(x) for x in value] if isinstance(value, list | tuple) else value


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Says what differs without printing all the bytes."""
    assert found["lines"] == expected["lines"]
    assert found["events"] == expected["events"]
    assert found["curves"] == expected["curves"]
    assert [key for key in expected if found[key] != expected[key]] == []


def every_name_is_whole(name: str = "a", folder: str = "output") -> None:
    """Fails unless each file that has its name can be read whole, and the best pair agrees or is known for none."""
    last, best = f"{folder}/{name}_last.pt", f"{folder}/{name}_checkpoint.bin"
    if os.path.exists(last):
        checkpoint.load_state(last)
    if os.path.exists(best):
        weights = checkpoint.load_weights(best)
        with contextlib.suppress(checkpoint.Unmatched):
            checkpoint.read_metadata(best, weights)
    elif os.path.exists(beside := checkpoint.metadata_path(best)):
        json.loads(Path(beside).read_text())


def write_images(root: str, sizes: Iterator[tuple[int, int]] | None = None, per_class: int = 6) -> None:
    """A folder of random pictures, of one size (decoded into memory) or of several (read when they are needed)."""
    rng, sizes = np.random.default_rng(0), sizes or itertools.repeat((32, 32))
    for split, name in itertools.product(("train", "test"), ("ant", "bee")):
        os.makedirs(f"{root}/{split}/{name}")
        for i in range(per_class):
            width, height = next(sizes)
            pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(f"{root}/{split}/{name}/{i}.png")


def several_sizes() -> Iterator[tuple[int, int]]:
    """For ``write_images``: a folder that is read through the loader."""
    return itertools.cycle([(40, 30), (33, 50), (32, 32)])


def run(*args: str) -> int:
    """train.py in this process."""
    return train.main([*RUN, *args])
