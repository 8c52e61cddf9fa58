"""Which pictures each update and each evaluation sees."""

import os
import signal

import numpy as np
import pytest
import torch

from tests.helpers.folders import as_files, damage, noise, numbered_images, save
from utils import augment, data_utils, datasets
from utils.data_utils import StepSampler
from utils.datasets import FileImages, ImageError, MemoryImages, load_datasets

CPU = torch.device("cpu")
GREY_LEVEL = 1 / 127.5


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
    pictures = numbered_images(10)
    if kind == "files":
        pictures = as_files(pictures, tmp_path)
    sampler = StepSampler(10, 6, augment.NUM_DRAWS, seed=0)
    whole, parts = take(pictures, sampler), take(pictures, sampler, micro_batch_size=micro_batch_size)
    assert [len(labels) for _, labels in parts] == [micro_batch_size] * (3 * 6 // micro_batch_size)
    for a, b in zip(joined(parts), joined(whole)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["memory", "files"])
def test_training_pictures_are_the_samplers_cropped_as_its_draws_say(tmp_path, kind):
    pictures = numbered_images(10, size=12)
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
    monkeypatch.setattr(datasets, "MEMORY_LIMIT_BYTES", 6 * 3 * height * width - 1)
    files = load_datasets(str(tmp_path), "", 1)
    assert isinstance(memory.train, MemoryImages)
    assert isinstance(files.train, FileImages)
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
    pictures = numbered_images(10)
    if kind == "files":
        pictures = as_files(pictures, tmp_path)
    sampler = StepSampler(10, 6, augment.NUM_DRAWS, seed=0)
    (plain, _), (flipped, _) = (joined(take(pictures, sampler, hflip=hflip)) for hflip in (False, True))
    mirrored = torch.cat([augment.flips(sampler(step)[1]) for step in range(1, 4)])
    assert 0 < mirrored.sum() < len(mirrored)
    expected = torch.where(mirrored[:, None, None, None], plain.flip(3), plain)
    torch.testing.assert_close(flipped, expected, rtol=0, atol=1e-5)


def test_worker_processes_give_the_batches_that_no_worker_gives(tmp_path):
    pictures = as_files(numbered_images(10), tmp_path)
    sampler = StepSampler(10, 6, augment.NUM_DRAWS, seed=0)
    alone, workers = take(pictures, sampler, num_workers=0), take(pictures, sampler, num_workers=2)
    assert len(alone) == len(workers) == 3
    for a, b in zip(joined(alone), joined(workers)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["memory", "files"])
def test_reading_batches_leaves_the_global_generator_alone(tmp_path, kind):
    # Dropout's numbers are seeded once an update; a draw at a run's first batch would make a resumed run's
    # first update differ from the same update of a run that was never stopped.
    pictures = numbered_images(10)
    if kind == "files":
        pictures = as_files(pictures, tmp_path)
    before = torch.get_rng_state()
    take(pictures, StepSampler(10, 6, augment.NUM_DRAWS, seed=0))
    list(data_utils.eval_batches(pictures, 4, augment.EvalTransform(9), CPU, 0))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("batches", ["train", "eval"])
def test_batches_do_not_copy_pictures_that_are_where_they_are_needed(batches, monkeypatch):
    pictures = numbered_images(6)
    moved, to = [], MemoryImages.to
    monkeypatch.setattr(MemoryImages, "to", lambda self, device: moved.append(to(self, device)) or moved[-1])
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
    pictures = numbered_images(count)
    if kind == "files":
        pictures = as_files(pictures, tmp_path)
    seen = []
    for rank in range(world_size):
        batches = list(data_utils.eval_batches(pictures, 3, augment.EvalTransform(4), CPU, 0, rank, world_size))
        assert len(batches) == data_utils.num_eval_batches(pictures, 3, rank, world_size)
        assert all(1 <= len(labels) <= 3 for _, labels in batches)
        seen += [(int(label), image) for images, labels in batches for label, image in zip(labels, images)]
    assert sorted(label for label, _ in seen) == list(range(count))
    original = numbered_images(count).images / 127.5 - 1
    for label, image in seen:
        torch.testing.assert_close(image, original[label], rtol=0, atol=1e-6)


# ---- batches of files ----


def test_pictures_of_various_sizes_are_decoded_when_they_are_needed(folder, rng):
    save(noise(rng, 30, 50), folder, "train", "cat", "wide.jpg")
    save(noise(rng, 9, 4), folder, "test", "dog", "tall.png")
    data = load_datasets(str(folder), "", 2)
    assert isinstance(data.train, FileImages)
    assert isinstance(data.test, FileImages)
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
        monkeypatch.setattr(datasets, "MEMORY_LIMIT_BYTES", 0)
    picture = noise(rng).convert(mode)
    save(picture, folder, "test", "cat", f"-1.{extension}")
    images, _ = next(
        data_utils.eval_batches(load_datasets(str(folder), "", 1).test, 1, augment.EvalTransform(6), CPU, 0)
    )
    expected = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(images[0], expected, rtol=0, atol=1e-6)


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


@pytest.mark.parametrize("error", [ConnectionResetError("reset by peer"), EOFError()])
def test_a_worker_that_dies_in_the_middle_of_a_batch_is_named(folder, monkeypatch, error):
    def cut_off(self):
        raise error
        yield

    monkeypatch.setattr(torch.utils.data.DataLoader, "__iter__", cut_off)
    data = load_datasets(str(folder), "", 0)
    files = as_files(data.train, folder / "files")
    with pytest.raises(ChildProcessError, match="--num_workers"):
        take(files, StepSampler(10, 5, augment.NUM_DRAWS, seed=0), num_workers=1)


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
    with pytest.raises(ImageError, match="cannot be read as a picture") as e:
        take(data.train, StepSampler(10, 5, augment.NUM_DRAWS, seed=0), micro_batch_size=5, num_workers=num_workers)
    assert str(folder / "train" / "dog" / "1.png") in str(e.value)
    assert "Traceback" not in str(e.value)
    with pytest.raises(ImageError, match="cannot be read as a picture") as e:
        list(data_utils.eval_batches(data.test, 2, augment.EvalTransform(9), CPU, num_workers))
    assert str(folder / "test" / "dog" / "1.png") in str(e.value)
