"""Weights that the tests of tools.download serve, and what must come of them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch

from models import layouts, npz
from models.configs import CONFIGS
from models.published import BY_PATH, UPSTREAMS, GoogleFile
from tests.helpers import fake_npz


def publish(*files: GoogleFile, setitem: Callable[[dict[str, Any], str, Any], None] = operator.setitem) -> None:
    """Adds files to those that Google publishes; ``monkeypatch.setitem`` takes them back after a test."""
    for file in files:
        setitem(UPSTREAMS[file.upstream], file.model, file.path)
        setitem(BY_PATH, file.path, file)


def google_arrays(model_type: str = "testing", seed: int = 0) -> dict[str, np.ndarray]:
    """The arrays of a file of Google's, head and pre_logits among them."""
    return fake_npz.arrays(CONFIGS[model_type], img_size=32, pre_logits=True, seed=seed)


def timm_file(model_type: str = "testing", head: bool = False, seed: int = 0) -> bytes:
    """The content of a .safetensors in timm's layout with the numbers of ``google_arrays``."""
    config = CONFIGS[model_type]
    state = npz.to_state_dict(google_arrays(model_type, seed), config, 32, num_classes=10 if head else None)
    return safetensors.torch.save({k: v.contiguous() for k, v in layouts.from_ours(state, layouts.TIMM).items()})


def assert_same_weights(
    path: Path, expected: Mapping[str, np.ndarray], left_out: tuple[str, ...] = ("head", "pre_logits")
) -> None:
    """An .npz has the expected arrays, in their order, bit for bit, but for what is left out."""
    wanted = {name: x for name, x in expected.items() if not name.startswith(left_out)}
    with np.load(path, allow_pickle=False) as file:
        assert file.files == list(wanted)
        for name, x in wanted.items():
            assert (file[name].dtype, file[name].shape) == (x.dtype, x.shape)
            assert file[name].tobytes() == x.tobytes(), name
