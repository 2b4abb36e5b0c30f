"""The manifest: one Parquet table with a row for every clip of every data set, and what its file holds.

This file owns the table: its columns, where it is, how it is opened and replaced. `inventory` makes it, `contents`
adds digests, `rows` says what stands in a row.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from cogds.data.manifest.layouts import MANIFEST_MARK
from cogds.errors import UserError
from cogds.files import whole_file

ROWS_AT_ONCE = 1 << 16

# status: "ok", or "unusable" and reason says why. The image is the clip's conditioning image, where one is given.
SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("size", pa.int64()),
        ("mtime_ns", pa.int64()),
        ("kind", pa.string()),
        ("frames", pa.int32()),
        ("fps", pa.float64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("rotation", pa.int16()),
        ("duration_s", pa.float64()),
        ("caption", pa.string()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("image_path", pa.string()),
        ("start_s", pa.float64()),
        ("end_s", pa.float64()),
        ("set", pa.int16()),
        ("digest", pa.binary(16)),
        ("image_digest", pa.binary(16)),
        ("image_size", pa.int64()),
        ("image_mtime_ns", pa.int64()),
    ],
    metadata={MANIFEST_MARK: b"1"},
)


@dataclass(frozen=True)
class DataSet:
    """A folder, list or table of clips, and what a table calls its columns: see `layouts.iter_entries`."""

    path: str
    columns: Mapping[str, str] = field(default_factory=dict)


def manifest_file(sets: Sequence[DataSet], cache_dir: str | Path, manifest: str | None = None) -> Path:
    """Where the manifest is: `manifest` if given, else a place in cache_dir named after the data sets."""
    if manifest is not None:
        return Path(os.path.abspath(os.path.expanduser(manifest)))
    paths = [os.path.abspath(os.path.expanduser(one.path)) for one in sets]
    fields = json.dumps([[path, sorted(one.columns.items())] for path, one in zip(paths, sets)])
    name = re.sub(r"[^\w.-]", "_", Path(paths[0]).name, flags=re.ASCII) or "data"
    digest = hashlib.blake2b(fields.encode(errors="surrogateescape"), digest_size=4).hexdigest()
    return Path(os.path.abspath(cache_dir)) / "manifests" / f"{name[:64]}-{digest}.parquet"


def read(file: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """The manifest's table (SCHEMA), or some of its columns. Raises UserError where it is not there or no manifest."""
    with open_manifest(file) as table:
        return table.read(columns=list(columns) if columns else None)


def read_batches(file: Path, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
    """The same, ROWS_AT_ONCE rows at a time."""
    with open_manifest(file) as table:
        yield from table.iter_batches(ROWS_AT_ONCE, columns=list(columns) if columns else None)


def write(file: Path, batches: Iterable[pa.RecordBatch]) -> None:
    """Replace the manifest by these rows (SCHEMA). Raises UserError where that cannot be."""
    with writing(file), whole_file(file) as partial, pq.ParquetWriter(partial, SCHEMA, compression="zstd") as writer:
        for batch in batches:
            writer.write_batch(batch)


@contextlib.contextmanager
def open_manifest(file: Path) -> Iterator[pq.ParquetFile]:
    """The file, opened. Raises UserError where it is not there, torn, a table of something else or of another time."""
    try:
        opened = pq.ParquetFile(file)
    except FileNotFoundError:
        raise UserError(f"there is no manifest {file}: check the spelling of data.manifest") from None
    except (OSError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"the manifest {file} cannot be read ({reason}): delete it, it is made anew") from None
    with opened:
        mark = (opened.schema_arrow.metadata or {}).get(MANIFEST_MARK)
        if mark is None:
            raise UserError(
                f"{file} is a table of something else and would be overwritten: give data.manifest another name"
            )
        if mark != SCHEMA.metadata[MANIFEST_MARK]:
            raise UserError(f"the manifest {file} was written by another version: delete it, it is made anew")
        yield opened


@contextlib.contextmanager
def writing(file: Path) -> Iterator[None]:
    """Say it as a UserError where the manifest, or a file beside it, cannot be written."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error).splitlines()[0]
        raise UserError(
            f"{file} cannot be written ({reason}): make room there, or give data.manifest a place"
        ) from None
