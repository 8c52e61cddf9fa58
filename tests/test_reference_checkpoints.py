"""Checkpoints as the reference script writes them: every key, evaluated against a second formulation.

The keys are those of its README's ``*_checkpoint.bin`` files, written out here so that a rename in
models/ cannot rename them too.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import train
from models.configs import CONFIGS
from models.modeling import VisionTransformer
from tests.helpers import fake_npz, oracle

CLASSES = ("ant", "bee", "cat")


def plain_shapes(patch_size: int, channels: int, num_patches: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields the keys and shapes for width 32, MLPs of 64, two layers and 3 classes."""
    yield "transformer.embeddings.position_embeddings", (1, 1 + num_patches, 32)
    yield "transformer.embeddings.cls_token", (1, 1, 32)
    yield "transformer.embeddings.patch_embeddings.weight", (32, channels, patch_size, patch_size)
    yield "transformer.embeddings.patch_embeddings.bias", (32,)
    for layer in ("transformer.encoder.layer.0", "transformer.encoder.layer.1"):
        for norm in ("attention_norm", "ffn_norm"):
            yield f"{layer}.{norm}.weight", (32,)
            yield f"{layer}.{norm}.bias", (32,)
        for projection in ("query", "key", "value", "out"):
            yield f"{layer}.attn.{projection}.weight", (32, 32)
            yield f"{layer}.attn.{projection}.bias", (32,)
        yield f"{layer}.ffn.fc1.weight", (64, 32)
        yield f"{layer}.ffn.fc1.bias", (64,)
        yield f"{layer}.ffn.fc2.weight", (32, 64)
        yield f"{layer}.ffn.fc2.bias", (32,)
    yield "transformer.encoder.encoder_norm.weight", (32,)
    yield "transformer.encoder.encoder_norm.bias", (32,)
    yield "head.weight", (3, 32)
    yield "head.bias", (3,)


def stem_shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields the keys and shapes of a stem with stages of one unit and two."""
    stem = "transformer.embeddings.hybrid_model."
    convolutions = {
        "root.conv": ("root.gn", (64, 3, 7, 7)),
        "body.block1.unit1.conv1": ("body.block1.unit1.gn1", (64, 64, 1, 1)),
        "body.block1.unit1.conv2": ("body.block1.unit1.gn2", (64, 64, 3, 3)),
        "body.block1.unit1.conv3": ("body.block1.unit1.gn3", (256, 64, 1, 1)),
        "body.block1.unit1.downsample": ("body.block1.unit1.gn_proj", (256, 64, 1, 1)),
        "body.block2.unit1.conv1": ("body.block2.unit1.gn1", (128, 256, 1, 1)),
        "body.block2.unit1.conv2": ("body.block2.unit1.gn2", (128, 128, 3, 3)),
        "body.block2.unit1.conv3": ("body.block2.unit1.gn3", (512, 128, 1, 1)),
        "body.block2.unit1.downsample": ("body.block2.unit1.gn_proj", (512, 256, 1, 1)),
        "body.block2.unit2.conv1": ("body.block2.unit2.gn1", (128, 512, 1, 1)),
        "body.block2.unit2.conv2": ("body.block2.unit2.gn2", (128, 128, 3, 3)),
        "body.block2.unit2.conv3": ("body.block2.unit2.gn3", (512, 128, 1, 1)),
    }
    for conv, (norm, shape) in convolutions.items():
        yield f"{stem}{conv}.weight", shape
        yield f"{stem}{norm}.weight", shape[:1]
        yield f"{stem}{norm}.bias", shape[:1]


PLAIN = dict(plain_shapes(patch_size=16, channels=3, num_patches=4))
HYBRID = dict([*plain_shapes(patch_size=1, channels=512, num_patches=16), *stem_shapes()])
BOTH = pytest.mark.parametrize(("model_type", "shapes"), [("testing", PLAIN), ("testing-hybrid", HYBRID)])


def random_state(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Numbers of a size that keeps activations near 1, in which no two parts are alike."""
    state = {}
    for name, shape in shapes.items():
        x = torch.from_numpy(fake_npz.values(name, shape))  # of deviation 1/16, as all but kernels and scales
        if name.endswith("weight") and len(shape) == 1:
            x = 1 + 2 * x
        elif name.endswith("weight"):
            x = 16 * x / np.prod(shape[1:]) ** 0.5
        state[name] = x
    return state


@pytest.fixture
def pets(tmp_path: Path) -> tuple[str, Tensor, Tensor]:
    """A folder of five test images of 32 px in three classes, and the images in [-1, 1] with their labels."""
    rng = np.random.default_rng(0)
    images, labels = [], []
    for split, number in (("train", 1), ("test", 2)):
        for label, name in enumerate(CLASSES):
            folder = tmp_path / "pets" / split / name
            folder.mkdir(parents=True)
            for i in range(number - (label == 2 and split == "test")):
                pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
                if split == "test":
                    images.append(pixels.transpose(2, 0, 1) / 127.5 - 1)
                    labels.append(label)
    return str(tmp_path / "pets"), torch.from_numpy(np.stack(images)), torch.tensor(labels)


@BOTH
def test_a_models_state_has_their_keys_and_shapes_in_float32(model_type, shapes):
    for vis in (False, True):
        state = VisionTransformer(CONFIGS[model_type], img_size=32, num_classes=3, vis=vis).state_dict()
        assert {name: tuple(x.shape) for name, x in state.items()} == shapes
        assert {x.dtype for x in state.values()} == {torch.float32}


@BOTH
@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "wrapped"])
def test_the_command_line_evaluates_them(model_type, shapes, wrapped, pets, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    folder, images, labels = pets
    state = random_state(shapes)
    torch.save({("module." if wrapped else "") + name: x for name, x in state.items()}, "ref_checkpoint.bin")
    args = ["--name", "ref", "--dataset", folder, "--model_type", model_type, "--img_size", "32", "--device", "cpu"]
    with caplog.at_level(logging.INFO):
        assert train.main([*args, "-v", "true", "--load_model_dir", "ref_checkpoint.bin"]) == 0
    logged = dict(re.findall(r"Valid (Loss|Accuracy): ([\d.]+)", caplog.text))

    exact = {name: x.double() for name, x in state.items()}
    accuracy = (oracle.logits(exact, images).argmax(dim=1) == labels).double().mean().item()
    assert float(logged["Accuracy"]) == pytest.approx(accuracy, abs=1e-5)
    assert float(logged["Loss"]) == pytest.approx(oracle.loss(exact, images, labels).item(), abs=2e-5)
