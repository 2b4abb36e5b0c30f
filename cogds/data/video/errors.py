"""The error of a file that cannot be used."""

import traceback
from pathlib import Path


class DecodeError(Exception):
    """A file cannot be used. The message is one sentence that completes `<path>: `."""


def brief(error: BaseException) -> str:
    """The first line of an error's message, without the C++ stack trace that decord adds."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.strip().splitlines()[0]


def is_bug(error: BaseException) -> bool:
    """Whether the error was raised in this package, and not in a library that it calls."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return Path(frame.f_code.co_filename).parent == Path(__file__).parent
