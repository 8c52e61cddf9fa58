"""Agreement of the models with timm's, and their cost.

    python -m benchmarks.once.agreement [--models ViT-B_32 ...]

For every model that Google publishes: parameters, GFLOPs of one image, and the largest difference of
the logits from timm's, relative to the largest logit, both models loaded from the same random
checkpoint in Google's layout.  Where timm departs from Google's code (position embeddings, and in the
hybrids weight standardisation and the norms' epsilon) it is put right first.  Prints the table of
docs/results.md; needs timm.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import zlib
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import hardware
from models import npz
from models.configs import CONFIGS, ViTConfig
from models.modeling import VisionTransformer
from models.published import PUBLISHED
from utils.weights import read_npz

NUM_CLASSES = 1000
DTYPES = (torch.float32, torch.float64)


def random_checkpoint(config: ViTConfig, img_size: int = 224, num_classes: int = NUM_CLASSES) -> dict[str, np.ndarray]:
    """Returns arrays in Google's layout whose sizes keep activations near 1, from a fixed seed."""
    arrays = {}
    for entry in npz.layout(config, img_size, num_classes):
        x = np.random.default_rng(zlib.crc32(entry.google.encode())).standard_normal(entry.shape, np.float32)
        if entry.google.endswith("kernel"):
            x *= int(np.prod(entry.ours_shape[1:])) ** -0.5
        else:
            x = 0.02 * x + entry.google.endswith("scale")
        arrays[entry.google] = x.astype(np.float32)
    return arrays


def cost(config: ViTConfig) -> tuple[int, float]:
    """Returns the parameters with 1000 classes at 224 px, and the GFLOPs of one image (a multiply-add is two)."""
    with torch.device("meta"):
        model = VisionTransformer(config, 224, NUM_CLASSES).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            # All tokens go through the last block, as other counts have it.
            model.head(model.transformer(torch.empty(1, 3, 224, 224))[0][:, 0])
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() / 1e9


#: timm's models with the stems of the hybrids.
TIMM_HYBRIDS = {
    (3, 4, 9): "vit_base_r50_s16_224",
    (): "vit_tiny_r_s16_p8_224",
    (2, 2, 2, 2): "vit_small_r26_s32_224",
    (3, 4, 6, 3): "vit_large_r50_s32_224",
}


def timm_model(config: ViTConfig, img_size: int, num_classes: int) -> Any:
    """Returns timm's model of this shape, its initial values left out; what is not loaded afterwards shows as NaN."""
    import timm.models

    with torch.device("meta"):
        if config.resnet_units is not None:
            name = TIMM_HYBRIDS[config.resnet_units]
            model = timm.create_model(
                name,
                img_size=img_size,
                embed_dim=config.hidden_size,
                depth=config.num_layers,
                num_heads=config.num_heads,
                num_classes=num_classes,
            )
            # timm's epsilon is 1e-5, Google's 1e-6.
            for module in model.modules():
                if isinstance(module, nn.GroupNorm):
                    module.eps = 1e-6
        else:
            model = timm.models.VisionTransformer(
                img_size=img_size,
                patch_size=config.patch_size,
                embed_dim=config.hidden_size,
                depth=config.num_layers,
                num_heads=config.num_heads,
                mlp_ratio=config.mlp_dim / config.hidden_size,
                num_classes=num_classes,
            )
    model = model.to_empty(device="cpu").eval()
    for p in model.parameters():
        p.data.fill_(torch.nan)
    return model


def standardised_as_google(self: Any, x: Tensor) -> Tensor:
    """Computes timm's StdConv2dSame with (w - mean) / (std + 1e-5), where timm has sqrt(var + eps)."""
    from timm.layers import pad_same

    std, mean = torch.std_mean(self.weight, dim=(1, 2, 3), keepdim=True, correction=0)
    padding = 0 if self.same_pad else self.padding
    x = pad_same(x, self.kernel_size, self.stride, self.dilation) if self.same_pad else x
    return F.conv2d(x, (self.weight - mean) / (std + 1e-5), None, self.stride, padding)


def timm_logits(path: str, config: ViTConfig, img_size: int, num_classes: int, x: Tensor) -> Tensor:
    """Returns the logits of timm's model with a checkpoint in Google's layout, its known deviations put right.

    Args:
        path: the .npz file.
        config: the architecture.
        img_size: side of the images in pixels.
        num_classes: outputs of the head; 0 for the class token after the last norm.
        x: images (B, 3, img_size, img_size), in the number format to compute in.
    """
    from timm.layers import StdConv2dSame

    model = timm_model(config, img_size, num_classes)
    grid = config.grid_size(img_size)
    with torch.no_grad(), mock.patch.object(StdConv2dSame, "forward", standardised_as_google):
        model.load_pretrained(path)
        # timm resizes position embeddings with the grids' edges aligned, Google with their corners.
        positions = torch.from_numpy(read_npz(path)[npz.POSITIONS].astype(np.float32))  # (1, 1 + n * n, D)
        old = round((positions.shape[1] - 1) ** 0.5)
        square = positions[:, 1:].unflatten(1, (old, old)).permute(0, 3, 1, 2)  # (1, D, n, n)
        square = F.interpolate(square.double(), (grid, grid), mode="bilinear", align_corners=True).float()
        model.pos_embed.copy_(torch.cat((positions[:, :1], square.flatten(2).transpose(1, 2)), dim=1))
        return model.to(x.dtype)(x)


def difference(config: ViTConfig, path: str, img_size: int, dtype: torch.dtype) -> float:
    """Returns the largest difference of the logits from timm's, relative to the largest logit."""
    with torch.device("meta"):
        model = VisionTransformer(config, img_size, NUM_CLASSES)
    model = model.to_empty(device="cpu").eval()
    model.load_from(read_npz(path))
    x = torch.rand(1, 3, img_size, img_size, generator=torch.Generator().manual_seed(0), dtype=dtype) * 2 - 1
    with torch.no_grad():
        logits = model.to(dtype)(x)[0]
    del model
    expected = timm_logits(path, config, img_size, NUM_CLASSES, x)
    return ((logits - expected).abs().max() / expected.abs().max()).item()


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    p = argparse.ArgumentParser(description="Agreement with timm, and cost, of the published models.")
    p.add_argument("--models", nargs="+", default=list(PUBLISHED), choices=list(PUBLISHED), metavar="MODEL")
    args = p.parse_args(argv)
    print(hardware(torch.get_num_threads(), "cpu") + "\n")
    print("| model | parameters | GFLOPs | 224 px, float32 | 224 px, float64 | 384 px, float32 | 384 px, float64 |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for model_type in args.models:
        config = CONFIGS[model_type]
        num_parameters, gflops = cost(config)
        cells = [model_type, f"{num_parameters:,}", f"{gflops:.1f}"]
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, f"{model_type}.npz")
            with open(path, "wb") as f:
                npz.write(f, random_checkpoint(config))
            sizes = (224, 384 if 384 % config.patch_size == 0 else 378)
            cells += [f"{difference(config, path, size, dtype):.1e}" for size in sizes for dtype in DTYPES]
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
