"""The captions of the manifest's rows as Arrow tables: prefixes, and all captions of a clip as one list."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_EMPTY = pa.scalar("", pa.large_string())


def with_prefixes(table: pa.Table, prefixes: Sequence[str]) -> pa.Table:
    """Put a prefix and a space before every caption of a manifest. prefixes: of each dataset, "" for none."""
    if not any(prefixes):
        return table
    starts = pa.array([f"{prefix.strip()} " if prefix.strip() else "" for prefix in prefixes], pa.large_string())
    starts = starts.take(table.column("set").combine_chunks())
    lists = table.column("more_captions").combine_chunks()
    more = pc.binary_join_element_wise(starts.take(pc.list_parent_indices(lists)), lists.flatten(), _EMPTY)
    columns = {
        "caption": pc.binary_join_element_wise(starts, table.column("caption"), _EMPTY),
        "more_captions": make_lists(list_lengths(lists), more),
    }
    for name, column in columns.items():
        table = table.set_column(table.column_names.index(name), name, column)
    return table


def list_lengths(lists: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """int64 [N]: lengths of lists; 0 for null."""
    return pc.fill_null(pc.list_value_length(lists), 0).to_numpy().astype(np.int64)


def make_lists(lengths: np.ndarray, values: pa.Array) -> pa.LargeListArray:
    """Split values into lists of these lengths."""
    return pa.LargeListArray.from_arrays(np.append(0, np.cumsum(lengths)), values)


def join_lists(first: pa.Array, more: pa.LargeListArray) -> pa.LargeListArray:
    """Put one value before each list. more: null for an empty list."""
    lengths = 1 + list_lengths(more)
    values = pa.concat_arrays([first, more.flatten()])
    is_first = np.zeros(len(values), bool)
    is_first[np.cumsum(lengths) - lengths] = True
    order = np.empty(len(values), np.int64)
    order[is_first] = np.arange(len(first))
    order[~is_first] = np.arange(len(first), len(values))
    return make_lists(lengths, values.take(pa.array(order)))
