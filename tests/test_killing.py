"""A run that is killed, wherever it is, and started again ends as the one that was never stopped: to the last bit."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from tests.helpers import runs
from tests.helpers.boundaries import every_kill_is_harmless, killed_at, signalled_at
from tests.helpers.runs import assert_same, every_name_is_whole, last_state, outcome, run, undisturbed

pytestmark = pytest.mark.usefixtures("pets")


def test_a_run_may_be_killed_at_every_boundary():
    files = ["a_checkpoint.bin", "a_checkpoint.json", "a_last.pt", "a_report.html"]

    def nothing_is_kept_twice():
        assert not list(Path("output").glob("*.earlier-*"))

    names = every_kill_is_harmless(check=nothing_is_kept_twice)
    assert {f"after step {step}: os.rename {file}" for step in (2, 4) for file in files} <= set(names)
    assert len(names) == len(set(names))
    assert_same(outcome(), undisturbed())
    assert sorted(os.listdir("output")) == files


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
    assert run("--seed", "1") == 0
    theirs = Path("output/a_checkpoint.bin").read_bytes()

    def check():
        assert theirs in [path.read_bytes() for path in Path("output").glob("a_checkpoint*.bin")]

    names = every_kill_is_harmless("--resume", "none", only="^start: os", check=check)
    assert {"start: os.remove a_last.pt", "start: os.mkdir earlier-1"} <= set(names)


# ---- every kind of run ----


def no_scale_fits():
    """Lets float16's first steps overflow, which then are skipped: it ends at 65504."""
    real = torch.amp.GradScaler
    torch.amp.GradScaler = lambda *a, **k: real(*a, init_scale=2.0**20, growth_interval=3, **k)


@pytest.mark.parametrize(
    "flags",
    [
        "--decay_type linear --hflip --weight_decay 0.001",
        "--dropout 0 --gradient_accumulation_steps 1",
        "--dropout 0.5 --max_grad_norm inf",
        "--model_type testing-hybrid",
        "--dataset digits --eval_batch_size 90",
        "--fp16 --fp16_opt_level O1 --amp_dtype bfloat16",
        "--fp16 --fp16_opt_level O2 --amp_dtype bfloat16",
        "--fp16 --fp16_opt_level O3 --amp_dtype bfloat16",
        "--fp16 --fp16_opt_level O1 --amp_dtype float16",
        "--fp16 --fp16_opt_level O2 --amp_dtype float16",
        "--fp16 --fp16_opt_level O1 --amp_dtype float16 --loss_scale 128",
    ],
)
def test_every_kind_of_run_that_is_killed_twice_ends_as_the_one_that_was_not(flags):
    """Once it resumes in the middle of two lines of the log, and once with the best weights of an evaluation."""
    overflows, flags = flags.endswith(" float16"), flags.split()
    how = {"prepare": no_scale_fits} if overflows else {}
    for step in (2, 4):
        killed_at(f"after step {step}: step ends", *flags, "--save_every", "1", **how)
        assert last_state().step == step - 1
    runs.run_in_child(*flags, "--save_every", "1", **how)
    expected = undisturbed(*flags, **how)
    assert_same(outcome(), expected)
    assert expected["precision"]["skipped"] in ((1, 2) if overflows else (0,))


def images_of_several_sizes():
    runs.write_images(sizes=runs.several_sizes())


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_folder_of_files_too(workers):
    shutil.rmtree("pets")
    images_of_several_sizes()
    flags = ("--hflip", "--num_workers", workers)
    killed_at("after step 3: step ends", *flags)
    assert run(*flags) == 0
    assert_same(outcome(), undisturbed("--hflip", images=images_of_several_sizes))


def test_a_torn_file_and_another_outcome_are_told():
    """Else the tests above would prove nothing."""
    assert run() == 0
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
