"""The scan of the datasets, which makes the manifest.

It has three steps. All ranks share the second one:

    scan = start_scan(sets, manifest)                   # rank 0: list the clips of the datasets
    scan_share(scan, (rank, num_ranks), num_workers)    # every rank: probe and digest the files that are new or changed
    finish_scan(scan)                                   # rank 0: write the manifest

Files that have not changed since an earlier scan are not opened.
"""

import hashlib
import itertools
import os
import stat
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cogds.data.manifest.file_keys import CONDITION, condition_kinds, file_key, first_occurrences, look_up
from cogds.data.manifest.layouts import Entry, iter_entries
from cogds.data.manifest.rows import build_rows, entry_keys, results_in
from cogds.data.manifest.scan_state import (
    ENTRY_SCHEMA,
    FILE_SCHEMA,
    Results,
    ResultWriter,
    Scan,
    Share,
    files_of,
    manifest_lock,
    new_scan,
    read_batches,
    read_results,
    remove_state,
    write_files,
    write_table,
)
from cogds.data.manifest.table import DataSet, read_manifest_batches, write_manifest
from cogds.data.video.media import DecodeError
from cogds.data.video.probe_task import PROBE_MEMORY_BYTES, PROBE_TIMEOUT_S, ProbeTask, categorize, probe_file
from cogds.process.progress import progress_bar
from cogds.process.worker_pool import TaskFailure, WorkerPool

ENTRIES_PER_BATCH = 1 << 16
_NUM_THREADS = 16  # on a network file system, `stat` is mostly waiting

# --- the first step


def start_scan(
    sets: Sequence[DataSet], manifest: Path, default_caption: str | None = None, retry_failed: bool = False
) -> Scan:
    """First step, on rank 0: list the clips of the datasets.

    Args:
        default_caption: caption of clips that have none.
        retry_failed: open files again that could not be used, even if they have not changed.

    Raises:
        UserError: a dataset cannot be read (`layouts.iter_entries`), or `manifest` is another file.
    """
    scan = new_scan(manifest, default_caption)
    try:
        write_table(scan.entries, ENTRY_SCHEMA, _list_entries(sets, need_captions=default_caption is None))
    except BaseException:
        remove_state(scan)
        raise
    known = _known_results(scan).rows
    # A usable file without a digest was scanned by cogds 0.1, which digested later.
    is_usable = pc.is_valid(known["frames"])
    is_complete = pc.or_(pc.invert(is_usable), pc.is_valid(known["digest"]))
    known = known.filter(pc.and_(is_complete, is_usable) if retry_failed else is_complete)
    return write_files(scan, _list_files(scan.entries, known), first_occurrences(entry_keys(scan.entries)))


def _list_entries(sets: Sequence[DataSet], need_captions: bool) -> Iterator[pa.RecordBatch]:
    """The entries (ENTRY_SCHEMA) of all datasets."""
    for number, data_set in enumerate(sets):
        entries = iter_entries(data_set.path, data_set.columns, need_captions)
        while chunk := list(itertools.islice(entries, ENTRIES_PER_BATCH)):
            yield _entry_batch(chunk, number)


def _entry_batch(entries: Sequence[Entry], set_number: int) -> pa.RecordBatch:
    columns: dict[str, list[Any]] = dict(zip(Entry._fields, map(list, zip(*entries))))
    columns["more_captions"] = [texts or None for texts in columns["more_captions"]]
    columns["set"] = [set_number] * len(entries)
    columns["key"] = [file_key(kind, path) for kind, path in zip(columns["kind"], columns["path"])]
    columns["image_key"] = [path and file_key(CONDITION, path) for path in columns["image_path"]]
    try:
        return pa.RecordBatch.from_pydict(columns, ENTRY_SCHEMA)
    except UnicodeEncodeError:  # rare, so only then look at every text
        for row, texts in enumerate(zip(columns["caption"], columns["more_captions"])):
            captions = (texts[0], *(texts[1] or ()))
            if captions != tuple(map(_escape, captions)):
                columns["caption"][row] = columns["more_captions"][row] = None
                columns["caption_error"][row] = "it holds half of a surrogate pair, which is not a character"
        for name in ("path", "image_path", "caption_error"):
            columns[name] = list(map(_escape, columns[name]))
        return pa.RecordBatch.from_pydict(columns, ENTRY_SCHEMA)


def _escape(text: str | None) -> str | None:
    """The text with escapes for what is not Unicode: other bytes in a file name, half of a surrogate pair."""
    if text is None:
        return None
    try:
        encoded = text.encode(errors="surrogateescape")
    except UnicodeEncodeError:
        encoded = text.encode(errors="backslashreplace")
    return encoded.decode(errors="backslashreplace")


def _list_files(entries: Path, known: pa.Table) -> Iterator[pa.RecordBatch]:
    """The files (FILE_SCHEMA) of all entries, with duplicates. known: results of earlier scans."""
    known_stamps = look_up(known.select(["key", "size", "mtime_ns"]), entry_keys(entries))
    for batch in read_batches(entries):
        for key, path, kinds in (
            ("key", "path", batch.column("kind")),
            ("image_key", "image_path", condition_kinds(len(batch))),
        ):
            stamps = next(known_stamps)
            columns = [batch.column(key), kinds, batch.column(path), stamps["size"], stamps["mtime_ns"]]
            yield pa.record_batch(columns, FILE_SCHEMA)


# --- the second step


def scan_share(
    scan: Scan,
    share: Share,
    num_workers: int,
    timeout_s: float = PROBE_TIMEOUT_S,
    memory_bytes: int = PROBE_MEMORY_BYTES,
) -> int:
    """Second step, on every rank: open the files of this rank that are new or changed. Rank 0 shows progress.

    Args:
        num_workers: worker processes of this rank, each bounded by timeout_s per file and memory_bytes
            (`worker_pool.WorkerPool`).

    Returns:
        The number of files that were opened.
    """
    is_shown = share[0] == 0
    batches = files_of(scan, share)
    num_files = sum(map(len, batches))
    with ResultWriter(scan, share) as writer:
        changed = list(_changed_files(batches, writer, is_shown))
        num_changed = sum(map(len, changed))
        tasks = (ProbeTask(row["kind"], row["path"]) for row in _rows(changed))
        with (
            progress_bar("scanning files", "file", num_files, is_shown, initial=num_files - num_changed) as bar,
            WorkerPool(scan_file, min(num_workers, num_changed), timeout_s, memory_bytes, (DecodeError,)) as pool,
        ):
            for row, result in zip(_rows(changed), pool.imap(tasks, ahead=4 * num_workers)):
                if not isinstance(result, TaskFailure):
                    writer.add({"key": row["key"], **result})
                elif result.is_permanent:
                    del row["kind"], row["path"]
                    writer.add({**row, "reason": categorize(result.reason)})
                else:  # the machine may be at fault, so the next scan opens the file again
                    writer.add({"key": row["key"], "reason": categorize(result.reason)})
                bar.update()
    return num_changed


def _rows(batches: Sequence[pa.RecordBatch]) -> Iterator[dict[str, Any]]:
    for batch in batches:
        yield from batch.to_pylist()


def scan_file(task: ProbeTask) -> dict[str, Any]:
    """Probe a file and digest its content. Returns columns of RESULT_SCHEMA. Raises DecodeError if it cannot be used.

    The digest reads what the probe has just brought into the system's file cache.
    """
    try:
        size, mtime_ns = _stamp(os.stat(task.path))
        properties = asdict(probe_file(task))
        with open(task.path, "rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()
            is_same = _stamp(os.fstat(file.fileno())) == (size, mtime_ns)
    except OSError as error:
        return {"reason": categorize(_open_problem(error))}
    if not is_same:
        return {"reason": "file changed: it was written to while it was scanned; start again when it is complete"}
    return {"size": size, "mtime_ns": mtime_ns, "digest": digest, "frames": properties.pop("num_frames"), **properties}


def _changed_files(batches: Sequence[pa.RecordBatch], writer: ResultWriter, is_shown: bool) -> Iterator[pa.RecordBatch]:
    """The files that are new or changed, with size and mtime_ns. Writes results of those that cannot be opened."""
    with (
        progress_bar("checking files", "file", sum(map(len, batches)), is_shown) as bar,
        ThreadPoolExecutor(_NUM_THREADS) as threads,
    ):
        for batch, stamps in zip(batches, threads.map(_stamps, batches)):
            bar.update(len(batch))
            known = zip(batch.column("known_size").to_pylist(), batch.column("known_mtime_ns").to_pylist())
            changed = [row for row, (new, old) in enumerate(zip(stamps, known)) if new != old]
            for row in changed:
                if isinstance(problem := stamps[row], str):
                    writer.add({"key": batch.column("key")[row].as_py(), "reason": problem})
            if changed := [row for row in changed if not isinstance(stamps[row], str)]:
                sizes, times = zip(*(stamps[row] for row in changed))
                columns = [batch.column(name).take(pa.array(changed)) for name in ("key", "kind", "path")]
                names = ["key", "kind", "path", "size", "mtime_ns"]
                yield pa.record_batch([*columns, pa.array(sizes), pa.array(times)], names)


def _stamps(batch: pa.RecordBatch) -> list[tuple[int, int] | str]:
    """(size, mtime_ns) of every file, or the reason why it cannot be opened."""
    return [_stamp_or_reason(path) for path in batch.column("path").to_pylist()]


def _stamp_or_reason(path: str) -> tuple[int, int] | str:
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:  # a name with a null character is a ValueError
        return categorize(_open_problem(error))
    if stat.S_ISDIR(status.st_mode):
        return categorize("it is a folder, not a file")
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait forever
        return categorize("it is a device, a pipe or a socket, not a file")
    return _stamp(status)


def _stamp(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def _open_problem(error: OSError | ValueError) -> str:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return "the file does not exist"
    return f"it cannot be opened: {getattr(error, 'strerror', None) or error}"


# --- the third step


def finish_scan(scan: Scan) -> None:
    """Third step, on rank 0 after all ranks: write the manifest and remove the scan's state."""
    with manifest_lock(scan):
        results = _known_results(scan)
        write_manifest(scan.manifest, build_rows(scan.entries, results, scan.default_caption))
        remove_state(scan, results.files)


def _known_results(scan: Scan) -> Results:
    """The partial results, then the results in the manifest."""
    partial = read_results(scan)  # before the manifest: a run writes that before it removes partial results
    tables = [partial.rows]
    if scan.manifest.exists():
        tables += [table for batch in read_manifest_batches(scan.manifest) for table in results_in(batch)]
    return replace(partial, rows=pa.concat_tables(tables))
