"""Downloads from a loopback server that behaves as badly as the network does."""

import os
import resource
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from models.configs import CONFIGS
from models.published import PUBLISHED, UPSTREAMS, find
from tests.helpers.servers import Bucket, make_content, serving
from tools import _transfer, download
from utils import files

REMOTE = "/imagenet21k/ViT-B_32.npz"
FILE = "imagenet21k_ViT-B_32.npz"
CONTENT = make_content(0)


@pytest.fixture
def server(monkeypatch):
    """A server with one file; failures are followed by no pause."""
    monkeypatch.setattr(_transfer, "PAUSE_SECS", 0.0)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving(Bucket()) as server:
        server.files[REMOTE] = CONTENT
        yield server


@pytest.fixture
def fetch(server, tmp_path, capsys):
    """``fetch()`` runs the tool; returns the exit code and standard error's lines."""

    def run(to=tmp_path):
        status = download.main(["ViT-B_32", "--base_url", server.url, "--to", str(to)])
        return status, capsys.readouterr().err.splitlines()

    return run


def names_in(folder):
    return sorted(p.name for p in Path(folder).iterdir())


def test_a_file_arrives_once_under_the_name_that_training_looks_for(server, fetch, tmp_path):
    path = tmp_path / "new" / FILE
    assert fetch(to=tmp_path / "new")[0] == 0
    assert names_in(tmp_path / "new") == [FILE]
    assert path.read_bytes() == CONTENT
    assert find(str(tmp_path / "new"), "ViT-B_32") == str(path)
    path.write_bytes(b"mine")
    assert fetch(to=tmp_path / "new")[0] == 0
    assert path.read_bytes() == b"mine"
    assert server.requests == [None]
    assert fetch(to=tmp_path / "new" / "ViT-B_32.npz")[0] == 0
    assert (tmp_path / "new" / "ViT-B_32.npz").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("model", "upstream", "remote", "file"),
    [
        ("R50+ViT-B_16", None, "/imagenet21k/R50+ViT-B_16.npz", "imagenet21k_R50-ViT-B_16.npz"),
        ("ViT-B_16-224", None, "/imagenet21k+imagenet2012/ViT-B_16-224.npz", "imagenet2012_ViT-B_16-224.npz"),
        ("ViT-B_32", "imagenet21k+imagenet2012", "/imagenet21k+imagenet2012/ViT-B_32.npz", "imagenet2012_ViT-B_32.npz"),
        ("R50-ViT-L_32", "imagenet21k", "/imagenet21k/R50+ViT-L_32.npz", "imagenet21k_R50-ViT-L_32.npz"),
        ("ViT-B_8", "augreg", "/augreg/B_8-i21k-300ep-lr_0.001-aug_medium2-wd_0.1-do_0.0-sd_0.0.npz",
         "augreg_ViT-B_8.npz"),
        ("ViT-B_32", "augreg", "/augreg/B_32-i21k-300ep-lr_0.001-aug_light1-wd_0.1-do_0.0-sd_0.0.npz",
         "augreg_ViT-B_32.npz"),
    ],
)  # fmt: skip
def test_each_upstream_has_its_place_and_its_name(server, tmp_path, model, upstream, remote, file):
    server.files = {remote: make_content(1)}
    flags = [] if upstream is None else ["--upstream", upstream]
    assert download.main([model, "--base_url", server.url + "/", "--to", str(tmp_path), *flags]) == 0
    assert names_in(tmp_path) == [file]


# ---- cut off, resumed, changed, damaged ----


def test_dropped_connections_are_resumed_where_they_broke_off(server, fetch, tmp_path):
    server.every = {"drop": 12_000}  # more drops than tries in a row: each brings something
    assert fetch()[0] == 0
    assert (tmp_path / FILE).read_bytes() == CONTENT
    assert server.requests == [None, *(f"bytes={at}-" for at in range(12_000, len(CONTENT), 12_000))]


def test_another_run_resumes_the_part_that_the_first_left(server, fetch, tmp_path):
    server.faults = [{"drop": 50_000}, *[{"status": 503}] * 3]
    status, err = fetch()
    assert status == 1
    assert "503" in err[-1]
    assert f"{FILE}.part stays, and the same command resumes it" in err[-1]
    assert names_in(tmp_path) == [f"{FILE}.part", f"{FILE}.part.from"]
    assert fetch()[0] == 0
    assert server.requests[-1] == "bytes=50000-"
    assert (tmp_path / FILE).read_bytes() == CONTENT
    assert names_in(tmp_path) == [FILE]


def test_a_part_that_is_whole_is_only_verified(server, fetch, tmp_path):
    (tmp_path / FILE).mkdir()  # so that the whole file cannot get its name
    assert fetch()[0] == 1
    (tmp_path / FILE).rmdir()
    assert fetch()[0] == 0
    assert server.requests == [None, f"bytes={len(CONTENT)}-"]  # which the server refuses
    assert (tmp_path / FILE).read_bytes() == CONTENT


@pytest.mark.parametrize("size", [25_000, 30_000, 5_000])
@pytest.mark.parametrize("is_obeyed", [True, False])
def test_a_file_that_has_changed_comes_whole(server, fetch, tmp_path, size, is_obeyed):
    new = make_content(1, size)
    server.faults = [{"drop": 50_000}, {"replace": new, "ignore_if_range": not is_obeyed}]
    assert fetch()[0] == 0
    assert server.requests == [None, "bytes=50000-"] + [None] * (not is_obeyed)  # the final check finds it out
    assert (tmp_path / FILE).read_bytes() == new


@pytest.mark.parametrize("notes", ["", "http://elsewhere/x\n1", "{"])
def test_a_part_of_another_address_or_without_a_version_is_not_resumed(server, fetch, tmp_path, notes):
    (tmp_path / f"{FILE}.part").write_bytes(b"x" * 1000)
    (tmp_path / f"{FILE}.part.from").write_text(notes)
    server.every = {"headers": {"ETag": None}}
    server.faults = [{"drop": 50_000}]
    assert fetch()[0] == 0
    assert server.requests == [None, None]
    assert (tmp_path / FILE).read_bytes() == CONTENT


@pytest.mark.parametrize("fault", [{"corrupt": 70_000}, {"headers": {"Content-Length": None}, "drop": 50_000}])
def test_damaged_bytes_are_fetched_again(server, fetch, tmp_path, fault):
    server.faults = [fault]
    assert fetch()[0] == 0
    assert server.requests == [None, None]
    assert (tmp_path / FILE).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"corrupt": 70_000}, "has the md5"),
        *(
            ({"corrupt": 70_000, "headers": {"x-goog-hash": value}}, "Bad CRC-32")
            for value in (None, "crc32c=AAAAAA==", "md5=!", "md5=AAAA")
        ),
        ({"headers": {"Content-Length": "60000"}}, "has the md5"),
        ({"replace": b"<html>Please log in</html>", "headers": {"x-goog-hash": None}}, "no .npz archive"),
    ],
)
def test_bytes_that_stay_damaged_are_refused_also_without_an_md5(server, fetch, tmp_path, fault, words):
    server.every = fault
    status, err = fetch()
    assert status == 1
    assert words in err[-1]
    assert len(server.requests) == 2
    assert names_in(tmp_path) == []


# ---- what ends a download ----


@pytest.mark.parametrize(("status", "tries"), [(404, 1), (403, 1), (500, 3), (429, 3)])
def test_an_answer_of_the_server_is_one_line(server, fetch, tmp_path, status, tries):
    server.every = {"status": status}
    code, err = fetch()
    assert code == 1
    assert f"the server answered {status}" in err[-1]
    assert server.url + REMOTE in err[-1]
    assert "stays" not in err[-1]  # nothing came
    assert len(server.requests) == tries
    assert names_in(tmp_path) == []


def test_a_server_that_falls_silent_is_given_up(server, fetch, monkeypatch):
    monkeypatch.setattr(_transfer, "TIMEOUT_SECS", 0.2)
    server.every, server.faults = {"wait": 1}, [{"wait": 0, "slow": 1}]
    status, err = fetch()
    assert status == 1
    assert "broke off" in "".join(err)
    assert "not a byte within 0.2 s" in err[-1]


def test_nobody_listening_is_one_line(server, fetch):
    server.shutdown()
    server.server_close()
    status, err = fetch()
    assert status == 1
    assert "cannot be reached" in err[-1]


def test_a_disk_without_room_is_named_before_the_download(fetch, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10_000))
    status, err = fetch()
    assert status == 1
    assert "10,000 free" in err[-1]
    assert names_in(tmp_path) == []


def test_a_disk_that_fills_up_is_one_line(fetch, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        status, err = fetch()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 1
    assert f"{FILE} could not be downloaded" in err[-1]
    assert "File too large" in err[-1]
    assert not (tmp_path / FILE).exists()


@pytest.mark.parametrize("after", [0, 100_000])
def test_ctrl_c_leaves_what_came_for_the_next_time(server, fetch, tmp_path, after):
    server.every = {"slow": 0.01} if after else {"wait": 1}
    server.files[REMOTE] = content = make_content(0, 1_000_000)
    part = tmp_path / f"{FILE}.part"

    def interrupt():
        while not (part.exists() and part.stat().st_size >= after if after else server.requests):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    status, err = fetch()
    assert (status, err[-1]) == (130, "tools.download: error: interrupted")
    assert ("resumes it" in "".join(err)) == (after > 0)
    server.every = {}
    got = part.stat().st_size if after else 0
    assert fetch()[0] == 0
    assert server.requests == [None, f"bytes={got}-" if after else None]
    assert (tmp_path / FILE).read_bytes() == content


def test_one_process_at_a_time_downloads_a_file(server, fetch, tmp_path):
    pytest.importorskip("fcntl", reason="this system has no locks")
    held, release = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        with files.file_lock(f"{tmp_path / FILE}.part.lock", "busy"):
            os.write(held[1], b"1")
            os.read(release[0], 1)
        os._exit(0)
    try:
        os.read(held[0], 1)
        status, (error,) = fetch()
        assert status == 2
        assert f"process {child} is downloading {tmp_path / FILE}; wait for it, or stop it" in error
        assert server.requests == []
    finally:
        os.write(release[1], b"1")
        os.waitpid(child, 0)
    assert fetch()[0] == 0
    assert names_in(tmp_path) == [FILE]


@pytest.mark.parametrize("there", [True, False])
def test_a_reader_that_leaves_ends_it_between_two_files(server, tmp_path, monkeypatch, there):
    if there:
        (tmp_path / FILE).touch()
    read, write = os.pipe()
    os.close(read)
    models = ["ViT-B_32", "ViT-L_32", "--base_url", server.url, "--to", str(tmp_path)]
    with open(write, "w", buffering=1) as f:
        monkeypatch.setattr(sys, "stdout", f)
        assert download.main(models) == 141
    assert server.requests == [None] * (not there)


# ---- the flags ----

NO_ADDRESS = ("ftp://host", "localhost:8000", "https:///vit", "http://host:port", "http://ho st", "http://[::")


@pytest.mark.parametrize("url", NO_ADDRESS)
def test_an_address_that_is_none_is_one_line(capsys, url):
    assert download.main(["ViT-B_32", "--base_url", url]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert f"--base_url {url} is no address; expected https://" in error


def test_the_list_names_every_file_and_those_that_are_there(tmp_path, capsys):
    (tmp_path / FILE).touch()
    assert download.main(["--list", "--to", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + sum(map(len, UPSTREAMS.values()))
    assert [line.split()[:2] for line in lines if line.endswith("there")] == [["ViT-B_32", "imagenet21k"]]
    rows = [line.split() for line in lines[1:]]
    models = [model for model, *_ in rows]
    for model in models:  # README.md: the first is taken
        assert download.choose(model, None) == (rows[models.index(model)][1], model)


def test_every_listed_file_is_of_a_known_model_and_the_published_ones_come_first():
    for published in UPSTREAMS.values():
        assert {name.removesuffix("-224") for name in published} <= set(CONFIGS)
    for name, path in PUBLISHED.items():
        upstream, chosen = download.choose(name, None)
        assert UPSTREAMS[upstream][chosen] == path
