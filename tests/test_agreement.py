"""Whole models against timm's, both loaded from the same file; ``benchmarks.once.agreement`` has every model."""

from __future__ import annotations

import pytest
import torch

from benchmarks.once.agreement import timm_logits
from models.configs import CONFIGS
from models.modeling import VisionTransformer
from tests.helpers import fake_npz
from utils.weights import read_npz

pytest.importorskip("timm", reason="timm is the independent implementation")


@pytest.mark.parametrize(("model_type", "img_size"), [("ViT-Ti_16", 384), ("R-ViT-Ti_16", 224)])
def test_logits_are_timms(model_type, img_size, tmp_path):
    config = CONFIGS[model_type]
    path = fake_npz.save(tmp_path / "weights.npz", fake_npz.arrays(config, img_size=224, num_classes=10))
    x = torch.rand(1, 3, img_size, img_size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    model = VisionTransformer(config, img_size, 10).eval()
    model.load_from(read_npz(path))
    with torch.no_grad():
        logits, _ = model(x)
    expected = timm_logits(path, config, img_size, 10, x)
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_features_of_real_weights_are_timms(shared_data):
    path, config = str(shared_data / "ViT-S_14.npz"), CONFIGS["ViT-S_14"]
    x = torch.rand(2, 3, 56, 56, generator=torch.Generator().manual_seed(0)) * 2 - 1
    model = VisionTransformer(config, 56, 10, zero_head=True).eval()
    model.load_from(read_npz(path))
    with torch.no_grad():
        features = model.transformer(x)[0][:, 0]
    expected = timm_logits(path, config, 56, 0, x)  # no classes: the class token after the last norm
    assert (features - expected).abs().max() <= 1e-4 * expected.abs().max()
