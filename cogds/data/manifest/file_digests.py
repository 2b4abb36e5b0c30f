"""Digests of files' content, for the manifest: in three steps, of which many ranks share the second."""

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from cogds.data.manifest import table as manifest
from cogds.data.manifest.file_keys import first_of_each, look_up
from cogds.data.manifest.rows import same_digests, with_digests, without_digest
from cogds.data.manifest.scan_state import (
    ALONE,
    Job,
    Journal,
    Share,
    files_of,
    locked,
    new_job,
    read_parts,
    remove,
    write_files,
)
from cogds.data.video.probe_task import reason_of
from cogds.process.progress import progress_bar

NUM_THREADS = 16  # on a shared file system, waiting is most of it

_CHANGED = "file changed: it was written to while it was surveyed; start again when it is complete"


def fill_digests(file: Path) -> None:
    """Digests of all files of a manifest's usable rows, in one process."""
    job = fill_digests_begin(file)
    fill_digests_share(job, ALONE)
    fill_digests_finish(job)


def fill_digests_begin(file: Path) -> Job:
    """First step, on rank 0: list the files of usable rows that have no digest yet."""
    job = new_job(file)
    files = list(without_digest(file))
    done = look_up(read_parts(job, "digests").rows, [batch.column("key") for batch in files])
    for number, found in enumerate(done):  # by a run that was killed
        batch = files[number]
        digests = same_digests(found, batch.column("known_size"), batch.column("known_mtime_ns"))
        files[number] = batch.filter(pc.is_null(digests))
    return write_files(job, files, first_of_each([batch.column("key") for batch in files]))


def fill_digests_share(job: Job, share: Share) -> int:
    """Second step, on every rank: read the share's files. Rank 0 shows a bar. Returns how many were read."""
    batches = files_of(job, share)
    num_files = sum(map(len, batches))
    with (
        progress_bar("reading files", "file", num_files, share[0] == 0) as bar,
        Journal(job, share, "digests") as journal,
        ThreadPoolExecutor(NUM_THREADS) as threads,
    ):
        for batch in batches:
            for found in threads.map(_digest_file, batch.to_pylist()):
                journal.add(found)
                bar.update()
    return num_files


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


def fill_digests_finish(job: Job) -> None:
    """Third step, on rank 0 when all shares are done: write the digests into the manifest."""
    with locked(job):
        digests = read_parts(job, "digests")
        if digests.parts:
            manifest.write(job.file, with_digests(job.file, digests))
        remove(job, digests.parts)
