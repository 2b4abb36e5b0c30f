"""Brings entries of a cache at a URL to this node before they are read.

The plan knows every future batch. Threads of each rank fetch its entries in that order into the local copy
(`data.cache.local_copy`), a bounded number of bytes ahead. Loader processes find them there. An entry that is not there
yet, they read from the URL themselves.
"""

import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple, Self

from cogds.data.cache.store import Cache, DamagedEntryError
from cogds.data.loading.dataset import ClipOrder
from cogds.data.loading.sampler import Draw
from cogds.errors import UserError

NUM_THREADS = 4
MAX_BATCHES_AHEAD = 256  # the bytes are the limit, except for tiny clips


class Entry(NamedTuple):
    """An entry of the cache."""

    kind: str
    key: str
    place: str


def fetch(cache: Cache, order: ClipOrder, batches: Iterable[list[Draw]]) -> None:
    """Fetch the entries of batches, and leave no thread behind."""
    entries = [entry for draws in batches for entry in _entries_of(order, draws)]
    with ThreadPoolExecutor(NUM_THREADS) as threads:
        list(threads.map(partial(_fetch_entry, cache), entries))


def _entries_of(order: ClipOrder, draws: Iterable[Draw]) -> Iterator[Entry]:
    for draw in draws:
        choice = next(order.choices(draw))
        clip = order.index[choice.row]
        caption = clip.captions[choice.caption]
        yield Entry("clips", clip.clip_key, clip.clip_place)
        yield Entry("captions", caption.key, caption.place)


def _fetch_entry(cache: Cache, entry: Entry) -> int:
    """Return the size of the entry in bytes; 0 if it cannot be fetched, which the loader will report."""
    try:
        return cache.fetch(*entry)
    except (DamagedEntryError, UserError):
        return 0


class FetchAhead:
    """A context in which the entries of batches are fetched in order.

    batches: the draws of each batch. max_bytes: how much may be fetched and not yet used.
    """

    def __init__(self, cache: Cache, order: ClipOrder, batches: Iterable[list[Draw]], max_bytes: int):
        self._cache, self._order, self._max_bytes = cache, order, max_bytes
        self._entries = self._numbered_entries(batches)
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

    def _numbered_entries(self, batches: Iterable[list[Draw]]) -> Iterator[tuple[int, Entry]]:
        """Yield each entry with the number of its batch."""
        for number, draws in enumerate(batches):
            self._num_begun = number
            if number < self._num_used:  # the loader was faster
                continue
            for entry in _entries_of(self._order, draws):
                yield number, entry

    def _next_entry(self) -> tuple[int, Entry] | None:
        with self._condition:
            self._condition.wait_for(lambda: self._is_closed or self._has_room())
            return None if self._is_closed else next(self._entries, None)

    def _has_room(self) -> bool:
        num_ahead = self._num_begun - self._num_used
        return self._num_bytes.total() < self._max_bytes and num_ahead < MAX_BATCHES_AHEAD

    def _run(self) -> None:
        try:
            while (numbered := self._next_entry()) is not None:
                number, entry = numbered
                num_bytes = _fetch_entry(self._cache, entry)
                with self._condition:
                    if number >= self._num_used:
                        self._num_bytes[number] += num_bytes
        except BaseException as error:
            self._bug = error
