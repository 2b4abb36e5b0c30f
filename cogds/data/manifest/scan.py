"""Making the manifest: the data sets are listed, their files opened, and what they hold is written down.

Three steps, of which many ranks share the second: `begin` lists the data sets into a work folder beside the manifest
(`journal`), `probe_share` opens the files that are new or changed, `finish` writes the table.
"""

import itertools
import os
import stat
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cogds.data.manifest import table as manifest
from cogds.data.manifest.file_keys import CONDITION, conditions, file_key, first_of_each, look_up
from cogds.data.manifest.layouts import Entry, iter_entries
from cogds.data.manifest.rows import entry_keys, facts_in, rows_of, same_digests
from cogds.data.manifest.scan_state import (
    ALONE,
    ENTRIES,
    FILES,
    Found,
    Job,
    Journal,
    Share,
    files_of,
    locked,
    new_job,
    read_batches,
    read_parts,
    remove,
    write_files,
    write_table,
)
from cogds.data.manifest.table import DataSet
from cogds.data.video.probe_task import (
    PROBE_MEMORY_BYTES,
    PROBE_TIMEOUT_S,
    FileFacts,
    ProbeTask,
    probe_file,
    reason_of,
)
from cogds.process.progress import progress_bar
from cogds.process.worker_pool import Failure, GuardedPool

ENTRIES_AT_ONCE = 1 << 16
NUM_THREADS = 16  # for stat: on a shared file system, waiting is most of it


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


# ------------------------------------------------------------------------------------------------------ the first step


def begin(sets: Sequence[DataSet], file: Path, default_caption: str | None = None, retry_failed: bool = False) -> Job:
    """First step, on rank 0: list the data sets.

    default_caption: of clips that have none. retry_failed: open files again that failed in an earlier run though they
    have not changed. Raises UserError for what `layouts.iter_entries` refuses, and where `file` is something else.
    """
    job = new_job(file, default_caption)
    try:
        write_table(job.entries, ENTRIES, _list_entries(sets, need_captions=default_caption is None))
    except BaseException:
        remove(job, ())
        raise
    facts = _known_facts(job).rows
    known = facts.filter(pc.is_valid(facts["frames"])) if retry_failed else facts
    return write_files(job, _list_files(job.entries, known), first_of_each(entry_keys(job.entries)))


def _list_entries(sets: Sequence[DataSet], need_captions: bool) -> Iterator[pa.RecordBatch]:
    """ENTRIES of all data sets."""
    for number, one in enumerate(sets):
        entries = iter_entries(one.path, one.columns, need_captions)
        while chunk := list(itertools.islice(entries, ENTRIES_AT_ONCE)):
            yield _entry_batch(chunk, number)


def _entry_batch(entries: Sequence[Entry], set_number: int) -> pa.RecordBatch:
    columns: dict[str, list[Any]] = dict(zip(Entry._fields, map(list, zip(*entries))))
    columns["set"] = [set_number] * len(entries)
    columns["key"] = [file_key(kind, path) for kind, path in zip(columns["kind"], columns["path"])]
    columns["image_key"] = [path and file_key(CONDITION, path) for path in columns["image_path"]]
    try:
        return pa.RecordBatch.from_pydict(columns, ENTRIES)
    except UnicodeEncodeError:  # rare: worth a look at every text only then
        for row, caption in enumerate(columns["caption"]):
            if caption != _printable(caption):
                columns["caption"][row], columns["caption_error"][row] = None, "it holds half a character (a surrogate)"
        for name in ("path", "image_path", "caption_error"):
            columns[name] = list(map(_printable, columns[name]))
        return pa.RecordBatch.from_pydict(columns, ENTRIES)


def _printable(text: str | None) -> str | None:
    """The same text, or with escapes where it is no Unicode: a file name of other bytes, half a surrogate pair."""
    if text is None:
        return None
    try:
        encoded = text.encode(errors="surrogateescape")
    except UnicodeEncodeError:
        encoded = text.encode(errors="backslashreplace")
    return encoded.decode(errors="backslashreplace")


def _list_files(entries: Path, known: pa.Table) -> Iterator[pa.RecordBatch]:
    """FILES of all entries, as often as these have them; known: FACTS."""
    found = look_up(known.select(["key", "size", "mtime_ns"]), entry_keys(entries))
    for batch in read_batches(entries):
        for key, path, kinds in (
            ("key", "path", batch.column("kind")),
            ("image_key", "image_path", conditions(len(batch))),
        ):
            facts = next(found)
            columns = [batch.column(key), kinds, batch.column(path), facts["size"], facts["mtime_ns"]]
            yield pa.record_batch(columns, FILES)


# ----------------------------------------------------------------------------------------------------- the second step


def probe_share(
    job: Job,
    share: Share,
    num_workers: int,
    timeout_s: float = PROBE_TIMEOUT_S,
    memory_bytes: int = PROBE_MEMORY_BYTES,
    probe: Callable[[ProbeTask], FileFacts] = probe_file,
) -> int:
    """Second step, on every rank: look at the share's files and open those that are new or changed.

    num_workers: child processes of this rank; see `pool.GuardedPool` for them, timeout_s and memory_bytes. Rank 0
    shows a bar. Returns how many files were opened.
    """
    shown = share[0] == 0
    batches = files_of(job, share)
    num_files = sum(map(len, batches))
    with Journal(job, share, "facts") as journal:
        todo = list(_to_probe(batches, journal, shown))
        num_todo = sum(map(len, todo))
        held: deque[dict[str, Any]] = deque()

        def tasks() -> Iterator[ProbeTask]:
            for batch in todo:
                for row in batch.to_pylist():
                    held.append({name: row[name] for name in ("key", "size", "mtime_ns")})
                    yield ProbeTask(row["kind"], row["path"])

        with (
            progress_bar("surveying files", "file", num_files, shown, initial=num_files - num_todo) as bar,
            GuardedPool(probe, min(num_workers, num_todo), timeout_s, memory_bytes) as pool,
        ):
            for outcome in pool.imap(tasks(), ahead=4 * num_workers):
                known = held.popleft()
                if not isinstance(outcome, Failure):
                    journal.add(known | outcome._asdict())
                else:
                    # Without size and time where the machine may be at fault: such a file is opened again next time.
                    facts = known if outcome.is_verdict else {"key": known["key"]}
                    journal.add(facts | {"reason": reason_of(outcome.reason)})
                bar.update()
    return num_todo


def _to_probe(batches: Sequence[pa.RecordBatch], journal: Journal, shown: bool) -> Iterator[pa.RecordBatch]:
    """Of the files those to open, with their size and time. What cannot be opened at all is put down at once."""
    with (
        progress_bar("looking at files", "file", sum(map(len, batches)), shown) as bar,
        ThreadPoolExecutor(NUM_THREADS) as threads,
    ):
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


# ------------------------------------------------------------------------------------------------------ the third step


def finish(job: Job) -> None:
    """Third step, on rank 0 when all shares are done: write the manifest and remove what the shares left."""
    with locked(job):
        facts = _known_facts(job)
        manifest.write(job.file, rows_of(job.entries, facts, job.default_caption))
        remove(job, facts.parts)


def _known_facts(job: Job) -> Found:
    """What is known of files: found out since the manifest was written, and what stands in it."""
    new = read_parts(job, "facts")  # before the manifest: who removes parts writes that first
    tables = [new.rows]
    if job.file.exists():
        tables += [one for batch in manifest.read_batches(job.file) for one in facts_in(batch)]
    facts = pa.concat_tables(tables)
    digests = read_parts(job, "digests").rows
    if len(digests):  # of a run that was killed before it could write them into the manifest
        (found,) = look_up(digests, [facts["key"].combine_chunks()])
        digest = pc.coalesce(facts["digest"], same_digests(found, facts["size"], facts["mtime_ns"]))
        facts = facts.set_column(facts.schema.get_field_index("digest"), "digest", digest)
    return replace(new, rows=facts)
