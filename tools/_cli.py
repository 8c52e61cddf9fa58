"""Flags, errors of one line and exit codes that all tools share.

They are train.py's: 0 done, 2 the user's input is wrong, 1 anything else, 130 after Ctrl-C, 141 if the reader of the
output has left; one line says what was got, what was expected and the remedy.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from models.commands import tool_command
from utils import exits, files, memory
from utils.errors import UserError


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults other than None and False, and the text above them as it is written: it holds an example."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """The command line of ``python -m tools.NAME``, described by the module's docstring.

    Args:
        name: the tool's.
        doc: the docstring; ``--help`` begins with it, its examples such as work in the folder the user is in.
    """

    def __init__(self, name: str, doc: str | None) -> None:
        doc = doc and doc.replace(f"python -m tools.{name}", tool_command(name))
        super().__init__(prog=f"tools.{name}", description=doc, formatter_class=_Formatter)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse_positive(text: str) -> int:
    """Returns a whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


parse_positive.__name__ = "int"  # argparse's message on a word in its place names the type


def check_output(path: str, *sources: str) -> None:
    """Makes the folder of a file that is to be written, if need be.

    Args:
        path: what ``--output`` gives.
        sources: the files that are read.

    Raises:
        UserError: the file cannot be written there, or would replace what is read.
    """
    if not path:
        raise UserError("--output is empty; give the name of a file")
    if os.path.realpath(path) in map(os.path.realpath, sources):
        raise UserError(f"--output {path} would replace a file that is read; give another name")
    if os.path.isdir(path):
        raise UserError(f"--output {path} is a folder; give the name of a file in it")
    files.check_writable(os.path.dirname(path) or ".")


def fail(name: str, message: object, status: int) -> int:
    """Prints an error in one line, whatever the message; returns the exit code."""
    print(f"tools.{name}: error:", " ".join(str(message).split()), file=sys.stderr)
    return status


def run(name: str, body: Callable[[], int]) -> int:
    """Runs a tool; returns the exit code that its errors mean."""
    logging.basicConfig(level=logging.WARNING, format=f"tools.{name}: %(levelname)s: %(message)s")
    for stream in (sys.stdout, sys.stderr):  # names of files and classes need not be printable everywhere
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def guarded() -> int:
        try:
            with memory.explain_out_of_memory("on this device; another --device, or less at a time, may do"):
                code = body()
            sys.stdout.flush()
        except BrokenPipeError:  # the reader, `head` for one, has what it wanted
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE
        return code

    return exits.exit_code(f"tools.{name}", guarded)
