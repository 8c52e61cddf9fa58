"""Synthetic checkpoints with the names and shapes of Google's files, from a seed.

Source: the published files (storage.googleapis.com/vit_models).  The layout is written out here a second
time, on purpose: a mistake in ``models/npz.py`` must not be able to hide in its own tests, so this module
must not import it.
"""

from __future__ import annotations

import os

import numpy as np

from models.configs import ViTConfig

#: What the blocks' parts are called in the files of newer Flax versions.
NEWER_NAMES = {
    "/LayerNorm_2/": "/LayerNorm_1/",
    "/MultiHeadDotProductAttention_1/": "/MultiHeadDotProductAttention_0/",
    "/MlpBlock_3/": "/MlpBlock_0/",
}


def shapes(
    config: ViTConfig, img_size: int, num_classes: int = 10, pre_logits: bool = False, flat_norms: bool = False
) -> dict[str, tuple[int, ...]]:
    """Every array's shape by its historical name, in a published file's order.

    Args:
        config: the architecture.
        img_size: side of the images the checkpoint was trained on, in pixels.
        num_classes: outputs of the head.
        pre_logits: add the extra layer of files pretrained on imagenet21k.
        flat_norms: group norms of shape (C,) instead of (1, 1, 1, C).
    """
    width = config.hidden_size
    head_size = width // config.num_heads
    out: dict[str, tuple[int, ...]] = {}

    def dense(name: str, *kernel: int, bias: tuple[int, ...] | None = None) -> None:
        out[f"{name}/kernel"] = kernel
        out[f"{name}/bias"] = (kernel[-1],) if bias is None else bias

    def norm(name: str, *shape: int) -> None:
        out[f"{name}/scale"] = out[f"{name}/bias"] = shape

    side, channels = img_size, 3
    if config.resnet_units is not None:
        ones = () if flat_norms else (1, 1, 1)
        channels = 64
        out["conv_root/kernel"] = (7, 7, 3, channels)
        norm("gn_root", *ones, channels)
        side = (side + 1) // 2  # the root's convolution
        side = (side + 1) // 2  # its pooling
        for stage, units in enumerate(config.resnet_units):
            if stage > 0:
                side = (side + 1) // 2
            narrow, wide = 64 << stage, 256 << stage
            for unit in range(units):
                name = f"block{stage + 1}/unit{unit + 1}"
                kernels = {1: (1, 1, channels, narrow), 2: (3, 3, narrow, narrow), 3: (1, 1, narrow, wide)}
                for i, kernel in kernels.items():
                    out[f"{name}/conv{i}/kernel"] = kernel
                    norm(f"{name}/gn{i}", *ones, kernel[-1])
                if unit == 0:
                    out[f"{name}/conv_proj/kernel"] = (1, 1, channels, wide)
                    norm(f"{name}/gn_proj", *ones, wide)
                channels = wide
    tokens = 1 + (side // config.patch_size) ** 2

    out["cls"] = (1, 1, width)
    out["Transformer/posembed_input/pos_embedding"] = (1, tokens, width)
    dense("embedding", config.patch_size, config.patch_size, channels, width)
    for i in range(config.num_layers):
        block = f"Transformer/encoderblock_{i}"
        norm(f"{block}/LayerNorm_0", width)
        norm(f"{block}/LayerNorm_2", width)
        for projection in ("query", "key", "value"):
            name = f"{block}/MultiHeadDotProductAttention_1/{projection}"
            dense(name, width, config.num_heads, head_size, bias=(config.num_heads, head_size))
        dense(f"{block}/MultiHeadDotProductAttention_1/out", config.num_heads, head_size, width)
        dense(f"{block}/MlpBlock_3/Dense_0", width, config.mlp_dim)
        dense(f"{block}/MlpBlock_3/Dense_1", config.mlp_dim, width)
    norm("Transformer/encoder_norm", width)
    if pre_logits:
        dense("pre_logits", width, width)
    dense("head", width, num_classes)
    # The files list nested dictionaries whose keys are sorted at every level.
    return {name: out[name] for name in sorted(out, key=lambda name: name.split("/"))}


def values(name: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """One array's float32 values, a function of these arguments only."""
    rng = np.random.default_rng([seed, *name.encode()])
    x = rng.standard_normal(shape, dtype=np.float32)
    *_, owner, leaf = ["", *name.split("/")]
    if leaf == "scale":
        return 1 + x / 8
    if leaf != "kernel":
        return x / 16
    if owner.startswith("conv"):
        # Weight standardisation takes each output channel's mean and spread away: give them some.
        return (x * rng.uniform(0.2, 2, shape[-1]) + rng.standard_normal(shape[-1])).astype(np.float32)
    inputs = shape[0] if owner in ("query", "key", "value") else np.prod(shape[:-1])
    return x / np.float32(inputs**0.5)


def arrays(
    config: ViTConfig,
    img_size: int = 32,
    num_classes: int = 10,
    *,
    pre_logits: bool = False,
    flat_norms: bool = False,
    newer_names: bool = False,
    prefix: str = "",
    dtype: type[np.generic] = np.float32,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """A whole checkpoint.

    Args:
        config, img_size, num_classes, pre_logits, flat_norms: as for ``shapes``.
        newer_names: number the blocks' parts as newer Flax versions do.
        prefix: goes before every name, such as "opt/target/".
        dtype: of every array.
        seed: of the values, which depend on the historical name and the shape beside it.
    """
    weights = {}
    for name, shape in shapes(config, img_size, num_classes, pre_logits, flat_norms).items():
        array = values(name, shape, seed).astype(dtype, copy=False)
        for historical, newer in NEWER_NAMES.items() if newer_names else ():
            name = name.replace(historical, newer)
        weights[prefix + name] = array
    return weights


def save(path: str | os.PathLike[str], weights: dict[str, np.ndarray]) -> str:
    """Writes arrays as an uncompressed .npz and returns its path."""
    path = os.fspath(path)
    with open(path, "wb") as file:  # a name would get .npz appended
        np.savez(file, **weights)
    return path
