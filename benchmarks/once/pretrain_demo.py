"""Makes checkpoint/ViT-demo.npz: pretrains ViT-demo on a folder of small images, without their labels.

    python -m benchmarks.once.pretrain_demo --dataset DIR --fp16

DIR has train/<class>/* and test/<class>/*; checkpoint/README.md says what the file that ships was made
from.  Every image is a class of its own, to be recognised from a random crop of its sketch: a grey
8x8 version with hard edges (instance discrimination, after Dosovitskiy et al., arXiv 1406.6909).  That
asks for shapes rather than colours, which is what the handwritten digits of the demonstration need.
AdamW, which train.py does not offer, because a small transformer learns slowly from scratch with SGD.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

if not __package__:  # run as a file, from any folder
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__)))))

from models import npz
from models.configs import CONFIGS, DEMO
from models.modeling import VisionTransformer
from tools import _cli
from utils import augment, data_utils, datasets, files
from utils.errors import UserError
from utils.precision import Precision
from utils.scheduler import make_schedule

IMG_SIZE = 32
SKETCH_SIZE = 8
#: Outputs of the head of zeros that is written: the images' own 10,000 would take more than the rest.
NUM_CLASSES = 10

logger = logging.getLogger("pretrain_demo")


def sketches(images: Tensor) -> Tensor:
    """Makes images grey, coarse, nearly black and white: (N, 3, H, W) uint8 -> (N, 3, IMG_SIZE, IMG_SIZE) uint8.

    The darker 60 % of an image become its ground, the rest its drawing.
    """
    grey = F.adaptive_avg_pool2d(images.float().mean(1, keepdim=True), SKETCH_SIZE)  # (N, 1, 8, 8)
    low, high = grey.amin((2, 3), keepdim=True), grey.amax((2, 3), keepdim=True)
    grey = (grey - low) / (high - low).clamp(min=1)
    threshold = grey.flatten(2).quantile(0.6, dim=2)[..., None, None]
    drawn = torch.sigmoid((grey - threshold) * 12) * 255
    smooth = augment.resize(drawn, IMG_SIZE).add(1).mul(127.5)  # back from [-1, 1] to grey levels
    return smooth.round().byte().expand(-1, 3, -1, -1).contiguous()


def pretrain(args: argparse.Namespace, images: Tensor, precision: Precision) -> VisionTransformer:
    """Trains from random weights to tell the images (N, 3, H, W) apart."""
    torch.manual_seed(args.seed)
    model = VisionTransformer(CONFIGS[DEMO], IMG_SIZE, num_classes=len(images))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=args.weight_decay)
    schedule = make_schedule("cosine", args.num_steps // 20, args.num_steps)
    transform = augment.TrainTransform(IMG_SIZE)
    sampler = data_utils.StepSampler(len(images), args.batch_size, transform.num_draws, args.seed)
    steps = range(1, args.num_steps + 1)
    drawn = datasets.MemoryImages(sketches(images), torch.arange(len(images)))
    batches = data_utils.train_batches(
        drawn, sampler, steps, args.batch_size, transform, precision.device, num_workers=0
    )
    loss_sum = 0.0
    for step, (x, labels) in zip(tqdm(steps, "Pretraining", unit="step", mininterval=10), batches):
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * schedule(step)
        with precision.autocast():
            loss = model(x, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss_sum += loss.item()
        if step % 1000 == 0:
            logger.info("step %d: mean loss of the last 1000 %.3f", step, loss_sum / 1000)
            loss_sum = 0.0
    return model


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    p = argparse.ArgumentParser(
        prog="benchmarks.once.pretrain_demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--dataset", required=True, help="a folder with train/<class>/* and test/<class>/*")
    p.add_argument("--output", default=f"checkpoint/{DEMO}.npz", metavar="FILE", help="the .npz to write")
    p.add_argument("--num_steps", type=_cli.parse_positive, default=12000, help="steps of AdamW")
    p.add_argument("--batch_size", type=_cli.parse_positive, default=128, help="images of one step")
    p.add_argument("--learning_rate", type=float, default=1e-3, help="peak learning rate of AdamW")
    p.add_argument("--weight_decay", type=float, default=0.05, help="of AdamW")
    p.add_argument("--seed", type=int, default=0, help="of the weights, the order and the crops")
    p.add_argument("--fp16", action="store_true", help="bfloat16 autocast")
    return p


def run(args: argparse.Namespace) -> None:
    """Pretrains and writes the file.

    Raises:
        UserError: the user got something wrong.
    """
    _cli.check_output(args.output)
    images = datasets.load_datasets(args.dataset, "./data", num_workers=2).train
    if not isinstance(images, datasets.MemoryImages):
        raise UserError(f"--dataset {args.dataset}: expected small images, all of one size")
    model = pretrain(args, images.images, Precision(torch.device("cpu"), "O1" if args.fp16 else "O0"))
    state = model.state_dict()
    state["head.weight"], state["head.bias"] = (
        torch.zeros(NUM_CLASSES, state["head.weight"].shape[1]),
        torch.zeros(NUM_CLASSES),
    )
    with files.atomic_write(args.output) as f:
        npz.write(f, npz.from_state_dict(state, model.config, IMG_SIZE, np.float16))


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    p = make_parser()
    args = p.parse_args(argv)
    logging.basicConfig(level=logging.INFO)
    try:
        run(args)
    except UserError as e:
        p.error(str(e))
    return 0


if __name__ == "__main__":
    sys.exit(main())
