"""Trains what others have published figures of, and puts the results beside theirs.

    python -m tools.reproduce --list
    python -m tools.reproduce --rows demo
    python -m tools.reproduce --rows 'predecessor-cifar10-*' -- --fp16 --gradient_accumulation_steps 8

Runs train.py once for each row, one after the other, and writes output/results.json and results.md
after each.  The same command resumes: it skips rows that are done, and continues the one that was stopped.
Flags after -- are given to train.py as they are.  All rows together take a GPU weeks.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from types import FrameType
from typing import Any

import torch

if not __package__:  # run as a file, from any folder
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))

from models.commands import own_path, tool_command, train_command
from models.configs import DEMO, GOOGLE_NAMES
from models.published import file_name
from tools import _cli
from tools import _results as results
from tools._published_results import ROWS, Row
from utils import args as flags
from utils import files, hardware, log_files, log_folder
from utils.errors import UserError
from utils.run_state import RunPaths
from utils.signals import SIGNALS

TRAIN = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "train.py")
UPSTREAM = "imagenet21k"
#: Flags that decide on a result and yet may be given after --: a row is the same training with them.
FREE_FLAGS = {"seed", "eval_every", "zero_head", "fp16", "fp16_opt_level", "amp_dtype", "amp_backend", "loss_scale"}
#: Flags that make a row the training it is, or that this tool gives itself.
OWN_FLAGS = [
    *(f"--{flag.name}" for flag in flags.FLAGS if flag.decides == "result" and flag.name not in FREE_FLAGS),
    "--name", "--output_dir", "--log_dir", "--resume", "--eval_only", "--load_model_dir", "--help",
]  # fmt: skip


def choose(patterns: list[str] | None) -> list[Row]:
    """Returns the rows that names or patterns mean, in the order of the list; all without any.

    Raises:
        UserError: a pattern means none.
    """
    for pattern in patterns or ():
        if not fnmatch.filter(ROWS, pattern):
            raise UserError(f"--rows {pattern} is none of the rows; --list prints their names")
    return [row for name, row in ROWS.items() if not patterns or any(fnmatch.fnmatch(name, p) for p in patterns)]


# ---- the weights and the command of a row ----


def weights(row: Row, folder: str) -> str:
    """Returns the path of a row's pretrained weights or, if they are not there, the one tools.download gives them."""
    if row.model_type == DEMO:
        return os.path.join(folder, f"{DEMO}.npz")
    names = dict.fromkeys((row.model_type, GOOGLE_NAMES.get(row.model_type, row.model_type)))
    candidates = [*(file_name(UPSTREAM, name) for name in names), *(f"{name}.npz" for name in names)]
    paths = [os.path.join(folder, candidate) for candidate in candidates]
    return next((path for path in paths if os.path.isfile(path)), paths[0])


def check_weights(rows: list[Row], folder: str) -> None:
    """Raises UserError with the command that downloads what is missing, if anything is."""
    missing = {weights(row, folder): row.model_type for row in rows}
    missing = {path: model for path, model in missing.items() if not os.path.isfile(path)}
    if not missing:
        return
    problem = f"there is no file {', '.join(missing)}"
    models = [model for model in missing.values() if model != DEMO]
    if not models:
        own = shlex.quote(own_path("checkpoint"))
        raise UserError(f"{problem}; it comes with this repository: give --checkpoint_dir {own}")
    to = [] if os.path.normpath(folder) == "checkpoint" else ["--to", folder]
    raise UserError(f"{problem}; download with: {tool_command('download', *models, *to)}")


def check_extra(extra: list[str]) -> None:
    """Raises UserError for a flag after -- that would make another training of a row."""
    for word in extra:
        flag = word.split("=")[0]
        owned = [own for own in OWN_FLAGS if flag.startswith("--") and own.startswith(flag)]
        if owned or word[:2] in ("-v", "-h"):
            raise UserError(f"{word} after -- makes another training of a row; give train.py's other flags only")


def run_name(row: Row) -> str:
    """Returns the --name of a row's training."""
    return f"reproduce-{row.name}"


def command(row: Row, args: argparse.Namespace, extra: list[str]) -> list[str]:
    """Returns the command line of train.py for a row."""
    given = {
        "--name": run_name(row), "--dataset": row.dataset, "--model_type": row.model_type,
        "--pretrained_dir": weights(row, args.checkpoint_dir), "--img_size": row.img_size,
        "--train_batch_size": row.batch_size, "--num_steps": row.num_steps, "--output_dir": args.output_dir,
        "--log_dir": args.log_dir,
    }  # fmt: skip
    words = [str(word) for pair in given.items() for word in pair]
    if "--learning_rate" not in row.flags:
        words += ["--learning_rate", "0.03"]
    return [*words, "--weight_decay", "0", *row.flags, *(["--resume", "none"] if args.again else []), *extra]


# ---- running ----


class Child:
    """A process of its own session: signals of the terminal or a scheduler reach it through this one only."""

    def __init__(self) -> None:
        self.signal = 0
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> Child:
        caught = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores one
        self._previous = {number: signal.signal(number, self._pass_on) for number in caught}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        if self._process is not None and self._process.poll() is None:
            # Each makes train.py finish the step in hand, and these two nobody starts it to ignore.
            self._process.send_signal(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)

    def run(self, words: list[str]) -> int:
        """Runs a command to its end and returns its exit code."""
        self._process = subprocess.Popen(words, stdin=subprocess.DEVNULL, start_new_session=True)
        if self.signal:
            self._pass_on(self.signal, None)
        return self._process.wait()


def reproduce(args: argparse.Namespace, rows: list[Row], extra: list[str]) -> int:
    """Trains the rows that are not done; returns the exit code: the worst of all."""
    paths = [os.path.join(args.output_dir, name) for name in ("results.json", "results.md")]
    worst = 0
    with Child() as child:
        for number, row in enumerate(rows, 1):
            record, title = results.read(paths[0]).get(row.name, {}), f"[{number}/{len(rows)}] {row.name}"
            if record.get("status") == "done" and not args.again:  # maybe by another process meanwhile
                print(f"{title} is done: {record['accuracy']:.2f} % (--again trains it anew)")
                continue
            words = command(row, args, extra)
            print(f"{title}\n{train_command(*words)}", flush=True)
            spent, start = time_spent(row, args, record), time.perf_counter()
            code = child.run([sys.executable, TRAIN, *words])
            secs = None if spent is None else round(spent + time.perf_counter() - start, 2)
            record = outcome(row, args, words, code, child.signal, secs)
            results.keep(args.output_dir, row.name, record, ROWS)
            result = record["status"] if record["accuracy"] is None else f"{record['accuracy']:.2f} %"
            print(f"{title}: {result}, published {row.accuracy:.2f} %; see {paths[1]}", flush=True)
            if child.signal:
                return 128 + child.signal
            if code == 2:  # the other rows' flags are wrong in the same way
                return 2
            worst = max(worst, 0 if record["status"] == "done" else 1)
    return worst


def time_spent(row: Row, args: argparse.Namespace, record: dict[str, Any]) -> float | None:
    """Returns the seconds that earlier starts of a row took; None if there were some that nobody measured."""
    if args.again:
        return 0.0
    if record:
        return record["secs"]
    return None if os.path.exists(os.path.join(args.output_dir, f"{run_name(row)}_last.pt")) else 0.0


def outcome(
    row: Row, args: argparse.Namespace, words: list[str], code: int, signal_number: int, secs: float | None
) -> dict[str, Any]:
    """Returns the record of a row's training, for results.json."""
    accuracies = read_accuracies(row, args) if code == 0 else []
    device = ""
    if code != 2:  # else --device may be what is wrong
        p = argparse.ArgumentParser(add_help=False)
        p.add_argument("--device", default="auto")
        kind = hardware.device_type(p.parse_known_args(words)[0].device)
        device = hardware.device_name(torch.device(kind))
    return {
        "status": "done" if accuracies else "stopped" if signal_number else "failed",
        "accuracy": max(accuracies, default=None),
        "last_accuracy": accuracies[-1] if accuracies else None,
        "secs": secs,
        "command": train_command(*words),
        "hardware": device,
        "versions": hardware.versions(),
        "published": {"source": row.source, **{k: v for k, v in asdict(row).items() if k != "flags"}},
    }


def read_accuracies(row: Row, args: argparse.Namespace) -> list[float]:
    """Returns the accuracies of a finished training, in percent; none, and an error in one line, without its logs."""
    folder = log_folder.find(RunPaths(args.output_dir, run_name(row), args.log_dir)).log_dir
    try:
        lines = log_files.read_lines(folder)
        return [round(100 * line["test/accuracy"], 4) for line in lines if "test/accuracy" in line]
    except (OSError, ValueError) as e:
        _cli.fail("reproduce", f"{row.name} is trained, but {folder} cannot be read ({e}); --again trains it anew", 1)
        return []


# ---- the command line ----


def print_list(rows: list[Row], known: results.Results) -> None:
    """Prints the rows, their published results, and how far they are here."""
    width = max(len(row.name) for row in rows)
    print(f"{'row':{width}}  published %         s  here")
    for row in rows:
        record = known.get(row.name, {})
        done = f"{record['accuracy']:.2f} %" if record.get("status") == "done" else record.get("status", "")
        print(f"{row.name:{width}}  {row.accuracy:11.2f}  {results.seconds(row.secs):>8}  {done}".rstrip())


class Parser(_cli.Parser):
    """Leaves the flags after -- as they are: they are train.py's."""

    def parse_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def,override]
        words = list(sys.argv[1:] if args is None else args)
        at = words.index("--") if "--" in words else len(words)
        namespace = super().parse_args(words[:at], namespace)
        namespace.extra = words[at + 1 :]
        return namespace


def make_parser() -> _cli.Parser:
    """Returns the parser of the command line."""
    p = Parser("reproduce", __doc__)
    p.add_argument("--rows", nargs="+", metavar="NAME", help="names or patterns of --list; all by default")
    p.add_argument("--list", action="store_true", help="print the rows and their results so far")
    p.add_argument("--dry_run", action="store_true", help="print the commands, run nothing")
    p.add_argument("--again", action="store_true", help="train rows anew that are done or were stopped")
    p.add_argument("--checkpoint_dir", default="checkpoint", help="where the pretrained weights are")
    p.add_argument("--output_dir", default="output", help="where checkpoints and results are written")
    p.add_argument("--log_dir", default="logs", help="where the trainings' logs are written")
    return p


def run(args: argparse.Namespace) -> int:
    """Does what the flags ask for; returns the exit code.

    Raises:
        UserError: the user got something wrong.
        OSError: the results could not be written.
    """
    rows = choose(args.rows)
    check_extra(args.extra)
    known = results.read(os.path.join(args.output_dir, "results.json"))
    if args.list:
        print_list(rows, known)
        return 0
    if args.dry_run:
        for row in rows:
            print(train_command(*command(row, args, args.extra)))
        return 0
    to_do = [row for row in rows if args.again or known.get(row.name, {}).get("status") != "done"]
    check_weights(to_do, args.checkpoint_dir)
    files.check_writable(args.output_dir)
    return reproduce(args, rows, args.extra)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    args = make_parser().parse_args(argv)
    return _cli.run("reproduce", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
