import os

import pytest

from cogds.data.cache.keys import cache_key, digest_files


def test_every_field_changes_the_key():
    base = {"file": "a", "bucket": "9x64x64", "fps": 16.0}
    keys = {
        cache_key(base),
        cache_key({**base, "fps": 8.0}),
        cache_key({**base, "bucket": "9x64x80"}),
        cache_key({**base, "more": 1}),
    }
    assert len(keys) == 4
    assert cache_key(dict(reversed(base.items()))) == cache_key(base)


def test_keys_of_earlier_versions_stay_valid():
    """With other keys, every user would have to encode everything again."""
    assert cache_key({"file": "a", "fps": 16.0}) == "c553c8ee6e63cc7842c4d8d4a02c2775"


def test_file_digests_follow_content_and_are_remembered(tmp_path, monkeypatch):
    first, second, memo = tmp_path / "first", tmp_path / "second", tmp_path / "cache/files.json"
    first.write_bytes(b"x" * 100)
    second.write_bytes(b"x" * 100)
    digests = digest_files([str(first), str(second), str(tmp_path / "missing")], memo)
    assert set(digests) == {str(first), str(second)}
    assert digests[str(first)] == digests[str(second)]
    monkeypatch.setattr("cogds.data.cache.keys._digest_file", lambda path: pytest.fail(f"{path} was read again"))
    assert digest_files([str(first)], memo) == {str(first): digests[str(first)]}
    monkeypatch.undo()
    first.write_bytes(b"y" * 100)
    os.utime(first, ns=(1, 1))
    assert digest_files([str(first)], memo)[str(first)] != digests[str(first)]
    first.unlink()
    assert digest_files([str(first), str(second)], memo) == {str(second): digests[str(second)]}
