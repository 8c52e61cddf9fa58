"""A run's report: one HTML page with curves, confusion matrix, mistakes, settings and timing.

The page needs nothing but itself: styles, curves (SVG) and pictures (data URIs) are in it, there is no
script, and its content security policy forbids to fetch anything.  Every text of the user's (names of
classes, files and flags) is escaped.  This module must not read or write a run's files: it makes a text
of values.
"""

from __future__ import annotations

import base64
import html
import importlib.metadata
import math
import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

STYLE_FILE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets", "report.css")
#: Up to so many classes the confusion matrix is a table with counts, from there on a drawing.
TABLE_CLASSES = 20
#: Up to so many classes the drawing names its rows and columns.
NAMED_CLASSES = 100
CONFUSED_PAIRS = 15
#: A curve of more points is thinned out; its highest and lowest ones stay.
CURVE_POINTS = 400
#: A curve of at most so many points shows each.
DOTTED_POINTS = 60
CHART_WIDTH, CHART_HEIGHT = 480, 200
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 10, 26

Point = tuple[float, float]  # an update's number, and a value

#: Tag in ``metrics.jsonl``, title of its curve, and what values are multiplied with and followed by.
CURVES = (
    ("test/accuracy", "Test accuracy", 100.0, " %"),
    ("test/loss", "Test loss", 1.0, ""),
    ("train/loss", "Training loss", 1.0, ""),
    ("train/lr", "Learning rate", 1.0, ""),
    ("images_per_sec", "Images per second while training", 1.0, ""),
)


@dataclass(frozen=True)
class Mistake:
    """A picture that was taken for another class.

    Attributes:
        png: the picture, as the bytes of a PNG file.
        name: of the picture.
        truth, predicted: names of classes.
        confidence: the probability that the predicted class was given.
    """

    png: bytes
    name: str
    truth: str
    predicted: str
    confidence: float


@dataclass(frozen=True)
class Contents:
    """What a report says.

    Attributes:
        name: of the run.
        subject: what was trained on what.
        num_steps, step: updates of the run, and how many are done.
        lines: the objects of ``metrics.jsonl``.
        classes: their names.
        best_step: the update after which the evaluation came that the next two are of.
        confusion: (C, C) counts; rows are the truth.
        mistakes: the worst ones, the worst first.
        settings: every flag with its value and its default.
        facts: versions and hardware.
        timing: what took how long, in words.
    """

    name: str
    subject: str
    num_steps: int
    step: int
    lines: Sequence[Mapping[str, float]]
    classes: Sequence[str]
    best_step: int
    confusion: np.ndarray
    mistakes: Sequence[Mistake]
    settings: Mapping[str, tuple[Any, Any]]
    facts: Mapping[str, str]
    timing: Mapping[str, str]


def versions() -> dict[str, str]:
    """What computed: the versions of Python and of the packages that matter, and the system."""
    found = {"Python": platform.python_version()}
    for package in ("torch", "torchvision", "numpy", "tensorboard", "Pillow"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # built from source, without its description
            found[package] = "unknown"
    return {**found, "system": platform.platform(terse=True), "machine": platform.machine()}


def render(contents: Contents) -> str:
    """The page as HTML."""
    sections = [
        ("curves", "Curves", _curves(contents)),
        ("confusion", "Confusion matrix", _confusion(contents.confusion, contents.classes)),
        ("classes", "Accuracy of each class", _per_class(contents.confusion, contents.classes)),
        ("mistakes", "Worst mistakes", _mistakes(contents.mistakes)),
        ("settings", "Settings", _settings(contents.settings)),
        ("machine", "Timing, versions and hardware", _machine(contents.timing, contents.facts)),
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
        f"<body><main>\n{_header(contents)}{body}</main></body></html>\n"
    )


def _text(value: object) -> str:
    """Any value as text that HTML takes for text, in attributes too."""
    return html.escape(str(value), quote=True)


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _number(value: float) -> str:
    """A number in as many digits as tell something: 1,200; 0.0312; 1e-06."""
    if value == 0 or 1e-4 <= abs(value) < 1e6:
        return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.4g}"
    return f"{value:.3g}"


# ---- the head of the page ----


def _header(contents: Contents) -> str:
    evaluations = _evaluations(contents.lines)
    best = next((line for line in evaluations if line["step"] == contents.best_step), None)
    finished = contents.step >= contents.num_steps
    tiles = [("progress", f"{_number(contents.step)} of {_number(contents.num_steps)} updates")]
    if best is not None:
        tiles = [
            ("best test accuracy", _percent(best["test/accuracy"])),
            ("its test loss", f"{best['test/loss']:.4f}"),
            ("after update", _number(contents.best_step)),
            *tiles,
        ]
    note = "" if finished else "<p>The training goes on; this page is written anew at each best evaluation.</p>"
    listed = "".join(f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>" for name, value in tiles)
    return (
        f'<header><h1>{_text(contents.name)}</h1><p class="subject">{_text(contents.subject)}</p>'
        f'<dl class="tiles">{listed}</dl>{note}</header>\n'
    )


def _evaluations(lines: Iterable[Mapping[str, float]]) -> list[Mapping[str, float]]:
    return [line for line in lines if "test/accuracy" in line]


# ---- curves ----


def _curves(contents: Contents) -> str:
    charts = []
    for tag, title, factor, unit in CURVES:
        points = [(line["step"], factor * line[tag]) for line in contents.lines if tag in line]
        if points:
            best = contents.best_step if tag.startswith("test/") else None
            charts.append(f"<figure><figcaption>{title}</figcaption>{chart(title, points, unit, best)}</figure>")
    evaluations = "".join(
        f'<tr{_best_class(line["step"], contents)}><th scope="row">{_number(line["step"])}</th>'
        f"<td>{_percent(line['test/accuracy'])}</td><td>{line['test/loss']:.5f}</td></tr>"
        for line in _evaluations(contents.lines)
    )
    table = (
        '<figure><figcaption id="evaluations">Evaluations</figcaption>'
        '<div class="scroll" tabindex="0" role="region" aria-labelledby="evaluations"><table>'
        "<caption>The best is bold</caption>"
        '<thead><tr><th scope="col">update</th><th scope="col">accuracy</th><th scope="col">loss</th></tr></thead>'
        f"<tbody>{evaluations}</tbody></table></div></figure>"
    )
    return (
        "<p>Over updates; the ring marks the best evaluation, which is what the checkpoint holds.</p>"
        f'<div class="charts">{"".join(charts)}{table}</div>'
    )


def _best_class(step: float, contents: Contents) -> str:
    return ' class="best"' if step == contents.best_step else ""


def chart(title: str, points: Sequence[Point], unit: str = "", marked: int | None = None) -> str:
    """A curve as an SVG.

    Args:
        title: what it shows.
        points: steps and values, by rising steps; at least one.
        unit: after the values.
        marked: the step whose point stands out.
    """
    axes, place = _axes(points, unit)
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in thinned(points, CURVE_POINTS)))
    parts = [axes, f'<polyline points="{line}"/>']
    for step, value in points if len(points) <= DOTTED_POINTS else [p for p in points if p[0] == marked]:
        x, y = place(step, value)
        kind = 'class="best" r="4.5"' if step == marked else 'r="2.2"'
        said = f"update {_number(step)}: {_number(value)}{unit}"
        parts.append(f'<circle {kind} cx="{x:.1f}" cy="{y:.1f}"><title>{said}</title></circle>')
    said = f"{title} over updates, from {_number(points[0][1])}{unit} to {_number(points[-1][1])}{unit}"
    return (
        f'<svg viewBox="0 0 {CHART_WIDTH} {CHART_HEIGHT}" role="img" aria-label="{_text(said)}">{"".join(parts)}</svg>'
    )


def _axes(points: Sequence[Point], unit: str) -> tuple[str, Callable[[float, float], Point]]:
    """The rules and numbers of a curve's axes, and where on the drawing a step and a value are."""
    last = max(points[-1][0], 1)
    y_ticks = ticks(min(y for _, y in points), max(y for _, y in points))
    low, high = y_ticks[0], y_ticks[-1]

    def place(x: float, y: float) -> Point:
        across, up = x / last, (y - low) / (high - low)
        return LEFT + across * (CHART_WIDTH - LEFT - RIGHT), CHART_HEIGHT - BOTTOM - up * (CHART_HEIGHT - TOP - BOTTOM)

    parts = []
    for value in y_ticks:
        at = place(0, value)[1]
        parts.append(f'<path class="rule" d="M{LEFT} {at:.1f}H{CHART_WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{_number(value)}{unit}</text>')
    for step in ticks(0, last):
        if step <= last and step == int(step):
            at = place(step, low)[0]
            anchor = "end" if at > CHART_WIDTH - RIGHT - 12 else "middle"
            parts.append(f'<text x="{at:.1f}" y="{CHART_HEIGHT - 8}" text-anchor="{anchor}">{_number(step)}</text>')
    return "".join(parts), place


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About ``count`` round numbers, the first at most ``low`` and the last at least ``high``; at least two."""
    if high <= low:
        margin = abs(low) * 0.1 or 1.0
        low, high = low - margin, high + margin
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * n for n in (1, 2, 2.5, 5, 10) if power * n >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def thinned(points: Sequence[Point], most: int) -> list[Point]:
    """At most ``most`` of the points: of each stretch of steps the lowest and the highest."""
    if len(points) <= most:
        return list(points)
    kept = []
    for part in np.array_split(np.arange(len(points)), most // 2):
        stretch = [points[i] for i in part]
        kept += sorted({min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])})
    return kept


# ---- classes ----


def _confusion(matrix: np.ndarray, classes: Sequence[str]) -> str:
    drawn = _confusion_table if len(classes) <= TABLE_CLASSES else _confusion_drawing
    return (
        "<p>Rows are the truth, columns what was predicted; the deeper the shade, the larger the share of the row.</p>"
        '<div class="row"><div class="wide" tabindex="0" role="region" aria-labelledby="confusion">'
        f"{drawn(matrix, classes)}</div>{_confused_pairs(matrix, classes)}</div>"
    )


def _depth(share: float) -> float:
    """Opacity of a cell that is not empty: the root makes rare mistakes visible."""
    return 0.08 + 0.5 * math.sqrt(share)


def _shares(matrix: np.ndarray) -> np.ndarray:
    return matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)


def _confusion_table(matrix: np.ndarray, classes: Sequence[str]) -> str:
    head = "".join(f'<th scope="col"><span>{_text(name)}</span></th>' for name in classes)
    shares, rows = _shares(matrix), []
    for i, name in enumerate(classes):
        cells = []
        for j, count in enumerate(matrix[i].tolist()):
            kind, style = "right" if i == j else "wrong", ""
            if count:
                style = f' style="--depth:{_depth(shares[i, j]):.3f}"'
            cells.append(f'<td class="{kind}"{style}>{count or "<span class=none>0</span>"}</td>')
        rows.append(f'<tr><th scope="row">{_text(name)}</th>{"".join(cells)}</tr>')
    return (
        '<table class="confusion"><caption>Pictures of each class (rows) by predicted class (columns)</caption>'
        f"<thead><tr><td></td>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )


def _confusion_drawing(matrix: np.ndarray, classes: Sequence[str]) -> str:
    """Cells of one shade are one path; a cell is one unit wide."""
    size, shares = len(classes), _shares(matrix)
    paths: dict[tuple[str, int], list[str]] = {}
    for i, j in np.argwhere(matrix).tolist():
        level = math.ceil(10 * _depth(shares[i, j]) / _depth(1))
        paths.setdefault(("right" if i == j else "wrong", level), []).append(f"M{j} {i}h1v1h-1z")
    margin = 12 if size <= NAMED_CLASSES else 0
    parts = [f'<rect class="frame" width="{size}" height="{size}"/>']
    for (kind, level), cells in sorted(paths.items()):
        parts.append(f'<path class="{kind}" fill-opacity="{_depth(1) * level / 10:.3f}" d="{"".join(cells)}"/>')
    if margin:
        for i, name in enumerate(classes):
            short = _text(name if len(name) <= 18 else name[:17] + "…")
            parts.append(f'<text x="-0.4" y="{i + 0.8}" text-anchor="end">{short}</text>')
            parts.append(f'<text transform="translate({i + 0.8} -0.4) rotate(-90)">{short}</text>')
    most = f"{size} by {size} classes; {int(np.trace(matrix))} of {int(matrix.sum())} pictures are on the diagonal"
    return (
        f'<svg class="matrix" viewBox="{-margin} {-margin} {size + margin} {size + margin}" role="img" '
        f'aria-label="Confusion matrix of {most}"><title>Confusion matrix of {most}</title>{"".join(parts)}</svg>'
    )


def _confused_pairs(matrix: np.ndarray, classes: Sequence[str]) -> str:
    wrong = matrix * ~np.eye(len(matrix), dtype=bool)
    order = np.argsort(-wrong, axis=None, kind="stable")[:CONFUSED_PAIRS]
    rows = "".join(
        f"<tr><td>{_text(classes[i])}</td><td>{_text(classes[j])}</td><td>{wrong[i, j]}</td></tr>"
        for i, j in (divmod(int(at), len(classes)) for at in order)
        if wrong[i, j]
    )
    if not rows:
        return "<p>No picture was taken for another class.</p>"
    return (
        '<div class="wide"><table><caption>Most often confused</caption>'
        '<thead><tr><th scope="col">truth</th><th scope="col">predicted</th><th scope="col">pictures</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _per_class(matrix: np.ndarray, classes: Sequence[str]) -> str:
    totals, right = matrix.sum(axis=1), np.diag(matrix)
    shares = right / np.maximum(totals, 1)
    rows = []
    for i in np.argsort(np.where(totals == 0, 2, shares), kind="stable").tolist():
        said = _percent(shares[i]) if totals[i] else "no pictures"
        rows.append(
            f'<tr><th scope="row">{_text(classes[i])}</th><td>{totals[i]}</td><td>{right[i]}</td><td>{said}</td>'
            f'<td class="bar" aria-hidden="true"><i style="width:{100 * shares[i]:.1f}%"></i></td></tr>'
        )
    return (
        '<div class="wide tall" tabindex="0" role="region" aria-labelledby="classes"><table>'
        "<caption>The least accurate class first</caption>"
        '<thead><tr><th scope="col">class</th><th scope="col">pictures</th><th scope="col">right</th>'
        '<th scope="col">accuracy</th><td></td></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


# ---- pictures, settings, facts ----


def _mistakes(mistakes: Sequence[Mistake]) -> str:
    if not mistakes:
        return "<p>None: every test picture was recognised.</p>"
    figures = "".join(
        f'<figure><img src="data:image/png;base64,{base64.b64encode(m.png).decode()}" '
        f'alt="{_text(f"{m.name}: {m.truth}, taken for {m.predicted}")}" title="{_text(m.name)}">'
        f"<figcaption><span>{_text(m.truth)}</span><span>taken for <b>{_text(m.predicted)}</b></span>"
        f"<span>{_percent(m.confidence)}</span></figcaption></figure>"
        for m in mistakes
    )
    return (
        "<p>Test pictures whose wrong class was given the highest probability, with that probability.</p>"
        f'<div class="pictures">{figures}</div>'
    )


def _settings(settings: Mapping[str, tuple[Any, Any]]) -> str:
    rows = "".join(
        f'<tr{" class=best" if value != default else ""}><th scope="row">{_text(name)}</th>'
        f"<td>{_text(value)}</td><td>{_text(default)}</td></tr>"
        for name, (value, default) in settings.items()
    )
    return (
        '<div class="wide tall" tabindex="0" role="region" aria-labelledby="settings"><table>'
        "<caption>Flags; those that differ from their defaults are bold</caption>"
        '<thead><tr><th scope="col">flag</th><th scope="col">value</th><th scope="col">default</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _machine(timing: Mapping[str, str], facts: Mapping[str, str]) -> str:
    return f'<div class="row">{_pairs("Timing", timing)}{_pairs("Versions and hardware", facts)}</div>'


def _pairs(caption: str, values: Mapping[str, str]) -> str:
    rows = "".join(f'<tr><th scope="row">{_text(k)}</th><td>{_text(v)}</td></tr>' for k, v in values.items())
    return f'<div class="wide"><table><caption>{caption}</caption><tbody>{rows}</tbody></table></div>'
