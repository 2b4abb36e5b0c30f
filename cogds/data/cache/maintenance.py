"""The cache as a whole, looked after: what it holds, what is damaged in it, what nobody needs.

All of it may be done while runs read and write.
"""

import re
import shutil
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from pathlib import Path

from cogds.data.cache.shard import (
    SHARD_BYTES,
    SHARD_ENTRIES,
    SHARD_FILE,
    Contents,
    Damage,
    list_shard,
    names_in,
    open_shard,
    shards_in,
    storing,
)
from cogds.data.cache.staging import adopt, is_staged, new_staging, staged_files
from cogds.data.cache.store import Cache
from cogds.process.progress import progress_bar

_OLD_FOLDER = re.compile("[0-9a-f]{2}")  # encoding version 1 had one file per entry, <kind>/<xx>/<key>.safetensors


@dataclass(frozen=True)
class Damaged:
    """Something that `verify` removed. key: empty where the file as a whole could not be read."""

    kind: str
    place: str
    key: str
    reason: str


@dataclass(frozen=True)
class VerifyReport:
    """num_entries, num_failures, num_bytes (of tensors): what is there and right. damaged: what is there no more."""

    num_entries: int
    num_failures: int
    num_bytes: int
    damaged: tuple[Damaged, ...]


@dataclass(frozen=True)
class PruneReport:
    """What was removed: entries (copies too, and those of the old layout), records of failures, bytes on disk.

    num_merged: small shards that were put together.
    """

    num_entries: int = 0
    num_failures: int = 0
    num_bytes: int = 0
    num_merged: int = 0

    def __add__(self, other: "PruneReport") -> "PruneReport":
        return PruneReport(*(one + more for one, more in zip(astuple(self), astuple(other))))


@dataclass(frozen=True)
class _Checked:
    entries: list[str]
    failures: list[str]
    damaged: dict[str, str]
    num_bytes: int = 0


def verify(root: Path | str, num_threads: int = 4, show_progress: bool = False) -> VerifyReport:
    """Read every entry and remove the damaged ones, so that they are encoded anew. Runs may go on meanwhile.

    A thread holds one tensor at a time. Raises UserError where a file may not be read, or the folder not be written.
    """
    root = Cache(root).root
    num_entries = num_failures = num_bytes = 0
    damaged: list[Damaged] = []
    for kind in _kinds(root):
        folder = root / kind
        damaged += [Damaged(kind, "staged by a writer that is dead", *one) for one in adopt(root, kind).items()]
        paths = [*staged_files(folder), *shards_in(folder)]
        with ThreadPoolExecutor(num_threads) as pool:
            checking = pool.map(_check, paths)
            results = progress_bar(f"verifying {kind}", "file", len(paths), show_progress, items=checking)
            for path, checked in zip(paths, results):
                if checked is None:
                    continue
                num_entries += len(checked.entries)
                num_failures += len(checked.failures)
                num_bytes += checked.num_bytes
                if checked.damaged:
                    place = path.relative_to(folder).as_posix()
                    damaged += [Damaged(kind, place, *one) for one in checked.damaged.items()]
                    _replace({path: [*checked.entries, *checked.failures]})
    return VerifyReport(num_entries, num_failures, num_bytes, tuple(damaged))


def _check(path: Path) -> _Checked | None:
    """Read every entry of a file; None where it is gone."""
    try:
        file = open_shard(path)
    except FileNotFoundError:
        return None
    except Damage as damage:
        return _Checked([], [], {"": str(damage)})
    contents = file.contents()
    entries, damaged, num_bytes = [], dict(contents.damaged), 0
    for key in contents.keys:
        try:
            num_bytes += sum(tensor.nbytes for tensor in file.read(key).values())
            entries.append(key)
        except FileNotFoundError:
            return None
        except Damage as damage:
            damaged[key] = str(damage)
    return _Checked(entries, list(contents.failures), damaged, num_bytes)


def prune(
    root: Path | str,
    keep: Mapping[str, Collection[str]] | None = None,
    failed: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> PruneReport:
    """Remove entries that are not needed, second copies, and files of the old layout; put small shards together.

    keep: kind -> the keys that stay; kinds that it does not name stay whole. failed: remove the records of failures
    too, so that they are tried again. shard_bytes: what a shard may hold. What a living writer has staged stays, and so
    do files that cannot be read. Raises UserError as `verify`.
    """
    root = Cache(root).root
    report = PruneReport()
    for kind in _kinds(root):
        folder = root / kind
        adopt(root, kind)
        report += _remove_old(folder)
        report += _remove_unneeded(folder, keep.get(kind) if keep is not None else None, failed)
        report += _merge(folder, shard_bytes)
    return report


def _remove_old(folder: Path) -> PruneReport:
    report = PruneReport()
    for old in _old_folders(folder):
        files = [path for path in old.iterdir() if path.suffix == ".safetensors"]
        report += PruneReport(len(files), num_bytes=sum(map(_num_bytes_of, files)))
        with storing(folder):
            shutil.rmtree(old)
    return report


def _remove_unneeded(folder: Path, wanted: Collection[str] | None, failed: bool) -> PruneReport:
    report = PruneReport()
    entries_seen: set[str] = set()
    failures_seen: set[str] = set()
    for path in shards_in(folder):
        contents = list_shard(path)
        if not isinstance(contents, Contents):
            continue
        entries = [key for key in contents.keys if wanted is None or key in wanted]
        entries = [key for key in entries if key not in entries_seen]
        entries_seen.update(entries)
        failures = [key for key in contents.failures if not failed and (wanted is None or key in wanted)]
        failures = [key for key in failures if key not in failures_seen and key not in entries_seen]
        failures_seen.update(failures)
        num_entries, num_failures = len(contents.keys) - len(entries), len(contents.failures) - len(failures)
        if num_entries or num_failures:
            report += PruneReport(num_entries, num_failures) + _replace({path: [*entries, *failures]})
    return report


def _merge(folder: Path, shard_bytes: int) -> PruneReport:
    """Put shards together that are below half of both bounds, such as many short runs leave.

    What this makes is within the bounds, and above the half of one of them but for the last: it is not merged again.
    """
    report = PruneReport()
    group: list[Path] = []
    num_bytes = num_keys = 0
    for path in shards_in(folder):
        own_bytes = _num_bytes_of(path)
        if own_bytes >= shard_bytes / 2:
            continue
        contents = list_shard(path)
        if not isinstance(contents, Contents) or contents.damaged:  # for `verify` to tell of
            continue
        own_keys = len(contents.keys) + len(contents.failures)
        if own_keys >= SHARD_ENTRIES / 2:
            continue
        if num_bytes + own_bytes > shard_bytes or num_keys + own_keys > SHARD_ENTRIES:
            report += PruneReport(num_merged=len(group)) + _replace(dict.fromkeys(group))
            group, num_bytes, num_keys = [], 0, 0
        group.append(path)
        num_bytes, num_keys = num_bytes + own_bytes, num_keys + own_keys
    if len(group) > 1:
        report += PruneReport(num_merged=len(group)) + _replace(dict.fromkeys(group))
    return report


def _replace(sources: Mapping[Path, Collection[str] | None]) -> PruneReport:
    """Put one shard with these entries, {shard: keys, or None for all}, in the place of the shards of a folder.

    Returns the bytes that this freed, and as entries those that turned out to be damaged: they are left out.
    """
    folder = next(iter(sources)).parent
    before, after = sum(map(_num_bytes_of, sources)), 0
    damaged: dict[str, str] = {}
    with storing(folder, before):
        if any(keys is None or keys for keys in sources.values()):
            staging = new_staging(folder)
            try:
                shard, damaged = staging.pack(sources)
                after = _num_bytes_of(shard) if shard else 0
            finally:
                staging.remove()
        unread = [path for path in sources if path.stem in damaged]
        for path in sources:
            if path not in unread:
                path.unlink(missing_ok=True)  # after the new one is there: a kill in between leaves entries twice
    return PruneReport(len(damaged) - len(unread), num_bytes=before - sum(map(_num_bytes_of, unread)) - after)


def stats(root: Path | str) -> dict[str, dict[str, int]]:
    """Per kind: entries, bytes on disk, shards, staged, failures, duplicates, damaged files, old files (version 1)."""
    cache = Cache(root)
    found = {}
    for kind in _kinds(cache.root):
        folder = cache.root / kind
        snapshot = cache.snapshot(kind)
        num_staged = sum(is_staged(place) for place in snapshot.places)
        found[kind] = {
            "entries": snapshot.num_entries,
            "bytes": sum(_num_bytes_of(folder / place) for place in snapshot.places),
            "shards": len(snapshot.places) - num_staged,
            "staged": num_staged,
            "failures": len(snapshot.failures),
            "duplicates": len(snapshot.keys) - snapshot.num_entries,
            "damaged": len(snapshot.damaged),
            "old": sum(len(names_in(old)) for old in _old_folders(folder)),
        }
    return found


def _kinds(root: Path) -> list[str]:
    """The subfolders that hold entries, of this layout or the old one."""
    return [
        kind
        for kind in names_in(root)
        if (root / kind).is_dir()
        and any(
            SHARD_FILE.fullmatch(name) or _OLD_FOLDER.fullmatch(name) or is_staged(name)
            for name in names_in(root / kind)
        )
    ]


def _old_folders(folder: Path) -> list[Path]:
    paths = [folder / name for name in names_in(folder) if _OLD_FOLDER.fullmatch(name)]
    return [path for path in paths if path.is_dir()]


def _num_bytes_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
