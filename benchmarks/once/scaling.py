"""The gain of a second rank: 1 rank x 2 threads against 2 ranks x 1 thread, at the same total batch.

    python -m benchmarks.once.scaling [--model_type ViT-S_16] [--img_size 64] [--batch_size 16] [--ranks 2]

The ranks reduce their gradients by Gloo over this machine's loopback, as ``torchrun --nproc_per_node=2
train.py --device cpu`` does.  The two sides take turns in one run.  Then the profiler tells, for some
steps of the second, how long reductions took and which share of that time lay inside the backward pass: hidden
behind its computation.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import os
import statistics
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch.distributed import TCPStore
from torch.profiler import ProfilerActivity

from benchmarks import common, peers
from models.configs import CONFIGS
from utils import hardware

REDUCTION, BACKWARD = "gloo:all_reduce", "autograd::engine::evaluate_function"
Span = tuple[float, float]


class Member:
    """One rank of several; after its turns, one more looks at the steps by the profiler.

    Args:
        setting: of the measurement; ``batch_size`` is this rank's.
        env: the variables of a launcher.
        turns, steps: how many, and the steps of each.
    """

    def __init__(self, setting: peers.Setting, env: dict[str, str], turns: int, steps: int) -> None:
        os.environ.update(env)
        model, precision = peers.build(setting.model_type, setting.img_size, setting.dropout, "cpu", "O0")
        self._training, self._batch = peers.OurTraining(model, precision), setting.micro_batches()
        self._numbers = itertools.count(1)
        self.note: tuple[str, ...] = ("as train.py",)
        self._turns, self._steps = turns, steps
        for _ in range(2):  # PyTorch groups the gradients anew after the first
            self._step()

    def _step(self) -> None:
        self._training.step(next(self._numbers), peers.LEARNING_RATE, iter(self._batch), 1)

    def run(self) -> Any:
        """Returns the seconds of one step; in the last turn those of ``_profile``."""
        self._turns -= 1
        if self._turns < 0:
            return self._profile()
        return common.timed(self._step, self._steps, "cpu")

    def _profile(self) -> tuple[float, ...]:
        """Returns the seconds of a step, of reductions in it, and of those outside the backward pass: medians."""
        totals = []
        for _ in range(self._steps):
            with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as profile:
                secs = common.timed(self._step, 1, "cpu")
            spans: dict[str, list[Span]] = {REDUCTION: [], BACKWARD: []}
            for event in profile.events():
                for name, kind in spans.items():
                    if event.name.startswith(name):
                        kind.append((event.time_range.start * 1e-6, event.time_range.end * 1e-6))
            totals.append((secs, *communication(spans[REDUCTION], spans[BACKWARD])))
        return tuple(statistics.median(column) for column in zip(*totals))


class Team:
    """Several members that take their turns at the same time; a turn takes as long as the slowest's."""

    def __init__(self, setting: peers.Setting, num_ranks: int, threads: int, turns: int, steps: int) -> None:
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._pool = ThreadPoolExecutor(num_ranks)
        jobs = []
        for rank in range(num_ranks):
            env = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE":
                   str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self._store.port),
                   "TORCHELASTIC_USE_AGENT_STORE": "True", "OMP_NUM_THREADS": str(threads)}  # fmt: skip
            build = functools.partial(Member, setting, env if num_ranks > 1 else {}, turns, steps)
            jobs.append(common.Job(build, ("torch",), "cpu", threads))
        self._members = list(self._pool.map(common.Remote, jobs))
        self.note = self._members[0].note

    def all(self) -> list[Any]:
        """Returns the result of each member's turn."""
        return list(self._pool.map(lambda member: member.run(), self._members))

    def run(self) -> float:
        """Returns the seconds of one step."""
        return max(self.all())

    def close(self) -> None:
        """Ends the processes, all at once, as they leave their group together."""
        list(self._pool.map(lambda member: member.close(), self._members))
        self._pool.shutdown()


def union(spans: list[Span]) -> list[Span]:
    """Returns the same time without overlaps."""
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def communication(reductions: list[Span], backward: list[Span]) -> tuple[float, float]:
    """Returns the seconds in which something was being reduced, and those of them outside of the backward pass.

    The backward pass is all time from its first operation's begin to its last one's end.
    """
    begin, end = min(start for start, _ in backward), max(end for _, end in backward)
    merged = union(reductions)
    whole = sum(b - a for a, b in merged)
    inside = sum(max(min(b, end) - max(a, begin), 0) for a, b in merged)
    return whole, whole - inside


def plural(number: int, noun: str) -> str:
    """Returns "1 thread", "2 threads"."""
    return f"{number} {noun}{'s' * (number != 1)}"


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    p = argparse.ArgumentParser(description="One rank with all threads against several with their share.")
    p.add_argument("--model_type", choices=CONFIGS, default="ViT-S_16", metavar="MODEL", help=", ".join(CONFIGS))
    p.add_argument("--img_size", type=int, default=64, help="side of the images in pixels")
    p.add_argument("--batch_size", type=int, default=16, help="images of one step, of all ranks")
    p.add_argument("--ranks", type=int, default=2, help="of the second side")
    p.add_argument("--steps", type=int, default=3, help="of one turn")
    common.add_flags(p, rounds=5)
    p.set_defaults(threads=hardware.num_cpus())
    return p


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    p = make_parser()
    args = p.parse_args(argv)
    common.check_flags(p, args, "img_size", "batch_size", "ranks", "steps")
    if args.device != "cpu":
        p.error("--device cuda: this measures ranks on one machine's processors")
    if args.batch_size % args.ranks:
        p.error(f"--batch_size {args.batch_size} is not a multiple of --ranks {args.ranks}")
    try:
        CONFIGS[args.model_type].check_img_size(args.img_size)
    except ValueError as e:
        p.error(str(e))
    share = max(args.threads // args.ranks, 1)
    sides = {}
    for num_ranks, threads in ((1, args.threads), (args.ranks, share)):
        sides[f"{plural(num_ranks, 'rank')} x {plural(threads, 'thread')}"] = (num_ranks, threads)
    print(common.hardware(args.threads, "cpu"))
    print(f"{args.model_type}, {args.img_size} px, {args.batch_size} images a step, float32, dropout 0, "
          f"{args.rounds} rounds of {args.steps} steps", flush=True)  # fmt: skip

    with contextlib.ExitStack() as held:
        teams = {}
        for name, (num_ranks, threads) in sides.items():
            setting = peers.Setting(args.model_type, args.img_size, args.batch_size // num_ranks, 1, 0.0, "cpu")
            team = teams[name] = Team(setting, num_ranks, threads, args.rounds, args.steps)
            held.callback(teams[name].close)
        secs = common.take_turns({name: team.run for name, team in teams.items()}, args.rounds)
        profiled = team.all() if args.ranks > 1 else []
    speeds = {name: common.Speed(taken, args.batch_size) for name, taken in secs.items()}
    first = next(iter(speeds.values())).median
    common.print_table(
        ["", "images/s", "slowest - fastest", "of the first"],
        [[name, common.number(s.median), s.spread, f"{s.median / first:.2f}"] for name, s in speeds.items()],
    )
    if not profiled:
        return
    step, reduced, outside = (statistics.median(column) for column in zip(*profiled))
    print(f"under the profiler: a step takes {step * 1e3:.0f} ms; reductions are under way for "
          f"{reduced * 1e3:.0f} ms of it, {(1 - outside / reduced):.0%} of that inside the backward pass")  # fmt: skip


if __name__ == "__main__":
    main()
