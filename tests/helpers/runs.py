"""Small trainings that are stopped and resumed, and what they leave: for the tests of resuming and of errors."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

import train
from tests.helpers.forked import run_forked
from utils import checkpoint

ROOT = Path(__file__).resolve().parent.parent.parent
TINY = ["--dataset", "digits", "--model_type", "testing", "--img_size", "32", "--device", "cpu"]
#: 13 steps; lines of metrics after 4, 8, 12 and 13, evaluations after 5, 10 and 13, two micro-batches a step.
RUN = [
    "--name", "a", *TINY, "--pretrained_dir", "", "--train_batch_size", "16", "--gradient_accumulation_steps", "2",
    "--num_steps", "13", "--warmup_steps", "3", "--log_every", "4", "--eval_every", "5", "--learning_rate", "0.1",
    "--eval_batch_size", "90", "--num_workers", "0",
]  # fmt: skip
#: 4 steps on the folder that ``write_images`` makes; lines after 3 and 4, evaluations and saves after 2 and 4, of which
#: the second is the better.
SHORT = [
    *RUN, "--dataset", "pets", "--num_steps", "4", "--warmup_steps", "1", "--log_every", "3", "--eval_every", "2",
    "--eval_batch_size", "4", "--seed", "18",
]  # fmt: skip
#: What no two runs have in common in metrics.jsonl.
TIMES = ("images_per_sec", "secs", "eval_secs", "input_share")


def run(*flags: str) -> int:
    """Runs train.py in this process, with the flags of ``SHORT`` and these."""
    return train.main([*SHORT, *flags])


def run_in_child(*flags: str, prepare: Callable[[], object] = lambda: None) -> None:
    """Runs the same in a forked child, in which ``prepare`` is called before; fails unless it ends well."""
    code, _, err = run_forked(["train.py", *SHORT, *flags], prepare=prepare)
    assert code == 0, err


def write_images(root: str = "pets", sizes: Iterator[tuple[int, int]] | None = None, per_class: int = 4) -> None:
    """Makes a folder of random images, of one size (decoded into memory) or of several (read when they are needed).

    They are four fields of one colour each: noise would take the report a long time to compress.
    """
    rng, sizes = np.random.default_rng(0), sizes or itertools.repeat((32, 32))
    for split, name in itertools.product(("train", "test"), ("ant", "bee")):
        os.makedirs(f"{root}/{split}/{name}")
        for i in range(per_class):
            fields = Image.fromarray(rng.integers(0, 256, (2, 2, 3), dtype=np.uint8))
            fields.resize(next(sizes), Image.Resampling.NEAREST).save(f"{root}/{split}/{name}/{i}.png")


def several_sizes() -> Iterator[tuple[int, int]]:
    """Returns sizes for ``write_images``: of a folder that is read through the loader."""
    return itertools.cycle([(40, 30), (33, 50), (32, 32)])


# ---- what a run leaves ----


def last_state(name: str = "a") -> SimpleNamespace:
    """Returns what ``output/<name>_last.pt`` holds."""
    return SimpleNamespace(**checkpoint.load_state(f"output/{name}_last.pt"))


def lines(name: str = "a") -> list[dict[str, float]]:
    """Returns the lines of metrics but for their times."""
    with open(f"logs/{name}/metrics.jsonl", encoding="utf-8") as f:
        return [{k: x for k, x in json.loads(line).items() if k not in TIMES} for line in f]


def events(name: str = "a") -> list[tuple[int, str, float, bytes]]:
    """Returns every record of every event file, as it stands there, but for times: (step, tag, value, image)."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    records = []
    for path in sorted(map(str, Path("logs", name).glob("events.out.tfevents.*"))):  # TensorBoard's order
        for event in LegacyEventFileLoader(path).Load():
            values = [v for v in event.summary.value if v.tag != "images_per_sec"]
            records += [(event.step, v.tag, v.simple_value, v.image.encoded_image_string) for v in values]
    return records


def outcome(name: str = "a") -> dict[str, Any]:
    """Returns everything that a run leaves and that two runs can have in common, weights as bytes."""
    state = last_state(name)
    return {
        "best": Path(f"output/{name}_checkpoint.bin").read_bytes(),
        "metadata": Path(f"output/{name}_checkpoint.json").read_bytes(),
        "lines": lines(name),
        "events": events(name),
        **{key: flat(getattr(state, key)) for key in ("step", "last_eval_step", "best_accuracy", "settings")},
        **{key: flat(getattr(state, key)) for key in ("model", "optimizer", "precision")},
        "best_result": (state.best_step, flat(state.best_result)),
    }


@functools.cache
def undisturbed(
    *flags: str, images: Callable[[], None] = write_images, prepare: Callable[[], object] = lambda: None
) -> dict[str, Any]:
    """Returns what a run leaves that nothing stops, kept for other tests; ``images`` makes the folder pets."""
    with tempfile.TemporaryDirectory() as root, working_in(root):
        images()
        run_in_child(*flags, prepare=prepare)
        return outcome()


@contextlib.contextmanager
def working_in(folder: str) -> Iterator[None]:
    """Changes the working directory for a while."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def flat(value: Any) -> Any:
    """Returns the same with tensors as types and bytes, to be compared with ==."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return {key: flat(x) for key, x in value.items()}
    return [flat(x) for x in value] if isinstance(value, list | tuple) else value


def assert_same(result: dict[str, Any], expected: dict[str, Any]) -> None:
    """Says what differs without printing all the bytes."""
    assert result["lines"] == expected["lines"]
    assert [key for key in expected if result[key] != expected[key]] == []


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
