"""Files on disks that refuse permissions, locks or the waiting for the disk, and locks that tell who has them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.disks import bindfs, failing_disk, run_on
from tests.helpers.forked import as_nobody, holding, run_forked
from tests.helpers.runs import ROOT, RUN, SHORT, assert_same, outcome, undisturbed, working_in, write_images
from utils import files
from utils.errors import UserError

#: Writes a file that was there, or the other things that are written.
WRITE = "from utils import files; files.write_text('a', 'new'); print('written')"


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    return failing_disk(tmp_path_factory.mktemp("library"))


@pytest.mark.parametrize(
    "errors",
    [
        *({"chmod": name} for name in ("EPERM", "EACCES", "ENOTSUP", "ENOSYS", "EINVAL", "EROFS", "EIO")),
        *({"fsync_folder": name} for name in ("EINVAL", "EIO", "EACCES")),
        *({"fsync": name} for name in ("EINVAL", "ENOTSUP", "ENOSYS")),
    ],
    ids=str,
)
def test_a_file_is_written_without_the_courtesies_that_a_disk_refuses(library, tmp_path, errors):
    (tmp_path / "a").write_text("old")
    done = run_on(library, ["-c", WRITE], tmp_path, **errors)
    assert (done.stdout, done.stderr) == ("written\n", "")
    assert (tmp_path / "a").read_text() == "new"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("call", ["fsync", "close"])
@pytest.mark.parametrize("error", ["EIO", "ENOSPC", "EDQUOT", "EROFS"])
def test_a_disk_that_is_broken_or_full_keeps_the_old_file(library, tmp_path, call, error):
    (tmp_path / "a").write_text("old")
    done = run_on(library, ["-c", WRITE], tmp_path, **{call: error})
    assert done.returncode == 1
    assert "a could not be written (" in done.stderr
    assert (tmp_path / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_whole_training_needs_none_of_them(library, tmp_path):
    """It is told once that locks are missing."""
    refused = {"chmod": "EPERM", "fsync": "EINVAL", "fsync_folder": "EINVAL", "lock": "ENOLCK"}
    with working_in(str(tmp_path)):
        write_images()
    done = run_on(library, [str(ROOT / "train.py"), *SHORT], tmp_path, **refused)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Files cannot be locked here (No locks available)") == 1
    with working_in(str(tmp_path)):
        assert_same(outcome(), undisturbed())


def test_a_training_resumes_and_is_exported_on_a_file_system_that_refuses_chmod(tmp_path):
    with bindfs(tmp_path / "disk", "--chmod-deny"), working_in(str(tmp_path / "disk")):
        Path("file").touch()
        with pytest.raises(PermissionError):
            os.chmod("file", 0o600)
        for num_steps in ("5", "13"):
            code, _, err = run_forked(["train.py", *RUN, "--num_steps", num_steps])
            assert code == 0, err
        assert not list(Path("output").glob(".*"))
        code, _, err = run_forked(["train.py", *RUN, "--resume", "none", "--seed", "1"])
        assert code == 0, err
        assert len(list(Path("output").glob("*.earlier-1.*"))) == 2
        weights = ["--load_model_dir", "output/a_checkpoint.bin"]
        code, _, err = run_forked(["tools.export", *weights, "--format", "hf", "--output", "hf"])
        assert code == 0, err
        assert os.listdir("hf")


def test_a_target_that_another_program_has_open_is_replaced_a_moment_later(public):
    """As a share or WSL refuses it; here the folder refuses it for that long."""
    os.chmod(public, 0o777)

    def write() -> str:
        folder = public / "folder"
        folder.mkdir()
        with files.atomic_write(str(folder / "a")) as f:
            f.write(b"new")
            folder.chmod(0o555)
            threading.Timer(0.15, os.chmod, (folder, 0o755)).start()
        return (folder / "a").read_text()

    assert as_nobody(write) == "new"


# ---- locks ----


@pytest.mark.parametrize("error", ["ENOLCK", "ENOTSUP", "ENOSYS"])
def test_missing_locks_are_told_once(library, tmp_path, error):
    script = """
from utils import files
for path in "ab":
    with files.file_lock(path), files.turn("turn"):
        print(open(path).readline().strip().isdecimal())
"""
    done = run_on(library, ["-c", script], tmp_path, lock=error)
    assert done.stdout == "True\nTrue\n"
    assert done.stderr.count("Files cannot be locked here (") == 1, done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_system_without_locks_is_told_of_once(tmp_path):
    script = """
import sys
sys.modules["fcntl"] = None
from utils import files
with files.file_lock("a"), files.file_lock("b"):
    print("held")
"""
    done = run_on("", ["-c", script], tmp_path)
    assert done.stdout == "held\n"
    assert done.stderr.count("Files cannot be locked here (the system has none)") == 1


def test_a_lock_tells_who_has_it(tmp_path):
    path = str(tmp_path / "lock")
    with holding(path) as pid, pytest.raises(UserError, match=f"process {pid} is training"), files.file_lock(path):
        pass

    def take() -> str:
        try:
            with files.file_lock(path):
                return "taken"
        except files.Locked as e:
            return e.holder

    with files.file_lock(path, note="/data/猫"):
        assert in_another_process(take) == "/data/猫"
    assert in_another_process(take) == "taken"


def in_another_process(body: Callable[[], str]) -> str:
    """Calls a function in another process, under the same user."""
    read, write = os.pipe()
    if not (pid := os.fork()):
        os.write(write, body().encode())
        os._exit(0)
    os.close(write)
    os.waitpid(pid, 0)
    with os.fdopen(read, encoding="utf-8") as f:
        return f.read()
