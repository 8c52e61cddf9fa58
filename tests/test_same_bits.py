"""The comparison of two revisions: it finds the smallest difference, and none between equals."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import same_bits
from tests.helpers.forked import run_forked

LINES = [
    {"step": 1, "train/loss": 2.5, "train/lr": 0.1, "images_per_sec": 7.0},
    {"step": 1, "test/accuracy": 0.25, "test/loss": 2.25},
]


def leave(folder, lines=LINES, best=1.0, last=2.0, momentum=3.0, layout="one"):
    """Writes the files of a run, in the layout of one version or of another."""
    (folder / "logs" / "run").mkdir(parents=True)
    (folder / "logs" / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "output").mkdir()
    model = {"head.weight": torch.full((2, 3), last), "head.bias": torch.zeros(2)}
    buffers = {i: {"momentum_buffer": torch.full_like(x, momentum)} for i, x in enumerate(model.values())}
    state = {"format": 1, "model": model, "optimizer": {"state": buffers, "param_groups": [{"lr": 0.1}]}}
    if layout == "another":
        state = {"version": 2, "optim": {"sgd": buffers}, "weights": {"float32": model}, "rng": {"a": torch.ones(9)}}
    torch.save(state, folder / "output" / "run_last.pt")
    torch.save({"head.weight": torch.full((2, 3), best)}, folder / "output" / "run_checkpoint.bin")
    return folder


def changed(at, **values):
    """``LINES`` with one of them changed."""
    return [{**line, **values} if i == at else line for i, line in enumerate(LINES)]


@pytest.mark.parametrize("more", [{}, {"layout": "another"}, {"lines": changed(0, images_per_sec=9.0, secs=1.0)}])
def test_equal_bits_are_equal_whatever_the_layout_and_the_speed(more, tmp_path):
    assert same_bits.compare(leave(tmp_path / "1"), leave(tmp_path / "2", **more)) == (0, 0)


@pytest.mark.parametrize("key", ["train/loss", "train/lr"])
def test_the_last_digit_of_a_metric_is_found(key, tmp_path):
    lines = changed(0, **{key: LINES[0][key] + 2**-50})
    assert same_bits.compare(leave(tmp_path / "1"), leave(tmp_path / "2", lines=lines)) == (2**-50, 0)


@pytest.mark.parametrize("what", ["best", "last", "momentum"])
def test_the_last_bit_of_a_tensor_is_found(what, tmp_path):
    one, other = leave(tmp_path / "1", **{what: 1.0}), leave(tmp_path / "2", **{what: 1 + 2**-23})
    assert same_bits.compare(one, other) == (0, 2**-23)


def test_the_sign_of_a_zero_is_found(tmp_path):
    one, other = leave(tmp_path / "1", momentum=0.0), leave(tmp_path / "2", momentum=-0.0)
    assert same_bits.compare(one, other) == (0, float("inf"))


def test_an_evaluation_that_one_lacks_is_found(tmp_path):
    one, other = leave(tmp_path / "1"), leave(tmp_path / "2", lines=LINES[:1])
    assert same_bits.compare(one, other) == same_bits.compare(other, one) == (float("inf"), 0)


def test_a_revision_is_written_out_as_git_has_it(tmp_path, repository):
    try:
        tree = same_bits.check_out("HEAD", tmp_path / "tree")
    except ValueError as e:
        pytest.skip(f"needs the repository's history: {e}")
    assert (tree / "train.py").is_file()
    assert not (tree / ".git").exists()
    assert same_bits.check_out(same_bits.WORKING_TREE, tmp_path / "none") == repository


def test_no_such_revision_ends_in_one_line(capsys):
    with pytest.raises(SystemExit, match="2"):
        same_bits.main(["no-such-revision"])
    assert "no-such-revision" in capsys.readouterr().err.splitlines()[-1]


STOPPABLE = """
import os, shutil, signal, sys, time
if not os.path.exists("output"):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    shutil.copytree(os.path.join(os.path.dirname(__file__), "result"), "made")
    os.rename("made/logs", "logs")
    os.rename("made/output", "output")  # whole at once: the signal comes as soon as there is a state
    time.sleep(60)
"""


@pytest.mark.parametrize(("case", "agree"), [("resumed", False), ("resumed by the second", True)])
def test_runs_are_stopped_and_resumed_each_from_its_own_state_or_from_the_firsts(case, agree, tmp_path):
    trees = [tmp_path / "tree 1", tmp_path / "tree 2"]
    for number, tree in enumerate(trees):
        leave(tree / "result", last=float(number))  # what it begins with differs, not what it makes of a state
        (tree / "train.py").write_text(STOPPABLE)
    row, same = same_bits.row_of(case, trees, tmp_path / "runs", [])
    assert (row, same) == ([case, "1", "yes", *(("yes", "0") if agree else ("NO", "1"))], agree)


def test_a_run_that_fails_is_no_agreement(tmp_path):
    (tmp_path / "train.py").write_text("import sys; print('train.py: error: no luck', file=sys.stderr); sys.exit(2)")
    row, same = same_bits.row_of("resumed", [tmp_path, tmp_path], tmp_path / "runs", [])
    assert not same
    assert row[-1].endswith("train.py: error: no luck")


def test_the_working_tree_agrees_with_itself(capsys, monkeypatch):
    """Not with a commit: a change that is meant to change numbers must not fail before it is committed."""

    def run_train(tree, folder, flags, ranks):
        code, _, error = run_forked(["train.py", *flags], cwd=folder)
        assert code == 0, error

    monkeypatch.setattr(same_bits, "run_train", run_train)
    assert same_bits.main([".", ".", "--model_type", "testing", "--cases", "float32"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert rows[2:] == ["| float32 | 16 | yes | yes | 0 |"]
