"""A run never replaces weights that it did not write: what is under its name first gets a second one."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from tests.helpers.boundaries import every_kill_is_harmless, killed_at
from tests.helpers.runs import last_state, short_run, write_images
from utils import checkpoint

BEST, METADATA = Path("output/a_checkpoint.bin"), Path("output/a_checkpoint.json")
EARLIER, EARLIER_METADATA = Path("output/a_checkpoint.earlier-1.bin"), Path("output/a_checkpoint.earlier-1.json")


@pytest.fixture(autouse=True)
def _folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_images()


def leave_weights(described: bool = True) -> dict[Path, bytes]:
    """Leaves weights under the run's name; returns what the files hold, by the names that are to keep them."""
    os.makedirs("output", exist_ok=True)
    metadata = checkpoint.CheckpointMetadata("ViT-B_32", 384, ["a", "b"], "erf", "cifar10", 10_000, 0.99)
    checkpoint.save_weights(str(BEST), {"x": torch.rand(3)}, metadata if described else None)
    return {EARLIER: BEST.read_bytes(), **({EARLIER_METADATA: METADATA.read_bytes()} if described else {})}


def kept() -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(Path("output").glob("*.earlier-*"))}


def best_step() -> int:
    return checkpoint.read_metadata(str(BEST), checkpoint.load_weights(str(BEST))).step


@pytest.mark.parametrize("described", [True, False])
def test_weights_that_a_run_finds_under_its_name_are_kept(described, caplog):
    theirs = leave_weights(described)
    assert short_run() == 0
    assert kept() == theirs
    assert f"{BEST} was not written by this run; it is kept as {EARLIER}" in caplog.text
    assert best_step() == 4


def test_another_run_of_the_name_counts_as_another():
    assert short_run() == 0
    first = {EARLIER: BEST.read_bytes(), EARLIER_METADATA: METADATA.read_bytes()}
    assert not kept()
    assert short_run("--resume", "none", "--seed", "1") == 0
    assert kept() == first
    assert short_run("--resume", "none", "--seed", "2") == 0
    assert len(kept()) == 4  # and another pair, earlier-2
    assert first.items() <= kept().items()


@pytest.mark.parametrize("boundary", ["after step 3: step begins", "after step 4: fsync metrics.jsonl"])
def test_a_resumed_run_keeps_nothing_twice(boundary):
    """In the second case its best weights are newer than its state."""
    killed_at(boundary)
    assert (last_state().best_step, best_step()) == (2, 4 if "step 4" in boundary else 2)
    assert short_run() == 0
    assert not kept()


def test_weights_that_took_the_place_of_a_stopped_runs_are_kept():
    killed_at("after step 3: step begins")
    theirs = leave_weights()
    assert short_run() == 0
    assert kept() == theirs
    assert last_state().best_step == best_step()


def test_another_runs_pair_in_the_place_of_a_stopped_runs_is_kept():
    """Even if it tells of the same evaluation."""
    assert short_run("--name", "b", "--seed", "3") == 0
    killed_at("after step 3: step begins")
    shutil.copytree("output", "stopped")
    ours = json.loads(METADATA.read_text())
    for same in ({}, {"step": ours["step"], "accuracy": ours["accuracy"]}):
        shutil.rmtree("output")
        shutil.copytree("stopped", "output")
        BEST.write_bytes(Path("output/b_checkpoint.bin").read_bytes())
        METADATA.write_text(json.dumps({**json.loads(Path("output/b_checkpoint.json").read_text()), **same}))
        theirs = {EARLIER: BEST.read_bytes(), EARLIER_METADATA: METADATA.read_bytes()}
        assert short_run() == 0
        assert kept() == theirs


@pytest.mark.parametrize("links", [True, False])
def test_a_kill_at_any_boundary_leaves_the_pair_under_one_of_the_two_names(links, monkeypatch):
    theirs = leave_weights()
    if not links:
        monkeypatch.setattr(os, "link", refuse)

    def check():
        first = {EARLIER: BEST.read_bytes(), EARLIER_METADATA: METADATA.read_bytes()}
        assert theirs in (first, {path: x for path, x in kept().items() if path in theirs})

    names = every_kill_is_harmless(only="step 2: .*checkpoint", check=check)
    assert kept() == theirs
    assert f"after step 2: os.{'link' if links else 'rename'} {EARLIER.name}" in names


def refuse(*args):
    """Stands for a call of which the file system is not capable, as exFAT is not of hard links."""
    raise OSError("not here")


@pytest.mark.parametrize("name", ["a_checkpoint.bin", "a_checkpoint.json", "a_last.pt"])
def test_a_folder_in_a_files_place_is_told_before_any_work(name, capsys):
    os.makedirs(f"output/{name}")
    assert short_run() == 2
    assert f"output/{name} is a folder" in capsys.readouterr().err.splitlines()[-1]
    assert os.listdir("output") == [name]
