"""Runs that are killed at random moments end as the one that was not; ``python -m tests.killing`` has more of them."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time

import pytest

from tests.helpers import killing, runs


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Two runs that were killed, and one in peace, in folders of the first result; and their numbers."""
    root = tmp_path_factory.mktemp("killed")
    seed = random.SystemRandom().randrange(10**6)
    return root, killing.harness(str(root), num_runs=2, kills_per_run=5, seed=seed)


def test_killed_runs_end_as_the_one_in_peace(killed):
    _, count = killed
    assert count.runs == 2
    assert count.kills >= 6


def test_the_harness_knows_a_torn_file_and_another_outcome(killed):
    """Else it would prove nothing."""
    root, _ = killed
    with killing.working_in(str(root / "peace")):
        expected = runs.outcome()
        with open("logs/a/metrics.jsonl", "a", encoding="utf-8") as f:
            f.write('{"step": 40, "train/loss": 1.0}\n')
        with pytest.raises(AssertionError):
            runs.assert_same(runs.outcome(), expected)
        runs.every_name_is_whole()
        for name in ("a_last.pt", "a_checkpoint.bin"):
            os.truncate(f"output/{name}", os.path.getsize(f"output/{name}") - 100)
            with pytest.raises(ValueError, match=name):
                runs.every_name_is_whole()
            os.remove(f"output/{name}")


class Server:
    """Stands for the process that forks runs: one run, whose program is given."""

    def __init__(self, program, folder):
        code = "import faulthandler, os, signal, time; faulthandler.register(signal.SIGUSR1, open('stderr', 'w'))"
        code += f"\nprint(os.getpid(), flush=True)\n{program}\nprint(0, flush=True); time.sleep(100)"
        self.process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, bufsize=0, cwd=folder)
        self.stdout = self.process.stdout


@pytest.fixture
def served(tmp_path):
    servers = []

    def serve(program):
        servers.append(Server(program, str(tmp_path)))
        return killing.Process(servers[-1], str(tmp_path))

    yield serve
    for server in servers:
        server.process.kill()
        server.process.communicate()


def test_a_slow_run_is_waited_for_and_one_that_hangs_is_not(served, monkeypatch):
    monkeypatch.setattr(killing, "MAX_IDLE_LOOKS", 2)
    slow = served("for i in range(50):\n    open('file', 'a').write('x'); time.sleep(0.1)")
    begin = time.monotonic()
    assert slow.wait() == 0
    assert time.monotonic() - begin > killing.MAX_IDLE_LOOKS + 1
    with pytest.raises(TimeoutError, match=r"(?s)no progress for \d+ s: .*most recent call first"):
        served("time.sleep(1000)").wait()


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("extra", "num_runs"),
    [
        ((), 12),
        (("--fp16", "--fp16_opt_level", "O2"), 4),
        (("--save_every", "10", "--hflip", "--decay_type", "linear"), 4),
        (("--model_type", "ViT-demo", "--pretrained_dir", str(runs.ROOT / "checkpoint" / "ViT-demo.npz")), 4),
    ],
    ids=["float32", "bfloat16 O2", "saved with the evaluations", "the demo"],
)
def test_hundreds_of_kills(extra, num_runs, tmp_path):
    seed = random.SystemRandom().randrange(10**6)
    count = killing.harness(str(tmp_path), num_runs, 12, seed, extra, num_kills=5 * num_runs)
    assert count.kills >= 5 * num_runs
    assert count.while_saving >= num_runs
