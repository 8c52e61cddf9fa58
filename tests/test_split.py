"""Which images of a class are tested on, where no part of the folder says so."""

import hashlib
import os
import unicodedata

import pytest

from utils.split import position, to_test_on

NAMES = [f"more/IMG_{i}.jpg" for i in range(10_000)]


@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.5, 0.9])
def test_a_share_of_the_names_is_tested_on_in_expectation(fraction):
    error = (fraction * (1 - fraction) / len(NAMES)) ** 0.5
    assert abs(len(to_test_on(NAMES, fraction)) / len(NAMES) - fraction) < 4 * error
    assert to_test_on(NAMES, 0.01) < to_test_on(NAMES, fraction + 0.05)


def test_a_position_is_the_sha256_of_the_name():
    for name in ("0.png", "a/b c.png", "猫.png"):
        expected = int(hashlib.sha256(name.encode()).hexdigest(), 16) / 2**256
        assert position(name) == pytest.approx(expected, abs=1e-15)
        assert 0 <= position(name) < 1
    # Fixed for ever: metadata of checkpoints rely on it.
    assert to_test_on([f"{i}.png" for i in range(20)], 0.2) == {f"{i}.png" for i in (0, 6, 7, 8, 14, 18)}


def test_names_that_are_added_move_no_others():
    before = to_test_on(NAMES[:1000], 0.2)
    after = to_test_on(NAMES, 0.2)
    assert after & {*NAMES[:1000]} == before
    assert to_test_on(reversed(NAMES), 0.2) == after


def test_both_unicode_forms_of_a_name_are_on_one_side():
    for i in range(50):
        composed = f"café {i}.jpg"
        assert position(composed) == position(unicodedata.normalize("NFD", composed))


def test_a_name_of_no_encoding_has_a_position():
    assert position(os.fsdecode(b"\xff.jpg")) != position(os.fsdecode(b"\xfe.jpg"))


def test_a_side_without_a_name_gets_the_nearest_and_that_alone_moves():
    names = sorted(NAMES[:40], key=position)
    low, high = names[:5], names[-5:]
    assert to_test_on(high, 0.2) == {high[0]}  # all of them would be trained on
    assert to_test_on(low, 0.9) == {*low[:-1]}  # all of them would be tested on
    assert to_test_on([*high, *low], 0.5) == {*low}  # each side has its own
    assert to_test_on(["a.jpg"], 0.2) == {"a.jpg"}


def test_a_share_of_one_is_all_of_them():
    assert to_test_on(NAMES[:7], 1) == {*NAMES[:7]}
