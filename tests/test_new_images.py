"""Training on a folder that is split by names, and -v on images that the training has not seen."""

import json
import logging
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import train
from tests.helpers import runs

#: A run of four steps on the folder flowers, and the evaluation of what it has written.
SHORT = [*runs.SHORT, "--dataset", "flowers"]
EVALUATE = ["--name", "b", *runs.TINY, "-v", "--load_model_dir", "output/a_checkpoint.bin", "--eval_batch_size", "4"]


@pytest.fixture(autouse=True)
def flowers(tmp_path, monkeypatch, caplog):
    """Works in a folder with the folder flowers of three classes without parts, in which an evaluation differs."""
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO)
    for name in ("aster", "iris", "rose"):
        write("flowers", name, range(20))


def write(folder, name, numbers):
    """Images whose colour is near their class's."""
    colour = {"aster": (200, 60, 60), "iris": (60, 200, 60), "rose": (60, 60, 200)}[name]
    os.makedirs(f"{folder}/{name}", exist_ok=True)
    for i in numbers:
        noise = np.random.default_rng(i).integers(-60, 60, (32, 32, 3))
        Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(f"{folder}/{name}/{i}.png")


def evaluate(*flags):
    return train.main([*EVALUATE, *flags])


def number_in(log, pattern):
    """The last number that a line of the log has in this place."""
    return [float(found[1]) for text in log.messages if (found := re.search(pattern, text))][-1]


def metadata():
    return json.loads(Path("output/a_checkpoint.json").read_text())


def test_a_split_folder_is_evaluated_on_the_images_that_its_training_left_out(caplog):
    assert train.main([*SHORT, "--test_fraction", "0.4"]) == 0
    assert metadata()["test_fraction"] == 0.4
    assert number_in(caplog, r"--test_fraction (0\.4)$") == 0.4
    tested, correct = number_in(caplog, r"Images: \d+ to train on, (\d+) to test on"), metadata()["accuracy"]
    assert tested % 3 == 0
    for flags in ([], ["--test_fraction", "0.4"]):
        caplog.clear()
        assert evaluate("--dataset", "flowers", *flags) == 0
        assert number_in(caplog, r"Images: (\d+) to test on, 3 classes") == tested
        assert number_in(caplog, r"Valid Accuracy: (.*)") == round(correct, 5)
        assert any("--test_fraction 0.4 as in training (1 takes all)" in text for text in caplog.messages)


def test_a_share_of_one_evaluates_all_images(caplog):
    assert train.main(SHORT) == 0
    assert metadata()["test_fraction"] == 0.2
    assert evaluate("--dataset", "flowers", "--test_fraction", "1") == 0
    assert number_in(caplog, r"Images: (\d+) to test on") == 60
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "it was trained on some of these images" in warnings[-1]


@pytest.fixture
def trained():
    """A run on flowers in parts; the images to test on are in the folder test."""
    for name in ("aster", "iris", "rose"):
        write("flowers/train", name, range(12))
        shutil.rmtree(f"flowers/{name}")
        write("flowers/test", name, range(50, 56))
    assert train.main(SHORT) == 0


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize("part", ["test", "Testing", "val", ""])
def test_new_images_need_no_part_to_train_on(caplog, part):
    os.renames("flowers/test", f"new/{part}")
    assert evaluate("--dataset", "new") == 0
    assert number_in(caplog, r"Images: (\d+) to test on, 3 classes") == 18
    assert number_in(caplog, r"Valid Accuracy: (.*)") == round(metadata()["accuracy"], 5)


@pytest.mark.usefixtures("trained")
def test_a_subset_of_the_classes_is_numbered_by_the_head(caplog):
    evaluations = {}
    for name in ("aster", "iris", "rose"):
        os.renames(f"flowers/test/{name}", f"only-{name}/{name}")
        assert evaluate("--dataset", f"only-{name}") == 0
        evaluations[name] = number_in(caplog, r"Valid Accuracy: (.*)")
    assert "  Classes with images: 1 of 3" in caplog.messages
    assert sum(evaluations.values()) / 3 == pytest.approx(metadata()["accuracy"], abs=1e-4)
    assert metadata()["accuracy"] > 0.5  # or a mixture of classes would go unseen


@pytest.mark.usefixtures("trained")
def test_the_heads_order_is_that_of_the_metadata_even_if_the_names_sort_otherwise(caplog):
    names = {"aster": "zinnia", "iris": "iris", "rose": "clover"}
    for before, after in names.items():
        os.renames(f"flowers/test/{before}", f"new/test/{after}")
    content = metadata()
    Path("output/a_checkpoint.json").write_text(json.dumps({**content, "classes": list(names.values())}))
    assert evaluate("--dataset", "new") == 0
    assert number_in(caplog, r"Valid Accuracy: (.*)") == round(content["accuracy"], 5)


@pytest.mark.usefixtures("trained")
def test_a_class_that_was_not_trained_on_is_one_line(capsys):
    os.rename("flowers/test/iris", "flowers/test/lily")
    assert evaluate("--dataset", "flowers") == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "train.py: error: flowers/test/lily is a class that the checkpoint has not; it has aster, iris, rose"
    )


@pytest.mark.usefixtures("trained")
def test_a_folder_without_parts_is_evaluated_whole_after_a_training_that_split_none(caplog):
    content = metadata()
    assert "test_fraction" not in content
    assert evaluate("--dataset", "flowers/test") == 0
    assert number_in(caplog, r"Valid Accuracy: (.*)") == round(content["accuracy"], 5)
    assert number_in(caplog, r"Images: (\d+) to test on") == 18


@pytest.mark.usefixtures("trained")
def test_without_metadata_the_classes_are_those_of_the_part_to_train_on(caplog):
    accuracy = metadata()["accuracy"]
    os.remove("output/a_checkpoint.json")
    for name in ("aster", "iris", "rose"):  # only their names are needed
        shutil.rmtree(f"flowers/train/{name}")
        os.mkdir(f"flowers/train/{name}")
    assert evaluate("--dataset", "flowers") == 0
    assert number_in(caplog, r"Valid Accuracy: (.*)") == round(accuracy, 5)
    shutil.rmtree("flowers/train")
    assert evaluate("--dataset", "flowers") == 0
    assert number_in(caplog, r"Valid Accuracy: (.*)") == round(accuracy, 5)
