"""Fine-tuning on real images from real weights; takes half an hour on two cores: make soak."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

TRAIN = Path(__file__).resolve().parent.parent / "train.py"
RUN = [
    "--dataset", "cifar10-images", "--model_type", "ViT-S_14", "--img_size", "56", "--train_batch_size", "64",
    "--num_steps", "300", "--warmup_steps", "30", "--learning_rate", "0.01", "--device", "cpu",
]  # fmt: skip
HALF = ["--fp16", "--amp_dtype", "bfloat16", "--fp16_opt_level"]
LEVELS = {"float32": [], "O1": [*HALF, "O1"], "O2": [*HALF, "O2"]}

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def final_accuracy(shared_data, tmp_path_factory):
    """The accuracy with which a run ends, by its name and its further flags."""
    folder = tmp_path_factory.mktemp("real")
    with tarfile.open(shared_data / "cifar10-images.tar.xz") as archive:
        archive.extractall(folder, filter="data")

    def run(name, *flags):
        subprocess.run(
            [sys.executable, str(TRAIN), "--name", name, *RUN, *flags], cwd=folder, check=True, env=os.environ
        )
        lines = map(json.loads, (folder / "logs" / name / "metrics.jsonl").read_text().splitlines())
        accuracy = [x["test/accuracy"] for x in lines if "test/accuracy" in x][-1]
        print(f"{name}: {accuracy:.4f}")
        return accuracy

    return run


@pytest.fixture(scope="module")
def from_pretrained(final_accuracy, shared_data):
    """The accuracies of runs from real weights, by level of precision."""
    weights = str(shared_data / "ViT-S_14.npz")
    return {level: final_accuracy(level, "--pretrained_dir", weights, *flags) for level, flags in LEVELS.items()}


def test_half_precision_ends_where_float32_does(from_pretrained):
    assert max(from_pretrained.values()) - min(from_pretrained.values()) <= 0.02


def test_pretrained_weights_beat_random_ones(from_pretrained, final_accuracy):
    assert from_pretrained["float32"] >= 0.60
    assert final_accuracy("random", "--pretrained_dir", "") < 0.45
