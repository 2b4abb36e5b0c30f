"""Index and cache -> samples -> one-shape batches, with a stand-in for every clip that turns out to be bad.

A clip that cannot be read is named (`Bad`) and replaced by the next one of its bucket in the plan's order. Which one
that is follows from the plan and from what is bad, so a resumed run replaces it alike, and trains it again once it is
mended. All ranks take the same number of steps.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch.utils.data import Dataset, default_collate

from cogds.core.mixture import Mixture
from cogds.data.cache.store import Cache, DamagedEntryError
from cogds.data.loading.index import ClipIndex, IndexedClip
from cogds.data.loading.sampler import Draw
from cogds.errors import UserError
from cogds.process.worker_pool import STOP_SIGNALS

T = TypeVar("T")


class Bad(NamedTuple):
    """A clip that cannot be read: its row in the index, its file, and why."""

    row: int
    path: str
    reason: str


class Item(NamedTuple):
    """A sample's tensors, the clips that it stands in for, and its own row in the index."""

    tensors: dict[str, torch.Tensor]
    bad: tuple[Bad, ...] = ()
    row: int = -1


class Batch(NamedTuple):
    """Items' tensors with a leading batch axis, all clips that they stand in for, and their rows in the index."""

    tensors: dict[str, torch.Tensor]
    bad: tuple[Bad, ...] = ()
    rows: tuple[int, ...] = ()


class ClipOrder:
    """Which rows of the index a place of the plan stands for: arithmetic, no list of clips."""

    def __init__(self, index: ClipIndex, mixture: Mixture):
        self.index, self.mixture = index, mixture

    def rows(self, draw: Draw) -> Iterator[int]:
        """The row drawn, then those that may stand in for it, until all of its bucket have come."""
        for clip in self.mixture.next_clips(draw.bucket, draw.position, draw.stride):
            yield self.index.row(draw.bucket, clip)

    def first_good(
        self, draw: Draw, quarantined: set[int], load: Callable[[int], T | Bad]
    ) -> tuple[T, tuple[Bad, ...], int]:
        """What `load` makes of the first row that is good, the bad ones before it, which join `quarantined`, and it.

        Raises UserError where the bucket has no good clip left.
        """
        bad: list[Bad] = []
        for row in self.rows(draw):
            if row in quarantined:
                continue
            loaded = load(row)
            if not isinstance(loaded, Bad):
                return loaded, tuple(bad), row
            quarantined.add(row)
            bad.append(loaded)
        last = f" (the last one, {bad[-1].path}: {bad[-1].reason})" if bad else ""
        raise UserError(
            f"not one clip of bucket {self.index.buckets[draw.bucket]} can be read{last}: mend the files, or leave the "
            "bucket out; launch/encode.py --verify mends a damaged cache"
        )


class ClipDataset(Dataset[Item]):
    """Encoded clips by their draw, read from the cache inside a DataLoader worker.

    An item holds `moments` [2C, F, H, W] (mean and log-variance of the VAE's posterior), `first_frame` uint8 [3, H, W]
    in pixels, and `text_states` [text_tokens, dim].
    """

    def __init__(self, order: ClipOrder, cache_dir: Path | str):
        self.order, self.cache, self.quarantined = order, Cache(cache_dir), set[int]()

    def __getitem__(self, draw: Draw) -> Item:
        return Item(*self.order.first_good(draw, self.quarantined, self._load))

    def _load(self, row: int) -> dict[str, torch.Tensor] | Bad:
        clip = self.order.index[row]
        try:
            return read_encoded(self.cache, clip)
        except DamagedEntryError as error:
            return Bad(row, clip.path, str(error))


def read_encoded(cache: Cache, clip: IndexedClip) -> dict[str, torch.Tensor]:
    """The tensors of one clip and its caption. Raises cache.DamagedEntryError."""
    encoded = cache.read("clips", clip.clip_key, clip.clip_place)
    return encoded | cache.read("captions", clip.caption_key, clip.caption_place)


def collate(items: list[Item]) -> Batch:
    """Stack items of one bucket."""
    bad = tuple(bad for item in items for bad in item.bad)
    return Batch(default_collate([item.tensors for item in items]), bad, tuple(item.row for item in items))


def ignore_stop_signals(_worker: int) -> None:
    """For DataLoader(worker_init_fn=...): what asks the run to stop is not for this worker, whoever signals a whole
    process tree. Its parent still ends it with SIGTERM, and it never outlives the parent, even while it reads.

    Not SIG_IGN alone: a parent that ends with an error terminates its workers and waits for them without a bound.
    """
    signal.set_wakeup_fd(-1)
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # threads to come inherit it
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_obey_parent, args=(os.getppid(),), daemon=True, name="obey-parent").start()


def _obey_parent(starter: int) -> None:
    parent = multiprocessing.parent_process()
    owner = starter if parent is None or parent.pid is None else parent.pid
    # The starter may be a server that forks for the owner; or the owner died before we asked who started us.
    while os.getppid() == starter and Path(f"/proc/{owner}").exists():
        found = signal.sigtimedwait(STOP_SIGNALS, 1.0)
        if found is not None and found.si_signo == signal.SIGTERM and found.si_pid == owner:
            os._exit(0)
    os._exit(1)
