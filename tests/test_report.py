"""The page that a run leaves: right numbers, whole in itself, harmless whatever the names, fine in a browser."""

import base64
import http.server
import io
import re
import threading
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers import browser
from utils import figures, report

EVIL = '<script>alert("x")</script>&\' onerror=alert(1) "><img src=http://example.com/a.png>'
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """The page's elements as (tag, attributes), the text of each table's rows, and whether tags are balanced."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.open, self.tables, self.texts = [], [], [], []
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

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.texts.append(data)
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def table(self, *head):
        """The rows of the table that begins with this one."""
        return next(rows[1:] for rows in self.tables if rows[0] == list(head))


LINES = [
    {"step": 10, "train/loss": 2.0, "train/lr": 0.03, "images_per_sec": 900.0},
    {"step": 20, "train/loss": 1.0, "train/lr": 0.015, "images_per_sec": 1100.0},
    {"step": 20, "test/accuracy": 0.625, "test/loss": 0.75},
    {"step": 30, "train/loss": 0.5, "train/lr": 0.0, "images_per_sec": 1000.0},
    {"step": 30, "test/accuracy": 0.5, "test/loss": 0.875},
]


def make(classes=("ant", "bee", "cat"), matrix=((3, 1, 0), (0, 2, 0), (0, 2, 0)), **changes):
    picture = figures.png(Image.new("RGB", (9, 7), (10, 20, 30)))
    values = dict(
        name="pets", subject="ViT-demo on pets", num_steps=30, step=30, lines=LINES, classes=list(classes),
        best_step=20, confusion=np.array(matrix),
        mistakes=[report.Mistake(picture, "picture 7", classes[0], classes[1], 0.9876)],
        settings={"--name": ("pets", None), "--seed": (42, 42), "--learning_rate": (0.05, 0.03)},
        facts={"torch": "1.2.3", "device": "cpu, a processor"}, timing={"wall time": "12.5 s"},
    )  # fmt: skip
    return report.Contents(**{**values, **changes})


@pytest.fixture
def page():
    return Page(report.render(make()))


def test_the_head_tells_the_best_evaluation(page):
    text = " ".join(page.texts)
    for words in ("pets", "ViT-demo on pets", "62.50 %", "0.7500", "30 of 30 updates"):
        assert words in text
    assert "goes on" not in text
    assert "The training goes on" in report.render(make(step=20))


def test_every_number_of_the_tables(page):
    assert page.table("update", "accuracy", "loss") == [["20", "62.50 %", "0.75000"], ["30", "50.00 %", "0.87500"]]
    assert page.table("", "ant", "bee", "cat") == [
        ["ant", "3", "1", "0"], ["bee", "0", "2", "0"], ["cat", "0", "2", "0"],
    ]  # fmt: skip
    assert page.table("truth", "predicted", "pictures") == [["cat", "bee", "2"], ["ant", "bee", "1"]]
    assert page.table("class", "pictures", "right", "accuracy", "") == [
        ["cat", "2", "0", "0.00 %", ""], ["ant", "4", "3", "75.00 %", ""], ["bee", "2", "2", "100.00 %", ""],
    ]  # fmt: skip
    assert page.table("flag", "value", "default") == [
        ["--name", "pets", "None"], ["--seed", "42", "42"], ["--learning_rate", "0.05", "0.03"],
    ]  # fmt: skip
    assert [["torch", "1.2.3"], ["device", "cpu, a processor"]] in page.tables
    assert [["wall time", "12.5 s"]] in page.tables


def test_a_flag_that_is_not_the_default_is_told_by_more_than_its_value():
    text = report.render(make())
    rows = {name: row for row, name in re.findall(r'<tr( class=best)?><th scope="row">(--\w+)', text)}
    assert rows == {"--name": " class=best", "--seed": "", "--learning_rate": " class=best"}


def test_a_mistake_has_its_picture_its_classes_and_the_probability(page):
    image = page.all("img")[0]
    kind, data = image["src"].split(",", 1)
    assert kind == "data:image/png;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).getpixel((0, 0)) == (10, 20, 30)
    assert image["alt"] == "picture 7: ant, taken for bee"
    assert "98.76 %" in page.texts


def test_without_mistakes_the_page_says_so():
    text = report.render(make(mistakes=[], matrix=np.eye(3, dtype=int)))
    assert "every test picture was recognised" in text
    assert "No picture was taken for another class" in text


def test_a_class_without_pictures_has_no_accuracy():
    page = Page(report.render(make(matrix=((3, 1, 0), (0, 2, 0), (0, 0, 0)))))
    assert page.table("class", "pictures", "right", "accuracy", "")[-1] == ["cat", "0", "0", "no pictures", ""]


@pytest.mark.parametrize("count", [3, 30, 150])
def test_the_page_is_whole_in_itself(count):
    classes = [f"class {i}" for i in range(count)]
    page = Page(report.render(make(classes, np.eye(count, dtype=int) + 1)))
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in page.elements}
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            assert name not in ("srcset", "action", "background", "poster", "xlink:href", "href"), (tag, name)
            if name == "src":
                assert value.startswith("data:image/png;base64,")
    text = report.render(make(classes, np.eye(count, dtype=int) + 1))
    assert "://" not in text
    assert "url(" not in text
    assert "@import" not in text


@pytest.mark.parametrize("count", [2, 30])
def test_names_are_text_whatever_is_in_them(count):
    classes = [f"{EVIL}{i}" for i in range(count)]
    text = report.render(
        make(
            classes, np.ones((count, count), dtype=int), name=EVIL, subject=EVIL,
            facts={EVIL: EVIL}, timing={EVIL: EVIL},
            settings={EVIL: (EVIL, None)}, mistakes=[report.Mistake(b"", EVIL, EVIL, EVIL, 0.5)],
        )
    )  # fmt: skip
    page = Page(text)
    assert "script" not in {tag for tag, _ in page.elements}
    assert len(page.all("img")) == 1
    assert {"src", "alt", "title"} == set(page.all("img")[0])
    assert page.all("img")[0]["alt"] == f"{EVIL}: {EVIL}, taken for {EVIL}"
    assert page.table("class", "pictures", "right", "accuracy", "")[0][0] == f"{EVIL}0"
    assert "<script" not in text


def test_who_cannot_see_is_told_what_there_is(page):
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


# ---- curves ----


def coordinates(text):
    return [tuple(map(float, point.split(","))) for point in re.search(r'points="([^"]+)"', text)[1].split()]


def test_a_curve_is_drawn_to_scale():
    text = report.chart("loss", [(10, 4.0), (20, 0.0), (40, 2.0)], marked=40)
    (x1, y1), (x2, y2), (x3, y3) = coordinates(text)
    assert x2 - x1 == pytest.approx((x3 - x1) / 3, abs=0.1)
    assert y3 - y1 == pytest.approx((y2 - y1) / 2, abs=0.1)
    assert y1 < y3 < y2  # up is more
    scale = {float(value): float(at) - 4 for at, value in re.findall(r'y="([\d.]+)" text-anchor="end">([\d.]+)<', text)}
    assert scale[4] == pytest.approx(y1, abs=0.1)
    assert scale[0] == pytest.approx(y2, abs=0.1)
    best = re.search(r'<circle class="best" r="4.5" cx="([\d.]+)" cy="([\d.]+)"><title>([^<]*)', text)
    assert (float(best[1]), float(best[2]), best[3]) == (x3, y3, "update 40: 2")


@pytest.mark.parametrize("points", [[(400, 0.9)], [(1, 0.5)], [(10, 0.0), (20, 0.0)], [(10, -1e-9), (20, 1e9)]])
def test_curves_of_a_point_or_without_height_stay_inside(points):
    for x, y in coordinates(report.chart("x", points)):
        assert 0 <= x <= report.CHART_WIDTH
        assert 0 <= y <= report.CHART_HEIGHT


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.25, 0.5, 0.75, 1]), (0.1, 2.3, [0, 1, 2, 3]), (92.5, 97.7, [92, 94, 96, 98]),
     (0, 10000, [0, 2500, 5000, 7500, 10000]), (7, 7, [6, 6.5, 7, 7.5, 8])],
)  # fmt: skip
def test_ticks_are_round_numbers_around_the_values(low, high, expected):
    assert report.ticks(low, high) == expected


def test_a_long_curve_keeps_its_extremes():
    rng = np.random.default_rng(0)
    points = [(step, float(value)) for step, value in enumerate(rng.random(5000))]
    points[1234], points[4321] = (1234, 50.0), (4321, -50.0)
    thin = report.thinned(points, 400)
    assert len(thin) <= 400
    assert (1234, 50.0) in thin
    assert (4321, -50.0) in thin
    assert [step for step, _ in thin] == sorted({step for step, _ in thin})


def test_a_drawn_matrix_has_a_cell_for_each_pair_that_occurs():
    matrix = np.diag(np.arange(1, 31))
    matrix[3, 7], matrix[29, 0] = 2, 1
    text = report.render(make([f"class {i}" for i in range(30)], matrix))
    drawn = re.search(r'<svg class="matrix".*?</svg>', text, re.DOTALL)[0]
    cells = {kind: set() for kind in ("right", "wrong")}
    for kind, path in re.findall(r'<path class="(right|wrong)"[^>]* d="([^"]+)"', drawn):
        cells[kind] |= {(int(y), int(x)) for x, y in re.findall(r"M(\d+) (\d+)h1v1h-1z", path)}
    assert cells == {"right": {(i, i) for i in range(30)}, "wrong": {(3, 7), (29, 0)}}
    assert drawn.count("class 3<") == 2  # the row's name and the column's


def test_versions_are_those_that_run():
    import torch

    found = report.versions()
    assert torch.__version__.split("+")[0] == found["torch"].split("+")[0]
    assert found["numpy"] == np.__version__


# ---- in a browser ----


@pytest.fixture
def chromium(tmp_path):
    program = browser.find()
    if program is None:
        pytest.skip("needs Chromium or Chrome, which is not installed")
    with browser.Browser(program, str(tmp_path / "profile")) as b:
        yield b


FITS = "document.documentElement.scrollWidth <= window.innerWidth"


@pytest.mark.parametrize("count", [10, 100])
def test_a_browser_renders_it_without_a_request_or_a_complaint(count, chromium, tmp_path):
    path = tmp_path / "a report.html"
    rng = np.random.default_rng(0)
    classes = [f"{EVIL}{i}" for i in range(count)]
    matrix = np.eye(count, dtype=int) * 50 + rng.integers(0, 2, (count, count))
    path.write_text(report.render(make(classes, matrix)), encoding="utf-8")
    chromium.call("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=0, uploadThroughput=0)
    chromium.open(path.as_uri())
    assert chromium.value("document.compatMode") == "CSS1Compat"
    assert chromium.value("document.querySelectorAll('svg').length") == (5 if count == 10 else 6)
    assert chromium.value("[...document.images].map(i => i.naturalWidth)") == [9]
    assert chromium.value("document.querySelector('h1').textContent") == "pets"
    for width in (1280, 400):
        chromium.resize(width, 900)
        assert chromium.value(FITS), width
    for scheme in ("light", "dark"):
        chromium.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        ground, ink = chromium.value(
            "(s => [s.backgroundColor, s.color].map(c => c.match(/\\d+/g).reduce((a, x) => a + +x, 0)))"
            "(getComputedStyle(document.body))"
        )
        assert (ground > ink) == (scheme == "light")
    assert chromium.requests() == [path.as_uri()]
    assert chromium.complaints() == []


def test_the_page_of_a_training_renders_in_the_same_way(finetuned_digits, chromium):
    path = Path(finetuned_digits).with_name("digits_report.html")
    chromium.open(path.as_uri())
    assert chromium.value("document.querySelector('h1').textContent") == "digits"
    assert chromium.value("document.querySelectorAll('figure svg').length") == 5
    widths = chromium.value("[...document.images].map(i => i.naturalWidth)")
    assert widths == [128] * 24
    assert chromium.requests() == [path.as_uri()]
    assert chromium.complaints() == []


#: Ways in which a page may ask for something, by what the server then hears.
REFERENCES = {
    "/picture": '<img src="/picture">',
    "/background": '<p style="background: url(/background)">x</p>',
    "/sheet": '<link rel="stylesheet" href="/sheet">',
    "/import": "<style>@import '/import';</style>",
    "/script": '<script src="/script"></script>',
    "/fetch": "<script>fetch('/fetch')</script>",
    "/frame": '<iframe src="/frame"></iframe>',
}


class Pages(http.server.BaseHTTPRequestHandler):
    """Serves the server's ``pages``, and notes every path that is asked for."""

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.server.asked.append(self.path)
        body = self.server.pages.get(self.path, b"")
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def test_the_page_forbids_what_may_sneak_into_it_to_fetch_anything(chromium):
    text = report.render(make()).replace("</main>", "".join(REFERENCES.values()) + "</main>")
    free, count = re.subn('<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    assert count == 1
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pages) as server:
        server.daemon_threads = True
        server.asked, server.pages = [], {"/report": text.encode(), "/free": free.encode()}
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        try:
            chromium.open(f"http://127.0.0.1:{server.server_port}/report")
            assert set(server.asked) - {"/favicon.ico"} == {"/report"}
            assert "Content Security Policy" in str(chromium.complaints())
            chromium.open(f"http://127.0.0.1:{server.server_port}/free")  # what would be asked for without it
            chromium.wait_for("1", lambda _: set(REFERENCES) <= set(server.asked))
        finally:
            server.shutdown()


def test_the_browser_of_these_tests_hears_complaints_and_sees_requests(chromium, tmp_path):
    path = tmp_path / "bad.html"
    path.write_text('<!DOCTYPE html><img src="missing.png"><script>console.error("x"); nothing()</script>')
    chromium.open(path.as_uri())
    assert chromium.requests() == [path.as_uri(), (tmp_path / "missing.png").as_uri()]
    assert len(chromium.complaints()) >= 2
