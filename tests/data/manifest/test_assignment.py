import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cogds.core.buckets import assign, assign_all
from cogds.core.geometry import ClipShape
from cogds.data.manifest.assignment import WindowRule, assign_rows, too_short_reasons
from cogds.data.manifest.assignment import num_frames_at as num_frames_of_rows
from cogds.data.video.media import VideoInfo, num_frames_at

BUCKETS = (ClipShape(17, 64, 96), ClipShape(9, 96, 64), ClipShape(33, 64, 96), ClipShape(1, 64, 64))


def manifest(*clips):
    """Rows from (frames, duration_s, width, height, start_s, end_s, set, status)."""
    names = ("frames", "duration_s", "width", "height", "start_s", "end_s", "set", "status")
    types = (pa.int32(), pa.float64(), pa.int32(), pa.int32(), pa.float64(), pa.float64(), pa.int16(), pa.string())
    columns = {name: pa.array(list(column), kind) for name, column, kind in zip(names, zip(*clips), types)}
    return pa.table({"path": [f"{row}.mp4" for row in range(len(clips))], **columns})


CLIPS = [
    (48, 3.0, 96, 64, None, None, 0, "ok"),
    (10, 0.625, 64, 96, None, None, 1, "ok"),
    (None, None, None, None, None, None, 0, "unusable"),
    (480, 30.0, 192, 128, 2.0, 3.5, 0, "ok"),
    (1, 0.0, 50, 50, None, None, 0, "ok"),
    (48, 3.0, 96, 64, None, None, 1, "ok"),
]


@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(0, 300), st.integers(0, 300)), min_size=1, max_size=30),
    st.sets(st.integers(0, 3), min_size=1),
)
def test_assign_all_equals_assign(clips, chosen):
    buckets = [BUCKETS[number] for number in sorted(chosen)]
    frames, height, width = map(np.array, zip(*clips))
    expected = [assign(f, h, w, buckets) if h and w else None for f, h, w in clips]
    assert assign_all(frames, height, width, buckets).tolist() == [
        -1 if bucket is None else bucket for bucket in expected
    ]


@given(
    st.integers(1, 400),
    st.sampled_from([8.0, 16.0, 23.976, 25.0, 29.97, 30.0, 60.0]),
    st.sampled_from([12.0, 16.0, 24.0]),
    st.floats(0, 3),
    st.floats(0.05, 30),
)
def test_frames_are_counted_as_by_the_decoder(num_frames, rate, fps, start_s, length_s):
    info = VideoInfo(num_frames, rate, 10, 10, num_frames / rate)
    for start, end in ((None, None), (start_s, None), (start_s, start_s + length_s)):
        table = manifest((num_frames, info.duration_s, 10, 10, start, end, 0, "ok"))
        assert num_frames_of_rows(table, fps)[0] == num_frames_at(info, fps, start or 0.0, end)


def test_windows_are_in_order_of_bucket_data_set_and_row():
    assigned = assign_rows(manifest(*CLIPS), BUCKETS, WindowRule(16), num_sets=2)
    # The longest that fits: 33 for 48 frames, 17 for 1.5 s, 9 for the portrait clip of 10 frames.
    assert assigned.row_buckets.tolist() == [2, 1, -1, 0, 3, 2]
    assert assigned.rows.tolist() == [3, 1, 0, 5, 4]
    assert assigned.sizes == ((1, 0), (0, 1), (1, 1), (1, 0))
    assert assigned.starts_s.tolist() == [2.0, 0, 0, 0, 0]
    assert assigned.buckets.tolist() == [0, 1, 2, 2, 3]


def test_windows_are_within_their_range():
    table = manifest((480, 30.0, 96, 64, 5.0, 15.0, 0, "ok"), (48, 3.0, 96, 64, None, None, 0, "ok"))
    every = assign_rows(table, BUCKETS[:1], WindowRule(16, "all", 0, seed=0), num_sets=1)
    assert every.sizes == ((9 + 2,),)
    assert np.allclose(every.starts_s, [5 + 17 / 16 * k for k in range(9)] + [0, 17 / 16])
    uniform = assign_rows(table, BUCKETS[:1], WindowRule(16, "uniform", 3, seed=0), num_sets=1)
    assert uniform.rows.tolist() == [0, 0, 0, 1, 1, 1]
    assert (uniform.starts_s[0], uniform.starts_s[2]) == (5.0, pytest.approx(5 + (160 - 17) / 16))
    random, again, other = (
        assign_rows(table, BUCKETS[:1], WindowRule(16, "random", seed=seed), num_sets=1) for seed in (0, 0, 1)
    )
    assert 5 <= random.starts_s[0] <= 15 - 17 / 16
    assert random.starts_s.tolist() == again.starts_s.tolist() != other.starts_s.tolist()


def test_a_clip_that_is_too_short_for_every_bucket_has_a_reason():
    table = manifest(*CLIPS)
    assigned = assign_rows(table, BUCKETS[:1], WindowRule(16), num_sets=2)
    reasons = too_short_reasons(assigned, table, BUCKETS[:1], 16)
    assert sorted(reasons) == [1, 4]
    assert all("17" in reason for reason in reasons.values())
    assert reasons[1].startswith("too short: ")
    assert reasons[4].startswith("image without a 1-frame bucket: ")
    assert "10 frames" in reasons[1]
