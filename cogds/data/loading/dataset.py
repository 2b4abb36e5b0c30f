"""Dataset of encoded clips, with a substitute for every clip that cannot be read.

A clip that cannot be read is reported (`BadClip`) and replaced by the next clip of its bucket in the plan's order. The
choice depends only on the plan and on which clips are bad. So a resumed run chooses the same substitute, or trains the
clip itself if it has been repaired. All ranks take the same number of steps.
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
from cogds.process.signals import STOP_SIGNALS

T = TypeVar("T")


class BadClip(NamedTuple):
    """A clip that cannot be read. row: in the index; path: of its file; reason: the error."""

    row: int
    path: str
    reason: str


class Item(NamedTuple):
    """A sample. bad: clips that it substitutes; row: its own row in the index."""

    tensors: dict[str, torch.Tensor]
    bad: tuple[BadClip, ...] = ()
    row: int = -1


class Batch(NamedTuple):
    """A batch of items. tensors: with a batch axis; bad: clips that its items substitute; rows: of the items."""

    tensors: dict[str, torch.Tensor]
    bad: tuple[BadClip, ...] = ()
    rows: tuple[int, ...] = ()


class ClipOrder:
    """Maps draws of the plan to rows of the index, without a list of clips."""

    def __init__(self, index: ClipIndex, mixture: Mixture):
        self.index, self.mixture = index, mixture

    def rows(self, draw: Draw) -> Iterator[int]:
        """Yield the row of a draw, then its possible substitutes, until all rows of the bucket have been yielded."""
        for clip in self.mixture.next_clips(draw.bucket, draw.position, draw.stride):
            yield self.index.row(draw.bucket, clip)

    def first_good(
        self, draw: Draw, known_bad: set[int], load: Callable[[int], T | BadClip]
    ) -> tuple[T, tuple[BadClip, ...], int]:
        """Load the first good row of a draw, skipping rows in `known_bad`, to which newly found bad rows are added.

        Returns:
            The result of `load`, the newly found bad clips, and the row.

        Raises:
            UserError: the bucket has no good clip left.
        """
        bad: list[BadClip] = []
        for row in self.rows(draw):
            if row in known_bad:
                continue
            loaded = load(row)
            if not isinstance(loaded, BadClip):
                return loaded, tuple(bad), row
            known_bad.add(row)
            bad.append(loaded)
        last = f" (the last is {bad[-1].path}: {bad[-1].reason})" if bad else ""
        raise UserError(
            f"bucket {self.index.buckets[draw.bucket]}: none of its clips can be read{last}. Repair the files or "
            "remove the bucket. If the cache is damaged, run cogds encode --verify."
        )


class ClipDataset(Dataset[Item]):
    """Encoded clips, indexed by draw, read from the cache in a DataLoader worker.

    The tensors of an item are `moments` [2C, F, H, W] (mean and log-variance of the VAE's posterior), `first_frame`
    uint8 [3, H, W] in pixels, and `text_states` [text_tokens, dim].
    """

    def __init__(self, order: ClipOrder, cache: Cache):
        self.order, self.cache, self.known_bad = order, cache, set[int]()

    def __getitem__(self, draw: Draw) -> Item:
        return Item(*self.order.first_good(draw, self.known_bad, self._load))

    def _load(self, row: int) -> dict[str, torch.Tensor] | BadClip:
        clip = self.order.index[row]
        try:
            return read_encoded(self.cache, clip)
        except DamagedEntryError as error:
            return BadClip(row, clip.path, str(error))


def read_encoded(cache: Cache, clip: IndexedClip) -> dict[str, torch.Tensor]:
    """Read the tensors of one clip and its caption. Raises DamagedEntryError."""
    encoded = cache.read("clips", clip.clip_key, clip.clip_place)
    return encoded | cache.read("captions", clip.caption_key, clip.caption_place)


def collate(items: list[Item]) -> Batch:
    """Stack items of one bucket to a batch."""
    bad = tuple(bad for item in items for bad in item.bad)
    return Batch(default_collate([item.tensors for item in items]), bad, tuple(item.row for item in items))


def ignore_stop_signals(_worker: int) -> None:
    """Make a DataLoader worker (`worker_init_fn`) ignore signals that ask the run to stop.

    Schedulers may signal a whole process tree. SIGTERM from the worker's parent still ends it, and it never outlives
    its parent, even while it reads. SIG_IGN alone is not enough, because a parent that ends with an error terminates
    its workers and waits for them without a timeout.
    """
    signal.set_wakeup_fd(-1)
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # inherited by threads started later
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, args=(os.getppid(),), daemon=True, name="exit-with-parent").start()


def _exit_with_parent(starter: int) -> None:
    parent = multiprocessing.parent_process()
    owner = starter if parent is None or parent.pid is None else parent.pid
    # The starter may be a fork server of the owner. Or the owner may have died before os.getppid() was called.
    while os.getppid() == starter and Path(f"/proc/{owner}").exists():
        info = signal.sigtimedwait(STOP_SIGNALS, 1.0)
        if info is not None and info.si_signo == signal.SIGTERM and info.si_pid == owner:
            os._exit(0)
    os._exit(1)
