import os

import pytest
import torch

from cogds.data.cache import Cache, digest, digest_files
from cogds.errors import UserError


def test_what_is_written_is_read(tmp_path):
    cache, tensors = (
        Cache(tmp_path),
        {"moments": torch.randn(4, 2).bfloat16(), "first_frame": torch.ones(3, dtype=torch.uint8)},
    )
    assert not cache.has("clips", "ab12")
    cache.write("clips", "ab12", tensors)
    assert cache.has("clips", "ab12")
    assert not cache.has("captions", "ab12")
    read = cache.read("clips", "ab12")
    assert all(torch.equal(read[name], tensors[name]) and read[name].dtype == tensors[name].dtype for name in tensors)


def test_nothing_temporary_is_left(tmp_path):
    Cache(tmp_path).write("clips", "ab12", {"x": torch.ones(1)})
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["ab12.safetensors"]


def test_a_damaged_or_missing_entry_is_named(tmp_path):
    cache = Cache(tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        cache.read("clips", "ab12")
    cache.write("clips", "ab12", {"x": torch.ones(100)})
    os.truncate(cache.path("clips", "ab12"), 50)
    with pytest.raises(UserError, match="delete it"):
        cache.read("clips", "ab12")


def test_every_field_makes_another_key():
    base = {"file": "a", "bucket": "9x64x64", "fps": 16.0}
    keys = {
        digest(base),
        digest({**base, "fps": 8.0}),
        digest({**base, "bucket": "9x64x80"}),
        digest({**base, "more": 1}),
    }
    assert len(keys) == 4
    assert digest(dict(reversed(base.items()))) == digest(base)


def test_file_digests_follow_content_and_are_remembered(tmp_path, monkeypatch):
    one, other, memo = tmp_path / "one", tmp_path / "other", tmp_path / "cache/files.json"
    one.write_bytes(b"x" * 100)
    other.write_bytes(b"x" * 100)
    first = digest_files([str(one), str(other), str(tmp_path / "gone")], memo)
    assert set(first) == {str(one), str(other)}
    assert first[str(one)] == first[str(other)]
    monkeypatch.setattr("cogds.data.cache._digest_file", lambda path: pytest.fail(f"{path} was read again"))
    assert digest_files([str(one)], memo) == {str(one): first[str(one)]}
    monkeypatch.undo()
    one.write_bytes(b"y" * 100)
    os.utime(one, ns=(1, 1))
    assert digest_files([str(one)], memo)[str(one)] != first[str(one)]
