import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cogds.core.buckets import assign, crop_share, generate_buckets, parse_buckets
from cogds.core.geometry import ClipShape, check_shape
from cogds.errors import UserError
from tests.published_model import PUBLISHED, V15

V10 = PUBLISHED["CogVideoX-5b"]


def shapes(*texts: str) -> tuple[ClipShape, ...]:
    return tuple(ClipShape.parse(text) for text in texts)


def test_parse_keeps_the_order():
    assert parse_buckets(["81x768x1360", "1x256x256"], V15) == shapes("81x768x1360", "1x256x256")


@pytest.mark.parametrize(
    "texts, match",
    [
        (["81x768"], "'81x768'"),
        (["80x768x1360"], "80x768x1360 .* 81x768x1360"),
        (["81x768x1360", "9x32x32", "81x768x1360"], r"data\.buckets: 81x768x1360"),
        (["81x768x2416"], "81x768x2416 .* 2400"),
    ],
)
def test_parse_errors(texts, match):
    with pytest.raises(UserError, match=match):
        parse_buckets(texts, V15)


def test_generate_known_sizes():
    buckets = generate_buckets(["768x1360"], ["16/9", "9/16", "1/1"], [81, 1], V15)
    assert buckets == tuple(sorted(shapes(
        "1x768x1360", "1x1360x768", "1x1024x1024", "81x768x1360", "81x1360x768", "81x1024x1024"
    )))  # fmt: skip


def test_a_short_side_gives_sizes_allowed_by_the_model_card():
    buckets = generate_buckets(["768p"], ["16/9", "4/3", "1/1", "3/4", "9/16"], [81], V15)
    assert buckets == tuple(sorted(shapes(
        "81x768x1360", "81x768x1024", "81x768x768", "81x1024x768", "81x1360x768"
    )))  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.integers(16, 4000), st.integers(16, 4000)), min_size=1, max_size=3),
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=3),
    st.lists(st.integers(0, 40).map(lambda n: 4 * n + 1), min_size=1, max_size=3),
    st.sampled_from([V15, V10]),
)
def test_generated_buckets_fit_the_model(areas, ratios, frames, geometry):
    buckets = generate_buckets([f"{h}x{w}" for h, w in areas], [f"{w}/{h}" for w, h in ratios], frames, geometry)
    assert list(buckets) == sorted(set(buckets))
    step, largest = geometry.pixel_multiple, max(h * w for h, w in areas)
    for shape in buckets:
        check_shape(shape, geometry)
        if step in (shape.height, shape.width):  # the smallest side: neither ratio nor size is exact
            continue
        # Each side is within half a step of the exact one.
        low = (shape.width - step / 2) / (shape.height + step / 2)
        high = (shape.width + step / 2) / (shape.height - step / 2)
        assert any(low <= width / height <= high for width, height in ratios)
        assert (shape.height - step / 2) * (shape.width - step / 2) <= largest * 1.000001


@pytest.mark.parametrize(
    "areas, ratios, frames", [(["768"], ["1/1"], [1]), (["0p"], ["1/1"], [1]), (["9x9"], ["1:1"], [1]),
                              (["9x9"], ["0/1"], [1]), (["768x1360"], ["16/9"], [80])]
)  # fmt: skip
def test_generate_refuses(areas, ratios, frames):
    with pytest.raises(UserError):
        generate_buckets(areas, ratios, frames, V15)


def test_crop_share():
    assert crop_share(720, 1280, ClipShape(1, 720, 1280)) == 0
    assert crop_share(100, 200, ClipShape(1, 64, 64)) == pytest.approx(0.5)
    assert crop_share(200, 100, ClipShape(1, 64, 64)) == pytest.approx(0.5)


@pytest.mark.parametrize(
    "clip, texts, chosen",
    [
        ((80, 720, 1280), ["81x720x1280"], None),  # too short
        ((81, 720, 1280), ["81x720x1280"], 0),
        ((1, 720, 1280), ["81x720x1280", "1x720x1280"], 1),  # an image
        ((500, 720, 1280), ["49x720x1280", "81x720x1280", "1x720x1280"], 1),  # the longest
        ((500, 720, 1280), ["81x1280x720", "9x720x1280"], 1),  # shape before length
        ((500, 720, 1280), ["81x768x1360", "49x720x1280"], 0),  # nearly the same share, so the longest
        ((500, 720, 1280), ["81x352x640", "81x720x1280", "81x1088x1920"], 1),  # the largest without upscaling
        ((500, 240, 426), ["81x1088x1920", "81x720x1280"], 1),  # all upscale, so the smallest
        ((500, 720, 1280), ["81x640x640", "81x640x640"], 0),  # the first of equal buckets
        ((81, 1080, 1920), ["17x64x96", "1x64x112"], 0),  # a video bucket, although the image bucket crops less
        ((9, 1080, 1920), ["17x64x96", "1x64x112"], 1),  # too short for the video bucket
    ],
)
def test_assign(clip, texts, chosen):
    assert assign(*clip, shapes(*texts)) == chosen


@given(
    st.integers(1, 200), st.integers(16, 2000), st.integers(16, 2000),
    st.lists(st.builds(ClipShape, st.sampled_from([1, 9, 49, 81]), st.integers(16, 900), st.integers(16, 900)),
             max_size=6),
)  # fmt: skip
def test_assigned_bucket_is_short_enough_and_crops_little(num_frames, height, width, buckets):
    index = assign(num_frames, height, width, buckets)
    fitting = [shape for shape in buckets if shape.frames <= num_frames]
    fitting = [shape for shape in fitting if shape.frames > 1] or fitting
    if index is None:
        assert not fitting
    else:
        assert buckets[index] in fitting
        least = min(crop_share(height, width, shape) for shape in fitting)
        assert crop_share(height, width, buckets[index]) <= least + 0.05 + 1e-9
