"""Folders of images: which to train on and which to test on, where no part says so or nothing else is needed."""

import os
import shutil

import pytest

from tests.helpers.folders import BOTH, NFC, NFD, below, names, tree
from utils import datasets, folders, split
from utils.errors import UserError


@pytest.mark.parametrize("part", ["", "train/", "Training/"])
def test_a_folder_without_a_part_to_test_on_is_split_by_names(found, part):
    data = found(f"{part}ant/{{0..39}}.png", f"{part}bee/more/{{0..39}}.png")
    assert data.classes == ["ant", "bee"]
    for label, prefix in enumerate(("", "more/")):
        expected = {f"{prefix}{i}.png" for i in range(40) if split.position(f"{prefix}{i}.png") < 0.2}
        tested = {path for path, number in zip(data.test.paths, data.test.labels) if number == label}
        base = f"{data.root}/{part}{data.classes[label]}/"
        assert tested == {base + name for name in expected}
        trained = {path for path, number in zip(data.train.paths, data.train.labels) if number == label}
        assert trained == {f"{base}{prefix}{i}.png" for i in range(40)} - tested
    assert data.test_fraction == 0.2
    assert any("--test_fraction 0.2" in note for note in data.notes)
    assert data.train.paths == sorted(data.train.paths)


def test_the_share_may_be_another(found):
    many, all_names = [f"{x}/{{0..99}}.png" for x in ("ant", "bee")], [f"{i}.png" for i in range(100)]
    data = found(*many, test_fraction=0.5)
    assert data.test_fraction == 0.5
    assert len(data.test.paths) == 2 * len(split.to_test_on(all_names, 0.5)) > 70


def test_images_that_are_added_move_no_others(found):
    before = found("ant/{0..49}.png", "bee/{0..49}.png")
    after = found("ant/{50..89}.png", "bee/x/{0..29}.png", "wasp/{0..9}.png")
    assert {*before.test.paths} < {*after.test.paths}
    assert {*before.train.paths} < {*after.train.paths}


def test_a_class_of_two_has_one_image_on_each_side(found):
    data = found(*[f"class{i}/{{{i}..{i + 1}}}.png" for i in range(20)])
    assert data.train.labels == data.test.labels == list(range(20))


def test_a_share_beside_a_part_to_test_on_is_refused(found, tmp_path):
    with pytest.raises(UserError, match=r"--test_fraction 0.3 has no effect: .*pets/test is tested on"):
        found(*below("train", *BOTH), *below("test", *BOTH), test_fraction=0.3)
    with pytest.raises(UserError, match=r"--test_fraction 0.3 has no effect: .*pets/test"):
        folders.find_test(str(tmp_path / "pets"), 0.3)
    for name in datasets.NAMED_DATASETS:
        with pytest.raises(UserError, match=f"--test_fraction 0.3 has no effect: {name} "):
            datasets.find(name, 0.3)
        with pytest.raises(UserError, match=f"--test_fraction 0.3 has no effect: {name} "):
            datasets.find_test(name, 0.3)


# ---- to test on only ----

HEAD = ["wasp", "bee", "ant"]


@pytest.fixture
def tested(tmp_path):
    """``tested(paths, classes, fraction)`` makes a folder, and labels what is tested on by the head's outputs."""

    def make(paths, classes=HEAD, trained_fraction=None, test_fraction=None, is_own=True):
        root = tree(tmp_path / "pets", *paths)
        return folders.find_test(root, test_fraction).for_head(classes, trained_fraction, is_own)

    return make


@pytest.mark.parametrize("part", ["test/", "Testing/", "val/", ""])
def test_labels_are_the_outputs_of_the_head_whatever_the_folders_order(tested, part):
    data = tested([f"{part}ant/{{0..1}}.png", f"{part}bee/1.png"])
    assert data.classes == HEAD
    assert names(data.test) == ["bee/1.png", "ant/0.png", "ant/1.png"]
    assert data.test.labels == [1, 2, 2]
    assert data.train.paths == []
    assert data.notes == [f"Tested on {os.path.join(data.root, part).rstrip('/')}", "Classes with images: 2 of 3"]


def test_one_class_of_the_head_will_do_even_with_folders_in_it(tested):
    assert tested(["test/ant/{left,right}/1.png"]).test.labels == [2, 2]


def test_a_class_that_the_head_lacks_is_named_with_some_that_it_has(tested):
    with pytest.raises(UserError, match=r"pets/test/cat is a class that the checkpoint has not; it has wasp, bee"):
        tested(["test/cat/1.png", "test/ant/1.png"])
    with pytest.raises(UserError, match=r"it has 0, 1, 2, 3, 4 and 5 others$"):
        tested(["test/cat/1.png"], [str(i) for i in range(10)])


@pytest.mark.parametrize(
    ("paths", "words"),
    [
        (["Ant/1.png"], "'Ant' and 'ant' differ in case"),
        (["test/images/ant/1.png"], "give --dataset .*pets/test/images$"),
        (["pets/a/ant/1.png", "pets/a/bee/1.png"], "give --dataset .*pets/pets/a$"),
        (["pets/test/ant/1.png"], "give --dataset .*pets/pets$"),
    ],
)
def test_a_class_that_the_head_lacks_for_a_reason_that_is_seen_says_the_remedy(tested, paths, words):
    with pytest.raises(UserError, match=words):
        tested(paths)


def test_unicode_forms_of_a_class_are_one_class(tested):
    for here, there in ((NFC, NFD), (NFD, NFC)):
        data = tested([f"{here}/1.png"], ["ant", there])
        assert (data.classes, data.test.labels) == (["ant", there], [1])
        shutil.rmtree(data.root)


def test_the_part_to_train_on_is_not_looked_at(tested):
    paths = ["test/ant/1.png", "train/1.png", f"train/{NFC}/x", f"train/{NFD}/x", "Training/x"]
    assert tested(paths).test.labels == [2]


def test_a_folder_that_was_split_is_tested_on_the_same_images(found, tested):
    paths = ["ant/{0..29}.png", "bee/more/{0..29}.png"]
    trained = found(*paths)
    for fraction in (None, 0.2):
        data = tested([], ["ant", "bee"], trained_fraction=0.2, test_fraction=fraction)
        assert data.test == trained.test
        assert data.test_fraction == 0.2
    assert f": {len(trained.test.paths)} of its 60 images, --test_fraction 0.2 as in training" in data.notes[0]


def test_so_is_a_part_to_train_on_that_was_split(found, tested):
    trained = found(*below("Training", *BOTH))
    data = tested([], ["ant", "bee"], trained_fraction=0.2)
    assert data.test == trained.test
    with pytest.raises(UserError, match=r"has no test/ to test on; --test_fraction 1 would test on all of .*Train"):
        tested([], ["ant", "bee"])


def test_the_share_to_test_on_may_be_another_or_all(tested):
    for fraction, count, warnings in ((1.0, 60, 1), (0.5, None, 1), (0.1, None, 0)):
        data = tested(["ant/{0..29}.png", "bee/{0..29}.png"], trained_fraction=0.2, test_fraction=fraction)
        assert len(data.test.paths) == (count or 2 * len(split.to_test_on([f"{i}.png" for i in range(30)], fraction)))
        assert data.test_fraction == fraction
        assert len(data.warnings) == warnings  # it may have been trained on some


def test_without_a_share_of_the_training_all_images_are_tested_on(tested):
    data = tested(BOTH)
    assert (len(data.test.paths), data.test_fraction) == (6, None)


def test_without_names_of_the_heads_classes_they_are_those_of_the_training_part(tested):
    data = tested(["train/ant/x", "train/bee/x", "train/wasp/x", "test/bee/1.png"], None)
    assert (data.classes, data.test.labels) == (["ant", "bee", "wasp"], [1])
    with pytest.raises(UserError, match=r"pets/test/cat is a class that .*pets/train has not"):
        tested(["test/cat/1.png"], None)


def test_or_those_of_the_folder_itself(tested):
    assert tested(BOTH, None).classes == ["ant", "bee"]


def test_words_for_classes_are_taken_for_their_folders_in_order(tested):
    words = ["tench, Tinca tinca", "goldfish"]
    paths = ["test/n01440764/1.png", "test/n01443537/1.png"]
    assert tested(paths, words, is_own=False).classes == ["n01440764", "n01443537"]
    with pytest.raises(UserError, match="n01440764 is a class that the checkpoint has not"):
        tested(paths, words)
