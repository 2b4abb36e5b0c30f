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

    def num_bytes_read():
        return int(Path("/proc/self/io").read_text().split()[1])

    cache = Cache(tmp_path)
    snapshot = cache.snapshot("clips")
    before = num_bytes_read()
    assert same(cache.read("clips", key_of(7), snapshot.place(key_of(7))), entry(7, 50_000))
    assert 200_000 < num_bytes_read() - before < 300_000


# --- damage


def small_cache(root):
    """A shard of two entries and a failure, with keys that differ in one bit."""
    keys = ["a" * 31 + "0", "a" * 31 + "1", "b" * 32]
    with Cache(root).writer("clips") as writer:
        writer.write(keys[0], {"x": torch.arange(3, dtype=torch.int16), "y": torch.ones(2, 1)})
        writer.write(keys[1], {"x": torch.arange(3, dtype=torch.int16) + 1, "y": torch.zeros(2, 1)})
        writer.fail(keys[2], "no frames")
    return keys, files_in(root)[0]


def read_all(root, keys):
    """The tensors or the reason by key, without damaged entries, and how many of the keys are damaged."""
    cache, num_damaged = Cache(root), 0
    snapshot = cache.snapshot("clips")
    entries = dict(snapshot.failures)
    for key in keys:
        if (place := snapshot.place(key)) is not None:
            try:
                entries[key] = cache.read("clips", key, place)
            except DamagedEntryError as error:
                num_damaged += key in str(error) and "--verify" in str(error)
    return entries, num_damaged


def equal(first, second):
    return first == second if isinstance(first, str) or isinstance(second, str) else same(first, second)


@pytest.mark.parametrize("step", [13, pytest.param(1, marks=pytest.mark.slow)])
def test_a_flipped_bit_anywhere_is_detected(tmp_path, step):
    keys, original = small_cache(tmp_path / "whole")
    data = original.read_bytes()
    expected, _ = read_all(tmp_path / "whole", keys)
    assert set(expected) == set(keys)
    generator = random.Random(0)
    for at in range(0, len(data), step):
        copy = tmp_path / f"{at}" / "clips" / original.name
        copy.parent.mkdir(parents=True)
        copy.write_bytes(data)
        flip(copy, at, generator.randrange(8))
        root = copy.parent.parent
        entries, num_damaged = read_all(root, keys)
        assert all(key in expected and equal(entries[key], expected[key]) for key in entries), f"byte {at}: wrong entry"
        assert num_damaged or len(entries) < len(expected), f"byte {at}: not detected"
        report = verify(root)
        assert report.damaged, f"byte {at}: not in the report"
        assert report.num_entries + report.num_failures == len(entries)
        if at % 8 == 0:
            assert not verify(root).damaged
            assert read_all(root, keys)[0].keys() == entries.keys()
        shutil.rmtree(root)


@pytest.mark.parametrize("old, new", [(b'"I16"', b'"F16"'), (b"[2,1]", b"[1,2]"), (b"/y", b"/z")])
def test_another_dtype_shape_or_name_in_the_header_is_detected(tmp_path, old, new):
    keys, shard = small_cache(tmp_path)
    data = shard.read_bytes()
    assert data.count(old) == 2
    shard.write_bytes(data.replace(old, new))
    assert read_all(tmp_path, keys) == ({keys[2]: "no frames"}, 2)
    assert {entry.key for entry in verify(tmp_path).damaged} == set(keys[:2])


def test_an_entry_under_another_key_is_detected(tmp_path):
    keys, shard = small_cache(tmp_path)
    first, second = (key.encode() for key in keys[:2])
    shard.write_bytes(shard.read_bytes().replace(first, b"z" * 32).replace(second, first).replace(b"z" * 32, second))
    assert read_all(tmp_path, keys) == ({keys[2]: "no frames"}, 2)
    shard.write_bytes(shard.read_bytes().replace(keys[2].encode(), b"c" * 32))
    assert Cache(tmp_path).snapshot("clips").failures == {}
    assert {entry.key for entry in verify(tmp_path).damaged} == {*keys[:2], "c" * 32}


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
        assert [(entry.kind, entry.place, entry.key) for entry in report.damaged] == [("clips", original.name, "")]
        assert files_in(root) == []
