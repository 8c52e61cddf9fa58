"""The forked children that tests run programs in: they must be what a fresh process would be."""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.helpers.forked import Forked, holding, run_forked
from tests.helpers.runs import RUN
from utils import files
from utils.errors import UserError

LONG = ["train.py", *RUN, "--num_steps", "100000", "--warmup_steps", "1"]


def test_a_training_logs_and_ends_as_in_a_process_of_its_own(tmp_path):
    code, out, err = run_forked(["train.py", *RUN, "--num_steps", "1", "--warmup_steps", "0"], cwd=tmp_path)
    assert (code, out) == (0, "")
    assert " - INFO - train - Valid Accuracy: " in err
    assert (tmp_path / "output" / "a_checkpoint.bin").exists()
    assert os.getcwd() != str(tmp_path)


def test_what_ends_a_program_is_its_exit_code(tmp_path):
    assert run_forked(["tools.predict", "--help"])[:1] == (0,)
    code, out, err = run_forked(["tools.predict", "nosuch.bin", "a.png"], cwd=tmp_path)
    assert (code, out) == (2, "")
    assert err.startswith("tools.predict: error: ")
    code, _, err = run_forked(["tools.predict", "--turbo"])
    assert (code, err.count("\n")) == (2, 1)

    def bug():
        raise KeyError("bug")

    code, _, err = run_forked(["train.py"], prepare=bug)
    assert (code, err.splitlines()[0]) == (1, "Traceback (most recent call last):")


def test_the_environment_is_the_child_s_own(monkeypatch):
    monkeypatch.setenv("GONE", "1")

    def show():
        print(os.environ.get("GONE"), os.environ["NEW"])
        os._exit(7) if os.environ["NEW"] != "2" else None

    code, out, _ = run_forked(["train.py", "--help"], env={"GONE": None, "NEW": "2"}, prepare=show)
    assert (code, out.splitlines()[0]) == (0, "None 2")
    assert "NEW" not in os.environ


def test_a_lock_is_held_by_another_process(tmp_path):
    with holding(tmp_path / "x.lock") as pid:
        assert (tmp_path / "x.lock").read_text() == f"{pid}\n"
        with pytest.raises(UserError, match=f"{pid} is busy"), files.file_lock(str(tmp_path / "x.lock"), "busy"):
            pass
    with files.file_lock(str(tmp_path / "x.lock"), "busy"):
        pass


def test_signals_reach_it(tmp_path):
    with Forked(LONG, cwd=tmp_path) as child:
        child.wait_for("Running training")
        time.sleep(0.3)
        os.kill(child.pid, signal.SIGTERM)
        assert child.wait() == 143
    assert (tmp_path / "output" / "a_last.pt").exists()
    with Forked(LONG, cwd=tmp_path) as child:
        child.wait_for("Running training")
        os.kill(child.pid, signal.SIGKILL)
        assert child.wait() == -9


def test_one_that_takes_too_long_says_where_it_is_and_is_ended(tmp_path):
    with pytest.raises(TimeoutError, match="most recent call first"), Forked(LONG, cwd=tmp_path) as child:
        child.wait(timeout=0.5)
    with pytest.raises(ProcessLookupError):
        os.kill(child.pid, 0)
