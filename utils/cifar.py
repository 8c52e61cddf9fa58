"""CIFAR-10 and CIFAR-100: their classes' names, known without a copy of the images, and their images.

torchvision downloads and reads them, and reads no file whose md5 is not the published one.  What is there already is
used first, and is never written over unless it is damaged.  This module must not know what becomes of the images.

Source of the names: ``label_names`` of cifar-10-batches-py/batches.meta and ``fine_label_names`` of
cifar-100-python/meta, of cs.toronto.edu/~kriz/cifar.html.  tests/test_cifar.py rebuilds both files from these names and
compares their md5.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import os
import shutil
import tarfile
import tempfile
from typing import Any

import numpy as np

from utils import console, dist_util, files
from utils.errors import UserError

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

CIFAR100 = (
    "apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle",
    "bowl", "boy", "bridge", "bus", "butterfly", "camel", "can", "castle", "caterpillar", "cattle",
    "chair", "chimpanzee", "clock", "cloud", "cockroach", "couch", "crab", "crocodile", "cup", "dinosaur",
    "dolphin", "elephant", "flatfish", "forest", "fox", "girl", "hamster", "house", "kangaroo", "keyboard",
    "lamp", "lawn_mower", "leopard", "lion", "lizard", "lobster", "man", "maple_tree", "motorcycle", "mountain",
    "mouse", "mushroom", "oak_tree", "orange", "orchid", "otter", "palm_tree", "pear", "pickup_truck", "pine_tree",
    "plain", "plate", "poppy", "porcupine", "possum", "rabbit", "raccoon", "ray", "road", "rocket",
    "rose", "sea", "seal", "shark", "shrew", "skunk", "skyscraper", "snail", "snake", "spider",
    "squirrel", "streetcar", "sunflower", "sweet_pepper", "table", "tank", "telephone", "television", "tiger",
    "tractor", "train", "trout", "tulip", "turtle", "wardrobe", "whale", "willow_tree", "wolf", "woman", "worm",
)  # fmt: skip


FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}

Split = tuple[np.ndarray, np.ndarray]  # (N, 3, 32, 32) uint8 and (N,) int64


def load(name: str, data_dir: str) -> list[Split]:
    """Reads the images and labels to train and to test on; what is not there comes from the archive or a download.

    Args:
        name: cifar10 or cifar100.
        data_dir: the folder that holds the archive and the folder of the files, or the latter itself.

    Returns:
        For train and test: (N, 3, 32, 32) uint8 and (N,) int64.

    Raises:
        UserError: what is there is damaged or not whole, and cannot be completed.
        ConnectionError: nothing is there, and it could not be downloaded.
    """
    import torchvision.datasets  # a second, not spent where no CIFAR is asked for

    cls = torchvision.datasets.CIFAR10 if name == "cifar10" else torchvision.datasets.CIFAR100
    root = _root(name, os.path.expanduser(data_dir))
    folder = os.path.join(root, FOLDERS[name])
    with contextlib.suppress(OSError, RuntimeError):
        return _read(cls, root)
    if dist_util.is_first_of_machine():
        _complete(name, cls, root, folder)
    try:
        return _read(cls, root)
    except (OSError, RuntimeError) as e:
        raise ConnectionError(_not_whole(cls, folder)) from e


def _root(name: str, data_dir: str) -> str:
    """Returns the folder that holds the archive and the folder of the files, if ``data_dir`` is the one or the other.

    Raises:
        UserError: it is a file.
    """
    if os.path.isfile(data_dir):
        raise UserError(f"--data_dir {data_dir} is a file, expected a folder; give the one that the file is in")
    if not os.path.isdir(os.path.join(data_dir, FOLDERS[name])):
        for path in (os.path.normpath(data_dir), os.path.realpath(data_dir)):
            if os.path.basename(path) in FOLDERS.values():
                return os.path.dirname(path) or "."
    return data_dir


def _read(cls: Any, root: str) -> list[Split]:
    """Reads both splits; raises RuntimeError or OSError unless every file is there with its published md5."""
    both = [cls(root=root, train=train, download=False) for train in (True, False)]
    return [
        (np.ascontiguousarray(data.data.transpose(0, 3, 1, 2)), np.array(data.targets, dtype=np.int64)) for data in both
    ]


def _complete(name: str, cls: Any, root: str, folder: str) -> None:
    """Takes what the folder lacks from the archive beside it; without one, downloads it."""
    archive = os.path.join(root, os.path.basename(cls.url))
    if os.path.lexists(archive):
        _check_archive(cls, archive)
        _check_writable(cls, folder, folder)
        _extract(archive, folder, [*_each_fault(cls, folder)])
        return
    for place in (folder, root) if os.path.isdir(folder) else (root,):
        _check_writable(cls, folder, place)
    try:
        _download(cls, root)
    except (OSError, RuntimeError, http.client.HTTPException) as e:
        lack = f"{_not_whole(cls, folder)}, and " if os.path.isdir(folder) else ""
        raise ConnectionError(
            f"{lack}{name} could not be downloaded into {root} ({e}); put {cls.url} there yourself "
            f"(md5 {cls.tgz_md5}), or name another folder with --data_dir"
        ) from e


def _check_archive(cls: Any, archive: str) -> None:
    """Raises UserError unless the archive, which may have been brought by hand, is the published one."""
    from torchvision.datasets.utils import calculate_md5

    try:
        found = calculate_md5(archive)
    except OSError as e:
        raise UserError(f"{archive} cannot be read ({e.strerror}), expected {cls.url}; repair or remove it") from e
    if found != cls.tgz_md5:
        raise UserError(
            f"{archive} is damaged: its md5 is {found}, expected {cls.tgz_md5}; put {cls.url} in its place, or remove "
            "it to have that downloaded"
        )


def _check_writable(cls: Any, folder: str, place: str) -> None:
    """Raises UserError that says what the folder lacks, if it cannot be written in the place that needs it."""
    try:
        files.check_writable(place)
    except UserError as e:
        raise UserError(f"{_not_whole(cls, folder)} and cannot be completed: {e} (--data_dir)") from e


def _each_fault(cls: Any, folder: str) -> dict[str, str]:
    """Returns the published files that the folder does not hold as they should be, with what is wrong with each."""
    from torchvision.datasets.utils import check_integrity

    found = {}
    for name, md5 in [*cls.train_list, *cls.test_list, (cls.meta["filename"], cls.meta["md5"])]:
        path = os.path.join(folder, name)
        try:
            if not check_integrity(path, md5):
                found[name] = "damaged" if os.path.lexists(path) else "missing"
        except OSError as e:
            found[name] = e.strerror or "unreadable"
    return found


def _not_whole(cls: Any, folder: str) -> str:
    by_fault: dict[str, list[str]] = {}
    for name, fault in _each_fault(cls, folder).items():
        by_fault.setdefault(fault, []).append(name)
    faults = "; ".join(f"{fault}: {', '.join(names)}" for fault, names in by_fault.items())
    return f"{folder} is not whole ({faults})"


def _extract(archive: str, folder: str, names: list[str]) -> None:
    """Takes files from the archive, which is the published one; whoever is killed leaves each whole or not at all."""
    with tarfile.open(archive) as tar:
        for member in tar:
            parent, _, name = member.name.rpartition("/")
            if parent == os.path.basename(folder) and name in names and (source := tar.extractfile(member)):
                with files.atomic_write(os.path.join(folder, name)) as f:
                    shutil.copyfileobj(source, f)


def _download(cls: Any, root: str) -> None:
    """Downloads the archive and its files; nothing has its name before it is whole."""
    bar = contextlib.nullcontext() if console.on_terminal() else contextlib.redirect_stderr(io.StringIO())
    with tempfile.TemporaryDirectory(prefix=".cifar.", suffix=files.TEMPORARY, dir=root) as temporary:
        with bar:  # torchvision's is for terminals
            cls(root=temporary, train=True, download=True)
        for parent, _, names in os.walk(temporary):
            target = os.path.normpath(os.path.join(root, os.path.relpath(parent, temporary)))
            os.makedirs(target, exist_ok=True)
            for name in names:
                files.sync(os.path.join(parent, name))
                files.replace(os.path.join(parent, name), os.path.join(target, name))
