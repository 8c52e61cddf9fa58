"""The images of a folder: which classes, which to train on, which to test on.

Lists folders and reads no image, so that it can come before anything that takes long: 100,000 files on a local disk
take 0.2 s.  This module must not know what becomes of the files.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

from utils.errors import UserError
from utils.images import KINDS, endings


@dataclass(frozen=True)
class Part:
    """The files to train on, or to test on.

    Attributes:
        paths: of the images, in the order of the classes and of the names in them.
        labels: the number of each one's class.
    """

    paths: list[str]
    labels: list[int]


@dataclass(frozen=True)
class Folder:
    """A folder of images.

    Attributes:
        root: its path.
        classes: their names, sorted.
        train, test: the files.
    """

    root: str
    classes: list[str]
    train: Part
    test: Part


def find(root: str) -> Folder:
    """Lists a folder's images.

    Raises:
        UserError: it lacks classes, or one of them has no image in a part.
    """
    train_dir, test_dir, classes = _layout(root)
    return Folder(root, classes, _list_images(train_dir, classes), _list_images(test_dir, classes))


def _layout(root: str) -> tuple[str, str, list[str]]:
    """Returns a folder's two splits and the names of its classes; raises UserError if it lacks them."""
    train_dir = os.path.join(root, "train")
    test_dir = next((d for d in (os.path.join(root, s) for s in ("test", "val")) if os.path.isdir(d)), None)
    if not os.path.isdir(train_dir) or test_dir is None:
        raise UserError(f"--dataset {root} needs the folders train/<class>/ and test/<class>/ (or val/<class>/)")
    classes = _subfolders(train_dir)
    if not classes:
        raise UserError(f"{train_dir} has no class folders; expected {train_dir}/<class>/<image>")
    if unknown := sorted(set(_subfolders(test_dir)) - set(classes)):
        raise UserError(f"{test_dir} has classes that {train_dir} has not: {', '.join(unknown[:10])}")
    return train_dir, test_dir, classes


def _subfolders(folder: str) -> list[str]:
    return sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith("."))


def _list_images(folder: str, classes: list[str]) -> Part:
    """Lists the images of the classes in a part; raises UserError for a class without one."""
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        images = images_below(os.path.join(folder, name))
        if not images:
            raise _empty_class(os.path.join(folder, name))
        paths += images
        labels += [label] * len(images)
    return Part(paths, labels)


def _empty_class(folder: str) -> UserError:
    return UserError(f"{folder} holds no image ({KINDS}); fill the folder or remove the class")


def images_below(folder: str) -> list[str]:
    """Returns the images of a folder and of those in it, sorted; hidden ones are left out."""
    return sorted(_each_image(folder))


def _each_image(folder: str) -> Iterator[str]:
    """Yields the images of a folder, then those of the folders in it, which are not listed before."""
    seen: set[str] = set()  # a link may lead back up
    for parent, subfolders, files in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(parent))
        subfolders[:] = [f for f in subfolders if f[0] != "." and os.path.realpath(os.path.join(parent, f)) not in seen]
        for file in files:
            if os.path.splitext(file)[1].lower() in endings() and not file.startswith("."):
                yield os.path.join(parent, file)


def class_names(root: str) -> list[str]:
    """Returns the names of a folder's classes, as ``find`` has them.

    Raises:
        UserError: it has no class folders.
    """
    train_dir = os.path.join(root, "train")
    if not os.path.isdir(train_dir) or not (classes := _subfolders(train_dir)):
        raise UserError(f"--dataset {root} has no class folders; expected {train_dir}/<class>/<image>")
    return classes
