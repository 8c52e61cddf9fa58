"""Classifies images with a fine-tuned checkpoint.

    python -m tools.predict --load_model_dir output/cifar10_checkpoint.bin cat.jpg folder/
    python -m tools.predict --load_model_dir output/cifar10_checkpoint.bin --json cat.jpg

Prints the likeliest classes of each image.  Folders are searched for images, those in them too.  An image is prepared
as for an evaluation of train.py: the whole of it, resized to a square.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from tqdm import tqdm

if not __package__:  # run as a file, from any folder
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))

from models.modeling import VisionTransformer
from tools import _cli, _finetuned
from utils import augment, dist_util, hardware, listing, memory
from utils.errors import UserError
from utils.images import KINDS, ImageError, read_image
from utils.precision import Precision

logger = logging.getLogger(__name__)

#: An image's path, and the probability of every class (num_classes,), or why it cannot be read.
Prediction = tuple[str, Tensor | ImageError]


def find_images(paths: list[str]) -> list[str]:
    """Lists the images that paths of images and folders mean, in their order.

    Raises:
        UserError: there is no such file, or no image in a folder.
    """
    images = []
    for path in paths:
        if os.path.isdir(path):
            left_out = listing.LeftOut()
            below = listing.images_below(path, left_out)
            for line in left_out.warnings():
                logger.warning("%s: %s", path, line)
            if not below:
                raise UserError(f"the folder {path} holds no image ({KINDS})")
            images += below
        elif os.path.exists(path):
            images.append(path)
        else:
            raise UserError(f"there is no image {path}")
    return images


def predict(model: VisionTransformer, paths: list[str], batch_size: int, device: torch.device) -> Iterator[Prediction]:
    """Yields the probabilities of all classes, for one image after the other.

    Args:
        model: in evaluation mode, on ``device``.
        paths: of images.
        batch_size: images computed at once.
        device: what computes.
    """
    transform = augment.EvalTransform(model.img_size)

    def prepare(path: str) -> Tensor | ImageError:
        try:
            return transform.image(read_image(path), torch.empty(0))  # (3, S, S) uint8
        except ImageError as e:
            return e

    with ThreadPoolExecutor(hardware.num_cpus()) as pool, torch.inference_mode():
        for start in range(0, len(paths), batch_size):
            batch = paths[start : start + batch_size]
            images = list(pool.map(prepare, batch))
            readable = [x for x in images if isinstance(x, Tensor)]
            probabilities = iter(())
            if readable:
                x = transform.complete(torch.stack(readable).to(device))  # (B, 3, S, S)
                probabilities = iter(model(x)[0].float().softmax(dim=1).cpu())  # (B, num_classes)
            for path, image in zip(batch, images):
                yield path, next(probabilities) if isinstance(image, Tensor) else image


def top(probabilities: Tensor, classes: list[str], k: int) -> dict[str, float]:
    """Returns the k likeliest classes and their probabilities, the likeliest first.

    Classes of one name, as ImageNet has them, are distinguished by their numbers.
    """
    values, indices = probabilities.sort(descending=True, stable=True)
    times = Counter(classes)
    names = [name if times[name] == 1 else f"{name} ({i})" for i, name in enumerate(classes)]
    return {names[i]: p for i, p in zip(indices[:k].tolist(), values[:k].tolist())}


def as_text(path: str, best: dict[str, float]) -> str:
    """Returns an image's path, and a line for each class."""
    return "\n".join([path, *(f"  {100 * p:6.2f} %  {name}" for name, p in best.items())])


def make_parser() -> _cli.Parser:
    """Returns the parser, with every flag."""
    p = _cli.Parser("predict", __doc__)
    p.add_argument("images", nargs="+", metavar="IMAGE", help="an image, or a folder of images")
    p.add_argument("--json", action="store_true", help="print a list with an object for each image: path, label, "
                   "probabilities")  # fmt: skip
    p.add_argument("--top_k", type=_cli.parse_positive, default=5, help="classes to print")
    p.add_argument("--batch_size", type=_cli.parse_positive, default=64, help="images computed at once")
    p.add_argument("--device", choices=hardware.DEVICES, default="auto", help="what computes")
    _finetuned.add_flags(p)
    return p


def run(args: argparse.Namespace) -> int:
    """Classifies what the flags name; returns the exit code: 2 if an image could not be read.

    Raises:
        UserError: the user got something wrong.
        OutOfMemory: a smaller ``--batch_size`` may do.
    """
    paths = find_images(args.images)
    device = dist_util.setup(args.device, -1)
    loaded = _finetuned.load(args)
    classes, model = loaded.class_names(), loaded.model.to(device)
    Precision(device).prepare(model)  # float32, convolutions included
    status, objects = 0, []
    options = dist_util.bar_options()
    options["disable"] |= len(paths) <= args.batch_size  # it would only flicker
    remedy = memory.explain_out_of_memory(f"classifying {args.batch_size} images at once; give a smaller --batch_size")
    with remedy, tqdm(total=len(paths), desc="Predicting", unit="image", leave=False, **options) as bar:
        for path, result in predict(model, paths, args.batch_size, device):
            bar.update()
            if isinstance(result, ImageError):
                with bar.external_write_mode(file=sys.stderr):
                    status = _cli.fail("predict", result, 2)
                continue
            best = top(result, classes, args.top_k)
            if args.json:
                objects.append({"path": path, "label": next(iter(best)), "probabilities": best})
            else:
                tqdm.write(as_text(path, best), file=sys.stdout)
    if args.json:
        print(json.dumps(objects, indent=1))
    return status


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    args = make_parser().parse_args(argv)
    return _cli.run("predict", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
