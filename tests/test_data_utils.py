"""Data sets from folders and archives, and which pictures each update and each evaluation sees."""

import contextlib
import hashlib
import http.server
import io
import os
import pickle
import signal
import socket
import struct
import tarfile
import threading
from typing import ClassVar

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from utils import augment, data_utils
from utils.data_utils import FilePictures, MemoryPictures, PictureError, StepSampler, class_names, load_datasets

CPU = torch.device("cpu")
GREY_LEVEL = 1 / 127.5


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def noise(rng, height=6, width=6):
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def save(picture, *path):
    path = os.path.join(*map(str, path))
    os.makedirs(os.path.dirname(path), exist_ok=True)
    picture.save(path)
    return path


@pytest.fixture
def folder(tmp_path, rng):
    """Two classes of 6x6 pictures: five to train on and three to test on each."""
    root = tmp_path / "pictures"
    for split, count in (("train", 5), ("test", 3)):
        for name in ("cat", "dog"):
            for i in range(count):
                save(noise(rng), root, split, name, f"{i}.png")
    return root


@pytest.fixture
def decode_late(monkeypatch):
    """As if no split fitted into memory."""
    monkeypatch.setattr(data_utils, "MEMORY_LIMIT_BYTES", 0)


def numbered_pictures(count, size=4):
    """Pictures whose labels are their numbers."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    return MemoryPictures(images, torch.arange(count))


def as_files(pictures, root):
    """The same pictures as PNGs."""
    paths = [
        save(Image.fromarray(image.permute(1, 2, 0).numpy()), root, f"{i}.png")
        for i, image in enumerate(pictures.images)
    ]
    return FilePictures(paths, pictures.labels)


# ---- what each update takes ----


def test_an_update_is_a_function_of_the_seed_and_its_number_only():
    forwards = StepSampler(10, 4, augment.NUM_DRAWS, seed=3)
    in_turn = {step: forwards(step) for step in range(1, 12)}
    jumping = StepSampler(10, 4, augment.NUM_DRAWS, seed=3)
    torch.manual_seed(99)  # the global generator has no say
    for step in (11, 2, 7, 7, 1, 10):
        for a, b in zip(jumping(step), in_turn[step]):
            assert torch.equal(a, b)


def test_asking_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    StepSampler(10, 4, augment.NUM_DRAWS, seed=3)(5)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("num_pictures", "batch_size"), [(10, 4), (12, 4), (7, 7), (5, 12), (1, 3)])
def test_the_stream_of_batches_is_one_permutation_after_another(num_pictures, batch_size):
    sampler = StepSampler(num_pictures, batch_size, augment.NUM_DRAWS, seed=0)
    batches = [sampler(step) for step in range(1, 4 * num_pictures + 1)]
    for indices, draws in batches:
        assert indices.shape == (batch_size,)
        assert draws.shape == (batch_size, augment.NUM_DRAWS)
    epochs = torch.cat([indices for indices, _ in batches]).view(-1, num_pictures)
    assert torch.equal(epochs.sort(dim=1).values, torch.arange(num_pictures).expand_as(epochs))
    if num_pictures >= 7:
        assert len({tuple(epoch.tolist()) for epoch in epochs}) == len(epochs)


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_slices_of_all_processes_are_the_batch_of_a_single_one(world_size):
    alone = StepSampler(11, 8, augment.NUM_DRAWS, seed=5)
    ranks = [StepSampler(11, 8 // world_size, augment.NUM_DRAWS, 5, rank, world_size) for rank in range(world_size)]
    for step in (1, 2, 3, 50):
        together = [torch.cat(parts) for parts in zip(*(sampler(step) for sampler in ranks))]
        for a, b in zip(together, alone(step)):
            assert torch.equal(a, b)


@pytest.mark.parametrize(("a", "b"), [((0, 1), (1, 1)), ((0, 1), (0, 2)), ((1, 2), (2, 1)), ((0, 257), (1, 256))])
def test_other_seeds_and_other_updates_give_other_pictures_and_draws(a, b):
    (indices_a, draws_a), (indices_b, draws_b) = (
        StepSampler(1000, 64, augment.NUM_DRAWS, seed)(step) for seed, step in (a, b)
    )
    assert not torch.equal(indices_a, indices_b)
    assert (draws_a == draws_b).sum() == 0


def test_no_update_repeats_anothers_draws():
    sampler = StepSampler(10, 2, augment.NUM_DRAWS, seed=0)
    draws = torch.cat([sampler(step)[1] for step in range(1, 301)])
    assert len(draws.unique(dim=0)) == len(draws)


def test_draws_are_uniform_and_independent_between_the_pictures_of_a_batch():
    _, draws = StepSampler(10, 2000, augment.NUM_DRAWS, seed=0)(1)
    assert draws.dtype == torch.float64
    assert draws.min() >= 0
    assert draws.max() < 1
    torch.testing.assert_close(draws.mean(dim=0), torch.full((augment.NUM_DRAWS,), 0.5).double(), rtol=0, atol=0.03)
    assert len(draws.unique(dim=0)) == len(draws)


def test_derived_seeds_do_not_collide():
    seeds = {data_utils.derive_seed(*numbers) for numbers in np.ndindex(10, 3, 100)}
    assert len(seeds) == 3000
    assert all(0 <= seed < 2**63 for seed in seeds)


# ---- batches ----


def take(pictures, sampler, steps=range(1, 4), micro_batch_size=6, img_size=9, hflip=True, num_workers=0):
    return list(
        data_utils.train_batches(
            pictures, sampler, steps, micro_batch_size, augment.TrainTransform(img_size, hflip), CPU, num_workers
        )
    )


def joined(batches):
    images, labels = zip(*batches)
    return torch.cat(images), torch.cat(labels)


@pytest.mark.parametrize("kind", ["memory", "files"])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 3])
def test_micro_batches_together_are_the_whole_batch(tmp_path, kind, micro_batch_size):
    pictures = numbered_pictures(10)
    if kind == "files":
        pictures = as_files(pictures, tmp_path)
    sampler = StepSampler(10, 6, augment.NUM_DRAWS, seed=0)
    whole, parts = take(pictures, sampler), take(pictures, sampler, micro_batch_size=micro_batch_size)
    assert [len(labels) for _, labels in parts] == [micro_batch_size] * (3 * 6 // micro_batch_size)
    for a, b in zip(joined(parts), joined(whole)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["memory", "files"])
def test_training_pictures_are_the_samplers_cropped_as_its_draws_say(tmp_path, kind):
    pictures = numbered_pictures(10, size=12)
    sampler = StepSampler(10, 6, augment.NUM_DRAWS, seed=0)
    [(images, labels)] = take(as_files(pictures, tmp_path) if kind == "files" else pictures, sampler, steps=[3])
    assert images.shape == (6, 3, 9, 9)
    assert images.dtype == torch.float32
    indices, draws = sampler(3)
    assert torch.equal(labels, indices)
    boxes = augment.crop_boxes(draws, 12, 12)
    expected = augment.resized_crop(pictures.images[indices], boxes, 9, augment.flips(draws))
    torch.testing.assert_close(images, expected, rtol=0, atol=1.001 * GREY_LEVEL)


@pytest.mark.parametrize("hflip", [True, False])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (40, 24)])
def test_pictures_in_memory_and_in_files_give_the_same_batches(tmp_path, rng, monkeypatch, hflip, height, width):
    for split in ("train", "test"):
        for i in range(6):
            save(noise(rng, height, width), tmp_path, split, "ab"[i % 2], f"{i}.png")
    memory = load_datasets(str(tmp_path), "", 1)
    monkeypatch.setattr(data_utils, "MEMORY_LIMIT_BYTES", 6 * 3 * height * width - 1)
    files = load_datasets(str(tmp_path), "", 1)
    assert isinstance(memory.train, MemoryPictures)
    assert isinstance(files.train, FilePictures)
    sampler = StepSampler(6, 6, augment.NUM_DRAWS, seed=1)
    (a, labels_a), (b, labels_b) = (joined(take(d.train, sampler, img_size=20, hflip=hflip)) for d in (memory, files))
    assert torch.equal(labels_a, labels_b)
    assert (a - b).abs().max() <= 1.001 * GREY_LEVEL
    (a, labels_a), (b, labels_b) = (
        joined(data_utils.eval_batches(d.test, 4, augment.EvalTransform(20), CPU, 0)) for d in (memory, files)
    )
    assert torch.equal(labels_a, labels_b)
    assert (a - b).abs().max() <= 1.001 * GREY_LEVEL


@pytest.mark.parametrize("kind", ["memory", "files"])
def test_hflip_mirrors_the_pictures_that_the_draws_name_and_no_others(tmp_path, kind):
    pictures = numbered_pictures(10)
    if kind == "files":
        pictures = as_files(pictures, tmp_path)
    sampler = StepSampler(10, 6, augment.NUM_DRAWS, seed=0)
    (plain, _), (flipped, _) = (joined(take(pictures, sampler, hflip=hflip)) for hflip in (False, True))
    mirrored = torch.cat([augment.flips(sampler(step)[1]) for step in range(1, 4)])
    assert 0 < mirrored.sum() < len(mirrored)
    expected = torch.where(mirrored[:, None, None, None], plain.flip(3), plain)
    torch.testing.assert_close(flipped, expected, rtol=0, atol=1e-5)


def test_worker_processes_give_the_batches_that_no_worker_gives(tmp_path):
    pictures = as_files(numbered_pictures(10), tmp_path)
    sampler = StepSampler(10, 6, augment.NUM_DRAWS, seed=0)
    alone, workers = take(pictures, sampler, num_workers=0), take(pictures, sampler, num_workers=2)
    assert len(alone) == len(workers) == 3
    for a, b in zip(joined(alone), joined(workers)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["memory", "files"])
def test_reading_batches_leaves_the_global_generator_alone(tmp_path, kind):
    # Dropout's numbers are seeded once an update; a draw at a run's first batch would make a resumed run's
    # first update differ from the same update of a run that was never stopped.
    pictures = numbered_pictures(10)
    if kind == "files":
        pictures = as_files(pictures, tmp_path)
    before = torch.get_rng_state()
    take(pictures, StepSampler(10, 6, augment.NUM_DRAWS, seed=0))
    list(data_utils.eval_batches(pictures, 4, augment.EvalTransform(9), CPU, 0))
    assert torch.equal(torch.get_rng_state(), before)


def test_pictures_move_to_a_device_once():
    pictures, meta = numbered_pictures(5), torch.device("meta")
    moved = pictures.to(meta)
    assert (moved.images.device, moved.labels.device) == (meta, meta)
    assert (moved.images.shape, moved.images.dtype) == (pictures.images.shape, torch.uint8)
    for here, device in ((pictures, CPU), (moved, meta)):  # where they already are, nothing is copied
        again = here.to(device)
        assert again.images is here.images
        assert again.labels is here.labels


def test_a_data_set_moves_its_pictures_in_memory_and_leaves_files_where_they_are(tmp_path):
    pictures, meta = numbered_pictures(5), torch.device("meta")
    files = as_files(numbered_pictures(3), tmp_path)
    data = data_utils.DataSets(pictures, files, ["a", "b"]).to(meta)
    assert data.train.images.device == meta
    assert data.test is files
    assert data.classes == ["a", "b"]


@pytest.mark.parametrize("batches", ["train", "eval"])
def test_batches_do_not_copy_pictures_that_are_where_they_are_needed(batches, monkeypatch):
    pictures = numbered_pictures(6)
    moved, to = [], MemoryPictures.to
    monkeypatch.setattr(MemoryPictures, "to", lambda self, device: moved.append(to(self, device)) or moved[-1])
    if batches == "train":
        take(pictures, StepSampler(6, 6, augment.NUM_DRAWS, 0))
    else:
        list(data_utils.eval_batches(pictures, 2, augment.EvalTransform(4), CPU, 0))
    assert len(moved) == 1  # for all batches
    assert moved[0].images is pictures.images


@pytest.mark.parametrize("kind", ["memory", "files"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 13])
def test_an_evaluation_sees_each_picture_once(tmp_path, kind, world_size, count):
    pictures = numbered_pictures(count)
    if kind == "files":
        pictures = as_files(pictures, tmp_path)
    seen = []
    for rank in range(world_size):
        batches = list(data_utils.eval_batches(pictures, 3, augment.EvalTransform(4), CPU, 0, rank, world_size))
        assert len(batches) == data_utils.num_eval_batches(pictures, 3, rank, world_size)
        assert all(1 <= len(labels) <= 3 for _, labels in batches)
        seen += [(int(label), image) for images, labels in batches for label, image in zip(labels, images)]
    assert sorted(label for label, _ in seen) == list(range(count))
    original = numbered_pictures(count).images / 127.5 - 1
    for label, image in seen:
        torch.testing.assert_close(image, original[label], rtol=0, atol=1e-6)


# ---- folders of pictures ----


def test_a_folder_gives_sorted_classes_and_all_its_pictures(folder):
    data = load_datasets(str(folder), "", 2)
    assert data.classes == ["cat", "dog"]
    assert data.train.labels.tolist() == [0] * 5 + [1] * 5
    assert data.test.labels.tolist() == [0] * 3 + [1] * 3
    assert data.train.images.dtype == torch.uint8
    with Image.open(folder / "train" / "dog" / "2.png") as picture:
        assert torch.equal(data.train.images[7].permute(1, 2, 0), torch.from_numpy(np.array(picture)))


def test_the_names_of_classes_need_no_pictures(folder, tmp_path):
    assert class_names(str(folder), "") == load_datasets(str(folder), "", 1).classes
    assert class_names("digits", "") == list("0123456789")
    (tmp_path / "none" / "train" / ".hidden").mkdir(parents=True)
    for path in (tmp_path / "none", tmp_path / "none" / "train"):
        with pytest.raises(ValueError, match="has no class folders"):
            class_names(str(path), "")
    with pytest.raises(ValueError, match="neither a folder nor a known data set"):
        class_names("mnist", "")


def test_val_stands_in_for_test(folder):
    (folder / "test").rename(folder / "val")
    assert len(load_datasets(str(folder), "", 1).test) == 6


def test_test_comes_before_val(folder, rng):
    save(noise(rng), folder, "val", "cat", "0.png")
    assert len(load_datasets(str(folder), "", 1).test) == 6


@pytest.mark.parametrize("name", ["upper.PNG", "photo.JPG", "photo.jpeg", "x.bmp", "x.webp", "deeper/still/x.png"])
def test_pictures_of_many_names_are_found(folder, rng, name):
    save(noise(rng), folder, "train", "cat", name)
    assert len(load_datasets(str(folder), "", 1).train) == 11


@pytest.mark.parametrize("name", ["notes.txt", ".hidden.png", "Thumbs.db", "labels.csv", ".ipynb_checkpoints/0.png"])
def test_other_files_and_hidden_ones_are_passed_over(folder, name):
    path = folder / "train" / "cat" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes((folder / "train" / "cat" / "0.png").read_bytes())
    assert len(load_datasets(str(folder), "", 1).train) == 10


@pytest.mark.parametrize("split", ["train", "test"])
def test_hidden_folders_are_no_classes(folder, rng, split):
    save(noise(rng), folder, split, ".ipynb_checkpoints", "0.png")
    assert load_datasets(str(folder), "", 1).classes == ["cat", "dog"]


def test_pictures_of_various_sizes_are_decoded_when_they_are_needed(folder, rng):
    save(noise(rng, 30, 50), folder, "train", "cat", "wide.jpg")
    save(noise(rng, 9, 4), folder, "test", "dog", "tall.png")
    data = load_datasets(str(folder), "", 2)
    assert isinstance(data.train, FilePictures)
    assert isinstance(data.test, FilePictures)
    images, labels = joined(
        take(data.train, StepSampler(11, 11, augment.NUM_DRAWS, seed=0), steps=[1], micro_batch_size=11)
    )
    assert images.shape == (11, 3, 9, 9)
    assert labels.bincount().tolist() == [6, 5]
    images, labels = joined(data_utils.eval_batches(data.test, 4, augment.EvalTransform(9), CPU, 0))
    assert images.shape == (7, 3, 9, 9)
    assert labels.tolist() == [0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("mode", "extension"), [("L", "png"), ("1", "png"), ("P", "png"), ("LA", "png"), ("RGBA", "png"), ("CMYK", "tif")]
)
@pytest.mark.parametrize("late", [False, True])
def test_pictures_of_any_mode_become_rgb(folder, rng, monkeypatch, mode, extension, late):
    if late:
        monkeypatch.setattr(data_utils, "MEMORY_LIMIT_BYTES", 0)
    picture = noise(rng).convert(mode)
    save(picture, folder, "test", "cat", f"-1.{extension}")
    images, _ = next(
        data_utils.eval_batches(load_datasets(str(folder), "", 1).test, 1, augment.EvalTransform(6), CPU, 0)
    )
    expected = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(images[0], expected, rtol=0, atol=1e-6)


def test_sixteen_bit_grey_keeps_its_levels(tmp_path):
    grey = np.arange(0, 65536, 4096, dtype=np.uint16).reshape(4, 4)
    path = save(Image.fromarray(grey), tmp_path, "a.png")
    got = np.array(data_utils.read_picture(path))
    np.testing.assert_allclose(got, np.repeat(grey[..., None] / 257, 3, axis=2), atol=1)


@pytest.mark.parametrize(("level", "grey"), [(200, 200), (51400, 200), (70000, 255)])
def test_thirty_two_bit_grey_is_taken_as_bytes_or_as_sixteen_bits(tmp_path, level, grey):
    path = save(Image.new("I", (4, 4), level), tmp_path, "a.tiff")
    assert set(np.array(data_utils.read_picture(path)).ravel()) == {grey}


def test_photos_of_one_size_are_not_held_in_memory(tmp_path, rng):
    for split, name in (("train", "cat"), ("test", "cat")):
        save(noise(rng, 257, 257), tmp_path, split, name, "0.png")
    data = load_datasets(str(tmp_path), "", 1)
    assert isinstance(data.train, FilePictures)


def test_a_link_that_leads_back_up_does_not_multiply_the_pictures(folder):
    before = len(load_datasets(str(folder), "", 1).train)
    (folder / "train" / "dog" / "loop").symlink_to(folder / "train" / "dog", target_is_directory=True)
    assert len(load_datasets(str(folder), "", 1).train) == before


@pytest.mark.parametrize("missing", ["train", "test", "both"])
def test_a_folder_without_its_splits_is_refused_with_the_layout(folder, missing):
    for split in ("train", "test") if missing == "both" else (missing,):
        (folder / split).rename(folder / f"not_{split}")
    with pytest.raises(ValueError, match=r"train/<class>/ and test/<class>/ \(or val/<class>/\)") as e:
        load_datasets(str(folder), "", 1)
    assert str(folder) in str(e.value)


def test_a_train_folder_without_classes_is_refused(tmp_path, rng):
    save(noise(rng), tmp_path, "train", "0.png")
    save(noise(rng), tmp_path, "test", "cat", "0.png")
    with pytest.raises(ValueError, match="has no class folders"):
        load_datasets(str(tmp_path), "", 1)


def test_a_test_class_that_train_has_not_is_named(folder, rng):
    save(noise(rng), folder, "test", "zebra", "0.png")
    with pytest.raises(ValueError, match="zebra") as e:
        load_datasets(str(folder), "", 1)
    assert "cat" not in str(e.value).replace(str(folder), "")


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_class_without_pictures_is_named(folder, split):
    for picture in (folder / split / "dog").iterdir():
        picture.rename(picture.with_suffix(".txt"))
    with pytest.raises(ValueError, match="holds no picture") as e:
        load_datasets(str(folder), "", 1)
    assert str(folder / split / "dog") in str(e.value)


@pytest.mark.parametrize("name", ["imagenet", "CIFAR10", "no/such/folder"])
def test_an_unknown_name_lists_the_known_ones(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="cifar10, cifar100, digits") as e:
        load_datasets(name, "", 1)
    assert name in str(e.value)


def damage(path, how):
    content = path.read_bytes()
    path.write_bytes({"noise": b"no picture", "empty": b"", "cut_off": content[: len(content) // 2]}[how])


@pytest.mark.parametrize("how", ["noise", "empty", "cut_off"])
@pytest.mark.parametrize("which", ["0.png", "3.png"])
def test_an_unreadable_picture_is_named_while_decoding_into_memory(folder, how, which):
    path = folder / "train" / "dog" / which
    damage(path, how)
    with pytest.raises(PictureError, match="cannot be read as a picture") as e:
        load_datasets(str(folder), "", 2)
    assert str(path) in str(e.value)


@pytest.mark.usefixtures("decode_late")
def test_a_signal_to_a_worker_that_has_just_started_does_not_end_it(folder, monkeypatch):
    """A scheduler's SIGTERM reaches every process, and evaluations start new ones."""
    data = load_datasets(str(folder), "", 1)
    ready = data_utils._outlive_signals

    def signalled(worker):
        os.kill(os.getpid(), signal.SIGTERM)
        ready(worker)

    monkeypatch.setattr(data_utils, "_outlive_signals", signalled)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    batches = list(data_utils.eval_batches(data.test, 2, augment.EvalTransform(9), CPU, 2))
    assert sum(len(labels) for _, labels in batches) == len(data.test)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


@pytest.mark.usefixtures("decode_late")
@pytest.mark.parametrize("how", ["noise", "cut_off", "removed"])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_unreadable_picture_is_named_when_its_turn_comes(folder, how, num_workers):
    data = load_datasets(str(folder), "", 1)
    for split in ("train", "test"):
        path = folder / split / "dog" / "1.png"
        if how == "removed":
            path.unlink()
        else:
            damage(path, how)
    with pytest.raises(PictureError, match="cannot be read as a picture") as e:
        take(data.train, StepSampler(10, 5, augment.NUM_DRAWS, seed=0), micro_batch_size=5, num_workers=num_workers)
    assert str(folder / "train" / "dog" / "1.png") in str(e.value)
    assert "Traceback" not in str(e.value)
    with pytest.raises(PictureError, match="cannot be read as a picture") as e:
        list(data_utils.eval_batches(data.test, 2, augment.EvalTransform(9), CPU, num_workers))
    assert str(folder / "test" / "dog" / "1.png") in str(e.value)


# ---- digits ----


def test_digits_are_rgb_bytes_of_ten_classes():
    data = load_datasets("digits", "no such folder", 1)
    assert data.classes == list("0123456789")
    for pictures, count in ((data.train, 1437), (data.test, 360)):
        assert pictures.images.shape == (count, 3, 32, 32)
        assert pictures.images.dtype == torch.uint8
        assert torch.equal(pictures.images[:, 0], pictures.images[:, 2])
        assert pictures.labels.shape == (count,)
        assert pictures.labels.dtype == torch.int64
        shares = pictures.labels.bincount() / count
        assert len(shares) == 10
        assert shares.sub(0.1).abs().max() < 0.01
    assert data.train.images.max() == 255


def test_digits_are_scikit_learns():
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    grey = torch.from_numpy(digits.images).float()[:, None] * (255 / 16)
    expected = torch.nn.functional.interpolate(grey, (32, 32), mode="bilinear", align_corners=False).round().byte()
    data = load_datasets("digits", "", 1)
    images = torch.cat((data.train.images, data.test.images))[:, :1]
    labels = torch.cat((data.train.labels, data.test.labels))

    def multiset(images, labels):
        return sorted((int(label), image.numpy().tobytes()) for image, label in zip(images, labels))

    assert multiset(images, labels) == multiset(expected, digits.target)


# ---- CIFAR archives ----


class Python2Pickler(pickle._Pickler):
    """Writes strings and bools as Python 2 did, who made the published files."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_string(self, text):
        content = text if isinstance(text, bytes) else text.encode()
        self.write(pickle.BINSTRING + struct.pack("<i", len(content)) + content)
        self.memoize(text)

    dispatch[str] = dispatch[bytes] = save_string
    dispatch[bool] = lambda self, value: self.save_long(int(value))


def python2_pickle(value):
    buffer = io.BytesIO()
    Python2Pickler(buffer, protocol=2).dump(value)
    return buffer.getvalue()


def tar_gz(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def md5(content):
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


class Server:
    """Serves one archive over HTTP on 127.0.0.1."""

    def __init__(self):
        self.content = b""
        self.announced_bytes = None
        self.fetchable = True
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self):
                self.send_response(200)
                size = len(outer.content) if outer.announced_bytes is None else outer.announced_bytes
                self.send_header("Content-Length", str(size))
                self.end_headers()

            def do_GET(self):
                if not outer.fetchable:
                    self.send_error(404)
                    return
                self.do_HEAD()
                self.wfile.write(outer.content)

            def log_message(self, *args):
                pass

        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def close(self):
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()


@pytest.fixture
def server(monkeypatch):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    server = Server()
    yield server
    with contextlib.suppress(OSError):
        server.close()


class FakeCifar:
    """A small data set in CIFAR's format, put in the place of the published one."""

    def __init__(self, name, server, monkeypatch, rng):
        self.name, self.server = name, server
        fine = name == "cifar100"
        self.classes = [f"class {i}" for i in range(100 if fine else 10)]
        self.folder = "cifar-100-python" if fine else "cifar-10-batches-py"
        self.archive_name = "cifar-100-python.tar.gz" if fine else "cifar-10-python.tar.gz"
        train = ["train"] if fine else [f"data_batch_{i}" for i in range(1, 6)]
        meta, key = ("meta", "fine_label_names") if fine else ("batches.meta", "label_names")
        self.rows, self.labels = {}, {}
        self.files = {meta: python2_pickle({key: self.classes})}
        for file in [*train, "test" if fine else "test_batch"]:
            split = "test" if file.startswith("test") else "train"
            rows = rng.integers(0, 256, (7, 3072), dtype=np.uint8)
            labels = rng.integers(0, len(self.classes), 7).tolist()
            self.rows.setdefault(split, []).append(rows)
            self.labels.setdefault(split, []).extend(labels)
            batch = {"data": rows, "batch_label": file, "filenames": [f"{i}.png" for i in range(7)]}
            batch |= {"fine_labels": labels, "coarse_labels": [0] * 7} if fine else {"labels": labels}
            self.files[file] = python2_pickle(batch)
        self.archive = tar_gz({f"{self.folder}/{file}": content for file, content in self.files.items()})
        server.content = self.archive

        cls = torchvision.datasets.CIFAR100 if fine else torchvision.datasets.CIFAR10
        assert (cls.base_folder, cls.filename) == (self.folder, self.archive_name)
        assert [file for file, _ in cls.train_list] == train
        md5s = {file: md5(content) for file, content in self.files.items()}
        monkeypatch.setattr(cls, "url", f"{server.url}/{self.archive_name}")
        monkeypatch.setattr(cls, "tgz_md5", md5(self.archive))
        for attribute in ("train_list", "test_list"):
            monkeypatch.setattr(cls, attribute, [[file, md5s[file]] for file, _ in getattr(cls, attribute)])
        monkeypatch.setattr(cls, "meta", {**cls.meta, "md5": md5s[meta]})
        assert cls.meta["filename"] == meta
        self.url = cls.url

    def malicious_archive(self, touched):
        """The archive with code in its batches."""

        class Touch:
            def __reduce__(self):
                return open, (str(touched), "w")

        evil = pickle.dumps(Touch(), protocol=2)
        return tar_gz({f"{self.folder}/{file}": evil for file in self.files})


@pytest.fixture
def make_cifar(server, monkeypatch, rng):
    return lambda name: FakeCifar(name, server, monkeypatch, rng)


@pytest.fixture
def cifar(make_cifar):
    return make_cifar("cifar10")


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_downloaded_once_and_comes_through(make_cifar, server, tmp_path, name):
    cifar = make_cifar(name)
    root = tmp_path / "data"
    for _ in ("downloaded", "found"):
        data = load_datasets(name, str(root), 1)
        assert data.classes == cifar.classes
        assert class_names(name, str(root)) == cifar.classes
        for split, pictures in (("train", data.train), ("test", data.test)):
            rows = np.concatenate(cifar.rows[split])
            assert pictures.images.shape == (len(rows), 3, 32, 32)
            assert pictures.images.dtype == torch.uint8
            # A row is the red plane, then the green, then the blue, each by rows of the picture.
            assert np.array_equal(pictures.images.numpy().reshape(len(rows), 3072), rows)
            assert pictures.labels.tolist() == cifar.labels[split]
            assert pictures.labels.dtype == torch.int64
        server.fetchable = False


def test_an_archive_put_there_by_hand_is_taken(cifar, server, tmp_path):
    server.fetchable = False
    with pytest.raises(ConnectionError, match="404"):
        load_datasets("cifar10", str(tmp_path), 1)
    (tmp_path / cifar.archive_name).write_bytes(cifar.archive)
    assert len(load_datasets("cifar10", str(tmp_path), 1).train) == 35


def corrupt(cifar, how, touched):
    content = bytearray(cifar.archive)
    if how == "one_byte":
        content[len(content) // 2] ^= 1
    elif how == "cut_off":
        del content[len(content) // 2 :]
    elif how == "html":
        content = b"<html>Please log in to the network</html>"
    elif how == "malicious":
        content = cifar.malicious_archive(touched)
    return bytes(content)


@pytest.mark.parametrize("how", ["one_byte", "cut_off", "html", "malicious"])
def test_a_corrupted_archive_is_refused_unread_and_the_next_good_one_taken(cifar, server, tmp_path, how):
    touched = tmp_path / "touched"
    server.content = corrupt(cifar, how, touched)
    with pytest.raises(ConnectionError, match="could not be downloaded") as e:
        load_datasets("cifar10", str(tmp_path / "data"), 1)
    assert cifar.url in str(e.value)
    assert not touched.exists()
    assert not (tmp_path / "data" / cifar.folder).exists()
    server.content = cifar.archive
    data = load_datasets("cifar10", str(tmp_path / "data"), 1)
    assert data.train.labels.tolist() == cifar.labels["train"]


def test_a_connection_that_breaks_off_is_a_connection_error_and_the_next_good_one_taken(cifar, server, tmp_path):
    server.announced_bytes = len(cifar.archive)
    server.content = cifar.archive[: len(cifar.archive) // 2]
    with pytest.raises(ConnectionError, match="could not be downloaded"):
        load_datasets("cifar10", str(tmp_path), 1)
    server.content = cifar.archive
    assert len(load_datasets("cifar10", str(tmp_path), 1).train) == 35


def test_a_server_that_is_down_is_a_connection_error_with_the_url_and_the_remedy(cifar, server, tmp_path):
    server.close()
    with pytest.raises(ConnectionError, match=r"put http://.* there yourself") as e:
        load_datasets("cifar10", str(tmp_path), 1)
    assert cifar.url in str(e.value)
    assert torchvision.datasets.CIFAR10.tgz_md5 in str(e.value)


def test_a_server_that_speaks_no_http_is_a_connection_error(cifar, monkeypatch, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", f"http://127.0.0.1:{port}/{cifar.archive_name}")

        def answer():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection:
                        connection.recv(4096)
                        connection.sendall(b"SSH-2.0-OpenSSH\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            with pytest.raises(ConnectionError, match="could not be downloaded"):
                load_datasets("cifar10", str(tmp_path), 1)
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.mark.parametrize("file", ["data_batch_3", "test_batch", "batches.meta"])
def test_an_extracted_file_that_was_tampered_with_is_never_unpickled(cifar, server, tmp_path, file):
    touched = tmp_path / "touched"
    load_datasets("cifar10", str(tmp_path), 1)

    class Touch:
        def __reduce__(self):
            return open, (str(touched), "w")

    (tmp_path / cifar.folder / file).write_bytes(pickle.dumps(Touch()))
    (tmp_path / cifar.archive_name).unlink()
    server.close()
    with pytest.raises(ConnectionError):
        load_datasets("cifar10", str(tmp_path), 1)
    assert not touched.exists()


@pytest.mark.parametrize("file", ["data_batch_3", "test_batch"])
def test_an_extraction_that_was_cut_short_is_done_again(cifar, tmp_path, file):
    load_datasets("cifar10", str(tmp_path), 1)
    (tmp_path / cifar.folder / file).unlink()
    data = load_datasets("cifar10", str(tmp_path), 1)
    assert data.classes == cifar.classes
    assert data.test.labels.tolist() == cifar.labels["test"]
