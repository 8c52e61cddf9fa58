"""A run never replaces weights that it did not write: what is under its name first gets a second one."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

import train
from tests.helpers.runs import RUN, Killed, last_state, run
from utils import checkpoint
from utils import run as runs

BEST, BESIDE = Path("output/a_checkpoint.bin"), Path("output/a_checkpoint.json")
EARLIER, EARLIER_BESIDE = Path("output/a_checkpoint.earlier-1.bin"), Path("output/a_checkpoint.earlier-1.json")


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def leave_weights(described: bool = True) -> dict[Path, bytes]:
    """Somebody's weights under the run's name; what the files hold, by the names under which they are to be kept."""
    os.makedirs("output", exist_ok=True)
    description = checkpoint.CheckpointMetadata("ViT-B_32", 384, ["a", "b"], "erf", "cifar10", 10_000, 0.99)
    checkpoint.save_weights(str(BEST), {"x": torch.rand(3)}, description if described else None)
    return {EARLIER: BEST.read_bytes(), **({EARLIER_BESIDE: BESIDE.read_bytes()} if described else {})}


def kept() -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(Path("output").glob("*.earlier-*"))}


def steps_of(path: Path) -> int:
    return checkpoint.read_metadata(str(path), checkpoint.load_weights(str(path))).step


@pytest.mark.parametrize("described", [True, False])
def test_what_a_run_finds_under_its_name_is_kept(described, caplog):
    theirs = leave_weights(described)
    assert run() == 0
    assert kept() == theirs
    assert f"{BEST} was not written by this run; it is kept as {EARLIER}" in caplog.text
    assert steps_of(BEST) in (5, 10, 13)


def test_another_run_of_the_name_counts_as_another(caplog):
    assert run() == 0
    first = {EARLIER: BEST.read_bytes(), EARLIER_BESIDE: BESIDE.read_bytes()}
    assert not kept()
    assert run("--resume", "none", "--seed", "1") == 0
    assert kept() == first
    assert run("--resume", "none", "--seed", "2") == 0
    assert len(kept()) == 4  # and another pair, earlier-2
    assert {path: kept()[path] for path in first} == first


def test_a_run_that_goes_on_keeps_nothing_twice():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save_state", stop_after(checkpoint.save_state, 1))
        with pytest.raises(Killed):
            run("--save_every", "5")
    assert last_state().best_step == 5
    assert run("--save_every", "5") == 0
    assert not kept()


def stop_after(function, times):
    """The function, after so many calls of which the process is killed."""
    calls = []

    def wrapped(*args):
        found = function(*args)
        calls.append(args)
        if len(calls) == times:
            raise Killed
        return found

    return wrapped


def test_a_run_that_was_killed_between_its_weights_and_its_state_goes_on_with_both():
    with pytest.MonkeyPatch.context() as patch:
        saves = stop_after(checkpoint.save_weights, 2)
        patch.setattr(checkpoint, "save_weights", saves)
        with pytest.raises(Killed):
            run()
    assert steps_of(BEST) > last_state().step
    assert run() == 0
    assert not kept()


def test_weights_that_took_the_place_of_a_stopped_runs_are_kept():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save_state", stop_after(checkpoint.save_state, 1))
        with pytest.raises(Killed):
            run()
    theirs = leave_weights()
    assert run() == 0
    assert kept() == theirs
    assert last_state().best_step == steps_of(BEST)


def test_another_runs_pair_in_the_place_of_a_stopped_runs_is_kept():
    assert run("--name", "b", "--seed", "3") == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save_state", stop_after(checkpoint.save_state, 1))
        with pytest.raises(Killed):
            run()
    theirs = {}
    for ending, keeps in ((".bin", EARLIER), (".json", EARLIER_BESIDE)):
        shutil.copy(f"output/b_checkpoint{ending}", f"output/a_checkpoint{ending}")
        theirs[keeps] = Path(f"output/b_checkpoint{ending}").read_bytes()
    told = json.loads(theirs[EARLIER_BESIDE])
    for step in (told["step"], 1000):  # of an evaluation that the stopped run may have had, too
        BEST.write_bytes(theirs[EARLIER])
        BESIDE.write_text(json.dumps({**told, "step": step}))
        assert not runs.wrote_best(train.make_parser().parse_args(RUN), last_state())
    BESIDE.write_bytes(theirs[EARLIER_BESIDE])
    assert run() == 0
    assert kept() == theirs


@pytest.mark.parametrize("links", [True, False])
def test_a_kill_at_any_point_leaves_the_pair_under_one_of_the_two_names(monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("no links here")))
    for point in range(1, 40):
        shutil.rmtree("output", ignore_errors=True)
        theirs = leave_weights()
        with pytest.MonkeyPatch.context() as patch:
            count = [0]
            for name in ("link", "replace", "unlink", "fsync"):
                patch.setattr(os, name, killing(getattr(os, name), point, count))
            killed = False
            try:
                BestWeightsOf().save()
            except Killed:
                killed = True
        first = {EARLIER: BEST.read_bytes() if BEST.exists() else b"", EARLIER_BESIDE: BESIDE.read_bytes()}
        assert theirs in (first, {path: x for path, x in kept().items() if path in theirs}), point
        BestWeightsOf().save()  # trying again, as the run's next start does
        assert {path: x for path, x in kept().items() if path in theirs} == theirs
        if not killed:
            break
    assert not killed, "more points than were tried"


def killing(function, point, count):
    def wrapped(*args, **kwargs):
        count[0] += 1
        if count[0] == point:
            raise Killed
        return function(*args, **kwargs)

    return wrapped


class BestWeightsOf:
    """A new run's first save."""

    def save(self) -> None:
        from utils.run import BestWeights

        description = checkpoint.CheckpointMetadata("testing", 32, ["ant", "bee"], "erf", "pets", 5, 0.5)
        BestWeights(str(BEST), is_own=False).save({"x": torch.zeros(3)}, description)


@pytest.mark.parametrize("name", ["a_checkpoint.bin", "a_checkpoint.json", "a_last.pt"])
def test_a_folder_in_a_files_place_is_told_before_any_work(name, capsys):
    os.makedirs(f"output/{name}")
    assert run() == 2
    assert f"output/{name} is a folder" in capsys.readouterr().err.splitlines()[-1]
    assert os.listdir("output") == [name]
