"""Rows of JSON, JSON Lines and CSV files, read piece by piece, so that a large file takes no memory."""

import csv
import io
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from cogds.data.layouts.cells import BadRowError
from cogds.data.layouts.columns import Columns
from cogds.data.storage.access import open_binary
from cogds.errors import UserError

Row = tuple[int, dict[str, Any]]  # number of the row or line, and the cells by column

_CHUNK_CHARACTERS = 1 << 16
_MAX_CELL_CHARACTERS = 1 << 27
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}
KEY_COLUMN = "key"  # the keys of a JSON object of clips, for data.path_template


@contextmanager
def opened_text(file: str, newline: str | None = "\n") -> Iterator[TextIO]:
    """Open a text file at any location. Raises UserError if it cannot be read or is not UTF-8."""
    try:
        with open_binary(file) as binary, io.TextIOWrapper(binary, encoding="utf-8-sig", newline=newline) as text:
            yield text
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 ({error}). Save it as UTF-8.") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error}). Allow access to it.") from None


# --- JSON


class _JsonStream:
    """Reads values from a JSON text, one at a time."""

    def __init__(self, text: TextIO) -> None:
        self._text, self._buffer, self._position, self._line = text, "", 0, 1

    def _read_more(self) -> bool:
        """Append to the buffer and drop what was read from it. False at the end of the text."""
        self._line += self._buffer.count("\n", 0, self._position)
        rest = self._buffer[self._position :]
        chunk = self._text.read(max(_CHUNK_CHARACTERS, len(rest)))
        self._buffer, self._position = rest + chunk, 0
        return bool(chunk)

    def next_character(self) -> str:
        """The next character that is not blank, "" at the end. It is not consumed."""
        while True:
            match = re.compile(r"\s*").match(self._buffer, self._position)
            self._position = match.end() if match else self._position
            if self._position < len(self._buffer):
                return self._buffer[self._position]
            if not self._read_more():
                return ""

    def accept(self, character: str) -> bool:
        """Consume the next character if it is this one."""
        is_next = self.next_character() == character
        self._position += is_next
        return is_next

    def expect(self, characters: str) -> str:
        """Consume one of the characters and return it."""
        for character in characters:
            if self.accept(character):
                return character
        names = " or ".join(f"'{character}'" for character in characters)
        raise self._error(f"Expecting {names}", self._position)

    def expect_end(self) -> None:
        """Raise an error unless all of the text is consumed."""
        if self.next_character():
            raise self._error("Extra data", self._position)

    def value(self) -> Any:
        """Consume a value."""
        self.next_character()
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self._buffer, self._position)
            except json.JSONDecodeError as error:
                # Only errors at the end may come from a value that is not complete yet.
                may_continue = error.msg.startswith("Unterminated") or error.pos > len(self._buffer) - 16
                if not (may_continue and self._read_more()):
                    raise self._error(error.msg, error.pos) from None
            except RecursionError:
                raise self._error("It is nested too deeply", self._position) from None
            else:
                if end < len(self._buffer) or not self._read_more():  # else a number may go on
                    self._position = end
                    return value

    def _error(self, message: str, position: int) -> json.JSONDecodeError:
        error = json.JSONDecodeError(message, self._buffer, position)
        error.lineno += self._line - 1
        return error


def read_json(file: str) -> Iterator[Row]:
    """Yield the rows of a JSON file.

    It holds a list of objects, an object `{"data": [...]}` with that list, or an object whose keys are paths and whose
    values are a caption, a list of captions, or an object.
    """
    with opened_text(file) as text:
        stream = _JsonStream(text)
        try:
            if stream.accept("["):
                for number, value in enumerate(_items(stream), 1):
                    yield number, _object(file, number, value)
            elif stream.accept("{"):
                yield from _read_object(file, stream)
            else:
                kind = type(stream.value()).__name__
                raise UserError(f'{file}: holds a {kind}, not a list. Write [{{"file_path": ..., "text": ...}}, ...].')
            stream.expect_end()
        except json.JSONDecodeError as error:
            raise UserError(
                f"{file}:{error.lineno}: invalid JSON: {error.msg} (column {error.colno}). Fix it."
            ) from None


def _items(stream: _JsonStream) -> Iterator[Any]:
    """The rest of a list."""
    while not stream.accept("]"):
        yield stream.value()
        if stream.expect(",]") == "]":
            return


def _read_object(file: str, stream: _JsonStream) -> Iterator[Row]:
    number = 0
    while not stream.accept("}"):
        key = stream.value()
        stream.expect(":")
        if key == "data" and not number and stream.accept("["):
            for row, value in enumerate(_items(stream), 1):
                yield row, _object(file, row, value)
            while stream.expect(",}") == ",":  # other fields are about the dataset
                stream.value()
                stream.expect(":")
                stream.value()
            return
        number += 1
        yield number, _mapping_row(file, number, key, stream.value())
        if stream.expect(",}") == "}":
            return


def _object(file: str, number: int, value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    raise UserError(f"{file}: row {number}: a {type(value).__name__}. Write an object with file_path and text.")


def _mapping_row(file: str, number: int, key: Any, value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return {KEY_COLUMN: key, "file_name": key, **value}
    if value is None or isinstance(value, str | list):
        return {KEY_COLUMN: key, "file_name": key, "text": value}
    raise UserError(
        f"{file}: row {number}: the value of {key!r} is {value!r}. Write a list of objects, or an object "
        "whose keys are paths and whose values are captions."
    )


def read_jsonl(file: str) -> Iterator[Row]:
    """Yield the objects of a JSON Lines file, with their line numbers."""
    with opened_text(file) as text:
        for number, line in enumerate(text, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                problem = (
                    f"{error.msg} (column {error.colno})" if isinstance(error, ValueError) else "nested too deeply"
                )
                raise UserError(f"{file}:{number}: invalid JSON: {problem}. Fix it.") from None
            if not isinstance(value, dict):
                raise UserError(f"{file}:{number}: a {type(value).__name__}. Write an object with file_name and text.")
            yield number, value


# --- CSV


def read_csv(file: str, columns: Columns) -> Iterator[Row]:
    """Yield the rows of a CSV file, with their line numbers. Its delimiter is a comma, a semicolon or a tab."""
    csv.field_size_limit(_MAX_CELL_CHARACTERS)
    with opened_text(file, newline="") as text:
        header = text.readline()
        delimiter = "\t" if _suffix(file) == ".tsv" else _delimiter(file, header, columns)
        names = _header(header, delimiter)
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(f"{file}:1: two columns are called '{twice}'. Rename one.")
        reader = csv.reader(text, delimiter=delimiter, strict=True, skipinitialspace=delimiter != "\t")
        number = 2  # of the line where the row begins
        try:
            for cells in reader:
                if len(cells) > len(names):
                    raise UserError(
                        f"{file}:{number}: more cells than in the first line. Put text with {_DELIMITERS[delimiter]} "
                        "in quotes."
                    )
                if cells:  # else an empty line
                    yield number, dict(zip(names, cells))  # cells that a short row lacks are missing
                number = reader.line_num + 2
        except csv.Error as error:
            raise UserError(f"{file}:{number}: invalid CSV: {error}. Fix it.") from None


def _header(line: str, delimiter: str) -> list[str]:
    reader = csv.reader([line], delimiter=delimiter, skipinitialspace=delimiter != "\t")
    return [name.strip() for name in next(reader, [])]


def _delimiter(file: str, header: str, columns: Columns) -> str:
    """The delimiter with which the header has the needed columns; a comma if there is none."""
    fitting = [delimiter for delimiter in _DELIMITERS if _has_columns(_header(header, delimiter), columns)]
    if len(fitting) > 1:
        names = " or ".join(_DELIMITERS[delimiter] for delimiter in fitting)
        raise UserError(f"{file}:1: its columns may be separated by {names}. Write the table again with commas.")
    if fitting:
        return fitting[0]
    cells = {delimiter: len(_header(header, delimiter)) for delimiter in _DELIMITERS}
    return max(cells, key=lambda delimiter: cells[delimiter])


def _has_columns(names: list[str], columns: Columns) -> bool:
    try:
        columns.find(names, "file_name")
    except BadRowError:
        return False
    return True


def _suffix(file: str) -> str:
    return os.path.splitext(file)[1].lower()
