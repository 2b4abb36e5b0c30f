"""Values in the cells of a table: paths, captions and times, as text, numbers, lists or objects."""

import ast
import contextlib
import json
import math
import re
from typing import Any

# HH:MM:SS.mmm or MM:SS.mmm; some subtitles have a comma.
_CLOCK = re.compile(r"(?:(\d+):)?(\d{1,2}):(\d{1,2}(?:[.,]\d*)?)")
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")


class BadRowError(Exception):
    """A row is wrong. The message is a clause that says how, and a sentence that says what to do."""


def is_missing(value: Any) -> bool:
    """Whether a cell is empty: null, or a number that is NaN, which some libraries write for a missing value."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def path_in(value: Any) -> str:
    """A path, with slashes. Raises BadRowError if it is none."""
    if isinstance(value, dict) and "path" in value:  # a video of the datasets library
        if value.get("bytes") is not None:
            raise BadRowError(
                "the videos themselves are in the table. Write them to files, and their paths to a table."
            )
        value = value["path"]
    if not isinstance(value, str) or not value.strip():
        raise BadRowError(f"the path is {None if is_missing(value) else value!r}. Write a path.")
    path = value.strip()
    if _DRIVE.match(path):
        raise BadRowError(
            f"the path {path} is of Windows. Write paths that are relative to a folder, and set data.root."
        )
    return path.replace("\\", "/")


def captions_in(first: Any, listed: Any = None) -> list[str | None]:
    """The distinct captions of a row, without blanks; [None] if none is given, [""] if all are blank.

    Args:
        first: the cell with the caption, or a list of captions.
        listed: the cell with further captions.
    """
    texts: list[str] = []
    for value in (first, as_list(listed)):
        for text in value if isinstance(value, list | tuple) else [value]:
            if is_missing(text):
                continue
            if not isinstance(text, str):
                raise BadRowError(f"the caption is {text!r}. Write a string.")
            texts.append(text.strip())
    return list(dict.fromkeys(filter(None, texts))) or ([""] if texts else [None])


def seconds_in(value: Any, name: str, ours: str) -> float | None:
    """The seconds in a cell, as a number, text or HH:MM:SS.mmm; None if it is empty.

    name, ours: the table's name of the column, and ours.
    """
    if is_missing(value) or (isinstance(value, str) and not value.strip()):
        return None
    seconds = math.inf
    if isinstance(value, str) and (match := _CLOCK.fullmatch(value.strip())):
        hours, minutes, rest = match.groups()
        seconds = int(hours or 0) * 3600 + int(minutes) * 60 + float(rest.replace(",", "."))
    elif not isinstance(value, bool):
        with contextlib.suppress(TypeError, ValueError):
            seconds = float(value)
    if math.isnan(seconds):
        return None
    if not 0 <= seconds < math.inf:
        other = "" if name == ours else f" If it is something else, set data.columns={{{ours}: null}}."
        raise BadRowError(f"{name} is {value!r}. Write seconds, 0 or more, or HH:MM:SS.mmm.{other}")
    return seconds


def score_in(value: Any) -> float | None:
    """The number in a cell, also as text; None if there is none. Other tools may write scores in other forms."""
    try:
        score = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return score if math.isfinite(score) else None


def is_time(value: Any) -> bool:
    """Whether a value is a time, as a number or as text."""
    if isinstance(value, str):
        return bool(_CLOCK.fullmatch(value.strip()) or re.fullmatch(r"\d+(\.\d*)?", value.strip()))
    return isinstance(value, int | float) and not isinstance(value, bool)


def as_list(value: Any) -> Any:
    """A list that is written as text, as in CSV, in JSON's or Python's notation; other values as they are."""
    if not isinstance(value, str) or not (value.lstrip().startswith("[") and value.rstrip().endswith("]")):
        return value
    for parse, errors in ((json.loads, ValueError), (ast.literal_eval, (ValueError, SyntaxError, RecursionError))):
        try:
            return parse(value.strip())
        except errors:
            continue
    return value
