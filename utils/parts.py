"""The parts of a folder of images, to train on and to test on, and the class folders in them.

A part holds class folders, a class holds images.  Where that leaves two readings of a folder, it is refused with a line
that says how to make it one: a silent guess would cost a training.  This module must not list the images of classes.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

from utils.errors import UserError
from utils.listing import Contents, LeftOut, counted, folders_in, has_image, images_below, listed, look_into

#: How the parts are spelled, in any case; a part to test on wins over one to validate on.
SPELLINGS = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "val": ("val", "valid", "validation", "eval"),
}
_PART_OF = {spelling: part for part, spellings in SPELLINGS.items() for spelling in spellings}
#: Names that are no part's, but hardly a class's: training_set, test-images, test1.
_LIKE_A_PART = re.compile(rf"({'|'.join(_PART_OF)})[ _.-]?(set|data|dataset|images?|imgs?|split|\d+)", re.IGNORECASE)
#: Names that are hardly classes, where several end with the names of parts: seg_train and seg_test.
_ENDS_IN_A_PART = re.compile(rf".*[ _.-]({'|'.join(_PART_OF)})", re.IGNORECASE)
_UNLABELLED = "; tools.predict takes images whose classes nobody knows"


@dataclass(frozen=True)
class Layout:
    """The folders that hold class folders.

    Attributes:
        train: to train on; None if it is not there.
        test: to test on; None where only a split tells which images of ``train``, or of the root, are.
        classes: names of the class folders, sorted.
        read: what lies in the folders of the layout themselves.
        unused: folders beside the parts, which are not read.
    """

    train: str | None
    test: str | None
    classes: list[str]
    read: list[Contents]
    unused: list[str]


def to_train(root: str) -> Layout:
    """Finds the parts of a folder to train on.

    Raises:
        UserError: it has no class folders, or others in one part than in the other.
    """
    top = look_into(root)
    names = _parts(root, top.folders)
    if not names or _train_is_a_class(root, names, top):
        classes = _classes_of_root(root, top)
        _refuse_other_levels(root, top)
        return Layout(root, None, classes, [top], [])
    tested = names.get("test", names.get("val"))
    if "train" not in names:
        others, remedy = listed(x for x in top.folders if x not in names.values()), "an evaluation (-v) needs none"
        if others:
            remedy = f"move {others} into {root}/train/ ({tested} too, if it is a class), or, "
            remedy += f"to have a part of them tested on, {tested} elsewhere"
        raise UserError(f"{root} has {tested}/ to test on, but no train/ to train on; {remedy}")
    train = os.path.join(root, names["train"])
    trained_on = _class_folders(train)
    _refuse_wrapped(train, f"move these up into {train}")
    unused = [os.path.join(root, x) for x in top.folders if x not in (names["train"], tested)]
    if tested is None:
        _refuse_images_beside(train, unused)
        return Layout(train, None, trained_on.folders, [top, trained_on], unused)
    test = os.path.join(root, tested)
    split = f", or rename or remove {test}, and a part of {train} is tested on"
    tested_on = _class_folders(test, split + _UNLABELLED)
    _refuse_wrapped(test, f"move these up into {test}")
    _compare(train, trained_on.folders, test, tested_on.folders)
    return Layout(train, test, trained_on.folders, [top, trained_on, tested_on], unused)


def to_test(root: str) -> Layout:
    """Finds the part of a folder to test on, and lists no other.

    Raises:
        UserError: it has no class folders.
    """
    top = look_into(root)
    names = _parts(root, top.folders, ("test", "val"))
    train = next((os.path.join(root, x) for x in top.folders if _PART_OF.get(x.lower()) == "train"), None)
    if tested := names.get("test", names.get("val")):
        test = os.path.join(root, tested)
        contents = _class_folders(test, _UNLABELLED)
        return Layout(train, test, contents.folders, [contents], [])
    names = _parts(root, top.folders)
    if train is None or _train_is_a_class(root, names, top):
        return Layout(None, None, _classes_of_root(root, top), [top], [])
    contents = _class_folders(train)
    return Layout(train, None, contents.folders, [contents], [])


def _parts(root: str, folders: list[str], wanted: Iterable[str] = tuple(SPELLINGS)) -> dict[str, str]:
    """Returns the names of the parts that a folder has; raises UserError if it has one twice."""
    found: dict[str, str] = {}
    for name in folders:
        part = _PART_OF.get(name.lower())
        if part in found:
            raise UserError(f"{root} has {found[part]}/ and {name}/, two spellings of one part; keep or rename one")
        if part is not None and part in wanted:
            found[part] = name
    return found


def _train_is_a_class(root: str, names: dict[str, str], top: Contents) -> bool:
    """Tells a class of trains, beside other classes, from a part: it has images in it, and no folders."""
    if [*names] != ["train"] or len(top.folders) < 2:
        return False
    contents = look_into(os.path.join(root, names["train"]))
    return bool(contents.images) and not contents.folders


def _class_folders(part: str, unlabelled: str = "") -> Contents:
    """Returns what lies in a part; raises UserError if that is no class folders.

    Args:
        part: its folder.
        unlabelled: the remedy where it holds images instead, other than class folders.
    """
    contents = look_into(part)
    if contents.images and not contents.folders:
        remedy = f"expected {part}/<class>/<image>{unlabelled}"
        raise UserError(f"{part} holds {counted(len(contents.images), 'image')}, but no class folders; {remedy}")
    if not contents.folders:
        raise UserError(f"{part} has no class folders; expected {part}/<class>/<image>")
    return _in_one_form(part, contents)


def _classes_of_root(root: str, top: Contents) -> list[str]:
    """Returns the names of the class folders in a folder without parts; raises UserError if it has none."""
    if not top.folders:
        found = f"holds {counted(len(top.images), 'image')}, but no" if top.images else "has no"
        expected = f"{root}/train/<class>/<image> and {root}/test/<class>/<image>, or {root}/<class>/<image>"
        raise UserError(f"{root} {found} class folders; expected {expected}")
    for name in top.folders:
        inner = os.path.join(root, name)
        if any(folders_in(os.path.join(inner, x)) for x in folders_in(inner) if x.lower() in _PART_OF):
            raise UserError(f"{root} has the parts in a folder of it; give --dataset {inner}")
    like_parts = [name for name in top.folders if _LIKE_A_PART.fullmatch(name)]
    ends = {x[0]: _PART_OF[x[1].lower()] for x in map(_ENDS_IN_A_PART.fullmatch, top.folders) if x}
    if like_parts := like_parts or (list(ends) if len({*ends.values()}) > 1 else []):
        raise UserError(
            f"{root} has {listed(like_parts)}: parts, by the name; call them train and test, or, if they are classes, "
            f"move all class folders into {root}/train/"
        )
    return _in_one_form(root, top).folders


def _refuse_wrapped(folder: str, remedy: str) -> None:
    """Raises UserError if a folder holds one folder only, and that the class folders."""
    inner = folder
    while len(inside := folders_in(inner)) == 1 and not has_image(inner):
        inner = os.path.join(inner, inside[0])
    if inner != folder and inside and not has_image(inner):
        remedy = remedy.format(inner=inner)
        raise UserError(f"{folder} has nothing but the folder {inner}, with {listed(inside)}; {remedy}")


def _refuse_other_levels(root: str, top: Contents) -> None:
    """Raises UserError if the folders in a folder without parts are not its classes, but hold these or the parts."""
    _refuse_wrapped(root, "give --dataset {inner}")
    classes = [os.path.join(root, name) for name in top.folders]
    for path in classes:
        if len(copied := sorted({*folders_in(path)} & {*top.folders})) > 1:  # as archives that hold all twice leave it
            words = f"{path} has folders of the same names as the classes beside it, {listed(copied)}"
            raise UserError(f"{words}; move it elsewhere, or give --dataset {path}")
    inside = folders_in(classes[0])
    if min(len(classes), len(inside)) < 2 or any(folders_in(x) != inside or has_image(x) for x in classes):
        return
    if {*map(str.lower, inside)} <= {*_PART_OF}:
        raise UserError(f"{root} has the parts in the classes; expected {root}/{inside[0]}/{top.folders[0]}/<image>")
    raise UserError(
        f"each of {listed(top.folders)} in {root} has the same folders, {listed(inside)}; call the former train and "
        f"test if they are parts, or move them into {root}/train/ if they are the classes"
    )


def _refuse_images_beside(train: str, folders: list[str]) -> None:
    """Raises UserError if folders beside the only part have images: the part may be a class like them."""
    for folder in folders:
        if images_below(folder, LeftOut()):
            raise UserError(
                f"{train} has class folders, there is no part to test on, and {folder} beside it has images; give "
                f"--dataset {train} to split that, or, if it is a class itself, move all classes into one train/"
            )


# ---- names of classes ----


def nfc(name: str) -> str:
    """Returns a name in one Unicode form: macOS writes the letters of some in another than people type."""
    return unicodedata.normalize("NFC", name)


def difference(name: str, names: Iterable[str]) -> str:
    """Returns words on which of some names differs from another by what people do not see; "" for none."""
    for other in names:
        if nfc(name) == nfc(other):
            return f"{name!a} and {other!a} differ in their Unicode form"
        if _spaced(name) == _spaced(other):
            return f"{name!r} and {other!r} differ in spaces"
        if _spaced(name).casefold() == _spaced(other).casefold():
            return f"{name!r} and {other!r} differ in case"
    return ""


def _spaced(name: str) -> str:
    return " ".join(nfc(name).split())


def holder(folder: str, classes: Iterable[str]) -> str:
    """Returns the folder, this or one below, in which there are parts or class folders of these names; "" for none."""
    names = {*classes}
    while inside := folders_in(folder):
        if not names.isdisjoint(inside) or any(name.lower() in _PART_OF for name in inside):
            return folder
        if len(inside) > 1:
            break
        folder = os.path.join(folder, inside[0])
    return ""


def _in_one_form(folder: str, contents: Contents) -> Contents:
    """Raises UserError if two class folders have one name in two Unicode forms."""
    forms: dict[str, str] = {}
    for name in contents.folders:
        if nfc(name) in forms:
            words = difference(name, [forms[nfc(name)]])
            raise UserError(f"{folder} has a class twice: {words} only; move its images into one folder")
        forms[nfc(name)] = name
    return contents


def _compare(train: str, trained: list[str], test: str, tested: list[str]) -> None:
    """Raises UserError if a class to test on is none to train on, or is spelled differently there."""
    unknown = sorted(set(tested) - set(trained))
    for name in unknown:
        if words := difference(name, sorted(set(trained) - set(tested))):
            raise UserError(f"{test} and {train} spell a class differently: {words} only; rename one of the folders")
    if unknown:
        raise UserError(f"{test} has classes that {train} has not: {listed(unknown)}")
