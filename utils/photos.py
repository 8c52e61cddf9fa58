"""Photographs for training: of a JPEG, no more is decoded than its crop needs.

Three things make it faster than ``images.read_image``, a crop and a resize:

    scale     libjpeg decodes at 1/2, 1/4 or 1/8 of the size, where the crop is still large enough (Pillow's ``draft``)
    rows      it decodes none below the crop
    torch     torchvision's decoder and torch's resize of uint8, which give Pillow's levels, to one level

The first alone changes what a crop looks like, by the little that docs/deviations.md shows.  All that is not a plain
JPEG, or not in order, is left to ``read_image``, which reads it or names it in its error.
Sources: ITU-T T.81 for the frame header; libjpeg-turbo's ``jdmaster.c`` for scales.  This module must not draw crops.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import importlib.util
import io
import os
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFile
from torch import Tensor
from torch.utils.data import get_worker_info

from utils import image_ends, images

#: The ways of --jpeg_decoding: this module's, and ``images.read_image``'s.
SCALED, FULL = "scaled", "full"
#: Images of other names are read by Pillow alone, whatever is in them.
ENDINGS = (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo")
#: A crop keeps at least so many pixels for each of the result's, along both sides.
LEAST_RATIO = 2
SCALES = (8, 4, 2)
#: Frame headers: baseline, extended and progressive, all by Huffman's code.
FRAMES = (0xC0, 0xC1, 0xC2)
START_OF_SCAN, END_OF_IMAGE = 0xDA, 0xD9
#: libjpeg interpolates colours between rows: it reads one more of them, which is two of the image, below the last.
ROWS_BELOW = 2
RGB = 3  # of torchvision's ImageReadMode

T = Image.Transpose
#: What a turn does to an image's rows and columns, in this order: reverse the rows, reverse the columns, swap them.
REVERSALS = {
    None: (False, False, False),
    T.FLIP_LEFT_RIGHT: (False, True, False),
    T.ROTATE_180: (True, True, False),
    T.FLIP_TOP_BOTTOM: (True, False, False),
    T.TRANSPOSE: (False, False, True),
    T.ROTATE_270: (True, False, True),
    T.TRANSVERSE: (True, True, True),
    T.ROTATE_90: (False, True, True),
}

Box = tuple[int, int, int, int]  # top, left, height, width, in pixels


def is_taken(path: str) -> bool:
    """Returns true of a name that a JPEG has."""
    return path.lower().endswith(ENDINGS)


def read_crop(path: str, choose: Callable[[int, int], Box], out_size: int) -> Tensor | None:
    """Decodes what a crop of a JPEG needs, and resizes it to a square.

    Args:
        path: of the image.
        choose: gives the crop of an image of some height and width, as people see it.
        out_size: side of the result in pixels.

    Returns:
        (3, out_size, out_size) uint8; None of what ``images.read_image`` is to read, or to refuse.

    Raises:
        OSError, MemoryError: the machine lacks open files or memory.
    """
    if not is_taken(path):
        return None
    images.silence_pillow()
    try:
        with images.errors_of(path):
            with images.open_file(path) as f:
                data = f.read()
            if (at := _frame_at(data)) is None:
                return None
            with _open(data) as image:  # heeds the limit of pixels
                turn = images.turn(image) if image_ends.may_be_turned(image) else None
                swapped = REVERSALS[turn][2]
                seen = choose(*(image.size if swapped else image.size[::-1]))
                box = _as_stored(seen, turn, *image.size[::-1])
                square = _decode(image, data, at, box, out_size)
    except images.ImageError:  # Pillow's is the one to tell
        return None
    return torch.from_numpy(np.array(_turned(square, turn).transpose(2, 0, 1), order="C"))  # twice as fast as torch


def _open(data: bytes) -> ImageFile.ImageFile:
    return Image.open(io.BytesIO(data), formats=("JPEG",))  # type: ignore[return-value]


def _frame_at(data: bytes) -> int | None:
    """Returns where the frame header is, behind whose length and precision are the height and the width.

    None of a JPEG of other frames: lossless, or in arithmetic code.
    """
    at = 2
    while data[at] == 0xFF and (marker := data[at + 1]) not in (START_OF_SCAN, END_OF_IMAGE):
        if marker in FRAMES:
            return at
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


def _without_rows_below(data: bytes, at: int, bottom: int) -> bytes:
    """Makes a JPEG end at a row: decoders look no further."""
    height = int.from_bytes(data[at + 5 : at + 7], "big")
    return data if bottom >= height else b"".join((data[: at + 5], bottom.to_bytes(2, "big"), data[at + 7 :]))


# ---- turns ----


def _as_stored(box: Box, turn: T | None, height: int, width: int) -> Box:
    """Returns where a crop of the turned image lies in the image of this size as its file has it."""
    top, left, h, w = box
    rows_reversed, columns_reversed, swapped = REVERSALS[turn]
    if swapped:
        top, left, h, w = left, top, w, h
    return height - top - h if rows_reversed else top, width - left - w if columns_reversed else left, h, w


def _turned(x: np.ndarray, turn: T | None) -> np.ndarray:
    """Turns pixels (H, W, 3); copies nothing."""
    rows_reversed, columns_reversed, swapped = REVERSALS[turn]
    x = x[:: -1 if rows_reversed else 1, :: -1 if columns_reversed else 1]
    return x.transpose(1, 0, 2) if swapped else x


# ---- decoding ----


def scale_of(height: int, width: int, out_size: int) -> int:
    """Returns the largest reduction at which a crop of this size is still large enough."""
    least = LEAST_RATIO * out_size
    return next((scale for scale in SCALES if min(height, width) >= least * scale), 1)


def _decode(image: ImageFile.ImageFile, data: bytes, at: int, box: Box, out_size: int) -> np.ndarray:
    """Returns a crop of a JPEG, whose frame header is at ``at``, as (out_size, out_size, 3) uint8."""
    top, left, height, width = box
    scale = scale_of(height, width, out_size)
    data = _without_rows_below(data, at, top + height + ROWS_BELOW * scale)
    if scale > 1:
        return _scaled(data, box, scale, out_size)
    x = None if image.mode not in ("RGB", "L") else _by_torchvision(data)
    if x is None:
        with _open(data) as image:
            crop = images.to_rgb(image.crop((left, top, left + width, top + height)))
        x = torch.from_numpy(np.array(crop)).permute(2, 0, 1)  # (3, height, width)
    else:
        x = x[:, top : top + height, left : left + width]
    # Torch is the fastest with pixels whose colours lie side by side, as they are decoded, and without gaps.
    x = x[None].contiguous(memory_format=torch.channels_last)
    x = F.interpolate(x, (out_size, out_size), mode="bilinear", antialias=True)
    return x[0].permute(1, 2, 0).numpy()


def _scaled(data: bytes, box: Box, scale: int, out_size: int) -> np.ndarray:
    """As ``_decode``, at 1 / ``scale`` of the size: Pillow cuts and weighs parts of pixels, torch does not."""
    with _open(data) as image:
        image.draft(None, (image.width // scale, image.height // scale))
        top, left, bottom, right = (x / scale for x in (box[0], box[1], box[0] + box[2], box[1] + box[3]))
        x, y = int(left), int(top)
        cut = images.to_rgb(image.crop((x, y, -int(-right // 1), -int(-bottom // 1))))
        square = cut.resize((out_size,) * 2, Image.Resampling.BILINEAR, (left - x, top - y, right - x, bottom - y))
    return np.asarray(square)


def _by_torchvision(data: bytes) -> Tensor | None:
    """Decodes a JPEG as (3, H, W) uint8, a fifth faster than Pillow; None in the run's own process.

    It tells of every oddity, rows that nobody reads included, on stderr: only a worker can close that meanwhile.
    """
    decode = _torchvision() if get_worker_info() is not None else None
    if decode is None:
        return None
    with _nothing_on_stderr():
        return decode(torch.frombuffer(bytearray(data), dtype=torch.uint8), RGB, False)


@functools.cache
def _torchvision() -> Callable[[Tensor, int, bool], Tensor] | None:
    """Returns torchvision's decoder; None where it has none.

    Its library alone is loaded: the rest of torchvision takes more than a second of every worker to import.
    """
    spec = importlib.util.find_spec("torchvision")
    for library in glob.glob(os.path.join(os.path.dirname(str(spec and spec.origin)), "image*.so")):
        with contextlib.suppress(OSError, AttributeError):
            torch.ops.load_library(library)
            return torch.ops.image.decode_jpeg
    return None


@contextlib.contextmanager
def _nothing_on_stderr() -> Iterator[None]:
    """Sends what this process writes to stderr to nowhere."""
    stderr = os.dup(2)
    try:
        os.dup2(_nowhere(), 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


@functools.cache
def _nowhere() -> int:
    """Returns a descriptor that this process keeps, and that takes whatever is written."""
    return os.open(os.devnull, os.O_WRONLY)
