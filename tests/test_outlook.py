"""The time that a run takes: told after the first steps and at every line, and near what it then takes."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
import torch

import train
from tests.helpers.boundaries import killed_at
from tests.helpers.clock import Clock
from tests.helpers.runs import SHORT, run
from utils import outlook
from utils.evaluation import EvalResult
from utils.metrics import TrainLog
from utils.outlook import Outlook

RESULT = EvalResult(1.0, torch.zeros(2).long(), torch.zeros(2).long(), torch.ones(2))


@pytest.mark.parametrize(
    ("secs", "words"),
    [(0, "0 s"), (0.25, "0.25 s"), (45, "45 s"), (60, "1 min"), (725, "12 min 5 s"), (3600, "1 h"),
     (12000, "3 h 20 min"), (360000, "100 h")],
)  # fmt: skip
def test_a_time_in_words(secs, words):
    assert outlook.duration(secs) == words


def trained(log: TrainLog, clock: Clock, steps: range, first_secs: float = 30.0) -> None:
    """Does steps of a second, but for the first, and an evaluation of 20 s with a save of 5 s after each tenth."""
    for step in steps:
        clock.now += first_secs if step == steps[0] else 1
        log.step(step, torch.tensor(1.0), 0.1, torch.tensor(True))
        if step % 10 == 0:
            with log.paused():
                clock.now += 20
                log.evaluation(step, RESULT, 20.0)
            with log.paused():
                clock.now += 5


def told(caplog) -> list[str]:
    return [text for text in caplog.messages if text.startswith("About ")]


def test_before_the_first_evaluation_it_takes_a_third_of_the_steps_time_an_image(tmp_path, clock, caplog):
    caplog.set_level("INFO")
    # 100 steps of 8 images, 10 evaluations of 240: of 10 s each.
    with TrainLog(str(tmp_path), 100, 8, 5, Outlook(100, 10, 240 / 8)) as log:
        trained(log, clock, range(1, 5), first_secs=4)
        assert not told(caplog)
        trained(log, clock, range(5, 6), first_secs=1)
    assert told(caplog) == [
        "About 3 min 23 s for the whole run, evaluations included: 100 steps of 1 s, 10 evaluations of 10 s"
    ]


def test_afterwards_evaluations_take_what_they_took_with_what_is_saved(tmp_path, clock, caplog):
    caplog.set_level("INFO")
    with TrainLog(str(tmp_path), 35, 8, 1, ahead := Outlook(35, 10, 1.0)) as log:
        trained(log, clock, range(1, 21))
        trained(log, clock, range(21, 26), first_secs=1)
        assert ahead.left_secs == pytest.approx(10 + 2 * 25)  # those after steps 30 and 35
        assert ahead.whole_secs == pytest.approx(30 + 34 + 4 * 25)
        assert ahead.text() == "1 min left of 2 min 44 s"
        trained(log, clock, range(26, 36), first_secs=1)
        assert ahead.left_secs == pytest.approx(25)  # the last one is still to come
    assert "25 s left of 2 min 44 s" in caplog.text


def test_slow_steps_are_told_of_before_the_first_line_but_not_by_the_first(tmp_path, clock, caplog):
    caplog.set_level("INFO")
    with TrainLog(str(tmp_path), 1000, 8, 100, Outlook(1000, 1000, 0.0)) as log:
        for step, secs in ((1, 60), (2, 6), (3, 6)):  # torch.compile takes its time
            assert not told(caplog)
            clock.now += secs
            log.step(step, torch.tensor(1.0), 0.1, torch.tensor(True))
    (words,) = told(caplog)
    assert ": 1000 steps of 6 s, " in words


def test_a_resumed_run_counts_what_it_took_before_and_its_speed_now(tmp_path, clock, caplog):
    caplog.set_level("INFO")
    state = {"losses": [], "applied": [], "secs": 500.0, "eval_secs": 100.0}
    log = TrainLog(str(tmp_path), 100, 8, 5, Outlook(100, 10, 0.0))
    log.load_state_dict(state, 50, torch.device("cpu"), own_files=False, num_ranks=1)
    with log:
        trained(log, clock, range(51, 56), first_secs=4)
    assert told(caplog) == ["About 10 min 53 s for the whole run, 45 s from here on, evaluations included: "
                            "100 steps of 1 s, 10 evaluations of 0 s"]  # fmt: skip


# ---- real runs ----


@pytest.mark.usefixtures("pets")
def test_a_real_run_takes_about_what_it_said_after_the_first_steps(monkeypatch, caplog):
    caplog.set_level("INFO")
    compute, evaluate = train.forward_backward, train.evaluate
    monkeypatch.setattr(train, "forward_backward", lambda *args: (time.sleep(0.03), compute(*args))[1])
    # 8 test images, as many as half a step's: a sixth of 30 ms.
    monkeypatch.setattr(train, "evaluate", lambda *args: (time.sleep(0.005), evaluate(*args))[1])
    flags = ["--num_steps", "60", "--eval_every", "10", "--save_every", "60"]
    for _ in range(3):  # the machine has other work
        caplog.clear()
        assert run(*flags, "--resume", "none") == 0
        (words,) = told(caplog)
        said = re.match(
            r"About (?:(\d+) min ?)?(?:([\d.]+) s)? for the whole run, .*: 60 steps .*, 6 evaluations", words
        )
        assert said
        secs = 60 * int(said[1] or 0) + float(said[2] or 0)
        last = json.loads(Path("logs/a/metrics.jsonl").read_text().splitlines()[-1])
        took = last["secs"] + last["eval_secs"]
        if took / 1.5 < secs < took * 1.5:
            return
    pytest.fail(f"{words}: it took {took} s")


@pytest.mark.usefixtures("pets")
def test_seconds_in_the_log_are_sums_over_all_starts():
    killed_at("after step 3: step ends", "--log_every", "1")
    state = torch.load("output/a_last.pt", weights_only=True)
    state["log"] |= {"secs": 1000.0, "eval_secs": 500.0}
    torch.save(state, "output/a_last.pt")
    assert train.main([*SHORT, "--log_every", "1"]) == 0
    lines = [json.loads(line) for line in Path("logs/a/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 2, 3, 4, 4]
    assert [line["secs"] > 1000 for line in lines] == [False] * 3 + [True] * 3
    assert lines[-1]["eval_secs"] > 500
