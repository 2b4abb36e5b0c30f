"""Encoded clips and captions on disk, addressed by what made them (see `keys`).

Entries lie in shards, `<root>/<kind>/<uuid>.safetensors`: many entries per file, because the file systems of clusters
suffer from millions of files.

    with Cache(root).writer("clips") as writer:
        writer.write(key, {"moments": moments})
    snapshot = Cache(root).snapshot("clips")
    tensors = Cache(root).read("clips", key, snapshot.place(key))
"""

import functools
import os
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from cogds.data.cache.local_copy import LocalCopy
from cogds.data.cache.shard import (
    KEY,
    SHARD_BYTES,
    SHARD_ENTRIES,
    DamageError,
    Shard,
    ShardListing,
    entry_record,
    failure_record,
    list_shard,
    open_shard,
    shards_in,
    storage_errors,
    write_shard,
)
from cogds.data.storage.access import remove, write_bytes
from cogds.data.storage.location import is_url, protocol
from cogds.data.storage.requests import HTTP
from cogds.errors import UserError
from cogds.files import remove_abandoned

# A shard is written when it is full, and after this time at the latest: what a killed process can lose.
FLUSH_S = 30.0
_NUM_THREADS = 16  # opening files on a network file system is mostly waiting


class DamagedEntryError(Exception):
    """An entry is gone or does not match its checksum; the message says which, where, and what to do."""


def key_array(keys: Iterable[str]) -> pa.FixedSizeBinaryArray:
    """Keys of 32 hex digits as a binary(16) array, for `Snapshot.find`."""
    return key_array_of_bytes(bytes.fromhex("".join(keys)))


def key_array_of_bytes(data: bytes | bytearray) -> pa.FixedSizeBinaryArray:
    """Keys of 16 bytes each, concatenated, as a binary(16) array."""
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(data) // 16, [None, pa.py_buffer(data)])


@functools.lru_cache(maxsize=64)
def _open_cached(location: str, process_id: int) -> Shard:  # noqa: ARG001 - a forked worker opens its own
    return open_shard(location)


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Which keys of a kind the cache holds at a moment, and where.

    Attributes:
        places: shards, relative to the kind's folder.
        keys: binary(16) [N], each copy of each entry.
        place_numbers: int32 [N], which of `places` holds the copy.
        failures: keys of the entries that could not be made, with the reasons.
        damaged: places that are damaged, with what is wrong. Entries with a damaged header count as missing.
    """

    places: tuple[str, ...]
    keys: pa.FixedSizeBinaryArray
    place_numbers: np.ndarray
    failures: dict[str, str]
    damaged: dict[str, str]

    def find(self, keys: pa.FixedSizeBinaryArray) -> np.ndarray:
        """int32 [len(keys)]: the number of the place that holds each key, -1 if it is missing.

        Each call hashes all keys of the snapshot (0.4 s per million), so look up many at once.
        """
        rows = pc.fill_null(pc.index_in(keys, value_set=self.keys), -1).to_numpy(zero_copy_only=False)
        return np.append(self.place_numbers, np.int32(-1))[rows]

    def place(self, key: str) -> str | None:
        """The place that holds one key, None if it is missing."""
        if not len(self.keys):
            return None
        # A comparison takes milliseconds per million keys, less than the hashing of `find`.
        halves = np.frombuffer(self.keys.buffers()[1], np.uint64).reshape(-1, 2)
        first, second = np.frombuffer(bytes.fromhex(key), np.uint64)
        copies = np.flatnonzero((halves[:, 0] == first) & (halves[:, 1] == second))
        return self.places[self.place_numbers[copies[0]]] if len(copies) else None

    @property
    def num_entries(self) -> int:
        """Number of distinct entries."""
        return len(pc.unique(self.keys))


class Cache:
    """Entries of tensors under a root folder or URL. A kind of entries, such as `clips`, is a subfolder.

    local_copy: keeps entries that were read from a URL. Raises UserError if the root is a file.
    """

    def __init__(self, root: Path | str, local_copy: LocalCopy | None = None):
        self.root, self.is_remote = str(root).rstrip("/") or "/", is_url(str(root))
        if self.is_remote and protocol(self.root) in HTTP:
            raise UserError(
                f"data.cache_dir: {self.root} cannot be written to. Set data.cache_dir to a folder, or to an object "
                "store such as s3://bucket/cache."
            )
        if not self.is_remote and os.path.exists(self.root) and not os.path.isdir(self.root):
            raise UserError(
                f"data.cache_dir: {self.root} is a file, not a folder. Move it, or set another data.cache_dir."
            )
        self._local_copy = local_copy if self.is_remote else None
        self._newer: dict[str, Snapshot] = {}

    def folder(self, kind: str) -> str:
        """The folder or URL of a kind."""
        return f"{self.root}/{kind}"

    def snapshot(self, kind: str) -> Snapshot:
        """List the entries that the cache holds now, by the headers of all shards."""
        folder = self.folder(kind)
        listings: dict[str, ShardListing | None] = {}
        shards: list[str] = []
        with ThreadPoolExecutor(_NUM_THREADS) as threads:
            # Until nothing changes: `prune` may replace a shard after its folder was listed.
            while shards != (listed := shards_in(folder)):
                shards = listed
                new = [place for place in shards if place not in listings]
                listings.update(zip(new, threads.map(list_shard, (f"{folder}/{place}" for place in new))))
        places = tuple(place for place in shards if listings[place] is not None)
        key_bytes, counts = [], []
        failures: dict[str, str] = {}
        damaged: dict[str, str] = {}
        for place in places:
            listing = listings[place] or ShardListing()
            problems = [listing.error] * bool(listing.error)
            problems += [f"{key}: {problem}" for key, problem in listing.damaged.items()]
            if problems:
                damaged[place] = "; ".join(problems)
            key_bytes.append(listing.key_bytes)
            counts.append(len(listing.key_bytes) // 16)
            failures |= listing.failures
        keys = key_array_of_bytes(b"".join(key_bytes))
        if failures:  # one run may have failed where another succeeded
            succeeded = pc.is_in(key_array(failures), value_set=keys).to_pylist()
            failures = {key: reason for (key, reason), exists in zip(failures.items(), succeeded) if not exists}
        numbers = np.repeat(np.arange(len(places), dtype=np.int32), counts)
        return Snapshot(places, keys, numbers, failures, damaged)

    def read(self, kind: str, key: str, place: str) -> dict[str, torch.Tensor]:
        """Read and check the tensors of an entry.

        Args:
            place: where a snapshot found the key. If that shard is gone, the key is looked up again.

        Raises:
            DamagedEntryError: the entry is gone or damaged.
            UserError: the file may not be read.
        """
        if self._local_copy is not None and (tensors := self._local_copy.read(kind, key)) is not None:
            return tensors
        folder = self.folder(kind)
        with suppress(FileNotFoundError):  # pruned since the caller looked
            return self._read_shard(kind, key, place)
        for renew in (False, True):  # the snapshot made for another key is usually new enough
            if renew or kind not in self._newer:
                self._newer[kind] = self.snapshot(kind)
            newer = self._newer[kind].place(key)
            if newer is not None and newer != place:
                with suppress(FileNotFoundError):
                    return self._read_shard(kind, key, newer)
        raise DamagedEntryError(
            f"{folder}/{place}: the cache entry {key} of {kind} is gone: its shard was removed, and no other holds it. "
            "Start again to encode it again."
        )

    def _read_shard(self, kind: str, key: str, place: str) -> dict[str, torch.Tensor]:
        location = f"{self.folder(kind)}/{place}"
        try:
            shard = _open_cached(location, os.getpid())
            tensors = shard.read(key)
            if not tensors:
                raise DamageError("it is the record of a failure")
        except DamageError as error:
            raise DamagedEntryError(
                f"{location}: the cache entry {key} is damaged: {error}. Run cogds encode --verify to remove it; the "
                "next run encodes it again."
            ) from None
        if self._local_copy is not None:
            self._local_copy.write(kind, key, tensors)
        return tensors

    def fetch(self, kind: str, key: str, place: str) -> int:
        """Bring an entry into the local copy, if there is one. Returns its size in bytes. Raises as `read`."""
        if self._local_copy is None:
            return 0
        if not (num_bytes := self._local_copy.touch(kind, key)):
            num_bytes = sum(tensor.nbytes for tensor in self.read(kind, key, place).values())
        return num_bytes

    def check_writable(self) -> None:
        """Raise UserError if the server does not take files. Local folders: see `files.make_folders`."""
        if self.is_remote:
            marker = f"{self.root}/.writable-{uuid.uuid4().hex}"
            with storage_errors(self.root):
                write_bytes(marker, b"")
                remove(marker)

    def remove_abandoned(self, kind: str) -> None:
        """Remove the temporary files that killed writers left. Raises UserError if that is not possible."""
        if not self.is_remote:  # files at a URL are complete
            with storage_errors(self.folder(kind)):
                remove_abandoned(self.folder(kind))

    @contextmanager
    def writer(self, kind: str, shard_bytes: int = SHARD_BYTES) -> Iterator["CacheWriter"]:
        """A writer for entries of a kind, for one process and thread. Raises UserError if it cannot write."""
        writer = CacheWriter(self.folder(kind), shard_bytes)
        try:
            yield writer
        except BaseException:
            with suppress(UserError):  # the first error says more
                writer.flush()
            raise
        writer.flush()


class CacheWriter:
    """Collects entries and writes them as shards. Made by `Cache.writer`.

    A shard is written when the next entry does not fit into `shard_bytes`, when it holds SHARD_ENTRIES, when FLUSH_S
    have passed since the last one, and at the end. A killed process loses the entries since the last shard.
    """

    def __init__(self, folder: str, shard_bytes: int):
        self._folder, self._shard_bytes = folder, shard_bytes
        self._clear()

    def _clear(self) -> None:
        self._tensors: dict[str, torch.Tensor] = {}
        self._records: dict[str, str] = {}
        self._num_bytes, self._last_flush_s = 0, time.monotonic()

    def write(self, key: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Add an entry. Raises UserError if a shard cannot be written, ValueError for an invalid key or no tensors."""
        if not tensors:
            raise ValueError(f"entry {key} has no tensors")
        # Copies: the caller may change its tensors, or hold views of larger ones.
        copies = {
            name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for name, tensor in tensors.items()
        }
        self._add(key, copies, entry_record(key, copies))

    def fail(self, key: str, reason: str) -> None:
        """Record why an entry cannot be made, so that no later run tries it again. Raises as `write` does."""
        self._add(key, {}, failure_record(key, reason))

    def _add(self, key: str, tensors: Mapping[str, torch.Tensor], record: str) -> None:
        if not KEY.fullmatch(key):
            raise ValueError(f"a key has 32 hex digits, but this one is {key!r}")
        num_bytes = sum(tensor.nbytes for tensor in tensors.values())
        if self._num_bytes + num_bytes > self._shard_bytes:
            self.flush()
        self._tensors |= {f"{key}/{name}": tensor for name, tensor in tensors.items()}
        self._records[key] = record
        self._num_bytes += num_bytes
        if len(self._records) >= SHARD_ENTRIES or time.monotonic() - self._last_flush_s >= FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Write the entries collected so far as a shard. Raises UserError if that fails; they stay collected."""
        if self._records:
            with storage_errors(self._folder, self._num_bytes):
                write_shard(f"{self._folder}/{uuid.uuid4().hex}.safetensors", self._tensors, self._records)
        self._clear()
