"""Spells commands and files of this repository as users type them: from its root, or from any other folder.

``python -m tools.NAME`` works in the root only, ``python PATH/tools/NAME.py`` everywhere.  This module must
not know what the commands do.
"""

from __future__ import annotations

import os
import shlex

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def own_path(*parts: str) -> str:
    """Names a file of the repository, given from the root, as it is reached from the folder the user is in."""
    return os.path.join(*parts) if _is_in_root() else os.path.join(ROOT, *parts)


def tool_command(name: str, *words: str) -> str:
    """Spells the command that runs a tool from the folder the user is in.

    Args:
        name: of the tool, such as "download".
        words: its arguments, unquoted; relative paths count from the user's folder.
    """
    tool = ["-m", f"tools.{name}"] if _is_in_root() else [own_path("tools", f"{name}.py")]
    return shlex.join(["python", *tool, *words])


def train_command(*words: str) -> str:
    """Spells the command that runs train.py from the folder the user is in, with unquoted arguments."""
    return shlex.join(["python", own_path("train.py"), *words])


def import_lines() -> str:
    """Returns the lines of Python after which code imports this repository's modules in the folder the user is in."""
    return "" if _is_in_root() else f"import sys\nsys.path.insert(0, {ROOT!r})\n"


def _is_in_root() -> bool:
    try:
        return os.path.samefile(os.curdir, ROOT)  # links may lead to both; the folder may be gone
    except OSError:
        return False
