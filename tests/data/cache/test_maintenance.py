import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from cogds.data.cache import shard as shard_module
from cogds.data.cache.maintenance import PruneReport, prune, stats, verify
from cogds.data.cache.staging import Staging
from cogds.data.cache.store import Cache
from cogds.errors import UserError
from tests.data.entries import entry, files_in, flip, key_of, read, same, write

# --- verifying


def test_verify_drops_the_damaged_entry_alone(tmp_path):
    write(tmp_path, range(10))
    shard = files_in(tmp_path)[0]
    flip(shard, shard.read_bytes().index(entry(4)["moments"].view(torch.uint8).numpy().tobytes()) + 17)
    report = verify(tmp_path)
    assert [(one.kind, one.place, one.key) for one in report.damaged] == [("clips", shard.name, key_of(4))]
    assert report.num_entries == 9
    assert report.num_bytes == 9 * sum(tensor.nbytes for tensor in entry(0).values())
    assert len(files_in(tmp_path)) == 1
    assert Cache(tmp_path).snapshot("clips").place(key_of(4)) is None
    assert all(same(read(tmp_path, number), entry(number)) for number in range(10) if number != 4)
    assert verify(tmp_path).damaged == ()


def test_verify_removes_a_damaged_entry_of_a_living_writer(tmp_path):
    with Cache(tmp_path).writer("clips") as writer:
        for number in range(2):
            writer.write(key_of(number), entry(number))
        os.truncate(writer._staging.path / f"{key_of(1)}.safetensors", 30)
        assert [one.key for one in verify(tmp_path).damaged] == [""]
    assert stats(tmp_path)["clips"]["entries"] == 1


def test_a_file_that_may_not_be_read_is_not_removed(tmp_path, monkeypatch):
    write(tmp_path, range(2))

    def refused(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("cogds.data.cache.shard.safe_open", refused)
    for act in (verify, stats, prune):
        with pytest.raises(UserError, match="cannot be read"):
            act(tmp_path)
    assert len(files_in(tmp_path)) == 1


# --- pruning


def test_prune_removes_what_is_not_kept(tmp_path):
    write(tmp_path, range(10))
    write(tmp_path, range(10, 12))
    write(tmp_path, range(3), kind="captions")
    with Cache(tmp_path).writer("clips") as writer:
        writer.fail(key_of(50), "no frames")
    before = sum(path.stat().st_size for path in files_in(tmp_path))
    report = prune(tmp_path, {"clips": {key_of(number) for number in (1, 2, 50)}})
    assert (report.num_entries, report.num_failures) == (10, 0)
    assert report.num_bytes == before - sum(path.stat().st_size for path in files_in(tmp_path)) > 0
    snapshot = Cache(tmp_path).snapshot("clips")
    assert snapshot.num_entries == 2
    assert snapshot.failures == {key_of(50): "no frames"}
    assert Cache(tmp_path).snapshot("captions").num_entries == 3
    assert same(read(tmp_path, 2), entry(2))


def test_prune_forgets_failures_when_asked(tmp_path):
    with Cache(tmp_path).writer("clips") as writer:
        writer.write(key_of(1), entry(1))
        writer.fail(key_of(2), "no frames")
    assert prune(tmp_path).num_failures == 0
    assert prune(tmp_path, failed=True).num_failures == 1
    snapshot = Cache(tmp_path).snapshot("clips")
    assert snapshot.failures == {}
    assert snapshot.num_entries == 1


def test_prune_keeps_one_of_two_copies(tmp_path):
    write(tmp_path, range(3))
    write(tmp_path, range(2, 5))
    report = prune(tmp_path)
    assert (report.num_entries, report.num_failures) == (1, 0)
    assert stats(tmp_path)["clips"]["duplicates"] == 0
    assert all(same(read(tmp_path, number), entry(number)) for number in range(5))


@pytest.mark.parametrize("failed_first", [True, False])
@pytest.mark.parametrize("shard_bytes", [1, 1 << 30])  # as they lie, and merged
def test_prune_keeps_what_failed_once_and_was_made_elsewhere(tmp_path, failed_first, shard_bytes):
    with Cache(tmp_path).writer("clips") as writer:
        writer.fail(key_of(1), "a disk was away")
    files_in(tmp_path)[0].rename(tmp_path / "clips" / f"{('0' if failed_first else 'f') * 32}.safetensors")
    write(tmp_path, [1])
    assert prune(tmp_path, shard_bytes=shard_bytes).num_entries == 0
    assert Cache(tmp_path).snapshot("clips").failures == {}
    assert same(read(tmp_path, 1), entry(1))
    assert verify(tmp_path).damaged == ()


def test_files_of_the_old_layout_are_ignored_counted_and_pruned(tmp_path):
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


def test_other_things_in_the_root_are_left_alone(tmp_path):
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


def test_prune_puts_small_shards_together(tmp_path):
    for run in range(8):
        write(tmp_path, range(3 * run, 3 * run + 3))
    with Cache(tmp_path).writer("clips") as writer:
        writer.fail(key_of(50), "no frames")
    bound = int(3.5 * max(path.stat().st_size for path in files_in(tmp_path)))
    write(tmp_path, range(24, 32))  # above half of it
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
    assert sorted(np.bincount(Cache(tmp_path).snapshot("clips").numbers)) == [2, 3, 4, 4]
    assert prune(tmp_path).num_merged == 0


def test_a_damaged_entry_is_not_merged_and_an_unreadable_shard_stays(tmp_path):
    with Cache(tmp_path).writer("clips") as writer:
        writer.fail(key_of(50), "no frames")
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


def test_a_shard_that_cannot_be_opened_any_more_when_it_is_merged_stays(tmp_path, monkeypatch):
    for number in range(3):
        write(tmp_path, [number])
    torn = tmp_path / "clips" / Cache(tmp_path).snapshot("clips").place(key_of(1))

    def tear_first(staging, sources, pack=Staging.pack):
        os.truncate(torn, 30)
        return pack(staging, sources)

    monkeypatch.setattr(Staging, "pack", tear_first)
    assert prune(tmp_path).num_entries == 0
    assert torn.exists()
    assert len(files_in(tmp_path)) == 2
    assert all(same(read(tmp_path, number), entry(number)) for number in (0, 2))


def test_a_kill_while_merging_leaves_copies_that_the_next_prune_clears(tmp_path, monkeypatch):
    def die(staging):
        staging.release()  # the lock goes with the process
        pytest.fail("killed")

    for number in range(3):
        write(tmp_path, [number])
    with monkeypatch.context() as patch:
        patch.setattr(Staging, "remove", die)
        with pytest.raises(pytest.fail.Exception, match="killed"):
            prune(tmp_path)
    assert stats(tmp_path)["clips"]["duplicates"] == 3
    prune(tmp_path)
    assert stats(tmp_path)["clips"]["duplicates"] == 0
    assert all(same(read(tmp_path, number), entry(number)) for number in range(3))


def test_merging_holds_no_entries_in_memory(tmp_path, monkeypatch):
    def own_memory_bytes():
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

    seen = []

    def watched(*arguments, save=shard_module.save_file):
        seen.append(own_memory_bytes())
        save(*arguments)
        seen.append(own_memory_bytes())

    for number in range(20):
        with Cache(tmp_path).writer("clips") as writer:
            writer.write(key_of(number), {"x": torch.full((2_000_000,), number, dtype=torch.uint8)})
    monkeypatch.setattr(shard_module, "save_file", watched)
    before = own_memory_bytes()
    prune(tmp_path)
    assert len(seen) == 2
    assert max(seen) - before < 10_000_000
    assert verify(tmp_path).num_entries == 20
