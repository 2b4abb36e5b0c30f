from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cogds.core.windows import MODES, window_starts

FPS = st.sampled_from([8.0, 16.0, 23.976, 30.0])


@given(st.sampled_from(MODES), st.integers(0, 9), st.integers(1, 200), st.integers(0, 3000), FPS, st.integers(0, 99))
def test_windows_are_distinct_sorted_and_inside_the_range(mode, num_windows, bucket_frames, spare, fps, key):
    starts = window_starts(mode, num_windows, bucket_frames + spare, bucket_frames, fps, (key,))
    firsts = [round(start * fps) for start in starts]
    assert [first / fps for first in firsts] == list(starts)
    assert starts
    assert firsts == sorted(set(firsts))
    assert firsts[0] >= 0
    assert firsts[-1] <= spare
    assert starts == window_starts(mode, num_windows, bucket_frames + spare, bucket_frames, fps, (key,))


@given(st.integers(2, 50), st.integers(1, 100), st.integers(0, 1000), FPS)
def test_uniform_windows_span_the_first_to_the_last_position(count, length, spare, fps):
    firsts = [round(start * fps) for start in window_starts("uniform", count, length + spare, length, fps, ())]
    assert len(firsts) == min(count, spare + 1)
    if spare:
        assert (firsts[0], firsts[-1]) == (0, spare)
        gaps = [b - a for a, b in pairwise(firsts)]
        assert max(gaps) - min(gaps) <= 1


@given(st.integers(1, 100), st.integers(0, 1000), st.integers(0, 20))
def test_all_windows_fit_without_overlap(length, spare, limit):
    starts = window_starts("all", limit, length + spare, length, 1.0, ())
    fitting = (length + spare) // length
    assert starts == tuple(float(i * length) for i in range(min(fitting, limit or fitting)))


def test_examples():
    assert window_starts("first", 5, 100, 49, 16.0, ()) == (0.0,)
    assert window_starts("uniform", 0, 9, 5, 2.0, ()) == window_starts("uniform", 1, 9, 5, 2.0, ()) == (1.0,)
    assert window_starts("uniform", 3, 9, 5, 2.0, ()) == (0.0, 1.0, 2.0)
    assert window_starts("all", 0, 9, 3, 2.0, ()) == (0.0, 1.5, 3.0)


def test_random_windows_depend_on_the_whole_key_and_reach_every_position():
    drawn = [window_starts("random", 1, 14, 5, 1.0, (seed, clip))[0] for seed in range(10) for clip in range(40)]
    assert set(drawn) == set(map(float, range(10)))
    # Each position is expected 40 times, with a standard deviation of 6.
    assert all(20 <= drawn.count(position) <= 60 for position in set(drawn))
    assert drawn[:40] != drawn[40:80]
    assert drawn[0] == window_starts("random", 1, 14, 5, 1.0, (0, 0))[0]


@pytest.mark.parametrize(
    "arguments, match",
    [
        (("first", 1, 4, 5, 16.0, ()), "5 frames .* 4 frames"),
        (("first", 1, 5, 5, 0.0, ()), "0.0 fps"),
        (("last", 1, 5, 5, 16.0, ()), "'last'"),
    ],
)
def test_invalid_arguments_are_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        window_starts(*arguments)
