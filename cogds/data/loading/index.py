"""The clips that are trained, bucket by bucket, in one memory-mapped file: a hundred million cost a rank no memory.

An uncompressed Arrow file whose rows stand in the order of the plan: bucket 0's clips first (data set 0's, then data
set 1's, ...), then bucket 1's. Rank 0 writes it, every loader process of every rank maps it and reads only the rows it
needs. It is named after its content, so it never changes under a reader.
"""

import hashlib
import json
import mmap
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cogds.core.geometry import ClipShape
from cogds.errors import UserError
from cogds.files import whole_file

# Row i lies in batch i // ROWS_PER_BATCH: every batch but the last is full.
ROWS_PER_BATCH = 1 << 17
# Pages that were read count as the process's memory until they are let go of: up to 1 MB a row.
READS_PER_RELEASE = 32

SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("kind", pa.string()),
        ("image_path", pa.string()),
        ("caption", pa.string()),
        ("start_s", pa.float64()),
        ("clip_key", pa.binary(16)),
        ("caption_key", pa.binary(16)),
        ("clip_place", pa.int32()),
        ("caption_place", pa.int32()),
    ]
)


@dataclass(frozen=True)
class IndexedClip:
    """One clip: what is decoded, into which bucket, and where its encodings are (keys of 32 hex digits, places).

    kind: "video" or "image"; image_path: a given conditioning image; start_s: seconds after the first frame. A place
    is "" where nothing is cached.
    """

    path: str
    kind: str
    image_path: str | None
    caption: str
    start_s: float
    bucket: int
    shape: ClipShape
    clip_key: str
    caption_key: str
    clip_place: str
    caption_place: str


class ClipIndex:
    """The rows of an index file by number. Pickles as its path: every process opens its own mapping.

    buckets: the shapes; sizes: clips of [bucket][data set]; places: names that clip_place and caption_place number.
    Raises UserError where the file cannot be opened.
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
            # Not pa.memory_map: it asks the system for the whole batch of every row (10 ms a row of 100 million).
            return pa.ipc.open_file(pa.BufferReader(pa.py_buffer(self._mapping)))
        except (OSError, ValueError) as error:
            raise UserError(
                f"the index of clips {self.path} cannot be read ({error}): delete it and start again, it is made anew"
            ) from None

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
        """Row of each bucket's first clip, and the number of rows."""
        starts = [0]
        for sets in self.sizes:
            starts.append(starts[-1] + sum(sets))
        return starts

    def row(self, bucket: int, clip: int) -> int:
        """Number of the row of a bucket's clip."""
        return self._starts[bucket] + clip

    def bucket_of(self, row: int) -> int:
        """The bucket that a row belongs to."""
        return next(bucket for bucket, end in enumerate(self._starts[1:]) if row < end)

    def keys(self, name: str) -> set[str]:
        """The distinct keys of `clip_key` or `caption_key`, as hex digits."""
        return {key.hex() for key in pc.unique(self.column(name)).to_pylist()}

    def names(self) -> set[tuple]:
        """What tells every clip from the others: bucket, file, where in it, and the keys of what it was encoded to."""
        columns = [self.column(name).to_pylist() for name in ("path", "start_s", "clip_key", "caption_key")]
        buckets = [str(shape) for shape, sets in zip(self.buckets, self.sizes) for _ in range(sum(sets))]
        return set(zip(buckets, *columns))

    def column(self, name: str) -> pa.ChunkedArray:
        """A whole column; its numbers stay in the mapped file."""
        batches = [self._reader.get_batch(number).column(name) for number in range(self._reader.num_record_batches)]
        return pa.chunked_array(batches, SCHEMA.field(name).type)

    def __getitem__(self, row: int) -> IndexedClip:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of an index of {len(self)} clips")
        self._num_read += 1
        if self._num_read % READS_PER_RELEASE == 0:
            self._mapping.madvise(mmap.MADV_DONTNEED)  # they stay in the system's cache
        batch = self._reader.get_batch(row // ROWS_PER_BATCH)
        values = {name: batch.column(name)[row % ROWS_PER_BATCH].as_py() for name in SCHEMA.names}
        bucket, places = self.bucket_of(row), self._meta["places"]
        clip_place, caption_place = values.pop("clip_place"), values.pop("caption_place")
        return IndexedClip(
            **values | {"clip_key": values["clip_key"].hex(), "caption_key": values["caption_key"].hex()},
            bucket=bucket,
            shape=self.buckets[bucket],
            clip_place=places["clips"][clip_place] if clip_place >= 0 else "",
            caption_place=places["captions"][caption_place] if caption_place >= 0 else "",
        )


def write_index(
    folder: Path,
    tables: Iterable[pa.Table],
    buckets: Sequence[ClipShape],
    sizes: Sequence[Sequence[int]],
    places: Mapping[str, Sequence[str]],
) -> ClipIndex:
    """Write rows (SCHEMA, in the order of the plan) as a file of `folder` that is named after its content.

    sizes: rows of [bucket][data set]; places: of `clips` and `captions`. An index that is there already stays. Raises
    ValueError where the rows are not as many as the sizes say, and UserError where the disk is full.
    """
    meta = {"buckets": [str(shape) for shape in buckets], "sizes": [[int(num) for num in one] for one in sizes]}
    text = json.dumps(meta | {"places": {kind: list(names) for kind, names in places.items()}})
    num_rows, made = 0, folder / f"{uuid.uuid4().hex}.arrow"
    try:
        with (
            whole_file(made) as partial,
            pa.ipc.new_file(str(partial), SCHEMA.with_metadata({"cogds": text})) as writer,
        ):
            for table in _full_batches(tables):
                num_rows += len(table)
                writer.write_table(table, max_chunksize=ROWS_PER_BATCH)
        if num_rows != sum(sum(one) for one in sizes):
            raise ValueError(f"{num_rows} rows for sizes {meta['sizes']}")
        with made.open("rb") as file:
            path = made.with_stem(hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest())
        if not path.exists():  # whoever has it open keeps it
            made.rename(path)
    except OSError as error:
        raise UserError(
            f"the index of clips cannot be written into {folder} ({error.strerror or error}): make room there"
        ) from None
    finally:
        made.unlink(missing_ok=True)
    return ClipIndex(path)


def _full_batches(tables: Iterable[pa.Table]) -> Iterable[pa.Table]:
    """The same rows in tables of ROWS_PER_BATCH each, the last one shorter: what `row // ROWS_PER_BATCH` relies on."""
    held = SCHEMA.empty_table()
    for table in tables:
        held = pa.concat_tables([held, table.select(SCHEMA.names).cast(SCHEMA)])
        while len(held) >= ROWS_PER_BATCH:
            yield held.slice(0, ROWS_PER_BATCH).combine_chunks()
            held = held.slice(ROWS_PER_BATCH)
    if len(held):
        yield held.combine_chunks()
