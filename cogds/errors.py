"""What a user can put right: one exception class, whose message is the whole story.

A message says what is wrong, where, what was found and what to do. Entry points print it without a
traceback and exit with code 2; anything else that is raised is a bug and keeps its traceback. Here stand all exit
codes; docs/operations.md says what to do about each.
"""

import difflib
import sys
from collections.abc import Iterable
from typing import NoReturn

EXIT_BUG = 1  # as Python itself ends with an exception that nobody catches
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, run it again
EXIT_HUNG = 76  # or lost contact with another rank, or the port is taken: run it again, but not for ever


# What says something about code and never about a file, a machine or a network. Where a library has no base class for
# its failures: `except BUGS: raise` before `except Exception`.
BUGS = (TypeError, AttributeError, NameError, LookupError, AssertionError)


class Interrupted(Exception):
    """The run was asked to stop and has done so; the same command goes on with it."""


class BugReported(Exception):
    """A bug whose traceback is printed already, here or by another rank: this process ends with EXIT_BUG."""


class UserError(Exception):
    """Something in the user's input, files or environment that the message tells how to mend.

    shared: rank 0 raised it too and says it; this rank has nothing to add.
    """

    shared = False


def brief(error: BaseException) -> str:
    """`Type: text` of an exception in one line; of a UserError its text alone."""
    lines = str(error).strip().splitlines()
    if isinstance(error, UserError) and lines:
        return lines[0]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the nearest valid name, or an empty string where none is near."""
    near = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f" (did you mean '{near[0]}'?)" if near else ""


def refuse_to_run(module: str, verb: str) -> NoReturn:
    """End `python -m MODULE` with a sentence and EXIT_USER_ERROR: the commands are in launch/, beside their configs."""
    print(
        f"error: python -m {module}: it is not a command. Run launch/{verb}.py of a checkout, which has the configs "
        "too (git clone, then pip install -e .).",
        file=sys.stderr,
    )
    raise SystemExit(EXIT_USER_ERROR)
