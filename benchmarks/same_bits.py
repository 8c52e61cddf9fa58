"""Compares two revisions of this repository: the same commands must give the same losses and weights, bit for bit.

    python -m benchmarks.same_bits 0652f6f            # against the working tree
    python -m benchmarks.same_bits 0652f6f v2 --cases "float32" "two ranks"

Each case is trained by ``train.py`` of either revision, in folders and processes of their own and with one thread.
Compared are the metrics of every step, the best weights, and the weights and momentum of the last training state,
whatever the state's layout.  The exit code is 1 if anything differs.

This module must import nothing of what it compares.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import common

REPOSITORY = Path(__file__).resolve().parent.parent
OLD_FILES = REPOSITORY / "tests" / "data" / "old"
WORKING_TREE = "."
METRICS = ("train/loss", "train/lr", "test/loss", "test/accuracy")
LAUNCHER = ["-m", "torch.distributed.run", "--standalone"]
#: Variables by which a launcher would tell a run that it is one of several.
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "MASTER_", "TORCHELASTIC_")
FLAGS = [
    "--name", "run", "--dataset", "digits", "--device", "cpu", "--img_size", "32", "--dropout", "0.1",
    "--gradient_accumulation_steps", "2", "--warmup_steps", "3", "--learning_rate", "0.1", "--eval_every", "5",
    "--log_every", "1", "--num_workers", "0", "--num_steps", "16", "--train_batch_size", "16",
]  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A training that both revisions do.

    Attributes:
        flags: beside those of all cases.
        ranks: that share the batch.
        resumed: stopped by SIGTERM once a state is saved, then resumed.
        taken_over: the second revision resumes from the first's state.
        old: name of the run of tests/data/old that is resumed, with its own flags.
    """

    flags: tuple[str, ...] = ()
    ranks: int = 1
    resumed: bool = False
    taken_over: bool = False
    old: str = ""


BFLOAT16 = ("--amp_dtype", "bfloat16")  # whatever this processor is faster with
CASES = {
    "float32": Case(),
    "bfloat16 O1": Case(("--fp16", "--fp16_opt_level", "O1", *BFLOAT16)),
    "bfloat16 O2": Case(("--fp16", *BFLOAT16)),
    "float16 O2": Case(("--fp16", "--amp_dtype", "float16")),
    "float16 O2, skipped steps": Case(old="float16_skipped"),
    "resumed": Case(("--save_every", "2"), resumed=True),
    "resumed by the second": Case(("--save_every", "2"), resumed=True, taken_over=True),
    "resumed, O2": Case(("--save_every", "2", "--fp16", *BFLOAT16), resumed=True),
    "two ranks": Case(ranks=2),
}


# ---- training ----


def check_out(revision: str, folder: Path) -> Path:
    """Writes a revision's files into a new folder, and returns it; the working tree is used where it is.

    Raises:
        ValueError: git knows no such revision.
    """
    if revision == WORKING_TREE:
        return REPOSITORY
    command = ["git", "-C", str(REPOSITORY), "archive", f"{revision}^{{commit}}"]
    archive = subprocess.run(command, capture_output=True)
    if archive.returncode:
        raise ValueError(f"git archive {revision}: {archive.stderr.decode().strip()}")
    folder.mkdir()
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)
    return folder


def run_train(tree: Path, folder: Path, flags: list[str], ranks: int, stop: bool = False) -> None:
    """Runs ``train.py`` of a revision; with ``stop``, until it has saved a state and SIGTERM has stopped it.

    Raises:
        RuntimeError: it failed, or ended before it could be stopped.
    """
    launcher = [*LAUNCHER, f"--nproc_per_node={ranks}"] if ranks > 1 else []
    kept = {name: x for name, x in os.environ.items() if not name.startswith(LAUNCHER_VARIABLES)}
    env = {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tree)}
    command = [sys.executable, *launcher, str(tree / "train.py"), *flags]
    with (
        open(folder / "output.txt", "w+") as f,
        subprocess.Popen(command, cwd=folder, env=env, stdout=f, stderr=f) as p,
    ):
        if stop:
            while p.poll() is None and not list(folder.glob("output/*_last.pt")):
                time.sleep(0.002)
            p.terminate()
        status, expected = p.wait(), 128 + signal.SIGTERM if stop else 0
        if status != expected:
            f.seek(0)
            last_line = (f.read().strip().splitlines() or [""])[-1]
            raise RuntimeError(f"exit code {status}, expected {expected}: {last_line}")


def train(case: Case, tree: Path, folder: Path, flags: list[str], stopped: Path) -> None:
    """Trains a case to its end in a new folder, or from ``stopped``: a folder where a run was stopped, or will be.

    Raises:
        RuntimeError: a run failed.
    """
    if not stopped.exists():
        stopped.mkdir(parents=True)
        os.symlink(tree / "checkpoint", stopped / "checkpoint")
        if case.old:
            shutil.copytree(OLD_FILES / "output", stopped / "output", ignore=lambda _, names: [
                name for name in names if not name.startswith(f"{case.old}_")])  # fmt: skip
        if case.resumed:
            run_train(tree, stopped, flags, case.ranks, stop=True)
    shutil.copytree(stopped, folder, symlinks=True)
    run_train(tree, folder, flags, case.ranks)


# ---- comparing ----


def read_metrics(folder: Path) -> dict[tuple[int, str], Tensor]:
    """Returns the values of ``METRICS`` by step and tag, of the one run in a folder."""
    (path,) = folder.glob("logs/*/metrics.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {(x["step"], key): torch.tensor(x[key], dtype=torch.float64) for x in lines for key in METRICS if key in x}


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Returns the best weights by name, the state's weights by name, and its momentum in the model's order."""
    (best,), (last,) = folder.glob("output/*_checkpoint.bin"), folder.glob("output/*_last.pt")
    state = torch.load(last, map_location="cpu", weights_only=True)
    weights = max((x for x in dicts_in(state) if all(isinstance(v, Tensor) for v in x.values())), key=len)
    momentum = [x["momentum_buffer"] for x in dicts_in(state) if "momentum_buffer" in x]
    if len(momentum) < len(weights):
        raise ValueError(f"{last} holds {len(weights)} weights, but the momentum of {len(momentum)}")
    return {
        **{f"best {k}": x for k, x in torch.load(best, map_location="cpu", weights_only=True).items()},
        **{f"last {k}": x for k, x in weights.items()},
        **{f"momentum {i}": x for i, x in enumerate(momentum)},
    }


def dicts_in(value: Any) -> Iterator[dict]:
    """Gives every dictionary in nested dictionaries and lists, itself included."""
    if isinstance(value, dict):
        yield value
    if isinstance(value, dict | list | tuple):
        for x in value.values() if isinstance(value, dict) else value:
            yield from dicts_in(x)


def difference(a: Tensor | None, b: Tensor | None) -> float:
    """Returns 0 for equal bits, else the largest difference; infinite where one lacks or has another shape or type."""
    if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    if torch.equal(*(x.contiguous().view(-1).view(torch.uint8) for x in (a, b))):
        return 0.0
    value = float((a.double() - b.double()).abs().max())
    return value if value > 0 else float("inf")  # also for NaN, and for zeros of other signs


def largest(one: Mapping[Any, Tensor], other: Mapping[Any, Tensor]) -> float:
    """Returns the largest difference between what has the same name; infinite where only one has it."""
    return max(difference(one.get(key), other.get(key)) for key in {**one, **other})


def compare(one: Path, other: Path) -> tuple[float, float]:
    """Returns the largest differences of what two runs left: of the metrics, and of the weights and momentum."""
    return largest(read_metrics(one), read_metrics(other)), largest(read_tensors(one), read_tensors(other))


def row_of(name: str, trees: list[Path], work: Path, flags: list[str]) -> tuple[list[str], bool]:
    """Trains a case under both revisions; returns its row of the table, and if both agree."""
    case, folders = CASES[name], [work / name / "first", work / name / "second"]
    print(f"Training {name}", file=sys.stderr, flush=True)
    if case.old:
        flags = json.loads((OLD_FILES / "expected.json").read_text())[case.old]["flags"]
    try:
        for tree, folder in zip(trees, folders):
            begun_by = folders[0] if case.taken_over else folder
            train(case, tree, folder, [*flags, *case.flags], begun_by.with_name(f"{begun_by.name}, stopped"))
        both = compare(*folders)
        steps = max(step for step, _ in read_metrics(folders[0]))
    except (RuntimeError, ValueError) as e:
        return [name, "-", "-", "-", str(e)], False
    return [name, str(steps), *("NO" if x else "yes" for x in both), f"{max(both):.2g}"], not any(both)


# ---- the command line ----


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    p = argparse.ArgumentParser(
        prog="benchmarks.same_bits", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("first", metavar="REV", help="a commit, tag or branch; . is the working tree")
    p.add_argument("second", metavar="REV", nargs="?", default=WORKING_TREE, help="by default the working tree")
    p.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=", ".join(CASES))
    p.add_argument("--model_type", choices=("ViT-demo", "testing"), default="ViT-demo")
    return p


def main(argv: list[str] | None = None) -> int:
    """Prints a table; returns 1 if anything differs."""
    p = make_parser()
    args = p.parse_args(argv)
    pretrained = "checkpoint/ViT-demo.npz" if args.model_type == "ViT-demo" else ""
    flags = [*FLAGS, "--model_type", args.model_type, "--pretrained_dir", pretrained]
    with tempfile.TemporaryDirectory() as work:
        try:
            trees = [check_out(args.first, Path(work, "tree 1")), check_out(args.second, Path(work, "tree 2"))]
        except ValueError as e:
            p.error(str(e))
        rows = [row_of(name, trees, Path(work, "runs"), flags) for name in args.cases]
    print(common.hardware(1, "cpu"))
    first, second = ("the working tree" if x == WORKING_TREE else x for x in (args.first, args.second))
    print(f"{first} against {second}, {args.model_type} on digits, --dropout 0.1, one thread a process")
    common.print_table(["case", "steps", "losses equal", "weights equal", "largest difference"], [x for x, _ in rows])
    return 0 if all(same for _, same in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
