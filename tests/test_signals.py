"""Signals that stop a run: the step in hand is finished and saved; a second one ends it at once, files whole."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from signal import SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGUSR2

import pytest

from tests.helpers.boundaries import Watch, signalled_at
from tests.helpers.forked import Forked
from tests.helpers.runs import (
    ROOT,
    SHORT,
    assert_same,
    every_name_is_whole,
    last_state,
    outcome,
    run,
    several_sizes,
    undisturbed,
    write_images,
)
from utils.signals import SIGNALS

pytestmark = pytest.mark.usefixtures("pets")


def resumes_as_if_undisturbed():
    assert [f for f in os.listdir("output") if f.endswith((".tmp", ".lock"))] == []
    assert run() == 0
    assert_same(outcome(), undisturbed())


@pytest.mark.parametrize(
    ("boundary", "number", "step", "last_eval_step"),
    [
        ("start: forward", SIGTERM, 1, 0),
        ("start: forward #2", SIGINT, 1, 0),  # between two micro-batches
        ("after step 2: step begins", SIGTERM, 2, 0),  # its evaluation is left to the resumed run
        ("after step 2: forward", SIGINT, 2, 0),  # in the evaluation
        ("after step 2: save a_checkpoint.bin.tmp", SIGTERM, 2, 2),
        ("after step 2: save a_last.pt.tmp", SIGINT, 3, 2),
        ("after step 3: step ends", SIGTERM, 3, 2),
        ("after step 4: step begins", SIGINT, 4, 2),
        ("after step 4: save a_last.pt.tmp", SIGTERM, 4, 4),  # nothing is left to stop
        ("after step 3: step ends", SIGHUP, 3, 2),
        ("after step 2: forward", SIGUSR1, 2, 0),
        ("start: forward", SIGUSR2, 1, 0),
    ],
)
def test_one_finishes_the_step_and_saves(boundary, number, step, last_eval_step):
    code, error = signalled_at(boundary, number)
    assert code == (0 if last_eval_step == 4 else 128 + number)
    assert (last_state().step, last_state().last_eval_step) == (step, last_eval_step)
    assert f"{number.name}: finishing" in error
    assert code == 0 or f"train.py: error: stopped after step {step}; rerun the same" in error.splitlines()[-1]
    resumes_as_if_undisturbed()


@pytest.mark.parametrize(
    ("boundary", "number"),
    [
        ("after step 3: step begins", SIGINT),
        ("after step 4: forward", SIGTERM),  # in the evaluation
        ("after step 4: save a_checkpoint.bin.tmp", SIGINT),
        ("after step 4: save a_last.pt.tmp", SIGTERM),
        ("after step 3: step begins", SIGUSR1),
        ("after step 3: step begins", SIGUSR2),
    ],
)
def test_two_stop_at_once_and_leave_the_last_state_whole(boundary, number):
    code, error = signalled_at(boundary, number, times=2)
    assert code == 128 + number
    assert error.splitlines()[-1] == f"train.py: error: stopped by {number.name} at once"
    assert last_state().step == 2
    resumes_as_if_undisturbed()


def test_a_closing_terminal_may_send_several_and_none_of_them_counts_as_the_second():
    """A shell sends one to its jobs, and the kernel another when the shell has gone; logind sends one after SIGTERM."""
    assert signalled_at("after step 3: step begins", SIGHUP, times=3)[0] == 128 + SIGHUP
    assert last_state().step == 3
    for boundary, expected in (("start: forward", SIGTERM), ("after step 1: step ends", SIGUSR1)):
        with both_at(boundary, expected) as child:
            assert child.wait() == 128 + expected, child.stderr()
            assert "stopped after step 1; " in child.stderr()


@contextlib.contextmanager
def both_at(boundary, number):
    """Gives a new run that gets SIGHUP and another signal at once."""

    def reached(name):
        if name == boundary:
            signal.pthread_sigmask(signal.SIG_BLOCK, (SIGHUP, number))
            for each in (SIGHUP, number, SIGHUP):
                os.kill(os.getpid(), each)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, (SIGHUP, number))

    with Forked(["train.py", *SHORT, "--resume", "none"], prepare=lambda: Watch(reached)) as child:
        yield child


@pytest.mark.parametrize("number", SIGNALS)
def test_one_that_is_ignored_from_the_start_stays_so(number):
    """``nohup`` ignores SIGHUP, a shell SIGINT of its background jobs, ``trap ''`` any."""

    def prepare():
        signal.signal(number, signal.SIG_IGN)
        Watch(lambda name: os.kill(os.getpid(), number))

    with Forked(["train.py", *SHORT], prepare=prepare) as child:
        assert child.wait() == 0, child.stderr()
    assert last_state().step == 4


def test_the_message_names_the_flag_where_the_command_would_start_over():
    code, error = signalled_at("after step 1: step ends", SIGINT, "--resume", "none")
    assert code == 130
    assert "--resume auto" in error.splitlines()[-1]


def test_ctrl_c_before_the_training_and_in_an_evaluation_only_is_one_line():
    assert run("--num_steps", "1", "--warmup_steps", "0") == 0
    for boundary, flags in (("start: open .a.lock", ("--resume", "none")), ("start: forward", ("-v",))):
        code, error = signalled_at(boundary, SIGINT, *flags)
        assert (code, error.splitlines()[-1]) == (130, "train.py: error: interrupted")
        assert "Traceback" not in error


# ---- to a process group, and with workers ----


@contextlib.contextmanager
def training_with_workers():
    """Gives a run in a process group of its own, once it has written a line of metrics."""
    write_images("sizes", several_sizes(), per_class=12)
    flags = ("--dataset", "sizes", "--num_steps", "100000", "--eval_every", "100000", "--log_every", "1")
    with Forked(["train.py", *SHORT, *flags, "--num_workers", "2"]) as child:
        deadline = time.monotonic() + 90
        while not (Path("logs/a/metrics.jsonl").exists() and Path("logs/a/metrics.jsonl").stat().st_size):
            assert child.poll() is None, child.stderr()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert len(members(child.pid)) >= 3
        yield child


def members(group):
    """Returns the processes of a group, but those that have ended and wait for their parent to notice."""
    pids = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            state, _, its_group = path.read_text().rpartition(")")[2].split()[:3]
            pids += [path.parent.name] if int(its_group) == group and state != "Z" else []
    return pids


def nobody_is_left(group, secs):
    """Tells whether every process of the group has ended after so many seconds."""
    looks = (time.sleep(0.05) or members(group) for _ in range(20 * secs))  # not by the clock: the machine may sleep
    return not all(looks)


@pytest.mark.parametrize(("number", "times"), [*((n, 1) for n in SIGNALS), (SIGINT, 2)])
def test_signals_to_every_process_of_a_run_with_workers(number, times):
    """As a terminal's Ctrl-C and many a scheduler's SIGTERM come."""
    with training_with_workers() as child:
        for _ in range(times):
            os.killpg(child.pid, number)
            time.sleep(0.02)
        # The second may come when nothing of Python is left, and do what it does by itself: a shell says the same.
        assert child.wait() in (128 + number, -number if times == 2 else 128 + number), child.stderr()
        assert "Traceback" not in child.stderr()
        every_name_is_whole()
        if times == 1:
            assert f"stopped after step {last_state().step}; " in child.stderr()
        assert nobody_is_left(child.pid, 10)


def test_workers_outlive_signals_while_they_start():
    def get_all():
        for number in SIGNALS:
            os.kill(os.getpid(), number)

    write_images("sizes", several_sizes())
    flags = ("--dataset", "sizes", "--num_workers", "2")
    with Forked(["train.py", *SHORT, *flags], prepare=lambda: os.register_at_fork(after_in_child=get_all)) as child:
        assert child.wait() == 0, child.stderr()


def test_no_worker_outlives_a_run_that_is_killed():
    """Left to PyTorch it looks for its parent every five seconds, and a pipe from the run stays open so long."""
    with training_with_workers() as child:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        assert nobody_is_left(child.pid, 4)


def test_a_signal_while_python_tidies_up_shows_no_stack():
    code = (
        "import atexit, os, signal, time\n"
        "from utils.signals import leave\n"
        "atexit.register(time.sleep, 30)\n"
        "atexit.register(os.kill, os.getpid(), signal.SIGINT)\n"
        "leave(7)"
    )
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (done.returncode, done.stderr) == (7, "")
    assert time.monotonic() - begin < 30
