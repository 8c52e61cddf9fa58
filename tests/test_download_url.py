"""tools.download --url: one file of any kind, from an address of the user's."""

import io
import shlex

import pytest

from models import npz
from models.published import find
from tests.helpers.downloads import assert_same_weights, google_arrays, timm_file
from tests.helpers.servers import Bucket, serving
from tools import convert, download


@pytest.fixture
def fetch(monkeypatch, tmp_path, capsys):
    """``fetch(content)`` serves a file and runs the tool; returns its exit code, its last error and its requests."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("tools._transfer.PAUSE_SECS", 0.0)

    def run(content, **fault):
        with serving(Bucket()) as server:
            server.files, server.faults = {} if content is None else {"/any/file": content}, [fault]
            status = download.main(["testing", "--url", f"{server.url}/any/file", "--to", str(tmp_path / "here")])
        return status, (capsys.readouterr().err.splitlines() or [""])[-1], server.requests

    return run


def names_in(folder):
    return sorted(p.name for p in folder.iterdir())


def npz_file():
    file = io.BytesIO()
    npz.write(file, google_arrays())
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "left_out"),
    [(timm_file(head=True), ("pre_logits",)), (timm_file(), ("head", "pre_logits")), (npz_file(), ())],
    ids=["timm", "no head", "npz"],
)
def test_a_file_of_any_kind_becomes_the_models_npz(fetch, tmp_path, content, left_out):
    status, _, requests = fetch(content, drop=50_000)
    assert (status, requests) == (0, [None, "bytes=50000-"])
    assert names_in(tmp_path / "here") == ["testing.npz"]
    assert_same_weights(tmp_path / "here" / "testing.npz", google_arrays(), left_out)
    assert find(str(tmp_path / "here"), "testing") == str(tmp_path / "here" / "testing.npz")


def test_another_file_is_one_line_and_leaves_nothing(fetch, tmp_path):
    status, error, _ = fetch(b"<html>log in</html>" * 100)
    assert status == 2
    assert "/any/file cannot be loaded as testing: it" in error
    assert names_in(tmp_path / "here") == []


def test_another_models_file_stays_and_the_command_that_is_named_converts_it(fetch, tmp_path):
    status, error, _ = fetch(timm_file("ViT-demo", head=True))
    assert status == 2
    assert "/any/file is of ViT-demo, not testing" in error
    assert convert.main(shlex.split(error.split("tools.convert ")[1])) == 0
    assert_same_weights(tmp_path / "here" / "ViT-demo.npz", google_arrays("ViT-demo"), ("pre_logits",))


def test_no_other_source_is_asked(fetch):
    status, error, requests = fetch(None)
    assert (status, requests) == (1, [None])
    assert "404" in error
