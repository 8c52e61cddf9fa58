"""Ctrl-C and SIGTERM: the update in hand is finished and saved; a second one ends the run at once, files whole."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train
from tests.helpers.runs import (
    ROOT,
    RUN,
    assert_same,
    every_name_is_whole,
    last_state,
    outcome,
    run,
    several_sizes,
    undisturbed,
)
from tests.helpers.runs import write_images as write
from utils import checkpoint
from utils.metrics import TrainingLog

SIGNALS = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])


@pytest.fixture(autouse=True)
def _folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def signalled(monkeypatch, where, name, number, nth=1, times=1, flags=()):
    """The status of a run that gets a signal when a function begins for the n-th time."""
    real, calls = getattr(where, name), 0

    def wrapper(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == nth:
            for _ in range(times):
                os.kill(os.getpid(), number)
                time.sleep(0.01)  # signals of one number do not queue
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(where, name, wrapper)
        status = run(*flags)
    every_name_is_whole()
    return status


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What the run leaves that nobody stops."""
    return undisturbed(tmp_path_factory.mktemp("whole"))


@SIGNALS
@pytest.mark.parametrize("update", [1, 5, 7, 12])
def test_one_finishes_the_update_and_saves(number, update, monkeypatch, whole, capfd):
    assert signalled(monkeypatch, TrainingLog, "update", number, nth=update) == 128 + number
    assert last_state().step == update
    error = capfd.readouterr().err
    assert f"{number.name}: finishing the update in hand and saving; once more stops at once" in error
    assert error.splitlines()[-1] == (
        f"train.py: error: stopped after update {update}; the same command goes on from there"
    )
    assert run() == 0
    assert_same(outcome(), whole)


def test_one_between_two_parts_of_an_update_finishes_it(monkeypatch, whole):
    # Calls 1 to 10 are the parts of five updates, 11 to 14 their evaluation, 15 and 16 the parts of update 6.
    assert signalled(monkeypatch, torch.nn.functional, "cross_entropy", signal.SIGTERM, nth=15) == 143
    assert last_state().step == 6
    assert run() == 0
    assert_same(outcome(), whole)


def test_one_in_an_evaluation_leaves_it_and_saves(monkeypatch, whole):
    assert signalled(monkeypatch, torch.nn.functional, "cross_entropy", signal.SIGTERM, nth=12) == 143
    assert (last_state().step, last_state().evaluated) == (5, 0)
    assert run() == 0
    assert_same(outcome(), whole)


@pytest.mark.parametrize("save", [1, 2, 3])
def test_one_in_a_save_lets_it_end(save, monkeypatch, whole):
    last = save == 3
    status = signalled(monkeypatch, checkpoint, "save_state", signal.SIGINT, nth=save)
    assert status == (0 if last else 130)  # after the last save nothing is left to do
    assert last_state().step == (13 if last else 5 * save + 1)
    assert run() == 0
    assert_same(outcome(), whole)


@SIGNALS
@pytest.mark.parametrize("where", ["update", "evaluation", "best weights", "state"])
def test_two_stop_at_once_and_leave_the_last_state_whole(number, where, monkeypatch, whole, capfd):
    target = {
        "update": (TrainingLog, "update", 7),
        "evaluation": (torch.nn.functional, "cross_entropy", 26),
        "best weights": (torch, "save", 3),
        "state": (torch, "save", 4),
    }[where]
    begin = time.monotonic()
    assert signalled(monkeypatch, *target[:2], number, nth=target[2], times=2) == 128 + number
    assert time.monotonic() - begin < 20
    assert capfd.readouterr().err.splitlines()[-1] == f"train.py: error: stopped by {number.name} at once"
    assert last_state().step == 5
    assert not [f for f in os.listdir("output") if f.endswith(".tmp")]
    assert run() == 0
    assert_same(outcome(), whole)


def test_the_message_names_the_flag_where_the_command_would_start_over(monkeypatch, capfd):
    assert signalled(monkeypatch, TrainingLog, "update", signal.SIGINT, flags=("--resume", "none")) == 130
    assert "the same command, but with --resume auto, goes on from there" in capfd.readouterr().err


@pytest.fixture
def started(tmp_path):
    """``started(*flags)`` begins train.py in a process group of its own, and waits for a line of metrics."""
    processes = []

    def start(*flags):
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *RUN, "--num_steps", "100000", "--log_every", "1", *flags],
            stderr=subprocess.PIPE, text=True, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )  # fmt: skip
        processes.append(process)
        end = time.monotonic() + 90
        while not (Path("logs/a/metrics.jsonl").exists() and Path("logs/a/metrics.jsonl").stat().st_size):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < end
            time.sleep(0.02)
        return process

    yield start
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def members(group):
    """The processes of a group, but those that have ended and wait for their parent to notice."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            state, _, its_group = path.read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state != "Z":
                found.append(path.parent.name)
    return found


def nobody_is_left(group, secs):
    """Fails unless every process of the group has ended after so many seconds."""
    for _ in range(20 * secs):  # not by the clock: the machine may have slept
        if not members(group):
            return
        time.sleep(0.05)
    pytest.fail(f"there still are processes after {secs} s")


WITH_WORKERS = ["--dataset", "pets", "--num_workers", "2", "--eval_every", "100000"]


@SIGNALS
@pytest.mark.parametrize("times", [1, 2])
def test_signals_to_every_process_of_a_run_with_workers(number, times, started):
    """As a terminal's Ctrl-C and many a scheduler's SIGTERM come."""
    write("pets", several_sizes(), per_class=12)
    process = started(*WITH_WORKERS)
    for _ in range(times):
        os.killpg(process.pid, number)
        time.sleep(0.02)
    _, error = process.communicate(timeout=60)
    # The second may come when nothing of Python is left, and do what it does by itself: a shell says the same.
    assert process.returncode in (128 + number, -number if times == 2 else 128 + number), error
    assert "Traceback" not in error
    every_name_is_whole()
    if times == 1:
        assert f"stopped after update {last_state().step}; " in error
    nobody_is_left(process.pid, 10)


def test_no_worker_outlives_a_run_that_is_killed(started):
    """Left to PyTorch it looks for its parent every five seconds, and a pipe from the run stays open so long."""
    write("pets", several_sizes(), per_class=12)
    process = started(*WITH_WORKERS)
    process.kill()
    process.wait()
    nobody_is_left(process.pid, 4)


def test_a_signal_while_python_tidies_up_shows_no_stack(tmp_path):
    code = (
        "import atexit, os, signal, time\n"
        "from utils.runs import leave\n"
        "atexit.register(time.sleep, 30)\n"
        "atexit.register(os.kill, os.getpid(), signal.SIGINT)\n"
        "leave(7)"
    )
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (done.returncode, done.stderr) == (7, "")
    assert time.monotonic() - begin < 30


def test_an_evaluation_only_is_interrupted_in_one_line(monkeypatch, capfd):
    assert run("--num_steps", "1", "--warmup_steps", "0") == 0
    monkeypatch.setattr(train, "report", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    assert train.main([*RUN[:14], "-v"]) == 130
    assert capfd.readouterr().err.splitlines()[-1] == "train.py: error: interrupted"
