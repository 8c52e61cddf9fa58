"""Folders of images: layouts, and which files are images."""

import pytest
from PIL import Image

from tests.helpers.folders import noise, save
from utils import datasets
from utils.datasets import load_datasets


def test_val_stands_in_for_test_where_there_is_none(folder, rng):
    (folder / "test").rename(folder / "val")
    assert len(load_datasets(str(folder), "", 1).test) == 6
    for name in ("cat", "dog"):
        save(noise(rng), folder, "test", name, "0.png")
    assert len(load_datasets(str(folder), "", 1).test) == 2


def test_images_of_many_names_are_found_and_other_files_and_hidden_ones_passed_over(folder, rng):
    names = ["upper.PNG", "photo.JPG", "photo.jpeg", "x.bmp", "x.webp", "deeper/still/x.png"]
    for name in names:
        save(noise(rng), folder, "train", "cat", name)
    for name in ("notes.txt", ".hidden.png", "Thumbs.db", "labels.csv", ".ipynb_checkpoints/0.png"):
        path = folder / "train" / "cat" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes((folder / "train" / "cat" / "0.png").read_bytes())
    for split in ("train", "test"):
        save(noise(rng), folder, split, ".ipynb_checkpoints", "0.png")
    data = load_datasets(str(folder), "", 1)
    assert data.classes == ["cat", "dog"]
    assert data.train.labels.tolist() == [0] * (5 + len(names)) + [1] * 5


def moved(*path):
    return lambda root: root.joinpath(*path).rename(root.parent / "elsewhere")


def renamed(*path, new):
    return lambda root: [p.rename(p.with_name(new(p.name))) for p in sorted(root.joinpath(*path).iterdir())]


SPLITS = r"needs the folders train/<class>/ and test/<class>/ \(or val/<class>/\)"
#: Changes to a folder that make its layout a wrong one, and the message about it.
WRONG_LAYOUTS = {
    "no train": (moved("train"), SPLITS),
    "no test": (moved("test"), SPLITS),
    "no classes": (renamed("train", new=lambda name: f".{name}"), "train has no class folders"),
    "a class that is only tested": (moved("train", "cat"), "test has classes that .*train has not: cat$"),
    "a class that is not tested": (moved("test", "cat"), "test/cat holds no image"),
    "an empty class": (lambda root: (root / "train" / "zebra").mkdir(), "train/zebra holds no image"),
    "a class of other files": (renamed("train", "dog", new=lambda name: f"{name}.txt"), "train/dog holds no image"),
    "hidden images only": (renamed("test", "dog", new=lambda name: f".{name}"), "test/dog holds no image"),
    "nothing": (moved(), "is neither a folder nor a known data set"),
}


@pytest.mark.parametrize("case", WRONG_LAYOUTS)
def test_a_wrong_layout_is_refused_before_anything_is_read(folder, monkeypatch, case):
    change, message = WRONG_LAYOUTS[case]
    change(folder)
    monkeypatch.setattr(Image, "open", None)
    with pytest.raises(ValueError, match=message) as e:
        datasets.find(str(folder))
    assert str(folder) in str(e.value)


def test_images_in_deeper_folders_and_behind_links_are_found_once(folder, rng):
    for split in ("train", "test"):
        save(noise(rng), folder, split, "bee", "deeper", "still", "0.PNG")
    (folder / "test").rename(folder / "elsewhere")
    (folder / "val").symlink_to(folder / "elsewhere")
    (folder / "train" / "dog" / "loop").symlink_to(folder / "train" / "dog", target_is_directory=True)
    data = load_datasets(str(folder), "", 1)
    assert data.classes == ["bee", "cat", "dog"]
    assert data.train.labels.bincount().tolist() == [1, 5, 5]
