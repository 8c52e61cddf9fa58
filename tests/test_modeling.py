"""models/modeling.py: the contract of its keys and its forward pass."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.configs import CONFIGS, ViTConfig
from models.cpu_ops import attention_scores
from models.modeling import Attention, Mlp, PatchEmbedding, VisionTransformer
from tests.helpers import fake_npz

PLAIN = replace(CONFIGS["testing"], dropout_rate=0.0)
HYBRID = replace(CONFIGS["testing-hybrid"], dropout_rate=0.0)
BOTH = pytest.mark.parametrize("config", [PLAIN, HYBRID], ids=["plain", "hybrid"])


def build(config: ViTConfig = PLAIN, img_size: int = 48, num_classes: int = 10, **kwargs: Any) -> VisionTransformer:
    """A model in evaluation mode whose every number is random, the same for the same arguments."""
    model = VisionTransformer(config, img_size, num_classes, **kwargs)
    model.load_from(fake_npz.arrays(config, img_size, num_classes))
    return model.eval()


def pictures(n: int = 2, img_size: int = 48) -> Tensor:
    return torch.rand(n, 3, img_size, img_size, generator=torch.Generator().manual_seed(0)) * 2 - 1


# The contract of the keys.


def plain_shapes(patch_size: int, channels: int, num_patches: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The reference script's keys and shapes for width 32, mlp 64, two layers and 10 classes."""
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
    yield "head.weight", (10, 32)
    yield "head.bias", (10,)


def stem_shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """The keys and shapes of a stem with stages of one unit and two."""
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


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (PLAIN, dict(plain_shapes(patch_size=16, channels=3, num_patches=9))),
        (HYBRID, dict([*plain_shapes(patch_size=1, channels=512, num_patches=36), *stem_shapes()])),
    ],
    ids=["plain", "hybrid"],
)
@pytest.mark.parametrize("vis", [False, True])
def test_state_dict_has_the_reference_scripts_keys_and_shapes(config, expected, vis):
    state = VisionTransformer(config, img_size=48, num_classes=10, vis=vis).state_dict()
    assert {name: tuple(x.shape) for name, x in state.items()} == expected
    assert {x.dtype for x in state.values()} == {torch.float32}


def test_defaults_are_the_reference_scripts():
    model = VisionTransformer(CONFIGS["testing"])
    assert (model.img_size, model.num_classes, model.zero_head) == (224, 21843, False)
    logits, attn_weights = model(pictures(1, 224))
    assert (logits.shape, attn_weights) == ((1, 21843), [])


# The forward pass.


def recomputed_logits(weights: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """A plain model of four heads and patches of 16 pixels, from Google's arrays, in float64."""
    w = {name.replace("Transformer/", ""): array.astype(np.float64) for name, array in weights.items()}

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        mean, variance = x.mean(axis=-1, keepdims=True), x.var(axis=-1, keepdims=True)
        return (x - mean) / np.sqrt(variance + 1e-6) * w[f"{name}/scale"] + w[f"{name}/bias"]

    patches = np.stack([x[:, :, i : i + 16, j : j + 16] for i in range(0, 48, 16) for j in range(0, 48, 16)], axis=1)
    x = np.einsum("bpcij,ijcd->bpd", patches, w["embedding/kernel"]) + w["embedding/bias"]
    x = np.concatenate([np.repeat(w["cls"], len(x), axis=0), x], axis=1) + w["posembed_input/pos_embedding"]
    for block in ("encoderblock_0", "encoderblock_1"):
        y = norm(x, f"{block}/LayerNorm_0")
        name = f"{block}/MultiHeadDotProductAttention_1"
        q, k, v = (
            np.einsum("btd,dak->btak", y, w[f"{name}/{part}/kernel"]) + w[f"{name}/{part}/bias"]
            for part in ("query", "key", "value")
        )
        probs = np.exp(np.einsum("bqak,btak->baqt", q, k) / np.sqrt(8))
        probs /= probs.sum(axis=-1, keepdims=True)
        y = np.einsum("baqt,btak->bqak", probs, v)
        x = x + np.einsum("bqak,akd->bqd", y, w[f"{name}/out/kernel"]) + w[f"{name}/out/bias"]
        y = norm(x, f"{block}/LayerNorm_2")
        y = y @ w[f"{block}/MlpBlock_3/Dense_0/kernel"] + w[f"{block}/MlpBlock_3/Dense_0/bias"]
        y = y * (1 + np.vectorize(math.erf)(y / math.sqrt(2))) / 2
        x = x + y @ w[f"{block}/MlpBlock_3/Dense_1/kernel"] + w[f"{block}/MlpBlock_3/Dense_1/bias"]
    return norm(x, "encoder_norm")[:, 0] @ w["head/kernel"] + w["head/bias"]


@pytest.mark.parametrize("scale", [1, 1e-3], ids=["usual", "tiny"])  # tiny tokens show the norms' epsilon
def test_logits_are_those_of_a_recomputation_in_numpy(scale):
    weights = fake_npz.arrays(PLAIN, img_size=48)
    for name in ("cls", "Transformer/posembed_input/pos_embedding", "embedding/kernel", "embedding/bias"):
        weights[name] = weights[name] * np.float32(scale)
    model = VisionTransformer(PLAIN, 48, 10)
    model.load_from(weights)
    logits, _ = model(pictures())
    expected = recomputed_logits(weights, pictures().double().numpy())
    np.testing.assert_allclose(logits.detach(), expected, rtol=0, atol=1e-4 if scale < 1 else 2e-5)


@BOTH
def test_without_labels_it_returns_logits_and_an_empty_list(config):
    logits, attn_weights = build(config)(pictures())
    assert logits.shape == (2, 10)
    assert attn_weights == []


@BOTH
@pytest.mark.parametrize("training", [False, True], ids=["no_grad", "grad"])
def test_vis_adds_probabilities_and_changes_no_logit(config, training):
    x = pictures()
    with torch.set_grad_enabled(training):
        expected, _ = build(config).train(training)(x)
        logits, attn_weights = build(config, vis=True).train(training)(x)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)

    tokens = 1 + config.grid_size(48) ** 2
    assert len(attn_weights) == config.num_layers
    for probs in attn_weights:
        assert probs.shape == (2, config.num_heads, tokens, tokens)
        assert probs.min() >= 0
        torch.testing.assert_close(probs.sum(dim=-1), torch.ones(2, config.num_heads, tokens))
    assert not torch.allclose(attn_weights[0], attn_weights[1], atol=1e-3)


def test_attention_probabilities_are_those_of_query_and_key():
    model = build(vis=True)
    with torch.no_grad():
        _, attn_weights = model(pictures())
        block = model.transformer.encoder.layer[0]
        x = block.attention_norm(model.transformer.embeddings(pictures()))
        q, k = (linear(x).reshape(2, 10, 4, 8) for linear in (block.attn.query, block.attn.key))
        scores = torch.einsum("bqak,btak->baqt", q, k) / math.sqrt(8)
    torch.testing.assert_close(attn_weights[0], scores.softmax(dim=-1))


@BOTH
def test_fused_attention_and_the_one_with_gradients_agree(config):
    model = build(config)
    with torch.no_grad():
        fused, _ = model(pictures())
    torch.testing.assert_close(model(pictures())[0], fused, rtol=1e-5, atol=1e-5)


def test_with_labels_it_returns_the_mean_cross_entropy():
    model = build()
    labels = torch.tensor([0, 9, 3])
    logits, _ = model(pictures(3))
    loss = model(pictures(3), labels)
    assert loss.shape == ()
    expected = -sum(logits.double().log_softmax(dim=1)[i, label] for i, label in enumerate(labels)) / 3
    torch.testing.assert_close(loss.double(), expected)


def test_the_loss_of_half_logits_is_float32():
    loss = build().bfloat16()(pictures(), torch.tensor([0, 9]))
    assert loss.dtype == torch.float32


@BOTH
def test_every_parameter_gets_a_gradient(config):
    model = build(config)
    model(pictures(), torch.tensor([0, 9])).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_pictures_of_a_batch_do_not_see_each_other():
    model = build(HYBRID)
    with torch.no_grad():
        batch, _ = model(pictures(3))
        alone = torch.cat([model(x[None])[0] for x in pictures(3)])
    torch.testing.assert_close(batch, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(48, 48), (50, 63), (16, 33)])
def test_patch_embedding_is_a_convolution(size):
    module = PatchEmbedding(3, PLAIN)
    nn.init.normal_(module.bias)
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    expected = F.conv2d(x, module.weight, module.bias, stride=16).flatten(2).transpose(1, 2)
    torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("img_size", [49, 63])
def test_pixels_beyond_the_last_whole_patch_are_not_seen(img_size):
    x = pictures(img_size=img_size)
    cut, _ = build(img_size=48)(x[:, :, :48, :48])
    whole, _ = build(img_size=img_size)(x)
    torch.testing.assert_close(whole, cut)


@pytest.mark.parametrize("img_size", [41, 47, 48])
def test_hybrids_take_sizes_that_leave_a_remainder(img_size):
    assert HYBRID.grid_size(img_size) == 6
    logits, _ = build(HYBRID, img_size=img_size)(pictures(img_size=img_size))
    assert logits.isfinite().all()


@pytest.mark.parametrize("gelu", ["erf", "tanh"])
def test_gelu_is_the_one_the_config_names(gelu):
    def activation(x: float) -> float:
        if gelu == "erf":
            return x * (1 + math.erf(x / math.sqrt(2))) / 2
        return x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2

    mlp = Mlp(replace(PLAIN, gelu=gelu)).double()
    for linear in (mlp.fc1, mlp.fc2):  # leaves of the MLP only its activation
        nn.init.zeros_(linear.bias)
        nn.init.eye_(linear.weight)
    x = torch.linspace(-4, 4, 32, dtype=torch.float64)
    expected = torch.tensor([activation(v) for v in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(mlp(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("changes", [{"dropout_rate": 0.5}, {"attention_dropout_rate": 0.5}], ids=["mlp", "attention"])
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_dropout_acts_in_training_only(changes, grad):
    model, plain = build(replace(PLAIN, **changes)), build()
    x = pictures()
    with torch.set_grad_enabled(grad):
        assert torch.equal(model(x)[0], plain(x)[0])
        assert torch.equal(plain.train()(x)[0], plain.eval()(x)[0])
        model.train()
        torch.manual_seed(1)
        first, second = model(x)[0], model(x)[0]
        torch.manual_seed(1)
        again = model(x)[0]
    assert torch.equal(first, again)
    assert not torch.allclose(first, second, atol=1e-3)


def test_mlps_drop_after_both_layers():
    mlp = Mlp(replace(PLAIN, dropout_rate=0.5))
    nn.init.eye_(mlp.fc1.weight)
    nn.init.eye_(mlp.fc2.weight)
    nn.init.zeros_(mlp.fc2.bias)
    nn.init.zeros_(mlp.fc1.bias)
    torch.manual_seed(0)
    dropped = mlp(torch.ones(500, 32)) == 0
    assert dropped.float().mean().item() == pytest.approx(1 - 0.5**2, abs=0.02)


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_attention_drops_probabilities_and_outputs(grad):
    attention = Attention(replace(PLAIN, attention_dropout_rate=0.5), vis=False)
    nn.init.zeros_(attention.value.weight)
    nn.init.ones_(attention.value.bias)  # so that every head's output is the sum of its probabilities
    nn.init.eye_(attention.out.weight)
    nn.init.zeros_(attention.out.bias)
    torch.manual_seed(0)
    with torch.set_grad_enabled(grad):
        x, _ = attention(torch.randn(2, 200, 32))
    kept = x[x != 0] / 2  # what is kept is scaled up
    assert kept.numel() / x.numel() == pytest.approx(0.5, abs=0.03)
    assert kept.std() > 0.01
    assert kept.mean().item() == pytest.approx(1, abs=0.02)


def test_dropout_keeps_the_mean():
    model = build(replace(PLAIN, dropout_rate=0.3))
    embeddings = model.transformer.embeddings
    x = pictures()
    with torch.no_grad():
        expected = embeddings(x)
        dropped = embeddings.train()(x.repeat(1000, 1, 1, 1)).unflatten(0, (1000, 2))
    torch.testing.assert_close(dropped.mean(dim=0), expected, rtol=0.25, atol=0.1)
    assert (dropped == 0).float().mean().item() == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@BOTH
def test_models_of_other_types_take_float32_pictures(config, dtype):
    model = build(config).to(dtype)
    with torch.no_grad():
        logits, _ = model(pictures())
        expected, _ = build(config)(pictures())
    assert logits.dtype == dtype
    tolerance = 0.3 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(logits.float(), expected, rtol=0, atol=tolerance)


# Where training starts.


@BOTH
def test_a_new_model_starts_at_the_loss_of_guessing(config):
    loss = VisionTransformer(config, img_size=48, num_classes=10)(pictures(), torch.tensor([0, 9]))
    assert loss.item() == pytest.approx(math.log(10), rel=1e-6)


def test_a_new_model_has_googles_initial_values():
    torch.manual_seed(0)
    state = VisionTransformer(replace(PLAIN, hidden_size=128, mlp_dim=512), 224, 10).state_dict()
    layer = "transformer.encoder.layer.1."
    xavier = {"attn.query": (128, 128), "attn.out": (128, 128), "ffn.fc1": (512, 128), "ffn.fc2": (128, 512)}
    for name, (fan_out, fan_in) in xavier.items():
        weight = state[f"{layer}{name}.weight"]
        bound = math.sqrt(6 / (fan_in + fan_out))
        assert 0.99 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert state[f"{layer}ffn.fc1.bias"].std().item() == pytest.approx(1e-6, rel=0.2)
    assert state["transformer.embeddings.position_embeddings"].std().item() == pytest.approx(0.02, rel=0.05)
    patches = state["transformer.embeddings.patch_embeddings.weight"]
    assert patches.std().item() == pytest.approx((3 * 16 * 16) ** -0.5, rel=0.05)
    zeros = ["head.weight", "head.bias", f"{layer}attn.query.bias", "transformer.embeddings.cls_token"]
    assert not any(state[name].any() for name in zeros)


def test_the_seed_decides_the_initial_values():
    def state(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return VisionTransformer(HYBRID, 32, 10).state_dict()

    first, again, other = state(0), state(0), state(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(
        first["transformer.encoder.layer.0.ffn.fc1.weight"], other["transformer.encoder.layer.0.ffn.fc1.weight"]
    )


# Fine-tuned weights.


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_finetuned_weights_are_loaded_as_float32(config, dtype):
    state = {name: x.to(dtype) for name, x in build(config).state_dict().items()}
    model = VisionTransformer(config, img_size=48, num_classes=10)
    model.load_finetuned(state)
    loaded = model.state_dict()
    assert all(
        loaded[name].dtype == torch.float32 and torch.equal(loaded[name], x.float()) for name, x in state.items()
    )


@pytest.mark.parametrize(
    ("config", "kwargs", "messages"),
    [
        (PLAIN, {"img_size": 64}, ["trained at --img_size 64, not 48", "give --img_size 64"]),
        (PLAIN, {"num_classes": 100}, ["trained for 100 classes", "the data set has 10"]),
        (PLAIN, {"num_classes": 100, "img_size": 64}, ["trained for 100 classes"]),
        (
            replace(PLAIN, patch_size=8),
            {"img_size": 24},
            ["patch_embeddings.weight: expected (32, 3, 16, 16), found (32, 3, 8, 8)"],
        ),
        (replace(PLAIN, num_layers=3), {}, ["layer.2.attention_norm.weight: not in this model", "and 13 more"]),
        (replace(PLAIN, num_layers=1), {}, ["layer.1.", "expected (32,), not in the file", "and 13 more"]),
        (replace(PLAIN, hidden_size=16), {}, ["cls_token: expected (1, 1, 32), found (1, 1, 16)"]),
        (HYBRID, {}, ["expected (32, 3, 16, 16), found (32, 512, 1, 1)"]),
    ],
    ids=["size", "classes", "size and classes", "patch", "deeper", "shallower", "narrower", "hybrid"],
)
def test_other_finetuned_weights_are_refused_whole_with_what_they_are(config, kwargs, messages):
    trained = build(config, **kwargs).state_dict()
    model = VisionTransformer(PLAIN, img_size=48, num_classes=10)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"trained|expected|not in") as e:
        model.load_finetuned(trained)
    assert [message for message in messages if message not in str(e.value)] == []
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize("missing", ["head.bias", "head.weight", "transformer.embeddings.position_embeddings"])
def test_finetuned_weights_without_a_part_are_refused(missing):
    state = {name: x for name, x in build().state_dict().items() if name != missing}
    with pytest.raises(ValueError, match=rf"{re.escape(missing)}: expected \(.*\), not in the file"):
        build().load_finetuned(state)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("head.weight", (9, 32)),
        ("head.weight", (10, 31)),
        ("transformer.embeddings.position_embeddings", (1, 10, 31)),
        ("transformer.embeddings.position_embeddings", (10, 32)),
        ("transformer.embeddings.position_embeddings", (10,)),
    ],
)
def test_finetuned_weights_that_contradict_themselves_are_refused_whole(name, shape):
    model = VisionTransformer(PLAIN, img_size=48, num_classes=10)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(ValueError, match=re.escape(name)):
        model.load_finetuned({**build().state_dict(), name: torch.zeros(shape)})
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize("img_size", [64, 100])
def test_the_size_told_for_hybrid_weights_is_one_that_loads_them(img_size):
    state = build(HYBRID, img_size=img_size).state_dict()
    with pytest.raises(ValueError, match=r"give --img_size \d+$") as e:
        build(HYBRID).load_finetuned(state)
    build(HYBRID, img_size=int(str(e.value).split()[-1])).load_finetuned(state)


@pytest.mark.parametrize("autocast", [True, False])
def test_attention_scores_are_float32_in_half_precision(autocast):
    q, k = (torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(i)).bfloat16() for i in (0, 1))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        scores = attention_scores(q, k)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, q.float() @ k.float().mT / 8**0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention_scores_keep_no_copies_for_the_backward_pass(dtype):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 3, 5, 8, generator=generator).to(dtype).requires_grad_() for _ in range(2))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        scores = attention_scores(q, k)
    assert [x.data_ptr() for x in kept] == [q.data_ptr(), k.data_ptr()]
    grad = torch.randn(scores.shape, generator=generator)
    with torch.autocast("cpu", torch.bfloat16):  # must not reach the products
        ours = torch.autograd.grad(scores, (q, k), grad)
    a, b = (x.detach().float().requires_grad_() for x in (q, k))
    exact = torch.autograd.grad(a * 8**-0.5 @ b.mT, (a, b), grad)
    for x, y in zip(ours, exact):
        torch.testing.assert_close(x, y.to(dtype))
