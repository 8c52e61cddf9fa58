"""Spells commands and files of this repository as users type them: from its root, or from any other folder.

``python -m tools.NAME`` works in the root only, ``python PATH/tools/NAME.py`` everywhere.  This module must
not know what the commands do.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Mapping
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


#: Flags of a training that an evaluation of its weights does not need.
_OF_TRAINING = frozenset(
    ("resume", "num_steps", "train_batch_size", "pretrained_dir", "learning_rate", "warmup_steps", "eval_every",
     "save_every", "log_every", "hflip", "dropout", "zero_head", "seed", "weight_decay", "decay_type", "max_grad_norm",
     "gradient_accumulation_steps", "local_rank")
)  # fmt: skip


def after_training(flags: Mapping[str, Any], checkpoint: str) -> list[tuple[str, str]]:
    """Returns what a run's user may want to do next, and the commands for it.

    Args:
        flags: the run's, without dashes, whose values are not their defaults.
        checkpoint: path of its weights.
    """

    def words(left_out: Iterable[str]) -> list[str]:
        return [f"--{name}" if x is True else f"--{name}={x}" for name, x in flags.items() if name not in left_out]

    weights = ("--load_model_dir", checkpoint)
    folder = ("--format", "hf", "--output", f"{flags['name']}_hf")
    return [
        ("Evaluate the best weights", train_command(*words(_OF_TRAINING), "-v")),
        ("Name what is on an image", tool_command("predict", *weights, "IMAGE.jpg")),
        ("Draw what the model looks at", tool_command("attention_map", *weights, "IMAGE.jpg")),
        ("Export, here for transformers", tool_command("export", *weights, *folder)),
        ("Resume, if it was stopped", train_command(*words(("resume", "local_rank")))),
    ]


def import_lines() -> str:
    """Returns the lines of Python after which code imports this repository's modules in the folder the user is in."""
    return "" if _is_in_root() else f"import sys\nsys.path.insert(0, {ROOT!r})\n"


def _is_in_root() -> bool:
    try:
        return os.path.samefile(os.curdir, ROOT)  # links may lead to both; the folder may be gone
    except OSError:
        return False
