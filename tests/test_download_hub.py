"""tools.download where Google's bucket does not give a file: the real huggingface_hub against a loopback hub."""

from __future__ import annotations

import io
import os
import re
import time
import types

import pytest
import safetensors.torch
import torch

from models.published import GoogleFile, find, run_names
from tests.helpers.downloads import assert_same_weights, google_arrays, publish, timm_file
from tests.helpers.servers import Bucket, Hub, make_content, serving
from tools import _hub, _transfer, download

huggingface_hub = pytest.importorskip("huggingface_hub")
import huggingface_hub.constants as constants  # noqa: E402
import huggingface_hub.file_download as file_download  # noqa: E402

SAFE, BIN = "model.safetensors", "pytorch_model.bin"
REPOSITORY, OTHER = "timm/testing.orig_in21k", "timm/testing.augreg_in21k"
FILE = "imagenet21k_testing.npz"
RUN = "T-i21k-300ep-lr_0.001-aug_light1"


@pytest.fixture
def small_table(monkeypatch):
    """The testing model as if Google published it: one file of each upstream, the last of another run on the hub."""
    publish(
        GoogleFile("testing", "imagenet21k/testing", REPOSITORY),
        GoogleFile("testing", "augreg/T-best", OTHER, other_run=RUN),
        setitem=monkeypatch.setitem,
    )


@pytest.fixture
def bucket(monkeypatch, small_table):
    """A bucket that is closed."""
    monkeypatch.setattr(_transfer, "PAUSE_SECS", 0.0)
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    with serving(Bucket()) as server:
        server.every = {"status": 403}
        yield server


def forget_sessions():
    """Closes the sessions: before 1.0 an open one keeps the old settings."""
    getattr(huggingface_hub.utils, "reset_sessions", lambda: None)()


@pytest.fixture
def hub(monkeypatch, small_table, tmp_path):
    """A hub with the testing model, and a cache of its own; the library was imported before, so it is set here."""
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    with serving(Hub()) as server:
        server.add(REPOSITORY, SAFE, timm_file())
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        for module in (constants, file_download):  # before 1.0 the second has a copy
            if hasattr(module, "HUGGINGFACE_CO_URL_TEMPLATE"):
                monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(file_download, "time", types.SimpleNamespace(sleep=lambda seconds: None, time=time.time))
        forget_sessions()
        yield server
        forget_sessions()


def run(bucket, tmp_path, *args, models=("testing",), source="auto"):
    """Runs the tool with a bucket of its own, which falls back to the hub only because it is asked to."""
    flags = ["--base_url", bucket.url, "--to", str(tmp_path / "here"), "--source", source]
    return download.main([*models, *flags, *args])


def hub_only(tmp_path, *args, to=None):
    return download.main(["testing", "--source", "hub", "--to", str(to or tmp_path / "here"), *args])


def here(tmp_path):
    folder = tmp_path / "here"
    return sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []


def blobs(tmp_path):
    return list((tmp_path / "cache").glob("models--*/blobs/*"))


# ---- from the bucket to the hub ----


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        *(({"status": status}, str(status)) for status in (403, 404, 500)),
        ({"drop": 0}, ""),
        ({"html": True}, "no .npz archive"),
        ({"wait": 2}, "not a byte within 0.3 s"),
        ({"trickle": 0.1}, "not a byte within 0.3 s"),  # a socket's own limit begins anew with each byte
    ],
)
def test_the_hub_stands_in_for_a_bucket_that_gives_nothing(bucket, hub, tmp_path, monkeypatch, capsys, fault, words):
    bucket.every = fault
    html = b"<html>log in</html>"
    bucket.files["/imagenet21k/testing.npz"] = html if "html" in fault else make_content(0)
    if "within" in words:
        monkeypatch.setattr(_transfer, "TIMEOUT_SECS", 0.3)
    start = time.monotonic()
    assert run(bucket, tmp_path) == 0
    assert time.monotonic() - start < 1.8
    out, err = capsys.readouterr()
    assert here(tmp_path) == [FILE]
    assert_same_weights(tmp_path / "here" / FILE, google_arrays())
    (line,) = [line for line in err.splitlines() if "the Hugging Face hub is taken" in line]
    assert re.search(words, line)
    assert len(bucket.requests) == (2 if "html" in fault else 1)  # what came damaged is asked for once more
    assert f"imagenet21k/testing.npz: {hub.url}/{REPOSITORY} has the same weights" in out
    assert str(tmp_path / "cache") in out
    assert "without head and pre_logits" in out
    assert find(str(tmp_path / "here" / FILE), "testing")


def test_a_model_that_fails_stops_no_other_and_the_bucket_is_asked_once(bucket, hub, tmp_path, monkeypatch, capsys):
    publish(GoogleFile("ViT-Ti_16", "augreg/none"), setitem=monkeypatch.setitem)
    assert run(bucket, tmp_path, models=("ViT-Ti_16", "testing")) == 1
    assert here(tmp_path) == [FILE]
    assert len(bucket.requests) == 1
    taken, error = capsys.readouterr().err.splitlines()
    assert "the Hugging Face hub is taken" in taken
    assert "ViT-Ti_16.npz could not be downloaded: the server answered 403" in error


CUT = {"drop": 50_000, "status": 0}


@pytest.mark.parametrize(
    ("every", "faults", "requests"),
    [
        ({}, [], [None]),
        ({}, [CUT, {"status": 503}], [None, "bytes=50000-", "bytes=50000-"]),
        ({"status": 503}, [CUT], [None, *["bytes=50000-"] * 3]),
    ],
)
def test_the_bucket_is_asked_while_it_gives_anything(bucket, hub, tmp_path, capsys, every, faults, requests):
    bucket.every, bucket.faults, bucket.files["/imagenet21k/testing.npz"] = every, faults, make_content(0)
    assert run(bucket, tmp_path) == 0
    assert bucket.requests == requests
    assert here(tmp_path) == [FILE]  # no part stays
    if not every:
        assert hub.requests == []
        assert (tmp_path / "here" / FILE).read_bytes() == make_content(0)
    assert "stays" not in capsys.readouterr().err


def test_a_part_of_another_day_is_resumed_in_the_bucket(bucket, hub, tmp_path):
    bucket.every, bucket.files["/imagenet21k/testing.npz"] = {"status": 503}, make_content(0)
    bucket.faults = [CUT]
    assert run(bucket, tmp_path, source="google") == 1
    del bucket.requests[:]
    bucket.every, bucket.faults = {}, [{"status": 503}]
    assert run(bucket, tmp_path) == 0
    assert bucket.requests == ["bytes=50000-"] * 2
    assert hub.requests == []


@pytest.mark.parametrize("source", [[], ["--source", "google"]])
def test_a_mirror_that_is_named_is_all_that_is_asked(bucket, hub, tmp_path, capsys, source):
    assert download.main(["testing", "--base_url", bucket.url, "--to", str(tmp_path / "here"), *source]) == 1
    assert "403" in capsys.readouterr().err.splitlines()[-1]
    assert hub.requests == []


def test_a_full_disk_is_no_reason_to_ask_another_server(bucket, hub, tmp_path, monkeypatch, capsys):
    bucket.every, bucket.files["/imagenet21k/testing.npz"] = {}, make_content(0)
    monkeypatch.setattr("shutil.disk_usage", lambda path: types.SimpleNamespace(free=10_000))
    assert run(bucket, tmp_path) == 1
    assert "10,000 free" in capsys.readouterr().err.splitlines()[-1]
    assert hub.requests == []


# ---- the hub ----


@pytest.mark.parametrize("stays", [False, True])
def test_a_flipped_byte_is_found_and_the_file_fetched_again(hub, tmp_path, capsys, stays):
    hub.faults = [{"corrupt": 20_000}] * (2 if stays else 1)
    assert hub_only(tmp_path) == int(stays)
    assert "sha256" in capsys.readouterr().err
    assert hub.bytes_sent() == 2
    if stays:
        assert here(tmp_path) == blobs(tmp_path) == []
    else:
        assert_same_weights(tmp_path / "here" / FILE, google_arrays())


def test_a_file_that_was_damaged_in_the_cache_is_fetched_again_or_removed(hub, tmp_path, monkeypatch, capsys):
    def damage():
        (blob,) = blobs(tmp_path)
        content = bytearray(blob.read_bytes())
        content[20_000] ^= 1
        blob.write_bytes(content)

    assert hub_only(tmp_path, to=tmp_path / "one.npz") == 0
    damage()
    assert hub_only(tmp_path, to=tmp_path / "two.npz") == 0
    assert (tmp_path / "two.npz").read_bytes() == (tmp_path / "one.npz").read_bytes()
    del hub.requests[:]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    forget_sessions()
    assert hub_only(tmp_path, to=tmp_path / "three.npz") == 0  # the cache does where there is no network
    damage()
    assert hub_only(tmp_path, to=tmp_path / "four.npz") == 1
    assert "sha256" in capsys.readouterr().err
    assert hub_only(tmp_path, to=tmp_path / "five.npz") == 1
    assert "HF_HUB_OFFLINE is set, and the cache" in capsys.readouterr().err
    assert hub.requests == []


@pytest.mark.parametrize("corrupt", [False, True])
def test_without_a_sha256_in_the_etag_the_list_of_files_has_it(hub, tmp_path, capsys, corrupt):
    hub.etag = "made-of-parts-7"
    hub.every = {"corrupt": 20_000} if corrupt else {}
    assert hub_only(tmp_path) == int(corrupt)
    assert any("/tree/" in path for _, path in hub.requests)
    assert ("sha256" in capsys.readouterr().err) == corrupt


def test_a_cut_that_stays_says_that_the_file_starts_again(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    hub.faults = [{"drop": 30_000}]
    hub.every = {"refuse": 503}
    assert hub_only(tmp_path) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "503" in error or "starts it again" in error
    assert here(tmp_path) == []
    hub.every, hub.faults = {}, [{"drop": 30_000}]
    if hub_only(tmp_path) == 1:  # before 1.0 the library asks again only when it is called again
        assert huggingface_hub.__version__.startswith("0.")
        assert hub_only(tmp_path) == 0
    assert_same_weights(tmp_path / "here" / FILE, google_arrays())


def test_torchs_file_is_taken_where_there_is_no_other(hub, tmp_path):
    file = io.BytesIO()
    torch.save(safetensors.torch.load(timm_file()), file)
    hub.repositories = {REPOSITORY: {BIN: file.getvalue()}}
    assert hub_only(tmp_path) == 0
    assert_same_weights(tmp_path / "here" / FILE, google_arrays())


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (None, "is not there, or wants an HF_TOKEN"),
        ({"README.md": b"soon"}, "has none of model.safetensors, pytorch_model.bin"),
        (500, "500"),
        ({SAFE: timm_file("testing-hybrid")}, "cannot be converted to testing"),
        ({SAFE: b"<html>moved</html>"}, "HTML page"),
    ],
)
def test_what_no_source_gives_is_one_line_with_both_reasons_and_the_way_by_hand(
    bucket, hub, tmp_path, capsys, monkeypatch, files, words
):
    hub.status, hub.repositories = (files, {}) if files == 500 else (None, {REPOSITORY: files} if files else {})
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    for is_asked in (False, True):
        assert (run(bucket, tmp_path) if is_asked else hub_only(tmp_path)) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert words in error
        assert ("the server answered 403" in error) == is_asked
        google = bucket.url if is_asked else "https://storage.googleapis.com/vit_models"
        assert f"by hand: fetch {google}/imagenet21k/testing.npz" in error
        assert f"{hub.url}/{REPOSITORY}/resolve/main/model.safetensors" in error
        assert f"python -m tools.convert FILE --model_type testing --output {tmp_path / 'here' / FILE}" in error
        assert here(tmp_path) == []


def test_ctrl_c_says_that_the_file_starts_again(hub, tmp_path, monkeypatch, capsys):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", interrupt)
    assert hub_only(tmp_path) == 130
    first, last = capsys.readouterr().err.splitlines()
    assert "the same command starts it again" in first
    assert last == "tools.download: error: interrupted"
    assert here(tmp_path) == []


@pytest.mark.parametrize(("endpoint", "given", "expected"), [("x", None, "1"), ("x", "0", "0"), ("", None, None)])
def test_xet_does_not_go_past_a_mirror(monkeypatch, endpoint, given, expected):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "")  # so that it is put back
    monkeypatch.delenv("HF_HUB_DISABLE_XET")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if given is not None:
        monkeypatch.setenv("HF_HUB_DISABLE_XET", given)
    _hub.load()
    assert os.environ.get("HF_HUB_DISABLE_XET") == expected


# ---- which file stands for which ----


def test_another_run_keeps_its_own_name(bucket, hub, tmp_path, capsys):
    hub.add(OTHER, SAFE, timm_file(head=True, seed=1))
    assert run(bucket, tmp_path, "--upstream", "augreg") == 0
    assert here(tmp_path) == [f"{RUN}.npz"]
    out = capsys.readouterr().out
    assert f"has another AugReg run, {RUN}, which is written as {tmp_path / 'here' / RUN}.npz" in out
    assert "without" not in out  # the head is there, and no AugReg file has pre_logits
    assert_same_weights(tmp_path / "here" / f"{RUN}.npz", google_arrays(seed=1), left_out=("pre_logits",))
    assert run_names("testing") == [f"{RUN}.npz"]
    del hub.requests[:]
    assert run(bucket, tmp_path, "--upstream", "augreg") == 0
    assert "there already" in capsys.readouterr().out
    assert download.main(["--list", "--to", str(tmp_path / "here")]) == 0
    listed = [line for line in capsys.readouterr().out.splitlines() if line.endswith("there")]
    assert [line.split()[:2] for line in listed] == [["testing", "augreg"]]
    assert listed[0].endswith("another run is there")
    assert hub.requests == []


def test_another_run_is_not_written_under_the_name_of_the_recommended_one(hub, tmp_path, capsys):
    assert hub_only(tmp_path, "--upstream", "augreg") == 1  # the hub lacks it: nor by hand
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"which is another run, {RUN}; " in error
    assert error.endswith(f"--output {tmp_path / 'here' / RUN}.npz")
    hub.add(OTHER, SAFE, timm_file(seed=1))
    assert hub_only(tmp_path, "--upstream", "augreg", to=tmp_path / "augreg_testing.npz") == 1
    assert f"another run, {RUN}" in capsys.readouterr().err
    assert hub_only(tmp_path, "--upstream", "augreg", to=tmp_path / "mine.npz") == 0
    assert_same_weights(tmp_path / "mine.npz", google_arrays(seed=1))


def test_what_only_the_bucket_has_is_said(hub, tmp_path, capsys):
    for model, words in (("ViT-B_8", "no imagenet21k/ViT-B_8; it has --upstream augreg"),
                         ("R50-ViT-L_32", "no imagenet21k/R50+ViT-L_32; it has --upstream augreg"),
                         ("R26-ViT-B_32", "no imagenet21k/R26+ViT-B_32; by hand")):  # fmt: skip
        flags = ["--upstream", "imagenet21k", "--source", "hub", "--to", str(tmp_path / "here")]
        assert download.main([model, *flags]) == 1
        assert words in capsys.readouterr().err
    assert hub.requests == []
