"""A plain formulation of the reference script, as a first reading of the paper gives it, and no more.

A strided convolution cuts the patches, attention is matmul, softmax, matmul with query, key and value
apart, dropout is ``nn.Dropout``, every token goes through every block, the optimizer is
``torch.optim.SGD`` as it comes.  Written from the architecture's description (Dosovitskiy et al.,
arXiv 2010.11929, and the reference script as docs/deviations.md describes it); the names of
the parameters are those that checkpoints fix, so that the same weights go into both models.

This module must not import the models it is compared with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn


class Attention(nn.Module):
    """(B, T, D) -> (B, T, D)."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def heads(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        return x.view(batch, tokens, self.num_heads, width // self.num_heads).permute(0, 2, 1, 3)  # (B, A, T, K)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(self.query(x)), self.heads(self.key(x)), self.heads(self.value(x))
        scores = torch.matmul(q, k.transpose(-1, -2)) / q.shape[-1] ** 0.5  # (B, A, T, T)
        x = torch.matmul(torch.softmax(scores, dim=-1), v)  # (B, A, T, K)
        x = x.permute(0, 2, 1, 3).contiguous()
        return self.out(x.view(*x.shape[:2], -1))  # (B, T, D)


class Mlp(nn.Module):
    """Applied to every token."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.fc2(self.dropout(self.act(self.fc1(x)))))


class Block(nn.Module):
    """Attention and MLP, each behind a norm and around a shortcut."""

    def __init__(self, width: int, hidden: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, num_heads)
        self.ffn_norm = nn.LayerNorm(width, eps=1e-6)
        self.ffn = Mlp(width, hidden, dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.attention_norm(x))
        return x + self.ffn(self.ffn_norm(x))


class Embeddings(nn.Module):
    """(B, 3, H, W) -> (B, T, D)."""

    def __init__(self, num_patches: int, patch_size: int, width: int, dropout: float) -> None:
        super().__init__()
        self.patch_embeddings = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)
        self.position_embeddings = nn.Parameter(torch.zeros(1, 1 + num_patches, width))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patch_embeddings(x).flatten(2).transpose(1, 2)  # (B, P, D)
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), patches), dim=1)  # (B, T, D)
        return self.dropout(x + self.position_embeddings)


class Encoder(nn.Module):
    """(B, T, D) -> (B, T, D)."""

    def __init__(self, width: int, hidden: int, num_heads: int, num_layers: int, dropout: float) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Block(width, hidden, num_heads, dropout) for _ in range(num_layers))
        self.encoder_norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layer:
            x = block(x)
        return self.encoder_norm(x)


class Transformer(nn.Module):
    """(B, 3, H, W) -> (B, T, D)."""

    def __init__(self, embeddings: Embeddings, encoder: Encoder) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.encoder = encoder

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(self.embeddings(x))


class PlainViT(nn.Module):
    """Returns logits (B, num_classes) of images (B, 3, img_size, img_size); their mean loss, if labels are given."""

    def __init__(
        self, img_size: int, patch_size: int, width: int, hidden: int, num_heads: int, num_layers: int,
        num_classes: int, dropout: float,
    ) -> None:  # fmt: skip
        super().__init__()
        embeddings = Embeddings((img_size // patch_size) ** 2, patch_size, width, dropout)
        self.transformer = Transformer(embeddings, Encoder(width, hidden, num_heads, num_layers, dropout))
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        logits = self.head(self.transformer(x)[:, 0])
        return logits if labels is None else nn.CrossEntropyLoss()(logits, labels)

    @torch.no_grad()
    def load_from(self, weights: Mapping[str, np.ndarray]) -> None:
        """Copies a checkpoint in Google's layout, array by array; the head becomes zero."""
        embeddings, encoder = self.transformer.embeddings, self.transformer.encoder

        def copy(to: Tensor, name: str) -> None:
            x = torch.from_numpy(weights[name])
            if x.ndim == 4:
                x = x.permute(3, 2, 0, 1)  # (D, 3, patch, patch)
            elif name.endswith("kernel"):
                x = x.flatten(0, -2) if "/out/" in name else x.flatten(1)
                x = x.T  # (outputs, inputs)
            to.copy_(x.reshape(to.shape))

        def layer(to: nn.Linear | nn.Conv2d | nn.LayerNorm, name: str) -> None:
            copy(to.weight, f"{name}/{'scale' if isinstance(to, nn.LayerNorm) else 'kernel'}")
            copy(cast(Tensor, to.bias), f"{name}/bias")

        copy(embeddings.cls_token, "cls")
        copy(embeddings.position_embeddings, "Transformer/posembed_input/pos_embedding")
        layer(embeddings.patch_embeddings, "embedding")
        for i, block in enumerate(encoder.layer):
            assert isinstance(block, Block)
            name = f"Transformer/encoderblock_{i}"
            layer(block.attention_norm, f"{name}/LayerNorm_0")
            layer(block.ffn_norm, f"{name}/LayerNorm_2")
            for part in ("query", "key", "value", "out"):
                layer(getattr(block.attn, part), f"{name}/MultiHeadDotProductAttention_1/{part}")
            layer(block.ffn.fc1, f"{name}/MlpBlock_3/Dense_0")
            layer(block.ffn.fc2, f"{name}/MlpBlock_3/Dense_1")
        layer(encoder.encoder_norm, "Transformer/encoder_norm")
        self.head.weight.zero_()
        self.head.bias.zero_()
