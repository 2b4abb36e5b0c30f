"""Brings entries of a cache at a URL to this node before they are read.

The plan knows every future batch. Threads of each rank fetch its entries in that order into the local copy
(`data.cache.local_copy`), a bounded number of bytes ahead. Loader processes find them there. An entry that is not there
yet, they read from the URL themselves.
"""

import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Self

from cogds.data.cache.store import Cache, DamagedEntryError
from cogds.data.loading.dataset import ClipOrder
from cogds.data.loading.sampler import Draw
from cogds.errors import UserError

NUM_THREADS = 4
MAX_BATCHES_AHEAD = 256  # the bytes are the limit, except for tiny clips


class FetchAhead:
    """A context in which the entries of batches are fetched in order.

    batches: the draws of each batch. max_bytes: how much may be fetched and not yet used.
    """

    def __init__(self, cache: Cache, order: ClipOrder, batches: Iterable[list[Draw]], max_bytes: int):
        self._cache, self._order, self._max_bytes = cache, order, max_bytes
        self._entries = self._entries_of(batches)
        self._condition = threading.Condition()
        self._num_begun = self._num_used = 0
        self._num_bytes: Counter[int] = Counter()  # by number of a batch that is not used yet
        self._is_closed = False
        self._bug: BaseException | None = None

    def __enter__(self) -> Self:
        for number in range(NUM_THREADS):
            threading.Thread(target=self._run, name=f"cogds-fetch-{number}", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._condition:
            self._is_closed = True
            self._condition.notify_all()

    def mark_used(self) -> None:
        """Tell that the next batch has been loaded."""
        with self._condition:
            self._num_bytes.pop(self._num_used, None)
            self._num_used += 1
            self._condition.notify_all()
        if self._bug is not None:
            raise self._bug

    def _entries_of(self, batches: Iterable[list[Draw]]) -> Iterator[tuple[int, str, str, str]]:
        """Yield number of the batch, kind, key and place."""
        for number, draws in enumerate(batches):
            self._num_begun = number
            if number < self._num_used:  # the loader was faster
                continue
            for draw in draws:
                choice = next(self._order.choices(draw))
                clip = self._order.index[choice.row]
                caption = clip.captions[choice.caption]
                yield number, "clips", clip.clip_key, clip.clip_place
                yield number, "captions", caption.key, caption.place

    def _next_entry(self) -> tuple[int, str, str, str] | None:
        with self._condition:
            self._condition.wait_for(lambda: self._is_closed or self._has_room())
            return None if self._is_closed else next(self._entries, None)

    def _has_room(self) -> bool:
        num_ahead = self._num_begun - self._num_used
        return self._num_bytes.total() < self._max_bytes and num_ahead < MAX_BATCHES_AHEAD

    def _run(self) -> None:
        try:
            while (entry := self._next_entry()) is not None:
                number, *names = entry
                with suppress(DamagedEntryError, UserError):  # the loader finds the same, or that it has been repaired
                    num_bytes = self._cache.fetch(*names)
                    with self._condition:
                        if number >= self._num_used:
                            self._num_bytes[number] += num_bytes
        except BaseException as error:
            self._bug = error
