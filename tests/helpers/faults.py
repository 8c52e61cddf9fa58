"""The table of docs/faults.md: which inputs and faults it has, how they are brought about, and the page itself."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "faults.md"
BEGIN = "<!-- What follows is written by `make faults` from the tests. -->\n"

#: What differs from run to run or from system to system, and what stands for it on the page.
RUN_SPECIFIC = [
    (r"\d+ (?=is training under)", "1234 "),
    (r"\(choose from [^)]*\)", "(choose from ...)"),
    (r"(?<=was (?:folder) )[0-9a-f-]+", "..."),
    (r"CUDA out of memory\..*", "..."),
]


@dataclass(frozen=True)
class Row:
    """One line of a table."""

    group: str
    what: str
    message: str
    status: int

    def __str__(self) -> str:
        message = self.message.replace("|", r"\|")
        fence = "``" if "`" in message else "`"
        pad = " " if "`" in message else ""
        return f"| {self.what} | {fence}{pad}{message}{pad}{fence} | {self.status} |"


def normalised(message: str) -> str:
    """The message without what is particular to one run."""
    for pattern, instead in RUN_SPECIFIC:
        message = re.sub(pattern, instead, message)
    return message


def rows_of(page: str) -> dict[str, list[str]]:
    """The rows of each group of the page."""
    groups: dict[str, list[str]] = {}
    for line in page.split(BEGIN, 1)[1].splitlines():
        if line.startswith("## "):
            groups[line[3:]] = []
        elif line.startswith("| ") and not line.startswith(("| what ", "| --- ")):
            groups[list(groups)[-1]].append(line)
    return groups


def tables(rows: Iterable[Row]) -> str:
    """The page's generated part."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    return "".join(
        f"\n## {group}\n\n| what is wrong | message | status |\n| --- | --- | --- |\n"
        + "".join(f"{row}\n" for row in members)
        for group, members in groups.items()
    )
