"""The images of a folder: which classes, which to train on, which to test on.

Lists folders and reads no image, so that it can come before anything that takes long: 100,000 files on a local disk
take 0.2 s, or 0.4 s where their names split them.  utils/parts.py knows the layouts, utils/split.py which images are
tested on where no part says so.  This module must not know what becomes of the files.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field

from utils import listing, parts, split
from utils.errors import UserError
from utils.listing import LeftOut, folders_in, listed


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
        classes: their names; sorted, or in the order of a head.
        train, test: the files.
        test_fraction: share that a split by names has given to ``test``; None where a part did.
        notes, warnings: lines to log about what is read and what is not.
    """

    root: str
    classes: list[str]
    train: Part
    test: Part
    test_fraction: float | None = None
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def find(root: str, test_fraction: float | None = None) -> Folder:
    """Lists a folder's images, to train on some and test on the others.

    Args:
        root: its path.
        test_fraction: share to test on where the folder has no part for that; None for the default.

    Raises:
        UserError: it lacks classes, or one of them has no image in a part, or it needs no fraction.
    """
    layout, left_out = parts.to_train(root), LeftOut()
    _refuse_fraction_beside(layout.test, test_fraction)
    assert layout.train is not None
    trained = _list_images(layout.train, layout.classes, left_out)
    if layout.test is not None:
        fraction, tested = None, _list_images(layout.test, layout.classes, left_out)
        notes = [f"Trained on {layout.train}, tested on {layout.test}"]
    else:
        fraction = split.DEFAULT_FRACTION if test_fraction is None else test_fraction
        for folder, paths in trained.items():
            if len(paths) == 1:
                raise UserError(f"{folder} holds one image; expected two or more, one of them to test on")
        tested = {folder: _tested(folder, paths, fraction) for folder, paths in trained.items()}
        trained = {folder: _without(tested[folder], paths) for folder, paths in trained.items()}
        notes = [f"Split by the names of the images, for there is no part to test on: --test_fraction {fraction:g}"]
    if layout.unused:
        notes.append(f"Not used: {', '.join(layout.unused)}")
    for contents in layout.read:
        left_out.add_loose(contents)
    train, test = (_part(images.values()) for images in (trained, tested))
    return Folder(root, layout.classes, train, test, fraction, notes + left_out.notes(), left_out.warnings())


def class_names(root: str) -> list[str]:
    """Returns the names of a folder's classes, as ``find`` has them; of one to test on only, those in it.

    Raises:
        UserError: it has no class folders, or not those that a training needs.
    """
    only_test = parts.to_test(root)
    return only_test.classes if only_test.train is None and only_test.test else parts.to_train(root).classes


# ---- to test on only ----


@dataclass(frozen=True)
class TestFolder:
    """A folder of images to test on, whose classes a head will number.

    Attributes:
        root: its path.
        layout: where its class folders are.
        images: the paths of each class folder's images.
        test_fraction: share to test on, where a split is to tell; None for the training's.
        left_out: what is not read.
    """

    root: str
    layout: parts.Layout
    images: dict[str, list[str]]
    test_fraction: float | None
    left_out: LeftOut

    def for_head(self, classes: list[str] | None, trained_fraction: float | None, is_own: bool) -> Folder:
        """Returns the images labelled by the outputs of a head; there are none to train on.

        Args:
            classes: of the outputs; None for those of the part to train on or, without one, of this folder.
            trained_fraction: share that the training has split its folder by; None if it has not, or nothing tells.
            is_own: the classes are names of folders; False if they may be words for them, as ImageNet's are.

        Raises:
            UserError: a class is unknown to the head, or nothing tells which images are tested on.
        """
        source, train = "the checkpoint", self.layout.train
        if classes is not None and not is_own and {*classes}.isdisjoint(self.layout.classes):
            classes = None
        if classes is None:
            source, classes = (train, folders_in(train)) if train else (self.root, self.layout.classes)
        numbers = _numbers(self.images, classes, source)
        fraction = self._fraction(trained_fraction)
        images, folder = self.images, self.layout.test or train or self.root
        notes, warnings = [f"Tested on {folder}"], self.left_out.warnings()
        if fraction is not None:
            images = {path: _tested(path, paths, fraction) for path, paths in images.items()}
            notes[0] += f": {_count(images):,} of its {_count(self.images):,} images, --test_fraction {fraction:g}"
            notes[0] += " as in training (1 takes all)" if fraction == trained_fraction else ""
            if trained_fraction is not None and fraction > trained_fraction:
                warnings.append(f"the training had --test_fraction {trained_fraction:g}, this evaluation {fraction:g}: "
                                "if the folder is the same, it was trained on some of these images")  # fmt: skip
        by_number = {numbers[path]: paths for path, paths in images.items()}
        if len(by_number) < len(classes):
            notes.append(f"Classes with images: {len(by_number)} of {len(classes)}")
        test = _part(by_number.get(i, []) for i in range(len(classes)))
        return Folder(self.root, classes, Part([], []), test, fraction, notes + self.left_out.notes(), warnings)

    def _fraction(self, trained_fraction: float | None) -> float | None:
        """Returns the share of the images to test on; None for all that there are."""
        if self.layout.test is not None:
            return None
        fraction = trained_fraction if self.test_fraction is None else self.test_fraction
        if fraction is None and self.layout.train is not None:
            raise UserError(
                f"{self.root} has no test/ to test on; --test_fraction 1 would test on all of {self.layout.train}"
            )
        return fraction


def find_test(root: str, test_fraction: float | None = None) -> TestFolder:
    """Lists the images of a folder that may be tested on, and no others.

    Args:
        root: its path.
        test_fraction: share to test on where the folder has no part for that; None for the training's.

    Raises:
        UserError: it lacks class folders, or one has no image, or it needs no fraction.
    """
    layout, left_out = parts.to_test(root), LeftOut()
    _refuse_fraction_beside(layout.test, test_fraction)
    folder = layout.test or layout.train or root
    images = _list_images(folder, layout.classes, left_out)
    for contents in layout.read:
        left_out.add_loose(contents)
    return TestFolder(root, layout, images, test_fraction, left_out)


def _numbers(folders: Iterable[str], classes: list[str], source: str) -> dict[str, int]:
    """Returns the number of each class folder among the classes of ``source``; raises UserError without one."""
    exact = {name: i for i, name in enumerate(classes)}
    forms = {parts.nfc(name): i for name, i in exact.items()}
    numbers: dict[str, int] = {}
    for folder in folders:
        name = os.path.basename(folder)
        number = exact.get(name, forms.get(parts.nfc(name)))
        if number is None:
            known = listed(classes)
            if words := parts.difference(name, classes):
                known += f"; {words}"
            elif inner := parts.holder(folder, classes):
                known += f"; {inner} holds {listed(folders_in(inner))}: give --dataset {inner}"
            raise UserError(f"{folder} is a class that {source} has not; it has {known}")
        numbers[folder] = number
    return numbers


# ---- the images of classes ----


def _refuse_fraction_beside(test: str | None, fraction: float | None) -> None:
    if test is not None and fraction is not None:
        raise UserError(f"--test_fraction {fraction:g} has no effect: {test} is tested on; leave it out")


def _list_images(folder: str, classes: list[str], left_out: LeftOut) -> dict[str, list[str]]:
    """Lists the images of each class folder in a part; raises UserError for one without any."""
    images = {}
    for name in classes:
        path, here = os.path.join(folder, name), LeftOut()
        images[path] = listing.images_below(path, here) if os.path.isdir(path) else []
        if not images[path]:
            found, remedy = "; ".join(here.warnings() + here.notes()), "fill the folder or remove the class"
            if os.path.samefile(folder, os.curdir):
                remedy += ", or, if a run wrote it, start that in another folder, for logs/ and output/ are no classes"
            raise UserError(f"{path} holds no image{found and f' ({found})'}; {remedy}")
        left_out.add(here)
    return images


def _tested(folder: str, paths: list[str], fraction: float) -> list[str]:
    """Returns those of a class's images that are tested on, by their paths below its folder."""
    below = len(folder) + 1
    names = split.to_test_on([path[below:] for path in paths], fraction)
    return [path for path in paths if path[below:] in names]


def _without(some: list[str], paths: list[str]) -> list[str]:
    left_out = {*some}
    return [path for path in paths if path not in left_out]


def _count(images: dict[str, list[str]]) -> int:
    return sum(map(len, images.values()))


def _part(images: Iterable[list[str]]) -> Part:
    """Numbers the classes' images."""
    paths: list[str] = []
    labels: list[int] = []
    for label, each in enumerate(images):
        paths += each
        labels += [label] * len(each)
    return Part(paths, labels)
