"""Held-out files and evaluation clips, which depend only on file names."""

import os
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cogds.core.held_out import is_held_out, min_held_out_share, name_hash, portable_name, spread


@pytest.mark.parametrize(
    "path, name",
    [
        ("/data/clips/a.mp4", "a.mp4"),
        ("/data/clips/cats/a.mp4", "cats/a.mp4"),
        ("/data/clips/more/b.mp4", "b.mp4"),  # relative to the innermost folder
        ("/data/clips2/a.mp4", "clips2/a.mp4"),  # outside of both folders
        ("/a.mp4", "/a.mp4"),
        ("/data/clips/cafe\u0301.mp4", "caf\u00e9.mp4"),
    ],
)
def test_names_are_relative_to_the_data_set_folder(path, name):
    assert portable_name(path, ("/data/clips", "/data/clips/more/")) == name


def test_the_share_is_respected_and_a_larger_share_is_a_superset():
    names = [f"clip-{number}.mp4" for number in range(20_000)]
    few, many = ([name for name in names if is_held_out(name, share)] for share in (0.05, 0.2))
    assert 0.04 < len(few) / len(names) < 0.06
    assert 0.18 < len(many) / len(names) < 0.22
    assert set(few) < set(many)
    assert not any(is_held_out(name, 0.0) for name in names)


def test_the_hash_does_not_change_between_versions():
    """A run that is resumed with a new version of cogds must hold out the same files."""
    assert name_hash("a.mp4") == 0xDB8CA33D8EA3D0A4
    assert name_hash("a.mp4", "0.0") != name_hash("a.mp4")


@given(st.binary().map(os.fsdecode))
def test_the_smallest_share_that_holds_out_a_file(name):
    share = min_held_out_share(name)
    assert is_held_out(name, share)
    assert not is_held_out(name, share - 0.001 - 1e-9)


@given(st.lists(st.integers(0, 4), max_size=60), st.integers(1, 70), st.randoms(use_true_random=False))
def test_clips_are_spread_over_the_buckets(buckets, num, random):
    hashes = [random.getrandbits(64) for _ in buckets]
    chosen = spread(buckets, hashes, num)
    assert len(chosen) == min(num, len(buckets))
    assert list(chosen) == sorted(set(chosen.tolist()))
    num_chosen, num_clips = Counter(buckets[clip] for clip in chosen), Counter(buckets)
    most = max(num_chosen.values(), default=0)
    for bucket, num in num_clips.items():
        assert num_chosen[bucket] >= min(num, most - 1)
        own_hashes = sorted(value for value, own_bucket in zip(hashes, buckets) if own_bucket == bucket)
        assert sorted(hashes[clip] for clip in chosen if buckets[clip] == bucket) == own_hashes[: num_chosen[bucket]]


def test_the_smallest_hashes_of_each_bucket_are_chosen():
    hashes = np.array([5, 3, 9, 7], np.uint64)
    assert spread([0, 0, 0, 0], hashes, 2).tolist() == [0, 1]
    assert spread([0, 0, 0, 0, 1], [*hashes, 1], 2).tolist() == [1, 4]
    assert spread([], [], 3).tolist() == []
