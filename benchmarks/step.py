"""Speed of one training step, against timm, torchvision, Hugging Face and a plain formulation.

    python -m benchmarks.step [--model_type ViT-B_32] [--batch_size 32] [--dropout 0.1] [--memory] [--search]

One step is: forward, loss, backward (in micro-batches, with --gradient_accumulation_steps), clip to norm 1,
SGD with momentum 0.9.  The images are random and already where they are needed.  The contenders, each in
a process of its own, are this project at several levels of precision and the peers in every number format, at
their fastest settings as recorded in peer_settings.json, which --search tries anew.  Each takes a turn; then a
peer that is behind the fastest leaves, to save minutes and memory, and the others take turns.  Needs timm and
transformers (requirements-dev.txt); a peer that is not installed is left out, and the output says so.

FLOPs of a step are counted by formula, three times the forward pass of the plain formulation
(forward, gradients of the activations, gradients of the weights), a multiply-add as two, per image
with T = 1 + P tokens:

    forward = 2 P (3 patch^2) D + layers (2 T D (4 D + 2 M) + 4 T^2 D) + 2 D classes

They are the same for all contenders: work that one leaves out raises its share of the peak.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from datetime import date
from typing import Any

import torch

from benchmarks import common, peer_settings, peers
from benchmarks.peak import matmul_peaks
from models.configs import CONFIGS, ViTConfig
from utils.precision import OPT_LEVELS

OURS, PLAIN = "ours", "plain reference"
#: A peer that takes so many times as long as the fastest takes no more than one turn.
BEHIND = 1.2


def flops_of_step(config: ViTConfig, img_size: int, num_classes: int, batch_size: int) -> float:
    """Returns the FLOPs of a step by the formula in this module's docstring."""
    patches, d = config.grid_size(img_size) ** 2, config.hidden_size
    tokens = 1 + patches
    block = 2 * tokens * d * (4 * d + 2 * config.mlp_dim) + 4 * tokens**2 * d
    forward = 2 * patches * 3 * config.patch_size**2 * d + config.num_layers * block + 2 * d * num_classes
    return 3.0 * forward * batch_size


def pick_peers(args: argparse.Namespace) -> dict[str, tuple[str, str]]:
    """Returns name and number format of the peers that take part, by both; prints who is not installed."""
    found = []
    for peer, package in peers.PACKAGES.items():
        if common.installed(package):
            found += [(peer, number_format) for number_format in peers.formats(peer, args.device)]
        else:
            print(f"{peer} is left out: {package} is not installed (requirements-dev.txt)")
    names = {", ".join(x): x for x in found}
    return {name: x for name, x in names.items() if not args.only or name.startswith(tuple(args.only))}


def make_job(args: argparse.Namespace, build: Callable, *values: Any, imports: tuple[str, ...] = ()) -> common.Job:
    """Returns how to make a contender, which imports some modules before its memory counts."""
    return common.Job(functools.partial(build, *values), imports, args.device, args.threads)


def search(
    setting: peers.Setting, chosen: Mapping[str, tuple[str, str]], args: argparse.Namespace
) -> peer_settings.Record:
    """Tries the settings of peers, each peer in a process of its own; records the fastest, unless it is --quick."""
    settings = {}
    for name, (peer, number_format) in chosen.items():
        job = make_job(args, peers.fastest_stepper, peer, setting, number_format, 1 if args.quick else 2)
        with common.crew({name: job}, args.one_process) as ready:
            settings[name] = ready[name].note[1:]
        print(f"The fastest setting of {name}: {', '.join(settings[name])}", flush=True)
    versions = {package: common.version(package) for package in ("torch", *peers.PACKAGES.values())}
    record = peer_settings.Record(str(date.today()), f"{setting}, {args.threads} threads", versions, settings)
    if not args.quick:
        peer_settings.write(common.processor(args.device), record)
        print(f"recorded in {peer_settings.PATH}")
    return record


def make_jobs(
    setting: peers.Setting, chosen: Mapping[str, tuple[str, str]], record: peer_settings.Record,
    args: argparse.Namespace,
) -> dict[str, common.Job]:  # fmt: skip
    """Returns the contenders by name, in the table's order; with --compile each but the plain one twice."""
    jobs, dynamo = {}, ("torch._dynamo",)  # which comes with any optimizer of torch, but not with ours
    for level in args.fp16_opt_level:
        jobs[f"{OURS}, {level}"] = make_job(args, peers.our_stepper, setting, level)
        if args.compile:
            job = make_job(args, peers.our_stepper, setting, level, True, imports=dynamo)
            jobs[f"{OURS}, {level}, compiled"] = job
    for name, (peer, number_format) in chosen.items():
        choice, imports = tuple(record.settings.get(name, peers.default_choice(peer))), dynamo + (peers.PACKAGES[peer],)
        values = (peers.peer_stepper, peer, setting, number_format)
        jobs[name] = make_job(args, *values, choice, imports=imports)
        if args.compile:
            jobs[f"{name}, compiled"] = make_job(args, *values, (*choice, peers.COMPILED), imports=imports)
    plain = f"{PLAIN}, float32"
    if not args.only or plain.startswith(tuple(args.only)):
        jobs[plain] = make_job(args, peers.plain_stepper, setting, imports=dynamo)
    return jobs


@contextlib.contextmanager
def heats(
    jobs: Mapping[str, common.Job], one_process: bool
) -> Iterator[tuple[dict[str, common.Contender], dict[str, peers.Choice], dict[str, float]]]:
    """Gives those who are not behind, ready to take turns; of all, their notes and the seconds of one turn."""
    with contextlib.ExitStack() as running:
        ready: dict[str, common.Contender] = {}
        notes, secs, ends = {}, {}, {}
        for name, job in jobs.items():
            ends[name] = running.enter_context(contextlib.ExitStack())
            ready |= ends[name].enter_context(common.crew({name: job}, one_process))
            notes[name], secs[name] = ready[name].note, ready[name].run()
            of_peers = [secs[x] for x in secs if not x.startswith(OURS)]
            for x in [x for x in ready if not x.startswith(OURS) and secs[x] > BEHIND * min(of_peers)]:
                del ready[x]
                ends[x].close()
        yield ready, notes, secs


def peaks(notes: Mapping[str, peers.Choice], setting: peers.Setting, quick: bool) -> dict[torch.dtype, float]:
    """Returns the rate of the best matrix products in each number format that contenders use, FLOP/s."""
    config = setting.config
    tokens = (1 + config.grid_size(setting.img_size) ** 2) * setting.batch_size // setting.num_micro_batches
    dtypes = map(peers.dtype_of, notes.values())
    return matmul_peaks(setting.device, dtypes, tokens, config.hidden_size, config.mlp_dim, quick)


def report(
    speeds: Mapping[str, common.Speed], notes: Mapping[str, peers.Choice], shares: Mapping[str, float],
    memory: Mapping[str, common.Memory],
) -> None:  # fmt: skip
    """Prints the table, and the ratios to the fastest and the leanest peer and to our first level."""
    first = next(iter(speeds))
    header = ["", "precision", "setting", "images/s", "slowest - fastest", f"{first} / it", "share of peak"]
    cells = []
    for name, speed in speeds.items():
        number_format, *choice = notes[name]
        cells.append([name, number_format, ", ".join(choice), common.number(speed.median), speed.spread,
                      f"{speeds[first].times(speed):.2f}", f"{shares[name]:.0%}"])  # fmt: skip
        if memory:
            cells[-1].append(str(memory[name]))
    common.print_table(header + ["peak memory MiB (without imports)"] * bool(memory), cells)
    ours = [name for name in speeds if name.startswith(OURS)]
    if others := [name for name in speeds if name not in ours]:
        best = max(others, key=lambda name: speeds[name].median)
        for name in ours:
            print(f"{name} / the fastest peer in any format ({best}): {speeds[name].times(speeds[best]):.2f}")
    for name in ours[1:]:
        print(f"{name} / {first}: {speeds[name].times(speeds[first]):.2f}")
    if memory and others:
        lean = min(others, key=lambda name: memory[name].peak)
        for name in ours:
            ratio = memory[name].peak / max(memory[lean].peak, 1)
            print(f"peak memory, {name} / the leanest peer in any format ({lean}): {ratio:.2f}")


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
    p.add_argument("--fp16_opt_level", nargs="+", choices=OPT_LEVELS, default=["O0", "O1", "O2"], help="ours")
    p.add_argument("--memory", action="store_true", help="also measure peak memory, each in a fresh process")
    p.add_argument("--compile", action="store_true", help="all but the plain formulation compiled, too (minutes)")
    p.add_argument("--only", nargs="+", default=[], metavar="NAME",
                   help="peers that take part, as the table names them, or the beginning of that")  # fmt: skip
    p.add_argument("--search", action="store_true", help="try the peers' settings and record the fastest (minutes)")
    p.add_argument("--one_process", action="store_true", help="all in this process, process-wide settings included")
    common.add_flags(p, rounds=3)
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
    print(f"{setting}, {args.rounds} rounds; one turn for a peer {BEHIND} times as slow as the fastest", flush=True)
    chosen = pick_peers(args)
    if args.search:
        record = search(setting, chosen, args)
    else:
        record, whose = peer_settings.find(common.processor(args.device))
        print(whose, flush=True)
    jobs = make_jobs(setting, chosen, record, args)
    with heats(jobs, args.one_process) as (ready, notes, once):
        before = peaks(notes, setting, args.quick)
        turns = common.take_turns({name: contender.run for name, contender in ready.items()}, args.rounds)
    peak = {dtype: max(rate, before[dtype]) for dtype, rate in peaks(notes, setting, args.quick).items()}
    memory = {name: common.memory_of(job) for name, job in jobs.items()} if args.memory else {}
    flops = flops_of_step(setting.config, args.img_size, peers.NUM_CLASSES, args.batch_size)
    print("; ".join(f"matrix products in {str(dtype).removeprefix('torch.')}: {rate / 1e9:,.0f} GFLOP/s"
                    for dtype, rate in peak.items()) + f"; one step: {flops / 1e9:,.1f} GFLOP")  # fmt: skip
    speeds = {name: common.Speed(turns.get(name, [secs]), args.batch_size) for name, secs in once.items()}
    rates = {name: speed.median / args.batch_size * flops for name, speed in speeds.items()}
    report(speeds, notes, {name: rate / peak[peers.dtype_of(notes[name])] for name, rate in rates.items()}, memory)


if __name__ == "__main__":
    main()
