"""Trainings in a process that stays: a notebook's, or another program's."""

from __future__ import annotations

import logging
import os
import random
import signal
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

import train
from tests.helpers.forked import Forked
from tests.helpers.runs import ROOT, SHORT, last_state, run
from utils.process import process_restored
from utils.signals import SIGNALS, StopSignal

pytestmark = pytest.mark.usefixtures("pets")


@pytest.fixture
def root():
    """The root logger as it is without anybody's handlers; what a test does to it is undone."""
    before = logging.root.handlers, logging.root.level
    logging.root.handlers = []
    logging.root.setLevel(logging.WARNING)
    yield logging.root
    logging.root.handlers = before[0]
    logging.root.setLevel(before[1])


def of_process():
    """Returns what a run may change of its process and another program may have chosen."""
    return {
        "signals": [signal.getsignal(number) for number in SIGNALS],
        "handlers": list(logging.root.handlers),
        "levels": [logging.getLogger(name).level for name in (None, "PIL", "train", "utils.metrics")],
        "streams": [sys.stdin, sys.stdout, sys.stderr],
        "hooks": [sys.excepthook, sys.unraisablehook],
        "filters": list(warnings.filters),
        "environment": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        "folder": os.getcwd(),
        "threads": torch.get_num_threads(),
        "tf32": [torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32],
        "tf32 of parts": [torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision],
        "attention": [
            torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(), torch.backends.cuda.cudnn_sdp_enabled(),
        ],
        "deterministic": [
            torch.get_deterministic_debug_mode(), torch.backends.cudnn.benchmark,
            torch.utils.deterministic.fill_uninitialized_memory,
        ],
        "random": [random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()],
        "type": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
    }  # fmt: skip


def change_all():
    """Sets everything that a run may set to what is not its default."""
    random.seed(3), np.random.seed(4), torch.manual_seed(5)
    torch.set_num_threads(torch.get_num_threads() + 1)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = False
    torch.set_deterministic_debug_mode("warn")
    torch.backends.cudnn.benchmark = True
    torch.utils.deterministic.fill_uninitialized_memory = not torch.utils.deterministic.fill_uninitialized_memory
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(not torch.backends.cuda.cudnn_sdp_enabled())
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    sys.excepthook = print
    warnings.simplefilter("error", ResourceWarning)


@pytest.mark.parametrize("flags", [(), ("--num_steps", "0"), ("--dataset", "none")])
def test_a_run_gives_back_what_it_changes(flags, root):
    before = of_process()
    for _ in range(2):
        code = run(*flags)
        assert code == (2 if flags else 0)
        after = of_process()
        assert [key for key in before if after[key] != before[key]] == []
    assert flags or last_state().step == 4


def test_whatever_is_changed_is_given_back():
    before = of_process()
    with process_restored():
        change_all()
        assert len([key for key in before if of_process()[key] != before[key]]) == 9
    after = of_process()
    assert [key for key in before if after[key] != before[key]] == []
    with process_restored():  # and so is what somebody else had chosen
        change_all()
        chosen = of_process()
        with process_restored():
            torch.set_float32_matmul_precision("highest")
            torch.backends.cudnn.allow_tf32 = True
            torch.use_deterministic_algorithms(True)
        after = of_process()
        assert [key for key in chosen if after[key] != chosen[key]] == []


def test_precision_that_was_set_by_the_newer_interface_stays_too():
    with process_restored():
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert run("--num_steps", "1", "--warmup_steps", "0") == 0
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"


@pytest.mark.parametrize("streams", [["stderr"], ["stdout"], ["stdout", "stderr"], []])
@pytest.mark.parametrize("level", [logging.NOTSET, logging.WARNING])
def test_accuracy_is_shown_once_a_line_whoever_set_logging_up(streams, level, root, capsys):
    """Colab's root logger has a handler, and takes warnings only."""
    for stream in streams:
        handler = logging.StreamHandler(getattr(sys, stream))
        handler.setLevel(level)
        root.addHandler(handler)
    assert run() == 0
    shown = capsys.readouterr()
    assert (shown.err.count("Valid Accuracy: "), shown.err.count("Best Accuracy: ")) == (2, 1)
    assert shown.out == ""
    assert all("Accuracy: " not in line or " - INFO - train - " in line for line in shown.err.splitlines())


def test_a_file_that_the_caller_logs_to_has_the_lines_too(root, capsys, tmp_path):
    handler = logging.FileHandler(tmp_path / "mine.log")
    root.addHandler(handler)
    assert run() == 0
    handler.close()
    assert (tmp_path / "mine.log").read_text().count("Valid Accuracy: ") == 2
    assert capsys.readouterr().err.count("Valid Accuracy: ") == 2


def train_stop_and_train_again(argv):
    """Calls train.main twice, and stops it the first time, as a notebook's button does; then presses that once more."""
    codes, real = [], StopSignal.any_rank

    def any_rank(stop):
        codes.append("step")
        if codes == ["step"]:
            os.kill(os.getpid(), signal.SIGINT)
        return real(stop)

    StopSignal.any_rank = any_rank
    codes += [train.main(argv)]
    codes += [train.main(argv)]
    try:
        os.kill(os.getpid(), signal.SIGINT)
        signal.pause()
    except KeyboardInterrupt:
        codes.append("interrupted")
    print([code for code in codes if code != "step"])
    return 0


def test_stop_saves_and_leaves_the_notebooks_process_as_it_was():
    with Forked(["tests.test_notebook", *SHORT]) as child:
        assert child.wait() == 0, child.stderr()
        assert child.stdout() == "[130, 0, 'interrupted']\n"
        assert "stopped after step 1; " in child.stderr()
    assert last_state().step == 4


#: What ``Forked`` calls of this module.
main = train_stop_and_train_again

SHELL = """
import runpy, signal, sys, os
sys.ps1 = "In "  # as IPython and Python's own prompt have it
sys.argv = ["train.py", *sys.argv[1:]]
sys.path[0] = {folder!r}
try:
    runpy.run_path({program!r}, run_name="__main__")
except SystemExit as e:
    print("exit code", e.code)
try:
    os.kill(os.getpid(), signal.SIGINT)
    signal.pause()
except KeyboardInterrupt:
    print("still there")
"""


def test_a_shell_of_commands_outlives_the_program_that_it_runs():
    """As IPython's %run does it."""
    words = [sys.executable, "-c", SHELL.format(program=str(ROOT / "train.py"), folder=str(ROOT)), *SHORT]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    usual = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, env=env, preexec_fn=usual)
    assert (done.returncode, done.stdout) == (0, "exit code 0\nstill there\n"), done.stderr
    assert done.stderr.count("Valid Accuracy: ") == 2
