"""Keys of files, and fast look-up by key among millions of rows."""

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

# The kind of a conditioning image. It differs from "image", which is a clip of one frame.
CONDITION = "condition"
# The kind of a control video, or of a control image of a clip of one frame.
CONTROL = "control"


def file_key(kind: str, path: str) -> bytes | None:
    """Key of a file and the way to open it; None if the path is not valid UTF-8."""
    try:
        return hashlib.blake2b(f"{kind}\0{path}".encode(), digest_size=16).digest()
    except UnicodeEncodeError:
        return None


def file_keys(kinds: pa.Array, paths: pa.Array) -> pa.Array:
    """binary(16): the key of every file, null for null paths."""
    pairs = zip(kinds.to_pylist(), paths.to_pylist())
    return pa.array([None if path is None else file_key(kind, path) for kind, path in pairs], pa.binary(16))


def kinds_of(kind: str, num_files: int) -> pa.Array:
    """The kinds of `num_files` files of one kind."""
    return pa.repeat(kind, num_files)


def first_occurrences(chunks: Sequence[pa.Array]) -> list[np.ndarray]:
    """For each chunk of keys, bool masks of the keys that did not occur before; null keys never do."""
    keys = pa.chunked_array(chunks, pa.binary(16))
    unique = pc.unique(keys).drop_null()
    numbers = pc.fill_null(pc.index_in(keys, unique, skip_nulls=True), -1).to_numpy()
    # Numbers are in the order of first occurrence: a new key has a larger number than all before it.
    largest_before = np.maximum.accumulate(np.concatenate([[-1], numbers]))[:-1]
    return np.split(numbers > largest_before, np.cumsum([len(chunk) for chunk in chunks])[:-1])


def look_up(table: pa.Table, chunks: Sequence[pa.Array]) -> Iterator[dict[str, pa.Array]]:
    """For each chunk of keys, the table's columns at the first row with each key, and null for unknown keys.

    All chunks are looked up at once, because the hash table of a million rows takes a second and there are hundreds of
    chunks.
    """
    columns = {name: table[name].combine_chunks() for name in table.column_names}
    rows = pc.index_in(pa.chunked_array(chunks, pa.binary(16)), columns["key"], skip_nulls=True).combine_chunks()
    start = 0
    for chunk in chunks:
        chunk_rows = rows.slice(start, len(chunk))
        yield {name: values.take(chunk_rows) for name, values in columns.items()}
        start += len(chunk)
