"""The images of each step and of each evaluation."""

import os
import signal
import sys

import numpy as np
import pytest
import torch
import torch.utils.data

from tests.helpers.folders import as_files, damage, noise, numbered_images, save
from utils import augment, data_utils, datasets
from utils.data_utils import StepSampler
from utils.datasets import FileImages, load_datasets
from utils.images import ImageError

CPU = torch.device("cpu")
GREY_LEVEL = 1 / 127.5


# ---- the sampler ----


def sampler_of(num_images, batch_size, seed=0, rank=0, world_size=1):
    return StepSampler(num_images, batch_size, augment.NUM_DRAWS, seed, rank, world_size)


def test_a_step_is_a_function_of_the_seed_and_its_number_only():
    forwards, jumping = sampler_of(10, 4, seed=3), sampler_of(10, 4, seed=3)
    in_turn = {step: forwards(step) for step in range(1, 12)}
    torch.manual_seed(99)  # the global generator has no say
    before = torch.get_rng_state()
    for step in (11, 2, 7, 7, 1, 10):
        assert all(map(torch.equal, jumping(step), in_turn[step]))
    assert torch.equal(torch.get_rng_state(), before)  # and is left alone


@pytest.mark.parametrize(("num_images", "batch_size"), [(10, 4), (12, 4), (7, 7), (5, 12), (1, 3)])
def test_the_stream_of_batches_is_one_permutation_after_another(num_images, batch_size):
    sampler = sampler_of(num_images, batch_size)
    batches = [sampler(step) for step in range(1, 4 * num_images + 1)]
    for indices, draws in batches:
        assert (indices.shape, draws.shape) == ((batch_size,), (batch_size, augment.NUM_DRAWS))
    epochs = torch.cat([indices for indices, _ in batches]).view(-1, num_images)
    assert torch.equal(epochs.sort(dim=1).values, torch.arange(num_images).expand_as(epochs))
    if num_images >= 7:
        assert len({tuple(epoch.tolist()) for epoch in epochs}) == len(epochs)


def test_the_slices_of_all_ranks_are_the_batch_of_a_single_one():
    alone = sampler_of(11, 8, seed=5)
    for world_size in (2, 4):
        ranks = [sampler_of(11, 8 // world_size, 5, rank, world_size) for rank in range(world_size)]
        for step in (1, 2, 3, 50):
            together = [torch.cat(slices) for slices in zip(*(sampler(step) for sampler in ranks))]
            assert all(map(torch.equal, together, alone(step)))


def test_other_seeds_and_other_steps_give_other_images_and_draws():
    for a, b in (((0, 1), (1, 1)), ((0, 1), (0, 2)), ((1, 2), (2, 1)), ((0, 257), (1, 256))):
        (indices_a, draws_a), (indices_b, draws_b) = (sampler_of(1000, 64, seed)(step) for seed, step in (a, b))
        assert not torch.equal(indices_a, indices_b)
        assert (draws_a == draws_b).sum() == 0


def test_draws_are_uniform_and_no_image_of_any_step_repeats_anothers():
    sampler = sampler_of(10, 2000)
    _, draws = sampler(1)
    assert draws.dtype == torch.float64
    assert 0 <= draws.min() < draws.max() < 1
    torch.testing.assert_close(draws.mean(dim=0), torch.full((augment.NUM_DRAWS,), 0.5).double(), rtol=0, atol=0.03)
    draws = torch.cat([draws, *(sampler_of(10, 2)(step)[1] for step in range(2, 301))])
    assert len(draws.unique()) == draws.numel()


def test_derived_seeds_do_not_collide():
    seeds = {data_utils.derive_seed(*numbers) for numbers in np.ndindex(10, 3, 100)}
    assert len(seeds) == 3000
    assert all(0 <= seed < 2**63 for seed in seeds)


# ---- batches ----


def take(images, sampler, steps=range(1, 4), micro_batch_size=6, img_size=9, hflip=True, num_workers=0):
    transform = augment.TrainTransform(img_size, hflip)
    return list(data_utils.train_batches(images, sampler, steps, micro_batch_size, transform, CPU, num_workers))


def evaluated(images, batch_size, img_size, num_workers=0, *share):
    return list(data_utils.eval_batches(images, batch_size, augment.EvalTransform(img_size), CPU, num_workers, *share))


def joined(batches):
    images, labels = zip(*batches)
    return torch.cat(images), torch.cat(labels)


@pytest.fixture(params=["memory", "files"])
def make_images(request, tmp_path):
    """``make_images(count, size)``: numbered ones, in memory or in files, and the same in memory."""

    def make(count, size=4):
        images = numbered_images(count, size)
        return (as_files(images, tmp_path / str(count)) if request.param == "files" else images), images

    return make


def test_micro_batches_together_are_the_whole_batch(make_images):
    images, _ = make_images(10)
    whole = joined(take(images, sampler_of(10, 6)))
    for size in (1, 2, 3):
        batches = take(images, sampler_of(10, 6), micro_batch_size=size)
        assert [len(labels) for _, labels in batches] == [size] * (3 * 6 // size)
        for a, b in zip(joined(batches), whole):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_training_images_are_the_samplers_cropped_and_mirrored_as_its_draws_say(make_images):
    images, in_memory = make_images(10, size=12)
    sampler = sampler_of(10, 6)
    indices, draws = sampler(3)
    mirrored, boxes = augment.flips(draws), augment.crop_boxes(draws, 12, 12)
    assert 0 < mirrored.sum() < len(mirrored)
    for hflip in (True, False):
        [(x, labels)] = take(images, sampler, steps=[3], hflip=hflip)
        assert (x.shape, x.dtype) == ((6, 3, 9, 9), torch.float32)
        assert torch.equal(labels, indices)
        expected = augment.resized_crop(in_memory.images[indices], boxes, 9, mirrored if hflip else None)
        torch.testing.assert_close(x, expected, rtol=0, atol=1.001 * GREY_LEVEL)


def test_workers_give_the_batches_that_no_worker_gives(tmp_path):
    images = as_files(numbered_images(10), tmp_path)
    alone, workers = (take(images, sampler_of(10, 6), num_workers=n) for n in (0, 2))
    assert len(alone) == len(workers) == 3
    assert all(map(torch.equal, joined(alone), joined(workers)))


def test_reading_batches_leaves_the_global_generator_alone(make_images):
    # Dropout's numbers are seeded once a step; a draw at a run's first batch would make a resumed run's
    # first step differ from the same step of a run that was never stopped.
    images, _ = make_images(10)
    before = torch.get_rng_state()
    take(images, sampler_of(10, 6))
    evaluated(images, 4, 9)
    assert torch.equal(torch.get_rng_state(), before)


def test_batches_read_images_where_they_are_without_a_copy():
    for start in (
        lambda images: data_utils.train_batches(
            images, sampler_of(6, 6), [1, 2], 6, augment.TrainTransform(4), CPU, num_workers=0
        ),
        lambda images: data_utils.eval_batches(images, 3, augment.EvalTransform(4), CPU, 0),
    ):
        images = numbered_images(6)
        batches = start(images)
        next(batches)
        images.images.fill_(255)  # a copy would not change
        assert next(batches)[0].min() == 1


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_an_evaluation_sees_each_image_once(make_images, world_size):
    for count in (1, 2, 3, 5, 8, 13):
        images, in_memory = make_images(count)
        seen = []
        for rank in range(world_size):
            batches = evaluated(images, 3, 7, 0, rank, world_size)
            assert len(batches) == data_utils.num_eval_batches(images, 3, rank, world_size)
            assert all(1 <= len(labels) <= 3 for _, labels in batches)
            seen += batches
        x, labels = joined(seen)
        assert labels.sort().values.tolist() == list(range(count))
        expected = augment.resize(in_memory.images[labels], 7)
        torch.testing.assert_close(x, expected, rtol=0, atol=1.001 * GREY_LEVEL)


# ---- batches of files ----


def test_images_of_various_sizes_are_decoded_when_they_are_needed(folder, rng):
    save(noise(rng, 30, 50), folder, "train", "cat", "wide.jpg")
    save(noise(rng, 9, 4), folder, "test", "dog", "tall.png")
    data = load_datasets(str(folder), "", 2)
    assert isinstance(data.train, FileImages)
    assert isinstance(data.test, FileImages)
    images, labels = joined(take(data.train, sampler_of(11, 11), steps=[1], micro_batch_size=11))
    assert images.shape == (11, 3, 9, 9)
    assert labels.bincount().tolist() == [6, 5]
    images, labels = joined(evaluated(data.test, 4, 9))
    assert images.shape == (7, 3, 9, 9)
    assert labels.tolist() == [0, 0, 0, 1, 1, 1, 1]


def test_images_of_any_mode_become_rgb(folder, rng, monkeypatch):
    for late in (False, True):
        if late:
            monkeypatch.setattr(datasets, "MEMORY_LIMIT_BYTES", 0)
        for mode in ("L", "1", "P", "LA", "RGBA", "CMYK"):
            image = noise(rng).convert(mode)
            path = save(image, folder, "test", "cat", "-1.tif" if mode == "CMYK" else "-1.png")
            (x, _), *_ = evaluated(load_datasets(str(folder), "", 1).test, 1, 6)
            os.unlink(path)
            expected = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) / 127.5 - 1
            torch.testing.assert_close(x[0], expected, rtol=0, atol=1e-6)


@pytest.mark.usefixtures("decode_late")
def test_a_signal_to_a_worker_that_has_just_started_does_not_end_it(folder, monkeypatch):
    """A scheduler's SIGTERM reaches every process, and evaluations start new ones."""

    class SignalledLoader(torch.utils.data.DataLoader):
        def __init__(self, *args, worker_init_fn, **options):
            def signalled(worker):
                os.kill(os.getpid(), signal.SIGTERM)
                worker_init_fn(worker)

            super().__init__(*args, worker_init_fn=signalled, **options)

    data = load_datasets(str(folder), "", 1)
    monkeypatch.setattr(data_utils, "DataLoader", SignalledLoader)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert sum(len(labels) for _, labels in evaluated(data.test, 2, 9, num_workers=2)) == len(data.test)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


class Cut(augment.EvalTransform):
    """Fails in a worker's thread as the one does that hands tensors over, which calls the hook itself."""

    def image(self, image, draws):
        for error in (ConnectionResetError("the run is gone"), RuntimeError("a bug")):
            sys.excepthook(type(error), error, None)
        return super().image(image, draws)


def test_a_worker_whose_run_is_gone_prints_no_stack(folder, decode_late, capfd):
    data = load_datasets(str(folder), "", 0)
    assert list(data_utils.eval_batches(data.test, 2, Cut(9), CPU, 1))
    error = capfd.readouterr().err
    assert "a bug" in error
    assert "the run is gone" not in error


@pytest.mark.usefixtures("decode_late")
@pytest.mark.parametrize("how", ["noise", "cut_off", "removed"])
def test_an_unreadable_image_is_named_when_its_turn_comes(folder, how):
    data = load_datasets(str(folder), "", 1)
    for split in ("train", "test"):
        damage(folder / split / "dog" / "1.png", how)
    for num_workers in (0, 1):
        for split, read in (
            ("train", lambda n: take(data.train, sampler_of(10, 5), micro_batch_size=5, num_workers=n)),
            ("test", lambda n: evaluated(data.test, 2, 9, num_workers=n)),
        ):
            with pytest.raises(ImageError) as e:
                read(num_workers)
            assert str(e.value).startswith(str(folder / split / "dog" / "1.png"))
            assert "\n" not in str(e.value)


def test_all_unreadable_images_of_a_batch_are_named(tmp_path):
    images = as_files(numbered_images(6), tmp_path)
    for i in (1, 4):
        damage(tmp_path / f"{i}.png", "noise")
    for num_workers in (0, 1):
        with pytest.raises(ImageError) as e:
            evaluated(images, 6, 9, num_workers)
        assert list(e.value.reasons) == [images.paths[1], images.paths[4]]
