import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cogds.core.buckets import assign, crop_share
from cogds.core.geometry import ClipShape, check_shape
from cogds.core.suggest import (
    TOLERANCE,
    ClipSizes,
    count_sizes,
    crop_shares,
    fit,
    merge_sizes,
    suggest_areas,
    suggest_buckets,
    suggest_lengths,
)
from tests.core.test_buckets import V10, V15, shapes

AREA = 768 * 1360


def sizes(*rows: tuple[int, int, int, int]) -> ClipSizes:
    """rows: frames, height, width, count."""
    return ClipSizes(*np.array(rows, np.int64).reshape(-1, 4).T)


def test_sizes_are_counted():
    frames, height, width = (
        np.array([81, 500, 81, 20]),
        np.array([720, 721, 1080, 720]),
        np.array([1280, 1279, 1920, 1280]),
    )
    counted = count_sizes(frames, height, width, 81)
    rows = sorted(zip(*(column.tolist() for column in (counted.frames, counted.height, counted.width, counted.counts))))
    assert rows == [(20, 720, 1280, 1), (81, 720, 1280, 2), (81, 1080, 1920, 1)]
    assert len(counted) == 4
    parts = [count_sizes(frames[part], height[part], width[part], 81) for part in (slice(0, 1), slice(1, 4))]
    merged = merge_sizes(parts)
    assert sorted(zip(merged.frames, merged.height, merged.width, merged.counts)) == rows


@given(st.lists(st.tuples(*[st.integers(16, 4000)] * 4), min_size=1, max_size=5))
def test_crop_shares_equal_crop_share(rows):
    height, width, to_height, to_width = np.array(rows).T
    expected = [crop_share(h, w, ClipShape(1, th, tw)) for h, w, th, tw in rows]
    assert crop_shares(height, width, to_height, to_width) == pytest.approx(expected)


def test_the_fit_of_three_sizes():
    result = fit(sizes((81, 720, 1280, 2), (81, 360, 640, 1), (20, 720, 1280, 1)), shapes("81x720x720"))
    crop = 1 - 720 / 1280
    assert result.crop == pytest.approx(crop)
    assert result.upscaled == pytest.approx(1 / 3)
    assert result.too_short == pytest.approx(1 / 4)
    # The small clip is upscaled by 2, so three of four pixels are not in the file.
    assert result.misfit == pytest.approx((2 * crop + (1 - (1 - crop) / 4) + 1) / 4)
    assert fit(sizes(), shapes("81x720x720")).misfit == 0


def with_bucket(clips, buckets):
    """The clips that have a bucket."""
    rows = zip(clips.frames, clips.height, clips.width, clips.counts)
    return sizes(*(row for row in rows if assign(*row[:3], buckets) is not None))


SIZES = st.lists(
    st.tuples(st.integers(1, 120), st.integers(2, 300), st.integers(2, 300), st.integers(1, 1000)),
    min_size=1,
    max_size=12,
).map(lambda rows: sizes(*((frames, 8 * height, 8 * width, count) for frames, height, width, count in rows)))


@settings(max_examples=30)
@given(
    SIZES, st.sampled_from([["81x768x1360"], ["49x768x1360", "81x1360x768"], ["81x64x2048"]]),
    st.sampled_from([V15, V10]), st.integers(1, 24),
)  # fmt: skip
def test_suggestions_are_valid_and_never_worse(clips, texts, geometry, max_buckets):
    given_buckets = shapes(*texts)
    lengths = suggest_lengths(clips, [shape.frames for shape in given_buckets], geometry, 0.1)
    areas = suggest_areas(clips, [max(shape.height * shape.width for shape in given_buckets)], 0.25)
    suggestion = suggest_buckets(clips, given_buckets, areas, lengths, geometry, max_buckets)
    assert suggestion.before == fit(clips, given_buckets)
    assert suggestion.after == fit(clips, shapes(*suggestion.buckets))
    if suggestion.buckets != tuple(texts):
        assert suggestion.after.misfit < suggestion.before.misfit
        assert suggestion.after.too_short <= suggestion.before.too_short
        trained = with_bucket(clips, given_buckets)
        now, after = fit(trained, given_buckets), fit(trained, shapes(*suggestion.buckets))
        assert after.crop <= now.crop + TOLERANCE
        assert after.upscaled <= now.upscaled + TOLERANCE
        assert len(suggestion.buckets) <= max_buckets
        assert len(set(suggestion.buckets)) == len(suggestion.buckets)
        for shape in shapes(*suggestion.buckets):
            check_shape(shape, geometry)


def test_portrait_clips_get_a_portrait_bucket():
    suggestion = suggest_buckets(sizes((90, 1920, 1080, 100)), shapes("81x768x1360"), [AREA], [81], V15, 8)
    (bucket,) = shapes(*suggestion.buckets)
    assert bucket.frames == 81
    assert crop_share(1920, 1080, bucket) < 0.01
    assert abs(bucket.height * bucket.width / AREA - 1) < 0.03


def test_the_suggested_ratios_are_optimal():
    """Compared with every pair of sizes on a coarse grid."""
    rng = np.random.default_rng(0)
    clips = sizes(*((90, 8 * h, 8 * w, n) for h, w, n in rng.integers([60, 60, 1], [300, 300, 50], (40, 3))))
    area = 256 * 256
    suggestion = suggest_buckets(clips, shapes("81x32x512"), [area], [81], V15, 2)
    grid = [ClipShape(81, h, max(16, round(area / h / 16) * 16)) for h in range(128, 512, 16)]

    def cropped(buckets) -> float:
        return sum(
            count * min(crop_share(int(height), int(width), shape) for shape in buckets)
            for height, width, count in zip(clips.height, clips.width, clips.counts)
        )

    assert len(suggestion.buckets) == 2
    # 3% for the rounding of suggested buckets to valid sizes.
    assert cropped(shapes(*suggestion.buckets)) <= min(map(cropped, itertools.combinations(grid, 2))) * 1.03


@pytest.mark.parametrize(
    "lengths, rows, expected",
    [
        ([81], [(90, 720, 1280, 100)], [81]),
        ([81], [(90, 720, 1280, 95), (40, 720, 1280, 5)], [81]),  # few clips are too short
        ([81], [(90, 720, 1280, 50), (40, 720, 1280, 50)], [33, 81]),  # 16N+1
        ([81], [(90, 720, 1280, 50), (12, 720, 1280, 50)], [9, 81]),  # 4N+1, because no 16N+1 is short enough
        ([49, 81], [(60, 720, 1280, 100)], [49, 81]),
        ([81], [(90, 720, 1280, 50), (1, 720, 1280, 50)], [81]),  # images do not count as short videos
        ([81], [(90, 720, 1280, 80), (70, 720, 1280, 12), (20, 720, 1280, 8)], [65, 81]),  # 8% may be excluded
    ],
)
def test_lengths(lengths, rows, expected):
    assert suggest_lengths(sizes(*rows), lengths, V15, 0.1) == expected


def test_areas():
    assert suggest_areas(sizes((81, 720, 1280, 1)), [AREA], 0.25) == [AREA]  # nearly as large
    assert suggest_areas(sizes((81, 360, 640, 1)), [AREA], 0.25) == [360 * 640, AREA]
    assert suggest_areas(sizes((81, 360, 640, 1), (81, 1080, 1920, 9)), [AREA], 0.25) == [AREA]


def test_a_small_area_is_suggested_for_small_clips():
    clips = sizes((90, 360, 640, 50), (90, 1080, 1920, 50))
    suggestion = suggest_buckets(clips, shapes("81x768x1360"), [360 * 640, AREA], [81], V15, 8)
    assert [shape.height * shape.width < AREA / 2 for shape in shapes(*suggestion.buckets)] == [True, False]
    assert suggestion.after.misfit < 0.05 < 0.35 < suggestion.before.misfit
    assert assign(90, 1080, 1920, shapes(*suggestion.buckets)) is not None


def test_less_upscaling_is_no_reason_to_crop_more():
    """Two landscape sizes would not upscale the small clips, but crop two thirds of the portrait clips."""
    clips, given_buckets = sizes((90, 432, 768, 70), (90, 1360, 768, 30)), shapes("81x768x1360", "81x1360x768")
    areas, landscape = [432 * 768, AREA], shapes("81x432x768", "81x768x1360")
    assert fit(clips, landscape).misfit < fit(clips, given_buckets).misfit - 0.2
    assert suggest_buckets(clips, given_buckets, areas, [81], V15, 2).buckets == tuple(map(str, given_buckets))


def test_missing_lengths_are_added_to_the_given_sizes():
    clips = sizes((90, 768, 1360, 6), (1, 768, 1360, 4), (20, 768, 1360, 3))
    suggestion = suggest_buckets(clips, shapes("81x768x1360"), [AREA], [1, 17, 81], V15, 8)
    assert suggestion.buckets == ("1x768x1360", "17x768x1360", "81x768x1360")
    assert (suggestion.before.too_short, suggestion.after.too_short) == (pytest.approx(7 / 13), 0)
