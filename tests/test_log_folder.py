"""The folders of logs of runs with one name: each run resumes into its own, and disturbs no other's."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

import train
from tests.helpers.boundaries import killed_at
from tests.helpers.error_faults import mount
from tests.helpers.forked import Forked, run_forked
from tests.helpers.runs import RUN, SHORT, events, last_state, lines, run, undisturbed
from utils import checkpoint, datasets

pytestmark = pytest.mark.usefixtures("pets")

STOP = "after step 3: step ends"  # the state is of step 2
OTHER = ("--output_dir", "other")


def folders() -> list[str]:
    return sorted(os.listdir("logs"))


def logged(*names: str) -> None:
    """Fails unless these folders of logs, and no others, are those of a run that nothing stopped."""
    assert folders() == sorted(names)
    for name in names:
        assert lines(name) == undisturbed()["lines"]
        assert events(name) == undisturbed()["events"]


def test_runs_of_one_name_resume_into_their_own_folders(caplog):
    killed_at(STOP)
    killed_at(STOP, *OTHER)
    assert len(lines("a")) == len(lines("a-2")) == 2
    assert run() == 0
    assert "another run of this name" not in caplog.text
    assert run(*OTHER) == 0
    assert f"({os.path.abspath('output/a_last.pt')}): the logs of this run are in logs/a-2" in caplog.text
    logged("a", "a-2")
    assert "could not be written" not in caplog.text
    assert os.path.exists("other/a_report.html")
    assert run("--output_dir", "third") == 0
    logged("a", "a-2", "a-3")


def test_a_run_that_is_killed_before_its_first_save_starts_again_in_its_folder():
    assert run() == 0
    for _ in range(2):
        killed_at("start: forward", *OTHER)
    assert run(*OTHER) == 0
    assert folders() == ["a", "a-2"]
    assert lines("a-2") == lines("a")


def test_a_run_that_starts_over_keeps_its_folder():
    assert run() == 0
    assert run(*OTHER, "--seed", "1") == 0
    before = lines("a"), lines("a-2")
    assert run("--resume", "none") == 0
    assert run(*OTHER, "--seed", "1", "--resume", "none") == 0
    assert folders() == ["a", "a-2"]
    assert (lines("a"), lines("a-2")) == (lines("a/earlier-1"), lines("a-2/earlier-1")) == before


@pytest.mark.parametrize("flags", [[], ["--resume", "none"]])
def test_a_job_that_moves_with_its_logs_keeps_its_folder(flags, tmp_path, monkeypatch):
    assert run() == 0
    killed_at(STOP, *OTHER)
    os.mkdir(tmp_path / "moved")
    for name in ("pets", "output", "other", "logs"):
        shutil.move(name, tmp_path / "moved" / name)
    monkeypatch.chdir(tmp_path / "moved")
    assert run(*OTHER, *flags) == 0
    assert folders() == ["a", "a-2"]
    assert lines("a-2") == lines("a")


def test_an_output_that_moves_keeps_its_folder():
    assert run() == 0
    killed_at(STOP, *OTHER)
    os.rename("other", "moved")
    assert run("--output_dir", "moved") == 0
    logged("a", "a-2")


def test_a_copy_of_an_output_is_another_run(caplog):
    killed_at(STOP)
    shutil.copytree("output", "copy")
    for _ in range(2):
        assert run("--output_dir", "copy", "--save_every", "3") == 0
    assert "logs/a-2 does not hold the logs of the run up to step 2: they begin after it" in caplog.text
    assert [line["step"] for line in lines("a-2")] == [3, 4, 4]
    assert run() == 0
    assert folders() == ["a", "a-2"]
    assert lines("a") == undisturbed()["lines"]


def as_of_an_earlier_version() -> None:
    os.remove("logs/a/.run")
    state = checkpoint.load_state("output/a_last.pt")
    checkpoint.save_state("output/a_last.pt", {**state, "run_id": ""})


def test_logs_of_an_earlier_version_are_of_the_run_that_resumes():
    killed_at(STOP)
    as_of_an_earlier_version()
    killed_at("start: forward")  # before it has saved which run it is
    assert run() == 0
    logged("a")
    assert last_state().run_id
    assert run(*OTHER) == 0
    logged("a", "a-2")


def test_a_new_run_moves_logs_of_an_earlier_version_as_that_did():
    assert run() == 0
    as_of_an_earlier_version()
    before = lines()
    assert run(*OTHER) == 0
    assert folders() == ["a"]
    assert lines("a/earlier-1") == before


@pytest.mark.parametrize("of_an_earlier_version", [False, True])
def test_the_folder_of_a_run_with_a_number_in_its_name_is_not_taken(of_an_earlier_version):
    assert run("--name", "a-2", "--seed", "1") == 0
    if of_an_earlier_version:
        os.remove("logs/a-2/.run")
    before = lines("a-2")
    assert run() == 0
    assert run(*OTHER) == 0
    assert folders() == ["a", "a-2", "a-3"]
    assert lines("a-2") == before
    assert run("--name", "a-2", "--resume", "none") == 0
    assert folders() == ["a", "a-2", "a-3"]


def test_a_run_that_has_only_just_started_has_its_folder():
    """It has written nothing yet but its lock."""

    def prepare() -> None:
        datasets.load = lambda *_, **__: time.sleep(60)

    with Forked(["train.py", *SHORT], prepare=prepare) as child:
        while not (Path("logs/a/.lock").exists() and Path("logs/a/.lock").stat().st_size):
            assert child.poll() is None, child.stderr()
            time.sleep(0.01)
        assert not os.path.exists("logs/a/.run")
        assert run(*OTHER) == 0
        assert lines("a-2") == undisturbed()["lines"]
        assert run() == 2
    assert folders() == ["a", "a-2"]


def test_a_read_only_folder_trains_with_its_files_elsewhere(tmp_path):
    os.mkdir("checkout")
    mount("--bind", "checkout", "checkout")
    try:
        mount("-o", "remount,bind,ro", "checkout")
        elsewhere = ["--output_dir", str(tmp_path / "o"), "--log_dir", str(tmp_path / "l")]
        code, _, err = run_forked(["train.py", *RUN, "--num_steps", "5", *elsewhere], cwd="checkout")
        assert code == 0, err
        assert "could not be written" not in err
    finally:
        assert os.system("umount checkout") == 0
    assert {"metrics.jsonl", ".run"} < set(os.listdir("l/a"))
    assert f"--log_dir={tmp_path / 'l'}" in Path("o/a_report.html").read_text()


def test_a_damaged_or_foreign_note_belongs_to_nobody():
    for text in ("", "{", "3", "[]", '{"run_id": "x"}', '{"run_id": [], "state": {}}', "\xff"):
        os.makedirs("logs/a", exist_ok=True)
        Path("logs/a/.run").write_text(text, encoding="latin-1")
        assert train.main([*SHORT, "--resume", "none", "--num_steps", "1"]) == 0
        assert folders() == ["a"], text
