"""Images as people have them: turned by EXIF, transparent in every way that Pillow writes, of 16 bits and of floats."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

ORIENTATION, MAKER = 274, 271
SIZE = (24, 16)


def photo(seed: int = 0, size: tuple[int, int] = SIZE) -> Image.Image:
    """Smooth colours, which tell every turn from every other, with a little noise."""
    rng = np.random.default_rng(seed)
    x, y = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]))
    channels = np.stack([200 * x, 200 * y, 100 + 100 * x * y], axis=-1) + rng.uniform(0, 40, (size[1], size[0], 1))
    return Image.fromarray(channels.astype(np.uint8))


def ramp(kind: type, highest: float) -> Image.Image:
    """Grey from 0 to the highest value."""
    return Image.fromarray(np.linspace(0, highest, SIZE[0] * SIZE[1]).reshape(SIZE[::-1]).astype(kind))


def exif(orientation: object = 6) -> Image.Exif:
    """EXIF with this orientation and a maker."""
    tags = Image.Exif()
    tags[ORIENTATION], tags[MAKER] = orientation, "a maker"
    return tags


def ink(size: tuple[int, int] = SIZE) -> np.ndarray:
    """Where there is ink (H, W): a bar from the left, and a dot."""
    mask = np.zeros((size[1], size[0]), bool)
    mask[4:8, :16] = mask[12, 20] = True
    return mask


def png(
    colour_type: int, depth: int, rows: list[bytes], trns: bytes | None = None, size: tuple[int, int] = SIZE
) -> bytes:
    """A PNG of a kind that Pillow does not write; ``rows`` are its lines of pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", *size, depth, colour_type, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    chunks = [chunk(b"IHDR", header), *([chunk(b"tRNS", trns)] if trns else []), chunk(b"IDAT", pixels)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + chunk(b"IEND", b"")


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    """The content of a file that Pillow writes."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _indexed() -> Image.Image:
    """Index 0 where there is none, 1 for ink: both black, as programs leave what is transparent."""
    image = Image.fromarray(ink().astype(np.uint8)).convert("P")
    image.putpalette([0, 0, 0] * 2)
    return image


def _grey() -> Image.Image:
    return Image.fromarray(np.where(ink(), 0, 9).astype(np.uint8))


def _alpha(mode: str) -> Image.Image:
    """Black everywhere, opaque where there is ink."""
    bands = [Image.new("L", SIZE, 0)] * (len(mode) - 1)
    return Image.merge(mode, [*bands, Image.fromarray(np.where(ink(), 255, 0).astype(np.uint8))])


def _sixteen(words: int, paper: list[int]) -> list[bytes]:
    """Rows of 16-bit samples: zeros for ink, ``paper`` elsewhere; a last channel of alpha is opaque in ink."""
    pixels = np.where(ink()[..., None], np.array([0, 0, 0, 65535][:words]), np.array(paper)).astype(">u2")
    return [row.tobytes() for row in pixels]


def _packed(depth: int, paper: int) -> list[bytes]:
    """Rows of grey samples of less than eight bits: 0 for ink, ``paper`` elsewhere."""
    bits = np.where(ink(), 0, paper)[..., None] >> np.arange(depth - 1, -1, -1) & 1  # (H, W, depth)
    return [np.packbits(row.ravel()).tobytes() for row in bits.astype(np.uint8)]


XPM = (
    '/* XPM */\nstatic char *x[] = {\n"24 16 2 1",\n"  c None",\n"x c #000000",\n'
    + "".join(f'"{"".join("x" if i else " " for i in row)}",\n' for row in ink())
    + "};\n"
).encode()

#: TIFF's tag ExtraSamples as Pillow writes it, and as it says that colours are multiplied by their alpha.
PREMULTIPLIED = b"\x52\1\3\0\1\0\0\0\2", b"\x52\1\3\0\1\0\0\0\1"

#: Black ink on nothing, in every way to be transparent: the file's ending, and its content.
TRANSPARENT: dict[str, tuple[str, Callable[[], bytes]]] = {
    "RGBA": ("png", lambda: saved(_alpha("RGBA"), "PNG")),
    "LA": ("png", lambda: saved(_alpha("LA"), "PNG")),
    "P, an index": ("png", lambda: saved(_indexed(), "PNG", transparency=0)),
    "P, bytes": ("png", lambda: saved(_indexed(), "PNG", transparency=b"\1\xff")),
    "L, a level": ("png", lambda: saved(_grey(), "PNG", transparency=9)),
    "RGB, a colour": ("png", lambda: saved(_grey().convert("RGB"), "PNG", transparency=(9, 9, 9))),
    "1, a bit": ("png", lambda: saved(Image.fromarray(~ink()), "PNG", transparency=1)),
    "2 bits, a level": ("png", lambda: png(0, 2, _packed(2, 2), b"\0\2")),
    "4 bits, a level": ("png", lambda: png(0, 4, _packed(4, 7), b"\0\7")),
    "16 bits, a level": ("png", lambda: png(0, 16, _sixteen(1, [300]), struct.pack(">H", 300))),
    "RGB of 16 bits, a colour": (
        "png",
        lambda: png(2, 16, _sixteen(3, [770, 5, 256]), struct.pack(">3H", 770, 5, 256)),
    ),
    "RGBA of 16 bits": ("png", lambda: png(6, 16, _sixteen(4, [0, 0, 0, 0]))),
    "GIF": ("gif", lambda: saved(_indexed(), "GIF", transparency=0)),
    "WebP": ("webp", lambda: saved(_alpha("RGBA"), "WEBP", lossless=True, exact=True)),
    "APNG": ("png", lambda: saved(_alpha("RGBA"), "PNG", save_all=True, append_images=[_alpha("RGBA").rotate(180)])),
    "ICO": ("ico", lambda: saved(_alpha("RGBA"), "ICO", sizes=[SIZE])),
    "RGBA in a TIFF": ("tif", lambda: saved(_alpha("RGBA"), "TIFF")),
    "LA in a TIFF": ("tif", lambda: saved(_alpha("LA"), "TIFF")),
    "La in a TIFF": ("tif", lambda: saved(_alpha("LA"), "TIFF").replace(*PREMULTIPLIED)),
    "RGBa in a TIFF": ("tif", lambda: saved(_alpha("RGBA"), "TIFF").replace(*PREMULTIPLIED)),
    "TGA": ("tga", lambda: saved(_alpha("RGBA"), "TGA")),
    "JPEG 2000": ("jp2", lambda: saved(_alpha("RGBA"), "JPEG2000")),
    "AVIF": ("avif", lambda: saved(_alpha("RGBA"), "AVIF", quality=100)),
    "QOI": ("qoi", lambda: saved(_alpha("RGBA"), "QOI")),
    "SGI": ("rgba", lambda: saved(_alpha("RGBA"), "SGI")),
    "DDS": ("dds", lambda: saved(_alpha("RGBA"), "DDS")),
    "XPM": ("xpm", lambda: XPM),
}

#: Other images that are read otherwise than by Pillow's ``convert("RGB")``, and two that are not.
ODD: dict[str, tuple[str, Callable[[], bytes]]] = {
    **TRANSPARENT,
    **{f"turned by {i}": ("jpg", lambda i=i: saved(photo(i), "JPEG", exif=exif(i))) for i in range(1, 9)},
    "turned PNG": ("png", lambda: saved(_alpha("RGBA"), "PNG", exif=exif(8))),
    "turned TIFF": ("tif", lambda: saved(photo(), "TIFF", exif=exif(5), compression="tiff_lzw")),
    "16 bits, turned": ("png", lambda: saved(ramp(np.uint16, 65535), "PNG", exif=exif(6))),
    "floats to 1": ("tif", lambda: saved(ramp(np.float32, 1), "TIFF", exif=exif(3))),
    "floats to 255": ("tif", lambda: saved(ramp(np.float32, 255), "TIFF")),
    "CMYK": ("jpg", lambda: saved(photo().convert("CMYK"), "JPEG")),
    "LAB": ("tif", lambda: saved(photo().convert("LAB"), "TIFF")),
}  # fmt: skip


def write(folder: Path, odd: dict[str, tuple[str, Callable[[], bytes]]]) -> dict[str, str]:
    """Writes images; returns their paths by their names."""
    paths = {}
    for number, (name, (ending, content)) in enumerate(odd.items()):
        path = folder / f"{number:02d}.{ending}"
        path.write_bytes(content())
        paths[name] = str(path)
    return paths
