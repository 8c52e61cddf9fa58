"""Counts what a step and an evaluation ask of a GPU, without one: kernels, products, memory, attention.

    NULLGPU=DIR .../run.sh python -m benchmarks.once.launches [--models ViT-B_32 ...] [--batch_size 512]

Needs the null GPU (CONTRIBUTING.md), on which PyTorch's own CUDA code runs and whose kernels do nothing.  Ours is what
train.py launches between the ends of two steps, crops included; timm's the loop that everybody writes, on images that
are there.  It has no cuDNN: timm's patches are embedded by a product, as ours, and hybrids convolve image by image.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import tempfile
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import train
from benchmarks import common, null_gpu, peers
from models.configs import CONFIGS
from utils import datasets, figures
from utils.metrics import TrainLog

LEVELS = ("O0", "O2")  # of timm float32, and autocast in float16
MODELS = ("ViT-Ti_16", "ViT-S_16", "ViT-B_32", "ViT-B_16", "ViT-L_32", "ViT-L_16", "ViT-H_14", "R50-ViT-B_16")
WARM_UP = 3  # turns, after which each asks for the same
ATTENTION = {"pytorch_flash": "flash", "fmha_cutlass": "efficient", "cudnn": "cuDNN"}


@contextlib.contextmanager
def counting() -> Iterator[SimpleNamespace]:
    """Gives what the block asks of the null GPU, once it is over: launches, products, peak in bytes, attention."""
    found = SimpleNamespace()
    torch.cuda.reset_peak_memory_stats()
    with null_gpu.log() as lines:
        yield found
    found.launches, found.products = (sum(x.startswith(f"{word} ") for x in lines) for word in ("KERNEL", "GEMM"))
    found.peak = torch.cuda.max_memory_allocated()
    found.attention = ", ".join(name for part, name in ATTENTION.items() if any(part in x for x in lines))


class Enough(BaseException):
    """Ends a training in which enough was counted."""


def our_step(model_type: str, level: str, batch_size: int) -> SimpleNamespace:
    """Counts a step of train.py, one without a line in its log."""
    block, found = contextlib.ExitStack(), []

    def end_of_step(log: TrainLog, step: int, *_: object) -> None:
        if step == WARM_UP:
            found.append(block.enter_context(counting()))
        elif step > WARM_UP:
            block.close()
            raise Enough

    flags = f"--name a --dataset digits --model_type {model_type} --train_batch_size {batch_size} --device cuda"
    flags += " --gradient_accumulation_steps 1 --eval_batch_size 64"
    flags += f" --fp16 --fp16_opt_level {level} --amp_dtype float16" * (level != "O0")
    undrawn = mock.patch.object(figures, "training_batch", return_value=None)  # its labels are garbage here
    noted, until_enough = mock.patch.object(TrainLog, "step", end_of_step), contextlib.suppress(Enough)
    with tempfile.TemporaryDirectory() as folder, undrawn, noted, until_enough:
        train.main([*flags.split(), "--pretrained_dir", "", "--output_dir", folder, "--log_dir", folder])
    return found[0]


def our_evaluation(model_type: str, level: str, batch_size: int) -> SimpleNamespace:
    """Counts one batch more of an evaluation."""
    model, precision = peers.build(model_type, 224, None, "cuda", level, "float16")
    precision.prepare(model)
    precision.attach(model, None)
    found = []
    for size in (batch_size, batch_size, 2 * batch_size):  # libraries are set up in the first
        images = datasets.MemoryImages(torch.zeros(size, 3, 32, 32, dtype=torch.uint8), torch.zeros(size).long())
        with counting() as counted:
            train.evaluate(model, images.to(precision.device), precision, 224, batch_size)
        found.append(counted)
    _, less, more = found
    more.launches, more.products = more.launches - less.launches, more.products - less.products
    return more


def embed(patches: nn.Conv2d, images: Tensor) -> Tensor:
    """Does what timm's convolution of patches does, by a product."""
    size = patches.kernel_size[0]
    b, c, h, w = images.shape
    x = images.view(b, c, h // size, size, w // size, size).permute(0, 2, 4, 1, 3, 5).flatten(3)  # (B, H, W, C S S)
    return F.linear(x, patches.weight.flatten(1), patches.bias).permute(0, 3, 1, 2)  # (B, D, H, W)


def timm(model_type: str, level: str, batch_size: int, training: bool = True) -> SimpleNamespace:
    """Counts a step of timm's, or its forward pass of a batch that is evaluated."""
    config = CONFIGS[model_type]
    setting = peers.Setting(model_type, 224, batch_size, 1, config.dropout_rate, "cuda")
    model = peers.timm_model(setting, fused=True).cuda().train(training)
    [(images, labels)], half = setting.micro_batches(), torch.autocast("cuda", torch.float16, level != "O0")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    scaler = torch.amp.GradScaler(enabled=level != "O0")

    def step() -> None:
        with half:
            loss = F.cross_entropy(model(images), labels)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    do: Callable[[], object] = step if training else torch.inference_mode()(half(lambda: model(images).argmax(dim=1)))
    # What the scaler reads back, if a gradient overflowed, is garbage here: it must not skip the step.
    applied = mock.patch.object(torch.amp.GradScaler, "_maybe_opt_step", lambda _, optimizer, *args: optimizer.step())
    with applied, mock.patch.object(nn.Conv2d, "forward", embed):
        for _ in range(WARM_UP):
            do()
        with counting() as found:
            do()
    return found


def alone(count: Callable[..., SimpleNamespace], *values: object) -> SimpleNamespace:
    """Counts after what was counted before has left the memory."""
    gc.collect()
    return count(*values)


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    p = argparse.ArgumentParser(description="Launches, products and memory of a step, on the null GPU.")
    p.add_argument("--models", nargs="+", choices=CONFIGS, default=MODELS, metavar="MODEL", help="at 224 px")
    p.add_argument("--batch_size", type=int, default=512, help="images of a step, and of an evaluation's batch")
    args = p.parse_args(argv)
    if not null_gpu.is_null():
        p.error("this is no null GPU; see CONTRIBUTING.md")
    rows = []
    for model_type, level in itertools.product(args.models, LEVELS):
        values, is_hybrid = (model_type, level, args.batch_size), CONFIGS[model_type].resnet_units is not None
        with torch.backends.cudnn.flags(enabled=not is_hybrid):
            found = {"ours": (alone(our_step, *values), alone(our_evaluation, *values))}
            if not is_hybrid:
                found["timm"] = (alone(timm, *values), alone(timm, *values, False))
        for name, (step, evaluation) in found.items():
            cells = [f"{x.launches} + {x.products} | {x.peak / 2**30:.1f} | {x.attention}" for x in (step, evaluation)]
            rows.append([model_type, level, name, *cells])
            print(*rows[-1], flush=True)
    common.print_table(["", "", "", *["launches + products | peak, GiB | attention"] * 2], rows)


if __name__ == "__main__":
    main()
