"""The start of a plain training script: from the process's first line to the end of its first step.

``benchmarks.start`` runs this as a process and takes the time of each line that it prints.  It imports
what the reference script imports (but for ml_collections), makes the model with PyTorch's initial
values, copies the .npz into it array by array, and takes a first batch of the digits from a DataLoader
with four workers, through torchvision's transforms.

This module must not import torch by way of this project's own modules: what they cost is not its to pay.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import zoom  # noqa: F401  (the reference resizes position embeddings with it)
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torch.utils.tensorboard import SummaryWriter
from torchvision import datasets, transforms  # noqa: F401
from tqdm import tqdm

from benchmarks.plain import PlainViT
from models.configs import CONFIGS

NUM_CLASSES = 10


class Digits(Dataset):
    """The training digits as PIL images of 32 px, transformed one by one."""

    def __init__(self, path: str, img_size: int) -> None:
        with np.load(path, allow_pickle=False) as f:
            grey = np.round(f["train_images"] * (255 / 16)).astype(np.uint8)  # (N, 8, 8)
            self.labels = f["train_labels"].astype(np.int64).tolist()
        self.images = [Image.fromarray(x).resize((32, 32)).convert("RGB") for x in grey]
        self.transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(img_size, scale=(0.05, 1.0)),
                transforms.ToTensor(),
                transforms.Normalize([0.5] * 3, [0.5] * 3),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), self.labels[index]


def mark(phase: str) -> None:
    """Tells the measuring process that a phase is over."""
    print(phase, flush=True)


def main() -> None:
    """Takes one step."""
    mark("imports")
    p = argparse.ArgumentParser()
    p.add_argument("--model_type", required=True)
    p.add_argument("--pretrained_dir", required=True)
    p.add_argument("--digits", required=True)
    p.add_argument("--img_size", type=int, required=True)
    p.add_argument("--batch_size", type=int, required=True)
    p.add_argument("--device", required=True)
    args = p.parse_args()
    c = CONFIGS[args.model_type]
    model = PlainViT(
        args.img_size, c.patch_size, c.hidden_size, c.mlp_dim, c.num_heads, c.num_layers, NUM_CLASSES, c.dropout_rate
    )
    mark("model")
    model.load_from(np.load(args.pretrained_dir, allow_pickle=False))
    model.to(args.device)
    mark("weights")
    writer = SummaryWriter("logs")
    data = Digits(args.digits, args.img_size)
    loader = DataLoader(
        data, args.batch_size, sampler=RandomSampler(data), num_workers=4, pin_memory=args.device == "cuda"
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9, weight_decay=0)
    model.train()
    for images, labels in tqdm(loader, disable=True):
        mark("data")
        loss = model(images.to(args.device), labels.to(args.device))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        writer.add_scalar("train/loss", loss.item(), 1)  # waits for the device
        break
    mark("step")


if __name__ == "__main__":
    main()
