import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from cogds.data.cache.maintenance import verify
from cogds.data.cache.store import Cache, DamagedEntryError
from tests.data.entries import entry, files_in, flip, key_of, same, write


def test_the_files_are_ordinary_safetensors(tmp_path):
    write(tmp_path, [1])
    with safe_open(files_in(tmp_path)[0], "pt") as file:
        assert torch.equal(file.get_tensor(f"{key_of(1)}/moments"), entry(1)["moments"])


def test_reading_one_entry_does_not_read_its_shard(tmp_path):
    with Cache(tmp_path).writer("clips") as writer:
        for number in range(20):
            writer.write(key_of(number), entry(number, 50_000))  # 200 kB

    def num_read():
        return int(Path("/proc/self/io").read_text().split()[1])

    cache = Cache(tmp_path)
    snapshot = cache.snapshot("clips")
    before = num_read()
    assert same(cache.read("clips", key_of(7), snapshot.place(key_of(7))), entry(7, 50_000))
    assert 200_000 < num_read() - before < 300_000


# --- damage


def small_cache(root):
    """A shard of two entries and a failure, with keys that differ in one bit."""
    keys = ["a" * 31 + "0", "a" * 31 + "1", "b" * 32]
    with Cache(root).writer("clips") as writer:
        writer.write(keys[0], {"x": torch.arange(3, dtype=torch.int16), "y": torch.ones(2, 1)})
        writer.write(keys[1], {"x": torch.arange(3, dtype=torch.int16) + 1, "y": torch.zeros(2, 1)})
        writer.fail(keys[2], "no frames")
    return keys, files_in(root)[0]


def what_is_read(root, keys):
    """Key -> tensors or reason, for all that the cache gives out, and how many of the keys were damaged."""
    cache, num_damaged = Cache(root), 0
    snapshot = cache.snapshot("clips")
    given = dict(snapshot.failures)
    for key in keys:
        if (place := snapshot.place(key)) is not None:
            try:
                given[key] = cache.read("clips", key, place)
            except DamagedEntryError as damage:
                num_damaged += key in str(damage) and "--verify" in str(damage)
    return given, num_damaged


def equal(one, other):
    return one == other if isinstance(one, str) or isinstance(other, str) else same(one, other)


@pytest.mark.parametrize("step", [13, pytest.param(1, marks=pytest.mark.slow)])
def test_a_flipped_bit_anywhere_is_seen(tmp_path, step):
    keys, original = small_cache(tmp_path / "whole")
    data = original.read_bytes()
    right, _ = what_is_read(tmp_path / "whole", keys)
    assert set(right) == set(keys)
    generator = random.Random(0)
    for at in range(0, len(data), step):
        copy = tmp_path / f"{at}" / "clips" / original.name
        copy.parent.mkdir(parents=True)
        copy.write_bytes(data)
        flip(copy, at, generator.randrange(8))
        root = copy.parent.parent
        given, num_damaged = what_is_read(root, keys)
        assert all(key in right and equal(given[key], right[key]) for key in given), f"byte {at}: a wrong entry"
        assert num_damaged or len(given) < len(right), f"byte {at}: nothing was seen"
        report = verify(root)
        assert report.damaged, f"byte {at}: not in the report"
        assert report.num_entries + report.num_failures == len(given)
        if at % 8 == 0:
            assert not verify(root).damaged
            assert what_is_read(root, keys)[0].keys() == given.keys()
        shutil.rmtree(root)


@pytest.mark.parametrize("old, new", [(b'"I16"', b'"F16"'), (b"[2,1]", b"[1,2]"), (b"/y", b"/z")])
def test_a_header_that_says_another_dtype_shape_or_name_is_seen(tmp_path, old, new):
    keys, shard = small_cache(tmp_path)
    data = shard.read_bytes()
    assert data.count(old) == 2
    shard.write_bytes(data.replace(old, new))
    assert what_is_read(tmp_path, keys) == ({keys[2]: "no frames"}, 2)
    assert {one.key for one in verify(tmp_path).damaged} == set(keys[:2])


def test_an_entry_under_another_key_is_seen(tmp_path):
    keys, shard = small_cache(tmp_path)
    one, other = (key.encode() for key in keys[:2])
    shard.write_bytes(shard.read_bytes().replace(one, b"z" * 32).replace(other, one).replace(b"z" * 32, other))
    assert what_is_read(tmp_path, keys) == ({keys[2]: "no frames"}, 2)
    shard.write_bytes(shard.read_bytes().replace(keys[2].encode(), b"c" * 32))
    assert Cache(tmp_path).snapshot("clips").failures == {}
    assert {one.key for one in verify(tmp_path).damaged} == {*keys[:2], "c" * 32}


def test_a_truncated_shard_is_reported_and_removed(tmp_path):
    keys, original = small_cache(tmp_path / "whole")
    data = original.read_bytes()
    for length in [0, 1, 7, 8, 9, 100, len(data) // 2, len(data) - 1]:
        root = tmp_path / f"{length}"
        copy = root / "clips" / original.name
        copy.parent.mkdir(parents=True)
        copy.write_bytes(data[:length])
        snapshot = Cache(root).snapshot("clips")
        assert list(snapshot.damaged) == [original.name]
        assert snapshot.num_entries == 0
        assert snapshot.failures == {}
        with pytest.raises(DamagedEntryError, match=f"{original.name}.*{keys[0]}"):
            Cache(root).read("clips", keys[0], original.name)
        report = verify(root)
        assert [(one.kind, one.place, one.key) for one in report.damaged] == [("clips", original.name, "")]
        assert files_in(root) == []
