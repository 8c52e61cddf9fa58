"""One image file: its pixels as RGB as people see them, and which files are images.

Everything that reads a user's image comes here, so that training, evaluation and the tools see the same pixels.
Source: Pillow, whose formats are taken as they are found in this installation, and ``ImageOps.exif_transpose``.  This
module must not know folders or data sets.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import stat
import threading
import warnings
from collections.abc import Iterator
from typing import IO

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError, features

from utils import image_ends
from utils.errors import UserError

#: What Pillow opens that are no photos and drawings, or that another program would have to draw.
NOT_TAKEN = frozenset({"BUFR", "EPS", "FITS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"})
#: What Pillow lists even where it lacks the codec, and its name of that.
CODECS = {"AVIF": "avif", "JPEG2000": "jpg_2000", "TIFF": "libtiff", "WEBP": "webp"}
#: Some of the endings that are taken, for messages.
KINDS = "jpg, png, gif, webp, tif, bmp and others that Pillow reads"

HEIF_ENDINGS = frozenset({".heic", ".heics", ".heif", ".heifs", ".hif"})
#: What such a file begins with after four bytes, whatever phones and messengers call it.
HEIF_BRANDS = tuple(b"ftyp" + brand for brand in (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1"))
HEIF_REMEDY = "pip install pillow_heif, or convert them to JPEG"
#: Endings of image formats that are not taken: photos and drawings, then camera raw.
OTHER_IMAGES = frozenset({
    ".ai", ".bpg", ".cdr", ".dcm", ".djvu", ".dpx", ".emf", ".emz", ".eps", ".epsf", ".exr", ".fit", ".fits", ".flif",
    ".hdp", ".hdr", ".jls", ".jng", ".jxl", ".jxr", ".kra", ".mng", ".ora", ".ps", ".psb", ".svg", ".svgz", ".wdp",
    ".wmf", ".wmz", ".xcf",
    ".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dcr", ".dng", ".erf", ".gpr", ".iiq", ".kdc", ".mef", ".mos", ".mrw",
    ".nef", ".nrw", ".orf", ".pef", ".ptx", ".raf", ".raw", ".rw2", ".rwl", ".sr2", ".srf", ".srw", ".x3f",
})  # fmt: skip

#: Undoes each value of the EXIF tag Orientation but 1.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
ALPHA_MODES = frozenset({"LA", "La", "PA", "RGBA", "RGBa"})
#: PNG names its transparent colour in samples as wide as the file's; so they become those of Pillow's pixels.
PNG_SAMPLES = {"L;2": lambda x: x * 85, "L;4": lambda x: x * 17, "RGB;16B": lambda x: tuple(v >> 8 for v in x)}
#: Errors of this machine that say nothing of the image.
MACHINE_ERRORS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})
#: Threads that look at images decode so many at once: many large ones would fill the memory.
DECODING = threading.BoundedSemaphore(4)
#: The modules whose warnings are of no use to users.
PILLOW = r"(PIL|pillow_heif)(\.|$)"


class ImageError(UserError):
    """Images of the user's cannot be read; the message names them all.

    Args:
        reasons: why, by the image's path.
    """

    def __init__(self, reasons: dict[str, str]) -> None:
        super().__init__(reasons)  # what pickling gives back to this method
        self.reasons = reasons

    @classmethod
    def joined(cls, errors: list[ImageError]) -> ImageError:
        """Returns one error of the images of several."""
        return cls({path: reason for e in errors for path, reason in e.reasons.items()})

    def __str__(self) -> str:
        if len(self.reasons) == 1:
            ((path, reason),) = self.reasons.items()
            return f"{path} cannot be read as an image ({reason}); repair or remove it"
        images = ", ".join(f"{path} ({reason})" for path, reason in self.reasons.items())
        return f"{len(self.reasons)} images cannot be read: {images}; repair or remove them"


# ---- which files are images ----


@functools.cache
def endings() -> frozenset[str]:
    """Returns the endings, such as ".jpg", of the files that are taken for images: what this Pillow decodes."""
    formats = {"MPO", *_formats()}  # an MPO is opened as a JPEG
    return frozenset(
        ending
        for ending, kind in Image.registered_extensions().items()
        if kind in formats and (kind not in CODECS or features.check(CODECS[kind]))
    )


def remedy(ending: str) -> str | None:
    """Returns what to do about image files of a format that is not taken; None if it is taken, or no image format."""
    if ending in endings():
        return None
    if ending in HEIF_ENDINGS:
        return HEIF_REMEDY
    if Image.registered_extensions().get(ending) in CODECS:
        return "pip install --upgrade Pillow, or convert them to JPEG"
    return "convert them to JPEG or PNG" if ending in OTHER_IMAGES else None


@functools.cache
def _formats() -> tuple[str, ...]:
    """Returns Pillow's names of the formats that are read here, after registering that of pillow_heif, if installed."""
    silence_pillow()
    Image.preinit()  # so that the usual formats are tried first
    Image.init()
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    return tuple(name for name in Image.ID if name not in NOT_TAKEN)


def silence_pillow() -> None:
    """Keeps what Pillow says of odd files off the user's screen: it reads them all the same, or raises.

    The filter stays, because ``warnings.catch_warnings`` is not for threads, and is set again where somebody else's
    came before it.
    """
    if (log := logging.getLogger("PIL")).level <= logging.CRITICAL:
        log.setLevel(logging.CRITICAL + 1)
    first = warnings.filters[0] if warnings.filters else None
    if first is None or getattr(first[3], "pattern", first[3]) != PILLOW:
        warnings.filterwarnings("ignore", module=PILLOW)


# ---- reading ----


def read_image(path: str) -> Image.Image:
    """Decodes an image of any mode as RGB, as people see it: turned as its EXIF says, transparency on white.

    Raises:
        ImageError: it cannot be decoded.
    """
    with errors_of(path), _open(path) as image:
        _widen_transparency(image)
        image.load()  # Pillow turns a TIFF itself here, and deletes its tag
        way, rgb = turn(image), to_rgb(image)
        return rgb if way is None else rgb.transpose(way)


@contextlib.contextmanager
def errors_of(path: str) -> Iterator[None]:
    """Makes of all that decoders raise, which are errors of many kinds, that image's error."""
    try:
        yield
    except (ImageError, MemoryError):
        raise
    except Exception as e:
        if isinstance(e, OSError) and e.errno in MACHINE_ERRORS:
            raise
        raise ImageError({str(path): _reason(e)}) from e


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "cannot identify image file"  # Pillow's text without the path
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__


def open_file(path: str) -> IO[bytes]:
    """Opens a file to read it, and nothing else: a pipe would be waited for."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError("it is not a file")
    return open(path, "rb")


@contextlib.contextmanager
def _open(path: str) -> Iterator[ImageFile.ImageFile]:
    """Opens an image; reads no more than its header where its format allows that."""
    silence_pillow()
    # Not by its path: Pillow 13 would map TIFFs into memory, and mix up the pixels of those turned by 90 degrees.
    with open_file(path) as f:
        try:
            image = Image.open(f, formats=_formats())
        except UnidentifiedImageError as e:
            f.seek(4)
            if f.read(8).startswith(HEIF_BRANDS):
                raise ValueError(f"images of HEIC are not read: {HEIF_REMEDY}") from e
            raise
        with image:
            yield image


def turn(image: Image.Image) -> Image.Transpose | None:
    """Returns what makes an image upright; None if nothing, or if its orientation cannot be read."""
    try:
        return TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except MemoryError:
        raise
    except Exception:
        return None


def _has_alpha(image: Image.Image) -> bool:
    in_palette = image.mode == "P" and image.palette is not None and image.palette.mode.endswith("A")
    return image.mode in ALPHA_MODES or "transparency" in image.info or in_palette


def _widen_transparency(image: ImageFile.ImageFile) -> None:
    """Makes a PNG's transparent colour comparable with pixels, before these are read."""
    samples = image.tile[0][3] if image.format == "PNG" and image.tile else None
    if samples in PNG_SAMPLES and "transparency" in image.info:
        image.info["transparency"] = PNG_SAMPLES[samples](image.info["transparency"])


def to_rgb(image: Image.Image) -> Image.Image:
    """Returns the image of any mode as RGB, transparency on white."""
    if image.mode == "F":
        return _from_float(np.asarray(image))
    if image.mode.startswith("I;16") or (image.mode == "I" and np.asarray(image).max() > 255):
        values = np.asarray(image)
        grey = (values.clip(0, 65535) >> 8).astype(np.uint8)  # Pillow would cut 16 bits off at 255
        if "transparency" in image.info:
            grey[values == image.info["transparency"]] = 255
        return Image.fromarray(grey).convert("RGB")
    if not _has_alpha(image):
        return image.convert("RGB")
    rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _from_float(values: np.ndarray) -> Image.Image:
    """Makes RGB of floats (H, W) from 0 to 1, or from 0 to 255."""
    low, high = values.min(), values.max()  # NaN if there is one
    if not (low >= 0 and high <= 255):
        finite = values[np.isfinite(values)]
        found = f"{finite.min():g} to {finite.max():g}" if len(finite) else "nothing finite"
        others = "" if len(finite) == values.size else " and NaN or infinity"
        raise ValueError(f"floats of {found}{others}, expected 0 to 1 or 0 to 255")
    return Image.fromarray((values * (255 if high <= 1 else 1)).round().astype(np.uint8)).convert("RGB")


# ---- looking ----


def look(path: str) -> frozenset[str]:
    """Looks at an image's header and at the end of its file; decodes it only where these leave a doubt.

    Damage in the middle may go unseen, but no image that ``read_image`` reads is refused.

    Returns:
        Its traits: "orientation" if EXIF turns it, "transparency" if it has an alpha channel or a transparent colour,
        "float" if its values are floats.

    Raises:
        ImageError: it cannot be read.
    """
    with errors_of(path):
        with _open(path) as image:
            found = {"float": image.mode == "F", "transparency": _has_alpha(image),
                     "orientation": image_ends.may_be_turned(image) and turn(image) is not None}  # fmt: skip
            in_doubt = found["float"] or not image_ends.is_whole(image)
        if in_doubt:
            with DECODING:
                read_image(path)
    return frozenset(name for name, has in found.items() if has)


def is_as_before(path: str) -> bool:
    """Returns true if an image has the pixels that earlier versions saw, which heeded neither EXIF nor transparency.

    Raises:
        ImageError: it cannot be read.
    """
    with errors_of(path), DECODING:
        with Image.open(path) as image:  # by its path, as they did
            if image.format != "TIFF" and turn(image) is not None:  # TIFFs are turned by Pillow
                return False
            image.info.pop("transparency", None)
            before = to_rgb(image) if image.mode.startswith("I") else image.convert("RGB")
        now = read_image(path)
        return (before.size, before.tobytes()) == (now.size, now.tobytes())
