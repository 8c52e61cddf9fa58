"""Turns what ends a program into one line and an exit code: the one place for train.py and the tools.

    0           done
    2           the user's input is wrong
    1           the machine could not do it: disk, memory, network, numbers that are not finite, a rank that is gone
    128 + n     signal n asked to stop

Anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable

from utils import dist_errors, dist_util, workers
from utils.errors import UserError, notes
from utils.memory import OutOfMemory
from utils.signals import Stopped


def exit_code(program: str, body: Callable[[], int]) -> int:
    """Runs a program's body; returns its exit code, or that of an error after one rank has printed the one line."""
    try:
        return body()
    except dist_util.FailedElsewhere as e:  # the rank that failed says it
        return 2 if e.input_error else 1
    except BaseException as e:
        code = _code(e)
        # Every rank explains a lost one: so they find out which it is.  Every rank asks who prints, before a bug, too.
        message = "; ".join([_message(e), *notes(e)])
        reports = dist_errors.is_error_reporter()
        if code is None:
            raise
        if reports:
            print(f"{program}: error:", " ".join(message.split()), file=sys.stderr)
        return code


def _code(error: BaseException) -> int | None:
    """Returns the exit code of an error; None for a bug."""
    if isinstance(error, UserError):
        return 2
    if isinstance(error, KeyboardInterrupt):
        return 128 + (error.number if isinstance(error, Stopped) else signal.SIGINT)
    known = isinstance(error, OSError | OutOfMemory | FloatingPointError)
    return 1 if known or _is_lost_contact(error) or workers.worker_died(error) or _is_compile_error(error) else None


def _message(error: BaseException) -> str:
    """Returns an error's text for the user."""
    if _is_lost_contact(error):
        return dist_errors.lost_contact(error)
    if workers.worker_died(error):
        return workers.explain_death(error)
    if _is_compile_error(error):
        reason = str(error).strip().partition("\n")[0]
        return f"torch.compile failed ({reason}); install what it lacks, or leave --compile out"
    return str(error) or ("interrupted" if isinstance(error, KeyboardInterrupt) else type(error).__name__)


def _is_lost_contact(error: BaseException) -> bool:
    return isinstance(error, Exception) and dist_util.is_lost_contact(error)


def _is_compile_error(error: BaseException) -> bool:
    """Tells errors of a compiled model, such as for want of a C++ compiler, without importing the compiler."""
    module = sys.modules.get("torch._dynamo.exc")
    return module is not None and isinstance(error, module.TorchDynamoException)
