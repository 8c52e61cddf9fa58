"""What a second process brings: 1 process x 2 threads against 2 processes x 1 thread, at the same total batch.

    python -m benchmarks.once.scaling [--model_type ViT-S_16] [--img_size 64] [--batch_size 16] [--processes 2]

The processes reduce their gradients by Gloo over this machine's loopback, as ``torchrun --nproc_per_node=2
train.py --device cpu`` does.  The two sides take turns in one run.  Then the profiler tells, for some
updates of the second, how long reductions took and which share of that time lay inside the backward pass: hidden
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

from benchmarks import common, ours, peers
from models.configs import CONFIGS
from utils import hardware

REDUCTION, BACKWARD = "gloo:all_reduce", "autograd::engine::evaluate_function"
Span = tuple[float, float]


class Member:
    """One process of several that train together; after its turns, one more looks at the updates by the profiler.

    Args:
        setting: of the measurement; ``batch_size`` is this process's.
        env: what a launcher would set.
        turns, updates: how many, and the updates of each.
    """

    def __init__(self, setting: peers.Setting, env: dict[str, str], turns: int, updates: int) -> None:
        os.environ.update(env)
        model, precision = ours.build(setting.model_type, setting.img_size, setting.dropout, "cpu", "O0")
        self._model, self._parts, self._steps = ours.Updates(model, precision), setting.parts(), itertools.count(1)
        self.note: tuple[str, ...] = ("as train.py",)
        self._turns, self._updates = turns, updates
        for _ in range(2):  # PyTorch groups the gradients anew after the first
            self._update()

    def _update(self) -> None:
        self._model.update(next(self._steps), peers.LEARNING_RATE, self._parts, 1)

    def run(self) -> Any:
        """Seconds of one update; in the last turn what ``_profile`` gives."""
        self._turns -= 1
        if self._turns < 0:
            return self._profile()
        return common.timed(self._update, self._updates, "cpu")

    def _profile(self) -> tuple[float, ...]:
        """Seconds of an update, of reductions in it, and of those outside the backward pass: medians."""
        totals = []
        for _ in range(self._updates):
            with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as profile:
                secs = common.timed(self._update, 1, "cpu")
            spans: dict[str, list[Span]] = {REDUCTION: [], BACKWARD: []}
            for event in profile.events():
                for name, found in spans.items():
                    if event.name.startswith(name):
                        found.append((event.time_range.start * 1e-6, event.time_range.end * 1e-6))
            totals.append((secs, *communication(spans[REDUCTION], spans[BACKWARD])))
        return tuple(statistics.median(column) for column in zip(*totals))


class Team:
    """Several members that take their turns at the same time; a turn takes as long as the slowest's."""

    def __init__(self, setting: peers.Setting, processes: int, threads: int, turns: int, updates: int) -> None:
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._pool = ThreadPoolExecutor(processes)
        jobs = []
        for rank in range(processes):
            env = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE":
                   str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self._store.port),
                   "TORCHELASTIC_USE_AGENT_STORE": "True", "OMP_NUM_THREADS": str(threads)}  # fmt: skip
            build = functools.partial(Member, setting, env if processes > 1 else {}, turns, updates)
            jobs.append(common.Job(build, ("torch",), "cpu", threads))
        self._members = list(self._pool.map(common.Remote, jobs))
        self.note = self._members[0].note

    def all(self) -> list[Any]:
        """What each member's turn gives."""
        return list(self._pool.map(lambda member: member.run(), self._members))

    def run(self) -> float:
        """Seconds of one update."""
        return max(self.all())

    def close(self) -> None:
        """Ends the processes, all at once, as they leave their group together."""
        list(self._pool.map(lambda member: member.close(), self._members))
        self._pool.shutdown()


def union(spans: list[Span]) -> list[Span]:
    """The same time without overlaps."""
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def communication(reductions: list[Span], backward: list[Span]) -> tuple[float, float]:
    """Seconds in which something was being reduced, and those of them outside of the backward pass.

    The backward pass is all time from its first operation's begin to its last one's end.
    """
    begin, end = min(start for start, _ in backward), max(end for _, end in backward)
    merged = union(reductions)
    whole = sum(b - a for a, b in merged)
    inside = sum(max(min(b, end) - max(a, begin), 0) for a, b in merged)
    return whole, whole - inside


def plural(number: int, what: str, ending: str = "s") -> str:
    """1 thread, 2 threads."""
    return f"{number} {what}{ending if number != 1 else ''}"


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description="One process with all threads against several with their share.")
    p.add_argument("--model_type", choices=CONFIGS, default="ViT-S_16", metavar="MODEL", help=", ".join(CONFIGS))
    p.add_argument("--img_size", type=int, default=64, help="side of the pictures in pixels")
    p.add_argument("--batch_size", type=int, default=16, help="pictures of one update, of all processes")
    p.add_argument("--processes", type=int, default=2, help="of the second side")
    p.add_argument("--updates", type=int, default=3, help="of one turn")
    common.add_flags(p, rounds=5)
    p.set_defaults(threads=hardware.num_cpus())
    return p


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    p = make_parser()
    args = p.parse_args(argv)
    common.check_flags(p, args, "img_size", "batch_size", "processes", "updates")
    if args.device != "cpu":
        p.error("--device cuda: this measures processes on one machine's processors")
    if args.batch_size % args.processes:
        p.error(f"--batch_size {args.batch_size} is not a multiple of --processes {args.processes}")
    try:
        CONFIGS[args.model_type].check_img_size(args.img_size)
    except ValueError as e:
        p.error(str(e))
    share = max(args.threads // args.processes, 1)
    sides = {}
    for processes, threads in ((1, args.threads), (args.processes, share)):
        sides[f"{plural(processes, 'process', 'es')} x {plural(threads, 'thread')}"] = (processes, threads)
    print(common.hardware(args.threads, "cpu"))
    print(f"{args.model_type}, {args.img_size} px, {args.batch_size} pictures an update, float32, dropout 0, "
          f"{args.rounds} rounds of {args.updates} updates", flush=True)  # fmt: skip

    with contextlib.ExitStack() as held:
        teams = {}
        for name, (processes, threads) in sides.items():
            setting = peers.Setting(args.model_type, args.img_size, args.batch_size // processes, 1, 0.0, "cpu")
            team = teams[name] = Team(setting, processes, threads, args.rounds, args.updates)
            held.callback(teams[name].close)
        secs = common.take_turns({name: team.run for name, team in teams.items()}, args.rounds)
        profiled = team.all() if args.processes > 1 else []
    speeds = {name: common.Speed(taken, args.batch_size) for name, taken in secs.items()}
    first = next(iter(speeds.values())).median
    common.print_table(
        ["", "images/s", "slowest - fastest", "of the first"],
        [[name, common.number(s.median), s.spread, f"{s.median / first:.2f}"] for name, s in speeds.items()],
    )
    if not profiled:
        return
    update, reduced, outside = (statistics.median(column) for column in zip(*profiled))
    print(f"under the profiler: an update takes {update * 1e3:.0f} ms; reductions are under way for "
          f"{reduced * 1e3:.0f} ms of it, {(1 - outside / reduced):.0%} of that inside the backward pass")  # fmt: skip


if __name__ == "__main__":
    main()
