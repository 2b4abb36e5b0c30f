"""Rows that describe several clips of one video: lists of spans, as in Panda-70M, or of clips, as in HD-VILA."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from cogds.data.layouts.cells import BadRowError, as_list, is_missing, is_time


class ClipRow(NamedTuple):
    """The row of one clip. span: its start and end, if the row had a list of spans. own: names only this clip has."""

    cells: dict[str, Any]
    span: tuple[Any, Any] | None = None
    own: frozenset[str] = frozenset()


def clip_rows(row: dict[str, Any], mapping: Mapping[str, str], is_given: bool) -> list[ClipRow]:
    """The rows of the clips of a row.

    Args:
        mapping: our column names -> the table's. The column `spans` may hold `[start, end]`, a list of these, or a list
            of objects, one per clip. Other columns with a list of the same length hold one value per clip.
        is_given: whether the config names the column, so that other content is an error.

    Raises:
        BadRowError: the lists do not fit.
    """
    column = mapping["spans"]
    spans = as_list(row[column])
    if is_missing(spans):
        return [ClipRow(row)]
    if _is_span(spans):
        return [ClipRow(row, tuple(spans))]
    if isinstance(spans, list) and spans:
        if all(map(_is_span, spans)):
            return [ClipRow(cells, tuple(span)) for cells, span in zip(_distributed(row, mapping, len(spans)), spans)]
        if all(isinstance(span, dict) for span in spans):
            return [_nested_row(row, column, clip) for clip in spans]
    if is_given:
        raise BadRowError(f"{column} is {spans!r}. Write [start, end], or a list of these.")
    return [ClipRow(row)]


def _is_span(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(map(is_time, value))


def _distributed(row: dict[str, Any], mapping: Mapping[str, str], num_clips: int) -> list[dict[str, Any]]:
    """A row for each clip, with its own value of every column that holds a list of num_clips values."""
    lists = {name: as_list(value) for name, value in row.items() if name != mapping["spans"]}
    for ours in ("caption", "captions"):
        texts = lists.get(mapping.get(ours, ""))
        if isinstance(texts, list) and len(texts) != num_clips:
            raise BadRowError(
                f"{mapping['spans']} holds {num_clips} spans, and {mapping[ours]} {len(texts)} texts. Write one for "
                "each."
            )
    lists = {name: values for name, values in lists.items() if isinstance(values, list) and len(values) == num_clips}
    return [row | {name: values[clip] for name, values in lists.items()} for clip in range(num_clips)]


def _nested_row(row: dict[str, Any], column: str, clip: dict[str, Any]) -> ClipRow:
    cells = {name: value for name, value in row.items() if name != column} | clip
    span = next((tuple(value) for value in map(as_list, clip.values()) if _is_span(value)), None)
    return ClipRow(cells, span, frozenset(clip))
