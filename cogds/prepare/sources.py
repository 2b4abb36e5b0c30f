"""The sources of a preparation: the rows of the dataset, what is known about each, and which rank prepares it."""

import functools
import hashlib
import itertools
import logging
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cogds.config.schema import DataConfig
from cogds.core.load_balance import assign_by_cost
from cogds.data.layouts.entry import Entry
from cogds.data.layouts.listing import Listing
from cogds.data.layouts.parts import iter_entries
from cogds.data.storage.access import Stamp, stamp
from cogds.data.storage.location import absolute, parse_member
from cogds.encode.scan_data import data_set
from cogds.errors import UserError
from cogds.formatting import counts
from cogds.prepare.clip_table import is_prepared
from cogds.prepare.scene import CutOptions
from cogds.prepare.state import SCENES, SOURCE_SCHEMA, WorkFolder, write_extras, write_table

logger = logging.getLogger(__name__)

# Part of every key: changes when the same source would be cut or scored differently by another version.
_VERSION = 1
_ROWS_PER_BATCH = 4096
_NUM_THREADS = 16  # on a network file system or a server, checking a file is mostly waiting


def make_work_folder(data: DataConfig, output: Path) -> WorkFolder:
    """Create the work folder of a table. Raises UserError if the table must not or cannot be written."""
    _check_output(data, output)
    folder = WorkFolder(output.with_name(f"{output.name}.work"))
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output: cannot create {folder.path} ({error.strerror}). Choose another folder.") from None
    return folder


def write_sources(folder: WorkFolder, data: DataConfig, options: CutOptions, num_ranks: int) -> None:
    """List the dataset, and deal the sources that are not known yet to the ranks.

    Raises UserError if the dataset cannot be read.
    """
    folder.remove_temporary()
    folder.merge_results(SCENES)
    known = folder.known_keys(SCENES)
    listing, stamp_of_tar = Listing(), functools.lru_cache(_NUM_THREADS)(stamp)
    with ThreadPoolExecutor(_NUM_THREADS) as threads:
        entries = iter_entries(data_set(data), need_captions=False, listing=listing, keep_extras=True)
        batches, extras = [], []
        while chunk := list(itertools.islice(entries, _ROWS_PER_BATCH)):
            rows = threads.map(lambda entry: _source(entry, options, stamp_of_tar), chunk)
            batches.append(pa.RecordBatch.from_pylist(list(rows), SOURCE_SCHEMA))
            extras += [entry.extras or {} for entry in chunk]
    if listing.skipped:
        logger.info("skipped in the dataset: %s", counts(listing.skipped))
    table = pa.Table.from_batches(batches, SOURCE_SCHEMA)
    # A list may name the same source twice. A file that cannot be opened has no key.
    rows_of = {key: row for row, key in enumerate(table.column("key").to_pylist()) if key and key not in known}
    todo = list(rows_of.values())
    paths, sizes = (table.column(name).take(pa.array(todo, pa.int64())).to_pylist() for name in ("path", "size"))
    num_rows = Counter(paths)  # per file; each row is a part of it
    ranks = np.full(len(table), -1, np.int32)
    ranks[todo] = assign_by_cost([size / num_rows[path] for path, size in zip(paths, sizes)], num_ranks)
    table = table.set_column(SOURCE_SCHEMA.get_field_index("rank"), SOURCE_SCHEMA.field("rank"), pa.array(ranks))
    write_table(folder.sources, SOURCE_SCHEMA, table)
    write_extras(folder, extras)


def _check_output(data: DataConfig, output: Path) -> None:
    source = Path(absolute(data.path))
    if output == source:
        raise UserError(f"--output: {output} is the list to prepare. Choose another file.")
    if output.suffix.lower() != ".parquet":
        raise UserError(f"--output: {output} is not a .parquet file. Choose another name.")
    if output.exists() and not is_prepared(output):
        raise UserError(
            f"--output: {output} is no table of `cogds prepare` and would be replaced. Choose another file."
        )
    if source.is_dir() and source in output.parents:
        raise UserError(
            f"--output: {output} is in the dataset's folder, which would then be read as this table. Choose another "
            "folder."
        )


def _source(entry: Entry, options: CutOptions, stamp_of_tar: Callable[[str], Stamp]) -> dict[str, Any]:
    row: dict[str, Any] = {name: value for name, value in entry._asdict().items() if name in SOURCE_SCHEMA.names}
    row |= {"size": 0, "file_key": None, "key": None, "rank": -1, "reason": None}
    for name in ("path", "image_path", "control_path", "duplicate_of", "caption_error"):
        row[name] = row[name] and row[name].encode(errors="backslashreplace").decode()
    try:
        "".join((entry.caption or "", *entry.more_captions)).encode()
    except UnicodeEncodeError:
        reason = "it holds half of a surrogate pair, which is not a character"
        row |= {"caption": None, "more_captions": (), "caption_error": reason}
    try:
        entry.path.encode()
        member = parse_member(entry.path)
        size, version = Stamp(member.size, stamp_of_tar(member.tar).version) if member else stamp(entry.path)
    except (OSError, ValueError) as error:  # a name that is not UTF-8 or has a null character is a ValueError
        return row | {"reason": getattr(error, "strerror", None) or str(error)}
    # A changed file has other keys.
    file_key = _digest(row["path"], size, version)
    key = _digest(file_key, row["kind"], row["start_s"], row["end_s"], sorted(asdict(options).items()), _VERSION)
    return row | {"size": size, "file_key": file_key, "key": key}


def _digest(*parts: Any) -> bytes:
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()
