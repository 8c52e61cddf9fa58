"""Runs the tools as their users type them, in the test's own process."""

from __future__ import annotations

import contextlib
import io
from types import ModuleType


def run_tool(tool: ModuleType, *args: object) -> tuple[int, str, list[str]]:
    """Returns a tool's exit code, its standard output and the lines of its standard error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = tool.main([*map(str, args)])
        except SystemExit as e:
            status = int(e.code or 0)
    return status, out.getvalue(), err.getvalue().splitlines()
