"""The Vision Transformer, with the reference script's parameter names and Google's numbers.

Source: Dosovitskiy et al., arXiv 2010.11929; github.com/google-research/vision_transformer,
``vit_jax/models_vit.py``.  How a forward pass computes is free; the state_dict keys are not: people
have checkpoints with them.

Shapes, here and in every comment below:
    B batch, T tokens = 1 + P patches, D width, A heads, K = D / A head size; images (B, 3, H, W)

This module must not read files, know data sets or know how it is trained.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import npz as google
from models.configs import CONFIGS, ViTConfig
from models.cpu_ops import attention_scores, cast_for_matmul, dropout
from models.modeling_resnet import ResNetV2
from models.recompute import Recomputed
from utils.errors import UserError

__all__ = ["CONFIGS", "VisionTransformer"]

logger = logging.getLogger(__name__)

LAYER_NORM_EPS = 1e-6


def joined_linear(x: Tensor, *layers: nn.Linear) -> Sequence[Tensor]:
    """Returns what layers of equal size make of the same input, from one product."""
    weight, bias = torch.cat([layer.weight for layer in layers]), torch.cat([layer.bias for layer in layers])
    return F.linear(x, weight, bias).chunk(len(layers), dim=-1)


class Attention(nn.Module):
    """Multi-head self-attention.  (B, T, D) -> (B, T, D) and, if ``vis``, probabilities (B, A, T, T).

    Attributes:
        joined: one product computes the queries, keys and values; None: in trainings on CUDA, where that launches
            fewer kernels.  On CPUs it is no faster, and an evaluation would join the weights for every batch.
    """

    joined: bool | None = None

    def __init__(self, config: ViTConfig, vis: bool) -> None:
        super().__init__()
        d = config.hidden_size
        self.vis = vis
        self.num_heads = config.num_heads
        self.dropout_rate = config.attention_dropout_rate
        self.query = nn.Linear(d, d)
        self.key = nn.Linear(d, d)
        self.value = nn.Linear(d, d)
        self.out = nn.Linear(d, d)

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, A, T, K)

    def _project(self, x: Tensor, num_queries: int | None) -> Sequence[Tensor]:
        """Returns queries (B, num_queries or T, D), keys and values (B, T, D)."""
        joined = x.is_cuda and torch.is_grad_enabled() if self.joined is None else self.joined
        if not joined:
            return self.query(x[:, :num_queries]), self.key(x), self.value(x)
        if num_queries is None:
            return joined_linear(x, self.query, self.key, self.value)
        return self.query(x[:, :num_queries]), *joined_linear(x, self.key, self.value)

    def forward(self, x: Tensor, num_queries: int | None = None) -> tuple[Tensor, Tensor | None]:
        x = cast_for_matmul(x)
        q, k, v = map(self._split_heads, self._project(x, num_queries))  # (B, A, num_queries or T, K), (B, A, T, K)
        probs = None
        if self.vis or (x.device.type == "cpu" and torch.is_grad_enabled()):
            # The fused kernel returns no probabilities; on CPUs its backward is slower than this.
            probs = attention_scores(q, k).softmax(dim=-1)
            x = dropout(probs, self.dropout_rate, self.training).to(v.dtype) @ v  # (B, A, T, K)
        else:
            rate = self.dropout_rate if self.training else 0.0
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=rate)  # (B, A, T, K)
        x = self.out(x.transpose(1, 2).flatten(2))  # (B, T, D)
        return dropout(x, self.dropout_rate, self.training), probs if self.vis else None


class Mlp(nn.Module):
    """Two layers with GELU between, applied to every token."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.dropout_rate = config.dropout_rate
        self.approximate = "tanh" if config.gelu == "tanh" else "none"
        self.fc1 = nn.Linear(config.hidden_size, config.mlp_dim)
        self.fc2 = nn.Linear(config.mlp_dim, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.fc1(x), approximate=self.approximate)
        x = dropout(x, self.dropout_rate, self.training)
        return dropout(self.fc2(x), self.dropout_rate, self.training)


class Block(nn.Module):
    """Pre-norm encoder block: attention and MLP, each around a shortcut.

    With ``num_queries`` only the first tokens are computed, each of which still attends to all.
    """

    def __init__(self, config: ViTConfig, vis: bool) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=LAYER_NORM_EPS)
        self.ffn_norm = nn.LayerNorm(config.hidden_size, eps=LAYER_NORM_EPS)
        self.ffn = Mlp(config)
        self.attn = Attention(config, vis)

    def forward(self, x: Tensor, num_queries: int | None = None) -> tuple[Tensor, Tensor | None]:
        h, probs = self.attn(self.attention_norm(x), num_queries)
        x = x[:, :num_queries] + h
        x = x + self.ffn(self.ffn_norm(x))
        return x, probs


class Encoder(Recomputed):
    """All blocks and the final norm.  (B, T, D) -> (B, T, D) and the blocks' probabilities.

    With ``class_only`` the result is (B, 1, D), the class token alone: the last block leaves out the
    other tokens, which are most of its work.
    """

    def __init__(self, config: ViTConfig, vis: bool) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Block(config, vis) for _ in range(config.num_layers))
        self.encoder_norm = nn.LayerNorm(config.hidden_size, eps=LAYER_NORM_EPS)

    def forward(self, x: Tensor, class_only: bool = False) -> tuple[Tensor, list[Tensor]]:
        attn_weights = []
        for block in self.layer:
            x, probs = self.compute(block, x, 1 if class_only and block is self.layer[-1] else None)
            if probs is not None:
                attn_weights.append(probs)
        return self.encoder_norm(x), attn_weights


class PatchEmbedding(nn.Conv2d):
    """A convolution whose stride is its kernel, computed as one matrix product.

    Each pixel belongs to one patch, so cutting and multiplying gives the same numbers; the backward of
    the strided convolution costs several times more on CPUs.
    """

    def __init__(self, in_channels: int, config: ViTConfig) -> None:
        super().__init__(in_channels, config.hidden_size, config.patch_size, stride=config.patch_size)

    bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        p, x = self.kernel_size[0], cast_for_matmul(x)
        rows, cols = x.shape[2] // p, x.shape[3] // p  # the remainder is left out ('VALID')
        x = x[:, :, : rows * p, : cols * p].unflatten(3, (cols, p)).unflatten(2, (rows, p))  # (B, C, rows, p, cols, p)
        x = x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, P, C * p * p)
        return F.linear(x, self.weight.flatten(1), self.bias)  # (B, P, D)


class Embeddings(nn.Module):
    """Images to tokens: (hybrid stem,) patches, class token, position embeddings."""

    def __init__(self, config: ViTConfig, img_size: int) -> None:
        super().__init__()
        self.dropout_rate = config.dropout_rate
        self.hybrid_model = None if config.resnet_units is None else ResNetV2(config.resnet_units)
        in_channels = 3 if self.hybrid_model is None else self.hybrid_model.out_channels
        num_tokens = 1 + config.grid_size(img_size) ** 2
        self.patch_embeddings = PatchEmbedding(in_channels, config)
        self.position_embeddings = nn.Parameter(torch.zeros(1, num_tokens, config.hidden_size))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.cls_token.dtype)  # half precision from here on, if the weights are
        if self.hybrid_model is not None:
            x = self.hybrid_model(x)  # (B, C, H / stride, W / stride)
        x = self.patch_embeddings(x)  # (B, P, D)
        x = torch.cat((self.cls_token.to(x.dtype).expand(x.shape[0], -1, -1), x), dim=1)  # (B, T, D)
        x = x + self.position_embeddings
        return dropout(x, self.dropout_rate, self.training)


class Transformer(nn.Module):
    """Images to encoded tokens."""

    def __init__(self, config: ViTConfig, img_size: int, vis: bool) -> None:
        super().__init__()
        self.embeddings = Embeddings(config, img_size)
        self.encoder = Encoder(config, vis)

    def forward(self, x: Tensor, class_only: bool = False) -> tuple[Tensor, list[Tensor]]:
        return self.encoder(self.embeddings(x), class_only)


class VisionTransformer(nn.Module):
    """A Vision Transformer with a linear classifier on the class token.

    Args:
        config: the architecture, one of ``CONFIGS``.
        img_size: side of the images, in pixels.
        num_classes: outputs of the head.
        zero_head: for fine-tuning: ``load_from`` sets the head to zero instead of loading it.
        vis: return every block's attention probabilities.
    """

    def __init__(
        self,
        config: ViTConfig,
        img_size: int = 224,
        num_classes: int = 21843,
        zero_head: bool = False,
        vis: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.img_size = img_size
        self.num_classes = num_classes
        self.zero_head = zero_head
        self.vis = vis
        self.transformer = Transformer(config, img_size, vis)
        self.head = nn.Linear(config.hidden_size, num_classes)
        if not self.head.weight.is_meta:
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Sets Google's initial values, drawn from torch's global generator."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.normal_(module.bias, std=1e-6 if ".ffn." in name else 0.0)
            elif isinstance(module, PatchEmbedding):
                nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)  # lecun_normal
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.transformer.embeddings.position_embeddings, std=0.02)
        # A head of zeros, as Google's; so the first loss is log(num_classes) whatever the data.
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> tuple[Tensor, list[Tensor]] | Tensor:
        """Classifies images.

        Args:
            x: images (B, 3, H, W) in [-1, 1].
            labels: class indices (B,).

        Returns:
            The mean cross-entropy if labels are given, else logits (B, num_classes) and, for
            ``vis=True``, one (B, A, T, T) tensor of attention probabilities per block.
        """
        x, attn_weights = self.transformer(x, class_only=not self.vis)
        logits = self.head(x[:, 0])
        if labels is not None:
            return F.cross_entropy(logits.float(), labels)
        return logits, attn_weights

    def gradient_checkpointing_enable(self) -> None:
        """Lets a training need less memory: blocks, and the stem's units, are computed again in the backward pass."""
        for module in self.modules():
            if isinstance(module, Recomputed):
                module.gradient_checkpointing = True

    def load_from(self, weights: Mapping[str, np.ndarray]) -> None:
        """Loads a checkpoint in Google's layout: all of it, or nothing.

        A model made under ``torch.device("meta")``, quickly since without memory, has its weights afterwards.

        Args:
            weights: arrays by Google's names, such as ``np.load(path)`` returns; what ``npz.match`` returned is
                not checked again.

        Raises:
            UserError: an array is missing, or has another shape than this model's; the message
                names what was expected and what was found.
        """
        state = google.to_state_dict(weights, self.config, self.img_size, None if self.zero_head else self.num_classes)
        if self.zero_head:
            state |= {f"head.{name}": torch.zeros(p.shape) for name, p in self.head.named_parameters()}
        self.load_state_dict(state, assign=self.head.weight.is_meta)

    def load_exactly(self, weights: Mapping[str, np.ndarray]) -> None:
        """Loads fine-tuned weights in Google's layout of exactly this model, its head and size of images included.

        Args:
            weights: as for ``load_from``.

        Raises:
            UserError: as ``load_from``; or they have no head, or are for another number of classes or size of images.
        """
        num_classes = google.num_classes(weights)
        if num_classes is None:
            raise UserError("it has no head: it was pretrained, not fine-tuned; train it first with --pretrained_dir")
        matched = google.match(weights, self.config, num_classes)
        self._check_sizes(num_classes, matched[google.POSITIONS].shape[1])
        self.load_from(matched)

    def _check_sizes(self, num_classes: int, num_tokens: int) -> None:
        """Raises UserError unless the model has so many classes and position embeddings."""
        if num_classes != self.num_classes:
            raise UserError(f"it was trained for {num_classes} classes, the data set has {self.num_classes}")
        if num_tokens != self.transformer.embeddings.position_embeddings.shape[1]:
            trained_for = self.config.size_of(num_tokens)
            raise UserError(
                f"it was trained at --img_size {trained_for}, not {self.img_size}; give --img_size {trained_for}"
            )

    def load_finetuned(self, state: Mapping[str, Tensor]) -> None:
        """Loads a state_dict of exactly this model: all of it, or nothing; "meta" as for ``load_from``.

        Args:
            state: as ``state_dict()`` returns it, of any float type.

        Raises:
            UserError: it is another model's, or for another number of classes or size of images;
                the message names what was expected and what was found.
        """
        own = self.state_dict()
        positions, head = "transformer.embeddings.position_embeddings", "head.bias"
        misfits = {
            name: f"{name}: expected {tuple(x.shape)}, found {tuple(state[name].shape)}"
            for name, x in own.items()
            if name in state and x.shape != state[name].shape
        }
        later = [head, "head.weight"]  # these may differ for reasons of their own, reported below
        if positions in state and state[positions].ndim == 3:
            later.append(positions)
        wrong = [misfit for name, misfit in misfits.items() if name not in later]
        wrong += [f"{name}: expected {tuple(x.shape)}, not in the file" for name, x in own.items() if name not in state]
        wrong += [f"{name}: not in this model" for name in state if name not in own]
        if wrong:
            raise UserError(google.first_faults(wrong))
        self._check_sizes(state[head].numel(), state[positions].shape[1])
        if misfits:
            raise UserError("; ".join(misfits.values()))
        self.load_state_dict({name: x.float() for name, x in state.items()}, assign=self.head.weight.is_meta)
