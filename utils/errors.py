"""Errors that are the user's to mend, told apart from the program's own.

The one module of ``utils`` that ``models`` may import, too; it imports nothing.
"""

from __future__ import annotations


class UserError(ValueError):
    """Something that the user gave cannot be used: the message says what was got and expected, and the remedy.

    Ends a program with one line and exit code 2.  Any other ValueError is a bug, and keeps its traceback.
    """


def add_note(error: Exception, note: str) -> None:
    """Adds a note to the line that a program ends with, as ``Exception.add_note`` of Python 3.11 does."""
    vars(error).setdefault("notes", []).append(note)


def notes(error: BaseException) -> list[str]:
    """Returns the notes that were added to an error."""
    return vars(error).get("notes", [])
