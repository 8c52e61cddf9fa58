"""Draws what a fine-tuned model looks at: an image beside its attention rollout.

    python -m tools.attention_map --load_model_dir output/cifar10_checkpoint.bin cat.jpg --output cat_attention.png

The rollout (Abnar and Zuidema, "Quantifying Attention Flow in Transformers", arXiv 2005.00928, as the
reference script's notebook has it) follows the attention from the class token after the last block back
to the patches: every block's heads are averaged, the shortcut is added as the identity, rows are made to
sum to 1, and the blocks are multiplied.  The brighter a patch's colour, the more of it arrives.
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
from utils import augment, dist_util, figures, files, fonts, hardware
from utils.errors import UserError
from utils.images import read_image
from utils.precision import Precision

#: Sides between which panels are scaled, in pixels; an image of a size between them keeps it.
SMALLEST_PX, LARGEST_PX = 224, 1024
COLUMNS = 4
#: The palest and the brightest percent of the patches have the ends of the scale: a single hot patch darkens no other.
PERCENTILES = 2, 98
#: Share of the colour in the overlay; the rest is the image, in grey so that its own colours are not taken for heat.
OPACITY = 0.6
#: Ten colours of matplotlib's perceptually uniform "plasma" (Smith and van der Walt, CC0), evenly spaced.
PLASMA = np.array([(13, 8, 135), (70, 3, 159), (114, 1, 168), (156, 23, 158), (189, 55, 134),
                   (216, 87, 107), (237, 121, 83), (251, 159, 58), (253, 202, 38), (240, 249, 33)])  # fmt: skip


def rollout(attention: list[np.ndarray]) -> np.ndarray:
    """Returns how much of each patch reaches the class token, after every block.

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


def attend(model: VisionTransformer, image: Image.Image, device: torch.device) -> tuple[np.ndarray, np.ndarray]:
    """An image's rollout after every block (blocks, n, n) and the probability of every class (num_classes,).

    Args:
        model: made with ``vis=True``, in evaluation mode, on ``device``.
        image: of any size.
        device: computes it.
    """
    transform = augment.EvalTransform(model.img_size)
    x = transform.complete(transform.image(image, torch.empty(0))[None].to(device))  # (1, 3, S, S)
    with torch.inference_mode():
        logits, attention = model(x)
    maps = rollout([probabilities[0].float().cpu().numpy() for probabilities in attention])
    return maps, logits[0].float().softmax(dim=0).cpu().numpy()


# ---- drawing ----


def overlay(image: Image.Image, attention: np.ndarray) -> Image.Image:
    """Lays the attention (n, n) over a grey image, from dark blue, the least, to yellow, the most."""
    low, high = np.percentile(attention, PERCENTILES)
    heat = ((attention - low) / max(high - low, 1e-12)).clip(0, 1)
    smooth = Image.fromarray(heat.astype(np.float32)).resize(image.size, Image.Resampling.BILINEAR)
    scale = np.linspace(0, 1, len(PLASMA))
    colour = np.stack([np.interp(np.asarray(smooth), scale, channel) for channel in PLASMA.T], axis=-1)  # (H, W, 3)
    grey = np.asarray(image.convert("L"), dtype=np.float64)[..., None]
    return Image.fromarray((OPACITY * colour + (1 - OPACITY) * grey).round().astype(np.uint8))


def panel_size(width: int, height: int) -> tuple[int, int]:
    """The size at which an image is drawn: its own, made larger or smaller if it is tiny or huge."""
    longest = max(width, height)
    scale = min(max(longest, SMALLEST_PX), LARGEST_PX) / longest
    return max(round(width * scale), 1), max(round(height * scale), 1)


# ---- the command line ----


def make_parser() -> _cli.Parser:
    """Every flag of the command line."""
    p = _cli.Parser("attention_map", __doc__)
    p.add_argument("image", metavar="IMAGE", help="an image of any size")
    p.add_argument("--output", default="attention_map.png", metavar="FILE", help="the PNG to write")
    p.add_argument("--layers", action="store_true", help="add a panel for each block: the rollout up to it")
    p.add_argument("--device", choices=hardware.DEVICES, default="auto", help="computes the attention")
    _finetuned.add_flags(p)
    return p


def run(args: argparse.Namespace) -> int:
    """Draws what the flags name; returns the exit code.

    Raises:
        UserError: the user got something wrong.
        OSError: the file could not be written.
    """
    if not args.output.lower().endswith(".png"):
        raise UserError(f"--output {args.output} does not end in .png, which is what is written")
    if not os.path.isfile(args.image):
        raise UserError(f"there is no image {args.image}")
    image = read_image(args.image)
    _cli.check_output(args.output, args.image, args.load_model_dir)
    device = dist_util.setup(args.device, -1)
    loaded = _finetuned.load(args, vis=True)
    Precision(device).prepare(loaded.model)  # float32, convolutions included
    maps, probabilities = attend(loaded.model.to(device), image, device)
    best = int(probabilities.argmax())
    name = f"class {best}" if loaded.classes is None else loaded.classes[best]
    title = f"{fonts.drawable(name, f'class {best}')}, {100 * probabilities[best]:.1f} %"
    shown = image.resize(panel_size(*image.size), Image.Resampling.BICUBIC)
    panels = [(title, shown), ("attention rollout", overlay(shown, maps[-1]))]
    if args.layers:
        panels += [(f"up to block {i}", overlay(shown, layer)) for i, layer in enumerate(maps, 1)]
    with files.atomic_write(args.output) as f:
        figures.arrange(panels, COLUMNS).save(f, "PNG")
    print(f"{args.output}: {name}, {100 * probabilities[best]:.2f} %")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    args = make_parser().parse_args(argv)
    return _cli.run("attention_map", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
