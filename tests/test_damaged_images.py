"""An image that shows itself to be damaged only when it is decoded costs no step: the run is saved, and names it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest

from tests.helpers.boundaries import killed_at
from tests.helpers.error_faults import after_step, limit_file_sizes
from tests.helpers.forked import run_forked
from tests.helpers.launching import ranks
from tests.helpers.runs import SHORT, assert_same, last_state, outcome, several_sizes, undisturbed, write_images
from utils.augment import NUM_DRAWS
from utils.data_utils import StepSampler

SEED, BATCH = 18, 2  # of SHORT; each of the 8 images once in four steps


def of_several_sizes():
    write_images(sizes=several_sizes())


@pytest.fixture(autouse=True)
def pets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    of_several_sizes()


def trained_on_in(step, number, rank=0, world_size=1):
    """Returns an image of a step of one rank."""
    indices, _ = StepSampler(8, BATCH // world_size, NUM_DRAWS, SEED, rank, world_size)(step)
    return sorted(Path("pets/train").rglob("*.png"))[indices[number]]


@contextlib.contextmanager
def damaged(path):
    """Damages the middle of a file for a while: its header and its end tell nothing."""
    content, times = path.read_bytes(), (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    at = content.index(b"IDAT") + 6
    path.write_bytes(content[:at] + bytes(x ^ 0xFF for x in content[at : at + 8]) + content[at + 8 :])
    os.utime(path, ns=times)
    yield
    path.write_bytes(content)
    os.utime(path, ns=times)


def trained(*flags):
    return run_forked(["train.py", *SHORT, "--train_batch_size", str(BATCH), *flags])


def ends_with_the_name_of(path, step, last_eval_step, *flags):
    """Fails unless the run ends with one line that names the image, and saves the last step that it had completed."""
    code, _, err = trained(*flags)
    *_, line = err.splitlines()
    assert (code, err.count("error:"), "Traceback" in err) == (2, 1, False), err
    assert line.startswith(f"train.py: error: {path} cannot be read as an image")
    assert os.path.exists("output/a_last.pt") == (step > 0)
    assert ("output/a_last.pt" in line) == (step > 0)
    if step:
        assert (last_state().step, last_state().last_eval_step) == (step, last_eval_step)


@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize(("bad_step", "last_eval_step"), [(1, 0), (2, 0), (4, 2)])
def test_a_damaged_image_to_train_on_costs_no_step(workers, bad_step, last_eval_step):
    path = trained_on_in(bad_step, 1)
    with damaged(path):
        for _ in range(2):  # the same again, as long as it is not repaired
            ends_with_the_name_of(path, bad_step - 1, last_eval_step, "--num_workers", workers)
    assert trained("--num_workers", workers)[0] == 0
    assert_same(outcome(), undisturbed("--train_batch_size", str(BATCH), images=of_several_sizes))


def test_an_image_is_named_even_if_the_step_cannot_be_saved():
    with damaged(path := trained_on_in(4, 1)):
        code, _, err = run_forked(
            ["train.py", *SHORT, "--train_batch_size", "2"], prepare=after_step(3, limit_file_sizes)
        )
    *_, line = err.splitlines()
    assert (code, "Traceback" in err, last_state().step) == (2, False, 2)
    assert line.startswith(f"train.py: error: {path} cannot be read as an image")
    assert "step 3 is not saved: " in line


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_damaged_image_to_test_on_costs_no_step(workers):
    path = Path("pets/test/bee/2.png")
    with damaged(path):
        for _ in range(2):
            ends_with_the_name_of(path, 2, 0, "--num_workers", workers)
    assert trained("--num_workers", workers)[0] == 0
    assert_same(outcome(), undisturbed("--train_batch_size", str(BATCH), images=of_several_sizes))


# ---- two ranks ----


def two(folder, *flags):
    """Runs two ranks there; returns their exit codes and errors."""
    flags = [*SHORT, "--dataset", os.path.abspath("pets"), "--train_batch_size", "1", "--gradient_accumulation_steps",
             "1", "--eval_batch_size", "1", *flags]  # fmt: skip
    with ranks(Path(folder).absolute(), [flags] * 2) as run:
        codes = run.results(60)
        assert "Traceback" not in run.output()
        return codes, run.errors()


def left_in(folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.chdir(folder)
        return outcome()


def test_ranks_all_save_and_say_it_once(monkeypatch):
    """One rank alone meets each of the images, and no other waits for it in a reduction."""
    assert two("whole", "--num_workers", "0") == ([0, 0], [])
    expected = left_in("whole", monkeypatch)
    for folder, path, step, workers in (
        ("first", trained_on_in(4, 0, 0, 2), 3, "0"),
        ("second", trained_on_in(2, 0, 1, 2), 1, "1"),
        ("evaluation", Path("pets/test/ant/3.png"), 2, "0"),  # of the second rank's second batch
    ):
        with damaged(path):
            codes, errors = two(folder, "--num_workers", workers)
        assert codes == [2, 2]
        assert len(errors) == 1
        assert f"{path} cannot be read" in errors[0]
        assert "output/a_last.pt" in errors[0]
        with monkeypatch.context() as patch:
            patch.chdir(folder)
            assert last_state().step == step
        assert two(folder, "--num_workers", "0") == ([0, 0], [])
        assert_same(left_in(folder, monkeypatch), expected)


def test_the_images_of_all_ranks_are_named_and_may_go():
    paths = [trained_on_in(2, 0, rank, 2) for rank in (0, 1)]
    with damaged(paths[0]), damaged(paths[1]):
        codes, errors = two("both", "--num_workers", "0")
    assert (codes, len(errors)) == ([2, 2], 1)
    assert all(str(path) in errors[0] for path in paths)
    for path in paths:
        path.unlink()
    assert two("both", "--num_workers", "0") == ([0, 0], [])


# ---- a decoder that ends the process ----


def test_a_run_is_saved_before_its_first_evaluation_while_test_images_are_undecoded():
    flags = ("--train_batch_size", str(BATCH))
    killed_at("after step 2: forward", *flags)  # in the evaluation
    assert (last_state().step, last_state().last_eval_step) == (2, 0)
    killed_at("after step 4: forward", *flags)
    assert (last_state().step, last_state().last_eval_step) == (2, 2)
    assert trained()[0] == 0
    assert_same(outcome(), undisturbed(*flags, images=of_several_sizes))


def test_images_in_memory_need_no_save_before_an_evaluation():
    os.rename("pets", "others")
    write_images()
    killed_at("after step 2: forward")
    assert not os.path.exists("output/a_last.pt")
