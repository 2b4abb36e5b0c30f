import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from cogds.data.cache import maintenance as maintenance_module
from cogds.data.cache.maintenance import PruneReport, prune, stats, verify
from cogds.data.cache.store import Cache
from cogds.errors import UserError
from tests.data.entries import entry, fail, files_in, flip, key_of, read, same, write

# --- verifying


def test_verify_removes_only_the_damaged_entry(tmp_path):
    write(tmp_path, range(10))
    shard = files_in(tmp_path)[0]
    flip(shard, shard.read_bytes().index(entry(4)["moments"].view(torch.uint8).numpy().tobytes()) + 17)
    report = verify(tmp_path)
    assert [(bad.kind, bad.place, bad.key) for bad in report.damaged] == [("clips", shard.name, key_of(4))]
    assert report.num_entries == 9
    assert report.num_bytes == 9 * sum(tensor.nbytes for tensor in entry(0).values())
    assert len(files_in(tmp_path)) == 1
    assert Cache(tmp_path).snapshot("clips").place(key_of(4)) is None
    assert all(same(read(tmp_path, number), entry(number)) for number in range(10) if number != 4)
    assert verify(tmp_path).damaged == ()


def test_a_file_that_may_not_be_read_is_not_removed(tmp_path, monkeypatch):
    write(tmp_path, range(2))

    def refused(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("cogds.data.cache.shard.safe_open", refused)
    for function in (verify, stats, prune):
        with pytest.raises(UserError, match=r"^data.cache_dir: .*\.safetensors"):
            function(tmp_path)
    assert len(files_in(tmp_path)) == 1


# --- pruning


def test_prune_removes_the_other_entries(tmp_path):
    write(tmp_path, range(10))
    write(tmp_path, range(10, 12))
    write(tmp_path, range(3), kind="captions")
    fail(tmp_path, 50)
    before = sum(path.stat().st_size for path in files_in(tmp_path))
    report = prune(tmp_path, {"clips": {key_of(number) for number in (1, 2, 50)}})
    assert (report.num_entries, report.num_failures) == (10, 0)
    assert report.num_bytes == before - sum(path.stat().st_size for path in files_in(tmp_path)) > 0
    snapshot = Cache(tmp_path).snapshot("clips")
    assert snapshot.num_entries == 2
    assert snapshot.failures == {key_of(50): "no frames"}
    assert Cache(tmp_path).snapshot("captions").num_entries == 3
    assert same(read(tmp_path, 2), entry(2))


def test_prune_removes_failures_on_demand(tmp_path):
    with Cache(tmp_path).writer("clips") as writer:
        writer.write(key_of(1), entry(1))
        writer.fail(key_of(2), "no frames")
    assert prune(tmp_path).num_failures == 0
    assert prune(tmp_path, failed=True).num_failures == 1
    snapshot = Cache(tmp_path).snapshot("clips")
    assert snapshot.failures == {}
    assert snapshot.num_entries == 1


def test_prune_removes_duplicates(tmp_path):
    write(tmp_path, range(3))
    write(tmp_path, range(2, 5))
    report = prune(tmp_path)
    assert (report.num_entries, report.num_failures) == (1, 0)
    assert stats(tmp_path)["clips"]["duplicates"] == 0
    assert all(same(read(tmp_path, number), entry(number)) for number in range(5))


@pytest.mark.parametrize("failed_first", [True, False])
@pytest.mark.parametrize("shard_bytes", [1, 1 << 30])  # not merged, and merged
def test_prune_keeps_an_entry_and_removes_the_record_of_its_failure(tmp_path, failed_first, shard_bytes):
    fail(tmp_path, 1, "a disk was away")
    files_in(tmp_path)[0].rename(tmp_path / "clips" / f"{('0' if failed_first else 'f') * 32}.safetensors")
    write(tmp_path, [1])
    assert prune(tmp_path, shard_bytes=shard_bytes).num_entries == 0
    assert Cache(tmp_path).snapshot("clips").failures == {}
    assert same(read(tmp_path, 1), entry(1))
    assert verify(tmp_path).damaged == ()


def test_files_of_encoding_version_1_are_ignored_counted_and_pruned(tmp_path):
    old = tmp_path / "clips" / "ab" / f"{'ab' * 16}.safetensors"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"x" * 100)
    write(tmp_path, [1])
    assert Cache(tmp_path).snapshot("clips").num_entries == 1
    assert stats(tmp_path)["clips"]["old"] == 1
    assert verify(tmp_path).damaged == ()
    assert old.exists()
    report = prune(tmp_path)
    assert (report.num_entries, report.num_bytes) == (1, 100)
    assert not old.parent.exists()
    assert same(read(tmp_path, 1), entry(1))


def test_other_files_in_the_root_are_left_alone(tmp_path):
    write(tmp_path, [1])
    (tmp_path / "files.json").write_text("{}")
    (tmp_path / "manifests").mkdir()
    (tmp_path / "manifests" / "a.parquet").write_text("x")
    prune(tmp_path, {"manifests": set()})
    verify(tmp_path)
    assert list(stats(tmp_path)) == ["clips"]
    assert (tmp_path / "manifests" / "a.parquet").exists()
    assert (tmp_path / "files.json").exists()


# --- merging


def test_prune_merges_small_shards(tmp_path):
    for run in range(8):
        write(tmp_path, range(3 * run, 3 * run + 3))
    fail(tmp_path, 50)
    bound = int(3.5 * max(path.stat().st_size for path in files_in(tmp_path)))
    write(tmp_path, range(24, 32))  # more than half of the bound
    large = max(files_in(tmp_path), key=lambda path: path.stat().st_size)
    before = sum(path.stat().st_size for path in files_in(tmp_path))
    report = prune(tmp_path, shard_bytes=bound)
    after = files_in(tmp_path)
    assert (report.num_entries, report.num_failures, report.num_merged) == (0, 0, 9)
    assert report.num_bytes == before - sum(path.stat().st_size for path in after)
    assert len(after) == 4
    assert large in after
    assert all(path.stat().st_size <= bound for path in after)
    assert prune(tmp_path, shard_bytes=bound) == PruneReport()
    assert files_in(tmp_path) == after
    assert all(same(read(tmp_path, number), entry(number)) for number in range(32))
    assert Cache(tmp_path).snapshot("clips").failures == {key_of(50): "no frames"}
    assert verify(tmp_path).damaged == ()


def test_merged_shards_are_bounded_in_entries(tmp_path, monkeypatch):
    for number in range(10):
        write(tmp_path, [number])
    write(tmp_path, range(10, 13))
    monkeypatch.setattr("cogds.data.cache.maintenance.SHARD_ENTRIES", 4)
    assert prune(tmp_path).num_merged == 10
    assert sorted(np.bincount(Cache(tmp_path).snapshot("clips").place_numbers)) == [2, 3, 4, 4]
    assert prune(tmp_path).num_merged == 0


def test_a_damaged_entry_is_not_merged_and_an_unreadable_shard_stays(tmp_path):
    fail(tmp_path, 50)
    altered = files_in(tmp_path)[0]
    altered.write_bytes(altered.read_bytes().replace(b"no frames", b"no frumes"))
    for number in range(4):
        write(tmp_path, [number])
    paths = {number: tmp_path / "clips" / Cache(tmp_path).snapshot("clips").place(key_of(number)) for number in (1, 2)}
    flip(paths[1], paths[1].stat().st_size - 1)
    os.truncate(paths[2], 30)
    before = sum(path.stat().st_size for path in files_in(tmp_path))
    report = prune(tmp_path)
    assert (report.num_entries, report.num_merged) == (1, 3)
    assert report.num_bytes == before - sum(path.stat().st_size for path in files_in(tmp_path))
    assert len(files_in(tmp_path)) == 3
    assert altered.exists()
    assert paths[2].exists()
    assert Cache(tmp_path).snapshot("clips").place(key_of(1)) is None
    assert all(same(read(tmp_path, number), entry(number)) for number in (0, 3))


def test_a_shard_that_is_damaged_while_it_is_merged_stays(tmp_path, monkeypatch):
    for number in range(3):
        write(tmp_path, [number])
    damaged = tmp_path / "clips" / Cache(tmp_path).snapshot("clips").place(key_of(1))
    open_shard = maintenance_module.open_shard

    def damage_first(path):
        os.truncate(damaged, 30)
        return open_shard(path)

    monkeypatch.setattr(maintenance_module, "open_shard", damage_first)
    assert prune(tmp_path).num_entries == 0
    assert damaged.exists()
    assert len(files_in(tmp_path)) == 2
    assert all(same(read(tmp_path, number), entry(number)) for number in (0, 2))


def test_a_kill_while_merging_leaves_duplicates_that_the_next_prune_removes(tmp_path, monkeypatch):
    for number in range(3):
        write(tmp_path, [number])
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *_, **__: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception, match="killed"):
            prune(tmp_path)
    assert stats(tmp_path)["clips"]["duplicates"] == 3
    prune(tmp_path)
    assert stats(tmp_path)["clips"]["duplicates"] == 0
    assert all(same(read(tmp_path, number), entry(number)) for number in range(3))
