"""Ctrl-C and SIGTERM: the step in hand is finished and saved; a second one ends the run at once, files whole."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest

import train
from tests.helpers.boundaries import signalled_at
from tests.helpers.forked import Forked, run_forked
from tests.helpers.runs import (
    ROOT,
    SHORT,
    assert_same,
    every_name_is_whole,
    last_state,
    outcome,
    several_sizes,
    short_run,
    undisturbed,
    write_images,
)

SIGNALS = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])


@pytest.fixture(autouse=True)
def _folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_images(sizes=several_sizes())


def resumes_as_if_undisturbed():
    assert [f for f in os.listdir("output") if f.endswith(".tmp")] == []
    assert short_run() == 0
    assert_same(outcome(), undisturbed(images=lambda: None))
