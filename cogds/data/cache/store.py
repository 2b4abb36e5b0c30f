"""Encoded clips and captions on disk, content-addressed: what made an entry is its name (see `digest`).

Entries lie in shards, `<root>/<kind>/<uuid>.safetensors`: many entries to a file, since file systems of clusters suffer
from millions of files. What is not yet in a shard is staged, and can be read there (see `staging`).
"""

import functools
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from cogds.data.cache.shard import (
    KEY,
    SHARD_BYTES,
    SHARD_ENTRIES,
    Contents,
    Damage,
    Shard,
    checksum_text,
    failure_text,
    list_shard,
    open_shard,
    shards_in,
    storing,
)
from cogds.data.cache.staging import Staging, adopt, new_staging, staged_files
from cogds.errors import UserError

_NUM_THREADS = 16  # on a network file system, opening a file is waiting


class DamagedEntry(Exception):
    """An entry that is gone or does not match its checksum; the message says which, where, and what to do."""


def key_array(keys: Iterable[str]) -> pa.FixedSizeBinaryArray:
    """Keys of 32 hex digits as a binary(16) array, for `Snapshot.find`."""
    return _key_array(bytes.fromhex("".join(keys)))


def _key_array(data: bytes) -> pa.FixedSizeBinaryArray:
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(data) // 16, [None, pa.py_buffer(data)])


@functools.lru_cache(maxsize=64)
def _opened(path: Path, process: int) -> Shard:  # noqa: ARG001 - a forked worker opens its own
    return open_shard(path)


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Which keys of a kind are there, and where.

    places: files, relative to the kind's folder. keys, numbers [n]: each copy of an entry, and which place holds it,
    shards before staged files. failures: key -> why there is no entry. damaged: place -> what is wrong with it; entries
    whose header is unreadable count as missing.
    """

    places: tuple[str, ...]
    keys: pa.FixedSizeBinaryArray
    numbers: np.ndarray
    failures: dict[str, str]
    damaged: dict[str, str]

    def find(self, keys: pa.FixedSizeBinaryArray) -> np.ndarray:
        """int32 [len(keys)]: the number of the place that holds each key, -1 where it is missing.

        Each call hashes all keys of the snapshot (0.4 s a million): ask for many at once.
        """
        at = pc.fill_null(pc.index_in(keys, value_set=self.keys), -1).to_numpy(zero_copy_only=False)
        return np.append(self.numbers, np.int32(-1))[at]

    def place(self, key: str) -> str | None:
        """The place that holds one key, None where it is missing."""
        if not len(self.keys):
            return None
        # Compared, not hashed as in `find`: milliseconds a million.
        halves = np.frombuffer(self.keys.buffers()[1], np.uint64).reshape(-1, 2)
        first, second = np.frombuffer(bytes.fromhex(key), np.uint64)
        copies = np.flatnonzero((halves[:, 0] == first) & (halves[:, 1] == second))
        return self.places[self.numbers[copies[0]]] if len(copies) else None

    @property
    def num_entries(self) -> int:
        """Distinct entries."""
        return len(pc.unique(self.keys))


class Cache:
    """Entries of tensors under a root folder; `kind` is a subfolder, such as `clips`. Raises UserError for a file."""

    def __init__(self, root: Path | str):
        self.root = Path(root)
        if self.root.exists() and not self.root.is_dir():
            raise UserError(f"the cache folder {self.root} is a file: move it away, or set data.cache_dir elsewhere")
        self._newer: dict[str, Snapshot] = {}

    def snapshot(self, kind: str) -> Snapshot:
        """What is there now: the headers of all shards and staged entries."""
        folder = self.root / kind
        contents: dict[Path, Contents | str | None] = {}
        with ThreadPoolExecutor(_NUM_THREADS) as pool:

            def look(paths: list[Path]) -> None:
                new = [path for path in paths if path not in contents]
                contents.update(zip(new, pool.map(list_shard, new)))

            # Staged entries first: one that is packed meanwhile is in a shard by the time its file is gone.
            staged = staged_files(folder)
            look(staged)
            # Until it stands still: a shard that is gone was rewritten into another, and a listing may miss both.
            shards: list[Path] = []
            while shards != (listed := shards_in(folder)):
                shards = listed
                look(shards)
        paths = [path for path in [*shards, *staged] if contents[path] is not None]
        data, counts = [], []
        failures: dict[str, str] = {}
        damaged: dict[str, str] = {}
        for path in paths:
            one = contents[path]
            place = path.relative_to(folder).as_posix()
            if not isinstance(one, Contents):
                one, damaged[place] = Contents(), str(one)
            elif one.damaged:
                damaged[place] = "; ".join(f"{key}: {what}" for key, what in one.damaged.items())
            data.append(one.found)
            counts.append(len(one.found) // 16)
            failures |= one.failures
        keys = _key_array(b"".join(data))
        if failures:  # one writer's failure may be another's success
            found = pc.is_in(key_array(failures), value_set=keys).to_pylist()
            failures = {key: reason for (key, reason), there in zip(failures.items(), found) if not there}
        return Snapshot(
            places=tuple(path.relative_to(folder).as_posix() for path in paths),
            keys=keys,
            numbers=np.repeat(np.arange(len(paths), dtype=np.int32), counts),
            failures=failures,
            damaged=damaged,
        )

    def read(self, kind: str, key: str, place: str) -> dict[str, torch.Tensor]:
        """The tensors of an entry, checked. place: as of a snapshot; where that is gone the key is looked up anew.

        Raises DamagedEntry, and UserError where the file may not be read.
        """
        folder = self.root / kind
        try:
            return self._read_at(folder / place, key)
        except FileNotFoundError:  # packed, rewritten or pruned since the caller looked
            pass
        for renew in (False, True):  # what was looked up for another key often does
            if renew or kind not in self._newer:
                self._newer[kind] = self.snapshot(kind)
            newer = self._newer[kind].place(key)
            if newer is not None and newer != place:
                with suppress(FileNotFoundError):
                    return self._read_at(folder / newer, key)
        raise DamagedEntry(
            f"cache entry {key} of {kind} is gone: {folder / place} was removed, and nothing else holds it; "
            "start again, it will be encoded anew"
        )

    def _read_at(self, path: Path, key: str) -> dict[str, torch.Tensor]:
        try:
            tensors = _opened(path, os.getpid()).read(key)
            if not tensors:
                raise Damage("it is the record of a failure")
        except Damage as damage:
            raise DamagedEntry(
                f"cache entry {key} in {path} is damaged ({damage}): run launch/encode.py --verify, "
                "which removes it, and it will be encoded anew"
            ) from None
        return tensors

    @contextmanager
    def writer(self, kind: str, shard_bytes: int = SHARD_BYTES) -> Iterator["Writer"]:
        """A place to write entries of a kind, one process and thread each. What killed writers left is packed first.

        Raises UserError where the folder cannot be written.
        """
        adopt(self.root, kind)
        writer = Writer(self.root / kind, shard_bytes)
        try:
            yield writer
        except BaseException:
            with suppress(UserError):  # the first error says more; the next writer packs what is staged
                writer.close()
            raise
        writer.close()


class Writer:
    """Writes entries that are safe from a kill as soon as `write` returns. Made by `Cache.writer`."""

    def __init__(self, folder: Path, shard_bytes: int):
        self._folder = folder
        self._shard_bytes = shard_bytes
        self._staging: Staging | None = None
        self._staged: dict[str, int] = {}  # key -> bytes

    def write(self, key: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep the tensors of an entry. Raises UserError where the disk is full or cannot be written."""
        if not tensors:
            raise ValueError(f"entry {key} has no tensors")
        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        self._stage(key, whole, checksum_text(key, whole))

    def fail(self, key: str, reason: str) -> None:
        """Keep why an entry cannot be made, so that it is not tried again. Raises UserError as `write` does."""
        self._stage(key, {}, failure_text(key, reason))

    def _stage(self, key: str, tensors: Mapping[str, torch.Tensor], text: str) -> None:
        if not KEY.fullmatch(key):
            raise ValueError(f"a key has 32 hex digits, this is {key!r}")
        num_bytes = sum(tensor.nbytes for tensor in tensors.values())
        full = sum(self._staged.values()) + num_bytes > self._shard_bytes or len(self._staged) >= SHARD_ENTRIES
        if self._staged and full:
            self._pack()
        with storing(self._folder, num_bytes):
            # Where nodes do not see each other's locks, another may have taken this one for dead and packed it.
            if self._staging is None or not self._staging.is_there():
                self._close_staging()
                self._staging = new_staging(self._folder)
                self._staged = {}
            self._staging.save({f"{key}/{name}": one for name, one in tensors.items()}, {key: text}, key)
        self._staged[key] = num_bytes

    def _pack(self) -> None:
        if self._staging is not None:
            with storing(self._folder, sum(self._staged.values())):
                _, damaged = self._staging.pack(dict.fromkeys(shards_in(self._staging.path)))
                self._staging.clear()
            self._staged = {}
            if damaged:
                raise UserError(
                    f"{len(damaged)} entries in {self._folder} did not read back as they were written (the first: "
                    f"{next(iter(damaged.items()))}) and are left out: check the disk, then start again"
                )

    def _close_staging(self) -> None:
        if self._staging is not None:
            self._staging.release()
            self._staging = None

    def close(self) -> None:
        """Pack what is staged. Raises UserError as `write` does; what is staged is then left to the next writer."""
        try:
            self._pack()
            if self._staging is not None:
                with storing(self._folder):
                    self._staging.remove()
        finally:
            self._close_staging()
