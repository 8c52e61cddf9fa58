"""Speed of one training step, against timm, torchvision, Hugging Face and a plain formulation.

    python -m benchmarks.step [--model_type ViT-B_32] [--batch_size 32] [--dropout 0.1] [--memory]

One step is: forward, loss, backward (in micro-batches, with --gradient_accumulation_steps), clip to norm 1,
SGD with momentum 0.9.  The images are random and already where they are needed.  Each peer is first
tried at the settings it offers and then runs at its fastest; the contenders then take turns, each in a
process of its own.  Needs timm and transformers (requirements-dev.txt); a peer that is not installed is
left out, and the output says so.

FLOPs of a step are counted by formula, three times the forward pass of the plain formulation
(forward, gradients of the activations, gradients of the weights), a multiply-add as two, per image
with T = 1 + P tokens:

    forward = 2 P (3 patch^2) D + layers (2 T D (4 D + 2 M) + 4 T^2 D) + 2 D classes

They are the same for all contenders: work that one leaves out raises its share of the peak.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import common, peers
from models.configs import CONFIGS, ViTConfig
from utils.precision import OPT_LEVELS, Precision


def flops_of_step(config: ViTConfig, img_size: int, num_classes: int, batch_size: int) -> float:
    """Returns the FLOPs of a step by the formula in this module's docstring."""
    patches, d = config.grid_size(img_size) ** 2, config.hidden_size
    tokens = 1 + patches
    block = 2 * tokens * d * (4 * d + 2 * config.mlp_dim) + 4 * tokens**2 * d
    forward = 2 * patches * 3 * config.patch_size**2 * d + config.num_layers * block + 2 * d * num_classes
    return 3.0 * forward * batch_size


@dataclass(frozen=True)
class Row:
    """A contender of the table: its name, how it is built, the number format of its matrix products."""

    name: str
    dtype: torch.dtype
    format: str
    job: common.Job
    peer: str = ""
    pure: bool = False


def make_rows(setting: peers.Setting, args: argparse.Namespace) -> list[Row]:
    """Returns those who take part, in the table's order; prints who is not installed."""
    precision = Precision(torch.device(setting.device), args.fp16_opt_level[0])
    half = None if precision.opt_level == "O0" else precision.half
    dtype = half or torch.float32
    name = str(dtype).removeprefix("torch.")
    autocast = f"{name} autocast" if half else name

    def job(build: Callable, *values: Any, package: str = "torch") -> common.Job:
        # torch._dynamo comes with any optimizer of torch.
        return common.Job(functools.partial(build, *values), ("torch._dynamo", package), setting.device, args.threads)

    rows = []
    for level in args.fp16_opt_level:
        theirs = torch.float32 if level == "O0" else precision.half
        label = str(Precision(torch.device(setting.device), level))
        rows.append(Row(f"ours, {level}", theirs, label, job(peers.our_stepper, setting, level)))
        if args.compile:
            compiled = job(peers.our_stepper, setting, level, True)
            rows.append(Row(f"ours, {level}, compiled", theirs, label, compiled))
    for peer, package in peers.PACKAGES.items():
        if not common.installed(package):
            print(f"{peer} is left out: {package} is not installed (requirements-dev.txt)")
            continue
        pures = [False]
        if half == torch.bfloat16 and peer != "torchvision":
            pures.append(True)  # these offer to hold all weights in bfloat16, without float32 masters
        for pure in pures:
            build = job(peers.Peer, peer, setting, half, pure, 1 if args.quick else 3, args.compile, package=package)
            labels = (f"{peer}, all {name}", f"{name} weights") if pure else (peer, autocast)
            rows.append(Row(labels[0], dtype, labels[1], build, peer, pure))
    rows.append(Row("plain reference", torch.float32, "float32", job(peers.plain_stepper, setting, None)))
    if half:
        rows.append(Row("plain reference, half", dtype, autocast, job(peers.plain_stepper, setting, half)))
    return [row for row in rows if not args.only or row.name.startswith(("ours", *args.only))]


def measure_memory(rows: list[Row], setting: peers.Setting, notes: dict[str, peers.Choice]) -> dict[str, common.Memory]:
    """Returns the peak memory of each, in a fresh process, peers at the setting that was the fastest."""
    memory = {}
    for row in rows:
        job = row.job
        if row.peer:
            half = None if row.dtype == torch.float32 else row.dtype
            build = functools.partial(peers.peer_stepper, row.peer, setting, half, row.pure, notes[row.name])
            job = common.Job(build, job.imports, job.device, job.threads)
        memory[row.name] = common.memory_of(job)
    return memory


def peaks(rows: list[Row], setting: peers.Setting, quick: bool) -> dict[torch.dtype, float]:
    """Returns the rate of the best matrix products in each number format, FLOP/s."""
    config = setting.config
    tokens = (1 + config.grid_size(setting.img_size) ** 2) * setting.batch_size // setting.num_micro_batches
    dtypes = (row.dtype for row in rows)
    return common.matmul_peaks(setting.device, dtypes, tokens, config.hidden_size, config.mlp_dim, quick)


def report(
    rows: list[Row], speeds: dict[str, common.Speed], peak: dict[torch.dtype, float], flops: float,
    notes: dict[str, peers.Choice], memory: dict[str, common.Memory],
) -> None:  # fmt: skip
    """Prints the table, and the ratios to the fastest and the leanest."""
    first = rows[0].name
    header = ["", "precision", "setting", "images/s", "slowest - fastest", "ours / it", "share of peak"]
    header += ["peak memory MiB (without imports)"] * bool(memory)
    images, cells = speeds[first].work, []
    for row in rows:
        speed = speeds[row.name]
        share = speed.median / images * flops / peak[row.dtype]
        cells.append([row.name, row.format, ", ".join(notes[row.name]), common.number(speed.median), speed.spread,
                      f"{speeds[first].median / speed.median:.2f}", f"{share:.0%}"])  # fmt: skip
        if memory:
            cells[-1].append(str(memory[row.name]))
    common.print_table(header, cells)
    stock = [row for row in rows if row.peer]
    alike = [row for row in stock if not row.pure]
    for what, group in (("stock peer", alike), ("peer, bfloat16 weights included", stock)):
        if group:
            best = max(group, key=lambda row: speeds[row.name].median)
            ratio = speeds[first].median / speeds[best.name].median
            print(f"{first} / the fastest {what} ({best.name}): {ratio:.2f}")
    if memory and alike:
        for what, group in (("peer", alike), ("peer, bfloat16 weights included", stock)):
            lean = min(group, key=lambda row: memory[row.name].peak)
            ratio = memory[first].peak / max(memory[lean.name].peak, 1)
            print(f"peak memory, {first} / the leanest {what} ({lean.name}): {ratio:.2f}")


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    p = argparse.ArgumentParser(description="Speed and memory of one step, against other implementations.")
    p.add_argument(
        "--model_type", choices=peers.MODELS, default="ViT-B_32", metavar="MODEL", help=", ".join(peers.MODELS)
    )
    p.add_argument("--img_size", type=int, default=224, help="side of the images in pixels")
    p.add_argument("--batch_size", type=int, default=32, help="images of one step")
    p.add_argument("--gradient_accumulation_steps", type=int, default=1, help="micro-batches of that batch")
    p.add_argument("--dropout", type=float, default=0.1, help="rate, of all contenders")
    p.add_argument(
        "--fp16_opt_level", nargs="+", choices=OPT_LEVELS, default=["O2"],
        help="ours; the first is compared: O0 with peers in float32, the others with peers in half precision",
    )  # fmt: skip
    p.add_argument("--memory", action="store_true", help="also measure peak memory, each in a fresh process")
    p.add_argument("--compile", action="store_true", help="ours with --compile too, and peers may try it (minutes)")
    p.add_argument("--only", nargs="+", default=[], metavar="NAME", help="peers, or 'plain', besides ours")
    p.add_argument("--one_process", action="store_true", help="all in this process, process-wide settings included")
    common.add_flags(p, rounds=11)
    return p


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    p = make_parser()
    args = p.parse_args(argv)
    common.check_flags(p, args, "img_size", "batch_size", "gradient_accumulation_steps")
    if args.batch_size % args.gradient_accumulation_steps:
        p.error("--batch_size is not a multiple of --gradient_accumulation_steps")
    try:
        CONFIGS[args.model_type].check_img_size(args.img_size)
    except ValueError as e:
        p.error(str(e))
    setting = peers.Setting(args.model_type, args.img_size, args.batch_size, args.gradient_accumulation_steps,
                      args.dropout, args.device)  # fmt: skip
    torch.set_num_threads(args.threads)
    print(common.hardware(args.threads, args.device))
    split = f" in {setting.num_micro_batches} micro-batches" if setting.num_micro_batches > 1 else ""
    print(f"{args.model_type}, {args.img_size} px, batch {args.batch_size}{split}, dropout {args.dropout}, "
          f"{args.rounds} rounds", flush=True)  # fmt: skip
    rows = make_rows(setting, args)
    peak = peaks(rows, setting, args.quick)
    with common.crew({row.name: row.job for row in rows}, args.one_process) as ready:
        secs = common.take_turns({name: contender.run for name, contender in ready.items()}, args.rounds)
        notes = {name: contender.note for name, contender in ready.items()}
    for dtype, again in peaks(rows, setting, args.quick).items():
        peak[dtype] = max(peak[dtype], again)
    memory = measure_memory(rows, setting, notes) if args.memory else {}
    flops = flops_of_step(setting.config, args.img_size, peers.NUM_CLASSES, args.batch_size)
    print("; ".join(f"matrix products in {str(dtype).removeprefix('torch.')}: {rate / 1e9:,.0f} GFLOP/s"
                    for dtype, rate in peak.items()) + f"; one step: {flops / 1e9:,.1f} GFLOP")  # fmt: skip
    speeds = {name: common.Speed(taken, args.batch_size) for name, taken in secs.items()}
    report(rows, speeds, peak, flops, notes, memory)


if __name__ == "__main__":
    main()
