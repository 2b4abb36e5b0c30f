"""Rows of Parquet files."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cogds.data.storage.access import open_binary
from cogds.errors import UserError

# In the metadata of Parquet files that are manifests of cogds, not lists of clips.
MANIFEST_MARK = b"cogds.manifest"
ROWS_PER_BATCH = 8192


@contextmanager
def _opened(file: str) -> Iterator[pq.ParquetFile]:
    try:
        with open_binary(file) as binary, pq.ParquetFile(binary) as table:
            yield table
    except (OSError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{file}: cannot be read as Parquet ({reason}). Write it again.") from None


def parquet_schema(file: str) -> pa.Schema:
    """The columns of a file. Raises UserError if it cannot be read."""
    with _opened(file) as table:
        return table.schema_arrow


def is_manifest(file: str) -> bool:
    """Whether a Parquet file is a manifest of cogds."""
    try:
        return MANIFEST_MARK in (parquet_schema(file).metadata or {})
    except UserError:
        return False  # reading it will raise an error that says more


def read_parquet(file: str, columns: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows of a Parquet file with their numbers. columns: those to read."""
    number = 0
    with _opened(file) as table:
        for batch in table.iter_batches(ROWS_PER_BATCH, columns=columns):
            names = batch.schema.names
            for cells in zip(*(column.to_pylist() for column in batch.columns)):
                number += 1
                yield number, dict(zip(names, cells))


def check_type(file: str, kind: pa.DataType, ours: str, theirs: str) -> None:
    """Raise UserError if a column cannot hold paths, captions, ..., or holds the videos themselves."""
    if ours in ("spans", "motion", "duplicate_of"):  # values of other forms are ignored
        return
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if ours in ("path", "image", "control") and _holds_bytes(kind):
        raise UserError(
            f"{file}: column '{theirs}' holds the files themselves ({kind}), which is not supported. Write them to "
            "files, and their paths to a column."
        )
    if ours in ("caption", "captions") and (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        kind = kind.value_type
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)
    is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
    if is_text or (ours in ("start_s", "end_s") and is_number):
        return
    if ours == "path" and pa.types.is_struct(kind) and kind.get_field_index("path") >= 0:
        return
    advice = "seconds, or HH:MM:SS.mmm" if ours in ("start_s", "end_s") else "strings"
    raise UserError(
        f"{file}: column '{theirs}' holds {kind}, which is not a {ours}. Write {advice}, or set "
        f"data.columns={{{ours}: null}} if it is something else."
    )


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(_holds_bytes(field.type) for field in kind)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _holds_bytes(kind.value_type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)
