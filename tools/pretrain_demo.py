"""Makes checkpoint/ViT-demo.npz: pretrains ViT-demo on a folder of small pictures, from random weights.

    python -m tools.pretrain_demo --dataset DIR --num_steps 20000

DIR has train/<class>/* and test/<class>/*; the file that ships was made from 10,000 CIFAR-10 pictures
(checkpoint/README.md has the command and what it printed).  AdamW and label smoothing, which
train.py does not offer, because a small transformer learns slowly from scratch with SGD.
"""

from __future__ import annotations

import argparse
import logging
import sys

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import trange

from models import npz
from models.configs import CONFIGS
from models.modeling import VisionTransformer
from utils import checkpoint, data_utils
from utils.precision import Precision
from utils.scheduler import make_schedule

MODEL_TYPE = "ViT-demo"
IMG_SIZE = 32


def pretrain(args: argparse.Namespace, data: data_utils.DataSets, precision: Precision) -> VisionTransformer:
    """Trains from random weights."""
    torch.manual_seed(args.seed)
    model = VisionTransformer(CONFIGS[MODEL_TYPE], IMG_SIZE, len(data.classes))
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": args.weight_decay},
            {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.99),
    )
    schedule = make_schedule("cosine", args.num_steps // 20, args.num_steps)
    sampler = data_utils.StepSampler(len(data.train), args.batch_size, args.seed)
    steps = trange(1, args.num_steps + 1, desc="Pretraining", unit="step", mininterval=5)
    batches = data_utils.train_batches(
        data.train, sampler, range(1, args.num_steps + 1), args.batch_size, IMG_SIZE, True, precision.device, 2
    )
    for step, (images, labels) in zip(steps, batches):
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * schedule(step)
        with precision.autocast():
            loss = F.cross_entropy(model(images)[0].float(), labels, label_smoothing=0.1)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 500 == 0 or step == args.num_steps:
            print(f"step {step}: loss {loss.item():.3f}, test accuracy {accuracy(model, data):.4f}", flush=True)
    return model


@torch.inference_mode()
def accuracy(model: VisionTransformer, data: data_utils.DataSets) -> float:
    """The share of test pictures that are classified rightly."""
    model.eval()
    batches = data_utils.eval_batches(data.test, 500, IMG_SIZE, torch.device("cpu"), 2)
    correct = sum((model(images)[0].argmax(1) == labels).sum().item() for images, labels in batches)
    model.train()
    return correct / len(data.test)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    p = argparse.ArgumentParser(
        description="Pretrain ViT-demo.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--dataset", required=True, help="a folder with train/<class>/* and test/<class>/*")
    p.add_argument("--output", default=f"checkpoint/{MODEL_TYPE}.npz")
    p.add_argument("--num_steps", type=int, default=20000)
    p.add_argument("--batch_size", type=int, default=128)
    p.add_argument("--learning_rate", type=float, default=1e-3)
    p.add_argument("--weight_decay", type=float, default=0.05)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--fp16", action="store_true", help="bfloat16 autocast")
    args = p.parse_args(argv)
    logging.basicConfig(level=logging.INFO)
    try:
        data = data_utils.load_datasets(args.dataset, "./data", num_workers=2)
    except ValueError as e:
        p.error(str(e))
    model = pretrain(args, data, Precision(torch.device("cpu"), "O1" if args.fp16 else "O0"))
    arrays = npz.from_state_dict(model.state_dict(), model.config, IMG_SIZE, np.float16)
    with checkpoint.atomic_write(args.output) as f:
        npz.write(f, arrays)
    return 0


if __name__ == "__main__":
    sys.exit(main())
