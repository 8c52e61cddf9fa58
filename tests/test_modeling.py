"""models/modeling.py: its forward pass, its first values and what it loads; its keys: test_reference_checkpoints.py."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.configs import CONFIGS, ViTConfig
from models.modeling import Attention, Mlp, PatchEmbedding, VisionTransformer
from tests.helpers import fake_npz, oracle
from utils.errors import UserError

PLAIN = replace(CONFIGS["testing"], dropout_rate=0.0)
HYBRID = replace(CONFIGS["testing-hybrid"], dropout_rate=0.0)
BOTH = pytest.mark.parametrize("config", [PLAIN, HYBRID], ids=["plain", "hybrid"])


def build(config: ViTConfig = PLAIN, img_size: int = 48, num_classes: int = 10, **kwargs: Any) -> VisionTransformer:
    """A model in evaluation mode whose every number is random, the same for the same arguments."""
    model = VisionTransformer(config, img_size, num_classes, **kwargs)
    model.load_from(fake_npz.arrays(config, img_size, num_classes))
    return model.eval()


def images(n: int = 2, img_size: int = 48) -> Tensor:
    return torch.rand(n, 3, img_size, img_size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_defaults_are_the_reference_scripts():
    model = VisionTransformer(CONFIGS["testing"])
    assert (model.img_size, model.num_classes, model.zero_head) == (224, 21843, False)
    logits, attn_weights = model(images(1, 224))
    assert (logits.shape, attn_weights) == ((1, 21843), [])


# ---- the forward pass ----


@pytest.mark.parametrize("vis", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_one_product_gives_the_queries_keys_and_values_of_three(dtype, vis):
    """As on CUDA; without ``vis`` the last block has a single query."""
    results = []
    for joined in (False, True):
        model = build(vis=vis).to(dtype).train()
        for block in model.transformer.encoder.layer:
            block.attn.joined = joined
        loss = model(images().to(dtype), torch.arange(2))
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters())])
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(*results, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    "config",
    [
        PLAIN,
        HYBRID,
        replace(HYBRID, patch_size=2, resnet_units=()),
    ],
    ids=["plain", "hybrid", "root alone"],
)
@pytest.mark.parametrize("scale", [1, 1e-3], ids=["usual", "tiny"])  # tiny tokens show the norms' epsilon
def test_logits_and_gradients_are_those_of_a_second_formulation(config, scale):
    """With gradients and in the fused kernel, in float64 and in float32."""
    model = build(config).double()
    for name, p in model.named_parameters():
        if name.startswith("transformer.embeddings.") and "hybrid_model" not in name:
            p.data *= scale
    state = {name: x.clone().requires_grad_() for name, x in model.state_dict().items()}
    x = images().double()
    expected = oracle.logits(state, x)
    logits, _ = model(x)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-11)
    weights = torch.randn(2, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for z in (logits, expected):
        (z * weights).sum().backward()
    for name, p in model.named_parameters():
        largest = state[name].grad.abs().max()
        if not name.endswith("key.bias"):  # softmax does not see what all keys have in common
            assert largest > 0, name
            assert (p.grad - state[name].grad).abs().max() <= 1e-9 * largest, name
    with torch.no_grad():
        torch.testing.assert_close(model(x)[0], expected, rtol=0, atol=1e-11)
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                logits, _ = model.float()(x.float())
            torch.testing.assert_close(logits.double(), expected, rtol=0, atol=2e-5 if scale == 1 else 1e-4)


@BOTH
@pytest.mark.parametrize("training", [False, True], ids=["no_grad", "grad"])
def test_vis_adds_probabilities_and_changes_no_logit(config, training):
    x = images()
    with torch.set_grad_enabled(training):
        expected, nothing = build(config).train(training)(x)
        logits, attn_weights = build(config, vis=True).train(training)(x)
    assert nothing == []
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
        _, attn_weights = model(images())
        block = model.transformer.encoder.layer[0]
        x = block.attention_norm(model.transformer.embeddings(images()))
        q, k = (linear(x).reshape(2, 10, 4, 8) for linear in (block.attn.query, block.attn.key))
        scores = torch.einsum("bqak,btak->baqt", q, k) / math.sqrt(8)
    torch.testing.assert_close(attn_weights[0], scores.softmax(dim=-1))


def test_with_labels_it_returns_the_mean_cross_entropy_in_float32():
    model, labels = build(), torch.tensor([0, 9, 3])
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        logits, _ = model.to(dtype)(images(3))
        loss = model(images(3), labels)
        assert (loss.shape, loss.dtype) == ((), torch.float32)
        expected = -sum(logits.double().log_softmax(dim=1)[i, label] for i, label in enumerate(labels)) / 3
        torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)


def test_images_of_a_batch_do_not_see_each_other():
    model = build(HYBRID)
    with torch.no_grad():
        batch, _ = model(images(3))
        alone = torch.cat([model(x[None])[0] for x in images(3)])
    torch.testing.assert_close(batch, alone, rtol=1e-4, atol=1e-5)


def test_patch_embedding_is_a_convolution():
    module = PatchEmbedding(3, PLAIN)
    nn.init.normal_(module.bias)
    for size in [(48, 48), (50, 63), (16, 33)]:
        x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
        expected = F.conv2d(x, module.weight, module.bias, stride=16).flatten(2).transpose(1, 2)
        torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-5)


def test_sizes_that_leave_a_remainder():
    """Pixels beyond the last whole patch are not seen, and the map of a hybrid is rounded up."""
    for img_size in (49, 63):
        x = images(img_size=img_size)
        torch.testing.assert_close(build(img_size=img_size)(x)[0], build(img_size=48)(x[:, :, :48, :48])[0])
    for img_size in (41, 47, 48):
        assert HYBRID.grid_size(img_size) == 6
        assert build(HYBRID, img_size=img_size)(images(img_size=img_size))[0].isfinite().all()


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
    x = images()
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
    x = images()
    with torch.no_grad():
        expected = embeddings(x)
        dropped = embeddings.train()(x.repeat(1000, 1, 1, 1)).unflatten(0, (1000, 2))
    torch.testing.assert_close(dropped.mean(dim=0), expected, rtol=0.25, atol=0.1)
    assert (dropped == 0).float().mean().item() == pytest.approx(0.3, abs=0.01)


@BOTH
@torch.no_grad()
def test_models_of_other_types_take_float32_images(config):
    expected, _ = build(config)(images())
    for dtype, tolerance in ((torch.bfloat16, 0.3), (torch.float64, 1e-4)):
        logits, _ = build(config).to(dtype)(images())
        assert logits.dtype == dtype
        torch.testing.assert_close(logits.float(), expected, rtol=0, atol=tolerance)


# ---- the first values ----


@BOTH
def test_a_new_model_starts_at_the_loss_of_guessing(config):
    loss = VisionTransformer(config, img_size=48, num_classes=10)(images(), torch.tensor([0, 9]))
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


# ---- fine-tuned weights ----


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
    with pytest.raises(UserError, match=r"trained|expected|not in") as e:
        model.load_finetuned(trained)
    assert [message for message in messages if message not in str(e.value)] == []
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_finetuned_weights_that_lack_a_part_or_contradict_themselves_are_refused_whole():
    positions = "transformer.embeddings.position_embeddings"
    model, state = VisionTransformer(PLAIN, img_size=48, num_classes=10), build().state_dict()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    for name in ("head.bias", "head.weight", positions):
        with pytest.raises(UserError, match=rf"{re.escape(name)}: expected \(.*\), not in the file"):
            model.load_finetuned({key: x for key, x in state.items() if key != name})
    for name, shapes in (("head.weight", [(9, 32), (10, 31)]), (positions, [(1, 10, 31), (10, 32), (10,)])):
        for shape in shapes:
            with pytest.raises(UserError, match=re.escape(name)):
                model.load_finetuned({**state, name: torch.zeros(shape)})
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize("img_size", [64, 100])
def test_the_size_named_for_hybrid_weights_is_one_that_loads_them(img_size):
    state = build(HYBRID, img_size=img_size).state_dict()
    with pytest.raises(UserError, match=r"give --img_size \d+$") as e:
        build(HYBRID).load_finetuned(state)
    build(HYBRID, img_size=int(str(e.value).split()[-1])).load_finetuned(state)
