"""The manifest: a Parquet table with a row for every clip of every dataset, and what the clip's file holds.

This module owns the table's columns, where it is, and how it is read and replaced. `scan` makes it, `rows` computes its
rows, and `assignment` assigns the rows to buckets.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cogds.data.layouts.data_set import DataSet
from cogds.data.layouts.parquet_tables import MANIFEST_MARK
from cogds.data.storage.location import absolute
from cogds.errors import UserError
from cogds.files import whole_file

ROWS_PER_BATCH = 1 << 16
_SKIPPED_MARK = b"cogds.skipped"

# more_captions: null if there are none. status: "ok", or "unusable" with the reason. motion, duplicate_of: scores of
# `cogds prepare`, null without them. image_*: the clip's conditioning image, if one is given.
# control_*: its control video; control_reason: why that cannot be used, which matters only if it is used.
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
        ("processing", pa.string()),
        ("caption", pa.string()),
        ("more_captions", pa.list_(pa.string())),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("image_path", pa.string()),
        ("start_s", pa.float64()),
        ("end_s", pa.float64()),
        ("motion", pa.float64()),
        ("duplicate_of", pa.string()),
        ("set", pa.int16()),
        ("digest", pa.binary(16)),
        ("image_digest", pa.binary(16)),
        ("image_size", pa.int64()),
        ("image_mtime_ns", pa.int64()),
        ("control_path", pa.string()),
        ("control_digest", pa.binary(16)),
        ("control_size", pa.int64()),
        ("control_mtime_ns", pa.int64()),
        ("control_frames", pa.int32()),
        ("control_fps", pa.float64()),
        ("control_duration_s", pa.float64()),
        ("control_reason", pa.string()),
    ],
    metadata={MANIFEST_MARK: b"2"},
)


def manifest_file(sets: Sequence[DataSet], cache_dir: str | Path, manifest: str | None = None) -> Path:
    """Path of the manifest: `manifest` if given, else a name in `cache_dir` that follows from the datasets."""
    if manifest is not None:
        return Path(os.path.abspath(os.path.expanduser(manifest)))
    paths = [absolute(data_set.path) for data_set in sets]
    fields = json.dumps([[path, *_settings(data_set)] for path, data_set in zip(paths, sets)])
    name = re.sub(r"[^\w.-]", "_", Path(paths[0]).name, flags=re.ASCII) or "data"
    digest = hashlib.blake2b(fields.encode(errors="surrogateescape"), digest_size=4).hexdigest()
    return Path(os.path.abspath(cache_dir)) / "manifests" / f"{name[:64]}-{digest}.parquet"


def _settings(data_set: DataSet) -> list[Any]:
    """What a dataset's entries depend on besides its path."""
    settings: list[Any] = [sorted(data_set.columns.items())]
    others = (data_set.root and absolute(data_set.root), data_set.path_template, data_set.where)
    return [*settings, *others] if any(others) else settings  # so that older manifests keep their names


def read_manifest(file: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Read the manifest (SCHEMA), or some of its columns. Raises UserError as `open_manifest`."""
    with open_manifest(file) as table:
        held = table.schema_arrow.names
        rows = table.read(columns=[name for name in columns or held if name in held])
    missing = [name for name in columns or SCHEMA.names if name not in held]  # written before there were controls
    for name in missing:
        rows = rows.append_column(name, pa.nulls(len(rows), SCHEMA.field(name).type))
    return rows


def read_manifest_batches(file: Path) -> Iterator[pa.RecordBatch]:
    """Read the manifest ROWS_PER_BATCH rows at a time. Raises UserError as `open_manifest`."""
    with open_manifest(file) as table:
        for batch in table.iter_batches(ROWS_PER_BATCH):
            for name in SCHEMA.names:
                if name not in batch.schema.names:  # written before there were controls
                    batch = batch.append_column(name, pa.nulls(len(batch), SCHEMA.field(name).type))
            yield batch


def read_skipped(file: Path) -> dict[str, int]:
    """What the listing of the datasets skipped: reason -> number. Raises UserError as `open_manifest`."""
    with open_manifest(file) as table:
        return json.loads((table.schema_arrow.metadata or {}).get(_SKIPPED_MARK, b"{}"))


def write_manifest(file: Path, batches: Iterable[pa.RecordBatch], skipped: Mapping[str, int] | None = None) -> None:
    """Replace the manifest by these rows (SCHEMA). Raises UserError if it cannot be written.

    skipped: for `read_skipped`.
    """
    schema = SCHEMA.with_metadata({**SCHEMA.metadata, _SKIPPED_MARK: json.dumps(skipped or {}).encode()})
    with (
        write_errors(file),
        whole_file(file) as partial,
        pq.ParquetWriter(partial, schema, compression="zstd") as writer,
    ):
        for batch in batches:
            writer.write_batch(batch.replace_schema_metadata(schema.metadata))


@contextlib.contextmanager
def open_manifest(file: Path) -> Iterator[pq.ParquetFile]:
    """Open the manifest. Raises UserError if it is missing, damaged, another table or of another version."""
    try:
        opened = pq.ParquetFile(file)
    except FileNotFoundError:
        raise UserError(f"data.manifest: no such file: {file}. Check the spelling.") from None
    except (OSError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"data.manifest: cannot read {file} ({reason}). Delete it; the next run makes a new one."
        ) from None
    with opened:
        mark = (opened.schema_arrow.metadata or {}).get(MANIFEST_MARK)
        if mark is None:
            raise UserError(
                f"data.manifest: {file} is not a manifest of cogds and would be overwritten. Choose another name."
            )
        if mark != SCHEMA.metadata[MANIFEST_MARK]:
            raise UserError(
                f"data.manifest: {file} was written by another version of cogds. Delete it; the next run makes a new "
                "one."
            )
        yield opened


@contextlib.contextmanager
def write_errors(file: Path) -> Iterator[None]:
    """Turn errors of writing the manifest or a file beside it into UserErrors."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error).splitlines()[0]
        raise UserError(
            f"data.manifest: cannot write {file} ({reason}). Free some space there, or set data.manifest to another "
            "path."
        ) from None
