"""Images of images and numbers, and curves: what is where in them."""

import io
import math
import re
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.folders import as_files, damage, numbered_images
from utils import datasets, figures, fonts
from utils.evaluation import EvalResult
from utils.metrics import TrainLog


def test_what_the_model_sees_becomes_grey_levels():
    x = torch.tensor([-1.0, 0.0, 1.0, 1.5])[:, None, None, None].expand(4, 3, 2, 5)
    images = figures.from_tensor(x)
    assert [x.size for x in images] == [(5, 2)] * 4
    assert [x.getpixel((0, 0)) for x in images] == [(0,) * 3, (128,) * 3, (255,) * 3, (255,) * 3]


@pytest.mark.parametrize(("size", "expected"), [((8, 8), (96, 96)), ((400, 100), (96, 24)), ((1, 300), (1, 96))])
def test_the_longer_side_is_scaled(size, expected):
    assert figures.scaled(Image.new("RGB", size), 96).size == expected


def test_a_png_holds_the_image():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8))
    again = Image.open(io.BytesIO(figures.png(image)))
    assert again.format == "PNG"
    assert np.array_equal(np.asarray(again), np.asarray(image))


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


def test_the_first_images_of_a_batch_stand_under_their_classes():
    images = torch.rand(70, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pixels = np.asarray(figures.training_batch(images, torch.arange(70) % 10, [str(i) for i in range(10)]))
    side, row = figures.BATCH_PX, figures.TITLE_PX + figures.BATCH_PX + figures.GAP_PX
    for i in (0, 9, 63):  # the 10th is the second of the second row
        x, y = i % 8 * (side + figures.GAP_PX), i // 8 * row + figures.TITLE_PX
        cell = pixels[y : y + side : side // 8, x : x + side : side // 8]
        assert np.abs(cell / 127.5 - 1 - images[i].permute(1, 2, 0).numpy()).max() < 0.01
    assert len(pixels) == 8 * row - figures.GAP_PX


def result_of(pairs, confidence):
    truth, predicted = torch.tensor(pairs).T
    return EvalResult(0.5, truth, predicted, torch.tensor(confidence))


def test_the_worst_mistakes_come_first_with_what_they_were_taken_for(monkeypatch):
    pixels = torch.tensor([10, 20, 30, 40], dtype=torch.uint8)[:, None, None, None].expand(4, 3, 4, 4)
    images = datasets.MemoryImages(pixels, torch.tensor([0, 1, 1, 0]))
    data = datasets.DataSets(images, images, ["ant", "猫"])
    result = result_of([(0, 0), (1, 0), (1, 0), (0, 1)], [0.99, 0.6, 0.8, 0.7])
    worst = figures.worst_mistakes(result, data)
    assert [(m.truth, m.predicted, round(m.confidence, 3)) for m in worst] == [(1, 0, 0.8), (0, 1, 0.7), (1, 0, 0.6)]
    assert [m.image.getpixel((0, 0)) for m in worst] == [(30,) * 3, (40,) * 3, (20,) * 3]
    monkeypatch.setattr(fonts, "FONTS", ())  # none has the second class's name
    titles = ["class 0, is class 1", "class 1, is class 0", "class 0, is class 1"]
    expected = figures.arrange([(title, m.image) for title, m in zip(titles, worst)], columns=4)
    np.testing.assert_array_equal(np.asarray(figures.mistakes(result, data)), np.asarray(expected))


def test_a_mistake_that_cannot_be_read_any_more_is_left_out_with_a_warning(tmp_path, caplog):
    images = as_files(numbered_images(3), tmp_path)
    data = datasets.DataSets(images, images, ["ant", "bee", "cat"])
    result = result_of([(0, 1), (1, 0), (2, 0)], [0.9, 0.8, 0.7])
    damage(Path(images.paths[1]), "cut_off")
    assert [m.name for m in figures.worst_mistakes(result, data)] == [images.paths[0], images.paths[2]]
    assert [images.paths[1] in record.getMessage() for record in caplog.records] == [True]
    for path in images.paths:
        damage(Path(path), "noise")
    caplog.clear()
    assert figures.mistakes(result, data) is None
    (record,) = caplog.records
    assert all(path in record.getMessage() for path in images.paths)


def test_without_mistakes_there_is_no_image_of_them():
    images = datasets.MemoryImages(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([0, 1]))
    assert (
        figures.mistakes(result_of([(0, 0), (1, 1)], [0.9, 0.9]), datasets.DataSets(images, images, ["a", "b"])) is None
    )


def cells(matrix, classes):
    """The colour of the middle of the upper edge of each cell, where no count is drawn."""
    sheet = figures.confusion(matrix, classes)
    size = len(matrix)
    cell = min(figures.MATRIX_PX // size, figures.LARGEST_CELL_PX)
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


@pytest.mark.parametrize("size", [1, 15, 40, 100, 1000])
def test_any_number_of_classes_can_be_drawn(size):
    sheet = figures.confusion(np.eye(size, dtype=int) * 12345, ["a name that is too long for its margin"] * size)
    assert max(sheet.size) < 1700
    assert sheet.width == sheet.height


def test_counts_are_drawn_whole_or_not_at_all():
    """Of 123456 in a narrow cell the first digits alone would be a wrong number."""
    digits = [{tuple(x) for row in cell_pixels(count) for x in row} for count in (0, 9, 123456789, 10**17)]
    colours = [len(found) > 1 for found in digits]  # a cell without a digit has one colour
    assert colours == [False, True, True, False]


def cell_pixels(count):
    matrix = np.array([[count, 0], [0, 0]])
    sheet = figures.confusion(matrix, ["a", "b"])
    margin, cell = sheet.width - 1 - 2 * figures.LARGEST_CELL_PX, figures.LARGEST_CELL_PX
    return np.asarray(sheet)[margin : margin + cell, margin : margin + cell].tolist()


@pytest.mark.parametrize("size", [3, 60])
def test_rows_and_columns_have_their_names_in_any_script(size, monkeypatch):
    monkeypatch.setattr(fonts, "FONTS", ())
    matrix, named = np.eye(size, dtype=int), [f"class {i}" for i in range(size)]
    foreign = ["猫" * (i + 1) for i in range(size)]
    with_numbers = np.asarray(figures.confusion(matrix, foreign))
    np.testing.assert_array_equal(with_numbers, np.asarray(figures.confusion(matrix, named)))
    assert not np.array_equal(with_numbers, np.asarray(figures.confusion(matrix, ["class 0"] * size)))


# ---- curves ----


def coordinates(text):
    return [tuple(map(float, point.split(","))) for point in re.search(r'points="([^"]+)"', text)[1].split()]


def test_a_curve_is_drawn_to_scale():
    text = figures.chart("loss", [(10, 4.0), (20, 0.0), (40, 2.0)], marked=40)
    (x1, y1), (x2, y2), (x3, y3) = coordinates(text)
    assert x2 - x1 == pytest.approx((x3 - x1) / 3, abs=0.1)
    assert y3 - y1 == pytest.approx((y2 - y1) / 2, abs=0.1)
    assert y1 < y3 < y2  # up is more
    scale = {float(value): float(at) - 4 for at, value in re.findall(r'y="([\d.]+)" text-anchor="end">([\d.]+)<', text)}
    assert scale[4] == pytest.approx(y1, abs=0.1)
    assert scale[0] == pytest.approx(y2, abs=0.1)
    best = re.search(r'<circle class="best" r="4.5" cx="([\d.]+)" cy="([\d.]+)"><title>([^<]*)', text)
    assert (float(best[1]), float(best[2]), best[3]) == (x3, y3, "step 40: 2")


@pytest.mark.parametrize("points", [[(400, 0.9)], [(1, 0.5)], [(10, 0.0), (20, 0.0)], [(10, -1e-9), (20, 1e9)]])
def test_curves_of_a_point_or_without_height_stay_inside(points):
    for x, y in coordinates(figures.chart("x", points)):
        assert 0 <= x <= figures.CHART_WIDTH
        assert 0 <= y <= figures.CHART_HEIGHT


def test_the_time_stands_below_the_steps_at_which_it_was_reached():
    points, times = [(0, 1.0), (100, 2.0)], [(0, 0.0), (50, 600.0), (100, 3600.0)]  # slower in the second half
    text = figures.chart("loss", points, times=times)
    labels = {
        label: float(x) for x, label in re.findall(r'<text x="([\d.]+)" y="[\d.]+" text-anchor="\w+">([^<]+)<', text)
    }
    start, end = labels["0"], labels["100"]
    for label, step in (("15 min", 55), ("30 min", 70), ("45 min", 85), ("1 h", 100)):
        assert labels[label] == pytest.approx(start + (end - start) * step / 100, abs=0.2)
    assert " min" not in figures.chart("loss", points)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.25, 0.5, 0.75, 1]), (0.1, 2.3, [0, 1, 2, 3]), (92.5, 97.7, [92, 94, 96, 98]),
     (0, 10000, [0, 2500, 5000, 7500, 10000]), (7, 7, [6, 6.5, 7, 7.5, 8])],
)  # fmt: skip
def test_ticks_are_round_numbers_around_the_values(low, high, expected):
    assert figures.ticks(low, high) == expected


def any_value(rng):
    """A value that a file may hold, of any size: 0, among the least, or in between."""
    size = rng.choice([0.0, 5e-324, 10.0 ** rng.integers(-322, 300), rng.uniform(1e-3, 1e3)])
    return float(rng.choice([1, -1]) * size * rng.uniform(0.5, 2))


def beside(value, rng):
    """Another, which may be the next that there is."""
    factor = 1 + 10.0 ** rng.integers(-17, 2)
    others = [math.nextafter(value, math.inf), value * factor, -value, any_value(rng)]
    return float(rng.choice([other for other in others if figures.can_be_drawn(other)]))


def labelled_values(text):
    """The values that stand beside a curve's axis, from below."""
    labels = re.findall(r'text-anchor="end">([^<]+) u</text>', text)
    return [float(label.replace(",", "")) for label in labels]


def test_curves_of_any_values_are_drawn_between_round_numbers_that_can_be_told_apart():
    rng = np.random.default_rng(0)
    pairs = [(1e-14, 2e-14), (1e16, math.nextafter(1e16, 2e16)), (-1e300, 1e300), (0.0, 5e-324), (1e-300, 1e-300)]
    for low, high in [*pairs, *((x, beside(x, rng)) for x in (any_value(rng) for _ in range(2000)))]:
        low, high = min(low, high), max(low, high)
        values = figures.ticks(low, high)
        assert 2 <= len(values) <= 8, (low, high)
        slack = 1e-8 * (values[1] - values[0])
        assert values[0] - slack <= low <= high <= values[-1] + slack, (low, high)
        text = figures.chart("x", [(1, low), (2, high)], " u")
        for x, y in coordinates(text):
            assert 0 <= x <= figures.CHART_WIDTH, (low, high)
            assert 0 <= y <= figures.CHART_HEIGHT, (low, high)
        assert labelled_values(text) == sorted(set(labelled_values(text))), (low, high)
        assert labelled_values(text) == pytest.approx(values, rel=0, abs=(values[1] - values[0]) / 10)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.9997, 0.99985, ["0.9997", "0.99975", "0.9998", "0.99985"]),
     (1000, 1010, ["1,000", "1,002.5", "1,005", "1,007.5", "1,010"]),
     (0, 3e-14, ["0", "1e-14", "2e-14", "3e-14"])],
)  # fmt: skip
def test_an_axis_is_labelled_in_as_many_digits_as_its_steps_need(low, high, expected):
    assert (
        re.findall(r'text-anchor="end">([^<]+) u</text>', figures.chart("x", [(1, low), (2, high)], " u")) == expected
    )


def test_a_long_curve_keeps_its_extremes():
    rng = np.random.default_rng(0)
    points = [(step, float(value)) for step, value in enumerate(rng.random(5000))]
    points[1234], points[4321] = (1234, 50.0), (4321, -50.0)
    thin = figures.thinned(points, 400)
    assert len(thin) <= 400
    assert (1234, 50.0) in thin
    assert (4321, -50.0) in thin
    assert [step for step, _ in thin] == sorted({step for step, _ in thin})


def test_the_first_micro_batch_is_shown_and_then_let_go_of(tmp_path):
    def micro_batches():
        for i in range(3):
            yield torch.zeros(2, 3, 8, 8), torch.tensor([i, 0])

    with TrainLog(str(tmp_path), num_steps=3, images_per_step=2, log_every=1) as log:
        seen = figures.show_first(log, micro_batches(), ["ant", "bee", "cat"])
        kept = weakref.ref(next(seen)[0])
        assert [labels[0].item() for _, labels in seen] == [1, 2]
        assert kept() is None


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, "0"), (0.03125, "0.03125"), (999.97, "1,000"), (9999.6, "10,000"), (999999.6, "1,000,000"), (1e-6, "1e-06")],
)
def test_numbers_are_written_out_up_to_a_million(value, expected):
    assert figures.number(value) == expected


def test_an_axis_of_a_curve_that_hardly_changes_stays_near_it():
    low, *_, high = figures.ticks(98.89, 98.8989)
    assert 98 < low <= 98.89
    assert 98.8989 <= high < 100
