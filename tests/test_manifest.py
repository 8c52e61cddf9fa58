"""What a run remembers of its files, and what it makes of a change of them."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.helpers.error_faults import limit_file_sizes
from tests.helpers.folders import damage
from tests.helpers.forked import run_forked
from tests.helpers.odd_images import photo
from tests.helpers.runs import SHORT, last_state, lines, run_in_child, several_sizes, write_images
from utils import checkpoint

LATE = "output/a_last.pt"


@pytest.fixture(autouse=True)
def _folder_of_its_own(tmp_path, monkeypatch):
    """Runs write output/ and logs/ below the working directory."""
    monkeypatch.chdir(tmp_path)


def write(in_memory):
    write_images("pets", None if in_memory else several_sizes())


def stopped_after_two_steps():
    """A run of which two of the four steps are saved."""
    run_in_child("--num_steps", "2")


def resume(*flags):
    """Resumes it; returns the exit code and standard error."""
    code, _, err = run_forked(["train.py", *SHORT, *flags])
    return code, err


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("part", ["train", "test"])
def test_a_run_resumes_once_the_images_are_gone_that_turned_unreadable(in_memory, part):
    write(in_memory)
    stopped_after_two_steps()
    bad = [Path("pets", part, "ant", "1.png"), Path("pets", part, "bee", "0.png")]
    for path in bad:
        damage(path, "cut_off")
    code, err = resume()
    assert code == 2
    assert all(str(path) in err for path in bad)
    for path in bad:
        path.unlink()
    code, err = resume()
    assert code == 0, err
    assert "ant/1.png" in err
    assert "the order of the images is that of the smaller folder" in err
    state = last_state()
    assert state.step == 4
    assert len(state.best_result["truth"]) == 8 - 2 * (part == "test")
    assert state.data["unreadable"] == []


@pytest.mark.parametrize("in_memory", [True, False])
def test_other_changes_of_a_folder_are_told_in_numbers_and_names(in_memory):
    write(in_memory)
    stopped_after_two_steps()
    before = Path(LATE).read_bytes()
    os.rename("pets/train/ant/1.png", "taken.png")
    code, err = resume()
    assert code == 2
    assert "its folder had 16 images then, 15 now (gone: train/ant/1.png)" in err
    os.rename("taken.png", "pets/test/ant/9.png")
    assert "had 16 images then, 16 now (gone: train/ant/1.png; new: test/ant/9.png)" in resume()[1]
    os.rename("pets/test/ant/9.png", "pets/train/ant/1.png")
    assert Path(LATE).read_bytes() == before
    assert resume()[0] == 0


def test_a_file_of_the_same_name_with_another_image_is_told_where_images_are_in_memory():
    write(in_memory=True)
    stopped_after_two_steps()
    shutil.copy("pets/train/ant/1.png", "pets/train/bee/1.png")
    code, err = resume()
    assert code == 2
    assert "its folder had 16 images then, 16 now (other contents or classes)" in err


def test_an_unreadable_image_and_one_that_is_taken_away_do_not_resume():
    write(in_memory=False)
    stopped_after_two_steps()
    damage(Path("pets/train/ant/1.png"), "cut_off")
    assert resume()[0] == 2
    os.unlink("pets/train/ant/1.png")
    os.unlink("pets/train/ant/2.png")
    code, err = resume()
    assert code == 2
    assert "gone: train/ant/1.png, train/ant/2.png" in err


def test_another_runs_state_and_one_without_names_say_that_unreadable_images_may_not_go():
    write(in_memory=False)
    stopped_after_two_steps()
    damage(Path("pets/train/ant/1.png"), "cut_off")
    before = Path(LATE).read_bytes()
    code, err = resume("--name", "b", "--resume", LATE)
    assert code == 2
    assert err.endswith(f"repair or remove it; {LATE} is resumed only with all of its images\n")
    assert Path(LATE).read_bytes() == before
    saved_by_an_earlier_version()
    assert f"{LATE} is resumed only with all of its images" in resume()[1]


def test_images_are_named_even_if_the_state_cannot_be_written():
    write(in_memory=False)
    stopped_after_two_steps()
    damage(Path("pets/train/ant/1.png"), "cut_off")
    code, _, err = run_forked(["train.py", *SHORT], prepare=limit_file_sizes)
    assert code == 2
    assert "error: pets/train/ant/1.png cannot be read as an image" in err
    assert f"{LATE} could not be written" in err


def saved_by_an_earlier_version():
    """Takes the files' names out of the state, and puts in the checksum that the earlier version found."""
    state = torch.load(LATE, weights_only=True)
    del state["data"]
    torch.save(state, LATE)


def test_a_state_of_an_earlier_version_resumes_where_nothing_is_read_otherwise():
    write(in_memory=False)
    stopped_after_two_steps()
    saved_by_an_earlier_version()
    assert resume()[0] == 0
    assert last_state().data["train"].split("\0") == [f"train/{c}/{i}.png" for c in ("ant", "bee") for i in range(4)]


def test_a_state_of_an_earlier_version_resumes_where_odd_images_have_the_pixels_that_they_had():
    write(in_memory=False)
    turned = Image.Exif()
    turned[0x0112] = 6
    for number, name in enumerate(("opaque.png", "upright.tif", "floats.tif")):
        os.unlink(f"pets/train/ant/{number}.png")
        image = photo().convert("L").convert({"opaque.png": "RGBA", "upright.tif": "L", "floats.tif": "F"}[name])
        options = {"exif": turned, "compression": "tiff_lzw"} if name == "upright.tif" else {}
        image.save(f"pets/train/ant/{name}", **options)
    stopped_after_two_steps()
    saved_by_an_earlier_version()
    code, err = resume()
    assert code == 0, err


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_state_of_an_earlier_version_tells_what_is_read_otherwise_now(in_memory):
    write(in_memory)
    turned = Image.Exif()
    turned[0x0112] = 6
    for i in range(2):
        with Image.open(f"pets/train/ant/{i}.png") as image:
            image.load()
        image.save(f"pets/train/ant/{i}.png", exif=turned)
    with Image.open("pets/test/bee/0.png") as image:
        image.putalpha(100)
        image.save("pets/test/bee/0.png")
    stopped_after_two_steps()
    saved_by_an_earlier_version()
    if in_memory:  # its checksum is of the pixels, which are others
        state = torch.load(LATE, weights_only=True)
        state["settings"]["--dataset"] = "folder 00000000-11111111-22222222"
        torch.save(state, LATE)
    code, err = resume()
    assert code == 2
    assert "2 with an EXIF orientation" in err
    assert "1 with transparency" in err
    assert "images then" not in err


def test_a_state_of_an_earlier_version_tells_of_other_images_without_their_names():
    write(in_memory=False)
    stopped_after_two_steps()
    saved_by_an_earlier_version()
    os.unlink("pets/train/ant/1.png")
    code, err = resume()
    assert code == 2
    assert "its images were others (there are 15 now)" in err


def test_images_are_not_looked_at_again_unless_names_sizes_or_times_change(monkeypatch):
    write(in_memory=False)
    stopped_after_two_steps()
    assert checkpoint.load_state(LATE)["data"]["fingerprint"]

    def fail(paths):
        raise AssertionError("looked again")

    from utils import inspection

    monkeypatch.setattr(inspection, "inspect_images", fail)
    code, err = resume()
    assert code == 0, err
    os.utime("pets/train/ant/1.png", (0, 0))
    assert "looked again" in resume("--num_steps", "6")[1]


def a_folder_without_parts():
    """Takes the parts of pets together: each class has eight images, of which some are tested on."""
    for name in ("ant", "bee"):
        for i in range(4):
            os.makedirs(f"plain/{name}", exist_ok=True)
            os.rename(f"pets/train/{name}/{i}.png", f"plain/{name}/{i}.png")
            os.rename(f"pets/test/{name}/{i}.png", f"plain/{name}/{i + 4}.png")


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_folder_that_is_moved_or_renamed_is_the_same(in_memory):
    write(in_memory)
    a_folder_without_parts()
    run_in_child("--dataset", "plain", "--num_steps", "2")
    os.makedirs("elsewhere")
    os.rename("plain", "elsewhere/animals")
    code, err = resume("--dataset", "elsewhere/animals/")
    assert code == 0, err


def test_another_share_to_test_on_is_told_from_other_images():
    write(in_memory=False)
    a_folder_without_parts()
    run_in_child("--dataset", "plain", "--num_steps", "2")
    code, err = resume("--dataset", "plain", "--test_fraction", "0.6")
    assert code == 2
    assert "had 16 images then, 16 now (others to train on, of another --test_fraction: " in err


def test_a_run_resumes_without_an_unreadable_image_whose_class_then_tests_on_another():
    write(in_memory=False)
    a_folder_without_parts()
    flags = ["--dataset", "plain", "--test_fraction", "0.05"]  # only 6.png of each class is below
    run_in_child(*flags, "--num_steps", "2")
    assert last_state().data["test"].split("\0") == ["ant/6.png", "bee/6.png"]
    damage(Path("plain/ant/6.png"), "cut_off")
    assert resume(*flags)[0] == 2
    os.unlink("plain/ant/6.png")
    code, err = resume(*flags)
    assert code == 0, err
    state = last_state()
    assert state.data["test"].split("\0") == ["ant/0.png", "bee/6.png"]
    assert (state.step, len(state.best_result["truth"])) == (4, 2)
    assert [line["step"] for line in lines() if "test/accuracy" in line] == [2, 2, 4]  # once more on the new images
