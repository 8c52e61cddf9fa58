"""Every error and warning of docs/errors.md is brought about: its exit code, its one line, what it leaves behind."""

from __future__ import annotations

import re

import pytest

import train
from tests.helpers import errors
from tests.helpers.error_faults import FAULTS
from tests.helpers.error_inputs import INPUTS, finetuned
from tests.helpers.error_ranks import RANKS
from tests.helpers.error_tools import TOOLS
from tests.helpers.error_warnings import WARNINGS
from tests.helpers.runs import RUN

GROUPS = [*INPUTS, *RANKS, *FAULTS, *WARNINGS, *TOOLS]
CASES = [(group, case) for group in GROUPS for case in group.cases]


@pytest.fixture(scope="module")
def new_rows(request):
    """Rows by their ids; --write_errors puts them on the page."""
    rows = {}
    yield rows
    if request.config.getoption("--write_errors"):
        errors.write_page(GROUPS, rows)


@pytest.mark.parametrize(("group", "case"), CASES, ids=[case.id for _, case in CASES])
def test_it_is_one_line_with_its_exit_code(group, case, tmp_path, monkeypatch, new_rows):
    monkeypatch.chdir(tmp_path)
    new_rows[case.id] = errors.row(case, errors.message_of(group, case))


def test_the_page_has_these_errors_with_their_exit_codes(request):
    codes = {case.id: case.code for _, case in CASES}
    assert len(codes) == len(CASES), "an id twice"
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name) for name in codes)
    if not request.config.getoption("--write_errors"):
        assert errors.codes_of(errors.PAGE.read_text(encoding="utf-8")) == codes, "make errors writes the page anew"


@pytest.mark.parametrize("bug", [ValueError, KeyError, RuntimeError])
@pytest.mark.parametrize("flags", [["--num_steps", "1", "--warmup_steps", "0"], ["-v", "--compile"]])
def test_a_bug_keeps_its_traceback(bug, flags, tmp_path, monkeypatch):
    def evaluate(*args, **kwargs):
        raise bug("of ours")

    monkeypatch.chdir(tmp_path)
    finetuned()()
    monkeypatch.setattr(train, "evaluate", evaluate)
    with pytest.raises(bug, match="of ours"):
        train.main([*RUN, *flags])
