"""The results of tools.reproduce beside the published figures: results.json, and results.md for people.

This module must not know how rows are trained.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from typing import Any

from tools._published_results import SOURCES
from utils import files
from utils.errors import UserError

Record = dict[str, Any]
Results = dict[str, Record]  # by the names of their rows
#: The keys of each row in results.json.
KEYS = {"status", "accuracy", "last_accuracy", "secs", "command", "hardware", "published"}
CIFAR = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "digits": "digits"}


def read(path: str) -> Results:
    """Returns the results so far, by the names of their rows.

    Raises:
        UserError: the file holds anything else.
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


def keep(folder: str, name: str, record: Record, order: Iterable[str]) -> None:
    """Adds a row's result to those in the folder, in this order of rows; processes at other rows take turns."""
    with files.turn(os.path.join(folder, ".results.lock")):
        write(folder, {**read(os.path.join(folder, "results.json")), name: record}, order)


def write(folder: str, results: Results, order: Iterable[str]) -> None:
    """Writes results.json and results.md, each whole or not at all."""
    known = {name: results[name] for name in [*order, *results] if name in results}
    text = json.dumps({"rows": known}, indent=1, ensure_ascii=False)
    files.write_text(os.path.join(folder, "results.json"), text + "\n")
    files.write_text(os.path.join(folder, "results.md"), as_markdown(known))


def as_markdown(results: Results) -> str:
    """Returns the results as tables beside the published figures, a table for each source."""
    parts = ["# Results beside published figures\n\nAccuracies in percent: the best evaluation and the last; times are "
             "train.py's from start to end, with evaluations.\n"]  # fmt: skip
    sources = {record["published"]["source"] for record in results.values()}
    for source in sorted(sources, key=[*SOURCES.values(), *sources].index):
        rows = {name: record for name, record in results.items() if record["published"]["source"] == source}
        parts.append(f"\n## Published by {source}\n\n{table(rows)}")
    return "".join(parts)


def table(results: Results) -> str:
    """Returns rows of Markdown."""
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
    """Returns a time for a table; "" where it is not known."""
    return "" if secs is None else f"{secs:.2f}"
