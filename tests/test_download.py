"""Downloads from a loopback server that behaves as badly as the network does."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from models.configs import CONFIGS
from models.published import PUBLISHED, UPSTREAMS, find
from tests.helpers.servers import Bucket, make_content, serving
from tools import _sources, _transfer, download

ROOT = Path(__file__).resolve().parent.parent
REMOTE = "/imagenet21k/ViT-B_32.npz"
FILE = "imagenet21k_ViT-B_32.npz"


@pytest.fixture
def server(monkeypatch):
    """A server with one file; failures are followed by no pause."""
    monkeypatch.setattr(_transfer, "PAUSES_SECS", (0.0, 0.0, 0.0))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving(Bucket()) as server:
        server.files[REMOTE] = make_content(0)
        yield server


def fetch(server, folder, *args):
    return download.main(["ViT-B_32", "--base_url", server.url, "--to", str(folder), *args])


def names_in(folder):
    return sorted(p.name for p in Path(folder).iterdir())


def test_a_file_arrives_under_the_name_that_training_looks_for(server, tmp_path, capsys):
    assert fetch(server, tmp_path / "new") == 0
    assert names_in(tmp_path / "new") == [FILE]
    assert (tmp_path / "new" / FILE).read_bytes() == server.files[REMOTE]
    assert find(str(tmp_path / "new"), "ViT-B_32") == str(tmp_path / "new" / FILE)
    assert f"{len(server.files[REMOTE]):,} bytes" in capsys.readouterr().out


def test_a_file_that_is_there_is_not_fetched_again(server, tmp_path, capsys):
    (tmp_path / FILE).write_bytes(b"mine")
    assert fetch(server, tmp_path) == 0
    assert "there already" in capsys.readouterr().out
    assert server.requests == []
    assert (tmp_path / FILE).read_bytes() == b"mine"


def test_a_file_gets_the_name_that_is_asked_for(server, tmp_path):
    assert fetch(server, tmp_path / "ViT-B_32.npz") == 0
    assert names_in(tmp_path) == ["ViT-B_32.npz"]


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


def test_dropped_connections_go_on_where_they_broke_off(server, tmp_path):
    content = server.files[REMOTE]
    server.every = {"drop": 12_000}  # more drops than tries in a row: each brings something
    assert fetch(server, tmp_path) == 0
    assert (tmp_path / FILE).read_bytes() == content
    assert server.requests == [None, *(f"bytes={at}-" for at in range(12_000, len(content), 12_000))]


def test_another_run_goes_on_with_the_part_that_the_first_left(server, tmp_path, capsys):
    server.faults = [{"drop": 50_000}, *[{"status": 503}] * 3]
    assert fetch(server, tmp_path) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "503" in error
    assert f"{FILE}.part stays, and the same command goes on with it" in error
    assert names_in(tmp_path) == [f"{FILE}.part", f"{FILE}.part.json"]
    del server.requests[:]
    assert fetch(server, tmp_path) == 0
    assert server.requests == ["bytes=50000-"]
    assert (tmp_path / FILE).read_bytes() == server.files[REMOTE]
    assert names_in(tmp_path) == [FILE]


def test_a_part_that_is_whole_is_only_verified(server, tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(_transfer.Download, "finish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        assert fetch(server, tmp_path) == 130
    del server.requests[:]
    assert fetch(server, tmp_path) == 0
    assert server.requests == []
    assert (tmp_path / FILE).read_bytes() == server.files[REMOTE]


def test_a_server_that_ignores_ranges_sends_all_of_it_again(server, tmp_path):
    server.faults = [{"drop": 50_000}, {"ignore_range": True}]
    assert fetch(server, tmp_path) == 0
    assert server.requests == [None, "bytes=50000-"]
    assert (tmp_path / FILE).read_bytes() == server.files[REMOTE]


@pytest.mark.parametrize("size", [25_000, 30_000, 5_000])
def test_a_file_that_has_changed_comes_anew_in_the_same_answer(server, tmp_path, size):
    new = make_content(1, size)
    server.faults = [{"drop": 50_000}, {"replace": new}]
    assert fetch(server, tmp_path) == 0
    assert server.requests == [None, "bytes=50000-"]  # If-Range asks for it
    assert (tmp_path / FILE).read_bytes() == new


@pytest.mark.parametrize(("size", "words"), [(25_000, "another file"), (30_000, "another file"), (5_000, "416")])
def test_the_halves_of_two_versions_are_not_put_together(server, tmp_path, capsys, size, words):
    new = make_content(1, size)
    server.faults = [{"drop": 50_000}, {"replace": new, "ignore_if_range": True}]
    assert fetch(server, tmp_path) == 0
    assert server.requests == [None, "bytes=50000-", None]
    error = capsys.readouterr().err
    assert words in error
    assert "md5" not in error  # it was known before the rest came
    assert (tmp_path / FILE).read_bytes() == new


def test_a_server_that_goes_on_at_another_byte_is_not_believed(server, tmp_path, capsys):
    size = len(server.files[REMOTE])
    server.faults = [{"drop": 50_000}, {"headers": {"Content-Range": f"bytes 40000-{size - 1}/{size}"}}]
    assert fetch(server, tmp_path) == 0
    assert "at another byte" in capsys.readouterr().err
    assert (tmp_path / FILE).read_bytes() == server.files[REMOTE]


def test_without_a_version_there_is_nothing_to_go_on_with(server, tmp_path):
    server.every = {"headers": {"ETag": 'W/"weak"'}}
    server.faults = [{"drop": 50_000}]
    assert fetch(server, tmp_path) == 0
    assert server.requests == [None, None]
    assert (tmp_path / FILE).read_bytes() == server.files[REMOTE]


def test_a_size_that_is_too_large_ends_after_the_tries(server, tmp_path, capsys):
    size = len(server.files[REMOTE])
    server.every = {"headers": {"Content-Length": str(size + 1000)}}
    assert fetch(server, tmp_path) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(rf"tools\.download: error: .*{FILE} could not be downloaded", error)
    assert FILE not in names_in(tmp_path)


def test_a_size_that_is_too_small_is_found_out(server, tmp_path, capsys):
    server.every = {"headers": {"Content-Length": "60000"}}
    assert fetch(server, tmp_path) == 1
    assert "md5" in capsys.readouterr().err.splitlines()[-1]
    assert names_in(tmp_path) == []


def test_corrupt_bytes_are_fetched_anew_once(server, tmp_path):
    server.faults = [{"corrupt": 70_000}]
    assert fetch(server, tmp_path) == 0
    assert server.requests == [None, None]
    assert (tmp_path / FILE).read_bytes() == server.files[REMOTE]


@pytest.mark.parametrize("hash_header", ["as sent", None, "crc32c=AAAAAA==", "md5=!", "md5=AAAA"])
def test_bytes_that_stay_corrupt_are_refused_also_without_an_md5(server, tmp_path, capsys, hash_header):
    headers = {} if hash_header == "as sent" else {"x-goog-hash": hash_header}
    server.every = {"corrupt": 70_000, "headers": headers}
    assert fetch(server, tmp_path) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert ("has the md5" if hash_header == "as sent" else "Bad CRC-32") in error
    assert len(server.requests) == 2
    assert names_in(tmp_path) == []


def test_an_md5_in_a_line_of_its_own_is_read(server, tmp_path, capsys):
    server.every = {"corrupt": 70_000, "split": True}
    assert fetch(server, tmp_path) == 1
    assert "has the md5" in capsys.readouterr().err.splitlines()[-1]
    server.every = {"split": True}
    assert fetch(server, tmp_path) == 0
    assert (tmp_path / FILE).read_bytes() == server.files[REMOTE]


def test_a_page_instead_of_the_file_is_refused(server, tmp_path, capsys):
    server.files[REMOTE] = b"<html>Please log in</html>"
    server.every = {"headers": {"x-goog-hash": None}}
    assert fetch(server, tmp_path) == 1
    assert "not an .npz archive" in capsys.readouterr().err.splitlines()[-1]
    assert names_in(tmp_path) == []


def test_a_body_without_a_length_is_verified_by_the_md5(server, tmp_path):
    server.every = {"headers": {"Content-Length": None}}
    server.faults = [{"drop": 50_000}]  # looks whole: only the md5 tells
    assert fetch(server, tmp_path) == 0
    assert (tmp_path / FILE).read_bytes() == server.files[REMOTE]


@pytest.mark.parametrize(("status", "tries"), [(404, 1), (403, 1), (503, 4), (429, 4)])
def test_an_answer_of_the_server_is_told_in_one_line(server, tmp_path, capsys, status, tries):
    server.every = {"status": status}
    assert fetch(server, tmp_path) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert str(status) in error
    assert server.url + REMOTE in error
    assert "stays" not in error  # nothing came
    assert len(server.requests) == tries
    assert names_in(tmp_path) == []


def test_a_server_that_falls_silent_is_given_up(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(_transfer, "TIMEOUT_SECS", 0.2)
    monkeypatch.setattr(_transfer, "PAUSES_SECS", ())
    server.every = {"slow": 1}
    assert fetch(server, tmp_path) == 1
    assert "broke off" in capsys.readouterr().err.splitlines()[-1]


def test_nobody_listening_is_one_line(server, tmp_path, capsys):
    server.shutdown()
    server.server_close()
    assert fetch(server, tmp_path) == 1
    assert "cannot be reached" in capsys.readouterr().err.splitlines()[-1]


def test_a_disk_without_room_is_told_before_the_download(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10_000))
    assert fetch(server, tmp_path) == 1
    assert "10,000 free" in capsys.readouterr().err.splitlines()[-1]
    assert names_in(tmp_path) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, which this system lacks")
def test_a_disk_that_fills_up_is_one_line(server, tmp_path, capsys):

    class Full(_transfer.Download):
        def append(self, response):
            os.symlink("/dev/full", self.part)
            super().append(response)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(_sources, "Download", Full)
        assert fetch(server, tmp_path) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "No space left on device" in error
    assert not (tmp_path / FILE).exists()


def test_ctrl_c_leaves_the_part_for_the_next_time(server, tmp_path):
    server.every = {"slow": 0.05}
    command = [sys.executable, "-m", "tools.download", "ViT-B_32", "--base_url", server.url, "--to", str(tmp_path)]
    server.files[REMOTE] = make_content(0, 2_500_000)  # 1000 pieces
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    part = tmp_path / f"{FILE}.part"
    deadline = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert error.splitlines()[-1] == "tools.download: error: interrupted"
    assert "the same command goes on" in error
    assert "Traceback" not in error
    got = part.stat().st_size
    assert got > 0
    server.every = {}
    assert fetch(server, tmp_path) == 0
    assert server.requests == [None, f"bytes={got}-"]
    assert (tmp_path / FILE).read_bytes() == server.files[REMOTE]


def test_ctrl_c_before_anything_came_promises_nothing(server, tmp_path, monkeypatch, capsys):
    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(_transfer.Download, "fetch_once", interrupted)
    assert fetch(server, tmp_path) == 130
    assert capsys.readouterr().err == "tools.download: error: interrupted\n"


def test_one_process_at_a_time_downloads_a_file(server, tmp_path, capsys):
    pytest.importorskip("fcntl", reason="this system has no locks")
    code = ("import sys; from utils.runs import file_lock\n"
            "with file_lock(sys.argv[1], 'busy'): print('held', flush=True); sys.stdin.read()")  # fmt: skip
    holder = subprocess.Popen([sys.executable, "-c", code, f"{tmp_path / FILE}.part.lock"], cwd=ROOT, text=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    try:
        assert holder.stdout.readline() == "held\n"
        assert fetch(server, tmp_path) == 2
        (error,) = capsys.readouterr().err.splitlines()
        assert f"process {holder.pid} is downloading {tmp_path / FILE}; wait for it, or stop it" in error
        assert server.requests == []
    finally:
        holder.communicate(timeout=60)
    assert fetch(server, tmp_path) == 0
    assert names_in(tmp_path) == [FILE]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], ["--list"]),
        (["ViT-B_33"], ["ViT-B_33", "ViT-B_32"]),
        (["ViT-H_14", "--upstream", "augreg"], ["--upstream augreg", "imagenet21k"]),
        (["ViT-B_32", "--upstream", "sam"], ["sam", "augreg"]),
        *(
            (["ViT-B_32", "--base_url", url], [f"--base_url {url} is no address", "https://"])
            for url in (
                "ftp://host",
                "localhost:8000",
                "https:///vit",
                "http://host:port",
                "http://ho st",
                "http://[::",
            )
        ),
        (["ViT-B_32", "ViT-B_16", "--to", "one.npz"], ["one.npz", "folder"]),
        (["ViT-B_32", "--to", "taken/deeper"], ["taken/deeper", "cannot be written"]),
    ],
)
def test_wrong_input_is_one_line_and_status_2(tmp_path, monkeypatch, capsys, args, words):
    monkeypatch.chdir(tmp_path)
    Path("taken").touch()
    try:
        status = download.main(args)
    except SystemExit as e:
        status = e.code
    assert status == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("tools.download: error: ")
    for word in words:
        assert word in error


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
    for files in UPSTREAMS.values():
        assert {name.removesuffix("-224") for name in files} <= set(CONFIGS)
    for name, path in PUBLISHED.items():
        upstream, chosen = download.choose(name, None)
        assert UPSTREAMS[upstream][chosen] == path


def test_notes_that_are_damaged_or_of_another_file_are_not_used(server, tmp_path):
    for notes in ("{", "[]", '{"url": "http://elsewhere/x", "version": "1"}', '{"colour": "red"}'):
        (tmp_path / f"{FILE}.part").write_bytes(b"x" * 1000)
        (tmp_path / f"{FILE}.part.json").write_text(notes)
        del server.requests[:]
        assert fetch(server, tmp_path) == 0
        assert server.requests == [None]
        assert (tmp_path / FILE).read_bytes() == server.files[REMOTE]
        os.remove(tmp_path / FILE)
