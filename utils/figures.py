"""Draws what a run shows: grids of images with titles, confusion matrices, and curves as SVG.

Pillow draws, in a font of this machine that has a text's characters; no plotting library is needed.  This
module must not write files, nor know what becomes of an image.
"""

from __future__ import annotations

import functools
import html
import io
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from utils import datasets
from utils.evaluation import EvalResult
from utils.fonts import drawable, drawable_names, fitting, font_for, legend
from utils.images import ImageError

if TYPE_CHECKING:
    from utils.data_utils import MicroBatch
    from utils.metrics import TrainLog
from utils.outlook import duration

logger = logging.getLogger(__name__)

#: So many of the first batch's images and of the worst mistakes are shown, with so long sides.
BATCH_IMAGES, BATCH_PX, WORST_MISTAKES, MISTAKE_PX = 64, 96, 24, 128
TITLE_PX, GAP_PX, FONT_PX = 22, 8, 14
#: A confusion matrix aims at a side of so many pixels, by cells of these sides; a page shows it smaller, and sharp.
MATRIX_PX, SMALLEST_CELL_PX, LARGEST_CELL_PX = 1280, 1, 80
#: Texts in it are drawn in fonts from the one size to the other, and left out where they would have to be smaller.
SMALLEST_TEXT_PX, LARGEST_TEXT_PX, LABEL_PX = 11, 34, 280
RIGHT, WRONG = (27, 158, 119), (217, 95, 2)

#: A curve of more points is thinned out; its highest and lowest ones stay.  Few points are each shown.
CURVE_POINTS, DOTTED_POINTS = 400, 60
CHART_WIDTH, CHART_HEIGHT = 400, 200
LEFT_PX, RIGHT_PX, TOP_PX, BOTTOM_PX = 60, 12, 10, 42
#: A curve that spans less of its largest value is drawn flat: the labels of its axis would be too long to read.
FLAT = 1e-4
#: Values between these sizes can be placed: what is larger is not drawn, and what is smaller is 0.
TINY, HUGE = 1e-300, 1e300
ROUND_SECS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800,
              3600, 7200, 10800, 21600, 43200, 86400, 172800, 432000, 864000)  # fmt: skip

Point = tuple[float, float]  # a step and a value, or a step and the seconds trained until then


@dataclass(frozen=True)
class Mistake:
    """An image that was taken for another class.

    Attributes:
        image: scaled for showing.
        name: of the image.
        truth, predicted: labels.
        confidence: the probability that the predicted class was given.
    """

    image: Image.Image
    name: str
    truth: int
    predicted: int
    confidence: float


# ---- what a training shows in TensorBoard ----


def show_first(log: TrainLog, batches: Iterator[MicroBatch], classes: list[str]) -> Iterator[MicroBatch]:
    """Yields the micro-batches, and shows the first as the model sees it."""
    first = [next(batches)]
    log.show(1, "train/pictures", lambda: training_batch(*first[0], classes))
    log.show(1, "train/classes", lambda: legend(classes))
    yield first.pop()  # nothing here keeps it: on a GPU it would take its memory in every step
    yield from batches


def show_result(log: TrainLog, step: int, result: EvalResult, data: datasets.DataSets) -> None:
    """Shows which classes, and which images, an evaluation took for others."""
    log.show(step, "test/confusion", lambda: confusion(result.confusion(len(data.classes)), data.classes))
    log.show(step, "test/worst_mistakes", lambda: mistakes(result, data))


# ---- grids of images ----


def training_batch(images: Tensor, labels: Tensor, classes: list[str]) -> Image.Image:
    """Draws the first images (B, 3, H, W) of a batch as the model sees them: cropped, resized, mirrored."""
    shown, names = from_tensor(images[:BATCH_IMAGES]), drawable_names(classes)
    return arrange([(names[label], scaled(x, BATCH_PX)) for label, x in zip(labels.tolist(), shown)], columns=8)


def mistakes(result: EvalResult, data: datasets.DataSets) -> Image.Image | None:
    """Draws an evaluation's worst mistakes, each under what it was taken for and what it is; None if there are none."""
    panels = []
    for m in worst_mistakes(result, data):
        names = f"{data.classes[m.predicted]}, is {data.classes[m.truth]}"
        panels.append((drawable(names, f"class {m.predicted}, is class {m.truth}"), m.image))
    return arrange(panels, columns=4) if panels else None


def worst_mistakes(result: EvalResult, data: datasets.DataSets) -> list[Mistake]:
    """Returns the mistakes that were made with the most confidence, the worst first.

    Images that turned unreadable since are left out, with a warning.
    """
    worst, reasons = [], dict[str, str]()
    for i in result.worst_mistakes(WORST_MISTAKES):
        try:
            name, image = datasets.image_at(data.test, i)
        except ImageError as e:  # of one rank, the only one that draws: it must not end what all do
            reasons |= e.reasons
            continue
        truth, predicted = int(result.truth[i]), int(result.predicted[i])
        worst.append(Mistake(scaled(image, MISTAKE_PX), name, truth, predicted, float(result.confidence[i])))
    if reasons:
        logger.warning("not among the worst mistakes: %s", ImageError(reasons))
    return worst


def confusion(matrix: np.ndarray, classes: list[str]) -> Image.Image:
    """Draws a confusion matrix (C, C), rows the truth: the deeper a shade, the larger a share of its row.

    Up to some 100 classes have their names drawn, and some 30 their counts.
    """
    size = len(matrix)
    cell = min(max(MATRIX_PX // size, SMALLEST_CELL_PX), LARGEST_CELL_PX)
    text_px = min(cell - 1, LARGEST_TEXT_PX)
    labels = drawable_names(classes) if text_px >= SMALLEST_TEXT_PX else []
    labels = [fitting(label, LABEL_PX, text_px) for label in labels]
    longest = max((font_for(label, text_px).getlength(label) for label in labels), default=0)
    head = LARGEST_TEXT_PX + 12  # where "predicted" and "truth" stand
    margin = head + (math.ceil(longest) + 16 if labels else 0)
    sheet = Image.new("RGB", (margin + cell * size + 1, margin + cell * size + 1), "white")
    colours = cell_colours(matrix).round().astype(np.uint8)
    sheet.paste(Image.fromarray(colours).resize((cell * size, cell * size), Image.Resampling.NEAREST), (margin, margin))
    draw = ImageDraw.Draw(sheet)
    draw.rectangle((margin - 1, margin - 1, sheet.width - 1, sheet.height - 1), outline="gray")
    draw.text((margin, 2), "predicted", "gray", font_for("predicted", LARGEST_TEXT_PX))
    _draw_upright(sheet, "truth", (1, margin + 80), "gray", LARGEST_TEXT_PX)
    for i, label in enumerate(labels):
        middle = margin + i * cell + cell // 2
        draw.text((margin - 8, middle), label, "black", font_for(label, text_px), anchor="rm")
        _draw_upright(sheet, label, (middle - text_px // 2 - 3, margin - 8), "black", text_px)
    _draw_counts(draw, matrix, cell, margin)
    return sheet


def _draw_counts(draw: ImageDraw.ImageDraw, matrix: np.ndarray, cell: int, margin: int) -> None:
    """Draws each count but zero into its cell, all in one size; none if the longest fits in no readable size."""
    longest = str(matrix.max())
    sizes = range(min(cell // 2, LARGEST_TEXT_PX), SMALLEST_TEXT_PX - 1, -1)
    fonts = (font_for(longest, size) for size in sizes)
    font = next((font for font in fonts if font.getlength(longest) <= cell - 4), None)
    if font is not None:
        for i, j in np.argwhere(matrix).tolist():
            at = (margin + (j + 0.5) * cell, margin + (i + 0.5) * cell)
            draw.text(at, str(matrix[i, j]), "black", font, anchor="mm")


def cell_colours(matrix: np.ndarray) -> np.ndarray:
    """Returns the colours (C, C, 3), 0 to 255, of a confusion matrix's cells; the root makes rare mistakes visible."""
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    depth = np.where(matrix > 0, 0.1 + 0.65 * np.sqrt(shares), 0)[..., None]
    colour = np.where(np.eye(len(matrix), dtype=bool)[..., None], RIGHT, WRONG)
    return 255 + (colour - 255) * depth


def _draw_upright(sheet: Image.Image, text: str, at: tuple[int, int], colour: str, size: int) -> None:
    """Draws a text that reads upwards from ``at``, the left end of its lowest letter."""
    font = font_for(text, size)
    strip = Image.new("RGB", (max(math.ceil(font.getlength(text)), 1), size + 6), "white")
    ImageDraw.Draw(strip).text((0, (size + 6) // 2), text, colour, font, anchor="lm")
    strip = strip.rotate(90, expand=True)
    sheet.paste(strip, (at[0], at[1] - strip.height))


# ---- images ----


def from_tensor(images: Tensor) -> list[Image.Image]:
    """Returns images (B, 3, H, W) in [-1, 1] as the model sees them, as Pillow's."""
    pixels = images.detach().float().add(1).mul(127.5).round().clamp(0, 255).byte()
    return [Image.fromarray(x) for x in pixels.permute(0, 2, 3, 1).cpu().numpy()]  # (B, H, W, 3)


def scaled(image: Image.Image, side_px: int) -> Image.Image:
    """Resizes the longer side to ``side_px``; small images keep their pixels' hard edges."""
    factor = side_px / max(image.size)
    size = (max(round(image.width * factor), 1), max(round(image.height * factor), 1))
    return image.resize(size, Image.Resampling.NEAREST if factor > 1 else Image.Resampling.BICUBIC)


def png(image: Image.Image) -> bytes:
    """Returns the bytes of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def arrange(panels: Sequence[tuple[str, Image.Image]], columns: int) -> Image.Image:
    """Arranges panels with their titles in rows of at most ``columns``; the largest sets the size of all cells.

    A title that no font can draw is left out; ``drawable`` puts another in its place beforehand.
    """
    width, height = (max(panel.size[side] for _, panel in panels) for side in (0, 1))
    columns = min(len(panels), columns)
    rows = -(-len(panels) // columns)
    size = (columns * (width + GAP_PX) - GAP_PX, rows * (TITLE_PX + height + GAP_PX) - GAP_PX)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for i, (title, panel) in enumerate(panels):
        x, y = i % columns * (width + GAP_PX), i // columns * (TITLE_PX + height + GAP_PX)
        text = fitting(drawable(title, ""), width - 4, FONT_PX)
        draw.text((x + 2, y + TITLE_PX // 2), text, "black", font_for(text, FONT_PX), anchor="lm")
        sheet.paste(panel, (x, y + TITLE_PX))
    return sheet


# ---- curves ----


def chart(
    title: str, points: Sequence[Point], unit: str = "", marked: int | None = None, times: Sequence[Point] = ()
) -> str:
    """Draws a curve as an SVG, over steps; below them stands the time, if it is known.

    Args:
        title: of the curve.
        points: steps and values, by rising steps; at least one.
        unit: after the values.
        marked: the step whose point stands out.
        times: steps and the seconds trained until then, both rising.
    """
    last = max(points[-1][0], 1)
    y_ticks = ticks(min(y for _, y in points), max(y for _, y in points))
    place = functools.partial(_place, last, y_ticks[0], y_ticks[-1])
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in thinned(points, CURVE_POINTS)))
    parts = [*_value_axis(y_ticks, unit), *_step_axis(last, times), f'<polyline points="{line}"/>']
    for step, value in points if len(points) <= DOTTED_POINTS else [p for p in points if p[0] == marked]:
        x, y = place(step, value)
        kind = 'class="best" r="4.5"' if step == marked else 'r="2.2"'
        label = f"step {number(step)}: {number(value)}{unit}"
        parts.append(f'<circle {kind} cx="{x:.1f}" cy="{y:.1f}"><title>{label}</title></circle>')
    label = f"{title} over steps, from {number(points[0][1])}{unit} to {number(points[-1][1])}{unit}"
    drawn = "".join(parts)
    return f'<svg viewBox="0 0 {CHART_WIDTH} {CHART_HEIGHT}" role="img" aria-label="{html.escape(label)}">{drawn}</svg>'


def _place(last: float, low: float, high: float, x: float, y: float) -> Point:
    """Returns the point of the drawing where a step and a value are."""
    across, up = x / last, (y - low) / (high - low)
    width, height = CHART_WIDTH - LEFT_PX - RIGHT_PX, CHART_HEIGHT - TOP_PX - BOTTOM_PX
    return LEFT_PX + across * width, CHART_HEIGHT - BOTTOM_PX - up * height


def _value_axis(values: Sequence[float], unit: str) -> list[str]:
    parts = []
    for value, label in zip(values, _labels(values)):
        at = _place(1, values[0], values[-1], 0, value)[1]
        parts.append(f'<path class="rule" d="M{LEFT_PX} {at:.1f}H{CHART_WIDTH - RIGHT_PX}"/>')
        parts.append(f'<text x="{LEFT_PX - 6}" y="{at + 4:.1f}" text-anchor="end">{label}{unit}</text>')
    return parts


def _labels(values: Sequence[float]) -> list[str]:
    """Returns what stands at the values of an axis: all in as few digits as show each to a twentieth of their step."""
    close = (values[1] - values[0]) / 20
    for digits in range(4, 17):
        labels = [number(value, digits) for value in values]
        if all(abs(float(label.replace(",", "")) - value) <= close for label, value in zip(labels, values)):
            break
    return labels


def _step_axis(last: float, times: Sequence[Point]) -> list[str]:
    """Returns the numbers of steps below a curve, and below them the seconds trained until those steps."""
    rows = [(CHART_HEIGHT - 26, [(step, number(step)) for step in ticks(0, last) if step == int(step)])]
    if times:
        steps, secs = zip(*times)
        total = float(np.interp(last, steps, secs))
        every = next((x for x in ROUND_SECS if total / x <= 5), total / 5)
        marks = [i * every for i in range(1, int(total / every) + 1)] if total else []
        rows.append((CHART_HEIGHT - 9, [(float(np.interp(t, secs, steps)), duration(t)) for t in marks]))
    parts = []
    for y, labels in rows:
        for step, label in labels:
            if step <= last:
                x = _place(last, 0, 1, step, 0)[0]
                anchor = "end" if x + 3.5 * len(label) > CHART_WIDTH else "middle"
                parts.append(f'<text x="{x:.1f}" y="{y}" text-anchor="{anchor}">{label}</text>')
    return parts


def number(value: float, digits: int = 4) -> str:
    """Returns a number in as many digits as tell something, and all before the point: 1,200; 0.0312; 1e-06."""
    if value == 0 or 1e-4 <= abs(value) < 1e6:
        return f"{value:,.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:,.{digits}g}"
    return f"{value:.{digits - 1}g}"


def can_be_drawn(value: float) -> bool:
    """Tells if a curve may have a point there; not where it is infinite or no number."""
    return abs(value) <= HUGE


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Returns about ``count`` round numbers, the first at most ``low`` and the last at least ``high``; at least two."""
    largest = max(abs(low), abs(high))
    if largest < TINY or high - low < FLAT * largest:
        margin = (0.1 if low == high else 10 * FLAT) * largest if largest >= TINY else 1.0
        low, high = low - margin, high + margin
    rough = (high - low) / count
    power = math.floor(math.log10(rough)) - 1
    tens = next(n for n in (10, 20, 25, 50, 100) if n * 10.0**power >= rough * (1 - 1e-9))
    step = tens * 10.0**power
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * tens}e{power}") for i in range(first, last + 1)]  # whole numbers, so that 0.3 is 0.3


def thinned(points: Sequence[Point], most: int) -> list[Point]:
    """Returns at most ``most`` of the points: of each stretch of steps the lowest and the highest."""
    if len(points) <= most:
        return list(points)
    kept = []
    for part in np.array_split(np.arange(len(points)), most // 2):
        stretch = [points[i] for i in part]
        kept += sorted({min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])})
    return kept
