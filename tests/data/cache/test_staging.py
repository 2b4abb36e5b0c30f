import errno
import os
import shutil

import pytest

from cogds.data.cache.maintenance import prune, stats, verify
from cogds.data.cache.shard import SHARD_FILE, shards_in
from cogds.data.cache.staging import Staging, _take_lock, adopt, new_staging
from cogds.data.cache.store import Cache, Writer
from cogds.errors import UserError
from tests.data.entries import entry, files_in, flip, key_of, left_by_the_dead, read, same, write


def test_an_entry_is_there_as_soon_as_it_is_written(tmp_path):
    with Cache(tmp_path).writer("clips") as writer:
        for number in range(3):
            writer.write(key_of(number), entry(number))
            assert same(read(tmp_path, number), entry(number))
        assert stats(tmp_path)["clips"] | {"bytes": 0} == {
            "entries": 3,
            "bytes": 0,
            "shards": 0,
            "staged": 3,
            "failures": 0,
            "duplicates": 0,
            "damaged": 0,
            "old": 0,
        }


def test_nothing_temporary_is_left(tmp_path):
    write(tmp_path, range(5), shard_bytes=600)
    with Cache(tmp_path).writer("captions"):
        pass
    assert sorted(os.listdir(tmp_path)) == ["clips"]
    names = os.listdir(tmp_path / "clips")
    assert len(names) == 3
    assert all(SHARD_FILE.fullmatch(name) for name in names)


def test_a_run_that_fails_keeps_what_it_wrote(tmp_path):
    def run():
        with Cache(tmp_path).writer("clips") as writer:
            writer.write(key_of(1), entry(1))
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        run()
    assert same(read(tmp_path, 1), entry(1))
    assert stats(tmp_path)["clips"]["staged"] == 0


def test_others_may_read_what_the_umask_allows(tmp_path):
    before = os.umask(0o022)
    try:
        write(tmp_path, range(2))
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in files_in(tmp_path)] == [0o644]


# --- writers that died


def test_the_next_writer_packs_what_a_dead_one_left(tmp_path):
    left_by_the_dead(tmp_path, range(3))
    left_by_the_dead(tmp_path, range(3, 5))
    assert Cache(tmp_path).snapshot("clips").num_entries == 5  # readable before
    with Cache(tmp_path).writer("clips"):
        pass
    names = os.listdir(tmp_path / "clips")
    assert len(names) == 2
    assert all(SHARD_FILE.fullmatch(name) for name in names)
    assert all(same(read(tmp_path, number), entry(number)) for number in range(5))


def test_a_living_writer_is_left_alone(tmp_path):
    cache = Cache(tmp_path)
    with cache.writer("clips") as writer:
        writer.write(key_of(1), entry(1))
        assert adopt(tmp_path, "clips") == {}
        with cache.writer("clips") as other:
            other.write(key_of(2), entry(2))
        prune(tmp_path)
        verify(tmp_path)
        assert stats(tmp_path)["clips"]["staged"] == 1
        writer.write(key_of(3), entry(3))
    assert stats(tmp_path)["clips"]["entries"] == 3
    assert stats(tmp_path)["clips"]["staged"] == 0


def test_a_kill_between_packing_and_clearing_leaves_copies_that_the_next_writer_clears(tmp_path, monkeypatch):
    writer = Writer(tmp_path / "clips", 1 << 30)
    for number in range(3):
        writer.write(key_of(number), entry(number))
    with monkeypatch.context() as patch:
        patch.setattr(Staging, "clear", lambda _: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception, match="killed"):
            writer.close()
    assert stats(tmp_path)["clips"]["duplicates"] == 3
    snapshot = Cache(tmp_path).snapshot("clips")
    assert not snapshot.place(key_of(1)).startswith("staging-")  # the copy that stays
    adopt(tmp_path, "clips")
    assert stats(tmp_path)["clips"]["duplicates"] == 0
    assert len(files_in(tmp_path)) == 1
    assert all(same(read(tmp_path, number), entry(number)) for number in range(3))


def test_what_one_writer_could_not_make_and_a_dead_one_did_is_packed(tmp_path):
    with Cache(tmp_path).writer("clips") as writer:
        writer.fail(key_of(1), "a disk was away")
    left_by_the_dead(tmp_path, [1])
    adopt(tmp_path, "clips")
    assert stats(tmp_path)["clips"]["staged"] == 0
    assert same(read(tmp_path, 1), entry(1))


@pytest.mark.parametrize("failed_first", [True, False])
def test_packing_takes_what_was_made_before_what_failed(tmp_path, failed_first):
    write(tmp_path, [1])
    made = files_in(tmp_path)
    with Cache(tmp_path).writer("clips") as writer:
        writer.fail(key_of(1), "a disk was away")
    failed = [path for path in files_in(tmp_path) if path not in made]
    staging = new_staging(tmp_path / "clips")
    shard, damaged = staging.pack(dict.fromkeys(failed + made if failed_first else made + failed))
    staging.remove()
    assert damaged == {}
    assert same(Cache(tmp_path).read("clips", key_of(1), shard.name), entry(1))


def test_a_folder_without_a_lock_file_is_a_dead_writers(tmp_path):
    (tmp_path / "clips" / "staging-1").mkdir(parents=True)
    adopt(tmp_path, "clips")
    assert os.listdir(tmp_path / "clips") == []


def test_a_lock_on_a_removed_folder_is_not_taken(tmp_path, monkeypatch):
    staging = tmp_path / "staging-1"
    assert _take_lock(staging) is None
    staging.mkdir()
    monkeypatch.setattr("fcntl.flock", lambda *_: shutil.rmtree(staging))
    assert _take_lock(staging) is None


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_nobody_is_taken_for_dead(tmp_path, monkeypatch, code):
    def no_locks(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", no_locks)
    left = left_by_the_dead(tmp_path, range(2))
    before = files_in(left)
    write(tmp_path, range(2, 5))
    prune(tmp_path)
    verify(tmp_path)
    assert files_in(left) == before
    assert stats(tmp_path)["clips"] | {"bytes": 0, "shards": 0} == {
        "entries": 5,
        "bytes": 0,
        "shards": 0,
        "staged": 2,
        "failures": 0,
        "duplicates": 0,
        "damaged": 0,
        "old": 0,
    }
    assert all(same(read(tmp_path, number), entry(number)) for number in range(5))


def test_a_writer_that_was_taken_for_dead_goes_on(tmp_path):
    """On a mount where each node sees its own locks only."""
    with Cache(tmp_path).writer("clips") as writer:
        writer.write(key_of(1), entry(1))
        other = Staging(writer._staging.path, os.open(writer._staging.path / "lock", os.O_RDWR))
        other.pack(dict.fromkeys(shards_in(other.path)))
        other.remove()
        writer.write(key_of(2), entry(2))
    assert stats(tmp_path)["clips"]["entries"] == 2
    assert len(files_in(tmp_path)) == 2


# --- damage


def test_damage_in_what_a_dead_writer_left_does_not_get_into_a_shard(tmp_path):
    staging = left_by_the_dead(tmp_path, range(4))
    os.truncate(staging / f"{key_of(1)}.safetensors", 30)
    flip(staging / f"{key_of(2)}.safetensors", os.path.getsize(staging / f"{key_of(2)}.safetensors") - 1)
    assert list(Cache(tmp_path).snapshot("clips").damaged) == [f"{staging.name}/{key_of(1)}.safetensors"]
    report = verify(tmp_path)
    assert {one.key for one in report.damaged} == {key_of(1), key_of(2)}
    assert report.num_entries == 2
    assert not staging.exists()


def test_a_writer_that_reads_back_something_else_says_so(tmp_path):
    def run():
        with Cache(tmp_path).writer("clips") as writer:
            for number in range(2):
                writer.write(key_of(number), entry(number))
            os.truncate(writer._staging.path / f"{key_of(1)}.safetensors", 30)

    with pytest.raises(UserError, match="did not read back"):
        run()
    assert Cache(tmp_path).snapshot("clips").num_entries == 1
