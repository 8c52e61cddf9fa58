"""The matrix products of a model: the shapes of its layers, and how often each is computed for an image.

This module must not compute anything: it looks at modules that have no memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from models.configs import ViTConfig
from models.modeling import VisionTransformer
from models.modeling_resnet import ResidualUnit, ResNetV2, StdConv2d


def layer_shapes(config: ViTConfig, img_size: int) -> Counter[tuple[tuple[int, ...], int]]:
    """Returns how many positions of an image each kind of layer computes, by the shape of its weight and its stride.

    A linear layer's weight is (outputs, inputs), its positions are tokens; a convolution's is (outputs, inputs,
    height, width), its positions are pixels of its output.  The head, for the class token alone, is left out.
    """
    with torch.device("meta"):
        model = VisionTransformer(replace(config, num_layers=1), img_size, 1).transformer
    num_patches = config.grid_size(img_size) ** 2
    found: Counter[tuple[tuple[int, ...], int]] = Counter()
    stem, patches = model.embeddings.hybrid_model, model.embeddings.patch_embeddings
    for conv, size in [] if stem is None else _convolutions(stem, img_size):
        found[tuple(conv.weight.shape), conv.stride[0]] += size**2
    found[tuple(patches.weight.flatten(1).shape), 1] += num_patches  # as ``PatchEmbedding`` computes it
    for module in model.encoder.modules():
        if isinstance(module, nn.Linear):
            found[tuple(module.weight.shape), 1] += (num_patches + 1) * config.num_layers
    return found


def _convolutions(stem: ResNetV2, img_size: int) -> Iterator[tuple[StdConv2d, int]]:
    """Returns a stem's convolutions, each with the side of the map that it gives."""
    size = -(-img_size // 2)
    yield stem.root.conv, size
    size = -(-size // 2)  # the root's pooling
    for unit in stem.modules():
        if isinstance(unit, ResidualUnit):
            yield unit.conv1, size
            size = -(-size // unit.conv2.stride[0])
            yield from ((conv, size) for conv in unit.children() if isinstance(conv, StdConv2d) and conv != unit.conv1)
