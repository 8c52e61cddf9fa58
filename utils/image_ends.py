"""The ends of image files: tells from a few bytes that a file has not been cut off, and that EXIF may turn an image.

Sources: the formats' specifications (JPEG: ITU-T T.81; PNG; GIF89a; RIFF; BMP; TIFF 6.0; ISO 14496-12 for the boxes of
AVIF, HEIF and JPEG 2000).  A no means doubt, never that a file is bad.  This module must not decode.
"""

from __future__ import annotations

import os
import re
import struct
from typing import IO, Any

from PIL import ImageFile

PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
#: Where a JPEG's end is looked for: phones append up to so many bytes of their own to it.
JPEG_TAILS = (2**12, 2**20)
#: The box that has the pixels.
PIXEL_BOXES = {"AVIF": b"mdat", "HEIF": b"mdat", "JPEG2000": b"jp2c"}
#: TIFF's tags of where strips and tiles are, and of their lengths.
STRIPS, TILES = (273, 279), (324, 325)
#: Bytes of a value of each type of TIFF's.
TIFF_BYTES = dict(enumerate((1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4), start=1))
#: EXIF's entry of an orientation other than 1, in both orders of bytes: its tag, type, count and value.
TURNED = re.compile(
    rb"\x01\x12\x00(\x03\x00\x00\x00\x01\x00[\x02-\x08]|\x04\x00\x00\x00\x01\x00\x00\x00[\x02-\x08])"
    rb"|\x12\x01[\x03\x04]\x00\x01\x00\x00\x00[\x02-\x08]\x00"
)


def may_be_turned(image: ImageFile.ImageFile) -> bool:
    """Returns false if an image that was just opened has no orientation or a plain one: faster than reading EXIF."""
    exif, xmp = image.info.get("exif") or b"", str(image.info.get("xmp") or image.info.get("XML:com.adobe.xmp") or "")
    others = image.format == "TIFF" or "Raw profile type exif" in image.info
    return others or "Orientation" in xmp or TURNED.search(exif) is not None


def is_whole(image: ImageFile.ImageFile) -> bool:
    """Returns true if an image's file, which was just opened, is certain not to be cut off."""
    try:
        return image.fp is not None and _is_whole(image, image.fp)
    except Exception:  # of an odd header, which decoding may not need
        return False


def _is_whole(image: Any, f: IO[bytes]) -> bool:
    size, kind = os.fstat(f.fileno()).st_size, image.format
    if kind in ("JPEG", "MPO"):
        return bool(image.tile) and _has_jpeg_end(f, size)
    if kind == "PNG":
        f.seek(size - len(PNG_END))
        return f.read() == PNG_END
    if kind == "GIF":
        return _has_gif_frame(f, image.tile[0][2])
    if kind == "WEBP":
        f.seek(4)
        return int.from_bytes(f.read(4), "little") + 8 <= size
    if kind == "TIFF":
        return _has_directory(f, size) and _has_strips(image.tag_v2, size)
    if kind in PIXEL_BOXES:
        return _has_boxes(f, size, PIXEL_BOXES[kind])
    return _has_rows(image.tile, size)


def _has_jpeg_end(f: IO[bytes], size: int) -> bool:
    """Looks for the marker of the end after the header: among the pixels 0xff is followed by other bytes."""
    header = f.tell()
    for length in JPEG_TAILS:
        f.seek(max(header, size - length))
        if b"\xff\xd9" in f.read():
            return True
    return False


def _has_gif_frame(f: IO[bytes], offset: int) -> bool:
    """Follows the blocks of the first frame, each after its length, to the empty one."""
    f.seek(offset)
    while (length := f.read(1)) > b"\0":
        f.seek(length[0], os.SEEK_CUR)
    return length == b"\0"


def _has_directory(f: IO[bytes], size: int) -> bool:
    """Tells from the entries of a TIFF's directory that their values, and it itself, are in the file."""
    f.seek(0)
    order = "<" if f.read(2) == b"II" else ">"
    version, at = struct.unpack(order + "HI", f.read(6))
    f.seek(at)
    (count,) = struct.unpack(order + "H", f.read(2))
    entries = f.read(count * 12 + 4)  # the last 4 bytes lead to the next directory
    ends = (
        value + n * TIFF_BYTES[kind] if n * TIFF_BYTES[kind] > 4 else 0
        for _, kind, n, value in struct.iter_unpack(order + "HHII", entries[:-4])
    )
    return version == 42 and len(entries) == count * 12 + 4 and max(ends) <= size


def _has_strips(tags: Any, size: int) -> bool:
    offsets, lengths = STRIPS if STRIPS[0] in tags else TILES
    pairs = list(zip(tags[offsets], tags[lengths], strict=True))
    return bool(pairs) and all(length and offset + length <= size for offset, length in pairs)


def _has_boxes(f: IO[bytes], size: int, needed: bytes) -> bool:
    """Follows the boxes, each of which begins with its length, to the end of the file."""
    at, kinds = 0, set()
    while at < size:
        f.seek(at)
        head = f.read(16)
        length = int.from_bytes(head[:4], "big")
        if length == 1:
            length = int.from_bytes(head[8:], "big")
        if length < 8:
            return False
        kinds.add(head[4:8])
        at += length
    return at == size and needed in kinds


def _has_rows(tiles: list[Any], size: int) -> bool:
    """Tells from the length of a row that all are there; not all formats without compression say it."""
    return bool(tiles) and all(
        codec == "raw" and args[1] > 0 and offset + args[1] * (box[3] - box[1]) <= size
        for codec, box, offset, args in tiles
    )
