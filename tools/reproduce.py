"""Trains what others have published figures of, and puts the results beside theirs.

    python -m tools.reproduce --list
    python -m tools.reproduce --rows demo
    python -m tools.reproduce --rows 'predecessor-cifar10-*' -- --fp16 --gradient_accumulation_steps 8

Runs train.py once for each row, one after the other, and writes output/results.json and results.md
after each.  What is done is skipped, what was stopped goes on: the same command does both.  What comes
after -- is given to train.py as it is.  All rows together take a GPU weeks.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import json
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
from tools._published_results import ROWS, SOURCES, Row
from utils import files, hardware, log_files, report
from utils.errors import UserError

TRAIN = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "train.py")
UPSTREAM = "imagenet21k"
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
#: Flags that make a row what it is, or that this tool gives itself.
OWN_FLAGS = (
    "--name", "--dataset", "--model_type", "--pretrained_dir", "--output_dir", "--img_size", "--train_batch_size",
    "--learning_rate", "--weight_decay", "--num_steps", "--warmup_steps", "--decay_type", "--max_grad_norm",
    "--dropout", "--gelu", "--hflip", "--resume", "--eval_only", "--load_model_dir", "--help",
)  # fmt: skip

#: What results.json has of each row.
KEYS = {"status", "accuracy", "last_accuracy", "secs", "command", "hardware", "published"}
CIFAR = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "digits": "digits"}


def choose(patterns: list[str] | None) -> list[Row]:
    """The rows that names or patterns mean, in the order of the list; all without any.

    Raises:
        UserError: a pattern means none.
    """
    for pattern in patterns or ():
        if not fnmatch.filter(ROWS, pattern):
            raise UserError(f"--rows {pattern} is none of the rows; --list prints their names")
    return [row for name, row in ROWS.items() if not patterns or any(fnmatch.fnmatch(name, p) for p in patterns)]


# ---- what a row needs ----


def weights(row: Row, folder: str) -> str:
    """Where a row's pretrained weights are, or, if they are not there, where tools.download puts them."""
    if row.model_type == DEMO:
        return os.path.join(folder, f"{DEMO}.npz")
    names = dict.fromkeys((row.model_type, GOOGLE_NAMES.get(row.model_type, row.model_type)))
    files = [*(file_name(UPSTREAM, name) for name in names), *(f"{name}.npz" for name in names)]
    paths = [os.path.join(folder, file) for file in files]
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
    """What train.py is to call the run."""
    return f"reproduce-{row.name}"


def command(row: Row, args: argparse.Namespace, extra: list[str]) -> list[str]:
    """The flags of train.py for a row."""
    flags = {
        "--name": run_name(row), "--dataset": row.dataset, "--model_type": row.model_type,
        "--pretrained_dir": weights(row, args.checkpoint_dir), "--img_size": row.img_size,
        "--train_batch_size": row.batch_size, "--num_steps": row.num_steps, "--output_dir": args.output_dir,
    }  # fmt: skip
    words = [str(word) for pair in flags.items() for word in pair]
    if "--learning_rate" not in row.flags:
        words += ["--learning_rate", "0.03"]
    return [*words, "--weight_decay", "0", *row.flags, *(["--resume", "none"] if args.again else []), *extra]


# ---- running ----


class Child:
    """A process of its own session: what the terminal or a scheduler sends reaches it through this one only."""

    def __init__(self) -> None:
        self.signal = 0
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> Child:
        heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores one
        self._previous = {number: signal.signal(number, self._pass_on) for number in heard}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        if self._process is not None and self._process.poll() is None:
            # Both make train.py finish the update in hand; it has no answer to a terminal that is closed.
            self._process.send_signal(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)

    def run(self, words: list[str]) -> int:
        """Runs a command to its end and returns its exit status."""
        self._process = subprocess.Popen(words, stdin=subprocess.DEVNULL, start_new_session=True)
        if self.signal:
            self._pass_on(self.signal, None)
        return self._process.wait()


def reproduce(args: argparse.Namespace, rows: list[Row], extra: list[str]) -> int:
    """Trains the rows that are not done; returns the exit status: the worst of all."""
    path = os.path.join(args.output_dir, "results.json")
    worst = 0
    with Child() as child:
        for number, row in enumerate(rows, 1):
            record = read_results(path).get(row.name, {})  # another process may be at other rows
            if record.get("status") == "done" and not args.again:
                print(f"[{number}/{len(rows)}] {row.name} is done: {record['accuracy']:.2f} % (--again trains it anew)")
                continue
            words = command(row, args, extra)
            print(f"[{number}/{len(rows)}] {row.name}\n{train_command(*words)}", flush=True)
            spent = time_spent(row, args, record)
            start = time.perf_counter()
            status = child.run([sys.executable, TRAIN, *words])
            secs = None if spent is None else round(spent + time.perf_counter() - start, 2)
            record = outcome(row, args, words, status, child.signal, secs)
            keep(args.output_dir, row.name, record)
            found = record["status"] if record["accuracy"] is None else f"{record['accuracy']:.2f} %"
            beside = os.path.join(args.output_dir, "results.md")
            print(
                f"[{number}/{len(rows)}] {row.name}: {found}, published {row.accuracy:.2f} %; see {beside}", flush=True
            )
            if child.signal:
                return 128 + child.signal
            if status == 2:  # the other rows' flags are wrong in the same way
                return 2
            worst = max(worst, 0 if record["status"] == "done" else 1)
    return worst


def time_spent(row: Row, args: argparse.Namespace, record: dict[str, Any]) -> float | None:
    """Seconds that earlier starts of a row took; None if there were some of which nothing is known."""
    if args.again:
        return 0.0
    if record:
        return record["secs"]
    return None if os.path.exists(os.path.join(args.output_dir, f"{run_name(row)}_last.pt")) else 0.0


def outcome(
    row: Row, args: argparse.Namespace, words: list[str], status: int, number: int, secs: float | None
) -> dict[str, Any]:
    """What is kept of a row's training."""
    accuracies = read_accuracies(row) if status == 0 else []
    device = ""
    if status != 2:  # else --device may be what is wrong
        p = argparse.ArgumentParser(add_help=False)
        p.add_argument("--device", default="auto")
        kind = hardware.device_type(p.parse_known_args(words)[0].device)
        device = hardware.device_name(torch.device(kind))
    return {
        "status": "done" if accuracies else "stopped" if number else "failed",
        "accuracy": max(accuracies, default=None),
        "last_accuracy": accuracies[-1] if accuracies else None,
        "secs": secs,
        "command": train_command(*words),
        "hardware": device,
        "versions": report.versions(),
        "published": {"source": row.source, **{k: v for k, v in asdict(row).items() if k != "flags"}},
    }


def read_accuracies(row: Row) -> list[float]:
    """What the evaluations of a finished training found, in percent; nothing, and a word why, without its logs."""
    folder = os.path.join("logs", run_name(row))
    try:
        lines = log_files.read_lines(folder)
        return [round(100 * line["test/accuracy"], 4) for line in lines if "test/accuracy" in line]
    except (OSError, ValueError) as e:
        _cli.fail("reproduce", f"{row.name} is trained, but {folder} cannot be read ({e}); --again trains it anew", 1)
        return []


# ---- results ----


def read_results(path: str) -> dict[str, dict[str, Any]]:
    """The results so far, by the names of their rows.

    Raises:
        UserError: the file holds something else.
    """
    if not os.path.exists(path):
        return {}
    try:
        with open(path, encoding="utf-8") as f:
            rows = json.load(f)["rows"]
        for name, record in rows.items():
            if missing := KEYS - record.keys():
                raise UserError(f"{name} lacks {', '.join(sorted(missing))}")
            if record["status"] == "done":
                float(record["accuracy"])
        as_markdown(rows)  # this tool did not write what it cannot show
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        reason = f"{type(e).__name__}: {e}"
        raise UserError(f"{path} does not hold results of this tool ({reason}); remove or rename it") from e
    return rows


def keep(folder: str, name: str, record: dict[str, Any]) -> None:
    """Adds a row's result to those in the folder, or replaces it; processes at other rows take turns."""
    with open(os.path.join(folder, ".results.lock"), "a", encoding="ascii") as lock:
        with contextlib.suppress(ImportError, OSError):  # not every system has locks, nor every file system
            import fcntl

            fcntl.lockf(lock, fcntl.LOCK_EX)
        write_results(folder, {**read_results(os.path.join(folder, "results.json")), name: record})


def write_results(folder: str, results: dict[str, dict[str, Any]]) -> None:
    """Writes results.json and results.md, each whole or not at all."""
    known = {name: results[name] for name in [*ROWS, *results] if name in results}
    text = json.dumps({"rows": known}, indent=1, ensure_ascii=False)
    files.write_text(os.path.join(folder, "results.json"), text + "\n")
    files.write_text(os.path.join(folder, "results.md"), as_markdown(known))


def as_markdown(results: dict[str, dict[str, Any]]) -> str:
    """The results as tables beside the published figures, a table for each source."""
    parts = ["# Results beside published figures\n\nAccuracies in percent: the best evaluation and the last; times are "
             "train.py's from start to end, with evaluations.\n"]  # fmt: skip
    for source in SOURCES.values():
        rows = {name: r for name, r in results.items() if r["published"]["source"] == source}
        if not rows:
            continue
        parts.append(f"\n## Published by {source}\n\n{table(rows)}")
    return "".join(parts)


def table(results: dict[str, dict[str, Any]]) -> str:
    """Rows of Markdown."""
    lines = [
        "| model | data set | px | steps | batch | accuracy | last | published | difference | time (s) "
        "| published (s) | hardware | command |",
        "| --- " * 13 + "|",
    ]
    for record in results.values():
        p, accuracy = record["published"], record["accuracy"]
        shown = record["status"] if accuracy is None else f"{accuracy:.2f}"
        last = "" if accuracy is None else f"{record['last_accuracy']:.2f}"
        difference = "" if accuracy is None else f"{round(accuracy - p['accuracy'], 2) + 0.0:+.2f}"
        cells = [
            p["model_type"], CIFAR[p["dataset"]], p["img_size"], p["num_steps"], p["batch_size"], shown, last,
            f"{p['accuracy']:.2f}", difference, seconds(record["secs"]), seconds(p["secs"]), record["hardware"],
            f"`{record['command']}`",
        ]  # fmt: skip
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def seconds(secs: float | None) -> str:
    """A time for a table; nothing where it is not known."""
    return "" if secs is None else f"{secs:.2f}"


def print_list(rows: list[Row], results: dict[str, dict[str, Any]]) -> None:
    """Prints the rows, what others published of them, and how far they are here."""
    width = max(len(row.name) for row in rows)
    print(f"{'row':{width}}  published %         s  here")
    for row in rows:
        record = results.get(row.name, {})
        done = f"{record['accuracy']:.2f} %" if record.get("status") == "done" else record.get("status", "")
        print(f"{row.name:{width}}  {row.accuracy:11.2f}  {seconds(row.secs):>8}  {done}".rstrip())


# ---- the command line ----


class Parser(_cli.Parser):
    """Takes what comes after -- as it is: train.py's flags."""

    def parse_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def,override]
        words = list(sys.argv[1:] if args is None else args)
        at = words.index("--") if "--" in words else len(words)
        namespace = super().parse_args(words[:at], namespace)
        namespace.extra = words[at + 1 :]
        return namespace


def make_parser() -> _cli.Parser:
    """Every flag of the command line."""
    p = Parser("reproduce", __doc__)
    p.add_argument("--rows", nargs="+", metavar="NAME", help="names or patterns of --list; all by default")
    p.add_argument("--list", action="store_true", help="print the rows and what is known of them")
    p.add_argument("--dry_run", action="store_true", help="print the commands, run nothing")
    p.add_argument("--again", action="store_true", help="train rows anew that are done or were stopped")
    p.add_argument("--checkpoint_dir", default="checkpoint", help="where the pretrained weights are")
    p.add_argument("--output_dir", default="output", help="where checkpoints and results are written")
    return p


def run(args: argparse.Namespace) -> int:
    """Does what the flags ask for; returns the exit status.

    Raises:
        UserError: the user got something wrong.
        OSError: the results could not be written.
    """
    rows = choose(args.rows)
    check_extra(args.extra)
    results = read_results(os.path.join(args.output_dir, "results.json"))
    if args.list:
        print_list(rows, results)
        return 0
    if args.dry_run:
        for row in rows:
            print(train_command(*command(row, args, args.extra)))
        return 0
    to_do = [row for row in rows if args.again or results.get(row.name, {}).get("status") != "done"]
    check_weights(to_do, args.checkpoint_dir)
    files.check_writable(args.output_dir)
    return reproduce(args, rows, args.extra)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    args = make_parser().parse_args(argv)
    return _cli.run("reproduce", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
