"""Photographs in JPEGs: the parts that training decodes, against Pillow's crop and resize of the whole image."""

from __future__ import annotations

import io
import itertools
import logging
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import train
from benchmarks.photos import photo
from tests.helpers.boundaries import killed_at
from tests.helpers.odd_images import exif, saved
from tests.helpers.runs import assert_same, last_state, outcome, run
from utils import augment, data_utils, photos
from utils.datasets import FileImages
from utils.images import ImageError, read_image

CPU, SIZE = torch.device("cpu"), (181, 123)
JPEGS = {
    **{f"{chroma}, quality {quality}{', progressive' * progressive}":
       dict(subsampling=chroma, quality=quality, progressive=progressive)
       for chroma, quality, progressive in itertools.product(("4:4:4", "4:2:2", "4:2:0", "4:1:1"), (30, 95), (0, 1))},
    "restart markers": dict(restart_marker_blocks=3),
    "restart markers, progressive": dict(restart_marker_rows=1, progressive=True),
    "RGB": dict(keep_rgb=True),
    "a profile": dict(icc_profile=b"x" * 70_000),
    "comments": dict(comment=b"\xff\xc0\0\x11" * 9),
}  # fmt: skip
MODES = ("L", "CMYK")


def in_worker(monkeypatch, yes=True):
    """Lets torchvision decode here, as in a worker."""
    monkeypatch.setattr(photos, "get_worker_info", lambda: yes or None)


def always(*box):
    """Chooses the same box of every image."""
    return lambda height, width: box


def draws(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, augment.NUM_DRAWS, generator=generator, dtype=torch.float64)


def written(tmp_path, content, name="a.jpg"):
    path = tmp_path / name
    path.write_bytes(content)
    return str(path)


def kinds():
    plain = photo(*SIZE, seed=1).convert("RGB")
    yield from ((name, saved(plain, "JPEG", **options)) for name, options in JPEGS.items())
    yield from ((mode, saved(plain.convert(mode), "JPEG")) for mode in MODES)
    pair = io.BytesIO()
    plain.save(pair, "MPO", save_all=True, append_images=[plain.rotate(180)])
    yield "MPO", pair.getvalue()


def levels_off(path, out_size, number, turned=False):
    """Returns the mean and the largest difference from Pillow's of so many crops, by their scales."""
    whole, part = augment.TrainTransform(out_size), augment.TrainTransform(out_size, in_parts=True)
    image, found = read_image(path), dict[int, list[tuple[float, int]]]()
    for d in draws(number):
        x = photos.read_crop(path, part.part(d), out_size)
        off = (x.int() - whole.image(image, d).int()).abs()
        scale = photos.scale_of(*augment.crop_box(d, image.height, image.width)[2:], out_size)
        found.setdefault(scale, []).append((off.double().mean().item(), int(off.max())))
    return {scale: (np.mean([x for x, _ in v]), max(x for _, x in v)) for scale, v in found.items()}


# ---- levels ----


def test_torchvisions_decoder_gives_pillows_levels(monkeypatch):
    in_worker(monkeypatch)
    for name, content in kinds():
        image = Image.open(io.BytesIO(content))
        if image.mode != "CMYK":  # which is left to Pillow
            got = photos._by_torchvision(content).permute(1, 2, 0).numpy()
            np.testing.assert_array_equal(got, np.asarray(image.convert("RGB")), err_msg=name)


@pytest.mark.parametrize("worker", [True, False])
def test_rows_above_the_crops_end_are_those_of_the_whole_image(monkeypatch, tmp_path, worker):
    in_worker(monkeypatch, worker)
    for name, content in kinds():
        path = written(tmp_path, content)
        whole = np.asarray(read_image(path))
        for bottom in (*range(1, 36), 48, 64, 65, 100, 121, 122, 123):
            side = min(bottom, 16)
            got = photos.read_crop(path, always(bottom - side, 5, side, side), side)
            expected = whole[bottom - side : bottom, 5 : 5 + side]
            np.testing.assert_array_equal(got.permute(1, 2, 0).numpy(), expected, err_msg=f"{name} to {bottom}")


@pytest.mark.parametrize("worker", [True, False])
def test_crops_that_keep_the_files_size_are_pillows_to_one_level(monkeypatch, tmp_path, worker):
    in_worker(monkeypatch, worker)
    for name, content in kinds():
        for out_size in (64, 200):
            ((mean, most),) = levels_off(written(tmp_path, content), out_size, 8).values()
            assert (mean < 0.3, most <= 1) == (True, True), (name, out_size, mean, most)


def test_a_worker_and_the_run_itself_see_the_same(tmp_path):
    paths = [written(tmp_path, content, f"{i}.jpg") for i, (_, content) in enumerate(kinds())]
    images, transform = FileImages(paths, torch.arange(len(paths))), augment.TrainTransform(40, True, in_parts=True)
    sampler = data_utils.StepSampler(len(paths), 7, transform.num_draws, seed=3)
    one, two = (
        [x for x, _ in data_utils.train_batches(images, sampler, range(1, 7), 7, transform, CPU, workers)]
        for workers in (0, 2)
    )
    assert all(map(torch.equal, one, two))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_scaled_crops_are_those_of_the_whole_image_however_it_is_turned(tmp_path, orientation):
    content = saved(photo(701, 500, seed=2).convert("RGB"), "JPEG", exif=exif(orientation), quality=90)
    found = levels_off(written(tmp_path, content), 40, 40)
    assert found.keys() == {1, 2, 4}
    for scale, (mean, most) in found.items():
        assert mean < {1: 0.2, 2: 0.5, 4: 0.9}[scale]
        assert most <= {1: 1, 2: 16, 4: 16}[scale]


def test_a_crop_one_pixel_beside_would_be_seen(monkeypatch, tmp_path):
    as_stored = photos._as_stored
    path = written(tmp_path, saved(photo(701, 500, seed=2).convert("RGB"), "JPEG", quality=90))
    for down, right in ((1, 0), (0, 1)):

        def moved(box, *others, down=down, right=right):
            top, left, height, width = as_stored(box, *others)
            return max(top - down, 0), max(left - right, 0), height, width

        monkeypatch.setattr(photos, "_as_stored", moved)
        assert all(mean > 1.2 for mean, _ in levels_off(path, 40, 40).values())


def test_the_scale_is_the_largest_that_leaves_a_crop_twice_the_result():
    for height, width, scale in ((448, 448, 1), (895, 2000, 1), (896, 896, 2), (1791, 4000, 2), (4000, 1792, 4),
                                 (3583, 3583, 4), (3584, 3584, 8), (9000, 9000, 8), (30, 20, 1)):  # fmt: skip
        assert photos.scale_of(height, width, 224) == scale


def test_one_box_is_that_of_many():
    d = draws(3000)
    for height, width in ((374, 500), (3000, 4000), (90, 30), (5, 200), (200, 5), (1, 300)):
        assert [list(augment.crop_box(x, height, width)) for x in d] == augment.crop_boxes(d, height, width).tolist()


# ---- what is left to Pillow ----


def test_other_formats_and_names_are_left_to_pillow(tmp_path):
    plain = photo(*SIZE, seed=1).convert("RGB")
    jpeg, png, choose = saved(plain, "JPEG"), saved(plain, "PNG"), always(0, 0, 9, 9)
    assert photos.read_crop(written(tmp_path, jpeg, "a.JPEG"), choose, 8) is not None
    kind = photos._frame_at(jpeg) + 1
    lossless, arithmetic = (jpeg[:kind] + marker + jpeg[kind + 1 :] for marker in (b"\xc3", b"\xc9"))
    bits_12 = jpeg[: kind + 3] + b"\x0c" + jpeg[kind + 4 :]
    for name, content in {"a.png": png, "b.png": jpeg}.items():
        assert photos.read_crop(written(tmp_path, content, name), choose, 8) is None, name
    for content in (png, b"", b"\xff\xd8\xff", lossless, arithmetic, bits_12):
        assert photos.read_crop(written(tmp_path, content), choose, 8) is None
    os.mkfifo(tmp_path / "pipe.jpg")
    for name in ("pipe.jpg", "missing.jpg"):
        assert photos.read_crop(str(tmp_path / name), choose, 8) is None


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_is_cut_off_is_an_error_that_names_it(tmp_path, workers, capfd):
    content = saved(photo(*SIZE, seed=1).convert("RGB"), "JPEG")
    path = written(tmp_path, content[: len(content) * 2 // 3])
    transform = augment.TrainTransform(8, in_parts=True)
    sampler = data_utils.StepSampler(1, 1, transform.num_draws, seed=0)
    images = FileImages([path], torch.tensor([0]))
    with pytest.raises(ImageError, match=f"{path} cannot be read as an image \\(image file is truncated"):
        next(data_utils.train_batches(images, sampler, [1], 1, transform, CPU, workers))
    assert capfd.readouterr().err == ""


def test_a_worker_decodes_damage_and_says_nothing_on_stderr(tmp_path, capfd, monkeypatch):
    in_worker(monkeypatch)
    content = bytearray(saved(photo(*SIZE, seed=1).convert("RGB"), "JPEG"))
    at = content.index(b"\xff\xda") + 300
    content[at : at + 20] = bytes(range(20))
    path = written(tmp_path, bytes(content))
    got = photos.read_crop(path, always(0, 0, 60, 60), 60)
    np.testing.assert_array_equal(got.permute(1, 2, 0).numpy(), np.asarray(read_image(path))[:60, :60])
    assert capfd.readouterr().err == ""
    os.write(2, b"still there")
    assert capfd.readouterr().err == "still there"


def test_the_limit_of_pixels_comes_before_decoding(tmp_path, monkeypatch):
    path = written(tmp_path, saved(photo(*SIZE, seed=1).convert("RGB"), "JPEG"))
    monkeypatch.setattr(photos, "_decode", lambda *args: pytest.fail("decoded"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", SIZE[0] * SIZE[1] // 3)
    assert photos.read_crop(path, lambda h, w: (0, 0, h, w), 8) is None
    with pytest.raises(ImageError, match="exceeds limit"):
        read_image(path)


def test_without_torchvisions_library_pillow_decodes(tmp_path, monkeypatch):
    in_worker(monkeypatch)
    path = written(tmp_path, saved(photo(*SIZE, seed=1).convert("RGB"), "JPEG"))
    expected = photos.read_crop(path, always(3, 5, 60, 70), 40)
    monkeypatch.setattr(photos, "_torchvision", lambda: None)
    assert torch.equal(photos.read_crop(path, always(3, 5, 60, 70), 40), expected)


# ---- a training ----


@pytest.fixture
def album(tmp_path, monkeypatch):
    """A data set of photographs, which are large for 32 px and of two sizes."""
    monkeypatch.chdir(tmp_path)
    for i, (part, name) in enumerate(itertools.product(("train", "test"), ("ant", "bee"))):
        folder = Path("album", part, name)
        folder.mkdir(parents=True)
        for j, size in enumerate(((300, 200), (200, 290)) * 2):
            photo(*size, seed=8 * i + j).save(folder / f"{j}.jpg")
    return ["--dataset", "album"]


def forget_the_flag():
    """Makes the state as a version without the flag would have saved it."""
    path = "output/a_last.pt"
    state = torch.load(path, weights_only=True)
    del state["settings"]["--jpeg_decoding"]
    torch.save(state, path)


def test_a_training_scales_unless_told_otherwise_and_keeps_its_way(album, capsys):
    assert run(*album, "--num_steps", "2") == 0
    assert last_state().settings["--jpeg_decoding"] == "scaled"
    for flags in ([], ["--jpeg_decoding", "scaled"]):
        assert run(*album, "--num_steps", "2", *flags) == 0
    assert run(*album, "--num_steps", "2", "--jpeg_decoding", "full") == 2
    assert "--jpeg_decoding was scaled, is full; give it the same" in capsys.readouterr().err


def test_a_training_of_an_earlier_version_resumes_with_whole_images(album, capsys):
    assert run(*album) == 0
    scaled = outcome()["lines"]
    assert run(*album, "--resume", "none", "--jpeg_decoding", "full") == 0
    expected = outcome()
    assert scaled != expected["lines"]
    for folder in ("output", "logs"):
        shutil.rmtree(folder)
    killed_at("after step 3: step ends", *album, "--jpeg_decoding", "full")  # the state is of step 2
    forget_the_flag()
    capsys.readouterr()
    assert run(*album, "--jpeg_decoding", "scaled") == 2
    assert "--jpeg_decoding was full, is scaled; give it the same" in capsys.readouterr().err
    assert run(*album) == 0
    assert_same(outcome(), expected)


def test_a_training_whose_last_jpeg_is_gone_keeps_its_setting():
    run, images = SimpleNamespace(saved_settings={"--jpeg_decoding": "scaled"}), FileImages(["a.png"], torch.zeros(1))
    assert train.find_decoding(None, run, images) == "scaled"


def test_a_folder_without_jpegs_has_no_such_setting(caplog):
    run, images = SimpleNamespace(saved_settings=None), FileImages(["a.png"], torch.zeros(1))
    with caplog.at_level(logging.WARNING):
        assert train.find_decoding("full", run, images) == ""
    assert "no image to train on is named as a JPEG" in caplog.text


def test_no_jpeg_in_files_is_a_warning_and_no_setting(pets, caplog):
    for flags in ([], ["--jpeg_decoding", "full"], ["--jpeg_decoding", "scaled"]):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert run("--num_steps", "1", *flags) == 0
        assert ("--jpeg_decoding" in caplog.text) == bool(flags)
    assert "--jpeg_decoding" not in last_state().settings
    assert "the images are kept in memory" in caplog.text
