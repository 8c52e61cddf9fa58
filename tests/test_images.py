"""One image file: its pixels as people see them: upright, transparency on white, in 256 levels."""

import struct

import numpy as np
import pytest
from PIL import Image, ImageOps, features

from tests.helpers import odd_images
from tests.helpers.folders import save
from tests.helpers.odd_images import exif, photo, ramp, saved
from utils.images import ImageError, read_image


@pytest.fixture
def read(tmp_path):
    """``read(content)`` reads a file of this content."""

    def read(content, name="a.bin"):
        (tmp_path / name).write_bytes(content)
        return read_image(str(tmp_path / name))

    return read


def pixels(image):
    return np.asarray(image).astype(int)


def as_pillow_turns(content, tmp_path):
    """An image as ``ImageOps.exif_transpose`` turns it."""
    (tmp_path / "same.bin").write_bytes(content)
    with Image.open(tmp_path / "same.bin") as image:
        return ImageOps.exif_transpose(image).convert("RGB")


# ---- orientation ----

#: Formats that have an orientation, with the options to write them.
TURNED = {
    "JPEG": ("JPEG", {}),
    "PNG": ("PNG", {}),
    "TIFF": ("TIFF", {}),
    "TIFF, compressed": ("TIFF", {"compression": "tiff_lzw"}),
    "TIFF, pages": ("TIFF", {"save_all": True, "append_images": [photo(1)]}),
    "WebP": ("WEBP", {}),
    "AVIF": ("AVIF", {}),
    "MPO": ("MPO", {"save_all": True, "append_images": [photo(1)]}),
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", TURNED)
def test_an_image_is_turned_as_its_exif_says(read, tmp_path, kind, orientation):
    name, options = TURNED[kind]
    content = saved(photo(), name, exif=exif(orientation), **options)
    got = pixels(read(content))
    np.testing.assert_array_equal(got, pixels(as_pillow_turns(content, tmp_path)))
    plain = pixels(read(saved(photo(), name, **options)))
    assert got.shape == (plain.shape if orientation < 5 else (plain.shape[1], plain.shape[0], 3))
    upright = np.abs(got - plain).mean() < 5 if got.shape == plain.shape else False
    assert upright == (orientation == 1)


def test_xmp_turns_an_image_that_has_no_exif(read, tmp_path):
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    for name, options in (("JPEG", {"xmp": xmp}), ("WEBP", {"xmp": xmp}), ("TIFF", {"tiffinfo": {700: xmp}})):
        content = saved(photo(), name, **options)
        got = read(content)
        assert got.size == photo().size[::-1]
        np.testing.assert_array_equal(pixels(got), pixels(as_pillow_turns(content, tmp_path)))


def test_a_heic_is_turned_once(read, tmp_path):
    heif = pytest.importorskip("pillow_heif", reason="needs pillow_heif (requirements-dev.txt)")
    heif.register_heif_opener()
    with Image.open(save(photo(), tmp_path, "a.jpg")) as plain:
        upright = pixels(plain.transpose(Image.Transpose.ROTATE_270))
    (tmp_path / "turned.jpg").write_bytes(saved(photo(), "JPEG", exif=exif(6)))
    with Image.open(tmp_path / "turned.jpg") as turned:
        got = pixels(read(saved(turned, "HEIF", quality=95), "a.heic"))
    assert np.abs(got - upright).mean() < 5


def entry(order, kind, count, value):
    """The entry of an orientation in EXIF or TIFF: its type, count, and the value's four bytes."""
    return struct.pack(order + "HHI", 274, kind, count) + value


#: Types, counts and values that are no number from 1 to 8; and one that is, as a number of 32 bits.
NO_ORIENTATION = [
    (3, 1, 0),
    (3, 1, 9),
    (3, 1, 65535),
    (4, 1, 2**32 - 1),
    (1, 1, 6),
    (7, 1, 6),
    (2, 2, 54),
    (3, 0, 6),
]


@pytest.mark.parametrize(("kind", "count", "value"), [*NO_ORIENTATION, (4, 1, 6)])
def test_a_tag_that_is_no_orientation_counts_as_none(read, tmp_path, kind, count, value):
    little = entry("<", kind, count, struct.pack("<I", value))
    exif_of_it = b"Exif\0\0II*\0\x08\0\0\0\1\0" + little + bytes(4)
    contents = [saved(photo(), name, exif=exif_of_it) for name in ("JPEG", "PNG", "WEBP")]
    usual = entry("<", 3, 1, b"\6\0\0\0")
    contents += [saved(photo(), "TIFF", exif=exif(6)).replace(usual, little)]
    for content, name in zip(contents, ("JPEG", "PNG", "WEBP", "TIFF")):
        got, plain = pixels(read(content)), read(saved(photo(), name))
        turned = (kind, count, value) == (4, 1, 6)
        expected = plain.transpose(Image.Transpose.ROTATE_270) if turned else plain
        np.testing.assert_array_equal(got, pixels(expected))
        np.testing.assert_array_equal(got, pixels(as_pillow_turns(content, tmp_path)))


def test_exif_that_cannot_be_read_counts_as_none(read):
    whole = exif().tobytes()
    for kind in ("JPEG", "PNG", "WEBP"):
        plain = pixels(read(saved(photo(), kind)))
        for damaged in (b"Exif\0\0", b"Exif\0\0no EXIF", whole[:9], whole[:20], whole.replace(b"MM\0*", b"QQQQ", 1),
                        b"Exif\0\0" + b"\xff" * 60):  # fmt: skip
            np.testing.assert_array_equal(pixels(read(saved(photo(), kind, exif=damaged))), plain)


def test_sixteen_bits_and_floats_are_turned(read):
    for image, kind in (
        (ramp(np.uint16, 65535), "PNG"),
        (ramp(np.uint16, 65535), "TIFF"),
        (ramp(np.float32, 1), "TIFF"),
    ):
        upright = read(saved(image, kind)).transpose(Image.Transpose.ROTATE_270)
        np.testing.assert_array_equal(pixels(read(saved(image, kind, exif=exif(6)))), pixels(upright))


# ---- transparency ----


@pytest.mark.parametrize("kind", odd_images.TRANSPARENT)
def test_ink_on_nothing_is_ink_on_white(read, kind):
    ending, content = odd_images.TRANSPARENT[kind]
    if ending == "avif" and not features.check("avif"):
        pytest.skip("needs a Pillow that reads AVIF")
    expected = np.where(odd_images.ink()[..., None], 0, 255)
    np.testing.assert_allclose(pixels(read(content(), f"a.{ending}")), np.broadcast_to(expected, (16, 24, 3)), atol=2)


def test_half_transparent_is_half_way_to_white(read):
    image = photo().convert("RGBA")
    image.putalpha(Image.fromarray(np.linspace(0, 255, 384).reshape(16, 24).astype(np.uint8)))
    rgba = np.asarray(image).astype(float)
    alpha = rgba[..., 3:] / 255
    for kind, options in (("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True, "exact": True})):
        got = pixels(read(saved(image, kind, **options)))
        np.testing.assert_allclose(got, rgba[..., :3] * alpha + 255 * (1 - alpha), atol=1)


def test_a_transparent_image_is_turned_too(read):
    image = Image.new("RGBA", (6, 4), (0, 0, 0, 0))
    image.putpixel((0, 0), (200, 0, 0, 255))
    got = read(saved(image, "PNG", exif=exif(6)))
    assert (got.size, got.getpixel((3, 0)), got.getpixel((0, 0))) == ((4, 6), (200, 0, 0), (255, 255, 255))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "PA", "CMYK", "YCbCr"])
def test_what_is_opaque_keeps_its_pixels(read, tmp_path, mode):
    image = photo().convert("LA" if mode == "PA" else mode).convert(mode)
    kind = {"CMYK": "TIFF", "YCbCr": "TIFF", "PA": "TIFF"}.get(mode, "PNG")
    if mode == "PA":
        image, kind = image.convert("RGBA"), "PNG"
    path = save(image, tmp_path, f"a.{kind.lower()}")
    with Image.open(path) as again:
        np.testing.assert_array_equal(pixels(read_image(path)), pixels(again.convert("RGB")))


# ---- levels ----


def test_grey_of_sixteen_and_of_thirty_two_bits_keeps_its_levels(tmp_path):
    grey = np.arange(0, 65536, 4096, dtype=np.uint16).reshape(4, 4)
    got = np.array(read_image(save(Image.fromarray(grey), tmp_path, "a.png")))
    np.testing.assert_allclose(got, np.repeat(grey[..., None] / 257, 3, axis=2), atol=1)
    for level, expected in ((200, 200), (51400, 200), (70000, 255)):  # bytes, or sixteen bits
        path = save(Image.new("I", (4, 4), level), tmp_path, "a.tiff")
        assert set(np.array(read_image(path)).ravel()) == {expected}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 0.25, 0.5, 1], [0, 64, 128, 255]),
        ([0, 0.3, 0.6, 1], [0, 76, 153, 255]),
        ([0, 1, 1.2, 254.6], [0, 1, 1, 255]),
        ([7, 100.4, 200.6, 255], [7, 100, 201, 255]),
        ([0, 0, 0, 0], [0, 0, 0, 0]),
    ],
)
def test_floats_to_1_are_scaled_and_those_to_255_stay(read, values, expected):
    image = Image.fromarray(np.array([values], np.float32))
    for content in (saved(image, "TIFF"), saved(image, "TIFF", compression="tiff_lzw"), saved(image, "PPM")):
        assert pixels(read(content)).tolist() == [[[x] * 3 for x in expected]]


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ([-1, 0, 0.5, 1], "-1 to 1"),
        ([0, 3, 255, 256], "0 to 256"),
        ([-1e-3, 0, 100, 200], "-0.001 to 200"),
        ([0, 0.5, 1, np.nan], "0 to 1 and NaN or infinity"),
        ([0, 0.5, 1, np.inf], "0 to 1 and NaN or infinity"),
        ([np.nan] * 4, "nothing finite and NaN or infinity"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_other_floats_are_refused_with_their_range(read, values, found):
    content = saved(Image.fromarray(np.array([values], np.float32)), "TIFF")
    with pytest.raises(ImageError, match=rf"\(floats of {found}, expected 0 to 1 or 0 to 255\)"):
        read(content)


def test_lab_is_read(read):
    lab = ImageOps.grayscale(photo()).convert("RGB").convert("LAB")
    np.testing.assert_allclose(pixels(read(saved(lab, "TIFF"))), pixels(photo().convert("L").convert("RGB")), atol=4)
