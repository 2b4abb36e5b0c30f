"""A cache at a URL: the same entries as in a folder, also while its server fails."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from cogds.data.cache.local_copy import LocalCopy
from cogds.data.cache.maintenance import PruneReport, prune, stats, verify
from cogds.data.cache.store import Cache, DamagedEntryError, key_array
from cogds.data.storage import access
from cogds.data.storage.access import list_folder, read_bytes, write_bytes
from cogds.errors import UserError
from tests.data.entries import entry, fail, files_in, key_of, read, same, write

pytestmark = pytest.mark.usefixtures("short_delays")


@pytest.fixture
def root(s3):
    """The URL of an empty cache."""
    return f"{s3.new_bucket()}/folder/cache"


def shard_urls(root, kind="clips"):
    return [f"{root}/{kind}/{item.name}" for item in list_folder(f"{root}/{kind}")]


def change_shard(root, change):
    """Replace the only shard by what `change` makes of its bytes."""
    (url,) = shard_urls(root)
    write_bytes(url, change(read_bytes(url)))


def test_entries_are_written_and_read(root):
    assert Cache(root).snapshot("clips").num_entries == 0
    write(root, range(5))
    write(root, range(5, 8), shard_bytes=400)
    fail(root, 9)
    snapshot = Cache(root).snapshot("clips")
    assert snapshot.num_entries == 8
    assert snapshot.failures == {key_of(9): "no frames"}
    assert (snapshot.find(key_array([key_of(3), key_of(10)])) >= 0).tolist() == [True, False]
    assert all(same(read(root, number, snapshot=snapshot), entry(number)) for number in range(8))


def test_an_entry_is_read_by_its_byte_range(root, monkeypatch):
    write(root, range(50), shard_bytes=1 << 30)
    snapshot = Cache(root).snapshot("clips")
    monkeypatch.setattr("cogds.data.cache.shard.FIRST_BYTES", 100)  # the header is longer
    sizes, read_range = [], access.read_range

    def spy(url, start, size):
        sizes.append(size)
        return read_range(url, start, size)

    monkeypatch.setattr("cogds.data.cache.shard.read_range", spy)
    cache = Cache(root)
    for number in (30, 31):
        key = key_of(number)
        assert same(cache.read("clips", key, snapshot.place(key)), entry(number))
    assert sorted(sizes)[:-1] == [15, 15, 100, 256, 256]  # the last is the header, which is read once


def test_a_damaged_entry_is_reported_and_removed(root):
    write(root, range(3))
    change_shard(root, lambda data: data[:-1] + bytes([data[-1] ^ 1]))
    snapshot = Cache(root).snapshot("clips")
    damaged = [number for number in range(3) if not is_readable(root, number, snapshot)]
    assert len(damaged) == 1
    report = verify(root)
    assert [found.key for found in report.damaged] == [key_of(damaged[0])]
    assert Cache(root).snapshot("clips").num_entries == 2
    assert verify(root).damaged == ()


def is_readable(root, number, snapshot):
    try:
        return same(read(root, number, snapshot=snapshot), entry(number))
    except DamagedEntryError:
        return False


@pytest.mark.parametrize("size", [0, 4, 200, -1])
def test_a_shard_that_is_cut_short_counts_as_missing(root, size):
    write(root, range(3))
    change_shard(root, lambda data: data[:size])
    snapshot = Cache(root).snapshot("clips")
    assert snapshot.num_entries == 0
    assert len(snapshot.damaged) == 1
    assert len(verify(root).damaged) == 1
    with pytest.raises(FileNotFoundError):
        shard_urls(root)


def test_prune_and_stats(root):
    for number in range(4):
        write(root, [number, 0])
    assert stats(root)["clips"] | {"bytes": 0} == {
        "entries": 4, "bytes": 0, "shards": 4, "failures": 0, "duplicates": 3, "damaged": 0, "old": 0,
    }  # fmt: skip
    report = prune(root, {"clips": [key_of(0), key_of(2)]})
    assert (report.num_entries, report.num_failures) == (5, 0)
    assert len(shard_urls(root)) == 1
    assert [is_readable(root, number, Cache(root).snapshot("clips")) for number in (0, 2)] == [True, True]
    assert prune(root) == PruneReport()


def test_an_entry_whose_shard_was_merged_is_found(root):
    write(root, [0])
    write(root, [1])
    cache, snapshot = Cache(root), Cache(root).snapshot("clips")
    prune(root)
    assert same(cache.read("clips", key_of(0), snapshot.place(key_of(0))), entry(0))
    prune(root, {"clips": [key_of(1)]})
    with pytest.raises(DamagedEntryError, match="is gone"):
        Cache(root).read("clips", key_of(0), snapshot.place(key_of(0)))


@pytest.mark.parametrize("fault", [{"status": 503}, {"cut_after": 300}], ids=str)
def test_faults_of_the_server_are_retried(root, s3, fault):
    s3.proxy.fail(2, **fault)
    write(root, range(3))
    s3.proxy.fail(2, **fault)
    snapshot = Cache(root).snapshot("clips")
    for number in range(3):
        s3.proxy.fail(2, **fault)
        assert same(read(root, number, snapshot=snapshot), entry(number))
    assert len(shard_urls(root)) == 1


def test_a_server_that_restarts(root, s3):
    write(root, range(3))
    snapshot = Cache(root).snapshot("clips")
    s3.proxy.stop()
    timer = threading.Timer(0.2, s3.proxy.start)
    timer.start()
    assert same(read(root, 1, snapshot=snapshot), entry(1))
    timer.join()


@pytest.mark.usefixtures("gives_up")
@pytest.mark.slow
def test_a_server_that_stays_away_is_no_damage(root, s3):
    """No clip is replaced by another, and `verify` removes nothing."""
    write(root, range(3))
    cache, snapshot = Cache(root), Cache(root).snapshot("clips")
    cache.read("clips", key_of(0), snapshot.place(key_of(0)))
    s3.proxy.stop()
    try:
        for work in (
            lambda: cache.read("clips", key_of(1), snapshot.place(key_of(1))),
            lambda: Cache(root).snapshot("clips"),
            lambda: verify(root),
            lambda: write(root, [4]),
            lambda: Cache(root).check_writable(),
        ):
            with pytest.raises(UserError, match=r"^data\.cache_dir: .*attempts in \d s\)"):
                work()
    finally:
        s3.proxy.start()
    assert Cache(root).snapshot("clips").num_entries == 3


def test_a_missing_bucket_and_a_denied_one(s3):
    with pytest.raises(UserError, match=r"^data\.cache_dir: .*s3://no-such-bucket"):
        Cache("s3://no-such-bucket/cache").check_writable()
    root = s3.new_bucket()
    s3.proxy.fail(10**6, status=403)
    with pytest.raises(UserError, match=r"^data\.cache_dir: "):
        Cache(root).check_writable()
    with pytest.raises(UserError, match=r"^data\.cache_dir: "):
        Cache(root).snapshot("clips")
    s3.proxy.reset()
    Cache(root).check_writable()
    with pytest.raises(FileNotFoundError):
        list_folder(f"{root}/cache")


def test_http_is_refused():
    with pytest.raises(UserError, match=r"^data\.cache_dir: https://host/cache cannot be written to"):
        Cache("https://host/cache")


@pytest.mark.usefixtures("gives_up")
def test_temporary_files_are_removed(root, s3, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    write(root, [1])
    s3.proxy.stop()
    with pytest.raises(UserError):
        write(root, [2])
    s3.proxy.start()
    assert files_in(tmp_path) == []


# --- the copy on the node


@pytest.fixture
def copied(root, tmp_path):
    """A cache of 20 entries with a local copy, its snapshot, and the folder of the copy."""
    write(root, range(20))
    return Cache(root, LocalCopy(tmp_path / "copy", 10**6)), Cache(root).snapshot("clips"), tmp_path / "copy"


def test_entries_are_read_from_the_copy(copied, s3):
    cache, snapshot, folder = copied
    for number in range(20):
        assert same(cache.read("clips", key_of(number), snapshot.place(key_of(number))), entry(number))
    assert len(list((folder / "clips").iterdir())) == 20
    s3.proxy.stop()
    for number in range(20):
        assert same(cache.read("clips", key_of(number), snapshot.place(key_of(number))), entry(number))
    s3.proxy.start()


def test_a_damaged_copy_is_read_again(copied):
    cache, snapshot, folder = copied
    key = key_of(1)
    size = cache.fetch("clips", key, snapshot.place(key))
    path = folder / "clips" / f"{key}.safetensors"
    assert 0 < size <= path.stat().st_size
    whole = path.read_bytes()
    for damaged in (b"", whole[:50], whole[:-1] + bytes([whole[-1] ^ 1]), b"{" * 100):
        path.write_bytes(damaged)
        assert same(cache.read("clips", key, snapshot.place(key)), entry(1))
        assert path.read_bytes() == whole


def test_a_copy_that_cannot_be_written(copied, tmp_path):
    _, snapshot, _ = copied
    (tmp_path / "file").touch()
    cache = Cache(f"{copied[0].root}", LocalCopy(tmp_path / "file", 10**6))
    for number in range(3):
        assert same(cache.read("clips", key_of(number), snapshot.place(key_of(number))), entry(number))


def test_the_least_recently_used_entries_are_removed(tmp_path):
    tensors = {"moments": torch.zeros(1000, dtype=torch.uint8)}
    copy = LocalCopy(tmp_path, 20_000)
    for number in range(30):
        copy.write("clips", key_of(number), tensors)
        time.sleep(0.002)
        assert copy.read("clips", key_of(0)) is not None  # used all the time
        assert sum(path.stat().st_size for path in files_in(tmp_path)) <= 20_000
    kept = [number for number in range(30) if copy.touch("clips", key_of(number))]
    assert kept == [0, *range(kept[1], 30)]
    assert 10 < len(kept) < 20


def test_ranks_share_the_copy(tmp_path):
    """Entries that are removed, written and read at the same time are whole."""

    def work(seed):
        copy = LocalCopy(tmp_path, 6_000)
        for step in range(60):
            number = (step * 7 + seed) % 12
            tensors = copy.read("clips", key_of(number))
            if tensors is None:
                copy.write("clips", key_of(number), entry(number))
            else:
                assert same(tensors, entry(number))
        return copy._is_usable

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(work, range(4)))
    assert all(path.suffix == ".safetensors" or path.name == "lock" for path in files_in(tmp_path))
