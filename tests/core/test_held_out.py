"""Held-out files and evaluation clips, which depend only on file names."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cogds.core.held_out import (
    held_out_limit,
    limit_of_fixed_share,
    min_held_out_share,
    name_hash,
    portable_name,
    spread,
)


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


def held_out(names, share):
    limit = held_out_limit([name_hash(name) for name in names], share)
    return {name for name in names if limit is not None and name_hash(name) <= limit}


@given(st.sets(st.text(max_size=5)), st.floats(0, 1))
def test_as_many_files_are_held_out_as_the_share_says(names, share):
    assert abs(len(held_out(names, share)) - share * len(names)) <= 0.5 + 1e-9


def test_the_number_of_files_is_rounded():
    names = [f"{number}.mp4" for number in range(13)]
    numbers = {share: len(held_out(names, share)) for share in (0, 0.03, 0.04, 0.2, 0.5, 1)}
    assert numbers == {0: 0, 0.03: 0, 0.04: 1, 0.2: 3, 0.5: 7, 1: 13}
    assert held_out(names, 0.2) < held_out(names, 0.5)
    assert held_out([*names, *names], 0.2) == held_out(names, 0.2)  # several clips of each file


@given(st.sets(st.text(max_size=5), min_size=1), st.floats(0.01, 0.9), st.data())
def test_a_file_that_comes_or_goes_changes_as_little_as_possible(names, share, data):
    """Besides the file itself, at most one other."""
    changed = data.draw(st.sampled_from(sorted(names)))
    before, after = held_out(names, share), held_out(names - {changed}, share)
    assert len((before ^ after) - {changed}) <= 1


def test_the_limit_of_earlier_versions():
    """A resumed run holds out the same files."""
    names = [f"clip-{number}.mp4" for number in range(2000)]
    limit = limit_of_fixed_share(0.2)
    assert all((name_hash(name) <= limit) == (name_hash(name) < 0.2 * 2**64) for name in names)
    assert limit_of_fixed_share(0.0) is None


def test_the_hash_does_not_change_between_versions():
    """A run that is resumed with a new version of cogds must hold out the same files."""
    assert name_hash("a.mp4") == 0xDB8CA33D8EA3D0A4
    assert name_hash("a.mp4", "0.0") != name_hash("a.mp4")


@given(st.integers(1, 3000))
def test_the_smallest_share_that_holds_out_a_file(num_files):
    share, hashes = min_held_out_share(num_files), range(num_files)
    assert held_out_limit(hashes, share) is not None
    assert share <= 0.001 or held_out_limit(hashes, share - 0.001 - 1e-9) is None


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
