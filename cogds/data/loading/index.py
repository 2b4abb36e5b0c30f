"""Index of the trained clips in a memory-mapped file, so that even 100 million clips take no memory on a rank.

The file is uncompressed Arrow, with rows in the order of the plan: the clips of bucket 0 (of dataset 0, then of
dataset 1, ...), then those of bucket 1, and so on. Rank 0 writes it. Every loader process of every rank maps it and
reads only the rows it needs. The file name is a hash of the content, so the content never changes while it is read.
"""

import hashlib
import json
import mmap
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from cogds.core.geometry import ClipShape
from cogds.errors import UserError
from cogds.files import whole_file

# Row i is in batch i // ROWS_PER_BATCH, since every batch but the last is full.
ROWS_PER_BATCH = 1 << 17
# Pages that were read count as the process's memory until they are released: up to 1 MB per row.
READS_PER_RELEASE = 32

# captions, caption_keys, caption_places: of all captions of a clip, at least one.
SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("kind", pa.string()),
        ("image_path", pa.string()),
        ("captions", pa.list_(pa.string())),
        ("start_s", pa.float64()),
        ("mirrored", pa.bool_()),
        ("clip_key", pa.binary(16)),
        ("caption_keys", pa.list_(pa.binary(16))),
        ("clip_place", pa.int32()),
        ("caption_places", pa.list_(pa.int32())),
    ]
)
# With control videos. Without them, indexes are as before there were any, so that old runs can be resumed.
CONTROL_SCHEMA = SCHEMA.append(pa.field("control_path", pa.string()))


class IndexedCaption(NamedTuple):
    """A caption. key: cache key of 32 hex digits; place: cache shard, "" if nothing is cached."""

    text: str
    key: str
    place: str


@dataclass(frozen=True)
class IndexedClip:
    """One clip: its file, its bucket, and its encodings in the cache.

    Attributes:
        kind: "video" or "image".
        image_path: conditioning image, None to use the first frame.
        captions: at least one. A training step draws one of them; everything else uses the first.
        start_s: in seconds after the first frame.
        mirrored: whether it is the mirror image, left to right.
        clip_key: cache key of 32 hex digits.
        clip_place: cache shard, "" if nothing is cached.
        control_path: control video, None without one.
    """

    path: str
    kind: str
    image_path: str | None
    captions: tuple[IndexedCaption, ...]
    start_s: float
    mirrored: bool
    bucket: int
    shape: ClipShape
    clip_key: str
    clip_place: str
    control_path: str | None = None


class ClipIndex:
    """Rows of an index file by number. It is pickled as a path, so every process opens its own mapping.

    buckets: shapes; sizes: number of clips, [bucket][dataset]. Raises UserError if the file cannot be read.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self._num_read = 0

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_num_read": 0}

    def __len__(self) -> int:
        return sum(map(sum, self.sizes))

    @cached_property
    def _mapping(self) -> mmap.mmap:
        with open(self.path, "rb") as file:
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        mapping.madvise(mmap.MADV_RANDOM)
        return mapping

    @cached_property
    def _reader(self) -> pa.ipc.RecordBatchFileReader:
        try:
            # pa.memory_map would request the whole batch from the system for every row (10 ms per row of 100 million).
            reader = pa.ipc.open_file(pa.BufferReader(pa.py_buffer(self._mapping)))
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self.path}: the index of clips cannot be read ({error}). Delete it and start again to rebuild it."
            ) from None
        if not (reader.schema.equals(SCHEMA) or reader.schema.equals(CONTROL_SCHEMA)):
            raise UserError(
                f"{self.path}: another version of cogds wrote this index of clips, and some of its clips are gone from "
                "the data. Restore them, or resume with that version."
            )
        return reader

    @cached_property
    def _meta(self) -> dict:
        return json.loads(self._reader.schema.metadata[b"cogds"])

    @cached_property
    def buckets(self) -> tuple[ClipShape, ...]:
        return tuple(map(ClipShape.parse, self._meta["buckets"]))

    @cached_property
    def sizes(self) -> tuple[tuple[int, ...], ...]:
        return tuple(map(tuple, self._meta["sizes"]))

    @cached_property
    def _starts(self) -> list[int]:
        """Row of each bucket's first clip, followed by the number of rows."""
        starts = [0]
        for sets in self.sizes:
            starts.append(starts[-1] + sum(sets))
        return starts

    def row(self, bucket: int, clip: int) -> int:
        """Row number of a clip of a bucket."""
        return self._starts[bucket] + clip

    def bucket_of(self, row: int) -> int:
        """The bucket that a row belongs to."""
        return next(bucket for bucket, end in enumerate(self._starts[1:]) if row < end)

    def keys(self, name: str) -> set[str]:
        """Distinct values of column `clip_key` or `caption_keys`, as hex digits."""
        column = self.column(name)
        return {
            key.hex() for key in pc.unique(pc.list_flatten(column) if name == "caption_keys" else column).to_pylist()
        }

    def names(self) -> set[tuple]:
        """The identity of every clip: bucket, path, start, whether it is mirrored, and cache keys."""
        columns = [self.column(name).to_pylist() for name in ("path", "start_s", "mirrored", "clip_key")]
        columns.append(list(map(tuple, self.column("caption_keys").to_pylist())))
        buckets = [str(shape) for shape, sets in zip(self.buckets, self.sizes) for _ in range(sum(sets))]
        return set(zip(buckets, *columns))

    def column(self, name: str) -> pa.ChunkedArray:
        """Return a whole column, whose values stay in the mapped file."""
        batches = [self._reader.get_batch(number).column(name) for number in range(self._reader.num_record_batches)]
        return pa.chunked_array(batches, SCHEMA.field(name).type)

    def num_captions(self, row: int) -> int:
        """Number of captions of a clip."""
        return len(self._batch_of(row).column("captions")[row % ROWS_PER_BATCH])

    def _batch_of(self, row: int) -> pa.RecordBatch:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} is out of range for an index of {len(self)} clips")
        self._num_read += 1
        if self._num_read % READS_PER_RELEASE == 0:
            self._mapping.madvise(mmap.MADV_DONTNEED)  # the pages stay in the system's cache
        return self._reader.get_batch(row // ROWS_PER_BATCH)

    def __getitem__(self, row: int) -> IndexedClip:
        batch = self._batch_of(row)
        values = {name: batch.column(name)[row % ROWS_PER_BATCH].as_py() for name in batch.schema.names}
        bucket, places = self.bucket_of(row), self._meta["places"]
        captions = zip(*(values.pop(name) for name in ("captions", "caption_keys", "caption_places")))
        clip_key, clip_place = values.pop("clip_key"), values.pop("clip_place")
        return IndexedClip(
            **values,
            bucket=bucket,
            shape=self.buckets[bucket],
            clip_key=clip_key.hex(),
            clip_place=places["clips"][clip_place] if clip_place >= 0 else "",
            captions=tuple(
                IndexedCaption(text, key.hex(), places["captions"][place] if place >= 0 else "")
                for text, key, place in captions
            ),
        )


def write_index(
    folder: Path,
    tables: Iterable[pa.Table],
    buckets: Sequence[ClipShape],
    sizes: Sequence[Sequence[int]],
    places: Mapping[str, Sequence[str]],
    has_controls: bool = False,
) -> ClipIndex:
    """Write an index into `folder`, named after a hash of its content. An existing file of that name is kept.

    Args:
        tables: rows with SCHEMA, in the order of the plan.
        sizes: number of rows, [bucket][dataset].
        has_controls: whether the rows have control videos, so that their schema is CONTROL_SCHEMA.
        places: shard names that the columns clip_place and caption_places number, for `clips` and `captions`.

    Raises:
        ValueError: the number of rows contradicts sizes.
        UserError: the file cannot be written.
    """
    meta = {"buckets": [str(shape) for shape in buckets], "sizes": [[int(num) for num in sets] for sets in sizes]}
    text = json.dumps(meta | {"places": {kind: list(names) for kind, names in places.items()}})
    schema = CONTROL_SCHEMA if has_controls else SCHEMA
    num_rows, new_file = 0, folder / f"{uuid.uuid4().hex}.arrow"
    try:
        with (
            whole_file(new_file) as partial,
            pa.ipc.new_file(str(partial), schema.with_metadata({"cogds": text})) as writer,
        ):
            for table in _full_batches(tables, schema):
                num_rows += len(table)
                writer.write_table(table, max_chunksize=ROWS_PER_BATCH)
        if num_rows != sum(map(sum, sizes)):
            raise ValueError(f"{num_rows} rows for sizes {meta['sizes']}")
        with new_file.open("rb") as file:
            path = new_file.with_stem(hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest())
        if not path.exists():  # another process may have it open
            new_file.rename(path)
    except OSError as error:
        raise UserError(
            f"{folder}: the index of clips cannot be written ({error.strerror or error}). Free disk space or "
            "correct the permissions."
        ) from None
    finally:
        new_file.unlink(missing_ok=True)
    return ClipIndex(path)


def _full_batches(tables: Iterable[pa.Table], schema: pa.Schema) -> Iterable[pa.Table]:
    """Yield the same rows in tables of ROWS_PER_BATCH rows, except for a shorter last one."""
    pending = schema.empty_table()
    for table in tables:
        pending = pa.concat_tables([pending, table.select(schema.names).cast(schema)])
        while len(pending) >= ROWS_PER_BATCH:
            yield pending.slice(0, ROWS_PER_BATCH).combine_chunks()
            pending = pending.slice(ROWS_PER_BATCH)
    if len(pending):
        yield pending.combine_chunks()
