"""The page that a run leaves: right numbers, whole in itself, harmless whatever the names are."""

import base64
import functools
import io
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.reports import BALANCED, COMMANDS, EVIL, LINES, TIMED, make_contents
from utils import figures, hardware, report
from utils.signals import Stopped

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Elements as (tag, attributes), and the texts of each table's rows and of commands; fails unless tags balance."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.open, self.tables, self.texts, self.codes = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "code":
            self.codes.append("")

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.texts.append(data)
        if "code" in self.open:
            self.codes[-1] += data
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def table(self, *head):
        """The rows of the table that begins with this one."""
        return next(rows[1:] for rows in self.tables if rows[0] == list(head))


@pytest.fixture
def make(tmp_path):
    """``make(classes, matrix, lines, **changes)``: contents of a report, with their log in ``tmp_path``."""
    return functools.partial(make_contents, tmp_path)


@pytest.fixture
def page(make):
    return Page(report.render(make()))


def test_the_head_shows_the_best_evaluation(page, make):
    text = " ".join(page.texts)
    for words in ("pets", "ViT-demo on pets", "62.50 %", "0.7500", "30 of 30 steps"):
        assert words in text
    assert "not finished" not in text
    assert "The training is not finished" in report.render(make(step=20))


def test_every_number_of_the_tables(page):
    assert page.table("step", "accuracy", "loss") == [["20", "62.50 %", "0.75000"], ["30", "50.00 %", "0.87500"]]
    assert page.table("truth", "predicted", "images") == [["cat", "bee", "2"], ["ant", "bee", "1"]]
    assert page.table(*CLASS_HEAD) == [
        ["cat", "2", "1", "0 of 2", "0.00 %", ""],
        ["ant", "0", "3", "3 of 4", "75.00 %", ""],
        ["bee", "1", "0", "2 of 2", "100.00 %", ""],
    ]
    assert page.table("flag", "value", "default") == [["--name", "pets", "None"], ["--learning_rate", "0.05", "0.03"]]
    assert [["torch", "1.2.3"], ["device", "cpu, a processor"]] in page.tables
    assert [["wall time", "12.5 s"]] in page.tables


CLASS_HEAD = ("class", "no.", "trained on", "right", "accuracy", "")


def test_commands_and_flags_at_their_defaults_stand_as_they_are_typed(page):
    assert page.codes == [*(command for _, command in COMMANDS), "--seed 42"]


def test_time_is_shown_where_every_line_has_it(make):
    page = Page(report.render(make(lines=TIMED)))
    assert page.table("step", "trained", "accuracy", "loss")[0] == ["20", "40 s", "62.50 %", "0.75000"]
    text = " ".join(page.texts)
    assert "trained until then 40 s" in text
    assert text.count("45 s") == 5  # below each curve
    mixed = [*LINES[:3], *TIMED[3:]]  # a run of an earlier version that was resumed by this one
    for lines in (LINES, mixed):
        text = " ".join(Page(report.render(make(lines=lines))).texts)
        assert "45 s" not in text
        assert "trained until then" not in text


def test_balanced_accuracy_is_shown_beside_accuracy(make):
    head = ["step", "accuracy", "loss"]
    mixed = [*LINES[:3], *BALANCED[3:]]  # a run of an earlier version that was resumed by this one
    for lines, more in ((LINES, []), (mixed, []), (BALANCED, ["balanced accuracy"])):
        page = Page(report.render(make(lines=lines)))
        assert "its balanced accuracy 58.33 %" in " ".join(page.texts)  # of 3/4, 2/2 and 0/2
        assert page.table(*head, *more)[0] == ["20", "62.50 %", "0.75000", *["37.50 %" for _ in more]]


def test_balanced_accuracy_leaves_out_classes_without_test_images(make):
    page = Page(report.render(make(matrix=((3, 1, 0), (0, 2, 0), (0, 0, 0)))))
    assert "its balanced accuracy 87.50 %" in " ".join(page.texts)


def images_of(page):
    """The images of a page, with their attributes."""
    found = []
    for attributes in page.all("img"):
        kind, data = attributes["src"].split(",", 1)
        assert kind == "data:image/png;base64"
        found.append((Image.open(io.BytesIO(base64.b64decode(data))), attributes))
    return found


def test_a_mistake_has_its_image_its_classes_and_the_probability(page, make):
    (matrix, described), *mistakes = images_of(page)
    expected = figures.confusion(np.array([[3, 1, 0], [0, 2, 0], [0, 2, 0]]), ["ant", "bee", "cat"])
    np.testing.assert_array_equal(np.asarray(matrix), np.asarray(expected))
    assert "5 of 8 images are on the diagonal" in described["alt"]
    assert [image.getpixel((0, 0)) for image, _ in mistakes] == [(7,) * 3, (6,) * 3, (3,) * 3]
    assert [attributes["alt"].split(": ")[1] for _, attributes in mistakes] == [
        "cat, taken for bee", "cat, taken for bee", "ant, taken for bee",
    ]  # fmt: skip
    assert "75.00 %" in page.texts


def test_without_mistakes_the_page_says_so(make):
    text = report.render(make(matrix=np.eye(3, dtype=int)))
    assert "every test image was recognised" in text
    assert "No image was taken for another class" in text


def test_a_class_without_test_images_has_no_accuracy(make):
    page = Page(report.render(make(matrix=((3, 1, 0), (0, 2, 0), (0, 0, 0)))))
    assert page.table(*CLASS_HEAD)[-1] == ["cat", "2", "1", "0 of 0", "no images", ""]


def test_the_page_is_whole_in_itself(make):
    text = report.render(make(lines=TIMED))
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in page.elements}
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            assert name not in ("srcset", "action", "background", "poster", "xlink:href", "href"), (tag, name)
            if name == "src":
                assert value.startswith("data:image/png;base64,")
    assert "://" not in text
    assert "url(" not in text
    assert "@import" not in text


def test_names_are_text_whatever_is_in_them(make):
    classes = [f"{EVIL}{i}" for i in range(2)]
    text = report.render(
        make(
            classes, ((0, 1), (0, 1)), name=EVIL, subject=EVIL, facts={EVIL: EVIL}, timing={EVIL: EVIL},
            flags={EVIL: (EVIL, None), f"{EVIL}2": (EVIL, EVIL)}, commands=[(EVIL, EVIL)],
        )
    )  # fmt: skip
    page = Page(text)
    assert "script" not in {tag for tag, _ in page.elements}
    assert [set(attributes) for attributes in page.all("img")] == [{"src", "alt", "width", "height"}] * 2
    assert page.all("img")[1]["alt"].endswith(f": {EVIL}0, taken for {EVIL}1")
    assert page.table(*CLASS_HEAD)[0][0] == f"{EVIL}0"
    assert page.codes == [EVIL, f"{EVIL}2 {EVIL}"]
    assert "<script" not in text


def test_everything_that_is_drawn_is_also_said_in_words(page):
    assert page.all("html")[0]["lang"] == "en"
    assert len(page.all("h1")) == 1
    for image in page.all("img"):
        assert image["alt"]
    for drawn in page.all("svg"):
        assert drawn["role"] == "img"
        assert drawn["aria-label"]
    assert len(page.all("caption")) == len(page.all("table"))
    assert {cell["scope"] for cell in page.all("th")} == {"row", "col"}
    identifiers = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    labelled = {attributes["aria-labelledby"] for _, attributes in page.elements if "aria-labelledby" in attributes}
    assert labelled <= set(identifiers)


@pytest.mark.parametrize("trouble", ["a folder in its place", "no logs", "{", "3", '{"secs": 1}', '{"step": "a"}'])
def test_a_report_that_cannot_be_written_is_a_warning(trouble, make, tmp_path, caplog):
    path, contents = tmp_path / "a_report.html", make()
    if trouble == "a folder in its place":
        os.makedirs(path)
    elif trouble == "no logs":
        os.remove(tmp_path / "metrics.jsonl")
    else:
        (tmp_path / "metrics.jsonl").write_text(trouble)  # somebody edited it
    report.write_report(str(path), lambda: contents)
    assert f"The report {path} could not be written" in caplog.text
    assert not path.is_file()


@pytest.mark.parametrize("error", [ZeroDivisionError("by zero"), MemoryError(), KeyError("a class"), AssertionError()])
def test_whatever_fails_in_a_report_is_a_warning_with_its_kind(error, tmp_path, caplog):
    def fail():
        raise error

    report.write_report(str(tmp_path / "a_report.html"), fail)
    assert f"({type(error).__name__}: {error})" in caplog.text
    assert not list(tmp_path.iterdir())


def test_a_signal_ends_a_report():
    def fail():
        raise Stopped(2, "at once")

    with pytest.raises(Stopped):
        report.write_report("a_report.html", fail)


def test_curves_are_drawn_of_what_is_a_number(make):
    nan, inf = float("nan"), float("inf")
    lines = [{**line, "images_per_sec": x} for line, x in zip(LINES, (nan, 900.0, 1e301, inf, 1000.0))]
    tiny = [{**line, "train/lr": 1e-14 / line["step"]} if "train/lr" in line else line for line in lines]
    text = report.render(make(lines=tiny))
    assert text.count("<svg") == len(report.CURVES)
    (speed,) = re.findall(r'aria-label="Images per second[^"]*"', text)
    assert "from 900 to 1,000" in speed
    assert " nan" not in text
    assert (
        report.render(make(lines=[{**line, "train/lr": nan} for line in LINES])).count("<svg") == len(report.CURVES) - 1
    )


def test_a_report_replaces_the_one_before(make, tmp_path):
    path = tmp_path / "a_report.html"
    path.write_text("an older one")
    report.write_report(str(path), make)
    assert path.read_text(encoding="utf-8") == report.render(make())


def test_versions_are_those_that_run():
    found = hardware.versions()
    assert torch.__version__.split("+")[0] == found["torch"].split("+")[0]
    assert found["numpy"] == np.__version__
