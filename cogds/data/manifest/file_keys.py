"""A file's key, and what is known of it found by that key among millions of rows."""

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

# The kind of a conditioning image: its facts are kept apart from those of a picture that is a clip.
CONDITION = "condition"


def file_key(kind: str, path: str) -> bytes | None:
    """Of a file and how it is opened; None where its name is not UTF-8."""
    try:
        return hashlib.blake2b(f"{kind}\0{path}".encode(), digest_size=16).digest()
    except UnicodeEncodeError:
        return None


def keys_of(kinds: pa.Array, paths: pa.Array) -> pa.Array:
    """The key of every file, null where there is no path."""
    pairs = zip(kinds.to_pylist(), paths.to_pylist())
    return pa.array([None if path is None else file_key(kind, path) for kind, path in pairs], pa.binary(16))


def conditions(count: int) -> pa.Array:
    """The kinds of so many conditioning images."""
    return pa.repeat(CONDITION, count)


def first_of_each(chunks: Sequence[pa.Array]) -> list[np.ndarray]:
    """For each key of every chunk whether it stands there for the first time; never for null."""
    keys = pa.chunked_array(chunks, pa.binary(16))
    unique = pc.unique(keys).drop_null()
    numbers = pc.fill_null(pc.index_in(keys, unique, skip_nulls=True), -1).to_numpy()
    # Numbers are in the order of first appearance: a new one is above all before it.
    before = np.maximum.accumulate(np.concatenate([[-1], numbers]))[:-1]
    return np.split(numbers > before, np.cumsum([len(chunk) for chunk in chunks])[:-1])


def look_up(table: pa.Table, chunks: Sequence[pa.Array]) -> Iterator[dict[str, pa.Array]]:
    """For every chunk of keys the table's columns, at the row where each key stands first; null where it does not.

    All chunks at once: the hash table of a million rows takes a second, and there are hundreds of chunks.
    """
    columns = {name: table[name].combine_chunks() for name in table.column_names}
    rows = pc.index_in(pa.chunked_array(chunks, pa.binary(16)), columns["key"], skip_nulls=True).combine_chunks()
    start = 0
    for chunk in chunks:
        here = rows.slice(start, len(chunk))
        yield {name: values.take(here) for name, values in columns.items()}
        start += len(chunk)
