"""Which files are images, and what is said of those that cannot be read."""

import contextlib
import logging
import os
import pickle
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from tests.conftest import REPOSITORY
from tests.helpers import odd_images
from tests.helpers.folders import save
from tests.helpers.forked import as_nobody
from tests.helpers.odd_images import exif, photo, ramp, saved
from utils.images import ImageError, endings, read_image, remedy

# ---- errors ----


def dds_of_an_unknown_kind():
    content = bytearray(saved(photo(), "DDS", pixel_format="DXT1"))
    content[84:88] = b"WHAT"
    return bytes(content)


def damaged_blp():
    content = bytearray(saved(photo().convert("P"), "BLP"))
    content[8] = 77  # its encoding
    return bytes(content)


#: Files that decoders do not refuse as Pillow's documentation has it, by their endings.
ODD_ERRORS = {
    "avif": lambda: (lambda c: c[: len(c) * 2 // 3])(saved(photo(size=(64, 64)), "AVIF")),
    "dds": dds_of_an_unknown_kind,
    "blp": damaged_blp,
    "spi": lambda: saved(ramp(np.float32, 1), "SPIDER")[:1100],
    "qoi": lambda: saved(photo(), "QOI")[:40],
    "sgi": lambda: saved(photo(), "SGI")[:600],
    "tga": lambda: saved(photo(), "TGA", compression="tga_rle")[:40],
    "jp2": lambda: saved(photo(), "JPEG2000")[:150],
    "png": lambda: saved(photo(), "PNG")[:60],
    "txt.png": lambda: b"no image",
    "none.png": lambda: b"",
    "eps.jpg": lambda: saved(photo(), "EPS"),  # which another program would draw
}


@pytest.mark.parametrize("ending", ODD_ERRORS)
def test_whatever_a_decoder_raises_names_the_image(tmp_path, ending):
    path = str(tmp_path / f"a.{ending}")
    Path(path).write_bytes(ODD_ERRORS[ending]())
    with pytest.raises(ImageError) as e:
        read_image(path)
    ((named, reason),) = e.value.reasons.items()
    assert named == path
    assert reason
    assert path not in reason
    assert str(e.value) == f"{path} cannot be read as an image ({reason}); repair or remove it"


@pytest.mark.timeout(20)
def test_what_is_no_file_is_an_error_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "link.jpg").symlink_to("none.jpg")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    for name in ("pipe.jpg", "folder.jpg", "none.jpg", "link.jpg", "loop.jpg"):
        with pytest.raises(ImageError, match=name):
            read_image(str(tmp_path / name))


def test_a_file_without_permission_is_an_error(public):
    path = save(photo(), public, "a.png")
    os.chmod(path, 0)
    assert as_nobody(lambda: read_image(path)).startswith(f"ImageError: {path} cannot be read as an image (Permission")


def test_one_line_names_all_images_and_reaches_other_processes():
    error = pickle.loads(pickle.dumps(ImageError({"a.png": "cut off", "b.jpg": "empty"})))
    assert error.reasons == {"a.png": "cut off", "b.jpg": "empty"}
    assert str(error) == "2 images cannot be read: a.png (cut off), b.jpg (empty); repair or remove them"
    assert str(ImageError({"a.png": "x"})) == "a.png cannot be read as an image (x); repair or remove it"
    assert isinstance(error, ValueError)


# ---- silence ----

#: Images of which Pillow warns, or to which it logs an error, and reads or refuses them all the same.
NOISY = {
    "palette.png": odd_images.TRANSPARENT["P, bytes"][1],
    "tags.tif": lambda: saved(photo(), "TIFF", exif=exif()).replace(b"\x0f\1\2\0\x08\0\0\0", b"\x0f\1\2\0\x08\0\0\x70"),
    "exif.jpg": lambda: saved(photo(), "JPEG", exif=exif().tobytes()[:-12]),
    "im.im": lambda: saved(photo(), "IM"),
    "twice.jpg": lambda: saved(photo(), "JPEG", exif=exif().tobytes().replace(b"\3\0\0\0\1\0\6", b"\3\0\0\0\2\0\6")),
    "samples.tif": lambda: saved(photo(), "TIFF").replace(b"\x15\1\3\0\1\0\0\0\3", b"\x15\1\3\0\1\0\0\0\x63"),
    "cut.tif": lambda: saved(photo(), "TIFF")[:60],
}


@pytest.fixture
def noisy(tmp_path):
    """The paths of these images."""
    for name, content in NOISY.items():
        (tmp_path / name).write_bytes(content())
    return [str(tmp_path / name) for name in NOISY]


def read_or_refuse(paths):
    for path in paths:
        with contextlib.suppress(ImageError):
            read_image(path)


@pytest.mark.filterwarnings("ignore:IM image format")
def test_nothing_that_pillow_says_of_odd_files_is_shown(noisy, caplog, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)  # so that an image of 384 is large enough for a warning
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for path in noisy:
            with contextlib.suppress(OSError), Image.open(path) as image:
                image.convert("RGB")
                image.getexif().get(274)
    assert len({str(x.message) for x in found}) >= 6  # it does say something
    caplog.clear()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        threads = [threading.Thread(target=read_or_refuse, args=(noisy,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        warnings.warn("of somebody else", UserWarning, stacklevel=1)
    assert [str(x.message) for x in found] == ["of somebody else"]
    assert [x for x in caplog.records if x.levelno >= logging.WARNING] == []


def test_a_program_that_makes_warnings_errors_reads_all(tmp_path):
    paths = odd_images.write(tmp_path, odd_images.ODD)
    code = "import sys\nfrom utils.images import look, read_image\nfor p in sys.argv[1:]:\n    look(p), read_image(p)"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *paths.values()], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


# ---- which files are images ----


def test_the_endings_are_those_that_this_pillow_decodes():
    taken = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".gif", ".bmp", ".dib", ".tif", ".tiff", ".webp",
             ".mpo", ".ppm", ".pgm", ".pbm", ".pnm", ".ico", ".psd", ".tga", ".qoi", ".dds", ".sgi"}  # fmt: skip
    assert taken <= endings()
    assert (".avif" in endings()) == features.check("avif")
    assert (".jp2" in endings()) == features.check("jpg_2000")
    others = {".eps", ".ps", ".wmf", ".emf", ".mpg", ".mpeg", ".h5", ".hdf", ".grib", ".bufr", ".fit", ".fits", ".pdf",
              ".iim"}  # fmt: skip
    assert not others & endings()
    assert all(ending == ending.lower() and ending[0] == "." for ending in endings())


def test_what_is_not_taken_and_is_an_image_has_a_remedy():
    raw = (".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf")
    for ending in (".jxl", ".svg", ".eps", ".ps", ".wmf", *raw):
        assert remedy(ending) == "convert them to JPEG or PNG"
    for ending in (".txt", ".csv", ".mov", ".mp4", ".json", ".zip", ".h5", ".npy", ".pdf", "", ".jpg"):
        assert remedy(ending) is None


@pytest.mark.parametrize("has", [True, False])
def test_heic_is_taken_where_pillow_heif_is_installed(tmp_path, has):
    heif = pytest.importorskip("pillow_heif", reason="needs pillow_heif (requirements-dev.txt)")
    heif.register_heif_opener()
    path = save(photo(), tmp_path, "a.heic")
    hide = "" if has else "sys.modules['pillow_heif'] = None"
    code = f"""if True:
        import sys
        {hide}
        from utils.images import endings, read_image, remedy
        print(sorted(e for e in (".heic", ".hif") if e in endings()), remedy(".heic"))
        read_image(sys.argv[1])
    """
    os.rename(path, path := str(tmp_path / "a.jpg"))  # as some phones and messengers call it
    done = subprocess.run([sys.executable, "-c", code, path], cwd=REPOSITORY, capture_output=True, text=True)
    expected = "['.heic', '.hif'] None" if has else "[] pip install pillow_heif, or convert them to JPEG"
    assert done.stdout.strip() == expected
    assert ("images of HEIC are not read: pip install pillow_heif" in done.stderr) != has


@pytest.mark.skipif(not features.check("avif"), reason="needs a Pillow that reads AVIF")
def test_without_a_codec_its_endings_are_not_taken(monkeypatch):
    real = features.check
    monkeypatch.setattr(features, "check", lambda name: name != "avif" and real(name))
    endings.cache_clear()
    try:
        assert ".avif" not in endings()
        assert "convert them to JPEG" in remedy(".avif")
    finally:
        endings.cache_clear()
