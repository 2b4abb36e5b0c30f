"""The manifest: one Parquet table with a row for every clip of every data set, and what its file holds.

Made in three steps, of which many ranks share the second: `begin` lists the data sets into a work folder beside the
manifest, `probe_share` opens the files that are new or changed, `finish` writes the table. `fill_digests_begin`,
`fill_digests_share` and `fill_digests_finish` add digests of the files' content in the same way. What a share finds
out is kept in small part files as it goes, so that a killed run loses half a minute; a later run takes parts over,
whoever left them. Nothing here grows with the clips but arrow columns: on rank 0 350 to 660 bytes a clip.

Several runs may survey the same data at once: every run has files of its own in the work folder, and the manifest is
replaced whole.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import os
import re
import stat
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

from cogds.data.layouts import MANIFEST_MARK, Entry, iter_entries
from cogds.data.pool import Failure, GuardedPool
from cogds.data.probe import PROBE_MEMORY_BYTES, PROBE_TIMEOUT_S, FileFacts, ProbeTask, probe_file, reason_of
from cogds.errors import UserError
from cogds.files import whole_file
from cogds.progress import progress

Share = tuple[int, int]  # this rank, number of ranks
ALONE: Share = (0, 1)

JOURNAL_FILES, JOURNAL_S = 2000, 30.0  # a part is written after so many files or seconds, whichever comes first
ROWS_AT_ONCE = 1 << 16
NUM_THREADS = 16  # for stat and reading: on a shared file system, waiting is most of it
STALE_S = 86400.0  # files of a run that was killed are removed when they are older
RANGE_SLACK_S = 0.5  # lists of scenes round their ends

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

_CAPTION_MISSING = "caption missing: add a same-named .txt file, or fill its line in the list of captions"
_CAPTION_EMPTY = "caption empty: write one into the same-named .txt file, or its line in the list of captions"
_IMAGE = "conditioning image unusable: "
_NAME = "file name not UTF-8: no table can hold it; rename the file"
_NOT_SURVEYED = "not surveyed: start again"
_CHANGED = "file changed: it was written to while it was surveyed; start again when it is complete"


@dataclass(frozen=True)
class DataSet:
    """A folder, list or table of clips, and what a table calls its columns: see `layouts.iter_entries`."""

    path: str
    columns: Mapping[str, str] = field(default_factory=dict)


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
    with _open_manifest(file) as table:
        return table.read(columns=list(columns) if columns else None)


def update(
    sets: Sequence[DataSet],
    file: Path,
    num_workers: int,
    default_caption: str | None = None,
    timeout_s: float = PROBE_TIMEOUT_S,
    memory_bytes: int = PROBE_MEMORY_BYTES,
    retry_failed: bool = False,
) -> None:
    """All three steps in one process."""
    job = begin(sets, file, default_caption, retry_failed)
    probe_share(job, ALONE, num_workers, timeout_s, memory_bytes)
    finish(job)


# ----------------------------------------------------------------------------------------------------- the three steps


def begin(sets: Sequence[DataSet], file: Path, default_caption: str | None = None, retry_failed: bool = False) -> Job:
    """First step, on rank 0: list the data sets.

    default_caption: of clips that have none. retry_failed: open files again that failed in an earlier run though they
    have not changed. Raises UserError for what `layouts.iter_entries` refuses, and where `file` is something else.
    """
    job = _new_job(file, default_caption)
    keys, image_keys = [], []
    with (
        _tidy(job),
        _writing(job.entries),
        whole_file(job.entries) as partial,
        pa.ipc.new_file(str(partial), ENTRIES) as writer,
    ):
        for number, one in enumerate(sets):
            entries = iter_entries(one.path, one.columns, default_caption is None)
            while chunk := list(itertools.islice(entries, ROWS_AT_ONCE)):
                batch = _entry_batch(chunk, number)
                keys.append(batch.column("key"))
                image_keys.append(batch.column("image_key"))
                writer.write_batch(batch)
    fresh = _first_of_each([*keys, *image_keys])
    facts = _facts(job).facts
    known = facts.filter(pc.is_valid(facts["frames"]) if retry_failed else pc.is_valid(facts["size"]))
    files = _distinct_files(job.entries, fresh, known, _rows_in(known, [*keys, *image_keys]))
    return _with_files(job, files, sum(int(mask.sum()) for mask in fresh))


def probe_share(
    job: Job,
    share: Share,
    num_workers: int,
    timeout_s: float = PROBE_TIMEOUT_S,
    memory_bytes: int = PROBE_MEMORY_BYTES,
    probe: Callable[[ProbeTask], FileFacts] = probe_file,
    progress: bool | None = None,
) -> int:
    """Second step, on every rank: look at the share's files and open those that are new or changed.

    num_workers: child processes of this rank; see `pool.GuardedPool` for them, timeout_s and memory_bytes. progress:
    show a bar; None: on rank 0. Returns how many files were opened.
    """
    shown = share[0] == 0 if progress is None else progress
    batches = list(_share_batches(job, share))
    num_files = sum(map(len, batches))
    with _Journal(job, share, "facts", FACTS) as journal:
        todo = list(_to_probe(batches, journal, _bar("looking at files", shown, num_files)))
        num_todo = sum(map(len, todo))
        held: deque[dict[str, Any]] = deque()

        def tasks() -> Iterator[ProbeTask]:
            for batch in todo:
                for row in batch.to_pylist():
                    held.append({name: row[name] for name in ("key", "size", "mtime_ns")})
                    yield ProbeTask(row["kind"], row["path"])

        with (
            _bar("surveying files", shown, num_files, num_files - num_todo) as bar,
            GuardedPool(probe, min(num_workers, num_todo), timeout_s, memory_bytes) as pool,
        ):
            for outcome in pool.imap(tasks(), ahead=4 * num_workers):
                found = {"reason": reason_of(outcome.reason)} if isinstance(outcome, Failure) else outcome._asdict()
                journal.add(held.popleft() | found)
                bar.update()
    return num_todo


def _to_probe(batches: Sequence[pa.RecordBatch], journal: "_Journal", bar: tqdm) -> Iterator[pa.RecordBatch]:
    """Of the files those to open, with their size and time. What cannot be opened at all is put down at once."""
    with bar, ThreadPoolExecutor(NUM_THREADS) as threads:
        for batch, stats in zip(batches, threads.map(_stats, batches)):
            bar.update(len(batch))
            known = zip(batch.column("known_size").to_pylist(), batch.column("known_mtime_ns").to_pylist())
            rows = [row for row, (now, old) in enumerate(zip(stats, known)) if now != old]
            for row in rows:
                if isinstance(reason := stats[row], str):
                    journal.add({"key": batch.column("key")[row].as_py(), "reason": reason})
            if rows := [row for row in rows if not isinstance(stats[row], str)]:
                sizes, times = zip(*(stats[row] for row in rows))
                taken = [batch.column(name).take(pa.array(rows)) for name in ("key", "kind", "path")]
                yield pa.record_batch(
                    [*taken, pa.array(sizes), pa.array(times)], ["key", "kind", "path", "size", "mtime_ns"]
                )


def _stats(batch: pa.RecordBatch) -> list[tuple[int, int] | str]:
    """(size, mtime_ns) of every file, or why it cannot be opened."""
    return [_stat(path) for path in batch.column("path").to_pylist()]


def _stat(path: str) -> tuple[int, int] | str:
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return reason_of("the file does not exist")
    except (OSError, ValueError) as error:  # a name with a null character in it is a ValueError
        return reason_of(f"it cannot be opened: {getattr(error, 'strerror', None) or error}")
    if stat.S_ISDIR(found.st_mode):
        return reason_of("it is a folder, not a file")
    if not stat.S_ISREG(found.st_mode):  # opening a pipe would wait for ever
        return reason_of("it is a device, a pipe or a socket, not a file")
    return found.st_size, found.st_mtime_ns


def finish(job: Job) -> None:
    """Third step, on rank 0 when all shares are done: write the manifest and remove what the shares left."""
    with _locked(job):
        known = _facts(job)
        _write_manifest(job.file, _rows(job, known))
        _remove(job, known.parts)


def _rows(job: Job, known: "_Facts") -> Iterator[pa.RecordBatch]:
    """The manifest's rows for the entries of a run."""
    columns, absent_reasons = _arrays(known.facts), _one_array(known.absent, "reason")
    keys = [batch.column(name) for name in ("key", "image_key") for batch in _batches(job.entries)]
    rows_in_facts, rows_in_absent = _rows_in(known.facts, keys), _rows_in(known.absent, keys)

    def facts_of(chunk: int) -> dict[str, pa.Array]:
        found = {name: values.take(rows_in_facts[chunk]) for name, values in columns.items()}
        gone = absent_reasons.take(rows_in_absent[chunk])
        # Facts of a file that is gone stay, so that a disk that comes back is not surveyed anew; not a failure, which
        # its row has no place for beside this one.
        forgotten = pc.and_(pc.is_valid(gone), pc.is_null(found["frames"]))
        for name in ("size", "mtime_ns"):
            found[name] = pc.if_else(forgotten, _null(pa.int64()), found[name])
        never = pc.and_(pc.is_valid(keys[chunk]), pc.is_null(found["key"]))
        found["reason"] = pc.coalesce(gone, found["reason"], pc.if_else(never, _NOT_SURVEYED, _null(pa.string())))
        return found

    def rows_of(number: int, entries: pa.RecordBatch) -> pa.RecordBatch:
        clip, image = facts_of(number), facts_of(len(keys) // 2 + number)
        caption = entries.column("caption")
        if job.default_caption is not None:
            empty = pc.or_kleene(pc.is_null(caption), pc.equal(caption, ""))
            unread = pc.is_valid(entries.column("caption_error"))
            caption = pc.if_else(pc.and_not(empty, unread), job.default_caption, caption)
        reason = pc.coalesce(
            pc.if_else(pc.is_null(entries.column("key")), _NAME, _null(pa.string())),
            clip["reason"],
            _image_reasons(entries, image["reason"]),
            pc.binary_join_element_wise("caption unreadable: ", entries.column("caption_error"), ""),
            pc.if_else(pc.is_null(caption), _CAPTION_MISSING, _null(pa.string())),
            pc.if_else(pc.equal(caption, ""), _CAPTION_EMPTY, _null(pa.string())),
            _range_reasons(entries, clip["duration_s"]),
        )
        made = {
            **{name: clip[name] for name in FACTS.names},
            **{name: entries.column(name) for name in ("path", "kind", "image_path", "start_s", "end_s", "set")},
            "caption": caption,
            "reason": reason,
            "status": pc.if_else(pc.is_null(reason), "ok", "unusable"),
            "image_digest": image["digest"],
            "image_size": image["size"],
            "image_mtime_ns": image["mtime_ns"],
        }
        return _manifest_batch(made)

    yield from map(rows_of, itertools.count(), _batches(job.entries))


# --------------------------------------------------------------------------------------------------------- digests


def fill_digests(file: Path, num_threads: int = NUM_THREADS) -> None:
    """Digests of all files of usable rows, in one process."""
    job = fill_digests_begin(file)
    fill_digests_share(job, ALONE, num_threads)
    fill_digests_finish(job)


def fill_digests_begin(file: Path) -> Job:
    """First step, on rank 0: list the files of usable rows that have no digest yet."""
    job = _new_job(file)
    done = _digests(job).found  # by a run that was killed
    columns, batches = _arrays(done), list(_without_digest(file))
    for number, rows in enumerate(_rows_in(done, [batch.column("key") for batch in batches])):
        batch = batches[number]
        same = (pc.equal(columns[name].take(rows), batch.column(f"known_{name}")) for name in ("size", "mtime_ns"))
        batches[number] = batch.filter(pc.invert(pc.fill_null(pc.and_(*same), False)))
    fresh = _first_of_each([batch.column("key") for batch in batches])
    files = (batch.filter(pa.array(mask)) for batch, mask in zip(batches, fresh))
    return _with_files(job, files, sum(int(mask.sum()) for mask in fresh))


def fill_digests_share(job: Job, share: Share, num_threads: int = NUM_THREADS, progress: bool | None = None) -> int:
    """Second step, on every rank: read the share's files. Returns how many were read."""
    shown = share[0] == 0 if progress is None else progress
    batches = list(_share_batches(job, share))
    with (
        _bar("reading files", shown, sum(map(len, batches))) as bar,
        _Journal(job, share, "digests", DIGESTS) as journal,
        ThreadPoolExecutor(num_threads) as threads,
    ):
        for batch in batches:
            for found in threads.map(_digest_file, batch.to_pylist()):
                journal.add(found)
                bar.update()
    return sum(map(len, batches))


def fill_digests_finish(job: Job) -> None:
    """Third step, on rank 0 when all shares are done: write the digests into the manifest."""
    with _locked(job):
        known = _digests(job)
        if known.parts:
            with _open_manifest(job.file) as table:
                _write_manifest(job.file, _with_digests(table, known))
        _remove(job, known.parts)


def _with_digests(table: pq.ParquetFile, known: "_Digests") -> Iterator[pa.RecordBatch]:
    """A manifest's rows with the digests that they lack, as far as they are known."""
    columns, failed_reasons = _arrays(known.found), _one_array(known.failed, "reason")
    keys = []
    for batch in table.iter_batches(ROWS_AT_ONCE, columns=["kind", "path", "image_path"]):
        keys += [_keys(batch.column("kind"), batch.column("path")), _keys(None, batch.column("image_path"))]
    rows_in_found, rows_in_failed = iter(_rows_in(known.found, keys)), iter(_rows_in(known.failed, keys))

    def filled(batch: pa.RecordBatch) -> pa.RecordBatch:
        made = {name: batch.column(name) for name in SCHEMA.names}
        ok = pc.equal(made["status"], "ok")
        reason = made["reason"]
        for prefix, words in (("", ""), ("image_", _IMAGE)):
            rows = next(rows_in_found)
            same = pc.and_(
                pc.equal(columns["size"].take(rows), made[f"{prefix}size"]),
                pc.equal(columns["mtime_ns"].take(rows), made[f"{prefix}mtime_ns"]),
            )
            digests = pc.if_else(same, columns["digest"].take(rows), _null(pa.binary(16)))
            made[f"{prefix}digest"] = pc.coalesce(made[f"{prefix}digest"], digests)
            failed = pc.if_else(ok, failed_reasons.take(next(rows_in_failed)), _null(pa.string()))
            reason = pc.coalesce(reason, pc.binary_join_element_wise(words, failed, ""))
        made["reason"], made["status"] = reason, pc.if_else(pc.is_null(reason), "ok", "unusable")
        return _manifest_batch(made)

    yield from map(filled, table.iter_batches(ROWS_AT_ONCE))


def _without_digest(file: Path) -> Iterator[pa.RecordBatch]:
    """FILES of the usable rows that have no digest, as often as rows have them."""
    names = ["path", "kind", "size", "mtime_ns", "status", "image_path", "image_size", "image_mtime_ns"]
    with _open_manifest(file) as table:
        for batch in table.iter_batches(ROWS_AT_ONCE, columns=[*names, "digest", "image_digest"]):
            ok = pc.equal(batch.column("status"), "ok")
            for prefix, path, kinds in (("", "path", batch.column("kind")), ("image_", "image_path", None)):
                paths = batch.column(path)
                wanted = pc.and_(pc.and_(ok, pc.is_valid(paths)), pc.is_null(batch.column(f"{prefix}digest")))
                kinds = _kinds(kinds, len(batch))
                values = [_keys(kinds, paths), kinds, paths, batch.column(f"{prefix}size")]
                values.append(batch.column(f"{prefix}mtime_ns"))
                yield pa.record_batch(values, FILES).filter(wanted)


def _digest_file(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of DIGESTS for a row of FILES."""
    known = (row["known_size"], row["known_mtime_ns"])
    found = {"key": row["key"], "size": known[0], "mtime_ns": known[1]}
    try:
        with open(row["path"], "rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()
            now = os.fstat(file.fileno())
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        sentence = "the file does not exist" if missing else f"it cannot be read: {error.strerror}"
        return found | {"reason": reason_of(sentence)}
    return found | ({"digest": digest} if (now.st_size, now.st_mtime_ns) == known else {"reason": _CHANGED})


# ------------------------------------------------------------------------------------------------- what is known


@dataclass(frozen=True)
class _Facts:
    """facts: FACTS with a size, the newest first. absent: FACTS without one, of this run. parts: what was read."""

    parts: list[Path]
    facts: pa.Table
    absent: pa.Table


@dataclass(frozen=True)
class _Digests:
    """found: DIGESTS of any run, the newest first; failed: those without digest, of this run. parts: what was read."""

    parts: list[Path]
    found: pa.Table
    failed: pa.Table


def _facts(job: Job) -> _Facts:
    parts, every, own = _read_parts(job, "facts", FACTS)  # before the manifest: who removes parts writes that first
    old = [FACTS.empty_table()]
    if job.file.exists():
        with _open_manifest(job.file) as table:
            old += [one for batch in table.iter_batches(ROWS_AT_ONCE) for one in _facts_in(batch)]
    digests = _digests(job).found
    facts = pa.concat_tables([every.filter(pc.is_valid(every["size"])), *old])
    if len(digests):  # of a run that was killed before it could write them into the manifest
        (rows,) = _rows_in(digests, [_one_array(facts, "key")])
        taken = {name: values.take(rows) for name, values in _arrays(digests).items()}
        same = pc.and_(pc.equal(taken["size"], facts["size"]), pc.equal(taken["mtime_ns"], facts["mtime_ns"]))
        digest = pc.coalesce(facts["digest"], pc.if_else(same, taken["digest"], _null(pa.binary(16))))
        facts = facts.set_column(FACTS.get_field_index("digest"), "digest", digest)
    return _Facts(parts, facts, own.filter(pc.is_null(own["size"])))


def _digests(job: Job) -> _Digests:
    parts, every, own = _read_parts(job, "digests", DIGESTS)
    return _Digests(parts, every.filter(pc.is_valid(every["digest"])), own.filter(pc.is_null(own["digest"])))


def _facts_in(batch: pa.RecordBatch) -> Iterator[pa.Table]:
    """What a manifest's rows say of their files, and of their conditioning images."""
    frames = batch.column("frames")
    clips = {name: batch.column(name) for name in FACTS.names if name != "key"}
    clips["key"] = _keys(batch.column("kind"), batch.column("path"))
    # A row whose file is good has another reason to be unusable.
    clips["reason"] = pc.if_else(pc.is_valid(frames), _null(pa.string()), batch.column("reason"))
    yield _known_of(clips)
    if batch.column("image_path").null_count == len(batch):
        return
    reason = batch.column("reason")
    failed = pc.fill_null(pc.starts_with(reason, _IMAGE), False)
    images = {name: pa.nulls(len(batch), FACTS.field(name).type) for name in FACTS.names}
    images |= {
        "key": _keys(None, batch.column("image_path")),
        # Where the clip itself is bad, its row does not say whether the image is.
        "size": pc.if_else(pc.is_valid(frames), batch.column("image_size"), _null(pa.int64())),
        "mtime_ns": batch.column("image_mtime_ns"),
        "frames": pc.if_else(failed, _null(pa.int32()), pa.scalar(1, pa.int32())),
        "reason": pc.if_else(failed, pc.utf8_slice_codeunits(reason, len(_IMAGE)), _null(pa.string())),
        "digest": batch.column("image_digest"),
    }
    yield _known_of(images)


def _known_of(columns: Mapping[str, pa.Array]) -> pa.Table:
    table = pa.table([columns[name] for name in FACTS.names], FACTS)
    return table.filter(pc.and_(pc.is_valid(table["key"]), pc.is_valid(table["size"])))


# --------------------------------------------------------------------------------------------------------- reasons


def _image_reasons(entries: pa.RecordBatch, reasons: pa.Array) -> pa.Array:
    there = pc.is_valid(entries.column("image_path"))
    unnamed = pc.and_(there, pc.is_null(entries.column("image_key")))
    return pc.binary_join_element_wise(_IMAGE, pc.if_else(unnamed, _NAME, pc.if_else(there, reasons, None)), "")


def _range_reasons(entries: pa.RecordBatch, durations: pa.Array) -> pa.Array:
    """Why a clip's part of its file is none; null where it is one."""
    starts, ends = entries.column("start_s"), entries.column("end_s")
    reasons: list[str | None] = [None] * len(entries)
    if starts.null_count < len(entries) or ends.null_count < len(entries):
        start, end = (pc.fill_null(one, 0.0).to_numpy(zero_copy_only=False) for one in (starts, ends))
        duration = pc.fill_null(durations, np.inf).to_numpy(zero_copy_only=False)
        outside = ((start > 0) & (start >= duration)) | (end > duration + RANGE_SLACK_S)
        for row in np.flatnonzero(outside).tolist():
            until = f"{end[row]:g} s" if ends[row].is_valid else "its end"
            reasons[row] = f"range outside the clip: from {start[row]:g} s to {until}, of {duration[row]:g} s"
    return pa.array(reasons, pa.string())


# --------------------------------------------------------------------------------------------------- files and keys


def _file_key(kind: str, path: str) -> bytes | None:
    """Of a file and how it is opened; None where its name is not UTF-8."""
    try:
        return hashlib.blake2b(f"{kind}\0{path}".encode(), digest_size=16).digest()
    except UnicodeEncodeError:
        return None


def _kinds(kinds: pa.Array | None, count: int) -> pa.Array:
    """None: conditioning images, whose facts are kept apart from those of pictures that are clips."""
    return pa.repeat("condition", count) if kinds is None else kinds


def _keys(kinds: pa.Array | None, paths: pa.Array) -> pa.Array:
    pairs = zip(_kinds(kinds, len(paths)).to_pylist(), paths.to_pylist())
    return pa.array([None if path is None else _file_key(kind, path) for kind, path in pairs], pa.binary(16))


def _entry_batch(entries: Sequence[Entry], set_number: int) -> pa.RecordBatch:
    columns = dict(zip(Entry._fields, map(list, zip(*entries))))
    columns["set"] = [set_number] * len(entries)
    columns["key"] = [_file_key(kind, path) for kind, path in zip(columns["kind"], columns["path"])]
    columns["image_key"] = [path and _file_key("condition", path) for path in columns["image_path"]]
    try:
        return _record_batch(columns, ENTRIES)
    except UnicodeEncodeError:  # rare: worth a look at every text only then
        for row, caption in enumerate(columns["caption"]):
            if caption != _printable(caption):
                columns["caption"][row], columns["caption_error"][row] = None, "it holds half a character (a surrogate)"
        for name in ("path", "image_path", "caption_error"):
            columns[name] = list(map(_printable, columns[name]))
        return _record_batch(columns, ENTRIES)


def _record_batch(columns: Mapping[str, Any], schema: pa.Schema) -> pa.RecordBatch:
    return pa.record_batch([pa.array(columns[name], schema.field(name).type) for name in schema.names], schema)


def _printable(text: str | None) -> str | None:
    """The same text, or with escapes where it is no Unicode: a file name of other bytes, half a surrogate pair."""
    for errors in ("surrogateescape", "backslashreplace"):
        with contextlib.suppress(UnicodeEncodeError):
            return text and text.encode(errors=errors).decode(errors="backslashreplace")
    raise AssertionError("backslashreplace encodes every text")


def _first_of_each(chunks: Sequence[pa.Array]) -> list[np.ndarray]:
    """For each key whether it stands there for the first time; never for null."""
    if not chunks:
        return []
    keys = pa.chunked_array(chunks, pa.binary(16))
    unique = pc.unique(keys).drop_null()
    numbers = pc.fill_null(pc.index_in(keys, unique, skip_nulls=True), -1).to_numpy()
    # Numbers are in the order of first appearance: a new one is above all before it.
    before = np.maximum.accumulate(np.concatenate([[-1], numbers]))[:-1]
    return np.split(numbers > before, np.cumsum([len(chunk) for chunk in chunks])[:-1])


def _rows_in(table: pa.Table, chunks: Sequence[pa.Array]) -> list[pa.Array]:
    """For every key of every chunk where it stands first in a table; null where it does not.

    All chunks at once: the hash table of a million rows takes a second, and there are hundreds of chunks.
    """
    found = pc.index_in(pa.chunked_array(chunks, pa.binary(16)), _one_array(table, "key"), skip_nulls=True)
    starts = itertools.accumulate(map(len, chunks), initial=0)
    rows = found.combine_chunks()
    return [rows.slice(start, len(chunk)) for start, chunk in zip(starts, chunks)]


def _distinct_files(
    entries: Path, fresh: Sequence[np.ndarray], known: pa.Table, known_rows: Sequence[pa.Array]
) -> Iterator[pa.RecordBatch]:
    """FILES of all clips that are `fresh`, then of all conditioning images; known_rows: where `known` has them."""
    columns = {name: _one_array(known, name) for name in ("size", "mtime_ns")}
    masks, rows = iter(fresh), iter(known_rows)
    for key, path, is_clip in (("key", "path", True), ("image_key", "image_path", False)):
        for batch in _batches(entries):
            kinds = _kinds(batch.column("kind") if is_clip else None, len(batch))
            at = next(rows)
            sizes, times = columns["size"].take(at), columns["mtime_ns"].take(at)
            files = pa.record_batch([batch.column(key), kinds, batch.column(path), sizes, times], FILES)
            yield files.filter(pa.array(next(masks)))


def _with_files(job: Job, files: Iterable[pa.RecordBatch], num_files: int) -> Job:
    """Write down what the shares go through."""
    # Shares are every so many batches: small enough to be even, and not more than ten thousand.
    rows = min(1024, max(1, num_files // 8192))
    with _writing(job.files), whole_file(job.files) as partial, pa.ipc.new_file(str(partial), FILES) as writer:
        for batch in files:
            writer.write_table(pa.Table.from_batches([batch]), max_chunksize=rows)
    return dataclasses.replace(job, num_files=num_files)


def _batches(file: Path) -> Iterator[pa.RecordBatch]:
    with pa.memory_map(str(file)) as mapped, pa.ipc.open_file(mapped) as reader:
        yield from map(reader.get_batch, range(reader.num_record_batches))


def _share_batches(job: Job, share: Share) -> Iterator[pa.RecordBatch]:
    return itertools.islice(_batches(job.files), share[0], None, share[1])


def _one_array(table: pa.Table, name: str) -> pa.Array:
    return table[name].combine_chunks()


def _arrays(table: pa.Table) -> dict[str, pa.Array]:
    return {name: _one_array(table, name) for name in table.column_names}


def _manifest_batch(columns: Mapping[str, pa.Array]) -> pa.RecordBatch:
    return pa.record_batch([columns[name].cast(SCHEMA.field(name).type) for name in SCHEMA.names], SCHEMA)


def _null(kind: pa.DataType) -> pa.Scalar:
    return pa.scalar(None, kind)


def _bar(what: str, shown: bool, total: int, initial: int = 0) -> tqdm:
    return progress(what, "file", total, shown, initial)


# ------------------------------------------------------------------------------------------------- the work folder


class _Journal:
    """What a share has found out so far, in parts: whole files, each soon after its rows are known."""

    def __init__(self, job: Job, share: Share, what: str, schema: pa.Schema) -> None:
        self.folder, self.stem, self.schema = job.folder, f"{what}-{job.run}-{share[0]:05d}", schema
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
            with _writing(part), whole_file(part) as partial, pa.ipc.new_file(str(partial), self.schema) as writer:
                writer.write_table(pa.Table.from_pylist(self.rows, self.schema))
            self.num_parts += 1
        self.rows, self.since = [], time.monotonic()

    def __enter__(self) -> "_Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.write()  # after an error or Ctrl-C too


def _read_parts(job: Job, what: str, schema: pa.Schema) -> tuple[list[Path], pa.Table, pa.Table]:
    """The parts of all runs: their files, their rows, the newest first, and the rows of this run alone."""
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
    return files, pa.concat_tables(every), pa.concat_tables(own)


def _new_job(file: Path, default_caption: str | None = None) -> Job:
    """A run of its own, and the work folder without what dead runs left there (but their parts, which are read)."""
    if file.exists():
        with _open_manifest(file):
            pass  # what is no manifest is told now, not after hours of probing
    job = Job(file, f"{time.time_ns():020d}-{os.getpid()}-{_host()}-{uuid.uuid4().hex[:4]}", 0, default_caption)
    with _writing(file):
        job.folder.mkdir(parents=True, exist_ok=True)
        for one in os.scandir(job.folder):
            is_part = one.name.startswith(("facts-", "digests-")) and ".tmp" not in one.name
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


@contextlib.contextmanager
def _tidy(job: Job) -> Iterator[None]:
    """Leave no listing behind where it cannot be finished."""
    try:
        yield
    except BaseException:
        _remove(job, ())
        raise


@contextlib.contextmanager
def _locked(job: Job) -> Iterator[None]:
    """One run at a time reads the manifest and replaces it: else what another has just added to it would be lost."""
    folder = os.open(job.file.parent, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no such locks
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _remove(job: Job, parts: Iterable[Path]) -> None:
    for file in (*parts, job.entries, job.files):
        file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # another run's files are in it, or it is gone
        job.folder.rmdir()


# ------------------------------------------------------------------------------------------------- the manifest's file


@contextlib.contextmanager
def _open_manifest(file: Path) -> Iterator[pq.ParquetFile]:
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


def _write_manifest(file: Path, batches: Iterable[pa.RecordBatch]) -> None:
    with _writing(file), whole_file(file) as partial, pq.ParquetWriter(partial, SCHEMA, compression="zstd") as writer:
        for batch in batches:
            writer.write_batch(batch)


@contextlib.contextmanager
def _writing(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error).splitlines()[0]
        raise UserError(
            f"{file} cannot be written ({reason}): make room there, or give data.manifest a place"
        ) from None
