"""Entries are fetched in the order of the plan, ahead of their use, and no further than allowed."""

import threading
import time
from types import SimpleNamespace

import pytest

from cogds.data.cache.store import DamagedEntryError
from cogds.data.loading.dataset import Choice
from cogds.data.loading.fetch_ahead import FetchAhead, fetch
from cogds.data.loading.sampler import Draw
from cogds.errors import UserError

ORDER = SimpleNamespace(
    choices=lambda draw: iter([Choice(draw.position, 1)]),
    index=[
        SimpleNamespace(clip_key=f"{n}", clip_place="a", captions=[None, SimpleNamespace(key=f"{n}", place="b")])
        for n in range(1000)
    ],
)
BATCHES = [[Draw(0, 2 * number, 1), Draw(0, 2 * number + 1, 1)] for number in range(500)]


class FakeCache:
    """Records what is fetched. Each clip has 100 bytes, each caption 1."""

    def __init__(self, error=None):
        self.fetched, self.error, self.lock = [], error, threading.Lock()

    def fetch(self, kind, key, place):
        with self.lock:
            self.fetched.append((kind, int(key), place))
        if self.error:
            raise self.error
        return 100 if kind == "clips" else 1

    def wait(self, num):
        """Wait until `num` entries are fetched, and a moment longer. Returns them in order."""
        deadline = time.monotonic() + 5
        while len(self.fetched) < num and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.05)
        return sorted(self.fetched, key=lambda entry: (entry[1], entry[0]))


def entries(numbers):
    return [entry for number in numbers for entry in (("captions", number, "b"), ("clips", number, "a"))]


def num_bytes(fetched):
    return sum(100 if kind == "clips" else 1 for kind, *_ in fetched)


def test_fetches_a_bounded_number_of_bytes_ahead():
    cache = FakeCache()
    with FetchAhead(cache, ORDER, BATCHES, max_bytes=2000) as fetched:
        first = cache.wait(39)
        assert set(first) <= set(entries(range(22)))
        assert 2000 <= num_bytes(first) < 2000 + 4 * 101
        for _ in range(10):
            fetched.mark_used()
        more = cache.wait(79)
        assert set(first) < set(more) <= set(entries(range(42)))
        assert 4000 <= num_bytes(more) < 4000 + 5 * 101
    closed = len(cache.fetched)
    fetched.mark_used()
    assert len(cache.wait(0)) <= closed + 1


def test_fetches_the_first_batches():
    cache, before = FakeCache(), threading.active_count()
    fetch(cache, ORDER, BATCHES[:3])
    assert cache.wait(0) == entries(range(6))
    assert threading.active_count() == before
    fetch(FakeCache(UserError("data.cache_dir: the server is down")), ORDER, BATCHES[:3])


def test_tiny_entries_are_bounded_by_batches():
    cache = FakeCache()
    with FetchAhead(cache, ORDER, BATCHES, max_bytes=10**9):
        assert len(cache.wait(1024)) <= 4 * 258


def test_batches_that_the_loader_has_read_already_are_skipped():
    cache = FakeCache()
    fetched = FetchAhead(cache, ORDER, BATCHES[:10], max_bytes=10**9)
    for _ in range(8):
        fetched.mark_used()
    with fetched:
        assert cache.wait(8) == entries(range(16, 20))


@pytest.mark.parametrize("error", [UserError("data.cache_dir: the server is down"), DamagedEntryError("damaged")])
def test_what_cannot_be_fetched_is_left_to_the_loader(error):
    cache = FakeCache(error)
    with FetchAhead(cache, ORDER, BATCHES[:3], max_bytes=1000) as fetched:
        assert len(cache.wait(12)) == 12
        fetched.mark_used()


def test_a_bug_ends_the_run():
    cache = FakeCache(TypeError("a bug"))
    with FetchAhead(cache, ORDER, BATCHES[:3], max_bytes=1000) as fetched:
        cache.wait(1)
        with pytest.raises(TypeError, match="a bug"):
            fetched.mark_used()
