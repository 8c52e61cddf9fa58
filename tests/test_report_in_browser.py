"""The report in a real browser: all of it in view on a phone, on a large screen and on paper, without a request."""

import http.server
import re
import threading
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import browser
from tests.helpers.reports import COMMANDS, EVIL, TIMED, make_contents
from utils import figures, report


@pytest.fixture
def chromium(tmp_path):
    program = browser.find()
    if program is None:
        pytest.skip("needs Chromium or Chrome, which is not installed")
    with browser.Browser(program, str(tmp_path / "profile")) as b:
        yield b


#: Elements of the page that reach over its right edge or, on paper, show only a part of what they hold.
WIDE = "[...document.body.querySelectorAll('*')].filter(e => e.getBoundingClientRect().right > innerWidth + 0.5).length"
CUT = (
    "[...document.body.querySelectorAll('div, table, dd, li')].filter(e => e.scrollHeight > e.clientHeight + 1).length"
)
#: The best evaluation's row lies within its box, wherever that is scrolled.
BEST_IN_VIEW = """[0, 1e6].map(top => {
  const box = document.querySelector('.charts .scroll'), row = box.querySelector('.best td');
  box.scrollTop = top;
  const [inner, outer] = [row, box].map(e => e.getBoundingClientRect());
  return outer.height < box.scrollHeight && inner.top >= outer.top - 1 && inner.bottom <= outer.bottom + 1;
})"""
#: Sums of red, green and blue: of the ground and of what is written on it.
LIGHTNESS = """[getComputedStyle(document.body)].flatMap(s => [s.backgroundColor, s.color])
  .map(c => c.match(/\\d+/g).reduce((sum, x) => sum + +x, 0))"""
COPIED = """[...document.querySelectorAll('.commands code')].map(e => {
  getSelection().selectAllChildren(e);
  return getSelection().toString();
})"""


@pytest.mark.parametrize("count", [10, 100])
def test_a_browser_shows_all_of_it_on_any_screen_and_on_paper(count, chromium, tmp_path):
    path = tmp_path / "a report.html"
    classes = [f"{EVIL}{i}" for i in range(count - 1)] + ["a_name_without_any_space_in_it" * 3]
    matrix = np.eye(count, dtype=int) * 50 + np.random.default_rng(0).integers(0, 2, (count, count))
    evaluations = [{"step": n, "secs": 3.0 * n, "test/accuracy": 0.5, "test/loss": 1.0} for n in range(31, 71)]
    path.write_text(report.render(make_contents(tmp_path, classes, matrix, [*TIMED, *evaluations])), encoding="utf-8")
    chromium.call("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=0, uploadThroughput=0)
    chromium.open(path.as_uri())
    assert chromium.value("document.compatMode") == "CSS1Compat"
    assert chromium.value("document.querySelectorAll('svg').length") == 5
    assert set(chromium.value("[...document.images].map(i => i.naturalWidth)")[1:]) == {figures.MISTAKE_PX}
    assert chromium.value("document.querySelector('h1').textContent") == "pets"
    assert chromium.value(COPIED) == [command for _, command in COMMANDS]
    for width in (1280, 390):
        chromium.resize(width, 844)
        assert chromium.value("document.documentElement.scrollWidth") == width
        assert chromium.value(WIDE) == 0
        assert chromium.value(BEST_IN_VIEW) == [True, True]
    assert chromium.value(CUT) > 0  # long tables scroll
    for media, scheme, is_light in (("screen", "light", True), ("screen", "dark", False), ("print", "dark", True)):
        chromium.emulate(media, scheme)
        ground, ink = chromium.value(LIGHTNESS)
        assert (ground > ink) == is_light
    chromium.resize(718, 1047)  # A4 without margins of 10 mm, still printed
    assert chromium.value(WIDE) == 0
    assert chromium.value(CUT) == 0
    assert chromium.requests() == [path.as_uri()]
    assert chromium.complaints() == []


def test_the_page_of_a_training_renders_in_the_same_way(finetuned_digits, chromium):
    path = Path(finetuned_digits).with_name("digits_report.html")
    chromium.resize(390, 844)
    chromium.open(path.as_uri())
    assert chromium.value("document.querySelector('h1').textContent") == "digits"
    assert chromium.value("document.querySelectorAll('figure svg').length") == 5
    assert chromium.value("[...document.images].slice(1).map(i => i.naturalWidth)") == [128] * 24
    assert chromium.value(WIDE) == 0
    assert chromium.requests() == [path.as_uri()]
    assert chromium.complaints() == []


#: Ways in which a page may request something, by the path that the server then sees.
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
    """Serves the server's ``pages``, and notes every path that is requested."""

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


def test_the_page_forbids_what_may_sneak_into_it_to_fetch_anything(chromium, tmp_path):
    text = report.render(make_contents(tmp_path)).replace("</main>", "".join(REFERENCES.values()) + "</main>")
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
            chromium.open(f"http://127.0.0.1:{server.server_port}/free")  # requested without the policy
            chromium.wait_for("1", lambda _: set(REFERENCES) <= set(server.asked))
        finally:
            server.shutdown()


def test_the_browser_of_these_tests_hears_complaints_and_sees_requests(chromium, tmp_path):
    path = tmp_path / "bad.html"
    path.write_text('<!DOCTYPE html><img src="missing.png"><script>console.error("x"); nothing()</script>')
    chromium.open(path.as_uri())
    assert chromium.requests() == [path.as_uri(), (tmp_path / "missing.png").as_uri()]
    assert len(chromium.complaints()) >= 2
