"""Ranks and machines that die, hang, leave and join: the run resumes, or ends with a word within a bounded time."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from typing import Any

import pytest
import torch

from models.configs import CONFIGS
from tests.helpers import fake_npz, paced
from tests.helpers.launching import (
    PACED,
    RESUMED,
    TINY,
    job,
    lines_of,
    ranks,
    real_torchrun,
    set_pace,
    steps_done,
    torchrun,
    values_of,
    wait_for,
    weights_of,
)
from utils import dist_errors
from utils.batch import Batch
from utils.run import Run

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="finds the processes to hurt in /proc")

STEPS = 40
RUN = [*TINY, "--name", "a", "--num_steps", str(STEPS), "--warmup_steps", "2", "--eval_every", "20"]
RUN += ["--save_every", "5"]
#: The forked one differs from the real one in how its ranks start, which takes most of the time.
LAUNCHERS = pytest.mark.parametrize("launcher", [torchrun, pytest.param(real_torchrun, marks=pytest.mark.soak)])


def weights_in(folder):
    """Flags that name a file of weights in this folder, the same in all."""
    os.makedirs(folder, exist_ok=True)
    return ["--pretrained_dir", fake_npz.save(f"{folder}/a.npz", fake_npz.arrays(CONFIGS["testing"], 32))]


@pytest.fixture(scope="module")
def unhurt(tmp_path_factory):
    """The folder of the run that nobody hurt, by its number of ranks; 16 images a step.

    One rank starts from ``weights_in``, two from random weights.
    """
    folders = {}
    for number in (1, 2):
        folder = folders[number] = tmp_path_factory.mktemp(f"unhurt{number}")
        weights = weights_in(folder) if number == 1 else []
        with ranks(folder, [[*RUN, "--train_batch_size", str(16 // number), *weights]] * number) as run:
            assert run.results() == [0] * number, run.output()
    return folders


def assert_whole(folder, of_unhurt):
    """One line a step, none twice, although some steps were done twice; and the weights, bit for bit."""
    assert [line["step"] for line in lines_of(folder, "a") if "train/loss" in line] == list(range(1, STEPS + 1))
    if of_unhurt:
        ours, expected = weights_of(folder, "a"), weights_of(of_unhurt, "a")
        assert ours.keys() == expected.keys()
        assert all(torch.equal(x, expected[name]) for name, x in ours.items())


@LAUNCHERS
def test_after_a_killed_rank_torchrun_brings_the_same_weights(launcher, unhurt, tmp_path):
    flags = ["--standalone", "--nproc_per_node=2", "--max-restarts=3", PACED, *RUN, "--train_batch_size", "8"]
    with job(launcher, (flags,), tmp_path, **set_pace(tmp_path, 12)) as run:
        wait_for(lambda: steps_done(tmp_path, "a") >= 12, 60, run.output)
        os.kill(int((tmp_path / "pid1").read_text()), signal.SIGKILL)
        set_pace(tmp_path, STEPS)
        assert run.wait(60) == 0, run.output()
        assert run.output().count("lost contact with rank 1 (") == 1
        assert RESUMED in run.output()
        if launcher is real_torchrun:  # else torchrun logs where it noticed the death
            assert "Traceback" not in run.output()
    assert_whole(tmp_path, unhurt[2])


@LAUNCHERS
def test_machines_that_join_and_leave_keep_the_batch_of_all(launcher, unhurt, tmp_path):
    """One machine begins alone with 16 images a step, shares them with a second, and resumes without it.

    Each has the weights under a path of its own.
    """
    # The rendezvous is kept here: neither machine is the one that may not die.
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    flags = ["--nnodes=1:2", "--nproc_per_node=1", "--max-restarts=3", "--rdzv-backend=c10d", "--rdzv-id=test"]
    flags += [f"--rdzv-endpoint=127.0.0.1:{store.port}", "--local-addr=127.0.0.1"]
    # The launchers look for one another once a second or two: whoever is there first waits as long, and
    # if the second comes later still, it joins another round.
    flags += ["--rdzv-conf=is_host=false,last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=3"]
    flags += [PACED, *RUN, "--train_batch_size", "16"]
    # Else (PyTorch 2.14) the agent that was the first before the other came stays with its own store.
    env = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", **set_pace(tmp_path, 3)}
    with contextlib.ExitStack() as held:
        first = held.enter_context(job(launcher, ([*flags, *weights_in(tmp_path)],), tmp_path, "first", **env))
        wait_for(lambda: steps_done(tmp_path, "a") >= 3, 60, first.output)
        own = weights_in(tmp_path / "second")
        second = held.enter_context(job(launcher, ([*flags, *own],), tmp_path, "second", **env))
        both = lambda: first.output() + second.output()  # noqa: E731
        shared = "--train_batch_size 8 --gradient_accumulation_steps 1: "
        wait_for(lambda: shared in both(), 60, both)
        before = steps_done(tmp_path, "a")
        set_pace(tmp_path, 9)
        wait_for(lambda: steps_done(tmp_path, "a") > before + 6, 60, both)
        assert steps_done(tmp_path, "a") < STEPS
        second.kill()
        set_pace(tmp_path, STEPS)
        assert first.wait(60) == 0, both()
        assert both().count(shared) == 1
        assert both().count(RESUMED) >= 2  # with the second, and without it
    assert_whole(tmp_path, None)
    assert values_of(tmp_path, "a", "train/loss") == pytest.approx(values_of(unhurt[1], "a", "train/loss"), abs=1e-5)


def test_a_signal_to_one_rank_stops_all_and_the_same_command_resumes(unhurt, tmp_path):
    flags = [*RUN, "--train_batch_size", "8"]
    with ranks(tmp_path, [flags] * 2, paced.main, **set_pace(tmp_path, 8)) as run:
        wait_for(lambda: steps_done(tmp_path, "a") >= 8, 60, run.output)
        os.kill(run.jobs[1].pid, signal.SIGTERM)
        assert run.results() == [128 + signal.SIGTERM] * 2, run.output()
        assert len(run.errors()) == 1, run.output()
        assert "rerun the same command" in run.errors()[0]
    with ranks(tmp_path, [flags] * 2) as run:
        assert run.results() == [0, 0], run.output()
        assert RESUMED in run.output()
    assert_whole(tmp_path, unhurt[2])


def terminated_as_it_tidies_up(flags: list[str]) -> int:
    """Trains; what started it tells it to end when it has left the training."""
    original = Run.close

    def close(self: Run) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        original(self)

    Run.close = close  # type: ignore[method-assign]
    return paced.main(flags)


def test_a_launcher_that_notices_a_death_a_little_later_leaves_the_message(tmp_path):
    flags = [*RUN, "--train_batch_size", "8"]
    with ranks(tmp_path, [flags] * 2, terminated_as_it_tidies_up, **set_pace(tmp_path, 8)) as run:
        wait_for(lambda: steps_done(tmp_path, "a") >= 8, 60, run.output)
        os.kill(run.jobs[1].pid, signal.SIGKILL)
        assert run.jobs[0].wait(60) == 1, run.output()
        assert "lost contact with rank 1 (" in run.errors()[0]


def test_a_rank_that_hangs_ends_the_run_in_a_bounded_time(tmp_path):
    flags = [*RUN, "--num_steps", "100000", "--train_batch_size", "8"]
    with ranks(tmp_path, [flags] * 3, TRAIN_TIMEOUT_SECS="3") as run:
        wait_for(lambda: steps_done(tmp_path, "a") > 8, 60, run.output)
        os.kill(run.jobs[1].pid, signal.SIGSTOP)
        since = time.monotonic()
        assert [run.jobs[rank].wait(30) for rank in (0, 2)] == [1, 1], run.output()
        assert 2 < time.monotonic() - since < 3 + dist_errors.GRACE_SECS
        assert len(run.errors()) == 1, run.output()
        assert "lost contact with rank 1 (" in run.errors()[0]
        assert "without an answer for 3 s" in run.errors()[0]
        assert "output/a_last.pt" in run.errors()[0]  # where it can resume
        assert "Traceback" not in run.output()


# ---- ranks share the batch ----


def saved(total: int, per_rank: int) -> dict[str, Any]:
    """Returns the batch of a training state, whose --train_batch_size was this."""
    return {"total": total, "given": per_rank}


@pytest.mark.parametrize(
    ("given", "micro_batches", "began", "now", "expected"),
    [
        (8, 1, 2, 1, (16, 2)),  # as much at a time as before
        (8, 1, 2, 4, (4, 1)),
        (8, 2, 2, 4, (4, 1)),  # micro-batches may be larger than half as long as they are no larger than before
        (6, 1, 4, 3, (8, 2)),
        (7, 1, 3, 1, (21, 3)),
        (10, 1, 3, 2, (15, 3)),  # 15 as micro-batches of 5: 10 at most, and all alike
    ],
)
def test_the_same_command_on_other_numbers_of_ranks(given, micro_batches, began, now, expected):
    flags = Batch.from_flags(given, micro_batches, now)
    batch = flags.resumed(saved(given * began, given), began)
    assert (batch.per_rank, batch.num_micro_batches) == expected
    assert batch.total == given * began
    assert batch.micro_batch <= flags.micro_batch


def test_other_micro_batches_may_come_with_other_ranks():
    batch = Batch.from_flags(128, 4, 2).resumed(saved(512, 128), 4)
    assert (batch.total, batch.per_rank, batch.micro_batch) == (512, 256, 32)


def test_a_batch_that_was_changed_by_the_user_is_left_alone():
    batch = Batch.from_flags(16, 1, 1)
    assert batch.resumed(saved(16, 8), 2) == batch
