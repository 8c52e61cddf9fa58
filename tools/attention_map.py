"""Draws what a fine-tuned model looks at: a picture beside its attention rollout.

    python -m tools.attention_map --load_model_dir output/cifar10_checkpoint.bin cat.jpg --output cat_attention.png

The rollout (Abnar and Zuidema, "Quantifying Attention Flow in Transformers", arXiv 2005.00928, as the
reference script's notebook has it) follows the attention from the class token after the last block back
to the patches: every block's heads are averaged, the shortcut is added as the identity, rows are made to
sum to 1, and the blocks are multiplied.  Bright is where it came from.
"""

from __future__ import annotations

import argparse
import os
import sys

import numpy as np
import torch
from PIL import Image

if not __package__:  # run as a file, from any folder
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))

from models.modeling import VisionTransformer
from tools import _cli, _finetuned
from utils import augment, datasets, dist_util, figures, files
from utils.errors import UserError
from utils.precision import Precision

#: Sides between which panels are scaled, in pixels; a picture of a size between them keeps it.
SMALLEST_PX, LARGEST_PX = 224, 1024
COLUMNS = 4


def rollout(attention: list[np.ndarray]) -> np.ndarray:
    """How much of each patch reaches the class token, after every block.

    Args:
        attention: each block's probabilities (A, T, T), the first block first.

    Returns:
        (blocks, n, n): the class token's shares of the n * n patches, the last block's being the rollout
        through all of them.  What the class token keeps of itself is left out.
    """
    joint = np.eye(attention[0].shape[-1])
    maps = []
    for probabilities in attention:
        mixed = probabilities.astype(np.float64).mean(axis=0) + np.eye(len(joint))  # (T, T)
        joint = (mixed / mixed.sum(axis=-1, keepdims=True)) @ joint
        maps.append(joint[0, 1:])
    n = round(len(maps[0]) ** 0.5)
    return np.stack(maps).reshape(-1, n, n)


def attend(model: VisionTransformer, picture: Image.Image, device: torch.device) -> tuple[np.ndarray, np.ndarray]:
    """A picture's rollout after every block (blocks, n, n) and the probability of every class (num_classes,).

    Args:
        model: made with ``vis=True``, in evaluation mode, on ``device``.
        picture: of any size.
        device: what computes.
    """
    transform = augment.EvalTransform(model.img_size)
    x = transform.complete(transform.image(picture, torch.empty(0))[None].to(device))  # (1, 3, S, S)
    with torch.inference_mode():
        logits, attention = model(x)
    maps = rollout([probabilities[0].float().cpu().numpy() for probabilities in attention])
    return maps, logits[0].float().softmax(dim=0).cpu().numpy()


# ---- drawing ----


def shade(picture: Image.Image, attention: np.ndarray) -> Image.Image:
    """Darkens a picture where the attention (n, n) is low, relative to where it is highest."""
    mask = Image.fromarray((attention / attention.max()).astype(np.float32))
    mask = mask.resize(picture.size, Image.Resampling.BILINEAR)
    pixels = np.asarray(picture, dtype=np.float32) * np.asarray(mask)[..., None]
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def panel_size(width: int, height: int) -> tuple[int, int]:
    """The size at which a picture is drawn: its own, made larger or smaller if it is tiny or huge."""
    longest = max(width, height)
    scale = min(max(longest, SMALLEST_PX), LARGEST_PX) / longest
    return max(round(width * scale), 1), max(round(height * scale), 1)


# ---- the command line ----


def make_parser() -> _cli.Parser:
    """Every flag of the command line."""
    p = _cli.Parser("attention_map", __doc__)
    p.add_argument("picture", metavar="IMAGE", help="a picture of any size")
    p.add_argument("--output", default="attention_map.png", metavar="FILE", help="the PNG to write")
    p.add_argument("--layers", action="store_true", help="add a panel for each block: the rollout up to it")
    p.add_argument("--device", choices=_cli.DEVICES, default="auto", help="what computes")
    _finetuned.add_flags(p)
    return p


def run(args: argparse.Namespace) -> int:
    """Draws what the flags name; returns the exit status.

    Raises:
        UserError: the user got something wrong.
        OSError: the file could not be written.
    """
    if not args.output.lower().endswith(".png"):
        raise UserError(f"--output {args.output} does not end in .png, which is what is written")
    if not os.path.isfile(args.picture):
        raise UserError(f"there is no picture {args.picture}")
    picture = datasets.read_image(args.picture)
    _cli.check_output(args.output, args.picture, args.load_model_dir)
    device = dist_util.setup(args.device, -1)
    loaded = _finetuned.load(args, vis=True)
    Precision(device).prepare(loaded.model)  # float32, convolutions included
    maps, probabilities = attend(loaded.model.to(device), picture, device)
    best = int(probabilities.argmax())
    name = f"class {best}" if loaded.classes is None else loaded.classes[best]
    shown = picture.resize(panel_size(*picture.size), Image.Resampling.BICUBIC)
    panels = [(f"{name}, {100 * probabilities[best]:.1f} %", shown), ("attention rollout", shade(shown, maps[-1]))]
    if args.layers:
        panels += [(f"up to block {i}", shade(shown, layer)) for i, layer in enumerate(maps, 1)]
    with files.atomic_write(args.output) as f:
        figures.arrange(panels, COLUMNS).save(f, "PNG")
    print(f"{args.output}: {name}, {100 * probabilities[best]:.2f} %")
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    args = make_parser().parse_args(argv)
    return _cli.run("attention_map", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
