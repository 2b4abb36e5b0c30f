import os

import pytest

from cogds.data.cache.keys import digest, digest_files


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
    monkeypatch.setattr("cogds.data.cache.keys._digest_file", lambda path: pytest.fail(f"{path} was read again"))
    assert digest_files([str(one)], memo) == {str(one): first[str(one)]}
    monkeypatch.undo()
    one.write_bytes(b"y" * 100)
    os.utime(one, ns=(1, 1))
    assert digest_files([str(one)], memo)[str(one)] != first[str(one)]
