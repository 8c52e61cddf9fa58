"""The training's progress as it is shown: a bar on a terminal, plain lines elsewhere."""

import contextlib

import pytest
import torch

from utils import console, log_files, metrics
from utils.metrics import TrainLog

DONE, SKIPPED = torch.tensor(True), torch.tensor(False)


@pytest.fixture
def make_log(tmp_path):
    """``make_log(num_steps, log_every)`` opens the log of a run of 8 images a step."""
    with contextlib.ExitStack() as stack:
        yield lambda num_steps=7, log_every=3: stack.enter_context(TrainLog(str(tmp_path), num_steps, 8, log_every))


@pytest.mark.parametrize("terminal", [True, False])
def test_only_the_main_process_shows_progress(capsys, caplog, monkeypatch, tmp_path, terminal):
    caplog.set_level("INFO")
    monkeypatch.setattr(console, "on_terminal", lambda: terminal)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for enabled in (False, True):
        monkeypatch.setenv("RANK", "0" if enabled else "1")
        with TrainLog(str(tmp_path), 2, 8, 1) as log:
            for step in (1, 2):
                log.step(step, torch.tensor(0.25), 0.1, DONE)
        shown = capsys.readouterr().err
        assert ("Training" in shown) == (enabled and terminal)
        assert ("Training" in caplog.text) == (enabled and not terminal)
    assert "2/2 steps" in (shown if terminal else caplog.text)
    assert "loss=0.2500" in (shown if terminal else caplog.text)


def progress(caplog):
    """Returns the lines of progress, without what they begin with."""
    return [m.removeprefix("Training: ") for m in caplog.messages if m.startswith("Training: ")]


def test_without_a_terminal_a_line_comes_every_ten_seconds(make_log, tmp_path, clock, caplog):
    caplog.set_level("INFO")
    log = make_log(num_steps=35, log_every=4)
    for step in range(1, 36):
        clock.now += 1
        log.step(step, torch.tensor(float(step)), 0.1, DONE)
    assert progress(caplog) == [
        "1/35 steps, loss=1.0000, 8.0 images/s, 34 s left of 35 s",
        "11/35 steps, loss=10.0000, 8.0 images/s, 24 s left of 35 s",  # of the three since the last line of the files
        "21/35 steps, loss=21.0000, 8.0 images/s, 14 s left of 35 s",
        "31/35 steps, loss=30.0000, 8.0 images/s, 4 s left of 35 s",
        "35/35 steps, loss=34.0000, 8.0 images/s, 0 s left of 35 s",
    ]
    assert [line["step"] for line in log_files.read_lines(str(tmp_path))] == [4, 8, 12, 16, 20, 24, 28, 32, 35]
    assert [line["train/loss"] for line in log_files.read_lines(str(tmp_path))][:3] == [2.5, 6.5, 10.5]


def test_slow_steps_have_a_line_each_and_evaluations_take_no_time_of_theirs(make_log, clock, caplog):
    caplog.set_level("INFO")
    log = make_log(num_steps=4, log_every=100)
    for step in range(1, 5):
        clock.now += 3600
        log.step(step, torch.tensor(2.0), 0.1, SKIPPED if step == 3 else DONE)
        with log.paused():
            clock.now += 1e6
    assert [text for text in progress(caplog) if "loss=2.0000, 0.0 images/s" not in text] == []
    assert [text.split(", ")[-1].partition(" left")[0] for text in progress(caplog)] == ["3 h", "2 h", "1 h", "0 s"]


def test_with_more_ranks_only_lines_of_the_files_have_a_loss(make_log, clock, caplog, monkeypatch):
    """The mean takes all of them."""
    caplog.set_level("INFO")
    monkeypatch.setattr(metrics.dist_util, "world_size", lambda: 2)
    log = make_log(num_steps=3, log_every=2)
    for step in range(1, 4):
        clock.now += 20
        log.step(step, torch.tensor(2.0), 0.1, DONE)
    assert [("loss=" in text, "images/s" in text) for text in progress(caplog)] == [
        (False, True),
        (True, True),
        (True, True),
    ]
