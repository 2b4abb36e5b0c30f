import os
import pickle
import random
import subprocess
import threading

import pyarrow as pa
import pytest
import torch

from cogds.data.cache import store as cache_module
from cogds.data.cache.maintenance import prune, stats, verify
from cogds.data.cache.shard import list_shard
from cogds.data.cache.staging import adopt
from cogds.data.cache.store import Cache, DamagedEntry, key_array
from cogds.errors import UserError
from tests.data.entries import entry, files_in, key_of, left_by_the_dead, read, same, write

# --- what is written is read


def test_what_is_written_is_read_from_few_files(tmp_path):
    write(tmp_path, range(20))
    snapshot = Cache(tmp_path).snapshot("clips")
    assert len(files_in(tmp_path)) == len(snapshot.places) == 1
    assert snapshot.num_entries == 20
    assert all(same(read(tmp_path, number), entry(number)) for number in range(20))
    assert Cache(tmp_path).snapshot("captions").num_entries == 0


@pytest.mark.parametrize("key", ["ab12", "G" * 32, "A" * 32, "../" + "0" * 29])
def test_a_key_has_32_hex_digits(tmp_path, key):
    with Cache(tmp_path).writer("clips") as writer, pytest.raises(ValueError, match="32 hex digits"):
        writer.write(key, entry(0))
    assert files_in(tmp_path) == []


def test_shards_are_bounded_in_bytes_and_entries(tmp_path, monkeypatch):
    num_bytes = sum(tensor.nbytes for tensor in entry(0).values())
    write(tmp_path / "bytes", range(10), shard_bytes=3 * num_bytes)
    monkeypatch.setattr(cache_module, "SHARD_ENTRIES", 4)
    write(tmp_path / "entries", range(10))
    for name, expected in [("bytes", [1, 3, 3, 3]), ("entries", [2, 4, 4])]:
        snapshot = Cache(tmp_path / name).snapshot("clips")
        assert sorted(snapshot.numbers.tolist().count(one) for one in range(len(snapshot.places))) == expected
        assert all(same(read(tmp_path / name, number), entry(number)) for number in range(10))


# --- which keys are there


def test_find_answers_for_many_keys_at_once(tmp_path):
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


def test_find_in_an_empty_cache_and_with_no_keys_and_null_keys(tmp_path):
    empty = Cache(tmp_path / "none").snapshot("clips")
    assert empty.find(key_array([key_of(1)])).tolist() == [-1]
    write(tmp_path, [1])
    snapshot = Cache(tmp_path).snapshot("clips")
    assert snapshot.find(key_array([])).tolist() == []
    one = bytes.fromhex(key_of(1))
    assert snapshot.find(pa.array([None, one], pa.binary(16))).tolist() == [-1, 0]
    assert not (tmp_path / "none").exists()


def test_a_snapshot_can_be_sent_to_another_process(tmp_path):
    write(tmp_path, range(3))
    snapshot = pickle.loads(pickle.dumps(Cache(tmp_path).snapshot("clips")))
    cache = pickle.loads(pickle.dumps(Cache(tmp_path)))
    assert same(cache.read("clips", key_of(1), snapshot.place(key_of(1))), entry(1))


@pytest.mark.parametrize("reason", ["no frames", 'line\n"quote" Übung', "bytes \udcff of no text"])
def test_a_failure_is_kept_with_its_reason(tmp_path, reason):
    with Cache(tmp_path).writer("clips") as writer:
        writer.write(key_of(1), entry(1))
        writer.fail(key_of(2), reason)
        assert Cache(tmp_path).snapshot("clips").failures == {key_of(2): reason}  # staged
    snapshot = Cache(tmp_path).snapshot("clips")
    assert snapshot.failures == {key_of(2): reason}
    assert snapshot.place(key_of(2)) is None
    assert snapshot.num_entries == 1
    assert verify(tmp_path).num_failures == 1


def test_what_failed_once_and_was_made_elsewhere_is_there(tmp_path):
    with Cache(tmp_path).writer("clips") as writer:
        writer.fail(key_of(1), "a disk was away")
    write(tmp_path, [1])
    snapshot = Cache(tmp_path).snapshot("clips")
    assert snapshot.failures == {}
    assert same(read(tmp_path, 1, snapshot=snapshot), entry(1))


def test_two_writers_may_write_the_same_key(tmp_path):
    cache = Cache(tmp_path)
    with cache.writer("clips") as one, cache.writer("clips") as other:
        for writer in (one, other):
            for number in range(3):
                writer.write(key_of(number), entry(number))
    snapshot = cache.snapshot("clips")
    assert (snapshot.num_entries, len(snapshot.keys), len(snapshot.places)) == (3, 6, 2)
    assert stats(tmp_path)["clips"]["duplicates"] == 3
    assert all(same(read(tmp_path, number), entry(number)) for number in range(3))


# --- places that move


def test_an_entry_is_found_again_when_its_place_is_gone(tmp_path, monkeypatch):
    cache = Cache(tmp_path)
    with cache.writer("clips") as writer:
        for number in range(4):
            writer.write(key_of(number), entry(number))
        snapshot = cache.snapshot("clips")
    looked = []
    look = Cache.snapshot
    monkeypatch.setattr(Cache, "snapshot", lambda self, kind: looked.append(kind) or look(self, kind))
    for number in range(4):
        assert snapshot.place(key_of(number)).startswith("staging-")
        assert same(cache.read("clips", key_of(number), snapshot.place(key_of(number))), entry(number))
    assert looked == ["clips"]  # once for all four


def test_a_place_may_move_twice(tmp_path):
    cache = Cache(tmp_path)
    write(tmp_path, range(4))
    first = cache.snapshot("clips")
    prune(tmp_path, {"clips": {key_of(0), key_of(1), key_of(2)}})
    other = Cache(tmp_path)
    other._newer["clips"] = other.snapshot("clips")
    prune(tmp_path, {"clips": {key_of(0), key_of(1)}})
    assert same(other.read("clips", key_of(1), first.place(key_of(1))), entry(1))


def test_an_entry_that_is_gone_is_named(tmp_path):
    write(tmp_path, range(2))
    cache = Cache(tmp_path)
    place = cache.snapshot("clips").place(key_of(1))
    prune(tmp_path, {"clips": {key_of(0)}})
    with pytest.raises(DamagedEntry, match=f"{key_of(1)} of clips is gone.*encoded anew"):
        cache.read("clips", key_of(1), place)


def test_readers_go_on_while_entries_are_packed_and_rewritten(tmp_path):
    cache = Cache(tmp_path)
    write(tmp_path, range(5))
    places = {number: cache.snapshot("clips").place(key_of(number)) for number in range(5)}
    done, errors, num_read = threading.Event(), [], [0, 0, 0]

    def keep_reading(who):
        own, generator = Cache(tmp_path), random.Random(who)
        while not done.is_set() or num_read[who] < 20:
            number, place = generator.choice(list(places.items()))
            try:
                if not same(own.read("clips", key_of(number), place), entry(number)):
                    errors.append(f"{number} is another")
            except Exception as error:
                errors.append(repr(error))
            wanted = key_array(key_of(number) for number in list(places))
            if (own.snapshot("clips").find(wanted) < 0).any():
                errors.append("a snapshot misses entries")
            num_read[who] += 1

    threads = [threading.Thread(target=keep_reading, args=(who,)) for who in range(3)]
    for thread in threads:
        thread.start()
    try:
        with cache.writer("clips", shard_bytes=1200) as writer:
            for number in range(5, 65):
                writer.write(key_of(number), entry(number))
                places = {**places, number: f"{writer._staging.path.name}/{key_of(number)}.safetensors"}
                if number % 16 == 0:  # second copies, cleared by rewriting
                    write(tmp_path, range(number - 3, number))
                    prune(tmp_path)
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert errors == []
    assert min(num_read) >= 20


@pytest.mark.parametrize("change", ["packed", "rewritten"])
def test_a_snapshot_taken_while_entries_move_misses_none(tmp_path, monkeypatch, change):
    write(tmp_path, range(3))
    write(tmp_path, range(2, 4))  # a second copy, for prune to rewrite a shard
    left_by_the_dead(tmp_path, [4])
    if change == "rewritten":
        adopt(tmp_path, "clips")
    look, moved = list_shard, []

    def move_first(path):
        if not moved:
            moved.append(path)
            adopt(tmp_path, "clips") if change == "packed" else prune(tmp_path)
        return look(path)

    monkeypatch.setattr(cache_module, "_NUM_THREADS", 1)
    monkeypatch.setattr(cache_module, "list_shard", move_first)
    snapshot = Cache(tmp_path).snapshot("clips")
    assert moved
    assert snapshot.num_entries == 5
    assert snapshot.damaged == {}
    assert all((tmp_path / "clips" / place).exists() for place in snapshot.places)


def test_a_forked_worker_opens_its_own_files(tmp_path):
    write(tmp_path, range(3))
    assert same(read(tmp_path, 1), entry(1))
    path = tmp_path / "clips" / Cache(tmp_path).snapshot("clips").places[0]
    handle = cache_module._opened(path, os.getpid())
    assert cache_module._opened(path, os.getpid()) is handle
    assert cache_module._opened(path, os.getpid() + 1) is not handle


# --- what the user can mend


def test_a_root_that_is_a_file(tmp_path):
    (tmp_path / "cache").write_text("")
    for act in (Cache, verify, prune, stats):
        with pytest.raises(UserError, match="is a file"):
            act(tmp_path / "cache")


def test_a_kind_that_is_a_file(tmp_path):
    (tmp_path / "clips").write_text("")
    with pytest.raises(UserError, match=r"clips.*cannot be read"):
        Cache(tmp_path).snapshot("clips")
    with pytest.raises(UserError, match=r"clips.*cannot be read"):
        write(tmp_path, [1])


def test_a_parent_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be (read|made)"):
        write(tmp_path / "file" / "cache", [1])


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, timeout=20).returncode:
        pytest.skip("needs root, to mount a small file system")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True, timeout=20)


def write_bytes(root, num_entries, num_bytes):
    with Cache(root).writer("clips") as writer:
        for number in range(num_entries):
            writer.write(key_of(number), {"x": torch.full((num_bytes,), number, dtype=torch.uint8)})


def test_a_full_disk_is_said_and_damages_nothing(small_disk):
    with pytest.raises(UserError, match=r"out of space: writing 1\.0 MB into .*clips.*MB free.*data\.cache_dir"):
        write_bytes(small_disk, 10, 1_000_000)
    assert not [path for path in files_in(small_disk) if "tmp" in path.name]
    cache = Cache(small_disk)
    snapshot = cache.snapshot("clips")
    for number in range(4):
        assert (cache.read("clips", key_of(number), snapshot.place(key_of(number)))["x"] == number).all()
    with pytest.raises(UserError, match=r"out of space: writing 4\.0 MB"):
        adopt(small_disk, "clips")
    assert cache.snapshot("clips").num_entries == 4
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True, timeout=20)
    adopt(small_disk, "clips")
    assert len(files_in(small_disk)) == 1
    assert verify(small_disk).num_entries == 4


def test_a_disk_that_is_full_when_packing(small_disk):
    with pytest.raises(UserError, match=r"out of space: writing 2\.5 MB"):
        write_bytes(small_disk, 5, 500_000)
    assert Cache(small_disk).snapshot("clips").num_entries == 5
    assert not [path for path in files_in(small_disk) if "tmp" in path.name or "packed" in path.name]


def test_a_read_only_cache_can_be_read_and_says_why_not_written(small_disk):
    write(small_disk, range(3))
    left_by_the_dead(small_disk, [7], kind="captions")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True, timeout=20)
    assert same(read(small_disk, 1), entry(1))
    with pytest.raises(UserError, match=r"clips cannot be written \(Read-only file system\): set data.cache_dir"):
        write(small_disk, [4])
    for act in (verify, prune):
        with pytest.raises(UserError, match=r"captions cannot be written \(Read-only file system\)"):
            act(small_disk)
    assert stats(small_disk)["captions"]["entries"] == 1
