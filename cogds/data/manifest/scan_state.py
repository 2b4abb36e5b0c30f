"""The work folder of a survey under way, beside the manifest: what is listed, what is found out so far, locks.

Several runs may survey the same data at once: every run has files of its own here. What a share finds out is kept in
parts, small whole files, as it goes: a killed run loses half a minute. A later run takes parts over, whoever left
them; the last step of a run writes them into the manifest and removes them.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import os
import re
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

from cogds.data.manifest.table import open_manifest, writing
from cogds.files import whole_file

Share = tuple[int, int]  # this rank, number of ranks
ALONE: Share = (0, 1)

JOURNAL_FILES, JOURNAL_S = 2000, 30.0  # a part is written after so many files or seconds, whichever comes first
STALE_S = 86400.0  # files of a run that was killed are removed when they are older

# Path, caption and image_path as text; key and image_key: null where the name cannot be written as text.
ENTRIES = pa.schema(
    [
        ("path", pa.string()),
        ("kind", pa.string()),
        ("caption", pa.string()),
        ("caption_error", pa.string()),
        ("image_path", pa.string()),
        ("start_s", pa.float64()),
        ("end_s", pa.float64()),
        ("set", pa.int16()),
        ("key", pa.binary(16)),
        ("image_key", pa.binary(16)),
    ]
)
# The distinct files that shares go through. known_size, known_mtime_ns: of what an earlier run found out; else null.
FILES = pa.schema(
    [
        ("key", pa.binary(16)),
        ("kind", pa.string()),
        ("path", pa.string()),
        ("known_size", pa.int64()),
        ("known_mtime_ns", pa.int64()),
    ]
)
# What a file holds, by the file's key. size, mtime_ns: when it did; null where the file could not be looked at, and
# then reason says why. frames is null where the file cannot be used, and reason says why.
FACTS = pa.schema(
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
# A digest of the content that a file had at that size and time; null where it could not be read, and why.
DIGESTS = pa.schema(
    [
        ("key", pa.binary(16)),
        ("size", pa.int64()),
        ("mtime_ns", pa.int64()),
        ("digest", pa.binary(16)),
        ("reason", pa.string()),
    ]
)
# What shares find out -> its columns, and the one that is null where a file was no good.
PARTS = {"facts": (FACTS, "size"), "digests": (DIGESTS, "digest")}


@dataclass(frozen=True)
class Job:
    """A survey under way, the same on all ranks: the manifest, and this run's files in the work folder.

    num_files: distinct files that the shares go through together.
    """

    file: Path
    run: str
    num_files: int
    default_caption: str | None = None

    @property
    def folder(self) -> Path:
        return self.file.with_name(f"{self.file.name}.work")

    @property
    def entries(self) -> Path:
        return self.folder / f"entries-{self.run}.arrow"

    @property
    def files(self) -> Path:
        return self.folder / f"files-{self.run}.arrow"


def new_job(file: Path, default_caption: str | None = None) -> Job:
    """A run of its own, and the work folder without what dead runs left there (but their parts, which are read)."""
    if file.exists():
        with open_manifest(file):
            pass  # what is no manifest is told now, not after hours of probing
    job = Job(file, f"{time.time_ns():020d}-{os.getpid()}-{_host()}-{uuid.uuid4().hex[:4]}", 0, default_caption)
    with writing(file):
        job.folder.mkdir(parents=True, exist_ok=True)
        for one in os.scandir(job.folder):
            is_part = one.name.startswith(tuple(f"{what}-" for what in PARTS)) and ".tmp" not in one.name
            if not is_part and _is_dead(one):
                Path(one.path).unlink(missing_ok=True)
    return job


def _is_dead(one: os.DirEntry) -> bool:
    """Whether the run that a file belongs to has ended. On another machine only its age tells."""
    match = re.search(r"-\d{20}-(\d+)-(\w+)-", one.name)
    try:
        if match and match[2] == _host():
            return not os.path.exists(f"/proc/{match[1]}")
        return time.time() - one.stat().st_mtime > STALE_S
    except FileNotFoundError:
        return False


def _host() -> str:
    return hashlib.blake2b(os.uname().nodename.encode(), digest_size=4).hexdigest()


# ------------------------------------------------------------------------------------------------ tables in the folder


def write_table(file: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    """Write a table of the work folder. Raises UserError where there is no room."""
    with writing(file), whole_file(file) as partial, pa.ipc.new_file(str(partial), schema) as writer:
        for batch in batches:
            writer.write_batch(batch)


def read_batches(file: Path) -> Iterator[pa.RecordBatch]:
    """Its batches as they were written, mapped: they take no memory."""
    with pa.memory_map(str(file)) as mapped, pa.ipc.open_file(mapped) as reader:
        yield from map(reader.get_batch, range(reader.num_record_batches))


def write_files(job: Job, files: Iterable[pa.RecordBatch], fresh: Sequence[np.ndarray]) -> Job:
    """Write down what the shares go through: FILES with repetitions, and which of them are `fresh`. Gives their job."""
    num_files = sum(int(mask.sum()) for mask in fresh)
    # Shares are every so many batches: small enough to be even, and not more than ten thousand.
    rows = min(1024, max(1, num_files // 8192))
    distinct = (batch.filter(pa.array(mask)) for batch, mask in zip(files, fresh))
    slices = (batch.slice(start, rows) for batch in distinct for start in range(0, len(batch), rows))
    write_table(job.files, FILES, slices)
    return dataclasses.replace(job, num_files=num_files)


def files_of(job: Job, share: Share) -> list[pa.RecordBatch]:
    """The files of one share."""
    return list(itertools.islice(read_batches(job.files), share[0], None, share[1]))


# ---------------------------------------------------------------------------------------------- what shares find out


class Journal:
    """What a share has found out so far, in parts: whole files, each soon after its rows are known."""

    def __init__(self, job: Job, share: Share, what: str) -> None:
        self.folder, self.stem, self.schema = job.folder, f"{what}-{job.run}-{share[0]:05d}", PARTS[what][0]
        self.rows: list[dict[str, Any]] = []
        self.since, self.num_parts = time.monotonic(), 0

    def add(self, row: dict[str, Any]) -> None:
        """Put down one row; columns that it lacks are null."""
        self.rows.append(row)
        if len(self.rows) >= JOURNAL_FILES or time.monotonic() - self.since >= JOURNAL_S:
            self.write()

    def write(self) -> None:
        """Write a part of the rows that are in none."""
        if self.rows:
            part = self.folder / f"{self.stem}-{self.num_parts:06d}.arrow"
            write_table(part, self.schema, [pa.RecordBatch.from_pylist(self.rows, self.schema)])
            self.num_parts += 1
        self.rows, self.since = [], time.monotonic()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.write()  # after an error or Ctrl-C too


@dataclass(frozen=True)
class Found:
    """What shares found out: rows of any run, the newest first; failed: of this run, where a file was no good.

    parts: the files that were read for it.
    """

    rows: pa.Table
    failed: pa.Table
    parts: Sequence[Path]


def read_parts(job: Job, what: str) -> Found:
    """What is in the parts of all runs, or in this run's where it failed: a later run tries that again."""
    schema, column = PARTS[what]
    # A name begins with the run's time.
    files = sorted((one for one in job.folder.glob(f"{what}-*.arrow") if ".tmp" not in one.name), reverse=True)
    every, own = [schema.empty_table()], [schema.empty_table()]
    for file in files:
        try:
            with pa.OSFile(str(file)) as opened:
                table = pa.ipc.open_file(opened).read_all()
        except FileNotFoundError:  # another run has just written it into the manifest
            continue
        if table.schema.equals(schema):  # else left by another version
            every.append(table)
            own += [table] if job.run in file.name else []
    found, failed = pa.concat_tables(every), pa.concat_tables(own)
    return Found(found.filter(pc.is_valid(found[column])), failed.filter(pc.is_null(failed[column])), files)


# ------------------------------------------------------------------------------------------------------- the last step


@contextlib.contextmanager
def locked(job: Job) -> Iterator[None]:
    """One run at a time reads the manifest and replaces it: else what another has just added to it would be lost."""
    folder = os.open(job.file.parent, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no such locks
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def remove(job: Job, parts: Iterable[Path]) -> None:
    """Remove a run's files, and parts that are in the manifest now."""
    for file in (*parts, job.entries, job.files):
        file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # another run's files are in it, or it is gone
        job.folder.rmdir()
