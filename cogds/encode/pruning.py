"""Removing the entries of a cache that a run's dataset does not use, after showing which datasets they belong to."""

import logging
import os
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cogds.data.cache.maintenance import prune, unused_entries
from cogds.data.loading.index import ClipIndex
from cogds.data.storage.location import display_name, parent
from cogds.encode.cache_keys import CacheKeys
from cogds.encode.encoding_plan import EMPTY_CAPTION, EncodedData
from cogds.errors import UserError
from cogds.formatting import counted, gigabytes
from cogds.job import Job
from cogds.process.logs import RESULT

logger = logging.getLogger(__name__)

COLUMNS = {"clips": "clip_key", "captions": "caption_keys"}
UNKNOWN = "no dataset that was encoded here"


@dataclass
class Unused:
    """What a prune would remove of one dataset: numbers of entries by kind, and bytes."""

    num_entries: Counter[str] = field(default_factory=Counter)
    num_bytes: float = 0.0

    def __str__(self) -> str:
        kinds = ((kind.removesuffix("s"), self.num_entries[kind]) for kind in COLUMNS)
        entries = " and ".join(counted(num, kind) for kind, num in kinds if num)
        return f"{entries}, about {gigabytes(self.num_bytes)}"


def prune_unused(job: Job, data: EncodedData, is_confirmed: bool) -> None:
    """Remove every entry and index of the cache that this run's dataset does not use.

    is_confirmed: remove them without a question. Raises UserError if nobody can be asked.
    """
    cfg = job.cfg
    keep = {kind: set().union(*(index.keys(column) for index in data.indexes)) for kind, column in COLUMNS.items()}
    keys, prompts = CacheKeys(cfg, job.model), [EMPTY_CAPTION, *(prompt.prompt for prompt in cfg.sample.prompts)]
    keep["captions"] |= {keys.caption(prompt).hex() for prompt in prompts}
    used = tuple(index.path.stem for index in data.indexes)
    others = [path for path in data.index.path.parent.iterdir() if not path.name.startswith(used)]
    unused = unused_by_dataset(cfg.data.cache_dir, keep, others, data)
    if unused:
        lines = [f"  {dataset}: {entries}" for dataset, entries in unused.items()]
        logger.log(RESULT, "\n".join(["entries that this dataset does not use belong to", *lines]))
    elif others:
        logger.log(RESULT, f"no entry is unused, only {counted(len(others), 'file')} of indexes")
    if (unused or others) and not is_confirmed and not _ask():
        return
    pruned = prune(cfg.data.cache_dir, keep, shard_bytes=int(cfg.data.shard_gb * 1e9))
    for path in others:
        path.unlink(missing_ok=True)
    logger.log(
        RESULT,
        f"removed {counted(pruned.num_entries, 'entry')}, {pruned.num_bytes / 1e9:.3f} GB; merged "
        f"{counted(pruned.num_merged, 'small shard')}",
    )


def unused_by_dataset(
    cache_dir: str, keep: Mapping[str, set[str]], others: list[Path], data: EncodedData
) -> dict[str, Unused]:
    """Return what a prune would remove, by the folder of the clips, this run's dataset first.

    The indexes of all runs that share the folder of `data.index` say which clips an entry belongs to. keep: keys by
    kind. others: index files of other datasets, or of other settings of this one.
    """
    own, owners = dataset_folder(data.index), dict[str, str]()
    for path in others:
        for key, dataset in (_owners(path) if path.suffix == ".arrow" else {}).items():
            if dataset != own or key not in owners:  # what another dataset uses, too, counts as its own
                owners[key] = dataset
    unused: dict[str, Unused] = {}
    for kind, key, num_bytes in unused_entries(cache_dir, keep):
        dataset = owners.get(key, UNKNOWN)
        name = f"{dataset} (this dataset, with other settings)" if dataset == own else dataset
        entries = unused.setdefault(name, Unused())
        entries.num_entries[kind] += 1
        entries.num_bytes += num_bytes
    return dict(sorted(unused.items(), key=lambda item: (not item[0].startswith(f"{own} "), item[0] == UNKNOWN)))


def dataset_folder(index: ClipIndex) -> str:
    """Return the innermost folder, URL or tar file that contains all clips of an index."""
    folders = {parent(display_name(path)) for path in index.column("path").unique().to_pylist()}
    schemes = {folder.partition("://")[0] for folder in folders if "://" in folder}
    if len(folders) == 1 or schemes:
        return min(folders)
    return os.path.commonpath(folders)


def _owners(path: Path) -> dict[str, str]:
    """Return the folder of the clips for each key of an index, {} if another version wrote it."""
    try:
        index = ClipIndex(path)
        dataset = dataset_folder(index) if len(index) else UNKNOWN
        return {key: dataset for column in COLUMNS.values() for key in index.keys(column)}
    except UserError:
        return {}


def _ask() -> bool:
    """Ask on the terminal whether to remove them. Raises UserError without a terminal."""
    if not sys.stdin or not sys.stdin.isatty():
        raise UserError("--prune: nothing was removed, as there is no terminal to ask on. Pass --yes to remove them.")
    print("Remove them? [y/N] ", end="", flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")
