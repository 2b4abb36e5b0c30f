"""Mixtures of datasets: how often each clip is trained."""

from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cogds.core.mixture import Mixture, caption_of_visit, repeats_from_weights
from cogds.core.plan import Plan
from cogds.errors import UserError

quick = settings(max_examples=60, deadline=None, derandomize=True)

some_repeats = st.sampled_from([0.05, 1 / 3, 0.5, 0.7, 1.0, 1.3, 2.0, 3.5, 10.0])


@st.composite
def mixtures(draw, repeats=some_repeats):
    num_sets = draw(st.integers(1, 3))
    sets = st.tuples(*[st.integers(0, 30)] * num_sets)
    sizes = draw(st.lists(sets, min_size=1, max_size=4).filter(lambda sizes: any(map(sum, sizes))))
    return Mixture(tuple(sizes), draw(st.tuples(*[repeats] * num_sets)), draw(st.integers(0, 99)))


def set_of(mixture, bucket, clip):
    first = 0
    for number, n in enumerate(mixture.sizes[bucket]):
        if clip < first + n:
            return number
        first += n
    raise AssertionError(f"clip {clip} is in no set")


@given(mixtures(), st.integers(1, 6))
@settings(quick, max_examples=40)
def test_every_clip_is_trained_as_often_as_its_data_set_repeats(mixture, num_passes):
    for bucket, (sets, virtual) in enumerate(zip(mixture.sizes, mixture.virtual_sets)):
        seen = Counter(dict.fromkeys(range(sum(sets)), 0))
        for position in range(num_passes * mixture.virtual_sizes[bucket]):
            seen[mixture.visit(bucket, position).clip] += 1
            if (position + 1) % mixture.virtual_sizes[bucket]:
                continue
            passes = (position + 1) // mixture.virtual_sizes[bucket]
            for clip, times in seen.items():
                number = set_of(mixture, bucket, clip)
                mean = Fraction(passes * virtual[number], sets[number])
                assert abs(times - mean) < 1
                assert abs(Fraction(virtual[number]) - sets[number] * Fraction(mixture.repeats[number])) < 1
        assert len(seen) == sum(sets)


@given(mixtures(), st.integers(0, 8))
@quick
def test_a_pass_repeats_a_clip_only_if_it_must(mixture, pass_number):
    for bucket, (sets, m) in enumerate(zip(mixture.sizes, mixture.virtual_sizes)):
        seen = Counter(mixture.visit(bucket, pass_number * m + i).clip for i in range(m))
        for clip, times in seen.items():
            number = set_of(mixture, bucket, clip)
            assert times <= -(-mixture.virtual_sets[bucket][number] // sets[number])


@given(mixtures(repeats=st.just(1.0)), st.integers(0, 99))
@quick
def test_with_one_repeat_virtual_clips_are_real_clips(mixture, first_step):
    assert mixture.virtual_sizes == tuple(map(sum, mixture.sizes))
    plan = Plan(mixture.virtual_sizes, (2,) * len(mixture.sizes), 3, 1, mixture.seed)
    for step in range(first_step, first_step + 5):
        (micro,) = plan.at(step)
        for rank in range(3):
            clips = tuple(mixture.visit(micro.bucket_of(rank), k).clip for k in micro.positions_of(rank))
            assert clips == micro.clips_of(rank)


@given(mixtures(repeats=st.sampled_from([0.3, 0.5, 1.0])), st.integers(1, 8), st.integers(0, 60), st.booleans())
@quick
def test_a_micro_step_repeats_a_clip_only_at_the_end_of_a_pass(mixture, world_size, step, by_cost):
    costs = (1.0,) * len(mixture.sizes) if by_cost else ()
    plan = Plan(mixture.virtual_sizes, (1,) * len(mixture.sizes), world_size, 1, mixture.seed, costs=costs)
    for part in plan.at(step)[0].parts:
        for pass_number in (0, 1):
            first = (part.start // part.num_clips + pass_number) * part.num_clips
            positions = [k for k in range(part.start, part.start + part.num_draws) if 0 <= k - first < part.num_clips]
            clips = [mixture.visit(part.bucket, k).clip for k in positions]
            assert len(set(clips)) == len(clips)


@given(mixtures(st.sampled_from([0.2, 0.5, 1.0, 2.0])), st.integers(0, 200), st.integers(1, 40))
@settings(quick, max_examples=20)
def test_substitutes_cover_the_bucket(mixture, position, stride):
    for bucket, sets in enumerate(mixture.sizes):
        if sum(sets):
            clips = [visit.clip for visit in mixture.next_visits(bucket, position, stride)]
            assert clips[:2] == [mixture.visit(bucket, position).clip, mixture.visit(bucket, position + stride).clip]
            assert set(clips) == set(range(sum(sets)))


@given(mixtures(), st.integers(1, 4))
@settings(quick, max_examples=40)
def test_the_visits_of_a_clip_are_numbered(mixture, num_passes):
    for bucket, num_virtual in enumerate(mixture.virtual_sizes):
        visits = [mixture.visit(bucket, position) for position in range(num_passes * num_virtual)]
        numbers = {clip: sorted(visit.number for visit in visits if visit.clip == clip) for clip, _ in visits}
        assert all(found == list(range(len(found))) for found in numbers.values())


@given(st.integers(1, 7), st.integers(0, 2**40), st.integers(0, 99))
@quick
def test_captions_take_turns(num_captions, row, seed):
    """After k visits per caption, each caption has been used k times."""
    captions = [caption_of_visit(number, num_captions, seed, row) for number in range(4 * num_captions)]
    for start in range(0, len(captions), num_captions):
        assert sorted(captions[start : start + num_captions]) == list(range(num_captions))


def test_captions_are_shuffled_in_every_turn_and_for_every_clip():
    """Each of the six orders of three captions comes about equally often."""
    for orders in (
        [tuple(caption_of_visit(3 * turn + k, 3, 0, 5) for k in range(3)) for turn in range(600)],
        [tuple(caption_of_visit(k, 3, 0, row) for k in range(3)) for row in range(600)],
        [tuple(caption_of_visit(k, 3, seed, 5) for k in range(3)) for seed in range(600)],
    ):
        counts = Counter(orders)
        assert len(counts) == 6
        assert min(counts.values()) > 70


def test_shares_by_weight():
    # With equal shares, 900 clips are trained 5/9 times per epoch, and 100 clips 5 times.
    repeats = repeats_from_weights((2.0, 2.0), (900, 100))
    assert repeats == pytest.approx((5 / 9, 5.0))
    mixture = Mixture(((600, 50), (300, 50)), repeats, 0)
    assert mixture.virtual_sets == ((333, 250), (167, 250))
    assert repeats_from_weights((9.0, 1.0), (900, 100)) == (1.0, 1.0)


def test_clips_do_not_change_between_versions():
    # If these values change, a run cannot be resumed with a new version of cogds.
    mixture = Mixture(((5, 4), (0, 3)), (0.5, 2.0), 7)
    assert mixture.virtual_sizes == (10, 6)
    assert [mixture.visit(0, k).clip for k in range(20, 30)] == [6, 5, 5, 3, 7, 8, 1, 6, 7, 8]
    assert [mixture.visit(1, k).clip for k in range(6)] == [0, 1, 2, 2, 1, 0]
    assert [caption_of_visit(number, 3, 7, 11) for number in range(9)] == [2, 0, 1, 2, 1, 0, 2, 0, 1]


@pytest.mark.parametrize(
    "sizes, repeats, message",
    [
        (((1, 2),), (1.0,), r"sizes .* 1 value"),
        (((1,),), (0.0,), "repeats"),
        (((1,),), (float("nan"),), "repeats"),
        (((-1,),), (1.0,), r"sizes .*-1"),
    ],
)
def test_invalid_mixtures_are_refused(sizes, repeats, message):
    with pytest.raises(ValueError, match=message):
        Mixture(sizes, repeats, 0)


def test_invalid_weights_are_refused():
    with pytest.raises(UserError, match=r"data\.sets\[1\]"):
        repeats_from_weights((1.0, 2.0), (5, 0))
    with pytest.raises(UserError, match=r"data\.sets\[0\]\.weight: 0\.0"):
        repeats_from_weights((0.0, 2.0), (5, 3))
    with pytest.raises(ValueError, match=r"weights: 1 .* 2 "):
        repeats_from_weights((1.0,), (5, 3))
