"""Checkpoints as the reference script writes them: every key by hand, evaluated against a second formulation.

The keys are those of its README's ``*_checkpoint.bin`` files, written out here so that a rename in
models/ cannot rename them too.
"""

from __future__ import annotations

import logging
import re
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

NUM_CLASSES = 3
CLASSES = ("ant", "bee", "cat")

#: The testing model at 32 px: patches of 16, width 32, MLPs of 64, two layers.
PLAIN = {
    "transformer.embeddings.position_embeddings": (1, 5, 32),
    "transformer.embeddings.cls_token": (1, 1, 32),
    "transformer.embeddings.patch_embeddings.weight": (32, 3, 16, 16),
    "transformer.embeddings.patch_embeddings.bias": (32,),
    "transformer.encoder.layer.0.attention_norm.weight": (32,),
    "transformer.encoder.layer.0.attention_norm.bias": (32,),
    "transformer.encoder.layer.0.ffn_norm.weight": (32,),
    "transformer.encoder.layer.0.ffn_norm.bias": (32,),
    "transformer.encoder.layer.0.ffn.fc1.weight": (64, 32),
    "transformer.encoder.layer.0.ffn.fc1.bias": (64,),
    "transformer.encoder.layer.0.ffn.fc2.weight": (32, 64),
    "transformer.encoder.layer.0.ffn.fc2.bias": (32,),
    "transformer.encoder.layer.0.attn.query.weight": (32, 32),
    "transformer.encoder.layer.0.attn.query.bias": (32,),
    "transformer.encoder.layer.0.attn.key.weight": (32, 32),
    "transformer.encoder.layer.0.attn.key.bias": (32,),
    "transformer.encoder.layer.0.attn.value.weight": (32, 32),
    "transformer.encoder.layer.0.attn.value.bias": (32,),
    "transformer.encoder.layer.0.attn.out.weight": (32, 32),
    "transformer.encoder.layer.0.attn.out.bias": (32,),
    "transformer.encoder.layer.1.attention_norm.weight": (32,),
    "transformer.encoder.layer.1.attention_norm.bias": (32,),
    "transformer.encoder.layer.1.ffn_norm.weight": (32,),
    "transformer.encoder.layer.1.ffn_norm.bias": (32,),
    "transformer.encoder.layer.1.ffn.fc1.weight": (64, 32),
    "transformer.encoder.layer.1.ffn.fc1.bias": (64,),
    "transformer.encoder.layer.1.ffn.fc2.weight": (32, 64),
    "transformer.encoder.layer.1.ffn.fc2.bias": (32,),
    "transformer.encoder.layer.1.attn.query.weight": (32, 32),
    "transformer.encoder.layer.1.attn.query.bias": (32,),
    "transformer.encoder.layer.1.attn.key.weight": (32, 32),
    "transformer.encoder.layer.1.attn.key.bias": (32,),
    "transformer.encoder.layer.1.attn.value.weight": (32, 32),
    "transformer.encoder.layer.1.attn.value.bias": (32,),
    "transformer.encoder.layer.1.attn.out.weight": (32, 32),
    "transformer.encoder.layer.1.attn.out.bias": (32,),
    "transformer.encoder.encoder_norm.weight": (32,),
    "transformer.encoder.encoder_norm.bias": (32,),
    "head.weight": (3, 32),
    "head.bias": (3,),
}

#: The hybrid testing model at 32 px: a map of 4 x 4 cells of 512 channels, from blocks of one unit and two.
HYBRID = {
    **PLAIN,
    "transformer.embeddings.position_embeddings": (1, 17, 32),
    "transformer.embeddings.patch_embeddings.weight": (32, 512, 1, 1),
    "transformer.embeddings.hybrid_model.root.conv.weight": (64, 3, 7, 7),
    "transformer.embeddings.hybrid_model.root.gn.weight": (64,),
    "transformer.embeddings.hybrid_model.root.gn.bias": (64,),
    "transformer.embeddings.hybrid_model.body.block1.unit1.gn1.weight": (64,),
    "transformer.embeddings.hybrid_model.body.block1.unit1.gn1.bias": (64,),
    "transformer.embeddings.hybrid_model.body.block1.unit1.conv1.weight": (64, 64, 1, 1),
    "transformer.embeddings.hybrid_model.body.block1.unit1.gn2.weight": (64,),
    "transformer.embeddings.hybrid_model.body.block1.unit1.gn2.bias": (64,),
    "transformer.embeddings.hybrid_model.body.block1.unit1.conv2.weight": (64, 64, 3, 3),
    "transformer.embeddings.hybrid_model.body.block1.unit1.gn3.weight": (256,),
    "transformer.embeddings.hybrid_model.body.block1.unit1.gn3.bias": (256,),
    "transformer.embeddings.hybrid_model.body.block1.unit1.conv3.weight": (256, 64, 1, 1),
    "transformer.embeddings.hybrid_model.body.block1.unit1.downsample.weight": (256, 64, 1, 1),
    "transformer.embeddings.hybrid_model.body.block1.unit1.gn_proj.weight": (256,),
    "transformer.embeddings.hybrid_model.body.block1.unit1.gn_proj.bias": (256,),
    "transformer.embeddings.hybrid_model.body.block2.unit1.gn1.weight": (128,),
    "transformer.embeddings.hybrid_model.body.block2.unit1.gn1.bias": (128,),
    "transformer.embeddings.hybrid_model.body.block2.unit1.conv1.weight": (128, 256, 1, 1),
    "transformer.embeddings.hybrid_model.body.block2.unit1.gn2.weight": (128,),
    "transformer.embeddings.hybrid_model.body.block2.unit1.gn2.bias": (128,),
    "transformer.embeddings.hybrid_model.body.block2.unit1.conv2.weight": (128, 128, 3, 3),
    "transformer.embeddings.hybrid_model.body.block2.unit1.gn3.weight": (512,),
    "transformer.embeddings.hybrid_model.body.block2.unit1.gn3.bias": (512,),
    "transformer.embeddings.hybrid_model.body.block2.unit1.conv3.weight": (512, 128, 1, 1),
    "transformer.embeddings.hybrid_model.body.block2.unit1.downsample.weight": (512, 256, 1, 1),
    "transformer.embeddings.hybrid_model.body.block2.unit1.gn_proj.weight": (512,),
    "transformer.embeddings.hybrid_model.body.block2.unit1.gn_proj.bias": (512,),
    "transformer.embeddings.hybrid_model.body.block2.unit2.gn1.weight": (128,),
    "transformer.embeddings.hybrid_model.body.block2.unit2.gn1.bias": (128,),
    "transformer.embeddings.hybrid_model.body.block2.unit2.conv1.weight": (128, 512, 1, 1),
    "transformer.embeddings.hybrid_model.body.block2.unit2.gn2.weight": (128,),
    "transformer.embeddings.hybrid_model.body.block2.unit2.gn2.bias": (128,),
    "transformer.embeddings.hybrid_model.body.block2.unit2.conv2.weight": (128, 128, 3, 3),
    "transformer.embeddings.hybrid_model.body.block2.unit2.gn3.weight": (512,),
    "transformer.embeddings.hybrid_model.body.block2.unit2.gn3.bias": (512,),
    "transformer.embeddings.hybrid_model.body.block2.unit2.conv3.weight": (512, 128, 1, 1),
}
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
    """A folder of five test pictures of 32 px in three classes, and the pictures in [-1, 1] with their labels."""
    rng = np.random.default_rng(0)
    pictures, labels = [], []
    for split, number in (("train", 1), ("test", 2)):
        for label, name in enumerate(CLASSES):
            folder = tmp_path / "pets" / split / name
            folder.mkdir(parents=True)
            for i in range(number - (label == 2 and split == "test")):
                pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
                if split == "test":
                    pictures.append(pixels.transpose(2, 0, 1) / 127.5 - 1)
                    labels.append(label)
    return str(tmp_path / "pets"), torch.from_numpy(np.stack(pictures)), torch.tensor(labels)


@BOTH
@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "wrapped"])
def test_the_command_line_evaluates_them(model_type, shapes, wrapped, pets, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    folder, pictures, labels = pets
    state = random_state(shapes)
    torch.save({("module." if wrapped else "") + name: x for name, x in state.items()}, "ref_checkpoint.bin")
    args = ["--name", "ref", "--dataset", folder, "--model_type", model_type, "--img_size", "32", "--device", "cpu"]
    with caplog.at_level(logging.INFO):
        assert train.main([*args, "-v", "true", "--load_model_dir", "ref_checkpoint.bin"]) == 0
    found = dict(re.findall(r"Valid (Loss|Accuracy): ([\d.]+)", caplog.text))

    exact = {name: x.double() for name, x in state.items()}
    accuracy = (oracle.logits(exact, pictures).argmax(dim=1) == labels).double().mean().item()
    assert float(found["Accuracy"]) == pytest.approx(accuracy, abs=1e-5)
    assert float(found["Loss"]) == pytest.approx(oracle.loss(exact, pictures, labels).item(), abs=2e-5)


@BOTH
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_their_logits_are_those_of_a_second_formulation(model_type, shapes, dtype, tolerance, pets):
    _, pictures, _ = pets
    state = random_state(shapes)
    model = VisionTransformer(CONFIGS[model_type], img_size=32, num_classes=NUM_CLASSES).eval()
    model.load_finetuned(state)
    expected = oracle.logits({name: x.double() for name, x in state.items()}, pictures)
    assert expected.std() > 0.1
    with torch.no_grad():
        logits, _ = model.to(dtype)(pictures.to(dtype))
    assert (logits - expected).abs().max() <= tolerance * expected.abs().max()
    assert {name: tuple(x.shape) for name, x in model.state_dict().items()} == shapes


@BOTH
def test_every_part_of_them_has_its_effect(model_type, shapes, pets):
    _, pictures, _ = pets
    state = random_state(shapes)
    model = VisionTransformer(CONFIGS[model_type], img_size=32, num_classes=NUM_CLASSES).eval()
    before = oracle.logits({name: x.double() for name, x in state.items()}, pictures)
    for name, shape in shapes.items():
        if name.endswith("attn.key.bias"):
            continue  # softmax does not see what all keys have in common
        axis = next(i for i, size in reversed(list(enumerate(shape))) if size > 1)
        changed = {**state, name: state[name].flip(axis)}
        model.load_finetuned(changed)
        expected = oracle.logits({n: x.double() for n, x in changed.items()}, pictures)
        with torch.no_grad():
            logits, _ = model(pictures.float())
        error, effect = (logits - expected).abs().max(), (expected - before).abs().max()
        assert error < effect / 100, name
