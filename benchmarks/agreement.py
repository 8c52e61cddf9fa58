"""How closely the models agree with timm's, and what they cost.

    python -m benchmarks.agreement [--models ViT-B_32 ...]

For every model that Google publishes: parameters, GFLOPs of one picture, and for the plain ones the
largest difference of the logits from timm's, relative to the largest logit, both models loaded from
the same random checkpoint in Google's layout.  timm's hybrids differ from Google's code (sqrt(var + eps)
in weight standardisation, another epsilon in the norms), so they are no measure here;
tests/test_google_reference.py compares with Google's own numbers.  Prints the numbers of
the README's table; needs timm.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import zlib

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from models import npz
from models.configs import CONFIGS, PUBLISHED, ViTConfig
from models.modeling import VisionTransformer

NUM_CLASSES = 1000
DTYPES = (torch.float32, torch.float64)


def random_checkpoint(config: ViTConfig, img_size: int = 224) -> dict[str, np.ndarray]:
    """Arrays in Google's layout whose sizes keep activations near 1, from a fixed seed."""
    arrays = {}
    for entry in npz.layout(config, img_size, NUM_CLASSES):
        x = np.random.default_rng(zlib.crc32(entry.google.encode())).standard_normal(entry.shape, np.float32)
        if entry.google.endswith("kernel"):
            fan_in = entry.ours_shape[1] * int(np.prod(entry.ours_shape[2:]))
            x *= fan_in**-0.5
        else:
            x = 0.02 * x + entry.google.endswith("scale")
        arrays[entry.google] = x.astype(np.float32)
    return arrays


def cost(config: ViTConfig) -> tuple[int, float]:
    """Parameters with 1000 classes at 224 px, and GFLOPs of one picture (a multiply-add is two)."""
    with torch.device("meta"):
        model = VisionTransformer(config, 224, NUM_CLASSES).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            # All tokens go through the last block, as other counts have it.
            model.head(model.transformer(torch.empty(1, 3, 224, 224))[0][:, 0])
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() / 1e9


def timm_logits(path: str, config: ViTConfig, img_size: int, num_classes: int, x: Tensor) -> Tensor:
    """What timm's model computes from a checkpoint in Google's layout.

    Args:
        path: the .npz file.
        config: a plain model.
        img_size: side of the pictures in pixels.
        num_classes: outputs of the head; 0 for the class token after the last norm.
        x: pictures (B, 3, img_size, img_size), in the number format to compute in.
    """
    from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer

    with torch.device("meta"):  # initial values would take longer than the rest
        model = TimmVisionTransformer(
            img_size=img_size,
            patch_size=config.patch_size,
            embed_dim=config.hidden_size,
            depth=config.num_layers,
            num_heads=config.num_heads,
            mlp_ratio=config.mlp_dim / config.hidden_size,
            num_classes=num_classes,
        )
    model = model.to_empty(device="cpu").eval()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(torch.nan)  # what is not loaded shows
        model.load_pretrained(path)
        # timm resizes position embeddings with the grids' edges aligned, Google with their corners.
        positions = npz.read(path)[npz.POSITIONS].astype(np.float32)
        assert model.pos_embed is not None
        model.pos_embed.copy_(torch.from_numpy(npz.resize_positions(positions, config.grid_size(img_size))))
        return model.to(x.dtype)(x)


def difference(config: ViTConfig, path: str, img_size: int, dtype: torch.dtype) -> float:
    """Largest difference of the logits from timm's, relative to the largest logit."""
    with torch.device("meta"):
        model = VisionTransformer(config, img_size, NUM_CLASSES)
    model = model.to_empty(device="cpu").eval()
    model.load_from(npz.read(path))
    x = torch.rand(1, 3, img_size, img_size, generator=torch.Generator().manual_seed(0), dtype=dtype) * 2 - 1
    with torch.no_grad():
        logits = model.to(dtype)(x)[0]
    del model
    expected = timm_logits(path, config, img_size, NUM_CLASSES, x)
    return ((logits - expected).abs().max() / expected.abs().max()).item()


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    p = argparse.ArgumentParser(description="Agreement with timm, and cost, of the published models.")
    p.add_argument("--models", nargs="+", default=list(PUBLISHED), choices=list(PUBLISHED), metavar="MODEL")
    args = p.parse_args(argv)
    import timm

    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, timm {timm.__version__}")
    print("| model | parameters | GFLOPs | 224 px, float32 | 224 px, float64 | 384 px, float32 | 384 px, float64 |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for model_type in args.models:
        config = CONFIGS[model_type]
        num_parameters, gflops = cost(config)
        cells = [model_type, f"{num_parameters:,}", f"{gflops:.1f}"]
        if config.resnet_units is None:
            with tempfile.TemporaryDirectory() as folder:
                path = os.path.join(folder, f"{model_type}.npz")
                with open(path, "wb") as f:
                    npz.write(f, random_checkpoint(config))
                sizes = (224, 384 if 384 % config.patch_size == 0 else 378)
                cells += [
                    f"{x:.1e}" for x in (difference(config, path, size, dtype) for size in sizes for dtype in DTYPES)
                ]
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
