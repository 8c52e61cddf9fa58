"""Runs that are killed at random moments end as the one that was not; ``python -m tests.killing`` has more of them."""

from __future__ import annotations

import os
import random

import pytest

from tests import killing, runs


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Two runs that were killed, and one in peace, in folders of the first result; and their numbers."""
    root = tmp_path_factory.mktemp("killed")
    seed = random.SystemRandom().randrange(10**6)
    return root, killing.harness(str(root), num_runs=2, kills_per_run=4, seed=seed)


def test_killed_runs_end_as_the_one_in_peace(killed):
    _, count = killed
    assert count.runs == 2
    assert count.kills >= 4


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


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("extra", "num_runs"),
    [
        ((), 12),
        (("--fp16", "--fp16_opt_level", "O2"), 4),
        (("--save_every", "10", "--hflip", "--decay_type", "linear"), 4),
    ],
    ids=["float32", "bfloat16 O2", "saved with the evaluations"],
)
def test_hundreds_of_kills(extra, num_runs, tmp_path):
    count = killing.harness(str(tmp_path), num_runs, 12, random.SystemRandom().randrange(10**6), extra)
    assert count.runs == num_runs
    assert count.kills >= 5 * num_runs
    assert count.while_saving >= num_runs
