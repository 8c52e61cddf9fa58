"""Shapes of the Vision Transformers that can be fine-tuned, by ``--model_type`` name.

Sources: Dosovitskiy et al., "An Image is Worth 16x16 Words" (arXiv 2010.11929), table 1, and
github.com/google-research/vision_transformer (``vit_jax/configs/models.py``).

This module only describes: it must not import torch, read files or build anything.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from utils.errors import UserError


@dataclass(frozen=True)
class ViTConfig:
    """One architecture.  Change a field with ``dataclasses.replace``.

    Attributes:
        patch_size: side of a patch, in pixels (in feature-map cells for hybrids).
        hidden_size: D, the width of a token.
        mlp_dim: width of the hidden layer of each MLP.
        num_heads: A, attention heads; the head size is K = D / A.
        num_layers: encoder blocks.
        dropout_rate: after the position embeddings and twice in each MLP.
        attention_dropout_rate: on the attention probabilities and after the output projection.
        resnet_units: residual units in each stage of the convolutional stem of a hybrid, ``()`` for
            a stem that is only the root, None for a plain model.
        gelu: "erf" (exact, as the reference PyTorch script) or "tanh" (as Flax).
    """

    patch_size: int
    hidden_size: int
    mlp_dim: int
    num_heads: int
    num_layers: int
    dropout_rate: float = 0.1
    attention_dropout_rate: float = 0.0
    resnet_units: tuple[int, ...] | None = None
    gelu: str = "erf"

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise UserError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if self.gelu not in ("erf", "tanh"):
            raise UserError(f"gelu is {self.gelu!r}, expected 'erf' or 'tanh'")

    @property
    def stride(self) -> int:
        """Pixels per token along one side of the image."""
        return self.patch_size * 2**self._num_halvings

    @property
    def _num_halvings(self) -> int:
        """Number of times that the stem halves the image: twice in the root, once in each stage after the first."""
        return 0 if self.resnet_units is None else 2 + max(len(self.resnet_units) - 1, 0)

    def map_size(self, img_size: int) -> int:
        """Side of the map that is cut into patches: the image or, in a hybrid, the stem's feature map."""
        for _ in range(self._num_halvings):
            img_size = -(-img_size // 2)  # stride 2 with 'SAME' padding rounds up
        return img_size

    def grid_size(self, img_size: int) -> int:
        """Tokens along one side of a square image of ``img_size`` pixels."""
        return self.map_size(img_size) // self.patch_size

    def size_of(self, num_tokens: int) -> int:
        """Side in pixels of the square images that give so many tokens, the class token among them."""
        return round((num_tokens - 1) ** 0.5) * self.stride

    def check_img_size(self, img_size: int) -> None:
        """Raises UserError unless images of ``img_size`` pixels divide into whole patches."""
        if self.grid_size(img_size) < 1 or self.map_size(img_size) % self.patch_size:
            below = max(img_size // self.stride, 1) * self.stride
            raise UserError(
                f"--img_size {img_size} is not a multiple of the {self.stride} pixels of a patch; "
                f"the nearest that are: {below} and {below + self.stride}"
            )


_TINY = ViTConfig(patch_size=16, hidden_size=192, mlp_dim=768, num_heads=3, num_layers=12, dropout_rate=0.0)
_SMALL = ViTConfig(patch_size=16, hidden_size=384, mlp_dim=1536, num_heads=6, num_layers=12, dropout_rate=0.0)
_BASE = ViTConfig(patch_size=16, hidden_size=768, mlp_dim=3072, num_heads=12, num_layers=12)
_LARGE = ViTConfig(patch_size=16, hidden_size=1024, mlp_dim=4096, num_heads=16, num_layers=24)
_TESTING = ViTConfig(patch_size=16, hidden_size=32, mlp_dim=64, num_heads=4, num_layers=2)

DEMO = "ViT-demo"

# Dropout rates: 0.1 for the reference script's models, as there; Google's for the others.
_MODELS: dict[str, ViTConfig] = {
    "ViT-B_16": _BASE,
    "ViT-B_32": replace(_BASE, patch_size=32),
    "ViT-L_16": _LARGE,
    "ViT-L_32": replace(_LARGE, patch_size=32),
    "ViT-H_14": ViTConfig(patch_size=14, hidden_size=1280, mlp_dim=5120, num_heads=16, num_layers=32),
    "R50-ViT-B_16": replace(_BASE, patch_size=1, resnet_units=(3, 4, 9)),
    # The AugReg family (Steiner et al., arXiv 2106.10270).
    "ViT-Ti_16": _TINY,
    "ViT-S_16": _SMALL,
    "ViT-S_32": replace(_SMALL, patch_size=32),
    "ViT-B_8": replace(_BASE, patch_size=8, dropout_rate=0.0),
    "R-ViT-Ti_16": replace(_TINY, patch_size=8, resnet_units=()),
    "R26-ViT-S_32": replace(_SMALL, patch_size=1, resnet_units=(2, 2, 2, 2)),
    "R26-ViT-B_32": replace(_BASE, patch_size=1, resnet_units=(2, 2, 2, 2), dropout_rate=0.0),
    "R50-ViT-L_32": replace(_LARGE, patch_size=1, resnet_units=(3, 4, 6, 3)),
    # DINOv2's small shape.  Its pretrained weights never saw dropout, and short trainings lose points by it.
    "ViT-S_14": replace(_SMALL, patch_size=14),
    # Small enough to learn on a laptop; checkpoint/ViT-demo.npz holds it pretrained.
    DEMO: ViTConfig(patch_size=8, hidden_size=128, mlp_dim=512, num_heads=4, num_layers=4, dropout_rate=0.0),
    # Small enough for unit tests.
    "testing": _TESTING,
    "testing-hybrid": replace(_TESTING, patch_size=1, resnet_units=(1, 2)),
}

# Google's code names the architectures so; published.py has the names of the files, from which these do not follow.
#: Google's name of a model whose name here differs: its files are found under both.
GOOGLE_NAMES: dict[str, str] = {
    "R50-ViT-B_16": "R50+ViT-B_16",
    "R-ViT-Ti_16": "R+ViT-Ti_16",
    "R26-ViT-S_32": "R26+ViT-S_32",
    "R26-ViT-B_32": "R26+ViT-B_32",
    "R50-ViT-L_32": "R50+ViT-L_32",
}
#: What AugReg's files begin with and Google's ``config.model_or_filename`` takes (its ``AUGREG_CONFIGS``).
_AUGREG_NAMES: dict[str, str] = {
    "ViT-Ti_16": "Ti_16",
    "ViT-S_16": "S_16",
    "ViT-S_32": "S_32",
    "ViT-B_8": "B_8",
    "ViT-B_16": "B_16",
    "ViT-B_32": "B_32",
    "ViT-L_16": "L_16",
    "R-ViT-Ti_16": "R_Ti_16",
    "R26-ViT-S_32": "R26_S_32",
    "R26-ViT-B_32": "R26_B_32",
    "R50-ViT-L_32": "R50_L_32",
}
_ALIASES = {alias: name for names in (GOOGLE_NAMES, _AUGREG_NAMES) for name, alias in names.items()}

#: The architectures by ``--model_type``: this project's names and Google's.
CONFIGS: dict[str, ViTConfig] = _MODELS | {alias: _MODELS[name] for alias, name in _ALIASES.items()}


def canonical_name(model_type: str) -> str:
    """Returns this project's name of a model that may be called by one of Google's."""
    return _ALIASES.get(model_type, model_type)


def make_config(model_type: str, img_size: int, gelu: str, dropout_rate: float | None = None) -> ViTConfig:
    """Returns a model's architecture with a training's choices.

    Args:
        model_type: one of ``CONFIGS``.
        img_size: side of the images, in pixels.
        gelu: erf or tanh.
        dropout_rate: None for the model's own.

    Raises:
        UserError: images of that size do not fit the model.
    """
    config = replace(CONFIGS[model_type], gelu=gelu)
    if dropout_rate is not None:
        config = replace(config, dropout_rate=dropout_rate)
    config.check_img_size(img_size)
    return config
