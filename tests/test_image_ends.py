"""Looking at images without decoding them: none that can be read is refused, none that was cut off is passed over."""

import random
from functools import cache

import numpy as np
import pytest
from PIL import Image, features

from tests.helpers import odd_images
from tests.helpers.odd_images import exif, photo, ramp, saved
from utils import images
from utils.images import ImageError, look, read_image

#: What Pillow writes: the mode, the format and the options.
KINDS = {
    "JPEG": ("RGB", "JPEG", {}),
    "JPEG with EXIF": ("RGB", "JPEG", {"exif": exif()}),
    "JPEG, progressive": ("L", "JPEG", {"progressive": True}),
    "MPO": ("RGB", "MPO", {"save_all": True, "append_images": [photo(1)]}),
    "PNG": ("RGB", "PNG", {}),
    "PNG with EXIF": ("RGBA", "PNG", {"exif": exif()}),
    "APNG": ("RGB", "PNG", {"save_all": True, "append_images": [photo(1)]}),
    "GIF": ("P", "GIF", {}),
    "GIF, animated": ("P", "GIF", {"save_all": True, "append_images": [photo(1).convert("P")]}),
    "WebP": ("RGB", "WEBP", {}),
    "WebP, lossless": ("RGBA", "WEBP", {"lossless": True, "exif": exif()}),
    "BMP": ("RGB", "BMP", {}),
    "BMP, 1 bit": ("1", "BMP", {}),
    "TIFF": ("RGB", "TIFF", {}),
    "TIFF, LZW": ("RGB", "TIFF", {"compression": "tiff_lzw"}),
    "TIFF, JPEG": ("RGB", "TIFF", {"compression": "jpeg"}),
    "TIFF, strips": ("L", "TIFF", {"compression": "packbits", "tiffinfo": {278: 4}}),
    "TIFF with EXIF": ("P", "TIFF", {"exif": exif()}),
    "floats": ("F", "TIFF", {}),
    "16 bits": ("I;16", "PNG", {}),
    "AVIF": ("RGB", "AVIF", {"exif": exif()}),
    "JPEG 2000": ("RGB", "JPEG2000", {}),
    "JPEG 2000, bare": ("RGB", "JPEG2000", {"no_jp2": True}),
    "PPM": ("RGB", "PPM", {}),
    "QOI": ("RGB", "QOI", {}),
    "TGA": ("RGB", "TGA", {"compression": "tga_rle"}),
    "PCX": ("RGB", "PCX", {}),
    "SGI": ("RGB", "SGI", {}),
    "ICO": ("RGBA", "ICO", {"sizes": [odd_images.SIZE]}),
    "DDS": ("RGBA", "DDS", {}),
    "BLP": ("P", "BLP", {}),
}


@cache
def content(kind):
    """A file of a kind; skips the test where this Pillow lacks it."""
    mode, name, options = KINDS[kind]
    needed = {"AVIF": "avif", "JPEG2000": "jpg_2000", "WEBP": "webp", "TIFF": "libtiff"}.get(name)
    if needed and not features.check(needed):
        pytest.skip(f"needs a Pillow with {needed}")
    ramps = {"F": lambda: ramp(np.float32, 255), "I;16": lambda: ramp(np.uint16, 65535)}
    return saved(ramps[mode]() if mode in ramps else photo().convert(mode), name, **options)


def succeeds(action, path):
    try:
        action(path)
    except ImageError:
        return False
    return True


@pytest.mark.parametrize("kind", KINDS)
def test_looking_refuses_just_what_cannot_be_read_however_much_is_cut_off(tmp_path, kind):
    whole, path = content(kind), str(tmp_path / "a.bin")
    rng = random.Random(kind)
    lengths = {0, 1, 20, *(len(whole) - n for n in range(16)), *rng.choices(range(len(whole)), k=60)}
    read = {}
    for length in sorted(lengths):
        with open(path, "wb") as f:
            f.write(whole[:length])
        read[length] = succeeds(read_image, path)
        assert succeeds(look, path) == read[length], f"{length} of {len(whole)} bytes"
    assert read[len(whole)]
    assert not read[20]


@pytest.mark.parametrize("kind", KINDS)
def test_what_follows_an_image_or_is_damaged_in_it_is_refused_only_if_it_cannot_be_read(tmp_path, kind):
    whole, path = content(kind), str(tmp_path / "a.bin")
    rng = random.Random(kind)
    contents = [whole + tail for tail in (b"\0", b"trailing " * 1000, bytes(70_000), b"\xff\xd8\xff\xe0" * 9)]
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(len(whole))] = rng.randrange(256)
        contents.append(bytes(damaged))
    for x in contents:
        with open(path, "wb") as f:
            f.write(x)
        if succeeds(read_image, path):
            look(path)


@pytest.fixture
def undecoded(monkeypatch):
    """Makes decoding an error."""

    def refuse(path):
        raise AssertionError(f"{path} was decoded")

    monkeypatch.setattr(images, "read_image", refuse)


USUAL = ["JPEG", "JPEG with EXIF", "JPEG, progressive", "MPO", "PNG", "APNG", "GIF", "GIF, animated", "WebP", "BMP",
         "TIFF", "TIFF, LZW", "TIFF, strips", "16 bits", "AVIF", "JPEG 2000"]  # fmt: skip


@pytest.mark.usefixtures("undecoded")
@pytest.mark.parametrize("kind", USUAL)
def test_whole_files_of_usual_formats_are_not_decoded(tmp_path, kind):
    path = tmp_path / "a.bin"
    path.write_bytes(content(kind))
    look(str(path))


@pytest.mark.usefixtures("undecoded")
@pytest.mark.parametrize("length", [1, 100, 5000, 900_000])
def test_what_phones_append_to_jpegs_is_no_doubt(tmp_path, length):
    path = tmp_path / "a.jpg"
    path.write_bytes(content("JPEG with EXIF") + b"SEFT" * (length // 4) + b"\0")
    look(str(path))


def test_a_thumbnail_is_no_end(tmp_path):
    thumbnail = saved(photo(1), "JPEG")
    block = b"\xff\xe1" + (len(thumbnail) + 2).to_bytes(2, "big") + thumbnail
    whole = content("JPEG")
    path = tmp_path / "a.jpg"
    path.write_bytes(whole[:2] + block + whole[2:-200])
    with pytest.raises(ImageError, match=r"a\.jpg"):
        look(str(path))


#: Images and their traits.
TRAITS = {
    "plain": (lambda: saved(photo(), "JPEG"), set()),
    "upright": (lambda: saved(photo(), "JPEG", exif=exif(1)), set()),
    "no orientation": (lambda: saved(photo(), "JPEG", exif=exif(9)), set()),
    "turned": (lambda: saved(photo(), "JPEG", exif=exif(6)), {"orientation"}),
    "mirrored": (lambda: saved(photo(), "PNG", exif=exif(2)), {"orientation"}),
    "turned TIFF": (lambda: saved(photo(), "TIFF", exif=exif(8)), {"orientation"}),
    "turned WebP": (lambda: saved(photo(), "WEBP", exif=exif(3)), {"orientation"}),
    "alpha": (lambda: saved(photo().convert("RGBA"), "PNG"), {"transparency"}),
    "an index": (odd_images.TRANSPARENT["GIF"][1], {"transparency"}),
    "both": (lambda: saved(photo().convert("LA"), "PNG", exif=exif(5)), {"transparency", "orientation"}),
    "floats": (lambda: saved(ramp(np.float32, 1), "TIFF"), {"float"}),
    "turned floats": (lambda: saved(ramp(np.float32, 1), "TIFF", exif=exif(7)), {"float", "orientation"}),
    "XMP": (lambda: saved(photo(), "JPEG", xmp=b'<x tiff:Orientation="3"/>'), {"orientation"}),
}


@pytest.mark.parametrize("kind", TRAITS)
def test_the_header_says_what_is_read_otherwise_than_by_earlier_versions(tmp_path, kind):
    make, expected = TRAITS[kind]
    path = tmp_path / "a.bin"
    path.write_bytes(make())
    assert look(str(path)) == expected


def test_floats_out_of_range_are_refused_when_looked_at(tmp_path):
    path = tmp_path / "a.tif"
    Image.fromarray(np.full((4, 4), 300, np.float32)).save(path)
    with pytest.raises(ImageError, match="300 to 300"):
        look(str(path))
