"""Lists and tables of clips: which files are one, and their entries."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pyarrow as pa

from cogds.data.layouts.cells import BadRowError
from cogds.data.layouts.columns import Columns, PathTemplate, find_column
from cogds.data.layouts.data_set import DataSet
from cogds.data.layouts.entry import Entry
from cogds.data.layouts.line_lists import read_lines
from cogds.data.layouts.listing import Listing, add_names
from cogds.data.layouts.parquet_tables import check_type, parquet_schema, read_parquet
from cogds.data.layouts.rows import Table
from cogds.data.layouts.text_tables import read_csv, read_json, read_jsonl
from cogds.data.layouts.where import Where
from cogds.data.storage.location import absolute, parent
from cogds.data.video.kinds import suffix_of
from cogds.errors import UserError

TABLE_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
LIST_SUFFIXES = (*TABLE_SUFFIXES, ".txt")


class ListReader:
    """Reads the lists and tables of a dataset."""

    def __init__(self, data_set: DataSet, need_captions: bool, keep_extras: bool = False) -> None:
        """Check the settings. Raises UserError if one is wrong.

        need_captions: whether a table without captions is an error. keep_extras: whether entries have the other columns
        of their rows.
        """
        template = PathTemplate(data_set.path_template) if data_set.path_template else None
        if template and not template.is_valid:
            raise UserError(
                f"data.path_template: {template.text!r} has no column in braces, or an unmatched brace. Write the path "
                "of a row, such as {vid}.mp4."
            )
        self._columns = Columns(data_set.columns, template, need_captions)
        self._root = absolute(data_set.root) if data_set.root else None
        self._where = Where(data_set.where) if data_set.where else None
        self._keep_extras = keep_extras

    def entries(self, file: str, listing: Listing) -> Iterator[Entry]:
        """Yield the entries of a list, and count what is left out. Raises UserError."""
        if suffix_of(file) not in LIST_SUFFIXES:
            raise UserError(
                f"data.path: {file} is not a list of clips. Give a folder, or a file of type "
                f"{', '.join(LIST_SUFFIXES)}."
            )
        add_names(listing.lists, [file])
        yield from self._table(file).entries(self._rows(file), listing)

    def _table(self, file: str) -> Table:
        suffix, columns = suffix_of(file), self._columns
        if suffix == ".txt":  # its columns have our names
            columns = replace(columns, given={})
        return Table(
            file,
            self._root if self._root is not None else parent(file),
            columns,
            self._where,
            path_name="file_path" if suffix == ".json" else "file_name",
            row_word=": row " if suffix in (".json", ".parquet") else ":",
            keep_extras=self._keep_extras,
        )

    def _rows(self, file: str) -> Iterator[tuple[int, dict[str, Any]]]:
        match suffix_of(file):
            case ".json":
                return read_json(file)
            case ".csv" | ".tsv":
                return read_csv(file, self._columns)
            case ".parquet":
                return self._read_parquet(file)
            case ".txt":
                return read_lines(file)
        return read_jsonl(file)

    def _read_parquet(self, file: str) -> Iterator[tuple[int, dict[str, Any]]]:
        schema, columns = parquet_schema(file), self._columns
        try:
            mapping = columns.match(schema.names)
            if "spans" not in mapping or not pa.types.is_list(schema.field(mapping["spans"]).type):
                columns.find(schema.names, "file_name")  # else the clips in the list may have the missing columns
        except BadRowError as error:
            raise UserError(f"{file}: {error}") from None
        for ours, theirs in list(mapping.items()):
            try:
                check_type(file, schema.field(theirs).type, ours, theirs)
            except UserError:
                if ours != "control" or columns.given.get("control"):
                    raise
                del mapping[ours]  # the column only has a usual name, and holds something else
        in_template = [find_column(name, schema.names) for name in columns.template.fields] if columns.template else []
        in_filter = self._where.columns(schema.names, file) if self._where else []
        needed = {*mapping.values(), *in_filter, *filter(None, in_template)}
        return read_parquet(file, [name for name in schema.names if self._keep_extras or name in needed])

    def is_list(self, file: str, if_damaged: bool = False) -> bool:
        """Whether a table has the columns of a list of clips, or is empty."""
        try:
            if suffix_of(file) == ".parquet":
                names = parquet_schema(file).names
            else:
                row = next(itertools.islice(self._rows(file), 1), None)
                if row is None:
                    return True
                names = list(row[1])
            self._columns.find(names, "path")
        except BadRowError:
            return False
        except UserError:
            return if_damaged
        return True
