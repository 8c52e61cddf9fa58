"""How much each known way of computing a Vision Transformer otherwise changes its logits.

    python -m benchmarks.deviations

Prints, for a random checkpoint in Google's layout, the largest difference of the logits from this
project's, relative to the largest logit: for erf instead of Flax's tanh GELU, and for what the
reference script does in the hybrid's stem.  The numbers stand in docs/deviations.md.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.agreement import NUM_CLASSES, random_checkpoint
from models import modeling_resnet
from models.configs import CONFIGS, ViTConfig
from models.modeling import VisionTransformer


def checkpoint(config: ViTConfig) -> dict[str, np.ndarray]:
    """A random checkpoint whose convolutions have channels of different means and spreads, as trained ones."""
    arrays = random_checkpoint(config)
    rng = np.random.default_rng(0)
    for name, x in arrays.items():
        if name.endswith("kernel") and name.startswith(("conv", "block")):
            shifted = x + 0.3 * x.std() * rng.standard_normal(x.shape[-1])
            arrays[name] = (shifted * (0.25 + 1.5 * rng.random(x.shape[-1]))).astype(np.float32)
    return arrays


def logits(config: ViTConfig, arrays: dict[str, np.ndarray]) -> Tensor:
    """(2, 1000) logits of two random pictures of 224 px."""
    model = VisionTransformer(config, 224, NUM_CLASSES).eval()
    model.load_from(arrays)
    x = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        return model(x)[0]


def symmetric_padding(x: Tensor, kernel: int, stride: int, value: float = 0.0) -> Tensor:
    """The reference's: both sides of a convolution alike, none before the pooling (which pads with -inf here)."""
    return x if value else F.pad(x, [(kernel - 1) // 2] * 4)


def sqrt_standardisation(self: modeling_resnet.StdConv2d, x: Tensor) -> Tensor:
    """The reference's: sqrt(var + eps) instead of std + eps."""
    var, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True, correction=0)
    w = (self.weight - mean) / torch.sqrt(var + 1e-5)
    return F.conv2d(modeling_resnet.pad_same(x, self.kernel_size[0], self.stride[0]), w, stride=self.stride)


@contextmanager
def a_group_per_channel() -> Iterator[None]:
    """The reference's norm of the shortcuts."""
    build = modeling_resnet.ResidualUnit.__init__

    def build_otherwise(self: modeling_resnet.ResidualUnit, *args: int) -> None:
        build(self, *args)
        if self.has_projection:
            self.gn_proj.num_groups, self.gn_proj.eps = self.gn_proj.num_channels, 1e-5

    with mock.patch.object(modeling_resnet.ResidualUnit, "__init__", build_otherwise):
        yield


def main() -> None:
    """Prints one line a deviation."""
    print(f"{platform.machine()}, torch {torch.__version__}, float32, 224 px")
    for model_type in ("ViT-B_32", "R50-ViT-B_16"):
        config = replace(CONFIGS[model_type], gelu="tanh")
        arrays = checkpoint(config)
        expected = logits(config, arrays)

        def show(what: str, got: Tensor, model_type: str = model_type, expected: Tensor = expected) -> None:
            print(f"{model_type}, {what}: {((got - expected).abs().max() / expected.abs().max()).item():.1e}")

        show("erf GELU", logits(replace(config, gelu="erf"), arrays))
        if config.resnet_units is None:
            continue
        changes: dict[str, Callable] = {
            "symmetric padding": lambda: mock.patch.object(modeling_resnet, "pad_same", symmetric_padding),
            "sqrt(var + eps)": lambda: mock.patch.object(modeling_resnet.StdConv2d, "forward", sqrt_standardisation),
            "gn_proj of a group per channel": a_group_per_channel,
        }
        for what, change in changes.items():
            with change():
                show(what, logits(config, arrays))


if __name__ == "__main__":
    main()
