"""Data sets from folders, and the digits."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.folders import as_files, damage, noise, numbered_images, save, tree
from tests.helpers.launching import ranks
from utils import datasets, dist_util
from utils.datasets import FileImages, MemoryImages, class_names, load_datasets
from utils.images import ImageError

CPU, META = torch.device("cpu"), torch.device("meta")


# ---- folders of images ----


def test_a_folder_gives_sorted_classes_and_all_its_images(folder):
    data = load_datasets(str(folder), "", 2)
    assert data.classes == class_names(str(folder)) == ["cat", "dog"]
    assert data.train.labels.tolist() == [0] * 5 + [1] * 5
    assert data.test.labels.tolist() == [0] * 3 + [1] * 3
    assert data.train.images.dtype == torch.uint8
    with Image.open(folder / "train" / "dog" / "2.png") as image:
        assert torch.equal(data.train.images[7].permute(1, 2, 0), torch.from_numpy(np.array(image)))


def test_small_images_are_held_in_memory_up_to_a_limit_and_photos_are_not(folder, tmp_path, rng, monkeypatch):
    for limit, kind in ((10 * 3 * 6 * 6, MemoryImages), (10 * 3 * 6 * 6 - 1, FileImages)):
        with monkeypatch.context() as patch:
            patch.setattr(datasets, "MEMORY_LIMIT_BYTES", limit)
            assert isinstance(load_datasets(str(folder), "", 1).train, kind)
    for split in ("train", "test"):
        save(noise(rng, 257, 257), tmp_path, "photos", split, "cat", "0.png")
    assert isinstance(load_datasets(str(tmp_path / "photos"), "", 1).train, FileImages)


def test_named_data_sets_have_no_layout_and_are_not_downloaded_to_check_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("cifar10", "cifar100", "digits"):
        assert datasets.find(name) == name
        assert len(class_names(name)) == (100 if name == "cifar100" else 10)
    assert os.listdir() == []


def test_unknown_names_and_folders_without_classes_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("imagenet", "CIFAR10", "no/such/folder"):
        for load in (lambda name: load_datasets(name, "", 1), class_names):
            with pytest.raises(ValueError, match=rf"{name} is neither a folder .*\(cifar10, cifar100, digits\)"):
                load(name)
    (tmp_path / "none" / "train" / ".hidden").mkdir(parents=True)
    for path in (tmp_path / "none", tmp_path / "none" / "train"):
        with pytest.raises(ValueError, match="has no class folders"):
            class_names(str(path))


@pytest.mark.parametrize("layout", ["{0}/1.png {0}/2.png", "TRAIN/{0}/1.png Val/{0}/1.png", "testing/{0}/1.png"])
def test_classes_are_named_whatever_the_layout(tmp_path, layout):
    paths = [path.format(name) for path in layout.split() for name in ("ant", "bee")]
    assert class_names(tree(tmp_path / "pets", *paths)) == ["ant", "bee"]


def test_a_split_by_names_is_known_to_the_data_set_and_stays_on_a_device(tmp_path):
    data = load_datasets(tree(tmp_path / "pets", "ant/{0..9}.png", "bee/{0..9}.png"), "", 1)
    for where in (data, data.to(META)):
        assert where.test_fraction == 0.2
        assert len(where.train) + len(where.test) == 20
        assert len(where.notes) == 1


def test_images_to_test_on_alone_are_a_data_set_with_a_checksum(tmp_path):
    root, checksums = tree(tmp_path / "pets", "test/ant/{0..2}.png"), set()
    for classes in (["ant", "bee"], ["bee", "ant"]):
        found = datasets.for_head(datasets.find_test(root), classes, None, True)
        data = datasets.load(found, "", 1)
        assert (len(data.train), len(data.test), data.classes) == (0, 3, classes)
        checksums.add(data.checksum())
    assert len(checksums) == 2


def test_an_unreadable_image_is_named_while_decoding_into_memory(folder):
    for how in ("noise", "empty", "cut_off"):
        for name in ("0.png", "3.png"):
            path = folder / "train" / "dog" / name
            content = path.read_bytes()
            damage(path, how)
            with pytest.raises(ImageError, match=f"^{path} cannot be read as an image"):
                load_datasets(str(folder), "", 2)
            path.write_bytes(content)


# ---- digits ----


def test_digits_are_rgb_bytes_of_ten_classes():
    data = load_datasets("digits", "no such folder", 1)
    assert data.classes == class_names("digits") == list("0123456789")
    for images, count in ((data.train, 1437), (data.test, 360)):
        assert images.images.shape == (count, 3, 32, 32)
        assert (images.images.dtype, images.labels.dtype) == (torch.uint8, torch.int64)
        assert torch.equal(images.images[:, 0], images.images[:, 2])
        assert images.labels.shape == (count,)
        assert (images.labels.bincount(minlength=10) / count).sub(0.1).abs().max() < 0.01
    assert data.train.images.max() == 255


def test_digits_are_scikit_learns():
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    grey = torch.from_numpy(digits.images).float()[:, None] * (255 / 16)
    expected = torch.nn.functional.interpolate(grey, (32, 32), mode="bilinear", align_corners=False).round().byte()
    data = load_datasets("digits", "", 1)
    images = torch.cat((data.train.images, data.test.images))[:, :1]
    labels = torch.cat((data.train.labels, data.test.labels))

    def multiset(images, labels):
        return sorted((int(label), image.numpy().tobytes()) for image, label in zip(images, labels))

    assert multiset(images, labels) == multiset(expected, digits.target)


# ---- on a device ----


def test_images_in_memory_move_to_a_device_once_and_files_stay(tmp_path):
    images, files = numbered_images(5), as_files(numbered_images(3), tmp_path)
    moved = images.to(META)
    assert (moved.images.device, moved.labels.device) == (META, META)
    assert (moved.images.shape, moved.images.dtype) == (images.images.shape, torch.uint8)
    for here, device in ((images, CPU), (moved, META)):  # where they already are, nothing is copied
        again = here.to(device)
        assert again.images is here.images
        assert again.labels is here.labels
    data = datasets.DataSets(images, files, ["a", "b"]).to(META)
    assert data.train.images.device == META
    assert data.test is files
    assert data.classes == ["a", "b"]


# ---- several ranks ----


def load_on_a_rank(args):
    """Loads a folder's images on a rank; returns the name of the error that this ends with."""
    folder, has_memory = args
    dist_util.setup("cpu", -1)
    if not has_memory:
        datasets.read_image = _no_memory
    try:
        with dist_util.all_ranks_or_none():
            datasets.load_datasets(folder, ".", 1)
    except (MemoryError, dist_util.FailedElsewhere) as e:
        return type(e).__name__


def _no_memory(path):
    raise MemoryError(path)


def test_no_rank_waits_for_one_that_fails_while_it_loads(tmp_path):
    folder = tree(tmp_path / "pets", "{train,test}/ant/1.png", "{train,test}/bee/1.png")
    save(noise(np.random.default_rng(0)), folder, "train/ant/large.png")  # stays in its file, as those of its part
    with ranks(tmp_path / "ranks", [(folder, True), (folder, False)], load_on_a_rank) as both:
        assert both.results(60) == ["FailedElsewhere", "MemoryError"]
