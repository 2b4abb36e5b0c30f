"""Errors that the user can correct, and the exit codes of all commands.

The message of a UserError is `<key or file>: <what is wrong, with the value found>. <What to do.>`. Commands print it
without a traceback and exit with code 2. Any other exception is a bug and keeps its traceback. docs/operations.md says
what to do about each exit code.
"""

import difflib
import sys
from collections.abc import Iterable
from typing import NoReturn, Self

EXIT_BUG = 1  # as for any exception that Python does not catch
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, run it again
EXIT_HUNG = 76  # hung, lost the connection to another rank, or the port is taken: run it again, but not forever

# Exceptions that come from a bug and never from a file, a machine or a network. `except BUGS: raise` goes before
# `except Exception` if a library has no base class for its errors.
BUGS = (TypeError, AttributeError, NameError, LookupError, AssertionError)


class Interrupted(Exception):
    """The run was asked to stop and has stopped; the same command continues it."""


class BugReported(Exception):
    """A bug whose traceback is already printed, by this rank or another: the process ends with EXIT_BUG."""


class UserError(Exception):
    """A mistake in the user's input, files or environment. The message says how to correct it.

    shared: another rank raises the same error and reports it, so this rank prints nothing.
    """

    def __init__(self, message: str, *, shared: bool = False) -> None:
        super().__init__(message)
        self.shared = shared

    def as_shared(self) -> Self:
        """Return the same error for a rank that need not report it."""
        return type(self)(str(self), shared=True)


def brief(error: BaseException) -> str:
    """Return `Type: message` of an exception in one line; of a UserError only the message."""
    lines = str(error).strip().splitlines()
    if isinstance(error, UserError) and lines:
        return lines[0]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)` for the nearest valid name, or an empty string if none is near."""
    near = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f" (did you mean '{near[0]}'?)" if near else ""


def refuse_to_run(module: str, verb: str) -> NoReturn:
    """End `python -m MODULE` with a message and EXIT_USER_ERROR, instead of importing it and doing nothing."""
    print(
        f"error: python -m {module}: not a command. Run `cogds {verb}`, or `python -m cogds {verb}`.", file=sys.stderr
    )
    raise SystemExit(EXIT_USER_ERROR)
