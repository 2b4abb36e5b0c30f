"""Which columns of a table hold the path, the caption, ...: given by the config, or recognized by their names."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cogds.data.layouts.cells import BadRowError
from cogds.errors import did_you_mean

# Our column names -> names that a table may use, in order of preference, if data.columns does not give one.
USUAL_NAMES: dict[str, tuple[str, ...]] = {
    "path": (
        *("file_name", "file_path", "path", "video_path", "video", "video_file", "file", "filename", "filepath"),
        *("video_file_name", "video_name", "clip_path", "image_path"),
    ),
    "caption": ("text", "caption", "prompt"),
    "captions": ("captions", "texts", "prompts"),
    "kind": ("type", "kind"),
    "image": ("image", "image_path", "image_file_name", "first_frame"),
    "control": ("control", "control_path", "control_video"),
    "start_s": ("start_s", "start", "start_time", "start_timestamp", "span_start", "start_sec"),
    "end_s": ("end_s", "end", "end_time", "end_timestamp", "span_end", "end_sec"),
    "spans": ("spans", "span", "timestamps", "timestamp", "clips", "clip"),
    "motion": ("motion",),
    "duplicate_of": ("duplicate_of",),
}
_TEMPLATE_FIELD = re.compile(r"\{([^{}:]*)(?::0?(\d+)d?)?\}")


def normalized(name: str) -> str:
    """A column's name without differences in case, blanks and hyphens: `Start-Timestamp` is `start_timestamp`."""
    return re.sub(r"[\W_]+", "_", name.lower()).strip("_")


def find_column(name: str, available: Iterable[str]) -> str | None:
    """The column with this name, or with one that differs only in case, blanks and hyphens."""
    names = list(available)
    if name in names:
        return name
    same = [theirs for theirs in names if normalized(str(theirs)) == normalized(name)]
    return same[0] if len(same) == 1 else None


def listed(names: Iterable[Any]) -> str:
    """`the columns are a, b`, for messages."""
    return f"the columns are {', '.join(map(str, names)) or 'none'}"


@dataclass(frozen=True)
class PathTemplate:
    """Paths made from columns: `{vid}.mp4`, or `{number:05d}.mp4` for five digits."""

    text: str

    @property
    def fields(self) -> list[str]:
        """The names in braces."""
        return [match[1].strip() for match in _TEMPLATE_FIELD.finditer(self.text)]

    @property
    def is_valid(self) -> bool:
        """Whether it names columns and has no other braces."""
        rest = _TEMPLATE_FIELD.sub("", self.text)
        return bool(self.fields) and "" not in self.fields and "{" not in rest and "}" not in rest

    def path(self, row: Mapping[str, Any]) -> str:
        """The path of a row. Raises BadRowError if it lacks a column."""
        return _TEMPLATE_FIELD.sub(lambda match: self._cell(row, match[1].strip(), match[2]), self.text)

    def _cell(self, row: Mapping[str, Any], name: str, num_digits: str | None) -> str:
        column = find_column(name, row)
        if column is None:
            raise BadRowError(
                f"no column '{name}'{did_you_mean(name, map(str, row))}, which data.path_template names: "
                f"{listed(row)}. Correct data.path_template."
            )
        value = row[column]
        if isinstance(value, float) and value.is_integer():  # a column of integers with missing values
            value = int(value)
        text = str(value).strip() if isinstance(value, str | int) else ""
        if not text:
            raise BadRowError(f"{column} is {value!r}, and data.path_template needs it. Fill it in.")
        return text.zfill(int(num_digits)) if num_digits else text


@dataclass(frozen=True)
class Columns:
    """The columns to read. given: our column names -> the table's, from data.columns; None: not to be used."""

    given: Mapping[str, str | None]
    template: PathTemplate | None
    need_captions: bool

    def find(self, available: Iterable[str], path_name: str) -> dict[str, str]:
        """`match`, and raise BadRowError if a needed column is missing.

        path_name: usual name of the column of paths in such a table, for the message.
        """
        names = list(available)
        mapping = self.match(names)
        for ours, missing in (("path", path_name), ("caption", "text")):
            is_needed = not self.template if ours == "path" else self.need_captions and "captions" not in mapping
            if is_needed and ours not in mapping:
                advice = " or data.path_template" if ours == "path" else ""
                raise BadRowError(
                    f"no column '{missing}': {listed(names)}. Rename one, or set data.columns={{{ours}: ...}}{advice}."
                )
        return mapping

    def match(self, available: Iterable[str]) -> dict[str, str]:
        """Map our column names to those of a table that has them. Raises BadRowError if a given one is missing."""
        names = list(available)
        mapping: dict[str, str] = {}
        in_template = {find_column(name, names) for name in self.template.fields} if self.template else set()
        for ours, usual in USUAL_NAMES.items():
            if ours == "path" and self.template:
                continue
            if ours in self.given:
                if column := self.given[ours]:
                    mapping[ours] = self._given(ours, column, names)
                continue
            taken = {*mapping.values(), *(in_template if ours in ("start_s", "end_s") else ())}
            found = (find_column(name, names) for name in usual)
            if theirs := next((name for name in found if name is not None and name not in taken), None):
                mapping[ours] = theirs
        return mapping

    def _given(self, ours: str, column: str, names: list[str]) -> str:
        if theirs := find_column(column, names):
            return theirs
        raise BadRowError(
            f"no column '{column}'{did_you_mean(column, map(str, names))}, which data.columns names for {ours}: "
            f"{listed(names)}. Correct data.columns.{ours}."
        )
