"""A run's report: one HTML page with curves, confusion matrix, mistakes, next commands, settings and timing.

The page needs nothing but itself: styles, curves (SVG) and images (data URIs) are in it, there is no script, and
its content security policy forbids to fetch anything.  Every text of the user's (names of classes, files and
flags) is escaped.  This module must not decide on anything that is trained.
"""

from __future__ import annotations

import base64
import html
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from utils import datasets, figures, files, hardware
from utils.evaluation import EvalResult
from utils.figures import duration, number
from utils.log_files import only_a_warning, read_lines

if TYPE_CHECKING:
    from utils.metrics import TrainLog
    from utils.precision import Precision
    from utils.run import Run

logger = logging.getLogger("train")

STYLE_FILE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets", "report.css")
CONFUSED_PAIRS = 15
#: The confusion matrix of more classes takes the whole width, for it is full of small text.
LARGE_MATRIX = 20

#: Tag in ``metrics.jsonl``, title of its curve, and what values are multiplied with and followed by.
CURVES = (
    ("test/accuracy", "Test accuracy", 100.0, " %"),
    ("test/loss", "Test loss", 1.0, ""),
    ("train/loss", "Training loss", 1.0, ""),
    ("train/lr", "Learning rate", 1.0, ""),
    ("images_per_sec", "Images per second while training", 1.0, ""),
)

Line = Mapping[str, float]  # one of metrics.jsonl


@dataclass(frozen=True)
class Contents:
    """A run as its report shows it.

    Attributes:
        name: of the run.
        subject: the model and what it is trained on.
        num_steps, step: steps of the run, and how many are done.
        log_dir: the folder with ``metrics.jsonl``.
        data: the images to train and to test on.
        best: the best evaluation.
        best_step: the step after which it came.
        flags: every flag as it is typed, with its value and its default.
        facts: versions and hardware.
        timing: durations and rates, in words.
        commands: purposes and the commands to type for them.
    """

    name: str
    subject: str
    num_steps: int
    step: int
    log_dir: str
    data: datasets.DataSets
    best: EvalResult
    best_step: int
    flags: Mapping[str, tuple[Any, Any]]
    facts: Mapping[str, str]
    timing: Mapping[str, str]
    commands: Sequence[tuple[str, str]]


def write_report(path: str, contents: Callable[[], Contents]) -> None:
    """Writes the page as far as the run has come; a training does not end for the lack of one."""
    with only_a_warning(f"The report {path} could not be written"):
        files.write_text(path, render(contents()))


def contents_of(
    run: Run,
    log: TrainLog,
    data: datasets.DataSets,
    precision: Precision,
    subject: str,
    flags: Mapping[str, tuple[Any, Any]],
    commands: Sequence[tuple[str, str]],
) -> Contents:
    """Returns what the page shows of a run as far as it has come; ``Contents`` explains the last three."""
    return Contents(
        name=run.paths.name,
        subject=subject,
        num_steps=run.settings["--num_steps"],
        step=run.state.step,
        log_dir=run.paths.log_dir,
        data=data,
        best=EvalResult(**run.state.best_result),
        best_step=run.state.best_step,
        flags=flags,
        facts={
            **hardware.versions(),
            "device": f"{precision.device}, {hardware.device_name(precision.device)}",
            "precision": str(precision),
            "ranks": str(run.batch.num_ranks),
            "threads of each": str(torch.get_num_threads()),
        },
        timing=timing(data, log),
        commands=commands,
    )


def timing(data: datasets.DataSets, log: TrainLog) -> dict[str, str]:
    """Returns durations and rates, by what they are called on the page."""
    return {
        "training, over all resumes": duration(log.train_secs),
        "evaluations, over all resumes": duration(log.eval_secs),
        "wall time since the last start": duration(log.wall_secs()),
        "images per second while training": f"{log.speed():.1f}",
        "images": f"{len(data.train):,} to train on, {len(data.test):,} to test on",
        "written": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def render(contents: Contents) -> str:
    """Returns the page as HTML.

    Raises:
        OSError, ValueError: the logs or the images cannot be read.
    """
    lines, classes = read_lines(contents.log_dir), contents.data.classes
    matrix = contents.best.confusion(len(classes))
    worst = figures.worst_mistakes(contents.best, contents.data)
    sections = [
        ("curves", "Curves", _curves(lines, contents.best_step)),
        ("confusion", "Confusion matrix", _confusion(matrix, classes)),
        ("classes", "Accuracy of each class", _per_class(matrix, contents.data)),
        ("mistakes", "Worst mistakes", _mistakes(worst, classes)),
        ("commands", "Next commands", _commands(contents.commands)),
        ("settings", "Settings", _settings(contents.flags)),
        ("machine", "Timing, versions and hardware", _machine(contents)),
    ]
    with open(STYLE_FILE, encoding="utf-8") as f:
        style = f.read()
    body = "".join(
        f'<section aria-labelledby="{key}"><h2 id="{key}">{title}</h2>{inner}</section>\n'
        for key, title, inner in sections
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{_text(contents.name)}: training report</title>\n<style>{style}</style></head>\n"
        f"<body><main>\n{_header(contents, lines)}{body}</main></body></html>\n"
    )


def _text(value: object) -> str:
    """Any value as text that HTML takes for text, in attributes too."""
    return html.escape(str(value), quote=True)


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _table(caption: str, head: Sequence[str], rows: Iterable[str], kind: str = "") -> str:
    """Returns a table of rows that are HTML already; its first column names the rows."""
    cells = "".join(f'<th scope="col">{cell}</th>' if cell else "<td></td>" for cell in head)
    head_row = f"<thead><tr>{cells}</tr></thead>" if head else ""
    attribute = f' class="{kind}"' if kind else ""
    return f"<table{attribute}><caption>{caption}</caption>{head_row}<tbody>{''.join(rows)}</tbody></table>"


def _row(name: object, *cells: object, best: bool = False) -> str:
    """Returns a row with the name in its first cell; all are escaped."""
    rest = "".join(f"<td>{_text(cell)}</td>" for cell in cells)
    return f'<tr{" class=best" if best else ""}><th scope="row">{_text(name)}</th>{rest}</tr>'


def _scroll(table: str, labelled_by: str) -> str:
    """Returns a table in a box that scrolls on a screen, and is as long as it is on paper."""
    return f'<div class="scroll" tabindex="0" role="region" aria-labelledby="{labelled_by}">{table}</div>'


def _image(image: Image.Image, alt: str) -> str:
    data = base64.b64encode(figures.png(image)).decode()
    return f'<img src="data:image/png;base64,{data}" width="{image.width}" height="{image.height}" alt="{_text(alt)}">'


# ---- the head of the page ----


def _header(contents: Contents, lines: Sequence[Line]) -> str:
    tiles = [
        ("best test accuracy", _percent(contents.best.accuracy)),
        ("its balanced accuracy", _percent(contents.best.balanced_accuracy)),
        ("its test loss", f"{contents.best.loss:.4f}"),
        ("after step", number(contents.best_step)),
        ("progress", f"{number(contents.step)} of {number(contents.num_steps)} steps"),
    ]
    if (secs := dict(_times(lines)).get(contents.best_step)) is not None:
        tiles.insert(4, ("trained until then", duration(secs)))
    note = "<p>The training is not finished; each better evaluation rewrites this page.</p>"
    listed = "".join(f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>" for name, value in tiles)
    return (
        f'<header><h1>{_text(contents.name)}</h1><p class="subject">{_text(contents.subject)}</p>'
        f'<dl class="tiles">{listed}</dl>{note * (contents.step < contents.num_steps)}</header>\n'
    )


def _times(lines: Sequence[Line]) -> list[figures.Point]:
    """Steps with the seconds trained until then, from the start on; empty if a line lacks them, as earlier ones do."""
    known = all("secs" in line for line in lines)
    return sorted({(0.0, 0.0), *((line["step"], line["secs"]) for line in lines)}) if known else []


# ---- curves ----


def _curves(lines: Sequence[Line], best_step: int) -> str:
    times, charts = _times(lines), []
    for tag, title, factor, unit in CURVES:
        values = ((line["step"], factor * line[tag]) for line in lines if tag in line)
        points = [point for point in values if figures.can_be_drawn(point[1])]
        if points:
            best = best_step if tag.startswith("test/") else None
            drawn = figures.chart(title, points, unit, best, times)
            charts.append(f"<figure><figcaption>{title}</figcaption>{drawn}</figure>")
    table = _scroll(_evaluations(lines, best_step), "evaluations")
    axis = "steps, and the time trained until then without evaluations" if times else "steps"
    return (
        f"<p>Below each curve are {axis}; the ring marks the best evaluation, which is what the checkpoint holds.</p>"
        f'<div class="charts">{"".join(charts)}'
        f'<figure class="evaluations"><figcaption id="evaluations">Evaluations</figcaption>{table}</figure></div>'
    )


def _evaluations(lines: Sequence[Line], best_step: int) -> str:
    """Returns the table of evaluations, with the columns that every line has: those of earlier versions have less."""
    evaluations = [line for line in lines if "test/accuracy" in line]
    columns: list[tuple[str, str, Callable[[float], str]]] = [
        ("trained", "secs", duration), ("accuracy", "test/accuracy", _percent), ("loss", "test/loss", "{:.5f}".format),
        ("balanced accuracy", "test/balanced_accuracy", _percent),
    ]  # fmt: skip
    shown = [x for x in columns[0 if _times(lines) else 1 :] if all(x[1] in line for line in evaluations)]
    rows = (
        _row(number(line["step"]), *(text(line[tag]) for _, tag, text in shown), best=line["step"] == best_step)
        for line in evaluations
    )
    return _table("The best is bold, and always in view", ["step", *(head for head, _, _ in shown)], rows)


# ---- classes ----


def _confusion(matrix: np.ndarray, classes: list[str]) -> str:
    right, total = int(np.trace(matrix)), int(matrix.sum())
    kind = "matrix" if len(classes) <= LARGE_MATRIX else "large matrix"
    alt = f"Confusion matrix of {len(classes)} classes; {right} of {total} images are on the diagonal"
    return (
        "<p>Rows are the truth, columns what was predicted; the deeper the shade, the larger the share of the row.</p>"
        f'<div class="row"><figure class="{kind}">{_image(figures.confusion(matrix, classes), alt)}</figure>'
        f"{_confused_pairs(matrix, classes)}</div>"
    )


def _confused_pairs(matrix: np.ndarray, classes: Sequence[str]) -> str:
    wrong = matrix * ~np.eye(len(matrix), dtype=bool)
    order = np.argsort(-wrong, axis=None, kind="stable")[:CONFUSED_PAIRS]
    pairs = [divmod(int(at), len(classes)) for at in order]
    rows = [_row(classes[i], classes[j], wrong[i, j]) for i, j in pairs if wrong[i, j]]
    if not rows:
        return "<p>No image was taken for another class.</p>"
    return f'<div class="card">{_table("Most often confused", ["truth", "predicted", "images"], rows)}</div>'


def _per_class(matrix: np.ndarray, data: datasets.DataSets) -> str:
    totals, right = matrix.sum(axis=1), np.diag(matrix)
    trained_on = np.bincount(data.train.labels.cpu().numpy(), minlength=len(data.classes))
    shares = right / np.maximum(totals, 1)
    rows = []
    for i in np.argsort(np.where(totals == 0, 2, shares), kind="stable").tolist():
        accuracy = _percent(shares[i]) if totals[i] else "no images"
        row = _row(data.classes[i], i, f"{trained_on[i]:,}", f"{right[i]:,} of {totals[i]:,}", accuracy)
        bar = f'<td class="bar" aria-hidden="true"><i style="width:{100 * shares[i]:.1f}%"></i></td></tr>'
        rows.append(row.removesuffix("</tr>") + bar)
    head = ["class", "no.", "trained on", "right", "accuracy", ""]
    table = _table(
        "The least accurate class first; images trained on, and test images recognised", head, rows, "numbers"
    )
    return f'<div class="card">{_scroll(table, "classes")}</div>'


# ---- images, commands, settings, facts ----


def _mistakes(mistakes: Sequence[figures.Mistake], classes: Sequence[str]) -> str:
    if not mistakes:
        return "<p>None: every test image was recognised.</p>"
    shown = []
    for m in mistakes:
        truth, predicted = classes[m.truth], classes[m.predicted]
        shown.append(
            f'<figure title="{_text(m.name)}">{_image(m.image, f"{m.name}: {truth}, taken for {predicted}")}'
            f"<figcaption><span>{_text(truth)}</span><span>taken for <b>{_text(predicted)}</b></span>"
            f"<span>{_percent(m.confidence)}</span></figcaption></figure>"
        )
    return (
        "<p>Test images whose wrong class was given the highest probability, with that probability.</p>"
        f'<div class="images">{"".join(shown)}</div>'
    )


def _commands(commands: Iterable[tuple[str, str]]) -> str:
    listed = "".join(f"<dt>{_text(what)}</dt><dd>{_code(command)}</dd>" for what, command in commands)
    return f'<div class="card"><dl class="commands">{listed}</dl></div>'


def _code(command: str) -> str:
    """Returns a command that breaks between its words, and inside of one only if it is longer than a line."""
    return f"<code>{' '.join(f'<span>{_text(word)}</span>' for word in command.split(' '))}</code>"


def _settings(flags: Mapping[str, tuple[Any, Any]]) -> str:
    changed = [_row(name, value, default) for name, (value, default) in flags.items() if value != default]
    table = _table("Flags that differ from their defaults", ["flag", "value", "default"], changed, "flags")
    kept = "".join(
        f"<li>{_code(f'{name} {value}')}</li>" for name, (value, default) in flags.items()
        if value == default
    )  # fmt: skip
    return f'<div class="card">{table}<p>The others have their defaults:</p><ul class="kept">{kept}</ul></div>'


def _machine(contents: Contents) -> str:
    pairs = (("Timing", contents.timing), ("Versions and hardware", contents.facts))
    tables = (_table(caption, [], (_row(*pair) for pair in values.items()), "facts") for caption, values in pairs)
    return f'<div class="row">{"".join(f"<div class=card>{table}</div>" for table in tables)}</div>'
