"""The README's download and the training after it, where Google's bucket refuses and the hub has a mirror."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import train
from models.published import PUBLISHED, repository
from tests.conftest import REPOSITORY
from tests.helpers.downloads import assert_same_weights, google_arrays, timm_file
from tests.helpers.servers import Hub, RefusingProxy, serving


def test_the_readmes_command_and_the_training_after_it(folder, tmp_path, monkeypatch):
    """Google's true address behind a proxy that refuses, the hub a mirror: one line, the file, two steps."""
    pytest.importorskip("huggingface_hub")
    model, google = "ViT-Ti_16", PUBLISHED["ViT-Ti_16"]
    with serving(Hub()) as hub, serving(RefusingProxy()) as proxy:
        hub.add(repository(google), "model.safetensors", timm_file(model))
        settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0",
                    "no_proxy": "127.0.0.1,localhost", "https_proxy": proxy.url,
                    "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *sys.path])}  # fmt: skip
        done = subprocess.run([sys.executable, "-m", "tools.download", model], cwd=tmp_path, text=True,
                              env=os.environ | settings, capture_output=True, timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert proxy.requests == ["storage.googleapis.com:443"]
    (line,) = done.stderr.splitlines()
    assert f"https://storage.googleapis.com/vit_models/{google}.npz" in line
    assert "403" in line
    assert "the Hugging Face hub is taken" in line
    path = os.path.join("checkpoint", f"{google.split('/')[0]}_{model}.npz")
    assert_same_weights(tmp_path / path, google_arrays(model))
    monkeypatch.chdir(tmp_path)
    flags = ["--name", "x", "--dataset", str(folder), "--model_type", model, "--img_size", "32",
             "--pretrained_dir", path, "--num_steps", "2", "--train_batch_size", "8",
             "--device", "cpu"]  # fmt: skip
    assert train.main(flags) == 0
    assert (tmp_path / "output" / "x_checkpoint.bin").exists()
