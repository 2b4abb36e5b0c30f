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

from cogds.core.mixture import Mixture, caption_of_visit
from cogds.data.cache.store import Cache, DamagedEntryError
from cogds.data.loading.index import ClipIndex, IndexedClip
from cogds.data.loading.sampler import Draw
from cogds.data.storage.location import display_name
from cogds.errors import UserError
from cogds.process.signals import STOP_SIGNALS

T = TypeVar("T")


class Choice(NamedTuple):
    """What a draw trains. row: of the clip in the index; caption: number of the caption among the clip's."""

    row: int
    caption: int


class BadClip(NamedTuple):
    """A clip that cannot be read. row: in the index; path: its name in messages (`display_name`); reason: the error.

    caption: number of the caption that cannot be read, None if it is the clip itself.
    """

    row: int
    path: str
    reason: str
    caption: int | None = None


class Item(NamedTuple):
    """A sample. bad: clips that it substitutes."""

    tensors: dict[str, torch.Tensor]
    bad: tuple[BadClip, ...] = ()
    choice: Choice = Choice(-1, 0)


class Batch(NamedTuple):
    """A batch of items. tensors: with a batch axis; bad: clips that its items substitute; choices: of the items."""

    tensors: dict[str, torch.Tensor]
    bad: tuple[BadClip, ...] = ()
    choices: tuple[Choice, ...] = ()


class ClipOrder:
    """Maps draws of the plan to clips and captions of the index, without a list of clips."""

    def __init__(self, index: ClipIndex, mixture: Mixture):
        self.index, self.mixture = index, mixture

    def choices(self, draw: Draw) -> Iterator[Choice]:
        """Yield the choice of a draw, then its possible substitutes, until all rows of the bucket have been yielded."""
        for clip, number in self.mixture.next_visits(draw.bucket, draw.position, draw.stride):
            row = self.index.row(draw.bucket, clip)
            num_captions = self.index.num_captions(row)
            yield Choice(row, caption_of_visit(number, num_captions, self.mixture.seed, row) if num_captions > 1 else 0)

    def first_good(
        self, draw: Draw, known_bad: set[int | Choice], load: Callable[[Choice], T | BadClip]
    ) -> tuple[T, tuple[BadClip, ...], Choice]:
        """Load the first good choice of a draw.

        Args:
            known_bad: rows and choices to skip. Those that are newly found to be bad are added. If only a caption is
                bad, so is only the choice, so that what is skipped does not depend on what this process drew before.

        Returns:
            The result of `load`, the newly found bad clips, and the choice.

        Raises:
            UserError: the bucket has no good clip left.
        """
        bad: list[BadClip] = []
        for choice in self.choices(draw):
            if choice.row in known_bad or choice in known_bad:
                continue
            loaded = load(choice)
            if not isinstance(loaded, BadClip):
                return loaded, tuple(bad), choice
            known_bad.add(choice.row if loaded.caption is None else choice)
            bad.append(loaded)
        last = f" (the last is {bad[-1].path}: {bad[-1].reason})" if bad else ""
        raise UserError(
            f"bucket {self.index.buckets[draw.bucket]}: none of its clips can be read{last}. Repair the files or "
            "remove the bucket. If the cache is damaged, run cogds encode --verify."
        )


class ClipDataset(Dataset[Item]):
    """Encoded clips, indexed by draw, read from the cache in a DataLoader worker.

    The tensors of an item are `moments` [2C, F, H, W] (mean and log-variance of the VAE's posterior), `first_frame`
    uint8 [3, H, W] in pixels, and `text_states` [text_tokens, dim]. Some condition modes need more frames,
    `condition_frames` uint8 [K, 3, H, W]. A control video has `control_moments`, as `moments`.
    """

    def __init__(self, order: ClipOrder, cache: Cache):
        self.order, self.cache, self.known_bad = order, cache, set[int | Choice]()

    def __getitem__(self, draw: Draw) -> Item:
        return Item(*self.order.first_good(draw, self.known_bad, self._load))

    def _load(self, choice: Choice) -> dict[str, torch.Tensor] | BadClip:
        clip, caption = self.order.index[choice.row], None
        try:
            encoded = _read_clip(self.cache, clip)
            caption = choice.caption
            return encoded | _read_caption(self.cache, clip, caption)
        except DamagedEntryError as error:
            return BadClip(choice.row, display_name(clip.path), str(error), caption)


def read_encoded(cache: Cache, clip: IndexedClip) -> dict[str, torch.Tensor]:
    """Read the tensors of one clip and its first caption. Raises DamagedEntryError."""
    return _read_clip(cache, clip) | _read_caption(cache, clip, 0)


def _read_clip(cache: Cache, clip: IndexedClip) -> dict[str, torch.Tensor]:
    return cache.read("clips", clip.clip_key, clip.clip_place)


def _read_caption(cache: Cache, clip: IndexedClip, number: int) -> dict[str, torch.Tensor]:
    caption = clip.captions[number]
    return cache.read("captions", caption.key, caption.place)


def collate(items: list[Item]) -> Batch:
    """Stack items of one bucket to a batch."""
    bad = tuple(bad for item in items for bad in item.bad)
    return Batch(default_collate([item.tensors for item in items]), bad, tuple(item.choice for item in items))


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
