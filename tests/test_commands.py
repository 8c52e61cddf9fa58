"""Commands in messages work from the folder the user is in, and the tools as files from any folder."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import train
from models import commands, published
from tests.conftest import REPOSITORY
from tests.test_cli import TOOLS

#: Runs every tool that is named as a file, in one process: each must find its imports by itself.
RUN_AS_FILES = """
import runpy, sys
paths = list(sys.path)
for path in sys.argv[1:]:
    for name in [x for x in sys.modules if x.split(".")[0] in ("models", "utils", "tools", "train")]:
        del sys.modules[name]
    sys.path[:], sys.argv[:] = paths, [path, "--help"]
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as e:
        print(f"STATUS {path} {e.code}")
"""


def start(words: list[str], folder: Path) -> subprocess.CompletedProcess:
    """Runs a command of this Python in a folder, with nothing that leads to the repository but the command itself."""
    environment = {k: x for k, x in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


def test_in_the_root_commands_are_short(monkeypatch, tmp_path):
    (tmp_path / "link").symlink_to(REPOSITORY)
    for root in (REPOSITORY, tmp_path / "link"):
        monkeypatch.chdir(root)
        download = commands.tool_command("download", "ViT-B_32", "--to", "my files")
        assert download == "python -m tools.download ViT-B_32 --to 'my files'"
        assert commands.train_command("--name", "a") == "python train.py --name a"
        assert commands.own_path("checkpoint", "x.npz") == "checkpoint/x.npz"


def test_elsewhere_commands_name_the_files(monkeypatch, tmp_path):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert os.path.isabs(commands.own_path("train.py"))  # a folder that is gone is not the root
    monkeypatch.chdir(tmp_path)
    words = shlex.split(commands.tool_command("download", "ViT-B_32", "--to", "my files"))
    assert words == ["python", str(REPOSITORY / "tools" / "download.py"), "ViT-B_32", "--to", "my files"]
    assert shlex.split(commands.train_command("-v"))[1:] == [str(REPOSITORY / "train.py"), "-v"]
    assert os.path.isfile(commands.own_path("checkpoint", "ViT-demo.npz"))
    monkeypatch.setattr(commands, "ROOT", str(tmp_path / "my code"))
    words = shlex.split(commands.tool_command("predict", "a b.png"))
    assert words == ["python", str(tmp_path / "my code" / "tools" / "predict.py"), "a b.png"]


def test_lines_of_python_import_from_the_users_folder(monkeypatch, tmp_path):
    for folder in (REPOSITORY, tmp_path):
        monkeypatch.chdir(folder)
        lines = commands.import_lines()
        assert (lines == "") == (folder == REPOSITORY)
        done = start(["-c", f"{lines}from models.configs import CONFIGS; print(len(CONFIGS))"], folder)
        assert int(done.stdout) > 1, done.stderr


def test_every_tool_runs_as_a_file_and_its_help_has_examples_for_that_folder(tmp_path):
    (tmp_path / "utils").mkdir()  # a folder of the user's whose name is one of ours
    (tmp_path / "utils" / "__init__.py").touch()
    paths = [str(REPOSITORY / "tools" / f"{name}.py") for name in TOOLS]
    link = tmp_path / "link.py"
    link.symlink_to(paths[0])
    done = start(["-c", RUN_AS_FILES, *paths, str(link)], tmp_path)
    assert re.findall(r"STATUS (.*) 0", done.stdout) == [*paths, str(link)], done.stderr
    for path in paths:
        assert f"    python {shlex.quote(path)} " in done.stdout
    assert "python -m tools." not in done.stdout


def test_a_remedy_is_a_command_that_works_where_it_is_printed(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--name", "a", "--dataset", "digits", "--device", "cpu", "--model_type", "ViT-B_32"]
    assert train.main([*flags, "--pretrained_dir", "my files/ViT-B_32.npz"]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    words = shlex.split(error.split("download it with: ")[1])
    assert words[0] == "python"
    done = start([*words[1:], "--list"], tmp_path)  # the same command, but without the network
    assert done.returncode == 0, done.stderr
    assert re.search(r"^ViT-B_32 +imagenet21k +my files/ViT-B_32\.npz ", done.stdout, re.MULTILINE)


def test_the_demos_weights_are_named_as_they_are_reached(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="this repository comes with ") as e:
        published.find("checkpoint/ViT-demo.npz", "ViT-demo")
    assert os.path.isfile(str(e.value).split("--pretrained_dir ")[1])
