"""Spells commands and files of this repository as users type them: from its root, or from any other folder.

``python -m tools.NAME`` works in the root only, ``python PATH/tools/NAME.py`` everywhere.  The module is in this
package because published.py needs it, and ``models`` may import nothing of ``utils`` but its errors.  It must not know
what the commands do.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from typing import Any

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


def after_training(
    to_resume: Mapping[str, Any], to_evaluate: Mapping[str, Any], checkpoint: str
) -> list[tuple[str, str]]:
    """Returns what a run's user may want to do next, and the commands for it.

    Args:
        to_resume: the flags of the run that are not their defaults, by names without dashes.
        to_evaluate: those of them that an evaluation needs.
        checkpoint: path of its weights.
    """

    def words(flags: Mapping[str, Any]) -> list[str]:
        return [f"--{name}" if x is True else f"--{name}={x}" for name, x in flags.items()]

    weights = ("--load_model_dir", checkpoint)
    folder = ("--format", "hf", "--output", f"{to_resume['name']}_hf")
    return [
        ("Evaluate the best weights", train_command(*words(to_evaluate), "-v")),
        ("Name what is on an image", tool_command("predict", *weights, "IMAGE.jpg")),
        ("Draw what the model looks at", tool_command("attention_map", *weights, "IMAGE.jpg")),
        ("Export, here for transformers", tool_command("export", *weights, *folder)),
        ("Resume, if it was stopped", train_command(*words(to_resume))),
    ]


def import_lines() -> str:
    """Returns the lines of Python after which code imports this repository's modules in the folder the user is in."""
    return "" if _is_in_root() else f"import sys\nsys.path.insert(0, {ROOT!r})\n"


def _is_in_root() -> bool:
    try:
        return os.path.samefile(os.curdir, ROOT)  # links may lead to both; the folder may be gone
    except OSError:
        return False
