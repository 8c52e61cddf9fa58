"""Fonts of this machine that have the characters of a text, for names of classes in any script.

Pillow's own font has little more than ASCII.  Where no font has a name, images show the number of the class and
``legend`` the name, for whatever shows text.  This module must not draw.
"""

from __future__ import annotations

import functools
import sys
import unicodedata
from collections.abc import Sequence

from PIL import ImageFont, features
from PIL.ImageFont import FreeTypeFont

#: The files under Linux, macOS and Windows; Pillow looks for them where the system keeps its fonts.
FONTS = {
    "linux": ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "NotoSansCJK-Regular.ttc", "NotoSansCJK-VF.ttc",
              "wqy-microhei.ttc", "wqy-zenhei.ttc", "DroidSansFallbackFull.ttf", "NotoSansThai-Regular.ttf",
              "NotoSansDevanagari-Regular.ttf", "FreeSerif.ttf"),
    "darwin": ("Arial.ttf", "PingFang.ttc", "Hiragino Sans GB.ttc", "STHeiti Light.ttc", "Arial Unicode.ttf"),
    "win32": ("segoeui.ttf", "msyh.ttc", "simsun.ttc", "YuGothM.ttc", "malgun.ttf", "Nirmala.ttf", "LeelawUI.ttf"),
}.get(sys.platform, ())  # fmt: skip


def drawable_names(classes: Sequence[str]) -> list[str]:
    """Returns the names as images can show them: one that no font of this machine can draw becomes "class 7"."""
    return [drawable(name, f"class {i}") for i, name in enumerate(classes)]


def legend(classes: Sequence[str]) -> str:
    """Returns the names of the classes of which images show only the number, as Markdown; empty if there are none."""
    missing = [f"* class {i}: {name}" for i, name in enumerate(classes) if drawable(name, "") != name]
    lines = ["No font of this machine can draw these names:\n", *missing] if missing else []
    return "\n".join(lines).encode("utf-8", "backslashreplace").decode()  # a folder's name may be no text


def drawable(text: str, instead: str) -> str:
    """Returns the text if a font of this machine has all its characters, else the other, which needs no such font."""
    return text if _file_for(text) is not None else instead


def font_for(text: str, size: int) -> FreeTypeFont:
    """Returns the first font that has all characters of a text; Pillow's own if none has."""
    font = _load(_file_for(text) or "", size)
    assert font is not None
    return font


def fitting(text: str, width: float, size: int) -> str:
    """Returns as much of a text as ``width`` pixels hold in a font of that size."""
    font = font_for(text, size)
    while text and font.getlength(text) > width:
        text = text[:-1]
    return text


def _file_for(text: str) -> str | None:
    """Returns the first font's file, "" for Pillow's own, that has all characters; control characters are in none."""
    if not text.isprintable() or (_needs_shaping(text) and not features.check("raqm")):
        return None
    return next((file for file in ("", *FONTS) if all(_has(file, c) for c in text if c != " ")), None)


def _needs_shaping(text: str) -> bool:
    """Tells if letters run from right to left or join others, which Pillow leaves to Raqm."""
    return any(unicodedata.bidirectional(c) in ("R", "AL") or unicodedata.combining(c) for c in text)


@functools.cache
def _load(file: str, size: int) -> FreeTypeFont | None:
    """Returns Pillow's own font, or the one of a file; None if this machine has no such file."""
    try:
        font = ImageFont.truetype(file, size) if file else ImageFont.load_default(size)
    except OSError:
        return None
    assert isinstance(font, FreeTypeFont)  # wheels of Pillow are built with FreeType
    return font


@functools.cache
def _has(file: str, character: str) -> bool:
    """Tells if a font has a character: it looks unlike U+10FFFF, which is none and drawn as the sign for that."""
    if (font := _load(file, 14)) is None:
        return False
    drawn, missing = (font.getmask(c) for c in (character, "\U0010ffff"))
    return (drawn.size, bytes(drawn)) != (missing.size, bytes(missing))
