import os

import pytest

from cogds.data.cache.keys import cache_key, digest_files


def test_every_field_makes_another_key():
    base = {"file": "a", "bucket": "9x64x64", "fps": 16.0}
    keys = {
        cache_key(base),
        cache_key({**base, "fps": 8.0}),
        cache_key({**base, "bucket": "9x64x80"}),
        cache_key({**base, "more": 1}),
    }
    assert len(keys) == 4
    assert cache_key(dict(reversed(base.items()))) == cache_key(base)


def test_a_key_never_changes():
    """Another key would make every user encode everything again."""
    assert cache_key({"file": "a", "fps": 16.0}) == "c553c8ee6e63cc7842c4d8d4a02c2775"


def test_file_digests_follow_content_and_are_remembered(tmp_path, monkeypatch):
    one, other, memo = tmp_path / "one", tmp_path / "other", tmp_path / "cache/files.json"
    one.write_bytes(b"x" * 100)
    other.write_bytes(b"x" * 100)
    first = digest_files([str(one), str(other), str(tmp_path / "gone")], memo)
    assert set(first) == {str(one), str(other)}
    assert first[str(one)] == first[str(other)]
    monkeypatch.setattr("cogds.data.cache.keys._digest_file", lambda path: pytest.fail(f"{path} was read again"))
    assert digest_files([str(one)], memo) == {str(one): first[str(one)]}
    monkeypatch.undo()
    one.write_bytes(b"y" * 100)
    os.utime(one, ns=(1, 1))
    assert digest_files([str(one)], memo)[str(one)] != first[str(one)]
