"""Files of folders: which are images, and what is left out."""

import os

import pytest

from tests.helpers.folders import BOTH, below, noise, save, tree
from tests.helpers.forked import as_nobody
from utils import datasets, folders
from utils.datasets import load_datasets

CLASSES = below("train", *BOTH) + below("test", *BOTH)


def test_images_of_many_names_are_found_and_other_files_and_hidden_ones_passed_over(folder, rng):
    images = ["upper.PNG", "photo.JPG", "photo.jpeg", "x.bmp", "x.webp", "deeper/still/x.png"]
    for name in images:
        save(noise(rng), folder, "train", "cat", name)
    for name in ("notes.txt", ".hidden.png", "Thumbs.db", "labels.csv", ".ipynb_checkpoints/0.png"):
        path = folder / "train" / "cat" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes((folder / "train" / "cat" / "0.png").read_bytes())
    for part in ("train", "test"):
        save(noise(rng), folder, part, ".ipynb_checkpoints", "0.png")
    data = load_datasets(str(folder), "", 1)
    assert data.classes == ["cat", "dog"]
    assert data.train.labels.tolist() == [0] * (5 + len(images)) + [1] * 5


@pytest.mark.parametrize("parts", [("",), ("train/", "test/")])
def test_what_is_left_out_is_counted_by_ending_and_said_once(found, caplog, parts):
    paths = [part + path for part in parts for path in BOTH]
    root = found(
        *paths, parts[0] + "ant/{0..2}.cr2", parts[0] + "bee/deep/x.CR2", parts[0] + "ant/{0..2}.txt",
        parts[0] + "bee/noend", "README.md", "loose.png", parts[-1] + "loose2.png",
    ).root  # fmt: skip
    loose = sorted({f"{root}/loose.png", f"{root}/{parts[-1]}loose2.png"})
    caplog.clear()
    data = datasets.find(root)
    (warning,) = caplog.messages
    assert warning == (
        f"{root}: 4 .cr2 were not read: convert them to JPEG or PNG; "
        f"2 images outside of the class folders, such as {loose[0]}"
    )
    assert data.notes[-1] == "3 .txt, 1 without an ending, 1 .md left out"
    assert len(data.train.paths) + len(data.test.paths) == len(paths) * 3


def test_what_systems_and_archives_add_needs_no_word(found):
    junk = ("Thumbs.db", "desktop.ini", ".DS_Store", "._1.png", "@eaDir/1.png/2.png", "__MACOSX/1.png")
    of_disks = ("lost+found/1", "$RECYCLE.BIN/1.png", "System Volume Information/1")
    data = found(*BOTH, *junk, *of_disks, *below("ant", *junk))
    assert data.classes == ["ant", "bee"]
    assert len(data.train.paths) + len(data.test.paths) == 6
    assert (data.warnings, len(data.notes)) == ([], 1)


def test_endings_are_shown_in_one_line_and_the_rarest_together(found):
    data = found(*BOTH, *(f"ant/1.e{i}" for i in range(11)), "ant/1.\n", "ant/{0..2}.txt")
    assert data.notes[-1].startswith("3 .txt, 1 '.\\n', 1 .e0, ")
    assert data.notes[-1].endswith(", 3 of other endings left out")


def test_images_in_deeper_folders_and_behind_links_are_found_once(folder, rng):
    for part in ("train", "test"):
        save(noise(rng), folder, part, "bee", "deeper", "still", "0.PNG")
    (folder / "test").rename(folder / "elsewhere")
    (folder / "val").symlink_to(folder / "elsewhere")
    for loop in ("dog/loop", "dog/up", "up"):
        (folder / "train" / loop).symlink_to(folder / "train", target_is_directory=True)
    (folder / "train" / "dog" / "here").symlink_to(folder / "train" / "dog", target_is_directory=True)
    data = load_datasets(str(folder), "", 1)
    assert data.classes == ["bee", "cat", "dog"]
    assert data.train.labels.bincount().tolist() == [1, 5, 5]


def test_a_link_that_leads_to_itself_is_a_file(tmp_path):
    for name in ("loop", "loop.png"):
        for path in (root := tmp_path / "pets", root / "ant"):
            tree(root, *BOTH)
            (path / name).symlink_to(name)
    data = folders.find(str(root))
    assert f"{root}/ant/loop.png" in data.train.paths + data.test.paths  # whoever looks at it names it
    assert data.notes[-1] == "2 without an ending left out"


def test_a_link_to_where_one_may_not_look_hides_no_other_image(public):
    root, closed = tree(public / "pets", *CLASSES), tree(public / "closed", "x.png")
    os.symlink(f"{closed}/x.png", f"{root}/train/ant/x.png")
    os.chmod(closed, 0)
    try:
        assert as_nobody(lambda: len(folders.find(root).train.paths)) == "7"
    finally:
        os.chmod(closed, 0o755)


@pytest.mark.parametrize(
    ("closed", "message"),
    [
        ("", "UserError: the folder {} may not be read; change its permissions"),
        ("/train", "UserError: the folder {} may not be read; change its permissions"),
        ("/train/ant", "UserError: the folder {} may not be read; change its permissions"),
        ("/train/ant/more", "1 folder may not be read, such as {}"),
    ],
)
def test_folders_that_may_not_be_read_are_named(public, closed, message):
    path = tree(public / "pets", *CLASSES, "train/ant/more/{0..3}.png") + closed
    os.chmod(path, 0)
    try:
        assert as_nobody(lambda: "; ".join(folders.find(f"{public}/pets").warnings)) == message.format(path)
    finally:
        os.chmod(path, 0o755)
