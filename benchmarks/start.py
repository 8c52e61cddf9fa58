"""Time from the start of the process to the end of the first step.

    python -m benchmarks.start [--model_type ViT-B_32] [--pretrained_dir FILE]

``train.py`` with its real command line, on the digits at 224 px in float32, batch 4, against a plain
script (``benchmarks/plain_start.py``); processes taking turns, after one of each that warms the files.
A --pretrained_dir must be for this size of images; without one, the checkpoint is made for the
purpose: random arrays in the layout of Google's ImageNet-21k files, a head for 21,843 classes and
pre_logits included.  train.py's first step is over when its line appears in metrics.jsonl; the
evaluation that would follow is not waited for.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks import common, peers
from benchmarks.once.agreement import random_checkpoint
from models import npz
from models.configs import CONFIGS

ROOT = Path(__file__).resolve().parent.parent
NUM_PRETRAINED_CLASSES = 21_843
POLL_SECS = 0.002
LIMIT_SECS = 300

Marks = dict[str, float]  # seconds since the process's start at which each phase was over, in order


def make_checkpoint(path: str, model_type: str, img_size: int) -> None:
    """Writes random arrays in the layout of Google's ImageNet-21k files."""
    config = CONFIGS[model_type]
    arrays = random_checkpoint(config, img_size, NUM_PRETRAINED_CLASSES)
    d = config.hidden_size
    arrays["pre_logits/kernel"], arrays["pre_logits/bias"] = np.zeros((d, d), np.float32), np.zeros(d, np.float32)
    with open(path, "wb") as f:
        npz.write(f, arrays)


class Lines(threading.Thread):
    """Reads the lines that a process prints, with the time of each."""

    def __init__(self, process: subprocess.Popen) -> None:
        super().__init__(daemon=True)
        self.timed: list[tuple[float, str]] = []
        self._process = process
        self.start()

    def run(self) -> None:
        for line in self._process.stdout or ():
            self.timed.append((time.perf_counter(), line))


def watch(
    command: list[str], folder: str, threads: int, marks: dict[str, str], last: Callable[[], bool] | None = None
) -> Marks:
    """Runs a process until its last mark, then ends it.

    Args:
        command: with its arguments.
        folder: to run it in.
        threads: of its computations.
        marks: for each phase in order, text of the line that is printed when it is over.
        last: tells if the step after these phases is over, where no line does; or None.

    Raises:
        RuntimeError: the process ended before, or takes too long.
    """
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    start = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        start_new_session=True,
    )  # fmt: skip
    lines = Lines(process)
    try:
        while True:
            ended, over = process.poll() is not None, time.perf_counter()
            if ended:
                lines.join(5)
            found = {m: next((at - start for at, x in lines.timed if text in x), None) for m, text in marks.items()}
            if None not in found.values() and (last is None or last()):
                secs = {name: at for name, at in found.items() if at is not None}
                return secs if last is None else {**secs, "step": over - start}
            if ended or over - start > LIMIT_SECS:
                said = "".join(line for _, line in lines.timed)[-2000:]
                raise RuntimeError(f"{' '.join(command)} ended without a first step:\n{said}")
            time.sleep(POLL_SECS)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its workers too
        process.wait()
        lines.join(5)
        if process.stdout:
            process.stdout.close()


def our_start(npz_path: str, args: argparse.Namespace) -> Marks:
    """Starts train.py up to its first step; its imports are timed in a process that does nothing else."""
    imports = [sys.executable, "-c", "import train; print('imports', flush=True)"]
    command = [
        sys.executable, str(ROOT / "train.py"), "--name", "start", "--dataset", "digits",
        "--model_type", args.model_type, "--pretrained_dir", npz_path, "--img_size", str(args.img_size),
        "--train_batch_size", str(args.batch_size), "--num_steps", "1", "--device", args.device,
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        first = watch(imports, folder, args.threads, {"imports": "imports"})
        metrics = Path(folder, "logs", "start", "metrics.jsonl")

        def stepped() -> bool:
            return metrics.exists() and '"train/loss"' in metrics.read_text()

        started = {"model, weights, data": "***** Running training *****"}
        return first | watch(command, folder, args.threads, started, stepped)


def plain_start(npz_path: str, args: argparse.Namespace) -> Marks:
    """Starts the plain script up to its first step."""
    command = [
        sys.executable, "-m", "benchmarks.plain_start", "--model_type", args.model_type, "--pretrained_dir", npz_path,
        "--digits", str(ROOT / "utils" / "assets" / "digits.npz"), "--img_size", str(args.img_size),
        "--batch_size", str(args.batch_size), "--device", args.device,
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        names = ("imports", "model", "weights", "data", "step")
        return watch(command, folder, args.threads, {name: f"{name}\n" for name in names})


def phases(turns: list[Marks]) -> str:
    """Returns the median time of each phase."""
    names = list(turns[0])
    before = dict(zip(names, ["", *names]))
    medians = {n: statistics.median(t[n] - t.get(before[n], 0.0) for t in turns) for n in names}
    return ", ".join(f"{name} {secs:.2f}" for name, secs in medians.items())


def measure(npz_path: str, args: argparse.Namespace) -> None:
    """Prints the table."""
    turns: dict[str, list[Marks]] = {"ours": [], "plain reference": []}
    starts = {"ours": our_start, "plain reference": plain_start}

    def run(name: str) -> float:
        turns[name].append(starts[name](npz_path, args))
        return turns[name][-1]["step"]

    runs: dict[str, Callable[[], float]] = {name: functools.partial(run, name) for name in starts}
    if not args.quick:
        common.take_turns(runs, 1)  # reads the files into memory, compiles the modules
        for warm in turns.values():
            warm.clear()
    secs = common.take_turns(runs, args.rounds)
    medians = {name: statistics.median(taken) for name, taken in secs.items()}
    common.print_table(
        ["", "start to first step, s", "fastest - slowest", "ours / it", "of these, s"],
        [
            [name, f"{medians[name]:.2f}", f"{min(taken):.2f} - {max(taken):.2f}",
             f"{medians['ours'] / medians[name]:.2f}", phases(turns[name])]
            for name, taken in secs.items()
        ],
    )  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    p = argparse.ArgumentParser(description="Time from the start of the process to the end of the first step.")
    p.add_argument("--model_type", choices=peers.MODELS, default="ViT-B_32", metavar="MODEL")
    p.add_argument("--pretrained_dir", default="", help="an .npz in Google's layout; '': one made for the purpose")
    p.add_argument("--img_size", type=int, default=224, help="side of the images in pixels")
    p.add_argument("--batch_size", type=int, default=4, help="images of the step")
    common.add_flags(p, rounds=5)
    args = p.parse_args(argv)
    common.check_flags(p, args, "img_size", "batch_size")
    args.rounds = 1 if args.quick else args.rounds
    if not common.installed("scipy"):
        p.error("the plain reference needs scipy (requirements-dev.txt)")
    torch.set_num_threads(args.threads)
    print(common.hardware(args.threads, args.device))
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.abspath(args.pretrained_dir) if args.pretrained_dir else os.path.join(folder, "weights.npz")
        if not args.pretrained_dir:
            make_checkpoint(path, args.model_type, args.img_size)
        if not os.path.isfile(path):
            p.error(f"there is no file {args.pretrained_dir}")
        megabytes = os.path.getsize(path) / 1e6
        print(f"{args.model_type} from {megabytes:,.0f} MB, {args.img_size} px, batch {args.batch_size}, float32, "
              f"{args.rounds} rounds", flush=True)  # fmt: skip
        measure(path, args)


if __name__ == "__main__":
    main()
