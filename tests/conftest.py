"""Fixtures that several test modules share."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from models.configs import CONFIGS, ViTConfig
from tests.helpers import fake_npz
from tests.helpers.clock import Clock
from tests.helpers.folders import noise, save, tree
from tests.helpers.null_gpu import NullGpu, build
from utils import datasets, folders, hardware

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_configure() -> None:
    torch.set_num_threads(1)  # the models are tiny, and sums in one order give the same bits everywhere
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started to ignore it


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Runs half as many tests more than there are processors at a time: many wait for processes that they start."""
    return 3 * hardware.num_cpus() // 2


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


@pytest.fixture(scope="session")
def null_gpu(tmp_path_factory: pytest.TempPathFactory) -> NullGpu:
    """The null GPU, which is not part of the repository; see tests/helpers/null_gpu.py."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # which all workers have in common
    return build(folder / "null_gpu")


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


@pytest.fixture(scope="session")
def finetuned_digits(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of a checkpoint that train.py wrote after a few updates of the testing model on the digits.

    Shared by the tests of the tools, which must not change it.
    """
    import train

    folder, before = tmp_path_factory.mktemp("finetuned"), os.getcwd()
    args = ["--name", "digits", "--dataset", "digits", "--model_type", "testing", "--img_size", "48", "--device", "cpu",
            "--pretrained_dir", "", "--train_batch_size", "32", "--num_steps", "60", "--warmup_steps", "5",
            "--eval_every", "60", "--learning_rate", "0.1"]  # fmt: skip
    os.chdir(folder)  # a run writes output/ and logs/ below the working directory
    try:
        assert train.main(args) == 0
    finally:
        os.chdir(before)
    return str(folder / "output" / "digits_checkpoint.bin")


@pytest.fixture(params=["testing", "testing-hybrid"])
def finetuned_any(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The path of a checkpoint of a plain and of a hybrid model, with random weights and three classes."""
    from models import npz
    from utils import checkpoint

    config, img_size = CONFIGS[request.param], 72 if request.param == "testing-hybrid" else 48
    weights = fake_npz.arrays(config, img_size, num_classes=3)
    description = checkpoint.CheckpointMetadata(request.param, img_size, ["ant", "bee", "cat"], "tanh", "pets", 8, 0.5)
    path = str(tmp_path / "any_checkpoint.bin")
    checkpoint.save_weights(path, npz.to_state_dict(weights, config, img_size, num_classes=3), description)
    return path


@pytest.fixture
def draw(tmp_path: Path) -> Callable[..., str]:
    """``draw("a.png", size=(40, 30), seed=0)`` writes a picture of random pixels and returns its path."""

    def make(name: str = "picture.png", size: tuple[int, int] = (40, 30), seed: int = 0) -> str:
        pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
        return str(path)

    return make


@pytest.fixture
def pets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Works in a folder of its own, where the folder pets is that ``runs.SHORT`` trains on."""
    from tests.helpers.runs import write_images

    monkeypatch.chdir(tmp_path)
    write_images()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The time that the training's log reads."""
    from utils import metrics

    clock = Clock()
    monkeypatch.setattr(metrics.time, "perf_counter", clock.perf_counter)
    return clock


@pytest.fixture
def rng() -> np.random.Generator:
    """Random numbers, the same in every test."""
    return np.random.default_rng(0)


@pytest.fixture
def folder(tmp_path: Path, rng: np.random.Generator) -> Path:
    """Two classes of 6x6 pictures: five to train on and three to test on each."""
    root = tmp_path / "pictures"
    for split, count in (("train", 5), ("test", 3)):
        for name in ("cat", "dog"):
            for i in range(count):
                save(noise(rng), root, split, name, f"{i}.png")
    return root


@pytest.fixture
def found(tmp_path: Path) -> Callable[..., folders.Folder]:
    """``found(*paths, test_fraction=None)`` makes a folder ``pets`` of small images, and finds it."""

    def make(*paths: str, test_fraction: float | None = None) -> folders.Folder:
        return folders.find(tree(tmp_path / "pets", *paths), test_fraction)

    return make


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that everybody may look into, as those of ``tmp_path`` are not."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.fixture
def decode_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if no split fitted into memory."""
    monkeypatch.setattr(datasets, "MEMORY_LIMIT_BYTES", 0)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write_errors", action="store_true", help="write docs/errors.md from the tests that try them")
