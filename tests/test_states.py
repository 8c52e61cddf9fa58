"""States that are damaged or somebody else's, and names that another process trains under."""

from __future__ import annotations

import fcntl
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from tests.helpers.boundaries import killed_at
from tests.helpers.forked import holding
from tests.helpers.runs import last_state, run
from utils import files

pytestmark = pytest.mark.usefixtures("pets")

STATE = Path("output/a_last.pt")


class Touch:
    """Creates a file when it is unpickled."""

    def __reduce__(self):
        return open, ("touched", "w")


def edited(**changes):
    """Returns what changes some of what a state holds."""

    def edit(path):
        torch.save({**torch.load(path, weights_only=True), **changes}, path)

    return edit


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[data.index(last_state().model["head.bias"].numpy().tobytes())] ^= 1
    path.write_bytes(data)


UNREADABLE, NO_STATE = "cannot be read as a training state", "no training state of this version"
DAMAGED = {
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:-1000]), UNREADABLE),
    "empty": (lambda path: path.write_bytes(b""), UNREADABLE),
    "text": (lambda path: path.write_text("hello"), UNREADABLE),
    "one bit": (flip_a_bit, UNREADABLE),
    "malicious": (lambda path: torch.save({"format": 1, "x": Touch()}, path), UNREADABLE),
    "malicious pickle": (lambda path: path.write_bytes(pickle.dumps(Touch())), UNREADABLE),
    "weights only": (lambda path: shutil.copy("output/a_checkpoint.bin", path), NO_STATE),
    "a tensor": (lambda path: torch.save(torch.zeros(3), path), NO_STATE),
    "another version": (edited(format=99), NO_STATE),
    "a field more": (edited(more=1), NO_STATE),
    "a step of another kind": (edited(step="2"), NO_STATE),
    "no evaluation": (edited(best_result=3), NO_STATE),
    "an impossible step": (edited(step=-1), NO_STATE),
    "an absurd shape": (edited(model={"cls": torch.zeros(1).expand(10**6, 10**6)}), NO_STATE),
    "no settings": (edited(settings={}), "of a run with other settings"),
    "other weights": (edited(model={"cls": torch.zeros(3)}), "cannot be loaded as testing"),
}


def test_a_state_that_is_none_is_one_line_and_stays(capsys):
    assert run() == 0
    state = STATE.read_bytes()
    for damage, (spoil, words) in DAMAGED.items():
        STATE.write_bytes(state)
        spoil(STATE)
        spoiled = STATE.read_bytes()
        for how in ("auto", str(STATE)):
            assert run("--resume", how) == 2, damage
            error = capsys.readouterr().err.splitlines()
            assert [line for line in error if "error:" in line] == error[-1:]
            assert words in error[-1], damage
            assert not os.path.exists("touched")
            assert STATE.read_bytes() == spoiled


def test_a_path_that_is_missing_is_one_line(capsys):
    assert run("--resume", "nosuch_last.pt") == 2
    assert "there is no training state nosuch_last.pt; --resume takes a <name>_last.pt" in capsys.readouterr().err


@pytest.mark.parametrize("absolute", [False, True])
def test_a_state_of_somebody_elses_cuts_no_other_files(absolute, tmp_path, caplog):
    killed_at("after step 3: step ends")
    Path("precious").write_text("precious")
    name = str(tmp_path / "precious") if absolute else "../../precious"
    edited(log={**last_state().log, "files": {name: 0}})(STATE)
    assert run() == 0
    assert Path("precious").read_text() == "precious"
    assert "does not hold the logs of the run up to step 2" in caplog.text


def test_what_killed_processes_left_half_written_is_removed():
    os.makedirs("output")
    for name in ("a_checkpoint.bin", "a_checkpoint.json", "a_last.pt", "a_report.html", "b_last.pt"):
        Path("output", f".{name}.xyz.tmp").write_bytes(b"half")
    assert run() == 0
    assert [f for f in os.listdir("output") if f.endswith(".tmp")] == [".b_last.pt.xyz.tmp"]


# ---- one of a name ----


@pytest.mark.parametrize("lock", ["output/.a.lock", "logs/a/.lock"])
def test_a_second_run_of_the_name_is_refused_while_the_first_lives(lock, capsys):
    os.makedirs(os.path.dirname(lock))
    with holding(lock) as pid:
        assert run() == 2
        assert capsys.readouterr().err.splitlines()[-1] == (
            f"train.py: error: process {pid} is training under this name; wait for it, stop it, or give another --name"
        )
    assert os.path.exists(lock)  # its process was killed, and the system took the lock away
    assert run() == 0
    assert not os.path.exists(lock)


def test_a_lock_whose_file_goes_before_it_is_locked_is_taken_anew(tmp_path, monkeypatch):
    """Whoever held it has just removed it: a third process must find the lock that counts."""
    path, real = str(tmp_path / "lock"), fcntl.lockf

    def lockf(*args):
        monkeypatch.setattr(fcntl, "lockf", real)
        os.unlink(path)
        real(*args)

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with files.file_lock(path):
        assert os.path.exists(path)
    assert not os.path.exists(path)
