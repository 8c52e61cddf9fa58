"""CIFAR that is already there: used and completed without the network, and never written over."""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torchvision.datasets

from tests.helpers.cifar import FakeCifar, Touch, md5, tar_gz
from tests.helpers.forked import Forked, as_nobody, run_forked
from tests.helpers.launching import ranks
from tests.helpers.runs import RUN
from utils import dist_util, files
from utils.datasets import load_datasets
from utils.errors import UserError

NOWHERE = 9  # a port where nobody serves


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> FakeCifar:
    """CIFAR-10 that cannot be downloaded."""
    return FakeCifar("cifar10", tmp_path, NOWHERE, monkeypatch, rng)


def labels_of(cifar: FakeCifar, data_dir: object) -> bool:
    """Reads the images; returns true if they are the published ones."""
    data = load_datasets("cifar10", str(data_dir), 1)
    return [data.train.labels.tolist(), data.test.labels.tolist()] == [cifar.labels["train"], cifar.labels["test"]]


def refused(data_dir: object) -> str:
    """Returns the one line that says why it cannot be read."""
    with pytest.raises(UserError) as e:
        load_datasets("cifar10", str(data_dir), 1)
    assert "\n" not in str(e.value)
    return str(e.value)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- where it is ----


@pytest.mark.parametrize("spelling", ["data/{}", "data/{}/", "./data/../data/{}", "link", "."])
@pytest.mark.parametrize("without", ["", "data_batch_3"])
def test_the_folder_itself_may_be_named(cifar, tmp_path, monkeypatch, spelling, without):
    folder = cifar.write(tmp_path / "data", without=without, archive=cifar.archive if without else None)
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(folder if spelling == "." else tmp_path)
    assert labels_of(cifar, spelling.format(cifar.folder))
    assert contents(folder) == cifar.files


def test_the_folder_of_the_other_cifar_says_where_both_are(tmp_path, monkeypatch, rng):
    for name in ("cifar10", "cifar100"):
        cifar = FakeCifar(name, tmp_path, NOWHERE, monkeypatch, rng)
        folder = cifar.write(tmp_path / "data")
    assert load_datasets("cifar10", str(folder), 1).classes[0] == "airplane"
    assert load_datasets("cifar100", str(folder), 1).train.labels.tolist() == cifar.labels["train"]


def test_a_link_that_has_the_folders_name_is_the_folder(cifar, tmp_path):
    cifar.write(tmp_path / "store").rename(tmp_path / "store" / "x")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / cifar.folder).symlink_to(tmp_path / "store" / "x")
    assert labels_of(cifar, tmp_path / "data")
    assert labels_of(cifar, tmp_path / "data" / cifar.folder)


def test_the_archive_is_no_folder(cifar, tmp_path):
    assert f"{cifar.served} is a file" in refused(cifar.served)


# ---- the archive completes ----


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("damage", ["missing", "cut off", "a pickle that runs code", "no folder"])
def test_the_archive_completes_the_folder_offline(name, damage, tmp_path, monkeypatch, rng):
    cifar = FakeCifar(name, tmp_path, NOWHERE, monkeypatch, rng)
    for file in cifar.files:
        folder = cifar.write(tmp_path / file, archive=cifar.archive)
        if damage == "no folder":
            shutil.rmtree(folder)
        elif damage == "missing":
            (folder / file).unlink()
        elif damage == "cut off":
            os.truncate(folder / file, 10)
        else:
            (folder / file).write_bytes(pickle.dumps(Touch(tmp_path / "touched")))
        assert load_datasets(name, str(tmp_path / file), 1).test.labels.tolist() == cifar.labels["test"]
        assert contents(folder) == cifar.files
    assert not (tmp_path / "touched").exists()


def test_only_what_is_missing_is_taken_from_the_archive(cifar, tmp_path, monkeypatch):
    outside = {"../outside": b"x", f"{cifar.folder}/../../outside": b"x", f"{cifar.folder}/readme.html": b"x"}
    archive = tar_gz({**{f"{cifar.folder}/{file}": x for file, x in cifar.files.items()}, **outside})
    monkeypatch.setattr(cifar.published, "tgz_md5", md5(archive))
    folder = cifar.write(tmp_path / "data", without="test_batch", archive=archive)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert labels_of(cifar, tmp_path / "data")
    assert contents(folder) == cifar.files
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert not list(tmp_path.rglob("outside"))


def test_whoever_is_killed_while_completing_leaves_no_half_file(cifar, tmp_path):
    folder = cifar.write(tmp_path / "data", archive=cifar.archive)
    for file in cifar.files:
        (folder / file).unlink()

    def die_in_the_third() -> None:
        """Kills the child when it has written a part of a file that has not its name yet."""
        write, opened = files.atomic_write, []

        @contextlib.contextmanager
        def dying(path: str) -> Iterator[object]:
            with write(path) as f:
                opened.append(f)
                if len(opened) == 3:
                    f.write(b"half")
                    f.flush()
                    os.kill(os.getpid(), 9)
                yield f

        files.atomic_write = dying

    with Forked(["train.py", *RUN, "--dataset", "cifar10", "--data_dir", str(tmp_path / "data")], cwd=tmp_path,
                prepare=die_in_the_third) as child:  # fmt: skip
        assert child.wait() == -9, child.stderr()
    left = {name: content for name, content in contents(folder).items() if name in cifar.files}
    assert len(left) == 2
    assert left.items() <= cifar.files.items()
    assert labels_of(cifar, tmp_path / "data")


# ---- the archive is damaged ----

DAMAGES = {
    "one byte": lambda x: x[:100] + bytes([x[100] ^ 1]) + x[101:],
    "cut off": lambda x: x[: len(x) // 2],
    "html": lambda x: b"<html>Please log in to the network</html>",
    "empty": lambda x: b"",
}


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("without", ["data_batch_3", "batches.meta", None])
def test_a_damaged_archive_is_kept_and_named_with_both_md5s(cifar, tmp_path, how, without):
    bad = DAMAGES[how](cifar.archive)
    folder = cifar.write(tmp_path / "data", without=without or "", archive=bad)
    if without is None:
        shutil.rmtree(folder)
    before = contents(tmp_path)
    error = refused(tmp_path / "data")
    for text in (str(tmp_path / "data" / cifar.published.filename), md5(bad), md5(cifar.archive), cifar.published.url):
        assert text in error
    assert contents(tmp_path) == before


def test_a_damaged_archive_beside_a_whole_folder_is_not_looked_at(cifar, tmp_path):
    cifar.write(tmp_path / "data", archive=b"bad")
    assert labels_of(cifar, tmp_path / "data")


def test_an_archive_without_a_target_is_one_line(cifar, tmp_path):
    folder = cifar.write(tmp_path / "data", without="test_batch")
    (folder.parent / cifar.published.filename).symlink_to(tmp_path / "nosuch")
    assert "cannot be read (No such file or directory)" in refused(tmp_path / "data")


# ---- read-only folders ----


@contextlib.contextmanager
def on_a_read_only_disk(folder: Path) -> Iterator[None]:
    commands = (["mount", "--bind", folder, folder], ["mount", "-o", "remount,bind,ro", folder])
    if not shutil.which("mount") or any(subprocess.run(x, capture_output=True).returncode for x in commands):
        pytest.skip("needs the right to mount")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


@contextlib.contextmanager
def of_another_user(folder: Path) -> Iterator[None]:
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    yield


READ_ONLY = pytest.mark.parametrize("read_only", [on_a_read_only_disk, of_another_user])


@READ_ONLY
@pytest.mark.parametrize("itself", [False, True])
@pytest.mark.parametrize("archive", [None, b"bad"])
def test_a_whole_read_only_folder_is_used(cifar, public, read_only, itself, archive):
    folder = cifar.write(public / "data", archive=archive)
    with read_only(public / "data"):
        assert as_nobody(lambda: labels_of(cifar, folder if itself else folder.parent)) == "True"


@READ_ONLY
@pytest.mark.parametrize("with_archive", [False, True])
def test_a_read_only_folder_that_is_not_whole_says_in_one_line_what_it_lacks(cifar, public, read_only, with_archive):
    folder = cifar.write(public / "data", without="data_batch_3", archive=cifar.archive if with_archive else None)
    os.truncate(folder / "test_batch", 10)
    with read_only(public / "data"):
        error = as_nobody(lambda: labels_of(cifar, public / "data"))
    assert error.startswith("UserError: ")
    assert "\n" not in error
    for text in ("missing: data_batch_3", "damaged: test_batch", f"{folder} cannot be written", "--data_dir"):
        assert text in error


@READ_ONLY
def test_a_read_only_folder_with_nothing_in_it_is_named(cifar, public, read_only):
    (public / "data").mkdir()
    with read_only(public / "data"):
        error = as_nobody(lambda: labels_of(cifar, public / "data"))
    assert error.startswith("UserError: ")
    assert f"{public / 'data'} cannot be written" in error


def test_a_file_that_may_not_be_read_is_named(cifar, public):
    folder = cifar.write(public / "data")
    (folder / "data_batch_2").chmod(0)
    with of_another_user(folder.parent):
        (folder / "data_batch_2").chmod(0)
        error = as_nobody(lambda: labels_of(cifar, public / "data"))
    assert "(Permission denied: data_batch_2)" in error


# ---- trainings, and several ranks ----


def train_on(data_dir: Path, *flags: str) -> tuple[int, str]:
    args = ["train.py", *RUN, "--dataset", "cifar10", "--data_dir", str(data_dir), "--num_steps", "5", *flags]
    code, _, err = run_forked(args, cwd=data_dir.parent)
    return code, err


def test_a_training_completes_the_folder_and_says_what_it_cannot(cifar, tmp_path):
    folder = cifar.write(tmp_path / "data", without="data_batch_3", archive=cifar.archive)
    code, err = train_on(folder)
    assert code == 0, err
    (folder / "test_batch").unlink()
    (tmp_path / "data" / cifar.published.filename).write_bytes(b"bad")
    code, err = train_on(tmp_path / "data", "--name", "b")
    assert code == 2, err
    assert [md5(b"bad") in line for line in err.splitlines() if "error: " in line] == [True]
    assert not (tmp_path / "output" / "b_last.pt").exists()


def load_as_rank(arg: tuple[str, dict[str, object]]) -> object:
    """Reads CIFAR-10 as one rank of several; returns its labels, or the error's text."""
    data_dir, published = arg
    for name, value in published.items():
        setattr(torchvision.datasets.CIFAR10, name, value)
    dist_util.setup("cpu", -1)
    try:
        with dist_util.all_ranks_or_none():
            return load_datasets("cifar10", data_dir, 0).train.labels.tolist()
    except (UserError, dist_util.FailedElsewhere) as e:
        return f"{type(e).__name__}: {e}"
    finally:
        dist_util.cleanup()


@pytest.mark.parametrize("num_machines", [1, 2])
def test_the_first_rank_completes_for_all(cifar, tmp_path, num_machines):
    folders = [tmp_path / "data", tmp_path / ("other" if num_machines == 2 else "data")]
    for root in {*folders}:
        cifar.write(root, without="data_batch_3", archive=cifar.archive)
    published = {x: getattr(cifar.published, x) for x in ("url", "tgz_md5", "train_list", "test_list", "meta")}
    args = [(str(root), published) for root in folders]
    with ranks(tmp_path, args, load_as_rank, num_machines=num_machines) as run:
        assert run.results() == [cifar.labels["train"]] * 2, run.output()
    (folders[0] / cifar.folder / "test_batch").unlink()
    (folders[0] / cifar.published.filename).write_bytes(b"bad")
    with ranks(tmp_path, args, load_as_rank, num_machines=num_machines) as run:
        first, second = run.results()
    assert md5(b"bad") in first
    assert second.startswith("FailedElsewhere")
