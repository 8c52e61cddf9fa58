"""The bytes that the ranks of a run send each other in one step, and their time on a network.

    python -m benchmarks.once.communication [--ranks 8] [--model_type ViT-B_16 ...]

Computed, not measured: the model is built without memory, and the bytes of its gradients are counted in
the number formats that ``--fp16_opt_level`` gives them (O0 and O1: float32; O2: half precision for
the matrix products, float32 for the rest; O3: half precision).  In a ring all-reduce of n ranks each
sends, and receives, 2 (n - 1) / n times these bytes (Patarasuk and Yuan, J. Parallel Distrib. Comput. 69,
2009); the times are these bytes over the bandwidth between two machines, without latency.
"""

from __future__ import annotations

import argparse

import torch

from benchmarks import common
from models.configs import CONFIGS, canonical_name
from models.modeling import VisionTransformer
from utils.precision import OPT_LEVELS, Precision

GIGABITS = (25, 100, 400)
IMG_SIZES = {"ViT-demo": 32}
LEVELS = ("O0", "O2")


def gradient_bytes(model_type: str, level: str, img_size: int = 224, num_classes: int = 1000) -> int:
    """Returns the bytes of all gradients of a model as they are reduced."""
    with torch.device("meta"):
        model = VisionTransformer(CONFIGS[model_type], img_size, num_classes)
        Precision(torch.device("cpu"), level).prepare(model)
    return sum(p.numel() * p.element_size() for p in model.parameters())


def sent_bytes(num_bytes: int, num_ranks: int) -> float:
    """Returns the bytes that each of so many ranks sends in a ring all-reduce."""
    return 2 * (num_ranks - 1) / num_ranks * num_bytes


def milliseconds(num_bytes: float, gigabits: float) -> float:
    """Returns the time of bytes on a link of so many Gb/s."""
    return num_bytes * 8 / gigabits / 1e6


def rows(models: list[str], num_ranks: int) -> list[list[str]]:
    """Returns the table's cells."""
    cells = []
    for name in models:
        line = [name]
        for level in LEVELS:
            sent = sent_bytes(gradient_bytes(name, level, IMG_SIZES.get(name, 224)), num_ranks)
            line.append(f"{sent / 1e6:,.1f}")
            line += [f"{milliseconds(sent, gigabits):,.1f}" for gigabits in GIGABITS]
        cells.append(line)
    return cells


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    p = argparse.ArgumentParser(description="Bytes that each rank sends in one step, and their time.")
    names = [name for name in CONFIGS if name == canonical_name(name) and not name.startswith("testing")]
    p.add_argument("--ranks", type=int, default=8, help="that train together")
    p.add_argument("--model_type", nargs="+", choices=CONFIGS, default=names, metavar="MODEL", help=", ".join(CONFIGS))
    return p


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    p = make_parser()
    args = p.parse_args(argv)
    if args.ranks < 1:
        p.error(f"--ranks is {args.ranks}, expected at least 1")
    assert set(LEVELS) <= set(OPT_LEVELS)
    times = [f"ms at {gigabits} Gb/s" for gigabits in GIGABITS]
    header = ["model", "MB sent, float32", *times, "MB sent, O2", *times]
    common.print_table(header, rows(args.model_type, args.ranks))


if __name__ == "__main__":
    main()
