"""All tools share these: help with an example that is true, errors of one line, exit codes, checks of --output."""

import importlib
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tools import _cli
from utils import memory
from utils.errors import UserError

TOOLS = sorted(path.stem for path in (REPOSITORY / "tools").glob("*.py") if "__main__" in path.read_text())


def test_these_are_the_tools():
    assert TOOLS == ["attention_map", "convert", "download", "export", "predict", "reproduce"]


@pytest.mark.parametrize("name", TOOLS)
def test_help_has_examples_that_the_tool_takes(name, capsys, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    tool = importlib.import_module(f"tools.{name}")
    with pytest.raises(SystemExit) as ended:
        tool.main(["--help"])
    assert ended.value.code == 0
    start = f"python -m tools.{name} "
    examples = [line.strip() for line in capsys.readouterr().out.splitlines() if line.strip().startswith(start)]
    assert examples
    for example in examples:
        tool.make_parser().parse_args(shlex.split(example)[3:])


@pytest.mark.parametrize("name", TOOLS)
def test_an_unknown_flag_is_one_line_and_status_2(name, capsys):
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"tools.{name}").main(["--turbo"])
    assert ended.value.code == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(f"tools.{name}: error: ")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UserError("two\nlines"), 2),
        (OSError("two\nlines"), 1),
        (memory.OutOfMemory("two\nlines"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_an_error_is_one_line_and_a_status(error, status, capsys):
    def body():
        raise error

    assert _cli.run("x", body) == status
    words = "interrupted" if isinstance(error, KeyboardInterrupt) else "two lines"
    assert capsys.readouterr().err == f"tools.x: error: {words}\n"


def test_what_only_we_can_mend_is_not_hidden():
    def body():
        raise KeyError("a mistake of ours")

    with pytest.raises(KeyError):
        _cli.run("x", body)


def test_a_tool_ends_well_when_its_reader_leaves():
    command = [sys.executable, "-m", "tools.download", "--list"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.communicate(timeout=120)[1] == b""
    assert process.returncode == 141


def test_names_that_cannot_be_printed_are_spelled_out(monkeypatch, tmp_path):
    with open(tmp_path / "out", "w", encoding="ascii") as f:
        monkeypatch.setattr(sys, "stdout", f)
        assert _cli.run("x", lambda: print("caf\xe9") or 0) == 0
    assert (tmp_path / "out").read_text() == "caf\\xe9\n"


def test_a_file_that_is_written_gets_its_folder_and_replaces_nothing_that_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("read").write_text("mine")
    os.symlink("read", "link")
    os.mkdir("folder")
    _cli.check_output("new/deeper/file", "read")
    assert os.path.isdir("new/deeper")
    _cli.check_output("file", "read")
    wrong = {"read": "replace", "./link": "replace", "folder": "is a folder", "read/x": "written", "": "is empty"}
    for path, words in wrong.items():
        with pytest.raises(ValueError, match=words):
            _cli.check_output(path, "read")
    assert Path("read").read_text() == "mine"
