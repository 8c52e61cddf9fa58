"""Fine-tuning on real pictures from real weights; takes half an hour on two cores: make soak."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

TRAIN = Path(__file__).resolve().parent.parent / "train.py"
RUN = [
    "--model_type", "ViT-S_14", "--img_size", "56", "--train_batch_size", "64",
    "--num_steps", "300", "--warmup_steps", "30", "--learning_rate", "0.01",
]  # fmt: skip


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_pretrained_weights_beat_random_ones_on_real_pictures(shared_data, tmp_path):
    with tarfile.open(shared_data / "cifar10-images.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    best = {}
    for name, weights in (("pretrained", str(shared_data / "ViT-S_14.npz")), ("random", "")):
        args = ["--name", name, "--dataset", "cifar10-images", "--pretrained_dir", weights, *RUN]
        subprocess.run([sys.executable, str(TRAIN), *args], cwd=tmp_path, check=True, env=os.environ)
        lines = [json.loads(line) for line in (tmp_path / "logs" / name / "metrics.jsonl").read_text().splitlines()]
        best[name] = max(line.get("test/accuracy", 0) for line in lines)
    assert best["pretrained"] >= 0.60
    assert best["random"] < 0.45
