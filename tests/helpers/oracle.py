"""A second formulation of the models, plain and differentiable: functions of a state_dict with the reference's keys.

Sources: the papers' formulas; padding and epsilons as in Google's code (vit_jax/models_vit.py,
models_resnet.py).  It computes in the type of its weights, float64 in the tests, and must not import
``models``: a mistake there must not be able to hide here.  Shapes as in models/modeling.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

State = Mapping[str, Tensor]
EMBEDDINGS = "transformer.embeddings."
STEM = EMBEDDINGS + "hybrid_model."


def logits(state: State, x: Tensor, num_heads: int = 4) -> Tensor:
    """(B, classes) logits of images (B, 3, H, W), with erf GELU and without dropout."""
    if any(name.startswith(STEM) for name in state):
        x = stem(state, x)
    kernel = state[EMBEDDINGS + "patch_embeddings.weight"]
    x = F.conv2d(x, kernel, state[EMBEDDINGS + "patch_embeddings.bias"], stride=kernel.shape[-1])
    x = torch.stack([x[:, :, i, j] for i in range(x.shape[2]) for j in range(x.shape[3])], dim=1)  # (B, P, D)
    x = torch.cat([torch.stack([state[EMBEDDINGS + "cls_token"][0]] * len(x)), x], dim=1)
    x = x + state[EMBEDDINGS + "position_embeddings"]
    depth = sum(name.endswith(".ffn.fc1.weight") for name in state)
    for i in range(depth):
        layer = f"transformer.encoder.layer.{i}."
        x = x + attention(state, layer + "attn.", layer_norm(state, layer + "attention_norm", x), num_heads)
        y = linear(state, layer + "ffn.fc1", layer_norm(state, layer + "ffn_norm", x))
        y = y * (1 + torch.erf(y / math.sqrt(2))) / 2
        x = x + linear(state, layer + "ffn.fc2", y)
    return linear(state, "head", layer_norm(state, "transformer.encoder.encoder_norm", x)[:, 0])


def loss(state: State, x: Tensor, labels: Tensor, num_heads: int = 4) -> Tensor:
    """Mean cross-entropy."""
    z = logits(state, x, num_heads)
    return (torch.logsumexp(z, dim=1) - z[torch.arange(len(z)), labels]).mean()


def linear(state: State, name: str, x: Tensor) -> Tensor:
    return torch.einsum("...i,oi->...o", x, state[f"{name}.weight"]) + state[f"{name}.bias"]


def layer_norm(state: State, name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    scaled = centred / torch.sqrt((centred**2).mean(dim=-1, keepdim=True) + 1e-6)
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


def attention(state: State, name: str, x: Tensor, num_heads: int) -> Tensor:
    size = x.shape[-1] // num_heads
    parts = (linear(state, name + part, x) for part in ("query", "key", "value"))
    q, k, v = (part.reshape(*x.shape[:2], num_heads, size) for part in parts)
    scores = torch.einsum("bqak,btak->baqt", q, k) / math.sqrt(size)
    scores = torch.exp(scores - scores.detach().amax(dim=-1, keepdim=True))
    mixed = torch.einsum("baqt,btak->bqak", scores / scores.sum(dim=-1, keepdim=True), v)
    return linear(state, name + "out", mixed.reshape(x.shape))


def root(state: State, x: Tensor) -> Tensor:
    """The first convolution and the pooling of the stem."""
    x = torch.relu(group_norm(state, STEM + "root.gn", conv(state, STEM + "root.conv", x, 2)))
    rows, cols = (-(-side // 2) for side in x.shape[2:])
    x = F.unfold(same(x, 3, 2, -math.inf).flatten(0, 1)[:, None], 3, stride=2).amax(dim=1).unflatten(0, x.shape[:2])
    return x.unflatten(-1, (rows, cols))


def stem(state: State, x: Tensor) -> Tensor:
    """The hybrid's feature map."""
    x = root(state, x)
    block = 1
    while f"{STEM}body.block{block}.unit1.conv1.weight" in state:
        unit = 1
        while f"{STEM}body.block{block}.unit{unit}.conv1.weight" in state:
            x = residual_unit(state, f"{STEM}body.block{block}.unit{unit}.", x, 2 if block > 1 and unit == 1 else 1)
            unit += 1
        block += 1
    return x


def residual_unit(state: State, name: str, x: Tensor, stride: int) -> Tensor:
    shortcut = x
    if f"{name}downsample.weight" in state:
        shortcut = group_norm(state, name + "gn_proj", conv(state, name + "downsample", x, stride))
    x = torch.relu(group_norm(state, name + "gn1", conv(state, name + "conv1", x)))
    x = torch.relu(group_norm(state, name + "gn2", conv(state, name + "conv2", x, stride)))
    return torch.relu(shortcut + group_norm(state, name + "gn3", conv(state, name + "conv3", x)))


def conv(state: State, name: str, x: Tensor, stride: int = 1) -> Tensor:
    """A 'SAME' convolution with the kernel of every output less its mean and over its deviation plus 1e-5."""
    kernel = state[f"{name}.weight"]
    centred = kernel - kernel.mean(dim=(1, 2, 3), keepdim=True)
    deviation = torch.sqrt((centred**2).mean(dim=(1, 2, 3), keepdim=True))
    return F.conv2d(same(x, kernel.shape[-1], stride, 0.0), centred / (deviation + 1e-5), stride=stride)


def same(x: Tensor, kernel: int, stride: int, value: float) -> Tensor:
    """TensorFlow's 'SAME': ceil(size / stride) outputs, the odd line of padding last."""
    edges: list[int] = []
    for size in (x.shape[3], x.shape[2]):
        missing = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
        edges += [missing // 2, missing - missing // 2]
    return F.pad(x, edges, value=value)


def group_norm(state: State, name: str, x: Tensor) -> Tensor:
    """32 groups of neighbouring channels, epsilon 1e-6."""
    groups = x.unflatten(1, (32, -1))
    centred = groups - groups.mean(dim=(2, 3, 4), keepdim=True)
    scaled = centred / torch.sqrt((centred**2).mean(dim=(2, 3, 4), keepdim=True) + 1e-6)
    weight, bias = (state[f"{name}.{leaf}"][:, None, None] for leaf in ("weight", "bias"))
    return scaled.flatten(1, 2) * weight + bias
