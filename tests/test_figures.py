"""Pictures of pictures and numbers: what is where in them."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from utils import figures


def test_what_the_model_sees_becomes_grey_levels():
    x = torch.tensor([-1.0, 0.0, 1.0, 1.5])[:, None, None, None].expand(4, 3, 2, 5)
    pictures = figures.from_tensor(x)
    assert [p.size for p in pictures] == [(5, 2)] * 4
    assert [p.getpixel((0, 0)) for p in pictures] == [(0,) * 3, (128,) * 3, (255,) * 3, (255,) * 3]


@pytest.mark.parametrize(("size", "expected"), [((8, 8), (96, 96)), ((400, 100), (96, 24)), ((1, 300), (1, 96))])
def test_the_longer_side_is_scaled(size, expected):
    assert figures.scaled(Image.new("RGB", size), 96).size == expected


def test_a_png_holds_the_picture():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8))
    again = Image.open(io.BytesIO(figures.png(picture)))
    assert again.format == "PNG"
    assert np.array_equal(np.asarray(again), np.asarray(picture))


def test_panels_of_several_sizes_stand_in_rows():
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    sizes = [(40, 30), (20, 60), (40, 60)]
    sheet = figures.arrange([("", Image.new("RGB", size, c)) for size, c in zip(sizes, colours)], columns=2)
    row = figures.TITLE_PX + 60 + figures.GAP_PX
    assert sheet.size == (80 + figures.GAP_PX, 2 * row - figures.GAP_PX)
    for i, (size, colour) in enumerate(zip(sizes, colours)):
        x, y = i % 2 * (40 + figures.GAP_PX), i // 2 * row + figures.TITLE_PX
        assert {sheet.getpixel(at) for at in ((x, y), (x + size[0] - 1, y + size[1] - 1))} == {colour}
    assert sheet.getpixel((20, figures.TITLE_PX + 40)) == (255, 255, 255)  # below the low panel


def test_a_text_is_cut_to_what_fits_and_to_what_can_be_drawn():
    font = ImageFont.load_default(figures.FONT_PX)
    assert figures.fitting("cat", 1000, font) == "cat"
    cut = figures.fitting("a very long name of a class", 60, font)
    assert "a very long name of a class".startswith(cut)
    assert 40 < font.getlength(cut) <= 60
    assert figures.fitting("猫", 100, font) == "?"


def cells(matrix, classes):
    """The colour of the middle of the upper edge of each cell, where no count is drawn."""
    sheet = figures.confusion(matrix, classes)
    size = len(matrix)
    cell = min(max(figures.MATRIX_PX // size, 1), figures.LARGEST_CELL_PX)
    margin = sheet.width - 1 - cell * size
    pixels = np.asarray(sheet).astype(int)
    at = margin + np.arange(size) * cell + cell // 2
    return pixels[margin + np.arange(size) * cell + min(2, cell // 2)][:, at]


@pytest.mark.parametrize("size", [3, 100])
def test_a_confusion_matrix_shades_shares_of_rows_and_tells_right_from_wrong(size):
    matrix = np.zeros((size, size), dtype=int)
    matrix[0, 0], matrix[0, 1], matrix[1, 0], matrix[1, 2] = 9, 1, 1, 3
    colours = cells(matrix, [f"class {i}" for i in range(size)])
    filled = (colours != 255).any(axis=-1)
    assert np.array_equal(filled, matrix > 0)
    right, little, much = colours[0, 0], colours[0, 1], colours[1, 2]
    assert right[1] > right[0]  # green
    assert little[0] > little[1]  # orange
    assert much.sum() < colours[1, 0].sum() < little.sum()  # the larger the share, the darker


@pytest.mark.parametrize("size", [1, 15, 22, 23, 1000])
def test_any_number_of_classes_can_be_drawn(size):
    matrix = np.eye(size, dtype=int) * 12345
    sheet = figures.confusion(matrix, ["a name that is too long for its margin"] * size)
    assert max(sheet.size) < 1100
    assert abs(sheet.width - sheet.height) == 0
