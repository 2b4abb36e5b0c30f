"""The state of a scan: a work folder beside the manifest with the entries, the files to scan, and partial results.

Several runs may scan the same data at once; each has files of its own. A rank writes what it finds as small complete
files, at least every half minute, so that a killed run loses no more than that. Later runs use the partial results of
all runs. The last step of a scan moves them into the manifest and removes them.
"""

import contextlib
import dataclasses
import fcntl
import heapq
import itertools
import json
import os
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cogds.data.layouts.data_set import DataSet
from cogds.data.layouts.entry import ENTRY_COLUMNS
from cogds.data.layouts.listing import Listing
from cogds.data.layouts.parts import Part, part_from_json, part_to_json
from cogds.data.manifest.table import open_manifest, write_errors
from cogds.files import is_abandoned, is_temporary, process_tag, whole_file

Share = tuple[int, int]  # rank, number of ranks

# Partial results are written after this many files or seconds, whichever comes first.
FLUSH_FILES, FLUSH_S = 2000, 30.0

# key, image_key, control_key: null if the name is not valid UTF-8. caption and paths: with escapes in that case.
ENTRY_SCHEMA = pa.schema(
    [
        *ENTRY_COLUMNS,
        ("set", pa.int16()),
        ("key", pa.binary(16)),
        ("image_key", pa.binary(16)),
        ("control_key", pa.binary(16)),
    ]
)
# The distinct files. known_size, known_mtime_ns: of the file when an earlier scan read it, else null.
FILE_SCHEMA = pa.schema(
    [
        ("key", pa.binary(16)),
        ("kind", pa.string()),
        ("path", pa.string()),
        ("known_size", pa.int64()),
        ("known_mtime_ns", pa.int64()),
    ]
)
# What a file of this size and modification time holds. A file that cannot be used has a reason, and frames is null.
# A failure that may not come again, such as a missing file or a timeout, has no size either.
RESULT_SCHEMA = pa.schema(
    [
        ("key", pa.binary(16)),
        ("size", pa.int64()),
        ("mtime_ns", pa.int64()),
        ("frames", pa.int32()),
        ("fps", pa.float64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("rotation", pa.int16()),
        ("duration_s", pa.float64()),
        ("processing", pa.string()),
        ("reason", pa.string()),
        ("digest", pa.binary(16)),
    ]
)
_RESULTS = "results-"
_PART = b"part"  # in the metadata of a batch of entries


@dataclass(frozen=True)
class Scan:
    """A scan in progress, the same on all ranks.

    Attributes:
        sets: the datasets.
        manifest: the manifest that it will write.
        run: a name that no other run has; it begins with the time.
        default_caption: caption of clips that have none.
        listings: counts of each dataset.
        num_shares: number of ranks that have listed a share.
        num_files: number of distinct files, of all ranks.
    """

    sets: Sequence[DataSet]
    manifest: Path
    run: str
    default_caption: str | None
    listings: Sequence[Listing]
    num_shares: int = 0
    num_files: int = 0

    @property
    def skipped(self) -> Mapping[str, int]:
        """What the listing of all datasets skipped: reason -> number."""
        total = Listing()
        for listing in self.listings:
            total.add(listing)
        return total.skipped

    @property
    def folder(self) -> Path:
        return self.manifest.with_name(f"{self.manifest.name}.work")

    @property
    def parts(self) -> Path:
        return self.folder / f"parts-{self.run}.jsonl"

    def entries(self, rank: int) -> Path:
        """The entries that a rank has listed."""
        return self.folder / f"entries-{self.run}-{rank:05d}.arrow"

    @property
    def files(self) -> Path:
        return self.folder / f"files-{self.run}.arrow"


def new_scan(sets: Sequence[DataSet], manifest: Path, default_caption: str | None = None) -> Scan:
    """Create the work folder and remove what killed runs left in it, except for their partial results.

    Raises UserError if the manifest is another file or the folder cannot be written.
    """
    if manifest.exists():
        with open_manifest(manifest):
            pass  # raise for another file now, not after hours of scanning
    run = f"{time.time_ns():020d}-{process_tag()}-{uuid.uuid4().hex[:4]}"
    scan = Scan(tuple(sets), manifest, run, default_caption, [Listing() for _ in sets])
    with write_errors(manifest):
        scan.folder.mkdir(parents=True, exist_ok=True)
        for path in scan.folder.iterdir():
            is_result = path.name.startswith(_RESULTS) and not is_temporary(path)
            if not is_result and is_abandoned(path):
                path.unlink(missing_ok=True)
    return scan


# --- parts of the listing, and entries


def write_parts(scan: Scan, parts: Iterable[tuple[int, Part]]) -> None:
    """Write the parts, with the numbers of their datasets. Raises UserError if that fails."""
    with write_errors(scan.parts), whole_file(scan.parts) as partial, partial.open("w") as file:
        file.writelines(json.dumps([set_number, *part_to_json(part)]) + "\n" for set_number, part in parts)


def parts_of(scan: Scan, share: Share) -> Iterator[tuple[int, int, Part]]:
    """The parts of one rank: number of the part, number of the dataset, part."""
    with scan.parts.open() as lines:
        for number, line in itertools.islice(enumerate(lines), share[0], None, share[1]):
            set_number, *part = json.loads(line)
            yield number, set_number, part_from_json(*part)


def write_entries(scan: Scan, share: Share, batches: Iterable[tuple[int, pa.RecordBatch]]) -> None:
    """Write the entries of one rank (ENTRY_SCHEMA), with the numbers of their parts. Raises UserError if that fails."""
    file = scan.entries(share[0])
    with write_errors(file), whole_file(file) as partial, pa.ipc.new_file(str(partial), ENTRY_SCHEMA) as writer:
        for part_number, batch in batches:
            writer.write_batch(batch, {_PART: str(part_number)})


def read_entries(scan: Scan) -> Iterator[pa.RecordBatch]:
    """Read the entries of all ranks in the order of the parts; memory-mapped, so that they take no memory."""
    shares = [_numbered_entries(scan.entries(rank)) for rank in range(scan.num_shares)]
    for _, batch in heapq.merge(*shares, key=lambda pair: pair[0]):
        yield batch


def _numbered_entries(file: Path) -> Iterator[tuple[int, pa.RecordBatch]]:
    with pa.memory_map(str(file)) as mapped, pa.ipc.open_file(mapped) as reader:
        for number in range(reader.num_record_batches):
            batch, metadata = reader.get_batch_with_custom_metadata(number)
            yield int(metadata[_PART]), batch


# --- tables in the work folder


def write_table(file: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    """Write a table of the work folder. Raises UserError if it cannot be written."""
    with write_errors(file), whole_file(file) as partial, pa.ipc.new_file(str(partial), schema) as writer:
        for batch in batches:
            writer.write_batch(batch)


def read_batches(file: Path) -> Iterator[pa.RecordBatch]:
    """Read a table batch by batch as it was written; memory-mapped, so that it takes no memory."""
    with pa.memory_map(str(file)) as mapped, pa.ipc.open_file(mapped) as reader:
        yield from map(reader.get_batch, range(reader.num_record_batches))


def write_files(scan: Scan, files: Iterable[pa.RecordBatch], is_first: Sequence[np.ndarray]) -> Scan:
    """Write the files to scan (FILE_SCHEMA, with duplicates) and return the scan with their number.

    is_first: masks of the rows that are not duplicates of earlier ones.
    """
    num_files = sum(int(mask.sum()) for mask in is_first)
    # Ranks take batches in turn: small batches, so that shares are even, but at most some ten thousand.
    batch_size = min(1024, max(1, num_files // 8192))
    distinct = (batch.filter(pa.array(mask)) for batch, mask in zip(files, is_first))
    slices = (batch.slice(start, batch_size) for batch in distinct for start in range(0, len(batch), batch_size))
    write_table(scan.files, FILE_SCHEMA, slices)
    return dataclasses.replace(scan, num_files=num_files)


def files_of(scan: Scan, share: Share) -> list[pa.RecordBatch]:
    """The files of one rank."""
    return list(itertools.islice(read_batches(scan.files), share[0], None, share[1]))


# --- partial results


class ResultWriter:
    """Writes a rank's results (RESULT_SCHEMA) as partial results: complete files with the rows since the last one."""

    def __init__(self, scan: Scan, share: Share) -> None:
        self._folder, self._stem = scan.folder, f"{_RESULTS}{scan.run}-{share[0]:05d}"
        self._num_files = 0
        self._clear()

    def _clear(self) -> None:
        self._rows: list[dict[str, Any]] = []
        self._last_flush_s = time.monotonic()

    def add(self, row: dict[str, Any]) -> None:
        """Add a row; columns that it lacks are null."""
        self._rows.append(row)
        if len(self._rows) >= FLUSH_FILES or time.monotonic() - self._last_flush_s >= FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Write the rows added since the last flush."""
        if self._rows:
            file = self._folder / f"{self._stem}-{self._num_files:06d}.arrow"
            write_table(file, RESULT_SCHEMA, [pa.RecordBatch.from_pylist(self._rows, RESULT_SCHEMA)])
            self._num_files += 1
        self._clear()

    def __enter__(self) -> "ResultWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.flush()  # after an error or Ctrl-C, too


@dataclass(frozen=True)
class Results:
    """Results of scans (RESULT_SCHEMA).

    Attributes:
        rows: of all runs, the newest first.
        failed: failures of this run that a later one tries again, so they are in no manifest.
        files: the partial results that were read.
    """

    rows: pa.Table
    failed: pa.Table
    files: Sequence[Path]


def read_results(scan: Scan) -> Results:
    """Read the partial results of all runs."""
    # Names begin with the time.
    files = sorted((path for path in scan.folder.glob(f"{_RESULTS}*") if not is_temporary(path)), reverse=True)
    every, own = [RESULT_SCHEMA.empty_table()], [RESULT_SCHEMA.empty_table()]
    for file in files:
        try:
            with pa.OSFile(str(file)) as opened:
                table = pa.ipc.open_file(opened).read_all()
        except FileNotFoundError:  # another run has just moved it into the manifest
            continue
        if table.schema.equals(RESULT_SCHEMA):  # else of another version
            every.append(table)
            own += [table] if scan.run in file.name else []
    rows, failed = pa.concat_tables(every), pa.concat_tables(own)
    return Results(rows.filter(pc.is_valid(rows["size"])), failed.filter(pc.is_null(failed["size"])), files)


# --- the last step


@contextlib.contextmanager
def manifest_lock(scan: Scan) -> Iterator[None]:
    """One run at a time reads and replaces the manifest; otherwise it could lose what another has just added."""
    folder = os.open(scan.manifest.parent, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def remove_state(scan: Scan, results: Iterable[Path] = ()) -> None:
    """Remove the scan's files, and partial results that are in the manifest now."""
    own = [file for file in scan.folder.glob(f"*-{scan.run}*") if not file.name.startswith(_RESULTS)]
    for file in (*results, *own):
        file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # it holds another run's files, or is gone
        scan.folder.rmdir()
