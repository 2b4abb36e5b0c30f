"""The sources of a preparation: the rows of the dataset, what is known about each, and which rank prepares it."""

import hashlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from cogds.config.schema import DataConfig
from cogds.core.load_balance import assign_by_cost
from cogds.data.manifest.layouts import Entry, iter_entries
from cogds.data.storage.access import stamp
from cogds.data.storage.location import absolute
from cogds.errors import UserError
from cogds.prepare.clip_table import is_prepared
from cogds.prepare.scene import CutOptions
from cogds.prepare.state import SCENES, SOURCE_SCHEMA, WorkFolder, write_extras, write_table

# Part of every key: changes when the same source would be cut or scored differently by another version.
_VERSION = 1
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
    known = folder.read_results(SCENES)
    columns = {str(name): column for name, column in data.columns.items()}
    with ThreadPoolExecutor(_NUM_THREADS) as threads:
        entries = list(iter_entries(data.path, columns, need_captions=False, keep_extras=True))
        rows = list(threads.map(partial(_source, options=options), entries))
    # A list may name the same source twice.
    todo = list({row["key"]: row for row in rows if row["reason"] is None and row["key"] not in known}.values())
    num_rows = Counter(row["path"] for row in todo)  # of a file of which each row has a part
    ranks = assign_by_cost([row["size"] / num_rows[row["path"]] for row in todo], num_ranks).tolist()
    for row, rank in zip(todo, ranks):
        row["rank"] = rank
    write_table(folder.sources, SOURCE_SCHEMA, rows)
    write_extras(folder, [entry.extras or {} for entry in entries])


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


def _source(entry: Entry, options: CutOptions) -> dict[str, Any]:
    names = ("path", "kind", "start_s", "end_s", "caption", "caption_error", "image_path", "motion", "duplicate_of")
    row = {name: getattr(entry, name) for name in names}
    row |= {"size": 0, "file_key": None, "key": None, "rank": -1, "reason": None}
    try:
        (entry.caption or "").encode()
    except UnicodeEncodeError:
        row |= {"caption": None, "caption_error": "it holds half of a surrogate pair, which is not a character"}
    try:
        entry.path.encode()
        size, version = stamp(entry.path)
    except (OSError, ValueError) as error:  # a name that is not UTF-8 or has a null character is a ValueError
        reason = getattr(error, "strerror", None) or str(error)
        return row | {"path": entry.path.encode(errors="backslashreplace").decode(), "reason": reason}
    # A changed file has other keys.
    file_key = _digest(row["path"], size, version)
    key = _digest(file_key, row["kind"], row["start_s"], row["end_s"], sorted(asdict(options).items()), _VERSION)
    return row | {"size": size, "file_key": file_key, "key": key}


def _digest(*parts: Any) -> bytes:
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()
