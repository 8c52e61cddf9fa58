"""Errors and warnings as docs/errors.md lists them: how each is brought about, and the page itself."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tests.helpers.forked import Forked
from tests.helpers.runs import ROOT

PAGE = ROOT / "docs" / "errors.md"
BEGIN = "<!-- What follows is written by `make errors` from the tests. -->\n"
HEAD = "| id | what happened | message | exit code |\n| --- | --- | --- | --- |\n"

#: What differs from run to run or from system to system, and what stands for it on the page.
RUN_SPECIFIC = [
    (r"\d+(?= % of the time)", "86"),
    (r"there (is|are) \d+ cores?: raise it, up to \d+", "there are 8 cores: raise it, up to 8"),
    (r"\d+ (?=is (training|downloading))", "1234 "),
    (r"\(choose from [^)]*\)", "(choose from ...)"),
    (r"(?<=was (?:folder) )[0-9a-f-]+", "..."),
    (r"(?<=weights )[0-9a-f]{8}\b", "..."),
    (r"(?<=CUDA out of memory\.).*", ".."),
    (r"http://(127\.0\.0\.1|localhost):\d+", "https://host"),
    (r"127\.0\.0\.1(\]?):\d+", r"127.0.0.1\1:29500"),
    (r"(?<=events\.out\.tfevents\.)\S+", "..."),
]


@dataclass(frozen=True)
class Launch:
    """A command line and what befalls the program.

    Args:
        argv: flags, after those of the group.
        env: variables of the environment.
        prepare: called in the process before the program begins.
        within: what holds meanwhile, and until ``after`` is through.
        ranks: the flags of each rank, if a launcher started the program; one for all that a launcher sets.
        during: called while the program runs, with its processes.
        after: called when it has ended, in the folder it ran in.
        writes: it may leave files and print results even if its exit code is 2.
        alone: without the flags of the group.
    """

    argv: Sequence[str] = ()
    env: Mapping[str, str | None] = field(default_factory=dict)
    prepare: Callable[[], object] | None = None
    within: contextlib.AbstractContextManager = field(default_factory=contextlib.nullcontext)
    ranks: Sequence[Sequence[str]] = ()
    during: Callable[[list[Forked]], object] = lambda children: None
    after: Callable[[], object] = lambda: None
    writes: bool = False
    alone: bool = False


@dataclass(frozen=True)
class Case:
    """One row of the page.

    Args:
        id: stays the same when the message is worded anew.
        what: what happened.
        provoke: a command line's flags, or what returns them or a ``Launch`` after it has made files in the current
            folder.
        says: what the message must have in it; by default the first flag.
        code: the exit code; 0 for a warning.
        do: the remedy, where the message does not name it; it stands below the message.
    """

    id: str
    what: str
    provoke: str | Callable[[], Sequence[str] | Launch]
    says: str = ""
    code: int = 2
    do: str = ""


@dataclass(frozen=True)
class Group:
    """One table of the page: errors of one program with the same flags in common, and files that all need."""

    title: str
    cases: Sequence[Case]
    program: str = "train.py"
    flags: Sequence[str] = ()
    setup: Callable[[], object] = lambda: None


def files_here() -> list[Path]:
    """Returns the files below the current folder."""
    return sorted(p for p in Path().rglob("*") if p.is_file())


def message_of(group: Group, case: Case) -> str:
    """Brings an error about in the current folder, and returns its line without the program's name.

    Fails unless it is one line, without a traceback, has the exit code, and leaves no file if that is 2.
    """
    group.setup()
    made = shlex.split(case.provoke) if isinstance(case.provoke, str) else case.provoke()
    launch = made if isinstance(made, Launch) else Launch(made)
    with launch.within:
        before = files_here()
        outcomes = _run(group, launch)
        codes = {code for code, _, _ in outcomes} - {-9}  # killed on purpose
        err = "\n".join(err for _, _, err in outcomes)
        assert codes == {case.code}, err
        assert "Traceback" not in err, err
        if case.code:
            found = re.findall(rf"^{re.escape(group.program)}: error: (.*)$", err, re.MULTILINE)
            assert err.count("error: ") == len(found) == 1, err
        else:
            found = [line for line in re.findall(r"WARNING(?: - [a-z_.]+ -|:) (.*)$", err, re.MULTILINE)
                     if case.says in line]  # fmt: skip
            assert len(set(found)) == 1, err
        says = case.says or next(word for word in [*launch.argv, *(launch.env or ())])
        assert says in found[0]
        if case.code == 2 and not launch.writes:
            assert files_here() == before
            assert not any(out for _, out, _ in outcomes)
        launch.after()
    return found[0]


def _run(group: Group, launch: Launch) -> list[tuple[int, str, str]]:
    """Returns each rank's exit code, output and standard error, with every line at its beginning."""
    with contextlib.ExitStack() as stack:
        store = None
        if launch.ranks:  # as torchrun does, this process keeps the store: its port cannot be taken in between
            store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        children = []
        for rank, flags in enumerate(launch.ranks or [()]):
            env = dict.fromkeys(("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK"))
            if store:
                env |= {"RANK": str(rank), "WORLD_SIZE": str(len(launch.ranks)), "LOCAL_RANK": str(rank),
                        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
                        "TORCHELASTIC_USE_AGENT_STORE": "True"}  # fmt: skip
            argv = [group.program, *(() if launch.alone else group.flags), *launch.argv, *flags]
            children.append(stack.enter_context(Forked(argv, {**env, **launch.env}, prepare=launch.prepare)))
        launch.during(children)
        return [(c.wait(), c.stdout(), c.stderr().replace("\r", "\n")) for c in children]


# ---- the page ----


def row(case: Case, message: str) -> str:
    """Returns a line of the page's tables."""
    for path in (os.getcwd(), str(ROOT)):
        message = message.replace(f"{path}/", "")
    for pattern, instead in RUN_SPECIFIC:
        message = re.sub(pattern, instead, message)
    message = message.replace(socket.gethostname(), "node0").replace("|", r"\|")
    fence, pad = ("``", " ") if "`" in message else ("`", "")
    remedy = f"<br>{case.do}" if case.do else ""
    return f"| `{case.id}` | {case.what} | {fence}{pad}{message}{pad}{fence}{remedy} | {case.code} |\n"


def rows_of(page: str) -> dict[str, str]:
    """Returns the lines of the page's tables by their ids."""
    lines = page.partition(BEGIN)[2].splitlines(keepends=True)
    rows = [(line.split("`")[1], line) for line in lines if line.startswith("| `")]
    assert len(rows) == len(dict(rows)), "an id twice"
    return dict(rows)


def codes_of(page: str) -> dict[str, int]:
    """Returns the exit codes that the page gives, by ids."""
    return {key: int(re.split(r"(?<!\\)\|", line)[4]) for key, line in rows_of(page).items()}


def write_page(groups: Iterable[Group], new: Mapping[str, str]) -> None:
    """Puts new rows, by their ids, in the place of those that the page has; those of tests that did not run stay."""
    page = PAGE.read_text(encoding="utf-8")
    rows = rows_of(page) | new
    tables = "".join(
        f"\n## {group.title}\n\n{HEAD}" + "".join(rows.get(case.id, "") for case in group.cases) for group in groups
    )
    PAGE.write_text(page.partition(BEGIN)[0] + BEGIN + tables, encoding="utf-8")
