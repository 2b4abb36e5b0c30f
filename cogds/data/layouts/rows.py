"""Entries from the rows of lists and tables."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from cogds.data.layouts.cells import BadRowError, captions_in, is_missing, path_in, score_in, seconds_in
from cogds.data.layouts.columns import Columns, find_column
from cogds.data.layouts.entry import Entry
from cogds.data.layouts.listing import Listing
from cogds.data.layouts.spans import ClipRow, clip_rows
from cogds.data.layouts.where import Where
from cogds.data.storage.location import join
from cogds.data.video.kinds import kind_of, suffix_of
from cogds.errors import UserError

_FILTERED_PER_BATCH = 4096
_MAX_MAPPINGS = 1000  # more than this many different sets of columns are found again
NumberedRow = tuple[int, dict[str, Any]]


@dataclass(frozen=True)
class Table:
    """A list or table to read.

    Attributes:
        file: its location.
        root: folder that relative paths are relative to.
        path_name: usual name of its column of paths, for messages.
        row_word: before the number of a row in messages: `:` for lines, `: row ` for rows.
        keep_extras: whether entries have the other columns of their rows.
    """

    file: str
    root: str
    columns: Columns
    where: Where | None
    path_name: str
    row_word: str
    keep_extras: bool = False
    _mappings: dict[tuple[str, ...], dict[str, str]] = field(default_factory=dict)

    def entries(self, rows: Iterator[NumberedRow], listing: Listing) -> Iterator[Entry]:
        """Yield the entries of rows with their numbers, and count what is left out. Raises UserError."""
        clips = self._clips(rows)
        num_entries, unknown = 0, ""
        for number, clip in self._filtered(clips, listing) if self.where else clips:
            try:
                entry = self._entry(clip)
            except BadRowError as error:
                raise self._located(number, error) from None
            if isinstance(entry, Entry):
                num_entries += 1
                yield entry
            else:
                unknown = unknown or entry
                suffix = suffix_of(entry)
                listing.skip(f"row with a {suffix} file" if suffix else "row with a file without a suffix")
        if unknown and not num_entries:
            raise UserError(
                f"{self.file}: no path has the suffix of a video or an image, such as {unknown}. Set "
                "data.path_template={column}.mp4 if the suffix is missing, or add a column type with video or image."
            )

    def _located(self, number: int, error: BadRowError) -> UserError:
        return UserError(f"{self.file}{self.row_word}{number}: {error}")

    def _mapping(self, row: Mapping[str, Any]) -> dict[str, str]:
        """Our column names -> those of a row. Raises BadRowError if a needed one is missing."""
        names = tuple(row)
        if names not in self._mappings:
            if len(self._mappings) >= _MAX_MAPPINGS:
                self._mappings.clear()
            self._mappings[names] = self.columns.find(names, self.path_name)
        return self._mappings[names]

    def _clips(self, rows: Iterator[NumberedRow]) -> Iterator[tuple[int, ClipRow]]:
        is_given = bool(self.columns.given.get("spans"))
        names, mapping = None, {}
        for number, row in rows:
            try:
                if names != (names := tuple(row)):  # usually, all rows have the same columns
                    mapping = self.columns.match(names)
                clips = clip_rows(row, mapping, is_given) if "spans" in mapping else [ClipRow(row)]
            except BadRowError as error:
                raise self._located(number, error) from None
            for clip in clips:
                yield number, clip

    def _filtered(self, clips: Iterator[tuple[int, ClipRow]], listing: Listing) -> Iterator[tuple[int, ClipRow]]:
        """The clips that satisfy the filter."""
        assert self.where is not None
        columns = None
        while batch := list(itertools.islice(clips, _FILTERED_PER_BATCH)):
            cells = [clip.cells for _, clip in batch]
            if columns is None:
                columns = self.where.columns(list(dict.fromkeys(name for row in cells for name in row)), self.file)
            kept = self.where.matching(cells, columns, self.file)
            listing.skip("row removed by data.where", len(batch) - len(kept))
            yield from (batch[index] for index in kept)

    def _entry(self, clip: ClipRow) -> Entry | str:
        """The entry of a row; its path if the kind of the file is not known."""
        cells, mapping = clip.cells, self._mapping(clip.cells)
        row = {ours: cells[theirs] for ours, theirs in mapping.items()}
        template = self.columns.template
        path = path_in(template.path(cells) if template else row["path"])
        kind = None if is_missing(row.get("kind")) else row["kind"]
        if kind not in (None, "", "video", "image"):
            raise BadRowError(f"unknown type {kind!r}. Write video or image, or set data.columns={{kind: null}}.")
        image, control = self._beside(row.get("image"), "image"), row.get("control")
        if not isinstance(control, str) and not self.columns.given.get("control"):
            control = None  # the column only has a usual name, and holds something else
        caption, *more_captions = captions_in(row.get("caption"), row.get("captions"))
        start_s, end_s = self._range(clip, row, mapping)
        kind = kind or kind_of(path)
        if kind is None:
            return path
        return Entry(
            path=join(self.root, path),
            caption=caption,
            kind=kind,
            image_path=image,
            start_s=start_s,
            end_s=end_s,
            more_captions=tuple(text for text in more_captions if text),
            motion=score_in(row.get("motion")),
            duplicate_of=original if isinstance(original := row.get("duplicate_of"), str) and original else None,
            control_path=self._beside(control, "control"),
            extras=_extras(cells, mapping) if self.keep_extras else None,
        )

    def _beside(self, cell: Any, name: str) -> str | None:
        """The location of a file that belongs to a clip, None if there is none. name: of the column, for messages."""
        path = None if is_missing(cell) else cell
        if not isinstance(path, str | None):
            raise BadRowError(f"the {name} is {path!r}. Write a path.")
        return join(self.root, path_in(path)) if path and path.strip() else None

    def _range(
        self, clip: ClipRow, row: Mapping[str, Any], mapping: Mapping[str, str]
    ) -> tuple[float | None, float | None]:
        template = self.columns.template
        names = {find_column(name, clip.cells) for name in template.fields} if template else set()
        start, end = row.get("start_s"), row.get("end_s")
        if clip.own & names:  # the path is of a file of this clip alone, so the span is of the video it was cut from
            start, end = None, None
        elif clip.span:
            start, end = clip.span
        start_s, end_s = (
            seconds_in(value, mapping.get(ours, ours), ours) for value, ours in ((start, "start_s"), (end, "end_s"))
        )
        if start_s is not None and end_s is not None and start_s >= end_s:
            raise BadRowError(
                f"the range ends at {end_s:g} s, not after its start at {start_s:g} s. Correct one of them."
            )
        return start_s, end_s


def _extras(cells: Mapping[str, Any], mapping: Mapping[str, str]) -> dict[str, Any]:
    """The columns of a row that are none of ours."""
    used = set(mapping.values())
    return {str(name): value for name, value in cells.items() if name not in used}
