"""What a training says of its images before it begins, and that the flags it advises fit."""

import logging
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

import train
from tests.conftest import REPOSITORY
from tests.helpers import folders
from tests.helpers.runs import TINY
from utils.advice import class_sizes, for_small_set
from utils.args import make_parser
from utils.batch import Batch

RUN = ["--name", "a", *TINY, "--pretrained_dir", "", "--img_size", "16", "--num_workers", "0"]


def batch_of(per_rank, num_micro_batches=1, num_ranks=1):
    return Batch.from_flags(per_rank, num_micro_batches, num_ranks)


def advised(remark):
    """The flags that a remark ends with, and their values as train.py reads them."""
    flags = shlex.split(remark[remark.index("--") :])
    return flags, make_parser().parse_args(["--name", "a", *flags])


# ---- when ----


def test_more_than_300_epochs_are_many():
    assert for_small_set(batch_of(32), 1500, 160) is None
    assert for_small_set(batch_of(32), 1501, 160) is not None
    assert for_small_set(batch_of(8, num_ranks=4), 1501, 160) is not None


def test_a_batch_may_be_as_large_as_the_set():
    assert for_small_set(batch_of(160), 100, 160) is None
    assert for_small_set(batch_of(161), 100, 160) is not None
    assert for_small_set(batch_of(41, num_ranks=4), 100, 160) is not None


@pytest.mark.parametrize("num_images", [50_000, 10_000, 1707])
def test_the_published_recipe_and_the_demonstration_do_not_remark(num_images):
    args = make_parser().parse_args(["--name", "a"])
    steps = args.num_steps if num_images == 50_000 else 1000  # README's for a folder of one's own
    assert for_small_set(batch_of(args.train_batch_size), steps, num_images) is None
    makefile = (REPOSITORY / "Makefile").read_text()
    demo = make_parser().parse_args(["--name", "a", *re.search("DEMO_TRAINING := (.*)", makefile)[1].split()])
    assert for_small_set(batch_of(demo.train_batch_size), demo.num_steps, 1437) is None


# ---- what ----


def test_the_numbers_for_160_images_are_these():
    remark = for_small_set(batch_of(512), 10_000, 160)
    assert remark.startswith("a batch of 512 is larger than the training set of 160 images; ")
    assert remark.endswith(": --train_batch_size 32 --num_steps 500 --warmup_steps 25 --learning_rate 0.001875")


def test_a_batch_that_fits_is_left_as_it_is():
    remark = for_small_set(batch_of(20), 10_000, 160)
    assert remark.startswith("10000 steps are 1250 epochs of the 160 images to train on; ")
    assert remark.endswith(": --num_steps 800 --warmup_steps 40 --learning_rate 0.001172")


def test_several_ranks_share_the_batch_that_is_advised():
    remark = for_small_set(batch_of(512, num_ranks=4), 10_000, 160)
    assert remark.endswith(": --train_batch_size 8 --num_steps 500 --warmup_steps 25 --learning_rate 0.001875")


def test_micro_batches_divide_the_batch_that_is_advised_and_are_no_larger_than_they_were():
    remark = for_small_set(batch_of(513, num_micro_batches=27), 100, 160)  # 19 at a time
    assert "--train_batch_size 32 --gradient_accumulation_steps 2 " in remark
    remark = for_small_set(batch_of(512, num_micro_batches=2), 100, 160)
    assert "--train_batch_size 32 --gradient_accumulation_steps 1 " in remark


@pytest.mark.parametrize("num_images", [2, 3, 5, 16, 100, 160, 1000, 5000, 100_000])
@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("per_rank", [1, 32, 512, 200_000])
def test_whoever_follows_hears_no_more_remarks(num_images, num_ranks, per_rank):
    remark = for_small_set(batch_of(per_rank, num_ranks=num_ranks), 10**9, num_images)
    flags, args = advised(remark)
    batch = batch_of(args.train_batch_size if "--train_batch_size" in flags else per_rank, num_ranks=num_ranks)
    assert for_small_set(batch, args.num_steps, num_images) is None
    assert batch.total <= num_images
    assert args.num_steps * batch.total / num_images == pytest.approx(100, rel=0.02)
    assert args.warmup_steps == pytest.approx(args.num_steps / 20, abs=0.5)
    assert args.learning_rate == pytest.approx(0.03 * batch.total / 512, rel=1e-3)


# ---- classes ----


def test_unequal_classes_have_the_least_and_the_most():
    labels = np.array([0] * 5 + [1] * 12 + [3] * 830)
    assert class_sizes(labels, ["bee", "beetle", "fly", "ant"]) == "0 (fly) to 830 (ant)"
    assert class_sizes(labels[5:] // 2, ["beetle", "ant"]) == "12 (beetle) to 830 (ant)"
    assert class_sizes(np.array([0, 1, 2] * 4), ["a", "b", "c"]) is None


# ---- in a training ----


@pytest.fixture
def pets(tmp_path, monkeypatch, rng):
    """Works where the folder pets is: 12 bees and 4 ants to train on."""
    monkeypatch.chdir(tmp_path)
    for split, name, count in (("train", "ant", 4), ("train", "bee", 12), ("test", "ant", 3), ("test", "bee", 1)):
        for i in range(count):
            folders.save(folders.noise(rng), Path("pets"), split, name, f"{i}.png")


def remarks(log):
    return [r.getMessage() for r in log.records if r.levelno == logging.WARNING and "epochs that fit" in r.getMessage()]


def test_a_training_of_few_images_says_which_flags_fit_and_with_them_says_nothing(pets, caplog):
    caplog.set_level(logging.INFO)
    more = ["--dataset", "pets", "--num_steps", "3", "--eval_every", "2"]
    assert train.main([*RUN, *more]) == 0
    assert "  Images: 16 to train on, 4 to test on, 2 classes, 96.0 epochs" in caplog.messages
    assert "  Images per class: 4 (ant) to 12 (bee)" in caplog.messages
    (remark,) = remarks(caplog)
    assert "a batch of 512 is larger than the training set of 16 images" in remark

    caplog.clear()
    flags, args = advised(remark)
    assert (args.train_batch_size, args.num_steps) == (4, 400)
    assert train.main([*RUN, "--name", "b", "--dataset", "pets", *flags, "--num_steps", "22"]) == 0  # all would be slow
    assert remarks(caplog) == []

    caplog.clear()
    assert train.main([*RUN, *more, "--num_steps", "4", "-v"]) == 0  # no training
    assert "  Images: 4 to test on, 2 classes" in caplog.messages
    assert train.main([*RUN, *more, "--num_steps", "4"]) == 0  # resumes, with the settings that it began with
    assert "Total optimization steps = 4" in caplog.text
    assert remarks(caplog) == []
