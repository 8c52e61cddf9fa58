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
import fnmatch
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from types import FrameType
from typing import Any

import torch

from models.configs import DEMO, GOOGLE_NAMES, file_name
from tools import cli
from utils import checkpoint, hardware, metrics, report

TRAIN = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "train.py")
UPSTREAM = "imagenet21k"
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
#: Flags that make a row what it is, or that this tool gives itself.
OWN_FLAGS = (
    "--name", "--dataset", "--model_type", "--pretrained_dir", "--output_dir", "--img_size", "--train_batch_size",
    "--learning_rate", "--weight_decay", "--num_steps", "--warmup_steps", "--decay_type", "--max_grad_norm",
    "--dropout", "--gelu", "--hflip", "--resume", "--eval_only", "--load_model_dir", "--help",
)  # fmt: skip

#: Who published a figure, by the beginning of its row's name.
SOURCES = {
    "demo": "this project's README, measured on two cores",
    "predecessor": "the script this project replaces, as its users measured it",
    "reference": "github.com/jeonsworld/ViT-pytorch, README (apex O2)",
    "google": "github.com/google-research/vision_transformer, README",
}
CIFAR = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "digits": "digits"}


@dataclass(frozen=True)
class Row:
    """One training of somebody's, and what came of it.

    Attributes:
        name: of the row, which begins with a key of ``SOURCES``.
        model_type, dataset, img_size, num_steps, batch_size: as the flags.
        accuracy: the published one, in percent.
        secs: the published time, None where none is.
        flags: of train.py, besides those above.
    """

    name: str
    model_type: str
    dataset: str
    img_size: int
    num_steps: int
    batch_size: int
    accuracy: float
    secs: float | None = None
    flags: tuple[str, ...] = ()

    @property
    def source(self) -> str:
        """Who published it."""
        return SOURCES[self.name.split("-")[0]]


# ---- the rows ----

#: The flags of `make demo`; the figures are from a machine with two cores.
DEMO_ROW = Row(
    "demo", DEMO, "digits", 32, 1200, 64, 97.78, 66,
    ("--warmup_steps", "60", "--learning_rate", "0.05", "--eval_every", "400"),
)  # fmt: skip

_PREDECESSOR = (  # model, data set, resolution, steps, accuracy, seconds, batch
    ("ViT-B_32", "cifar10", 224, 1000, 98.89, 2107.74, 512),
    ("ViT-B_32", "cifar10", 384, 1000, 98.65, 3346.43, 512),
    ("ViT-B_32", "cifar10", 384, 10000, 99.00, 32593.36, 512),
    ("ViT-L_32", "cifar10", 224, 1000, 98.83, 4039.10, 512),
    ("ViT-L_32", "cifar10", 384, 1000, 98.72, 4487.46, 256),
    ("ViT-B_32", "cifar100", 224, 1000, 90.74, 1270.46, 512),
    ("ViT-B_32", "cifar100", 384, 1000, 90.61, 3340.64, 512),
    ("ViT-L_32", "cifar100", 224, 1000, 91.95, 2970.06, 512),
    ("ViT-L_32", "cifar100", 384, 10000, 93.39, 45135.64, 256),
)
_REFERENCE = (  # model, data set, resolution, steps, steps of warm-up, accuracy, seconds
    ("ViT-B_16", "cifar10", 224, 10000, 500, 99.08, 11580),
    ("ViT-B_16", "cifar100", 224, 10000, 500, 92.30, 11340),
    ("ViT-L_32", "cifar10", 224, 10000, 500, 99.03, 7860),
    ("ViT-L_32", "cifar100", 224, 10000, 500, 92.76, 7740),
    ("R50-ViT-B_16", "cifar10", 224, 10000, 500, 98.92, None),
    ("R50-ViT-B_16", "cifar100", 224, 10000, 500, 92.31, None),
    ("ViT-B_16", "cifar10", 384, 10000, 500, 99.06, None),
    ("ViT-B_16", "cifar100", 384, 10000, 500, 92.28, None),
    ("R50-ViT-B_16", "cifar10", 384, 10000, 500, 99.04, None),
    ("R50-ViT-B_16", "cifar100", 384, 10000, 500, 91.97, None),
    ("ViT-B_16", "cifar10", 224, 500, 100, 98.59, None),
    ("ViT-B_16", "cifar100", 224, 500, 100, 90.72, None),
    ("ViT-B_16", "cifar10", 224, 1000, 100, 98.78, None),
    ("ViT-B_16", "cifar100", 224, 1000, 100, 92.16, None),
)
_GOOGLE = (  # model; accuracy on CIFAR-10 with dropout 0 and 0.1, on CIFAR-100 with dropout 0 and 0.1
    ("ViT-B_16", 99.02, 98.76, 92.06, 91.92),
    ("ViT-B_32", 98.88, 98.75, 92.31, 92.05),
    ("ViT-L_16", 99.13, 99.14, 92.91, 93.22),
    ("ViT-L_32", 99.06, 99.09, 93.29, 93.34),
    ("R50-ViT-B_16", 98.72, 98.94, 90.88, 92.30),
)


def _published() -> Iterable[Row]:
    yield DEMO_ROW
    for model, data, px, steps, accuracy, secs, batch in _PREDECESSOR:
        yield Row(f"predecessor-{data}-{model}-{px}-{steps}", model, data, px, steps, batch, accuracy, secs)
    for model, data, px, steps, warmup, accuracy, time_taken in _REFERENCE:
        name, flags = f"reference-{data}-{model}-{px}-{steps}", ("--warmup_steps", str(warmup))
        yield Row(name, model, data, px, steps, 512, accuracy, time_taken, flags)
    for model, *accuracies in _GOOGLE:
        kinds = [(data, dropout) for data in ("cifar10", "cifar100") for dropout in ("0", "0.1")]
        for (data, dropout), accuracy in zip(kinds, accuracies):
            as_google = ("--dropout", dropout, "--hflip", "--gelu", "tanh")
            yield Row(
                f"google-{data}-{model}-dropout{dropout}", model, data, 384, 10000, 512, accuracy, None, as_google
            )


ROWS = {row.name: row for row in _published()}


def choose(patterns: list[str] | None) -> list[Row]:
    """The rows that names or patterns mean, in the order of the list; all without any.

    Raises:
        ValueError: a pattern means none.
    """
    for pattern in patterns or ():
        if not fnmatch.filter(ROWS, pattern):
            raise ValueError(f"--rows {pattern} is none of the rows; --list prints their names")
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
    """Raises ValueError with the command that downloads what is missing, if anything is."""
    missing = {weights(row, folder): row.model_type for row in rows}
    missing = {path: model for path, model in missing.items() if not os.path.isfile(path)}
    if not missing:
        return
    problem = f"there is no file {', '.join(missing)}"
    models = [model for model in missing.values() if model != DEMO]
    if not models:
        raise ValueError(f"{problem}; this repository comes with checkpoint/{DEMO}.npz")
    to = [] if os.path.normpath(folder) == "checkpoint" else ["--to", folder]
    raise ValueError(f"{problem}; download with: {shlex.join(['python', '-m', 'tools.download', *models, *to])}")


def check_extra(extra: list[str]) -> None:
    """Raises ValueError for a flag after -- that would make another training of a row."""
    for word in extra:
        flag = word.split("=")[0]
        owned = [own for own in OWN_FLAGS if flag.startswith("--") and own.startswith(flag)]
        if owned or word[:2] in ("-v", "-h"):
            raise ValueError(f"{word} after -- makes another training of a row; give train.py's other flags only")


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
    results, worst = read_results(path), 0
    with Child() as child:
        for number, row in enumerate(rows, 1):
            record = results.get(row.name, {})
            if record.get("status") == "done" and not args.again:
                print(f"[{number}/{len(rows)}] {row.name} is done: {record['accuracy']:.2f} % (--again trains it anew)")
                continue
            words = command(row, args, extra)
            print(f"[{number}/{len(rows)}] {row.name}\npython train.py {shlex.join(words)}", flush=True)
            spent = time_spent(row, args, record)
            start = time.perf_counter()
            status = child.run([sys.executable, TRAIN, *words])
            secs = None if spent is None else round(spent + time.perf_counter() - start, 2)
            results[row.name] = outcome(row, args, words, status, child.signal, secs)
            write_results(args.output_dir, results)
            if child.signal:
                return 128 + child.signal
            if status == 2:  # the other rows' flags are wrong in the same way
                return 2
            worst = max(worst, 1 if status else 0)
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
    accuracies = []
    if status == 0:
        lines = metrics.read_lines(os.path.join("logs", run_name(row)))
        accuracies = [round(100 * line["test/accuracy"], 4) for line in lines if "test/accuracy" in line]
    state = "done" if status == 0 else "stopped" if number else "failed"
    p = argparse.ArgumentParser(add_help=False)
    p.add_argument("--device", default="auto")
    device = torch.device(hardware.device_type(p.parse_known_args(words)[0].device))
    return {
        "status": state,
        "accuracy": max(accuracies, default=None),
        "last_accuracy": accuracies[-1] if accuracies else None,
        "secs": secs,
        "command": f"python train.py {shlex.join(words)}",
        "hardware": hardware.device_name(device),
        "versions": report.versions(),
        "published": {"source": row.source, **{k: v for k, v in asdict(row).items() if k != "flags"}},
    }


# ---- results ----


def read_results(path: str) -> dict[str, dict[str, Any]]:
    """The results so far, by the names of their rows.

    Raises:
        ValueError: the file holds something else.
    """
    if not os.path.exists(path):
        return {}
    try:
        with open(path, encoding="utf-8") as f:
            rows = json.load(f)["rows"]
        for record in rows.values():
            record["status"], record["accuracy"], record["secs"]
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{path} does not hold results of this tool ({e!r}); remove or rename it") from e
    return rows


def write_results(folder: str, results: dict[str, dict[str, Any]]) -> None:
    """Writes results.json and results.md, each whole or not at all."""
    known = {name: results[name] for name in [*ROWS, *results] if name in results}
    text = json.dumps({"rows": known}, indent=1, ensure_ascii=False)
    checkpoint.write_text(os.path.join(folder, "results.json"), text + "\n")
    checkpoint.write_text(os.path.join(folder, "results.md"), as_markdown(known))


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
        "| model | data set | px | steps | batch | accuracy | last | published | difference | time (s) | published "
        "| hardware | command |",
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


class Parser(cli.Parser):
    """Takes what comes after -- as it is: train.py's flags."""

    def parse_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def,override]
        words = list(sys.argv[1:] if args is None else args)
        at = words.index("--") if "--" in words else len(words)
        namespace = super().parse_args(words[:at], namespace)
        namespace.extra = words[at + 1 :]
        return namespace


def make_parser() -> cli.Parser:
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
        ValueError: the user got something wrong.
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
            print(f"python train.py {shlex.join(command(row, args, args.extra))}")
        return 0
    to_do = [row for row in rows if args.again or results.get(row.name, {}).get("status") != "done"]
    check_weights(to_do, args.checkpoint_dir)
    checkpoint.check_writable(args.output_dir)
    return reproduce(args, rows, args.extra)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    args = make_parser().parse_args(argv)
    return cli.run("reproduce", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
