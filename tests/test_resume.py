"""The meaning of --resume: the run's own state, another's, or none; under the same settings, with other ranks, too."""

from __future__ import annotations

import logging
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import train
from models import npz
from models.configs import CONFIGS
from tests.helpers import fake_npz
from tests.helpers.boundaries import killed_at
from tests.helpers.runs import assert_same, last_state, lines, outcome, run, undisturbed, write_images
from utils import checkpoint, precision
from utils.batch import Batch
from utils.errors import UserError
from utils.evaluation import EvalResult

pytestmark = pytest.mark.usefixtures("pets")

STATE = Path("output/a_last.pt")
STOP = "after step 3: step ends"  # the state is of step 2


# ---- which state a run starts from ----


def test_a_new_run_needs_no_state(caplog):
    with caplog.at_level(logging.INFO):
        assert run("--train_batch_size", "8") == 0  # as many images as there are
    assert "Resumed after" not in caplog.text
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING and "pretrained_dir" not in r.getMessage()]


def test_a_finished_run_says_so_and_does_nothing(monkeypatch, caplog, make_npz):
    start = make_npz("testing", img_size=32)
    assert run("--pretrained_dir", start) == 0
    os.remove(start)  # nothing needs it any more
    before = {p: p.stat().st_mtime_ns for p in Path().rglob("*") if p.is_file()}
    monkeypatch.setattr(train, "train", None)
    monkeypatch.setattr(train, "evaluate", None)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert run("--pretrained_dir", start) == 0
    assert f"This run is finished: Best Accuracy: \t{last_state().best_accuracy:.5f}" in caplog.text
    assert {p: p.stat().st_mtime_ns for p in Path().rglob("*") if p.is_file()} == before


def test_resuming_needs_no_pretrained_file(make_npz):
    start = make_npz("testing", img_size=32)
    assert run("--name", "b", "--pretrained_dir", start) == 0
    killed_at(STOP, "--pretrained_dir", start)
    os.remove(start)
    assert run("--pretrained_dir", start) == 0
    assert_same(outcome("a"), outcome("b"))


def test_the_starting_weights_may_be_elsewhere_when_the_run_resumes(make_npz, caplog):
    """Another spelling, another name, another layout, another type of the same numbers."""
    start = make_npz("testing", img_size=32)
    arrays = {name: x.astype(np.float16).astype(np.float32) for name, x in np.load(start).items()}
    fake_npz.save("a.npz", arrays)
    assert run("--name", "b", "--pretrained_dir", "a.npz") == 0
    killed_at(STOP, "--pretrained_dir", "a.npz")
    os.mkdir("moved")
    fake_npz.save("moved/half.npz", {name: x.astype(np.float16) for name, x in arrays.items()})
    save_file(npz.to_state_dict(arrays, CONFIGS["testing"], 32, 10), "moved/model.safetensors")
    shutil.copytree("output", "killed/output")
    shutil.copytree("logs", "killed/logs")
    for path in ("./a.npz", os.path.abspath("a.npz"), "moved/half.npz", "moved/model.safetensors", "moved"):
        for folder in ("output", "logs"):
            shutil.copytree(f"killed/{folder}", folder, dirs_exist_ok=True)
        caplog.clear()
        assert run("--pretrained_dir", path) == 0, path
        assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
        assert_same(outcome("a"), outcome("b"))
        shutil.rmtree("logs/a")
    assert last_state("a").pretrained == "a.npz"  # where they were at the start


def test_a_moved_job_folder_resumes_to_the_same_bits(make_npz, tmp_path, monkeypatch):
    os.makedirs("here/checkpoint")
    write_images("here/pets")
    shutil.move(make_npz("testing", img_size=32), "here/checkpoint/testing.npz")
    os.chdir("here")  # monkeypatch.chdir of the fixture brings it back
    weights = ["--pretrained_dir", os.path.abspath("checkpoint/testing.npz")]
    assert run("--name", "b", *weights) == 0
    killed_at(STOP, *weights)
    os.chdir("..")
    os.rename("here", "there")
    os.chdir("there")
    assert run("--pretrained_dir", os.path.abspath("checkpoint/testing.npz")) == 0
    assert_same(outcome("a"), outcome("b"))


@pytest.mark.parametrize("there", [True, False])
def test_other_weights_are_an_error_where_they_are_there(there, make_npz, capsys, caplog):
    start = make_npz("testing", img_size=32)
    arrays = dict(np.load(start))
    killed_at(STOP, "--pretrained_dir", start)
    before = STATE.read_bytes()
    if there:
        bias = arrays["embedding/bias"]
        bias[-1] = np.nextafter(bias[-1], np.float32(1))  # the last bit
        fake_npz.save("other.npz", arrays)
    with caplog.at_level(logging.INFO):
        assert run("--pretrained_dir", "other.npz") == (2 if there else 0)
    assert ("--pretrained_dir other.npz is not there, and resuming does not need it" in caplog.text) != there
    if there:
        error = capsys.readouterr().err.splitlines()[-1]
        now = rf"weights [0-9a-f]{{8}} \(other.npz; it began with {re.escape(start)}\); give it the same"
        assert re.search(rf"--pretrained_dir was weights [0-9a-f]{{8}}, is {now}", error)
        assert STATE.read_bytes() == before
        assert run("--pretrained_dir", "") == 2
        assert "is random weights (it began with " in capsys.readouterr().err.splitlines()[-1]
        assert run() == 2  # as ``SHORT`` has it: random weights
        fake_npz.save(start, arrays)  # the path is the same
        assert run("--pretrained_dir", start) == 2


def test_a_state_that_knows_only_the_path_of_its_weights_takes_another_spelling_of_it(make_npz, capsys, caplog):
    start = make_npz("testing", img_size=32)
    killed_at(STOP, "--pretrained_dir", start)
    state = torch.load(STATE, weights_only=True)
    del state["pretrained"]
    state["settings"]["--pretrained_dir"] = start
    torch.save(state, STATE)
    assert run("--pretrained_dir", "other.npz") == 2
    assert f"--pretrained_dir was {start}, is other.npz" in capsys.readouterr().err
    os.mkdir("moved")
    shutil.copy(start, moved := f"moved/{os.path.basename(start)}")
    for path, warns in ((start, False), (os.path.relpath(start), False), (moved, True)):
        torch.save(state, STATE)
        caplog.clear()
        assert run("--pretrained_dir", path) == 0
        assert ("taken for the same weights" in caplog.text) == warns, path
        assert last_state().settings["--pretrained_dir"] == start


def test_none_starts_over_and_says_what_it_replaces(caplog):
    assert run("--seed", "1") == 0
    before = STATE.read_bytes()
    caplog.clear()
    for wrong in (("--dataset", "nowhere"), ("--pretrained_dir", "nosuch.npz")):  # it cannot start
        assert run("--resume", "none", *wrong) == 2
        assert "replaces" not in caplog.text
        assert STATE.read_bytes() == before
    assert run("--resume", "none") == 0
    assert "--resume none: this run replaces the one that output/a_last.pt is of" in caplog.text
    assert "Moved the logs of an earlier run" in caplog.text
    assert_same(outcome(), undisturbed())
    caplog.clear()
    assert run("--name", "new", "--resume", "none") == 0
    assert "replaces" not in caplog.text


@pytest.mark.parametrize("boundary", ["start: forward", "after step 2: os.rename a_last.pt"])
def test_a_replacement_killed_before_its_first_save_is_not_taken_for_the_run_that_it_replaced(boundary, caplog):
    assert run() == 0
    killed_at(boundary, "--resume", "none")
    assert not STATE.exists()
    caplog.clear()
    assert run() == 0
    assert "Resumed after" not in caplog.text
    assert_same(outcome(), undisturbed())


@pytest.mark.parametrize("boundary", [STOP, "after step 4: fsync metrics.jsonl"])
def test_a_path_resumes_under_another_name_with_the_best_weights(boundary):
    """In the second case those beside the state are newer: they are not there, and the next are saved."""
    killed_at(boundary)
    shutil.copytree("output", "elsewhere")
    shutil.rmtree("output")
    assert run("--name", "b", "--resume", "elsewhere/a_last.pt") == 0
    result, expected = outcome("b"), undisturbed()
    for key in ("best", "metadata", "model", "optimizer", "precision", "step", "best_accuracy", "settings"):
        assert result[key] == expected[key], key
    assert result["lines"] == [line for line in expected["lines"] if line["step"] > 2]
    shutil.rmtree("output")
    shutil.copytree("elsewhere", "output")
    assert run("--resume", "./output/a_last.pt") == 0  # its own path is as auto
    assert_same(outcome(), expected)


ALL_WRONG = EvalResult(1.0, torch.zeros(8).long(), torch.ones(8).long(), torch.ones(8))


@pytest.mark.parametrize("missing", [None, "output/a_checkpoint.bin", "output/a_checkpoint.json"])
def test_best_weights_beside_a_path_are_kept_unless_they_are_gone(missing, monkeypatch, caplog):
    killed_at(STOP)
    best = Path("output/a_checkpoint.bin").read_bytes()
    if missing:
        os.remove(missing)
    monkeypatch.setattr(train, "evaluate", lambda *_: ALL_WRONG)
    assert run("--name", "b", "--resume", str(STATE)) == 0
    assert (Path("output/b_checkpoint.bin").read_bytes() == best) == (missing is None)
    assert checkpoint.read_metadata("output/b_checkpoint.bin", checkpoint.load_weights("output/b_checkpoint.bin"))
    told = re.search(r"The best weights so far, of accuracy 0\.\d+, are not there", caplog.text)
    assert bool(told) == (missing is not None)


def test_a_path_replaces_another_run_of_the_name():
    killed_at(STOP)
    assert run("--name", "b", "--seed", "1") == 0
    killed_at(STOP, "--name", "b", "--resume", str(STATE), "--save_every", "4")
    assert last_state("b").settings == last_state("a").settings  # b's own from the start, and no longer the other run's


def test_a_path_of_a_finished_run_brings_its_weights_and_its_state_under_the_name():
    assert run() == 0
    assert run("--name", "b", "--resume", str(STATE)) == 0
    assert Path("output/b_checkpoint.bin").read_bytes() == Path("output/a_checkpoint.bin").read_bytes()
    assert last_state("b").step == last_state("a").step
    assert run("--name", "b") == 0  # and is finished, too


def test_a_path_of_a_finished_run_without_its_weights_is_evaluated_again():
    assert run() == 0
    os.remove("output/a_checkpoint.bin")
    assert run("--name", "b", "--resume", str(STATE)) == 0
    last = last_state("b")
    assert last.best_step == last.step
    assert os.path.exists("output/b_checkpoint.bin")


def test_a_link_to_the_own_state_is_the_own_state():
    killed_at(STOP)
    best = Path("output/a_checkpoint.bin").read_bytes()
    os.symlink("output/a_last.pt", "link_last.pt")
    assert run("--resume", "link_last.pt") == 0
    assert not list(Path("output").glob("*earlier*"))
    assert best


# ---- under the same settings ----


def test_more_steps_resume_with_a_warning(caplog):
    assert run() == 0
    assert run("--num_steps", "7") == 0
    assert "--num_steps was 4 and is 7: the steps to come have the longer schedule's learning rates" in caplog.text
    assert last_state().step == 7
    assert sorted({line["step"] for line in lines()}) == [2, 3, 4, 6, 7]


DIFFERENT = {
    "--model_type": "testing-hybrid", "--pretrained_dir": "other.npz", "--img_size": "48", "--learning_rate": "0.2",
    "--weight_decay": "0.1", "--num_steps": "3", "--decay_type": "linear", "--warmup_steps": "0",
    "--max_grad_norm": "2", "--dropout": "0.3", "--gelu": "tanh", "--hflip": None, "--seed": "1", "--eval_every": "3",
    "--train_batch_size": "8", "--fp16": None, "--dataset": "digits", "--zero_head": None,
}  # fmt: skip


def test_another_setting_is_an_error_that_names_it_and_no_other(capsys):
    killed_at(STOP)
    stopped, settings = STATE.read_bytes(), last_state().settings
    for flag, value in DIFFERENT.items():
        assert run(flag, *([value] if value else [])) == 2, flag
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(f"train.py: error: {STATE} is of a run with other settings: ")
        named = "precision" if flag == "--fp16" else flag
        assert [name for name in settings if name.split()[0] != named and f" {name} was" in error] == []
        assert re.search(rf" {named}( of all processes)? was .*, is ", error)
    assert run(*[word for pair in DIFFERENT.items() for word in pair if word], "--loss_scale", "2") == 2
    assert capsys.readouterr().err.splitlines()[-1].count(" was ") == len(settings) == len(DIFFERENT) + 1
    assert STATE.read_bytes() == stopped


def test_other_images_are_another_data_set(capsys):
    killed_at(STOP)
    shutil.copy("pets/train/ant/0.png", "pets/train/ant/1.png")
    assert run() == 2
    assert "had 16 images then, 16 now (other contents or classes)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--gradient_accumulation_steps", "4"], "--gradient_accumulation_steps was 2, is 4"),
        (["--eval_batch_size", "3"], "--eval_batch_size was 4, is 3"),
        (["--deterministic"], "--deterministic was False, is True"),
    ],
)
def test_another_environment_is_a_warning(flags, words, caplog):
    killed_at(STOP)
    assert run(*flags) == 0
    assert f"{words}: the last digits may differ from those of a run that was never stopped" in caplog.text


def test_the_precision_of_a_run_is_all_of_its_flags():
    cpu = torch.device("cpu")
    levels, dtypes = precision.OPT_LEVELS[1:], ("float16", "bfloat16")
    assert len({str(precision.Precision(cpu, level, dtype)) for level in levels for dtype in dtypes}) == 6


# ---- with other ranks ----


def test_other_ranks_keep_the_images_of_a_step():
    """Also a run that first shrinks and then grows beyond what it had: the flags as given stay with it."""
    batch, ranks = Batch.from_flags(16, 1, 2), 2
    for now, per_rank, num_micro_batches in ((1, 32, 2), (4, 8, 1), (2, 16, 1)):
        saved = {"total": batch.total, "given": batch.given}
        batch, ranks = Batch.from_flags(16, 1, now).resumed(saved, ranks), now
        assert (batch.total, batch.per_rank, batch.num_micro_batches) == (32, per_rank, num_micro_batches)
        assert batch.micro_batch <= 16  # what fitted into memory
        assert batch.given == 16
    with pytest.raises(UserError, match="numbers that can: 1, 2, 4"):
        Batch.from_flags(16, 1, 3).resumed(saved, 2)
    other = Batch.from_flags(8, 1, 4)  # another command: the comparison of the settings tells
    assert other.resumed({"total": 64, "given": 16}, 4) == other
