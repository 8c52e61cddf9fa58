"""Layouts of folders of images: those that are taken, and those that are refused in one line."""

import os

import pytest
from PIL import Image

from tests.helpers.folders import BOTH, NFC, NFD, below, names, tree
from utils import datasets, folders
from utils.errors import UserError


@pytest.mark.parametrize("test", ["test", "testing", "val", "valid", "validation", "eval", "Testing", "TEST", "Val"])
@pytest.mark.parametrize("train", ["train", "training", "Training", "TRAIN"])
def test_parts_have_several_spellings_in_any_case(found, train, test):
    data = found(*below(train, *BOTH), *below(test, "ant/7.png", "bee/8.png"))
    assert data.classes == ["ant", "bee"]
    assert names(data.train) == [f"{name}/{i}.png" for name in ("ant", "bee") for i in range(3)]
    assert names(data.test) == ["ant/7.png", "bee/8.png"]
    assert (data.train.labels, data.test.labels) == ([0, 0, 0, 1, 1, 1], [0, 1])
    assert (data.test_fraction, data.warnings) == (None, [])
    assert data.notes == [f"Trained on {data.root}/{train}, tested on {data.root}/{test}"]


def test_test_wins_over_val_and_what_is_not_used_is_said(found):
    data = found(*below("train", *BOTH), *below("Val", *BOTH), *below("test", *BOTH), "docs/a.txt")
    assert {os.path.basename(os.path.dirname(os.path.dirname(path))) for path in data.test.paths} == {"test"}
    assert data.notes[1] == f"Not used: {data.root}/Val, {data.root}/docs"


def test_a_slash_at_the_end_changes_nothing(tmp_path):
    for name, paths in (("parts", [*below("train", *BOTH), *below("test", *BOTH)]), ("plain", BOTH)):
        root = tree(tmp_path / name, *paths)
        one, other = folders.find(root), folders.find(root + "/")
        assert (names(one.train), names(one.test)) == (names(other.train), names(other.test))


def test_a_class_named_like_a_part_is_a_class_where_it_holds_images(found):
    data = found("bus/{0..3}.png", "car/{0..3}.png", "train/{0..3}.png")
    assert data.classes == ["bus", "car", "train"]
    assert len(data.train.paths) + len(data.test.paths) == 12


def test_one_class_whose_name_ends_like_a_part_is_a_class(found):
    assert found("bullet train/{0..3}.png", "steam train/{0..3}.png").classes == ["bullet train", "steam train"]


def test_classes_in_parts_may_be_named_like_parts(found):
    paths = ("bus/{0..3}.png", "test/{0..3}.png", "train/{0..3}.png")
    data = found(*below("train", *paths), *below("test", *paths))
    assert data.classes == ["bus", "test", "train"]


# ---- layouts that are refused ----

CLASSES = below("train", *BOTH) + below("test", *BOTH)
#: The files of a folder ``pets``, and what the message must have in it.
WRONG_LAYOUTS = {
    "nothing": ([], "has no class folders; expected .*pets/train/<class>"),
    "other files": (["a.txt"], "has no class folders"),
    "images only": (["{0..4}.png"], "pets holds 5 images, but no class folders"),
    "hidden classes": (below("train", ".ant/1.png"), "pets/train has no class folders"),
    "no train": (below("test", *BOTH), r"has test/ to test on, but no train/"),
    "classes beside test": ([*BOTH, *below("test", *BOTH)], r"move ant, bee into .*pets/train/ \(test too, if"),
    "flat train": (below("train", "1.png"), "train holds 1 image, but no class folders"),
    "flat test": (
        [*below("train", *BOTH), "test/{0..6}.png"],
        "test holds 7 images, but no class folders; .*rename or remove .*test, and a part of .*train is.*tools.predict",
    ),
    "flat val": ([*below("train", *BOTH), "val/1.png"], "val holds 1 image, but no class folders"),
    "flat parts": (["train/1.png", "test/1.png"], "train holds 1 image, but no class folders"),
    "empty test": ([*below("train", *BOTH), "test/a.txt"], "pets/test has no class folders"),
    "nested": (below("pets", *BOTH), "--dataset .*pets/pets$"),
    "nested deeply": (below("a/b", *BOTH), "--dataset .*pets/a/b$"),
    "nested parts": ([*below("pets/Train", *BOTH), "docs/a.txt", "1.csv"], "--dataset .*pets/pets$"),
    "images between": (
        [*below("train/images", *BOTH), *below("test/images", *BOTH)],
        "train has nothing but the folder .*train/images, with ant, bee; move these up into .*train$",
    ),
    "images between in test": ([*below("train", *BOTH), *below("test/images", *BOTH)], "up into .*test$"),
    "parts in classes": (
        [f"{name}/{part}/1.png" for name in ("ant", "bee") for part in ("train", "test")],
        "has the parts in the classes; expected .*pets/test/ant/<image>",
    ),
    "like parts": (
        [*below("training_set", *BOTH), *below("test_set", *BOTH)],
        "has test_set, training_set: parts, by the name; call them train and test",
    ),
    "classes and their copy": (
        [*BOTH, *below("pets", *BOTH)],
        "pets/pets has folders of the same names as the classes beside it, ant, bee; move it elsewhere",
    ),
    "like parts in themselves": (
        [*below("seg_train/seg_train", *BOTH), *below("seg_test/seg_test", *BOTH), "seg_pred/seg_pred/1.png"],
        "has seg_test, seg_train: parts, by the name; call them train and test",
    ),
    "cats and dogs": (["train/cat.{0..3}.png", "test1/{0..3}.png"], "has test1: parts, by the name; call them"),
    "years": ([*below("2019", *BOTH), *below("2020", *BOTH)], "each of 2019, 2020 .* has the same folders, ant, bee"),
    "train beside classes": (
        [*below("train", *BOTH), "wasp/1.png"],
        "pets/wasp beside it has images; give --dataset .*pets/train to split that",
    ),
    "train twice": ([*CLASSES, "Training/x/1.png"], "Training/ and train/, two spellings of one part"),
    "test twice": ([*CLASSES, "TEST/x/1.png"], "TEST/ and test/, two spellings"),
    "val twice": ([*CLASSES, "val/a.txt", "valid/a.txt"], "val/ and valid/, two spellings"),
    "one class": (["ant/{0..3}.png"], "pets has one class, ant; expected two or more"),
    "one class in parts": (below("train", "ant/1.png") + below("test", "ant/1.png"), "pets has one class, ant"),
    "a class of one": (["ant/1.png", "bee/{0..3}.png"], "pets/ant holds one image; expected two or more"),
    "a class that is only tested": ([*CLASSES, "test/cat/1.png"], "test has classes that .*train has not: cat$"),
    "a class that is not tested": ([*CLASSES, "train/cat/1.png"], "test/cat holds no image"),
    "an empty class": ([*CLASSES, "train/cat/.x.png", "test/cat/1.png"], "train/cat holds no image; fill the folder"),
    "an empty plain class": ([*BOTH, "cat/.x.png"], "pets/cat holds no image"),
    "a class of other files": (
        [*CLASSES, "train/cat/{0..2}.txt", "test/cat/1.png"],
        r"train/cat holds no image \(3 .txt left out\)",
    ),
    "a class of another format": ([*BOTH, "cat/1.CR2"], r"cat holds no image \(1 .cr2 was not read: convert"),
    "a Unicode form": (
        [*below("train", "ant/1.png", f"{NFC}/1.png"), *below("test", "ant/1.png", f"{NFD}/1.png")],
        r"'cafe\\u0301' and 'caf\\xe9' differ in their Unicode form only; rename one",
    ),
    "a Unicode form in one part": ([f"{NFC}/{{0..3}}.png", f"{NFD}/{{0..3}}.png"], "has a class twice: .*Unicode form"),
    "case": (
        [*below("train", "ant/1.png", "Bee/1.png"), *below("test", "ant/1.png", "bee/1.png")],
        "'bee' and 'Bee' differ in case only",
    ),
    "spaces": (
        [*below("train", "ant/1.png", "red bee/1.png"), *below("test", "ant/1.png", " red  bee/1.png")],
        "' red  bee' and 'red bee' differ in spaces only",
    ),
}


@pytest.mark.parametrize("case", WRONG_LAYOUTS)
def test_a_wrong_layout_is_one_line_before_anything_is_read(tmp_path, monkeypatch, case):
    paths, message = WRONG_LAYOUTS[case]
    root = tree(tmp_path / "pets", *paths)
    monkeypatch.setattr(Image, "open", None)
    with pytest.raises(UserError, match=message) as e:
        datasets.find(root)
    assert root in str(e.value)
    assert "\n" not in str(e.value)


def test_letters_in_both_cases_are_two_classes(found):
    paths = ("a/{0..2}.png", "A/{0..2}.png")
    assert found(*below("train", *paths), *below("test", *paths)).classes == ["A", "a"]


def test_folders_that_a_run_writes_beside_classes_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tree(tmp_path / "pets", *BOTH, "logs/a/.lock"))
    for find in (datasets.find, datasets.find_test):
        with pytest.raises(UserError, match=r"^\./logs holds no image; .* start that in another folder"):
            find(".")


def test_a_file_in_the_folders_place_is_refused(tmp_path):
    (tmp_path / "pets.zip").touch()
    for find in (datasets.find, datasets.find_test, datasets.class_names):
        with pytest.raises(UserError, match=r"pets.zip is a file; expected a folder: unpack it"):
            find(str(tmp_path / "pets.zip"))
