"""Pictures made of pictures and numbers: grids with captions, and confusion matrices.

Pillow draws; no plotting library is needed.  This module must not read or write files.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

TITLE_PX, GAP_PX, FONT_PX = 22, 8, 14
#: Sides between which the cells of a confusion matrix are, and the side of the whole they aim at, in pixels.
SMALLEST_CELL_PX, LARGEST_CELL_PX, MATRIX_PX = 1, 40, 640
#: Cells from this side on hold their counts; then rows and columns have their names, which take so much at most.
COUNT_CELL_PX = 28
LABEL_PX = 110
RIGHT, WRONG = (27, 158, 119), (217, 95, 2)

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def from_tensor(pictures: Tensor) -> list[Image.Image]:
    """Pictures (B, 3, H, W) in [-1, 1] as the model sees them, as pictures of Pillow."""
    pixels = pictures.detach().float().add(1).mul(127.5).round().clamp(0, 255).byte()
    return [Image.fromarray(x) for x in pixels.permute(0, 2, 3, 1).cpu().numpy()]  # (B, H, W, 3)


def scaled(picture: Image.Image, side_px: int) -> Image.Image:
    """Made so large that its longer side has ``side_px``; small pictures keep their pixels' hard edges."""
    factor = side_px / max(picture.size)
    size = (max(round(picture.width * factor), 1), max(round(picture.height * factor), 1))
    return picture.resize(size, Image.Resampling.NEAREST if factor > 1 else Image.Resampling.BICUBIC)


def png(picture: Image.Image) -> bytes:
    """A picture as the bytes of a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def arrange(panels: Sequence[tuple[str, Image.Image]], columns: int) -> Image.Image:
    """Panels with their titles, in rows of at most ``columns``; the largest sets the size of all cells."""
    width, height = (max(panel.size[side] for _, panel in panels) for side in (0, 1))
    columns = min(len(panels), columns)
    rows = -(-len(panels) // columns)
    size = (columns * (width + GAP_PX) - GAP_PX, rows * (TITLE_PX + height + GAP_PX) - GAP_PX)
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_PX)
    for i, (title, panel) in enumerate(panels):
        x, y = i % columns * (width + GAP_PX), i // columns * (TITLE_PX + height + GAP_PX)
        draw.text((x + 2, y + 2), fitting(title, width - 4, font), "black", font)
        sheet.paste(panel, (x, y + TITLE_PX))
    return sheet


def fitting(text: str, width: float, font: Font) -> str:
    """As much of a text as ``width`` pixels hold, in characters that any font can draw."""
    text = text.encode("latin-1", "replace").decode("latin-1")
    while text and font.getlength(text) > width:
        text = text[:-1]
    return text


def confusion(matrix: np.ndarray, classes: Sequence[str]) -> Image.Image:
    """A confusion matrix (C, C), rows the truth: the darker, the larger a share of its row.

    Few classes have their names and counts drawn; of many only the shades are.
    """
    size = len(matrix)
    cell = min(max(MATRIX_PX // size, SMALLEST_CELL_PX), LARGEST_CELL_PX)
    colours = np.kron(cell_colours(matrix), np.ones((cell, cell, 1))).round().astype(np.uint8)
    font = ImageFont.load_default(FONT_PX)
    labels = [fitting(name, LABEL_PX, font) for name in classes] if cell >= COUNT_CELL_PX else []
    margin = TITLE_PX + (14 + math.ceil(max(font.getlength(label) for label in labels)) if labels else 0)
    sheet = Image.new("RGB", (margin + cell * size + 1, margin + cell * size + 1), "white")
    sheet.paste(Image.fromarray(colours), (margin, margin))
    draw = ImageDraw.Draw(sheet)
    draw.rectangle((margin - 1, margin - 1, sheet.width - 1, sheet.height - 1), outline="gray")
    draw.text((margin, 2), "predicted", "gray", font)
    _draw_upright(sheet, "truth", (1, margin + 40), "gray", font)
    for i, label in enumerate(labels):
        start = margin + i * cell
        draw.text((margin - 6, start + cell / 2), label, "black", font, anchor="rm")
        _draw_upright(sheet, label, (start + (cell - FONT_PX) // 2 - 2, margin - 6), "black", font)
        for j, count in enumerate(matrix[i].tolist()):
            if count:
                at = (margin + (j + 0.5) * cell, start + cell / 2)
                draw.text(at, fitting(str(count), cell, font), "black", font, anchor="mm")
    return sheet


def shares(matrix: np.ndarray) -> np.ndarray:
    """Each entry as a share of its row's sum; rows without any stay zero."""
    return matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)


def cell_colours(matrix: np.ndarray) -> np.ndarray:
    """The colours (C, C, 3), 0 to 255, of a confusion matrix's cells; the root makes rare mistakes visible."""
    depth = np.where(matrix > 0, 0.1 + 0.65 * np.sqrt(shares(matrix)), 0)[..., None]
    colour = np.where(np.eye(len(matrix), dtype=bool)[..., None], RIGHT, WRONG)
    return 255 + (colour - 255) * depth


def _draw_upright(sheet: Image.Image, text: str, at: tuple[int, int], colour: str, font: Font) -> None:
    """Draws a text that reads upwards from ``at``, the left end of its lowest letter."""
    strip = Image.new("RGB", (max(int(font.getlength(text)) + 1, 1), FONT_PX + 4), "white")
    ImageDraw.Draw(strip).text((0, 1), text, colour, font)
    strip = strip.rotate(90, expand=True)
    sheet.paste(strip, (at[0], at[1] - strip.height))
