"""A run that is killed, wherever it is, and started again ends as the one that was never stopped: to the last bit."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from tests.helpers.boundaries import every_kill_is_harmless, killed_at, signalled_at
from tests.helpers.forked import Forked, run_forked
from tests.helpers.runs import (
    SHORT,
    assert_same,
    every_name_is_whole,
    last_state,
    outcome,
    several_sizes,
    short_run,
    undisturbed,
    write_images,
)

FILES = ["a_checkpoint.bin", "a_checkpoint.json", "a_last.pt", "a_report.html"]


@pytest.fixture(autouse=True)
def _folder_of_its_own(tmp_path, monkeypatch):
    """Runs write output/ and logs/ below the working directory."""
    monkeypatch.chdir(tmp_path)
    write_images()


def test_a_run_may_be_killed_at_every_boundary():
    names = every_kill_is_harmless()
    assert_same(outcome(), undisturbed())
    assert sorted(os.listdir("output")) == FILES
    assert last_state().best_step == 4  # both evaluations write the checkpoint
    for step, file in itertools.product((2, 4), FILES):
        assert f"after step {step}: os.rename {file}" in names
    assert len(names) == len(set(names))


def test_a_resumed_run_may_be_killed_at_every_boundary_before_its_first_step():
    """Its logs go back to the saved state meanwhile, and what killed processes left half-written is removed."""
    killed_at("after step 4: os.rename a_last.pt")
    names = every_kill_is_harmless(only="^start: (?!forward)")
    assert {"start: os.truncate metrics.jsonl", "start: os.remove a_last.pt.tmp"} <= set(names)


def test_an_evaluation_that_a_signal_left_and_a_kill_interrupted_is_logged_once():
    """The state is of a step whose evaluation is still due."""
    assert signalled_at("after step 2: forward", signal.SIGTERM)[0] == 143
    assert (last_state().step, last_state().last_eval_step) == (2, 0)
    names = every_kill_is_harmless(only="^start: (evaluation|write|os.rename)")
    assert {"start: evaluation ends", "start: os.rename a_last.pt"} <= set(names)


def test_a_run_that_replaces_another_may_be_killed_at_every_boundary_of_that():
    assert short_run("--seed", "1") == 0
    theirs = Path("output/a_checkpoint.bin").read_bytes()

    def check():
        assert theirs in [path.read_bytes() for path in Path("output").glob("a_checkpoint*.bin")]

    names = every_kill_is_harmless("--resume", "none", only="^start: os", check=check)
    assert {"start: os.remove a_last.pt", "start: os.mkdir earlier-1"} <= set(names)
    assert "after step 2: os.link a_checkpoint.earlier-1.bin" in names


# ---- every kind of run ----


def no_scale_fits():
    """Lets float16's first steps overflow, which then are skipped: it ends at 65504."""
    real = torch.amp.GradScaler
    torch.amp.GradScaler = lambda *a, **k: real(*a, init_scale=2.0**20, growth_interval=3, **k)


O1, O2, O3 = (("--fp16", "--fp16_opt_level", level) for level in ("O1", "O2", "O3"))
FLOAT16 = ("--amp_dtype", "float16")
KINDS = {
    "linear, mirrored, weight decay": ("--decay_type", "linear", "--hflip", "--weight_decay", "0.001"),
    "no dropout, one micro-batch": ("--dropout", "0", "--gradient_accumulation_steps", "1"),
    "much dropout": ("--dropout", "0.5", "--max_grad_norm", "inf"),
    "bfloat16 O1": O1,
    "bfloat16 O2": O2,
    "bfloat16 O3": O3,
    "float16 O1": (*O1, *FLOAT16),
    "float16 O2": (*O2, *FLOAT16),
    "float16 at a fixed scale": (*O1, *FLOAT16, "--loss_scale", "128"),
    "hybrid": ("--model_type", "testing-hybrid"),
    "digits": ("--dataset", "digits", "--eval_batch_size", "90"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_run_that_is_killed_twice_ends_as_the_one_that_was_not(kind):
    """Once it resumes in the middle of two lines of the log, and once with the best weights of an evaluation."""
    flags, overflows = KINDS[kind], kind.startswith("float16 O")
    how = {"prepare": no_scale_fits} if overflows else {}
    for step in (2, 4):
        killed_at(f"after step {step}: step ends", *flags, "--save_every", "1", **how)
        assert last_state().step == step - 1
    code, _, err = run_forked(["train.py", *SHORT, *flags, "--save_every", "1"], **how)
    assert code == 0, err
    expected = undisturbed(*flags, **how)
    assert_same(outcome(), expected)
    assert expected["precision"]["skipped"] in ((1, 2) if overflows else (0,))


def images_of_several_sizes():
    write_images(sizes=several_sizes())


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_folder_of_files_too(workers):
    shutil.rmtree("pets")
    images_of_several_sizes()
    flags = ("--hflip", "--num_workers", workers)
    killed_at("after step 3: step ends", *flags)
    assert short_run(*flags) == 0
    assert_same(outcome(), undisturbed("--hflip", images=images_of_several_sizes))


@pytest.mark.parametrize(("save_every", "saved"), [(1, 2), (2, 2), (3, 0), (100, 0)])
def test_it_resumes_from_the_last_save_however_often_it_saves(save_every, saved):
    flags = ("--save_every", str(save_every))
    killed_at("after step 3: step ends", *flags)
    assert os.path.exists("output/a_last.pt") == (saved > 0)
    assert not saved or last_state().step == saved
    assert short_run(*flags) == 0
    assert_same(outcome(), undisturbed())


# ---- at any moment, from outside ----


def kill_at_random(seed, times, *flags):
    """Kills a run so many times, each a while after it began, as hard as the system can; returns how many hit it."""
    moments, kills = random.Random(seed), 0
    for _ in range(times):
        with Forked(["train.py", *SHORT, *flags]) as child:
            time.sleep(moments.uniform(0, 0.6))
            if child.poll() is not None:
                break
            os.kill(child.pid, signal.SIGKILL)
            kills += child.wait() == -signal.SIGKILL
        every_name_is_whole()
    code, _, err = run_forked(["train.py", *SHORT, *flags])
    assert code == 0, err
    return kills


def test_a_run_that_is_killed_at_random_moments_ends_as_the_one_that_was_not():
    seed = random.SystemRandom().randrange(10**6)
    print("seed", seed)
    flags = ("--num_steps", "24", "--save_every", "1")
    assert kill_at_random(seed, 4, *flags) > 0
    assert_same(outcome(), undisturbed(*flags))


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", ["bfloat16 O2", "much dropout", "hybrid"])
def test_hundreds_of_kills(kind):
    seed, flags, kills = random.SystemRandom().randrange(10**6), (*KINDS[kind], "--num_steps", "40"), 0
    print("seed", seed)
    while kills < 60:
        for folder in ("output", "logs"):
            shutil.rmtree(folder, ignore_errors=True)
        kills += kill_at_random(seed + kills, 12, *flags)
        assert_same(outcome(), undisturbed(*flags))


def test_a_torn_file_and_another_outcome_are_told():
    """Else the tests above would prove nothing."""
    assert short_run() == 0
    with open("logs/a/metrics.jsonl", "a", encoding="utf-8") as f:
        f.write('{"step": 5, "train/loss": 1.0}\n')
    with pytest.raises(AssertionError):
        assert_same(outcome(), undisturbed())
    every_name_is_whole()
    for name in ("a_last.pt", "a_checkpoint.bin"):
        os.truncate(f"output/{name}", os.path.getsize(f"output/{name}") - 100)
        with pytest.raises(ValueError, match=name):
            every_name_is_whole()
        os.remove(f"output/{name}")
    with pytest.raises(AssertionError, match="was not reached"):
        killed_at("after step 9: step begins")
