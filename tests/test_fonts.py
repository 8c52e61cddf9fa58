"""Texts in images: which can be drawn, by which font, and what stands in their place."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from utils import fonts

NAMES = ["cat", "Käfer", "собака", "猫", "שלום", "\U0001f600", "a\udcff", "two\nlines"]


@pytest.fixture
def no_fonts(monkeypatch):
    monkeypatch.setattr(fonts, "FONTS", ())


def test_without_fonts_what_is_no_ascii_becomes_a_number(no_fonts):
    assert fonts.drawable_names(NAMES) == ["cat", *(f"class {i}" for i in range(1, len(NAMES)))]
    assert fonts.legend(["cat", "dog"]) == ""
    assert fonts.legend(["cat", "猫"]).endswith("\n* class 1: 猫")


def draw(text):
    image = Image.new("L", (200, 40), 255)
    ImageDraw.Draw(image).text((4, 4), text, 0, fonts.font_for(text, 20))
    return np.asarray(image)


@pytest.mark.parametrize("name", ["собака", "猫", "Käfer"])
def test_a_font_of_this_machine_draws_a_name_as_it_is(name):
    if fonts.drawable(name, "class 7") != name:
        pytest.skip(f"needs a font with {name}, which this machine lacks")
    assert fonts.legend([name]) == ""
    drawn = [draw(character) for character in dict.fromkeys(name)]
    drawn.append(draw("\U0010ffff"))  # which no font has: the sign for a missing character
    for i, one in enumerate(drawn):
        assert (one < 128).any()
        assert not any(np.array_equal(one, other) for other in drawn[:i])


def test_files_that_are_no_fonts_or_lack_a_character_are_passed_over(tmp_path, monkeypatch):
    broken = tmp_path / "broken.ttf"
    broken.write_bytes(b"no font")
    monkeypatch.setattr(fonts, "FONTS", (str(broken), str(tmp_path / "missing.ttf")))
    assert fonts.drawable("猫", "class 7") == "class 7"
    assert fonts.drawable("cat", "class 7") == "cat"


def test_control_characters_and_halves_of_characters_are_never_drawn():
    assert fonts.drawable_names(["a\udcff", "two\nlines", "\x00"]) == ["class 0", "class 1", "class 2"]


def test_a_text_is_cut_to_what_fits():
    font = fonts.font_for("cat", 14)
    assert fonts.fitting("cat", 1000, 14) == "cat"
    cut = fonts.fitting("a very long name of a class", 60, 14)
    assert "a very long name of a class".startswith(cut)
    assert 40 < font.getlength(cut) <= 60
