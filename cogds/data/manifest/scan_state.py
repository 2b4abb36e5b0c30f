"""The state of a scan: a work folder beside the manifest with the entries, the files to scan, and partial results.

Several runs may scan the same data at once; each has files of its own. A rank writes what it finds as small complete
files, at least every half minute, so that a killed run loses no more than that. Later runs use the partial results of
all runs. The last step of a scan moves them into the manifest and removes them.
"""

import contextlib
import dataclasses
import fcntl
import itertools
import os
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cogds.data.manifest.table import open_manifest, write_errors
from cogds.files import is_abandoned, is_temporary, process_tag, whole_file

Share = tuple[int, int]  # rank, number of ranks

# Partial results are written after this many files or seconds, whichever comes first.
FLUSH_FILES, FLUSH_S = 2000, 30.0

# key, image_key: null if the name is not valid UTF-8. path, caption, image_path: with escapes in that case.
ENTRY_SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("kind", pa.string()),
        ("caption", pa.string()),
        ("caption_error", pa.string()),
        ("image_path", pa.string()),
        ("start_s", pa.float64()),
        ("end_s", pa.float64()),
        ("motion", pa.float64()),
        ("duplicate_of", pa.string()),
        ("set", pa.int16()),
        ("key", pa.binary(16)),
        ("image_key", pa.binary(16)),
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
        ("reason", pa.string()),
        ("digest", pa.binary(16)),
    ]
)
_RESULTS = "results-"


@dataclass(frozen=True)
class Scan:
    """A scan in progress, the same on all ranks.

    Attributes:
        manifest: the manifest that it will write.
        run: a name that no other run has; it begins with the time.
        num_files: number of distinct files, of all ranks.
        default_caption: caption of clips that have none.
    """

    manifest: Path
    run: str
    num_files: int
    default_caption: str | None = None

    @property
    def folder(self) -> Path:
        return self.manifest.with_name(f"{self.manifest.name}.work")

    @property
    def entries(self) -> Path:
        return self.folder / f"entries-{self.run}.arrow"

    @property
    def files(self) -> Path:
        return self.folder / f"files-{self.run}.arrow"


def new_scan(manifest: Path, default_caption: str | None = None) -> Scan:
    """Create the work folder and remove what killed runs left in it, except for their partial results.

    Raises UserError if the manifest is another file or the folder cannot be written.
    """
    if manifest.exists():
        with open_manifest(manifest):
            pass  # raise for another file now, not after hours of scanning
    scan = Scan(manifest, f"{time.time_ns():020d}-{process_tag()}-{uuid.uuid4().hex[:4]}", 0, default_caption)
    with write_errors(manifest):
        scan.folder.mkdir(parents=True, exist_ok=True)
        for path in scan.folder.iterdir():
            is_result = path.name.startswith(_RESULTS) and not is_temporary(path)
            if not is_result and is_abandoned(path):
                path.unlink(missing_ok=True)
    return scan


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
    for file in (*results, scan.entries, scan.files):
        file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # it holds another run's files, or is gone
        scan.folder.rmdir()
