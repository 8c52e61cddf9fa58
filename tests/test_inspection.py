"""All images looked at before a run: every bad one is found, by several ranks together, and soon on slow disks."""

import builtins
import os
import threading
import time
from pathlib import Path

import pytest

from tests.helpers.folders import damage
from tests.helpers.launching import ranks
from tests.helpers.odd_images import exif, photo, saved
from utils import dist_util, inspection
from utils.images import ImageError, look, read_image
from utils.inspection import fingerprint, inspect_images


def write(folder, count):
    """Writes images, every third of them turned, every fourth with transparency; returns their paths, sorted."""
    plain, turned = saved(photo(), "JPEG"), saved(photo(), "JPEG", exif=exif(6))
    clear = saved(photo().convert("RGBA"), "PNG")
    paths = []
    for i in range(count):
        path = folder / f"{i:03d}.jpg"
        path.write_bytes(clear if i % 4 == 3 else turned if i % 3 == 0 else plain)
        paths.append(str(path))
    return paths


def test_every_bad_image_is_found(tmp_path):
    paths = write(tmp_path, 24)
    for path, how in zip(paths[1::7], ("noise", "cut_off", "empty", "removed")):
        damage(Path(path), how)
    found = inspect_images(paths)
    assert list(found) == paths[1:24:7]
    for path, reason in found.items():
        with pytest.raises(ImageError) as e:
            read_image(path)
        assert e.value.reasons == {path: reason}


def test_no_images_are_no_error():
    assert inspect_images([]) == {}


class SlowDisk:
    """Lets opening a file of a folder take so long, as on a network's file system; knows the threads that did it."""

    def __init__(self, folder, secs, monkeypatch):
        self.threads = set()
        real = open

        def slow_open(path, *args, **options):
            if str(path).startswith(str(folder)):
                self.threads.add(threading.get_ident())
                time.sleep(secs)
            return real(path, *args, **options)

        monkeypatch.setattr(builtins, "open", slow_open)


def test_where_a_disk_is_slow_many_wait_at_once(tmp_path, monkeypatch):
    paths = write(tmp_path, 600)
    for i in (3, 170, 599):
        damage(Path(paths[i]), "cut_off")
    expected = inspect_images(paths)
    assert list(expected) == [paths[i] for i in (3, 170, 599)]
    disk = SlowDisk(tmp_path, 0.005, monkeypatch)
    assert inspect_images(paths) == expected
    assert len(disk.threads) > 10


def test_an_error_of_the_machine_is_no_images_fault(tmp_path, monkeypatch):
    paths = write(tmp_path, 80)

    def no_memory(path):
        if path == paths[70]:
            raise MemoryError("of this machine")
        return look(path)

    monkeypatch.setattr(inspection, "look", no_memory)
    with pytest.raises(MemoryError, match="of this machine"):
        inspect_images(paths)


def test_names_sizes_and_times_are_asked_for_at_once_where_a_disk_is_slow(tmp_path, monkeypatch):
    paths, real, threads = write(tmp_path, 600), os.stat, set()
    expected = fingerprint(paths, str(tmp_path))

    def slow_stat(path, *args, **options):
        if str(path).startswith(str(tmp_path)):
            threads.add(threading.get_ident())
            time.sleep(0.01)
        return real(path, *args, **options)

    monkeypatch.setattr(os, "stat", slow_stat)
    assert fingerprint(paths, str(tmp_path)) == expected
    assert len(threads) > 10


# ---- several ranks ----


def inspect_on_a_rank(paths):
    """Returns what a rank finds, and which images it looked at itself."""
    dist_util.setup("cpu", -1)
    looked = []

    def noting(path):
        looked.append(path)
        return look(path)

    inspection.look = noting
    with dist_util.all_ranks_or_none():
        found = inspect_images(paths)
    dist_util.cleanup()
    return [found, looked]


def test_ranks_of_a_machine_share_its_images_and_all_get_the_same(tmp_path):
    paths = write(tmp_path, 30)
    damage(Path(paths[4]), "cut_off")
    damage(Path(paths[7]), "noise")
    alone = inspect_images(paths)
    with ranks(tmp_path / "ranks", [paths] * 4, inspect_on_a_rank, num_machines=2) as all_ranks:
        found = all_ranks.results()
    assert [reasons for reasons, _ in found] == [alone] * 4
    for machine in (found[:2], found[2:]):
        assert sorted(path for _, looked in machine for path in looked) == paths
        assert [len(looked) for _, looked in machine] == [15, 15]


# ---- what a resume compares ----


def test_a_fingerprint_changes_with_names_sizes_times_and_order(tmp_path):
    (tmp_path / "a").mkdir()
    paths = write(tmp_path / "a", 4)
    first = fingerprint(paths, str(tmp_path / "a"))
    assert fingerprint(paths, str(tmp_path / "a") + "/") == first
    seen = {first, fingerprint(paths[::-1], str(tmp_path / "a")), fingerprint(paths[:3], str(tmp_path / "a"))}
    os.utime(paths[1], ns=(0, os.stat(paths[1]).st_mtime_ns + 1))
    seen.add(fingerprint(paths, str(tmp_path / "a")))
    before = os.stat(paths[2])
    Path(paths[2]).write_bytes(Path(paths[2]).read_bytes() + b"\0")
    os.utime(paths[2], ns=(before.st_atime_ns, before.st_mtime_ns))
    seen.add(fingerprint(paths, str(tmp_path / "a")))
    Path(paths[3]).rename(tmp_path / "a" / "new.jpg")
    seen.add(fingerprint([*paths[:3], str(tmp_path / "a" / "new.jpg")], str(tmp_path / "a")))
    seen.add(fingerprint(paths, str(tmp_path / "a")))  # one that is gone
    assert len(seen) == 7


def test_a_fingerprint_is_the_same_wherever_the_folder_is(tmp_path):
    (tmp_path / "a").mkdir()
    paths = write(tmp_path / "a", 3)
    first = fingerprint(paths, str(tmp_path / "a"))
    (tmp_path / "a").rename(tmp_path / "b")
    moved = [path.replace(f"{tmp_path}/a", f"{tmp_path}/b") for path in paths]
    assert fingerprint(moved, str(tmp_path / "b")) == first
