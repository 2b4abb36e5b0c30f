"""Maintenance of a whole cache: statistics, verification, pruning. All of it may run while other runs use the cache."""

import re
import shutil
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, field
from pathlib import Path

import torch

from cogds.data.cache.shard import (
    SHARD_BYTES,
    SHARD_ENTRIES,
    SHARD_FILE,
    STAGING_FOLDER,
    DamageError,
    ShardListing,
    list_folder,
    list_shard,
    open_shard,
    read_errors,
    shards_in,
    storage_errors,
    write_shard,
)
from cogds.data.cache.store import Cache
from cogds.data.storage.access import remove, stamp
from cogds.data.storage.location import is_url
from cogds.process.progress import progress_bar

_NUM_THREADS = 16  # asking for the sizes of files is mostly waiting
# Encoding version 1 kept each entry in a file of its own, <kind>/<xx>/<key>.safetensors. No key of today matches.
_OLD_FOLDER = re.compile("[0-9a-f]{2}")


@dataclass(frozen=True)
class DamagedEntry:
    """An entry that `verify` removed. key: empty if the whole file could not be read."""

    kind: str
    place: str
    key: str
    reason: str


@dataclass(frozen=True)
class VerifyReport:
    """The result of `verify`: numbers of intact entries, failures and bytes of tensors, and the entries it removed."""

    num_entries: int
    num_failures: int
    num_bytes: int
    damaged: tuple[DamagedEntry, ...]


@dataclass(frozen=True)
class PruneReport:
    """What `prune` removed.

    Attributes:
        num_entries: entries, including duplicates and files of encoding version 1.
        num_failures: records of failures.
        num_bytes: bytes on the disk.
        num_merged: small shards that were merged.
    """

    num_entries: int = 0
    num_failures: int = 0
    num_bytes: int = 0
    num_merged: int = 0

    def __add__(self, other: "PruneReport") -> "PruneReport":
        return PruneReport(*(ours + theirs for ours, theirs in zip(astuple(self), astuple(other))))


@dataclass(frozen=True)
class _CheckedShard:
    entries: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    damaged: dict[str, str] = field(default_factory=dict)
    num_bytes: int = 0


# --- verify


def verify(root: Path | str, num_threads: int = 4, show_progress: bool = False) -> VerifyReport:
    """Read every entry and remove the damaged ones, so that the next run encodes them again.

    Each thread holds one entry at a time. Raises UserError if a file may not be read or the folder not be written.
    """
    root = Cache(root).root
    num_entries = num_failures = num_bytes = 0
    damaged: list[DamagedEntry] = []
    for kind in _kinds(root):
        folder = f"{root}/{kind}"
        shards = shards_in(folder)
        with ThreadPoolExecutor(num_threads) as threads:
            checks = threads.map(_check_shard, (f"{folder}/{place}" for place in shards))
            bar = progress_bar(f"verifying {kind}", "file", len(shards), show_progress, items=checks)
            for place, checked in zip(shards, bar):
                num_entries += len(checked.entries)
                num_failures += len(checked.failures)
                num_bytes += checked.num_bytes
                if checked.damaged:
                    damaged += [DamagedEntry(kind, place, key, reason) for key, reason in checked.damaged.items()]
                    _rewrite(folder, {place: [*checked.entries, *checked.failures]}, replace_unreadable=True)
    return VerifyReport(num_entries, num_failures, num_bytes, tuple(damaged))


def _check_shard(location: str) -> _CheckedShard:
    """Read every entry of a shard. Returns an empty result if the shard was removed."""
    try:
        shard = open_shard(location)
    except FileNotFoundError:
        return _CheckedShard()
    except DamageError as error:
        return _CheckedShard(damaged={"": str(error)})
    listing = shard.list()
    entries, damaged, num_bytes = [], dict(listing.damaged), 0
    for key in listing.keys:
        try:
            num_bytes += sum(tensor.nbytes for tensor in shard.read(key).values())
            entries.append(key)
        except FileNotFoundError:
            return _CheckedShard()
        except DamageError as error:
            damaged[key] = str(error)
    return _CheckedShard(entries, list(listing.failures), damaged, num_bytes)


# --- prune


def prune(
    root: Path | str,
    keep: Mapping[str, Collection[str]] | None = None,
    failed: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> PruneReport:
    """Remove unused entries, duplicates and files of earlier versions, and merge small shards.

    Shards that cannot be read stay; `verify` reports them.

    Args:
        keep: kind -> keys to keep. Kinds that are not listed keep all entries.
        failed: also remove the records of failures, so that the next run tries those entries again.
        shard_bytes: bound on the size of a merged shard.

    Raises:
        UserError: a file may not be read or the folder not be written.
    """
    root = Cache(root).root
    report = PruneReport()
    for kind in _kinds(root):
        folder = f"{root}/{kind}"
        report += _remove_old(folder)
        report += _remove_unused(folder, keep.get(kind) if keep is not None else None, failed)
        report += _merge(folder, shard_bytes)
        Cache(root).remove_abandoned(kind)
        for staging in _folders(folder, STAGING_FOLDER):
            if not shards_in(staging):  # what remains is a lock file and temporary files
                shutil.rmtree(staging, ignore_errors=True)
    return report


def unused_entries(root: Path | str, keep: Mapping[str, Collection[str]]) -> Iterator[tuple[str, str, float]]:
    """Yield kind, key and approximate bytes of each entry that `prune` would remove because it is not in `keep`."""
    root = Cache(root).root
    for kind in _kinds(root):
        if kind not in keep:
            continue
        for place, listing in _listings(f"{root}/{kind}"):
            if unused := [key for key in listing.keys if key not in keep[kind]]:
                entry_bytes = _file_size(f"{root}/{kind}/{place}") / len(listing.keys)
                yield from ((kind, key, entry_bytes) for key in unused)


def _remove_old(folder: str) -> PruneReport:
    report = PruneReport()
    for old in _folders(folder, _OLD_FOLDER):
        files = [item.name for item in list_folder(old) if item.name.endswith(".safetensors")]
        report += PruneReport(len(files), num_bytes=sum(_file_size(f"{old}/{name}") for name in files))
        with storage_errors(folder):
            shutil.rmtree(old)
    return report


def _remove_unused(folder: str, keep: Collection[str] | None, failed: bool) -> PruneReport:
    report = PruneReport()
    kept_entries: set[str] = set()
    kept_failures: set[str] = set()
    for place, listing in _listings(folder):
        entries = [key for key in listing.keys if (keep is None or key in keep) and key not in kept_entries]
        kept_entries.update(entries)
        failures = [
            key
            for key in listing.failures
            if not failed and (keep is None or key in keep) and key not in kept_failures and key not in kept_entries
        ]
        kept_failures.update(failures)
        num_entries, num_failures = len(listing.keys) - len(entries), len(listing.failures) - len(failures)
        if num_entries or num_failures:
            report += PruneReport(num_entries, num_failures) + _rewrite(folder, {place: [*entries, *failures]})
    return report


def _merge(folder: str, shard_bytes: int) -> PruneReport:
    """Merge shards below half of both bounds, such as short runs leave.

    Each merged shard is within the bounds and, except for the last, above half of one of them: it is not merged again.
    """
    report = PruneReport()
    group: list[str] = []
    num_bytes = num_keys = 0
    places = shards_in(folder)
    for place, own_bytes in zip(places, _file_sizes(folder, places)):
        if own_bytes >= shard_bytes / 2:
            continue
        listing = list_shard(f"{folder}/{place}")
        if listing is None or listing.error or listing.damaged:
            continue
        own_keys = len(listing.keys) + len(listing.failures)
        if own_keys >= SHARD_ENTRIES / 2:
            continue
        if num_bytes + own_bytes > shard_bytes or num_keys + own_keys > SHARD_ENTRIES:
            report += PruneReport(num_merged=len(group)) + _rewrite(folder, dict.fromkeys(group))
            group, num_bytes, num_keys = [], 0, 0
        group.append(place)
        num_bytes, num_keys = num_bytes + own_bytes, num_keys + own_keys
    if len(group) > 1:
        report += PruneReport(num_merged=len(group)) + _rewrite(folder, dict.fromkeys(group))
    return report


def _rewrite(
    folder: str, shards: Mapping[str, Collection[str] | None], replace_unreadable: bool = False
) -> PruneReport:
    """Replace shards by one new shard in `folder`, which memory holds meanwhile.

    Args:
        shards: the keys to keep of each shard, by place; None keeps all. An entry that is damaged is left out, and an
            entry is preferred to the record of its failure.
        replace_unreadable: remove shards that cannot be read, too.

    Returns:
        The number of damaged entries and the bytes that were freed.
    """
    before = sum(_file_sizes(folder, shards))
    tensors: dict[str, torch.Tensor] = {}
    records: dict[str, str] = {}
    unreadable, num_damaged, after = [], 0, 0
    for place, keys in shards.items():
        try:
            shard = open_shard(f"{folder}/{place}")
        except FileNotFoundError:
            continue
        except DamageError:
            unreadable.append(place)
            continue
        for key in shard.records if keys is None else keys:
            if key in records and key not in shard.names:
                continue
            try:
                entry = shard.read(key)
            except FileNotFoundError:
                continue
            except DamageError:
                num_damaged += 1
                continue
            tensors |= {f"{key}/{name}": tensor for name, tensor in entry.items()}
            records[key] = shard.records[key]
    with storage_errors(folder, before):
        if records:
            new = f"{folder}/{uuid.uuid4().hex}.safetensors"
            write_shard(new, tensors, records)
            after = _file_size(new)
        for place in shards:
            if place in unreadable and not replace_unreadable:
                before -= _file_size(f"{folder}/{place}")
            else:
                remove(f"{folder}/{place}")  # after the new one exists: a kill in between leaves duplicates
    return PruneReport(num_damaged, num_bytes=before - after)


# --- statistics


def stats(root: Path | str) -> dict[str, dict[str, int]]:
    """Per kind: numbers of entries, bytes on the disk, shards, failures, duplicates, damaged shards, old files.

    Old files are those of encoding version 1, which `prune` removes.
    """
    cache = Cache(root)
    report = {}
    for kind in _kinds(cache.root):
        folder, snapshot = cache.folder(kind), cache.snapshot(kind)
        report[kind] = {
            "entries": snapshot.num_entries,
            "bytes": sum(_file_sizes(folder, snapshot.places)),
            "shards": len(snapshot.places),
            "failures": len(snapshot.failures),
            "duplicates": len(snapshot.keys) - snapshot.num_entries,
            "damaged": len(snapshot.damaged),
            "old": sum(len(list_folder(old)) for old in _folders(folder, _OLD_FOLDER)),
        }
    return report


def _kinds(root: str) -> list[str]:
    """The subfolders that hold entries, in the format of today or an earlier one."""
    return [
        kind.name
        for kind in list_folder(root)
        if kind.is_folder
        and any(
            pattern.fullmatch(item.name)
            for item in list_folder(f"{root}/{kind.name}")
            for pattern in (SHARD_FILE, STAGING_FOLDER, _OLD_FOLDER)
        )
    ]


def _listings(folder: str) -> Iterator[tuple[str, ShardListing]]:
    """Yield the place and the entries of each shard that can be read."""
    for place in shards_in(folder):
        listing = list_shard(f"{folder}/{place}")
        if listing is not None and not listing.error:
            yield place, listing


def _folders(folder: str, pattern: re.Pattern) -> list[str]:
    """Subfolders of earlier versions, which had no caches at URLs."""
    if is_url(folder):
        return []
    return [f"{folder}/{item.name}" for item in list_folder(folder) if item.is_folder and pattern.fullmatch(item.name)]


def _file_sizes(folder: str, places: Iterable[str]) -> list[int]:
    with ThreadPoolExecutor(_NUM_THREADS) as threads:
        return list(threads.map(_file_size, (f"{folder}/{place}" for place in places)))


def _file_size(location: str) -> int:
    try:
        with read_errors(location):
            return stamp(location).size
    except FileNotFoundError:
        return 0
