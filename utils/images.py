"""One image file: decodes images of any mode as RGB, and knows the endings of files that are images.

Everything that reads a user's image comes here, so that training, evaluation and the tools see the same pixels.  This
module must not know folders or data sets.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from utils.errors import UserError

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


class ImageError(UserError):
    """An image of the user's cannot be read; the message names its path."""


def read_image(path: str) -> Image.Image:
    """Decodes an image of any mode as RGB.

    Raises:
        ImageError: it cannot be decoded.
    """
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I;16") or (image.mode == "I" and image.getextrema()[1] > 255):
                grey = np.asarray(image).clip(0, 65535) >> 8  # Pillow would cut 16 bits off at 255
                return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as e:
        raise ImageError(f"{path} cannot be read as an image ({e}); repair or remove it") from e


def endings() -> frozenset[str]:
    return frozenset(EXTENSIONS)


def remedy(ending: str) -> str | None:
    return {".heic": "pip install pillow_heif, or convert them to JPEG", ".cr2": "convert them to JPEG or PNG"}.get(
        ending
    )
