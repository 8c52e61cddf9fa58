"""A run never replaces weights that it did not write: what is under its name first gets a second one."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from tests.helpers.boundaries import every_kill_is_harmless, killed_at
from tests.helpers.runs import last_state, run
from utils import checkpoint

pytestmark = pytest.mark.usefixtures("pets")

BEST, METADATA = Path("output/a_checkpoint.bin"), Path("output/a_checkpoint.json")
EARLIER, EARLIER_METADATA = Path("output/a_checkpoint.earlier-1.bin"), Path("output/a_checkpoint.earlier-1.json")


def pair() -> dict[Path, bytes]:
    """Returns what the files under the run's name hold, by the names that are to keep them."""
    return {kept: path.read_bytes() for path, kept in ((BEST, EARLIER), (METADATA, EARLIER_METADATA)) if path.exists()}


def leave_weights(described: bool = True) -> dict[Path, bytes]:
    """Leaves somebody's weights under the run's name; returns their ``pair``."""
    os.makedirs("output", exist_ok=True)
    metadata = checkpoint.CheckpointMetadata("ViT-B_32", 384, ["a", "b"], "erf", "cifar10", 10_000, 0.99)
    checkpoint.save_weights(str(BEST), {"x": torch.rand(3)}, metadata if described else None)
    return pair()


def kept() -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(Path("output").glob("*.earlier-*"))}


def best_step() -> int:
    return checkpoint.read_metadata(str(BEST), checkpoint.load_weights(str(BEST))).step


@pytest.mark.parametrize("described", [True, False])
def test_weights_that_a_run_finds_under_its_name_are_kept(described, caplog):
    theirs = leave_weights(described)
    assert run() == 0
    assert kept() == theirs
    assert f"{BEST} was not written by this run; it is kept as {EARLIER}" in caplog.text
    assert best_step() == 4


def test_another_run_of_the_name_counts_as_another():
    assert run() == 0
    first = pair()
    assert not kept()
    assert run("--resume", "none", "--seed", "1") == 0
    assert kept() == first
    assert run("--resume", "none", "--seed", "2") == 0
    assert len(kept()) == 4  # and another pair, earlier-2
    assert first.items() <= kept().items()


def test_weights_that_took_the_place_of_a_stopped_runs_are_kept():
    """Even another run's that tell of the same evaluation."""
    assert run("--name", "b", "--seed", "3") == 0
    killed_at("after step 3: step begins")
    shutil.copytree("output", "stopped")
    ours = json.loads(METADATA.read_text())
    theirs = json.loads(Path("output/b_checkpoint.json").read_text())
    for metadata in (theirs, {**theirs, "step": ours["step"], "accuracy": ours["accuracy"]}, None):
        shutil.rmtree("output")
        shutil.copytree("stopped", "output")
        shutil.copy("output/b_checkpoint.bin", BEST)
        METADATA.write_text(json.dumps(metadata))
        expected = (
            leave_weights()
            if metadata is None
            else {EARLIER: BEST.read_bytes(), EARLIER_METADATA: METADATA.read_bytes()}
        )
        assert run() == 0
        assert kept() == expected
        assert last_state().best_step == best_step()


@pytest.mark.parametrize("links", [True, False])
def test_a_kill_at_any_boundary_leaves_the_pair_under_one_of_the_two_names(links, monkeypatch):
    theirs = leave_weights()
    if not links:
        monkeypatch.setattr(os, "link", refuse)

    def check():
        assert theirs in (pair(), {path: x for path, x in kept().items() if path in theirs})

    names = every_kill_is_harmless(only="step 2: .*checkpoint", check=check)
    assert kept() == theirs
    assert f"after step 2: os.{'link' if links else 'rename'} {EARLIER.name}" in names


def refuse(*args):
    """Stands for a call of which the file system is not capable, as exFAT is not of hard links."""
    raise OSError("not here")


@pytest.mark.parametrize("name", ["a_checkpoint.bin", "a_checkpoint.json", "a_last.pt"])
def test_a_folder_in_a_files_place_is_told_before_any_work(name, capsys):
    os.makedirs(f"output/{name}")
    assert run() == 2
    assert f"output/{name} is a folder" in capsys.readouterr().err.splitlines()[-1]
    assert os.listdir("output") == [name]
