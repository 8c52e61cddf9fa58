"""Models against timm's, both loaded from the same file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.once.agreement import timm_logits
from models.configs import CONFIGS, ViTConfig
from models.modeling import VisionTransformer
from tests.helpers import fake_npz
from utils.weights import read_npz

pytest.importorskip("timm", reason="timm is the independent implementation")

NUM_CLASSES = 10
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


@pytest.fixture(scope="module", params=["ViT-S_16", "ViT-B_32", "R26-ViT-S_32", "R-ViT-Ti_16"])
def checkpoint(request, tmp_path_factory):
    """(model type, path) of a checkpoint made for pictures of 224 pixels."""
    weights = fake_npz.arrays(CONFIGS[request.param], img_size=224, num_classes=NUM_CLASSES)
    path = fake_npz.save(tmp_path_factory.mktemp("oracles") / f"{request.param}.npz", weights)
    yield request.param, path
    Path(path).unlink()  # pytest would keep some hundred megabytes


def check_logits(path: str, config: ViTConfig, img_size: int, dtype: torch.dtype) -> None:
    x = torch.rand(1, 3, img_size, img_size, generator=torch.Generator().manual_seed(0), dtype=dtype) * 2 - 1
    with torch.device("meta"):
        model = VisionTransformer(config, img_size, NUM_CLASSES)
    model = model.to_empty(device="cpu").eval()
    model.load_from(read_npz(path))
    with torch.no_grad():
        logits, _ = model.to(dtype)(x)
    expected = timm_logits(path, config, img_size, NUM_CLASSES, x)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-9
    assert (logits - expected).abs().max() <= tolerance * expected.abs().max()


@DTYPES
@pytest.mark.parametrize("img_size", [224, 384])
def test_logits_are_timms(checkpoint, img_size, dtype):
    model_type, path = checkpoint
    check_logits(path, CONFIGS[model_type], img_size, dtype)


@DTYPES
def test_logits_behind_the_stem_of_r50_b_16_are_timms(tmp_path, dtype):
    """The published stem before a small transformer: ``benchmarks.once.agreement`` compares the whole model."""
    config = replace(CONFIGS["R50-ViT-B_16"], hidden_size=96, mlp_dim=384, num_heads=3, num_layers=2)
    path = fake_npz.save(tmp_path / "weights.npz", fake_npz.arrays(config, img_size=224, num_classes=NUM_CLASSES))
    check_logits(path, config, 224, dtype)


def test_features_of_real_weights_are_timms(shared_data):
    path = str(shared_data / "ViT-S_14.npz")
    config = CONFIGS["ViT-S_14"]
    x = torch.rand(2, 3, 56, 56, generator=torch.Generator().manual_seed(0)) * 2 - 1
    model = VisionTransformer(config, 56, NUM_CLASSES, zero_head=True).eval()
    model.load_from(read_npz(path))
    with torch.no_grad():
        features = model.transformer(x)[0][:, 0]
    expected = timm_logits(path, config, 56, 0, x)  # no classes: the class token after the last norm
    assert (features - expected).abs().max() <= 1e-4 * expected.abs().max()
