"""What several test modules share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from models.configs import CONFIGS, ViTConfig
from tests import fake_npz

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_configure() -> None:
    torch.set_num_threads(1)  # the models are tiny, and sums in one order give the same bits everywhere


@pytest.fixture(scope="session")
def repository() -> Path:
    """The repository's root."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real pictures, real weights and Google's own numbers, which are not part of the repository."""
    path = REPOSITORY.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"needs the real inputs of {path}, which is absent")
    return path


@pytest.fixture
def make_npz(tmp_path: Path) -> Callable[..., str]:
    """``make_npz("testing", img_size=32, num_classes=10, ...)`` writes a random checkpoint and returns its path.

    Takes a name of ``CONFIGS`` or a config, ``name`` for the file's, and the options of ``fake_npz.arrays``.
    """

    def make(config: str | ViTConfig = "testing", name: str = "weights.npz", **options: Any) -> str:
        if isinstance(config, str):
            config = CONFIGS[config]
        return fake_npz.save(tmp_path / name, fake_npz.arrays(config, **options))

    return make
