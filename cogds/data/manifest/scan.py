"""The scan of the datasets, which makes the manifest.

All ranks share the second and the fourth step:

    scan = start_scan(sets, manifest)                   # rank 0: divide the listing into parts
    listings = list_share(scan, (rank, num_ranks))      # every rank: list the clips of its parts
    scan = choose_files(scan, [listings of all ranks])  # rank 0: find the files that are not known yet
    scan_share(scan, (rank, num_ranks), num_workers)    # every rank: probe and digest the files that are new or changed
    finish_scan(scan)                                   # rank 0: write the manifest

Files that have not changed since an earlier scan are not opened.
"""

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cogds.data.layouts.entry import Entry
from cogds.data.layouts.folder import Folder
from cogds.data.layouts.listing import Listing
from cogds.data.layouts.parts import DatasetReader, Part
from cogds.data.manifest.file_keys import CONDITION, CONTROL, file_key, first_occurrences, kinds_of, look_up
from cogds.data.manifest.rows import KEYS, build_rows, entry_keys, results_in
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
    parts_of,
    read_entries,
    read_results,
    remove_state,
    write_entries,
    write_files,
    write_parts,
)
from cogds.data.manifest.table import DataSet, read_manifest_batches, write_manifest
from cogds.data.storage.access import Stamp, open_binary, stamp
from cogds.data.storage.location import parse_member
from cogds.data.video.media import DecodeError
from cogds.data.video.probe_task import PROBE_MEMORY_BYTES, PROBE_TIMEOUT_S, ProbeTask, categorize, probe_file
from cogds.process.progress import progress_bar
from cogds.process.worker_pool import TaskFailure, WorkerPool

# Folders are divided until there are at least this many parts, so that many ranks can list them.
MIN_PARTS = 256
ENTRIES_PER_BATCH = 1 << 16
_NUM_THREADS = 16  # on a network file system, `stat` is mostly waiting

# --- the first step


def start_scan(sets: Sequence[DataSet], manifest: Path, default_caption: str | None = None) -> Scan:
    """First step, on rank 0: divide the listing of the datasets into parts.

    default_caption: caption of clips that have none. Raises UserError if a dataset cannot be read, or `manifest` is
    another file.
    """
    scan = new_scan(sets, manifest, default_caption)
    try:
        write_parts(scan, _divide(scan))
    except BaseException:
        remove_state(scan)
        raise
    return scan


def _divide(scan: Scan) -> Iterator[tuple[int, Part]]:
    """The parts of all datasets, with the numbers of the datasets, in order."""
    for number, (reader, listing) in enumerate(zip(_readers(scan), scan.listings)):
        parts = reader.parts(listing)
        first = list(itertools.islice(parts, MIN_PARTS))
        while len(first) < MIN_PARTS and any(isinstance(part, Folder) for part in first):
            first = list(itertools.chain.from_iterable(map(partial(_split, reader, listing), first)))
        yield from ((number, part) for part in itertools.chain(first, parts))


def _split(reader: DatasetReader, listing: Listing, part: Part) -> Iterable[Part]:
    return reader.split(part, listing) if isinstance(part, Folder) else (part,)


def _readers(scan: Scan) -> list[DatasetReader]:
    return [DatasetReader(data_set, scan.default_caption is None) for data_set in scan.sets]


# --- the second step


def list_share(scan: Scan, share: Share) -> list[Listing]:
    """Second step, on every rank: list the clips of this rank's parts. Returns the counts of each dataset.

    Raises UserError if a list or a folder cannot be read.
    """
    readers, listings = _readers(scan), [Listing() for _ in scan.sets]

    def batches() -> Iterator[tuple[int, pa.RecordBatch]]:
        for part_number, set_number, part in parts_of(scan, share):
            entries = readers[set_number].read(part, listings[set_number])
            while chunk := list(itertools.islice(entries, ENTRIES_PER_BATCH)):
                yield part_number, _entry_batch(chunk, set_number)

    write_entries(scan, share, batches())
    return listings


# --- the third step


def choose_files(
    scan: Scan, listings: Sequence[Sequence[Listing]], retry_failed: bool = False, *, with_controls: bool = True
) -> Scan:
    """Third step, on rank 0: find the files that no earlier scan has read.

    Args:
        listings: results of `list_share`, by rank.
        retry_failed: open files again that could not be used, even if they have not changed.
        with_controls: open control videos. Without them, results of earlier scans stay in the manifest, so that a run
            with control videos can use the same one, even at the same time.

    Raises:
        UserError: a dataset is empty or read in the wrong way.
    """
    for number, reader in enumerate(_readers(scan)):
        for share in listings:
            scan.listings[number].add(share[number])
        reader.check(scan.listings[number])
    scan = replace(scan, num_shares=len(listings))
    known = _known_results(scan).rows
    # A usable file without a digest was scanned by cogds 0.1, which digested later.
    is_usable = pc.is_valid(known["frames"])
    is_complete = pc.or_(pc.invert(is_usable), pc.is_valid(known["digest"]))
    known = known.filter(pc.and_(is_complete, is_usable) if retry_failed else is_complete)
    keys = KEYS if with_controls else [name for name in KEYS if name != "control_key"]
    return write_files(scan, _list_files(scan, known, keys), first_occurrences(entry_keys(scan, keys)))


def _entry_batch(entries: Sequence[Entry], set_number: int) -> pa.RecordBatch:
    columns: dict[str, list[Any]] = dict(zip(Entry._fields, map(list, zip(*entries))))
    del columns["extras"]
    columns["more_captions"] = [texts or None for texts in columns["more_captions"]]
    columns["set"] = [set_number] * len(entries)
    columns["key"] = [file_key(kind, path) for kind, path in zip(columns["kind"], columns["path"])]
    columns["image_key"] = [path and file_key(CONDITION, path) for path in columns["image_path"]]
    columns["control_key"] = [path and file_key(CONTROL, path) for path in columns["control_path"]]
    try:
        return pa.RecordBatch.from_pydict(columns, ENTRY_SCHEMA)
    except UnicodeEncodeError:  # rare, so only then look at every text
        for row, texts in enumerate(zip(columns["caption"], columns["more_captions"])):
            captions = (texts[0], *(texts[1] or ()))
            if captions != tuple(map(_escape, captions)):
                columns["caption"][row] = columns["more_captions"][row] = None
                columns["caption_error"][row] = "it holds half of a surrogate pair, which is not a character"
        for name in ("path", "image_path", "control_path", "caption_error", "duplicate_of"):
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


def _list_files(scan: Scan, known: pa.Table, keys: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """The files (FILE_SCHEMA) of all entries, with duplicates. known: results of earlier scans. keys: some of KEYS."""
    known_stamps = look_up(known.select(["key", "size", "mtime_ns"]), entry_keys(scan, keys))
    for batch in read_entries(scan):
        files = {
            "key": ("path", batch.column("kind")),
            "image_key": ("image_path", kinds_of(CONDITION, len(batch))),
            "control_key": ("control_path", kinds_of(CONTROL, len(batch))),
        }
        for key in keys:
            path, kinds = files[key]
            stamps = next(known_stamps)
            columns = [batch.column(key), kinds, batch.column(path), stamps["size"], stamps["mtime_ns"]]
            yield pa.record_batch(columns, FILE_SCHEMA)


# --- the fourth step


def scan_share(
    scan: Scan,
    share: Share,
    num_workers: int,
    timeout_s: float = PROBE_TIMEOUT_S,
    memory_bytes: int = PROBE_MEMORY_BYTES,
) -> int:
    """Fourth step, on every rank: open the files of this rank that are new or changed. Rank 0 shows progress.

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
        before = stamp(task.path)
        properties = asdict(probe_file(task))
        with open_binary(task.path) as file:
            digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()  # type: ignore[arg-type]
        is_same = stamp(task.path) == before
    except OSError as error:
        return {"reason": categorize(_open_problem(error))}
    if not is_same:
        return {"reason": "file changed: it was written to while it was scanned; start again when it is complete"}
    size, version = before
    return {"size": size, "mtime_ns": version, "digest": digest, "frames": properties.pop("num_frames"), **properties}


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


def _stamps(batch: pa.RecordBatch) -> list[Stamp | str]:
    """The stamp of every file, or the reason why it cannot be opened."""
    tars: dict[str, Stamp | str] = {}  # the members of one tar file are next to each other
    stamps = []
    for path in batch.column("path").to_pylist():
        if member := parse_member(path):
            if member.tar not in tars:
                tars[member.tar] = _stamp_or_reason(member.tar)
            tar = tars[member.tar]
            stamps.append(tar if isinstance(tar, str) else Stamp(member.size, tar.version))
        else:
            stamps.append(_stamp_or_reason(path))
    return stamps


def _stamp_or_reason(location: str) -> Stamp | str:
    try:
        return stamp(location)
    except (OSError, ValueError) as error:  # a name with a null character is a ValueError
        return categorize(_open_problem(error))


def _open_problem(error: OSError | ValueError) -> str:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return "the file does not exist"
    if isinstance(error, OSError) and error.errno is None:  # of `storage.access`, which says it all
        return str(error)
    return f"it cannot be opened: {getattr(error, 'strerror', None) or error}"


# --- the fifth step


def finish_scan(scan: Scan) -> None:
    """Fifth step, on rank 0 after all ranks: write the manifest and remove the scan's state."""
    with manifest_lock(scan):
        results = _known_results(scan)
        write_manifest(scan.manifest, build_rows(scan, results), scan.skipped)
        remove_state(scan, results.files)


def _known_results(scan: Scan) -> Results:
    """The partial results, then the results in the manifest."""
    results = read_results(scan)  # before the manifest: a run writes that before it removes partial results
    tables = [results.rows]
    if scan.manifest.exists():
        tables += [table for batch in read_manifest_batches(scan.manifest) for table in results_in(batch)]
    return replace(results, rows=pa.concat_tables(tables))
