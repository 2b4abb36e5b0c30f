import os
import pickle
import random
import subprocess
import threading

import pyarrow as pa
import pytest
import torch

from cogds.data.cache import store as store_module
from cogds.data.cache.maintenance import prune, stats, verify
from cogds.data.cache.shard import list_shard
from cogds.data.cache.store import Cache, DamagedEntryError, key_array
from cogds.errors import UserError
from cogds.files import process_tag
from tests.data.entries import entry, fail, files_in, flip, key_of, read, same, stage, write


def test_entries_are_read_back_from_one_file(tmp_path):
    write(tmp_path, range(20))
    snapshot = Cache(tmp_path).snapshot("clips")
    assert len(files_in(tmp_path)) == len(snapshot.places) == 1
    assert snapshot.num_entries == 20
    assert all(same(read(tmp_path, number), entry(number)) for number in range(20))
    assert Cache(tmp_path).snapshot("captions").num_entries == 0


# --- snapshots


def test_find_looks_up_many_keys(tmp_path):
    write(tmp_path, range(0, 50))
    write(tmp_path, range(50, 90))
    snapshot = Cache(tmp_path).snapshot("clips")
    numbers = snapshot.find(key_array(key_of(number) for number in range(100)))
    assert numbers.dtype == "int32"
    assert (numbers[90:] == -1).all()
    assert len(set(numbers[:50])) == len(set(numbers[50:90])) == 1
    assert numbers[0] != numbers[50]
    assert snapshot.places[numbers[60]] == snapshot.place(key_of(60))
    assert snapshot.place(key_of(95)) is None


def test_find_with_an_empty_cache_no_keys_and_null_keys(tmp_path):
    empty = Cache(tmp_path / "none").snapshot("clips")
    assert empty.find(key_array([key_of(1)])).tolist() == [-1]
    write(tmp_path, [1])
    snapshot = Cache(tmp_path).snapshot("clips")
    assert snapshot.find(key_array([])).tolist() == []
    assert snapshot.find(pa.array([None, bytes.fromhex(key_of(1))], pa.binary(16))).tolist() == [-1, 0]
    assert not (tmp_path / "none").exists()


def test_a_snapshot_can_be_sent_to_another_process(tmp_path):
    write(tmp_path, range(3))
    snapshot = pickle.loads(pickle.dumps(Cache(tmp_path).snapshot("clips")))
    cache = pickle.loads(pickle.dumps(Cache(tmp_path)))
    assert same(cache.read("clips", key_of(1), snapshot.place(key_of(1))), entry(1))


@pytest.mark.parametrize("reason", ["no frames", 'line\n"quote" Übung', "a byte that is not text: \udcff"])
def test_failures_are_kept_with_their_reasons(tmp_path, reason):
    with Cache(tmp_path).writer("clips") as writer:
        writer.write(key_of(1), entry(1))
        writer.fail(key_of(2), reason)
    snapshot = Cache(tmp_path).snapshot("clips")
    assert snapshot.failures == {key_of(2): reason}
    assert snapshot.place(key_of(2)) is None
    assert snapshot.num_entries == 1
    assert verify(tmp_path).num_failures == 1


def test_an_entry_supersedes_the_record_of_its_failure(tmp_path):
    fail(tmp_path, 1, "a disk was away")
    write(tmp_path, [1])
    snapshot = Cache(tmp_path).snapshot("clips")
    assert snapshot.failures == {}
    assert same(read(tmp_path, 1, snapshot=snapshot), entry(1))


def test_two_writers_may_write_the_same_key(tmp_path):
    cache = Cache(tmp_path)
    with cache.writer("clips") as first, cache.writer("clips") as second:
        for writer in (first, second):
            for number in range(3):
                writer.write(key_of(number), entry(number))
    snapshot = cache.snapshot("clips")
    assert (snapshot.num_entries, len(snapshot.keys), len(snapshot.places)) == (3, 6, 2)
    assert stats(tmp_path)["clips"]["duplicates"] == 3
    assert all(same(read(tmp_path, number), entry(number)) for number in range(3))


# --- shards that are replaced


def test_one_new_snapshot_finds_the_entries_of_removed_shards(tmp_path, monkeypatch):
    cache = Cache(tmp_path)
    for number in range(4):
        write(tmp_path, [number])
    snapshot = cache.snapshot("clips")
    prune(tmp_path)
    snapshots, take_snapshot = [], Cache.snapshot
    monkeypatch.setattr(Cache, "snapshot", lambda self, kind: snapshots.append(kind) or take_snapshot(self, kind))
    for number in range(4):
        assert same(cache.read("clips", key_of(number), snapshot.place(key_of(number))), entry(number))
    assert snapshots == ["clips"]


def test_an_entry_is_found_after_its_shard_is_replaced_twice(tmp_path):
    cache = Cache(tmp_path)
    write(tmp_path, range(4))
    first = cache.snapshot("clips")
    prune(tmp_path, {"clips": {key_of(0), key_of(1), key_of(2)}})
    other = Cache(tmp_path)
    other._newer["clips"] = other.snapshot("clips")
    prune(tmp_path, {"clips": {key_of(0), key_of(1)}})
    assert same(other.read("clips", key_of(1), first.place(key_of(1))), entry(1))


def test_the_error_names_a_missing_entry(tmp_path):
    write(tmp_path, range(2))
    cache = Cache(tmp_path)
    place = cache.snapshot("clips").place(key_of(1))
    prune(tmp_path, {"clips": {key_of(0)}})
    with pytest.raises(DamagedEntryError, match=f"{place}.*{key_of(1)}"):
        cache.read("clips", key_of(1), place)


def test_readers_continue_while_shards_are_written_and_replaced(tmp_path):
    cache = Cache(tmp_path)
    write(tmp_path, range(5))
    places = {number: cache.snapshot("clips").place(key_of(number)) for number in range(5)}
    done, errors, num_read = threading.Event(), [], [0, 0, 0]

    def keep_reading(reader):
        own_cache, generator = Cache(tmp_path), random.Random(reader)
        while not done.is_set() or num_read[reader] < 20:
            number, place = generator.choice(list(places.items()))
            try:
                if not same(own_cache.read("clips", key_of(number), place), entry(number)):
                    errors.append(f"wrong tensors for {number}")
            except Exception as error:
                errors.append(repr(error))
            written = key_array(map(key_of, list(places)))  # before the snapshot is made
            if (own_cache.snapshot("clips").find(written) < 0).any():
                errors.append("a snapshot misses entries")
            num_read[reader] += 1

    threads = [threading.Thread(target=keep_reading, args=(reader,)) for reader in range(3)]
    for thread in threads:
        thread.start()
    try:
        for number in range(5, 45):
            write(tmp_path, [number])
            places = {**places, number: cache.snapshot("clips").place(key_of(number))}
            if number % 10 == 0:  # make duplicates, which pruning removes as it merges small shards
                write(tmp_path, range(number - 3, number))
                prune(tmp_path)
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert errors == []
    assert min(num_read) >= 20


def test_a_snapshot_misses_no_entry_while_shards_are_replaced(tmp_path, monkeypatch):
    write(tmp_path, range(3))
    write(tmp_path, range(2, 4))  # with a duplicate
    stage(tmp_path / "old", [4])
    (tmp_path / "old/clips" / f"staging-{'ab' * 16}").rename(tmp_path / "clips" / f"staging-{'ab' * 16}")
    pruned = []

    def prune_first(path):
        if not pruned:
            pruned.append(prune(tmp_path))
        return list_shard(path)

    monkeypatch.setattr(store_module, "_NUM_THREADS", 1)
    monkeypatch.setattr(store_module, "list_shard", prune_first)
    snapshot = Cache(tmp_path).snapshot("clips")
    assert pruned
    assert snapshot.num_entries == 5
    assert snapshot.damaged == {}
    assert all((tmp_path / "clips" / place).exists() for place in snapshot.places)


def test_a_forked_worker_opens_its_own_files(tmp_path):
    write(tmp_path, range(3))
    assert same(read(tmp_path, 1), entry(1))
    path = tmp_path / "clips" / Cache(tmp_path).snapshot("clips").places[0]
    handle = store_module._open_cached(path, os.getpid())
    assert store_module._open_cached(path, os.getpid()) is handle
    assert store_module._open_cached(path, os.getpid() + 1) is not handle


# --- errors of the file system


def test_a_file_in_the_place_of_a_folder_is_an_error(tmp_path):
    for name in ("cache", "clips", "file"):
        (tmp_path / name).write_text("")
    for function in (Cache, verify, prune, stats):
        with pytest.raises(UserError, match=r"^data\.cache_dir: .*/cache"):
            function(tmp_path / "cache")
    with pytest.raises(UserError, match=r"^data\.cache_dir: .*/clips"):
        Cache(tmp_path).snapshot("clips")
    with pytest.raises(UserError, match=r"^data\.cache_dir: .*/clips"):
        write(tmp_path, [1])
    with pytest.raises(UserError, match=r"^data\.cache_dir: .*/file/cache"):
        write(tmp_path / "file" / "cache", [1])


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, timeout=20).returncode:
        pytest.skip("needs root, to mount a small file system")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True, timeout=20)


def write_bytes(root, numbers, num_bytes, shard_bytes):
    with Cache(root).writer("clips", shard_bytes) as writer:
        for number in numbers:
            writer.write(key_of(number), {"x": torch.full((num_bytes,), number, dtype=torch.uint8)})


def test_a_full_disk_is_reported_and_damages_nothing(small_disk):
    with pytest.raises(UserError, match=r"^data\.cache_dir: .* writing 1\.5 MB into .*clips"):
        write_bytes(small_disk, range(10), 500_000, shard_bytes=1_500_000)
    assert not [path for path in files_in(small_disk) if "tmp" in path.name]
    cache = Cache(small_disk)
    snapshot = cache.snapshot("clips")
    assert snapshot.num_entries == 6
    for number in range(6):
        assert (cache.read("clips", key_of(number), snapshot.place(key_of(number)))["x"] == number).all()
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True, timeout=20)
    write_bytes(small_disk, range(6, 10), 500_000, shard_bytes=1_500_000)
    assert verify(small_disk).num_entries == 10


def test_a_read_only_cache_can_be_read_but_not_written(small_disk):
    write(small_disk, range(3))
    stage(small_disk, [7], kind="captions")
    write(small_disk, [9], kind="images")
    (image,) = files_in(small_disk / "images")
    flip(image, image.stat().st_size - 1)
    (small_disk / "clips" / f"a.{process_tag().split('@')[0]}@999999999-0.tmp").touch()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True, timeout=20)
    assert same(read(small_disk, 1), entry(1))
    with pytest.raises(UserError, match=r"^data\.cache_dir: .*/clips \(Read-only file system\)"):
        write(small_disk, [4])
    with pytest.raises(UserError, match=r"^data\.cache_dir: .*/clips \(Read-only file system\)"):
        Cache(small_disk).remove_abandoned("clips")
    with pytest.raises(UserError, match=r"^data\.cache_dir: .*/images \(Read-only file system\)"):
        verify(small_disk)
    with pytest.raises(UserError, match=r"^data\.cache_dir: .*/c(aption|lip)s \(Read-only file system\)"):
        prune(small_disk)
    assert stats(small_disk)["captions"]["entries"] == 1
