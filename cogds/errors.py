"""What a user can put right: one exception class, whose message is the whole story.

A message says what is wrong, where, what was found and what to do. Entry points print it without a
traceback and exit with code 2; anything else that is raised is a bug and keeps its traceback.
"""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something in the user's input, files or environment that the message tells how to mend.

    shared: rank 0 raised it too and says it; this rank has nothing to add.
    """

    shared = False


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the nearest valid name, or an empty string where none is near."""
    near = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f" (did you mean '{near[0]}'?)" if near else ""
