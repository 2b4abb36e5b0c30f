"""When shards are written, and files of killed runs and of earlier versions."""

import os

import pytest
import torch

from cogds.data.cache import store as store_module
from cogds.data.cache.maintenance import prune, stats, verify
from cogds.data.cache.shard import SHARD_FILE
from cogds.data.cache.store import Cache
from cogds.files import process_tag
from tests.data.entries import entry, fail, files_in, key_of, read, same, stage, write


def sizes(root):
    """Numbers of entries of the shards."""
    snapshot = Cache(root).snapshot("clips")
    return sorted(snapshot.place_numbers.tolist().count(number) for number in range(len(snapshot.places)))


def test_shards_are_bounded_in_bytes_and_entries(tmp_path, monkeypatch):
    num_bytes = sum(tensor.nbytes for tensor in entry(0).values())
    write(tmp_path / "bytes", range(10), shard_bytes=3 * num_bytes)
    monkeypatch.setattr(store_module, "SHARD_ENTRIES", 4)
    write(tmp_path / "entries", range(10))
    for name, expected in [("bytes", [1, 3, 3, 3]), ("entries", [2, 4, 4])]:
        assert sizes(tmp_path / name) == expected
        assert all(same(read(tmp_path / name, number), entry(number)) for number in range(10))


def test_a_shard_is_written_after_some_time(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(store_module.time, "monotonic", lambda: now[0])
    with Cache(tmp_path).writer("clips") as writer:
        num_written = []
        for number, seconds in enumerate([10, 10, 15, 10, 40]):
            now[0] += seconds
            writer.write(key_of(number), entry(number))
            num_written.append(Cache(tmp_path).snapshot("clips").num_entries)
    # A kill never loses more than FLUSH_S (30 s) of work and the entry being made.
    assert num_written == [0, 0, 3, 3, 5]


def test_a_run_that_fails_keeps_its_entries(tmp_path):
    def run():
        with Cache(tmp_path).writer("clips") as writer:
            writer.write(key_of(1), entry(1))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert same(read(tmp_path, 1), entry(1))


def test_tensors_are_copied_when_they_are_written(tmp_path):
    tensors = entry(1)
    with Cache(tmp_path).writer("clips") as writer:
        writer.write(key_of(1), tensors)
        tensors["moments"].zero_()
    assert same(read(tmp_path, 1), entry(1))


def test_the_umask_sets_the_permissions_of_shards(tmp_path):
    before = os.umask(0o022)
    try:
        write(tmp_path, range(2))
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in files_in(tmp_path)] == [0o644]


@pytest.mark.parametrize("key", ["ab12", "G" * 32, "A" * 32, "../" + "0" * 29])
def test_a_key_has_32_hex_digits(tmp_path, key):
    with Cache(tmp_path).writer("clips") as writer, pytest.raises(ValueError, match="32 hex digits"):
        writer.write(key, entry(0))
    assert files_in(tmp_path) == []


def test_temporary_files_of_killed_writers_are_removed_and_those_of_running_ones_kept(tmp_path):
    write(tmp_path, [1])
    host, process_id = process_tag().split("@")
    names = [f"a.{host}@{number}-0a1b2c3d.tmp.safetensors" for number in (999_999_999, process_id)]
    for name in names:
        (tmp_path / "clips" / name).write_bytes(b"half")
    Cache(tmp_path).remove_abandoned("clips")
    assert [path.name for path in files_in(tmp_path) if not SHARD_FILE.fullmatch(path.name)] == names[1:]
    prune(tmp_path)
    assert (tmp_path / "clips" / names[1]).exists()


# --- earlier versions


def test_entries_of_killed_runs_of_earlier_versions_are_read_and_merged(tmp_path):
    staging = stage(tmp_path, range(3))
    fail(tmp_path, 1, "a disk was away")
    assert Cache(tmp_path).snapshot("clips").num_entries == 3
    assert all(same(read(tmp_path, number), entry(number)) for number in range(3))
    assert verify(tmp_path).num_entries == 3
    write(tmp_path, [3])
    prune(tmp_path)
    assert not staging.exists()
    assert stats(tmp_path)["clips"] | {"bytes": 0} == {
        "entries": 4, "bytes": 0, "shards": 1, "failures": 0, "duplicates": 0, "damaged": 0, "old": 0,
    }  # fmt: skip
    assert all(same(read(tmp_path, number), entry(number)) for number in range(4))


def test_damaged_entries_of_earlier_versions_are_removed(tmp_path):
    staging = stage(tmp_path, range(3))
    os.truncate(staging / f"{key_of(1)}.safetensors", 30)
    assert [entry.place for entry in verify(tmp_path).damaged] == [f"{staging.name}/{key_of(1)}.safetensors"]
    assert Cache(tmp_path).snapshot("clips").num_entries == 2


def test_any_dtype_and_layout(tmp_path):
    tensors = {
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "bool": torch.tensor([True, False]),
        "half": torch.randn(3, 4).half().t(),
        "int": torch.arange(7)[::2],
    }
    with Cache(tmp_path).writer("clips") as writer:
        writer.write(key_of(0), tensors)
    assert same(read(tmp_path, 0), tensors)
