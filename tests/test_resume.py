"""A run that was stopped, wherever it was, ends as the one that was never stopped: to the last bit."""

from __future__ import annotations

import logging
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import train
from tests.helpers.runs import (
    ROOT,
    Killed,
    assert_same,
    every_name_is_whole,
    last_state,
    lines,
    outcome,
    run,
    several_sizes,
    undisturbed,
    write_images,
)
from utils import checkpoint, files, precision
from utils.args import FLAGS
from utils.evaluation import EvalResult
from utils.metrics import TrainLog
from utils.run import Run


@pytest.fixture(autouse=True)
def _folder_of_its_own(tmp_path, monkeypatch):
    """Runs write output/ and logs/ below the working directory."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """``whole(flags, prepare)`` is what the run leaves that is never stopped."""
    known = {}

    def make(flags: tuple[str, ...] = (), prepare: Callable[[], None] = lambda: None):
        key = (flags, prepare)
        if key not in known:
            known[key] = undisturbed(tmp_path_factory.mktemp("whole"), *flags, prepare=prepare)
        return known[key]

    return make


def raising(real, nth=1, before=False, only=lambda *args: True):
    """The function, which kills its run at the n-th call: after it is done, or instead."""
    calls = 0

    def wrapper(*args, **kwargs):
        nonlocal calls
        calls += only(*args)
        if calls == nth and before:
            raise Killed
        result = real(*args, **kwargs)
        if calls == nth:
            raise Killed
        return result

    return wrapper


def killed_after(update, monkeypatch, *flags):
    """The run is killed once it has logged an update."""
    with monkeypatch.context() as patch:
        patch.setattr(TrainLog, "step", raising(TrainLog.step, only=lambda log, step, *_: step == update))
        with pytest.raises(Killed):
            run(*flags)
    every_name_is_whole()


# ---- every kind of run, killed four times ----


def _no_scale_fits(monkeypatch):
    real = torch.amp.GradScaler
    # float16 ends at 65504: at these scales the first updates overflow and are skipped
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *a, **k: real(*a, init_scale=2.0**24, growth_interval=3, **k))


KINDS = {
    "float32": (),
    "linear, mirrored, weight decay": ("--decay_type", "linear", "--hflip", "--weight_decay", "0.001"),
    "no dropout, one part": ("--dropout", "0", "--gradient_accumulation_steps", "1"),
    "much dropout": ("--dropout", "0.5", "--max_grad_norm", "inf"),
    "bfloat16 O1": ("--fp16", "--fp16_opt_level", "O1"),
    "bfloat16 O2": ("--fp16", "--fp16_opt_level", "O2"),
    "bfloat16 O3": ("--fp16", "--fp16_opt_level", "O3"),
    "float16 O1": ("--fp16", "--fp16_opt_level", "O1", "--amp_dtype", "float16"),
    "float16 O2": ("--fp16", "--fp16_opt_level", "O2", "--amp_dtype", "float16"),
    "float16 at a fixed scale": (
        "--fp16", "--fp16_opt_level", "O1", "--amp_dtype", "float16", "--loss_scale", "128",
    ),
    "hybrid": ("--model_type", "testing-hybrid"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_killed_again_and_again_ends_as_the_one_that_was_not(kind, whole, monkeypatch):
    flags = KINDS[kind]
    if kind.startswith("float16 O"):
        _no_scale_fits(monkeypatch)
    for update in (
        (2, 5, 9, 12) if kind != "hybrid" else (8,)
    ):  # before the first save, before an evaluation, in the middle of two lines
        killed_after(update, monkeypatch, *flags, "--save_every", "2")
    assert run(*flags, "--save_every", "2") == 0
    expected = whole(flags)
    assert_same(outcome(), expected)
    assert expected["step"] == 13
    assert (expected["precision"]["skipped"] > 2) == kind.startswith("float16 O")


def _in_memory():
    write_images("pets")


def _in_files():
    write_images("pets", several_sizes())


@pytest.mark.parametrize(
    ("pictures", "workers"), [(_in_memory, "0"), (_in_files, "0"), (_in_files, "2")], ids=["memory", "files", "workers"]
)
def test_folders_of_pictures_too(pictures, workers, whole, monkeypatch):
    pictures()
    flags = ("--dataset", "pets", "--hflip")
    for update in (4, 8):
        killed_after(update, monkeypatch, *flags, "--num_workers", workers)
    assert run(*flags, "--num_workers", workers) == 0
    assert_same(outcome(), whole(flags, pictures))


@pytest.mark.parametrize(
    ("update", "save_every"),
    [*((update, "3") for update in range(1, 14)), (5, "1"), (13, "1"), (8, "4"), (9, "4"), (13, "13"), (12, "100")],
)
def test_it_may_be_killed_after_any_update_however_often_it_saves(update, save_every, whole, monkeypatch):
    killed_after(update, monkeypatch, "--save_every", save_every)
    saved = update - 1 - (update - 1) % int(save_every)
    assert os.path.exists("output/a_last.pt") == (saved > 0)
    assert not saved or last_state().step == saved
    assert run("--save_every", save_every) == 0
    assert_same(outcome(), whole())


# ---- killed elsewhere than after an update ----


MOMENTS = {
    "before an evaluation": lambda patch: patch(train, "evaluate", before=True),
    "before the second evaluation": lambda patch: patch(train, "evaluate", nth=2, before=True),
    "in the middle of an evaluation": lambda patch: patch(torch.nn.functional, "cross_entropy", nth=26),
    "between an evaluation and its line": lambda patch: patch(train, "evaluate", nth=2),
    "between the line and the best weights": lambda patch: patch(Run, "save_best", before=True),
    "in the middle of the best weights": lambda patch: patch(torch, "save", nth=1, before=True),
    "between the best weights and their description": lambda patch: patch(os, "replace", nth=1),
    "between the best weights and their pictures": lambda patch: patch(train, "show_result", before=True),
    "between the pictures and the report": lambda patch: patch(train.showing, "write_report", before=True),
    "before the report takes its place": lambda patch: patch(os, "replace", nth=3, before=True),
    "between the report and the state": lambda patch: patch(Run, "save", before=True),
    "in the middle of the state": lambda patch: patch(torch, "save", nth=2, before=True),
    "before the state takes its place": lambda patch: patch(os, "replace", nth=4, before=True),
    "after the state": lambda patch: patch(Run, "save"),
    "after the last state": lambda patch: patch(Run, "save", nth=3),
    "before the last evaluation": lambda patch: patch(train, "evaluate", nth=3, before=True),
    "between two parts of an update": lambda patch: patch(torch.nn.functional, "cross_entropy", nth=15),
    "while a loss is logged": lambda patch: patch(TrainLog, "_read_losses", nth=2),
}  # fmt: skip


@pytest.mark.parametrize("moment", MOMENTS)
def test_it_may_be_killed_at_any_moment(moment, whole, monkeypatch):
    with monkeypatch.context() as context:
        MOMENTS[moment](lambda where, name, **how: context.setattr(where, name, raising(getattr(where, name), **how)))
        with pytest.raises(Killed):
            run()
    every_name_is_whole()
    assert run() == 0
    assert_same(outcome(), whole())
    files = ["a_checkpoint.bin", "a_checkpoint.json", "a_last.pt", "a_report.html"]
    assert sorted(os.listdir("output")) == files  # no temporary


def test_an_evaluation_that_was_stopped_and_then_killed_is_logged_once(whole, monkeypatch):
    """The state is of an update whose evaluation is still due; the evaluation then is killed after its line."""

    def stop_and_evaluate(real):
        def wrapper(*args):
            args[-1].number = 15
            return real(*args)

        return wrapper

    with monkeypatch.context() as context:
        context.setattr(train, "evaluate", stop_and_evaluate(train.evaluate))
        assert run() == 143
    assert (last_state().step, last_state().last_eval_step) == (5, 0)
    with monkeypatch.context() as context:
        context.setattr(Run, "save", raising(Run.save, before=True))
        with pytest.raises(Killed):
            run()
    assert lines()[-1]["step"] == 5
    assert run() == 0
    assert_same(outcome(), whole())


def test_what_killed_processes_left_half_written_is_removed(monkeypatch):
    os.makedirs("output")
    for name in ("a_checkpoint.bin", "a_checkpoint.json", "a_last.pt", "b_last.pt"):
        Path("output", f".{name}.xyz.tmp").write_bytes(b"half")
    assert run() == 0
    assert [f for f in os.listdir("output") if f.endswith(".tmp")] == [".b_last.pt.xyz.tmp"]


# ---- what --resume means ----


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


def test_going_on_needs_no_pretrained_file(whole, monkeypatch, make_npz, tmp_path):
    start = make_npz("testing", img_size=32)
    assert run("--name", "b", "--pretrained_dir", start) == 0
    killed_after(7, monkeypatch, "--pretrained_dir", start)
    os.remove(start)
    assert run("--pretrained_dir", start) == 0
    assert_same(outcome("a"), outcome("b"))


def test_none_starts_over_and_says_what_it_replaces(whole, caplog):
    assert run("--seed", "1") == 0
    caplog.clear()
    assert run("--resume", "none", "--dataset", "nowhere") == 2
    assert "replaces" not in caplog.text
    assert os.path.exists("output/a_last.pt")
    assert run("--resume", "none") == 0
    assert "--resume none: this run replaces the one that output/a_last.pt is of" in caplog.text
    assert "Moved the logs of an earlier run" in caplog.text
    assert_same(outcome(), whole())
    caplog.clear()
    assert run("--name", "new", "--resume", "none") == 0
    assert "replaces" not in caplog.text


@pytest.mark.parametrize("update", [1, 4])
def test_a_replacement_killed_before_its_first_save_is_not_taken_for_the_run_that_it_replaced(
    update, whole, monkeypatch, caplog
):
    assert run("--num_steps", "4") == 0
    killed_after(update, monkeypatch, "--resume", "none")
    assert not os.path.exists("output/a_last.pt")
    caplog.clear()
    assert run() == 0
    assert "Resumed after" not in caplog.text
    assert_same(outcome(), whole())


def test_a_replacement_that_cannot_start_leaves_the_run_it_would_have_replaced(capsys):
    assert run() == 0
    before = Path("output/a_last.pt").read_bytes()
    assert run("--resume", "none", "--pretrained_dir", "nosuch.npz") == 2
    assert run("--resume", "none", "--dataset", "nosuch") == 2
    assert Path("output/a_last.pt").read_bytes() == before


@pytest.mark.parametrize("update", [8, 12])
def test_a_path_goes_on_under_another_name_with_the_best_weights(update, whole, monkeypatch):
    killed_after(update, monkeypatch)
    shutil.copytree("output", "elsewhere")
    shutil.rmtree("output")
    assert run("--name", "b", "--resume", "elsewhere/a_last.pt") == 0
    found, expected = outcome("b"), whole()
    saved = last_state("b").step and (update // 5) * 5
    for key in ("best", "metadata", "model", "optimizer", "precision", "step", "best_accuracy", "settings"):
        assert found[key] == expected[key], key
    assert found["lines"] == [line for line in expected["lines"] if line["step"] > saved]


ALL_WRONG = EvalResult(1.0, torch.zeros(360).long(), torch.ones(360).long(), torch.ones(360))


def test_a_path_with_better_weights_than_the_rest_of_the_run_finds_keeps_them(monkeypatch):
    killed_after(7, monkeypatch)
    best = Path("output/a_checkpoint.bin").read_bytes()
    with monkeypatch.context() as context:
        context.setattr(train, "evaluate", lambda *_: ALL_WRONG)
        assert run("--name", "b", "--resume", "output/a_last.pt") == 0
    assert Path("output/b_checkpoint.bin").read_bytes() == best
    assert checkpoint.read_metadata("output/b_checkpoint.bin", checkpoint.load_weights("output/b_checkpoint.bin"))


@pytest.mark.parametrize("missing", ["output/a_checkpoint.bin", "output/a_checkpoint.json"])
def test_best_weights_that_are_gone_are_told_of_and_the_next_are_saved(missing, monkeypatch, caplog):
    killed_after(7, monkeypatch)
    os.remove(missing)
    monkeypatch.setattr(train, "evaluate", lambda *_: ALL_WRONG)
    caplog.clear()
    assert run("--name", "b", "--resume", "output/a_last.pt") == 0
    assert re.search(r"The best weights so far, of accuracy 0\.\d+, are not there", caplog.text)
    assert os.path.exists("output/b_checkpoint.bin")


def test_the_own_path_is_as_auto(whole, monkeypatch):
    killed_after(8, monkeypatch)
    assert run("--resume", "./output/a_last.pt") == 0
    assert_same(outcome(), whole())


def test_a_path_replaces_another_run_of_the_name(monkeypatch, caplog):
    killed_after(8, monkeypatch)
    assert run("--name", "b", "--seed", "1") == 0
    killed_after(6, monkeypatch, "--name", "b", "--resume", "output/a_last.pt")
    assert "--resume output/a_last.pt: this run replaces the one that output/b_last.pt is of" in caplog.text
    assert not os.path.exists("output/b_last.pt")


def test_logs_of_another_run_are_not_cut(whole, monkeypatch, caplog):
    """Two output folders share logs/<name>: a run must not go on in the other's files."""
    killed_after(8, monkeypatch)
    assert run("--output_dir", "other", "--seed", "1") == 0
    theirs = lines()
    assert run() == 0
    assert "does not hold the logs of the run up to step 5" in caplog.text
    assert [line["step"] for line in lines()] == [8, 10, 12, 13, 13]
    os.rename("logs/a", "logs/gone")
    os.rename("logs/gone/earlier-2", "logs/a")
    assert lines() == theirs


def test_more_steps_go_on_with_a_warning(monkeypatch, caplog):
    assert run() == 0
    caplog.clear()
    assert run("--num_steps", "20") == 0
    assert "--num_steps was 13 and is 20: the steps to come have the longer schedule's learning rates" in caplog.text
    assert last_state().step == 20
    assert sorted({line["step"] for line in lines()}) == [4, 5, 8, 10, 12, 13, 15, 16, 20]


DIFFERENT = {
    "--model_type": "testing-hybrid", "--pretrained_dir": "other.npz", "--img_size": "48", "--learning_rate": "0.2",
    "--weight_decay": "0.1", "--num_steps": "12", "--decay_type": "linear", "--warmup_steps": "4",
    "--max_grad_norm": "2", "--dropout": "0.3", "--gelu": "tanh", "--hflip": None, "--seed": "1", "--eval_every": "6",
    "--train_batch_size": "8", "--fp16": None, "--dataset": "pets", "--zero_head": None,
}  # fmt: skip


@pytest.fixture
def stopped(monkeypatch):
    killed_after(8, monkeypatch)
    return Path("output/a_last.pt").read_bytes()


@pytest.mark.parametrize("flag", DIFFERENT)
def test_another_setting_is_an_error_that_names_it(flag, stopped, capsys):
    write_images("pets")
    assert run(flag, *([DIFFERENT[flag]] if DIFFERENT[flag] else [])) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("train.py: error: output/a_last.pt is of a run with other settings: ")
    named = "precision" if flag == "--fp16" else flag
    others = [name for name in last_state().settings if name.split()[0] != named and f" {name} was" in error]
    assert not others, error
    assert re.search(rf" {named}( of all processes)? was .*, is ", error)
    assert Path("output/a_last.pt").read_bytes() == stopped


def test_every_difference_is_listed(stopped, capsys):
    write_images("pets")
    flags = [word for flag, value in DIFFERENT.items() for word in (flag, value) if word]
    assert run(*flags, "--loss_scale", "2") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.count(" was ") == len(last_state().settings) == len(DIFFERENT) + 1


def test_other_pictures_are_another_data_set(monkeypatch, capsys):
    write_images("pets")
    killed_after(8, monkeypatch, "--dataset", "pets")
    shutil.copy("pets/train/ant/0.png", "pets/train/ant/1.png")
    assert run("--dataset", "pets") == 2
    assert "--dataset was folder " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--gradient_accumulation_steps", "4"], "--gradient_accumulation_steps was 2, is 4"),
        (["--eval_batch_size", "30"], "--eval_batch_size was 90, is 30"),
        (["--deterministic"], "--deterministic was False, is True"),
    ],
)
def test_circumstances_warn(flags, words, stopped, caplog):
    assert run(*flags) == 0
    assert f"{words}: the last digits may differ from those of a run that was never stopped" in caplog.text


def test_a_new_run_needs_no_state(caplog):
    with caplog.at_level(logging.INFO):
        assert run() == 0
    assert "Resumed after" not in caplog.text
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING and "pretrained_dir" not in r.getMessage()]


# ---- states that are none ----


class Touch:
    """Unpickling this creates a file."""

    def __reduce__(self):
        return open, ("touched", "w")


def _edited(**changes):
    def edit(path):
        torch.save({**torch.load(path, weights_only=True), **changes}, path)

    return edit


def _flip_a_bit(path):
    data = bytearray(path.read_bytes())
    at = data.index(last_state().model["head.bias"].numpy().tobytes())
    data[at] ^= 1
    path.write_bytes(data)


DAMAGED = {
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:-1000]), "cannot be read as a training state"),
    "empty": (lambda path: path.write_bytes(b""), "cannot be read as a training state"),
    "text": (lambda path: path.write_text("hello"), "cannot be read as a training state"),
    "one bit": (_flip_a_bit, "cannot be read as a training state"),
    "malicious": (lambda path: torch.save({"format": 1, "x": Touch()}, path), "cannot be read as a training state"),
    "malicious pickle": (lambda path: path.write_bytes(pickle.dumps(Touch())), "cannot be read as a training state"),
    "weights only": (lambda path: shutil.copy("output/a_checkpoint.bin", path), "no training state of this version"),
    "a tensor": (lambda path: torch.save(torch.zeros(3), path), "no training state of this version"),
    "another version": (_edited(format=99), "no training state of this version"),
    "a field more": (_edited(more=1), "no training state of this version"),
    "a step of another kind": (_edited(step="5"), "no training state of this version"),
    "no evaluation": (_edited(best_result=3), "no training state of this version"),
    "an impossible step": (_edited(step=-1), "no training state of this version"),
    "an absurd shape": (
        _edited(model={"cls": torch.zeros(1).expand(10**6, 10**6)}), "no training state of this version",
    ),
    "no settings": (_edited(settings={}), "of a run with other settings"),
    "other weights": (_edited(model={"cls": torch.zeros(3)}), "cannot be loaded as testing"),
}  # fmt: skip


@pytest.mark.parametrize("absolute", [False, True])
def test_a_state_of_somebody_elses_cuts_no_other_files(absolute, stopped, tmp_path, caplog):
    Path("precious").write_text("precious")
    name = str(tmp_path / "precious") if absolute else "../../precious"
    _edited(log={**last_state().log, "files": {name: 0}})(Path("output/a_last.pt"))
    assert run() == 0
    assert Path("precious").read_text() == "precious"
    assert "does not hold the logs of the run up to step 5" in caplog.text


@pytest.mark.parametrize("how", ["auto", "output/a_last.pt"])
@pytest.mark.parametrize("damage", DAMAGED)
def test_a_state_that_is_none_is_one_line(damage, how, stopped, capsys):
    spoil, words = DAMAGED[damage]
    path = Path("output/a_last.pt")
    spoil(path)
    spoiled = path.read_bytes()
    assert run("--resume", how) == 2
    error = capsys.readouterr().err.splitlines()
    assert [line for line in error if "error:" in line] == error[-1:]
    assert words in error[-1]
    assert not os.path.exists("touched")
    assert path.read_bytes() == spoiled


def test_a_path_that_is_missing_is_one_line(capsys):
    assert run("--resume", "nosuch_last.pt") == 2
    assert "there is no training state nosuch_last.pt; --resume takes a <name>_last.pt" in capsys.readouterr().err


# ---- one of a name ----


def test_a_second_run_of_the_name_is_refused_while_the_first_lives(tmp_path, capsys):
    code = (
        "import sys; from utils.files import file_lock\n"
        "with file_lock(sys.argv[1]): print('held', flush=True); sys.stdin.read()"
    )
    for lock in ("output/.a.lock", "logs/a/.lock"):
        os.makedirs(os.path.dirname(lock), exist_ok=True)
        holder = subprocess.Popen(
            [sys.executable, "-c", code, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        try:
            assert holder.stdout.readline() == b"held\n"
            assert run() == 2
            assert capsys.readouterr().err.splitlines()[-1] == (
                f"train.py: error: process {holder.pid} is training under this name; "
                "wait for it, stop it, or give another --name"
            )
        finally:
            holder.kill()  # the system takes the lock away from a process that dies
            holder.communicate()
        assert os.path.exists(lock)
    assert run() == 0
    assert not os.path.exists("output/.a.lock")


@pytest.mark.parametrize("look", [1, 2])
def test_a_lock_whose_file_goes_while_it_is_looked_at_is_taken_anew(look, tmp_path, monkeypatch):
    path, real, looks = str(tmp_path / "lock"), os.stat, 0

    def stat(name, *args, **kwargs):
        nonlocal looks
        looks += name == path
        if name == path and looks == look:
            os.unlink(path)
        return real(name, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", stat)
        held = files.file_lock(path)
        held.__enter__()
    assert os.path.exists(path)
    held.__exit__(None, None, None)
    assert not os.path.exists(path)


def test_these_are_the_flags_that_decide_on_the_result():
    """A new one needs a value in ``DIFFERENT``."""
    of_precision = {"--fp16_opt_level", "--amp_dtype", "--amp_backend", "--loss_scale"}  # without effect alone
    assert {f"--{flag.name}" for flag in FLAGS if flag.decides == "result"} == set(DIFFERENT) | of_precision


def test_the_precision_of_a_run_is_all_of_its_flags():
    cpu = torch.device("cpu")
    texts = {
        str(precision.Precision(cpu, level, dtype))
        for level in precision.OPT_LEVELS[1:]
        for dtype in ("float16", "bfloat16")
    }
    assert len(texts) == 6
