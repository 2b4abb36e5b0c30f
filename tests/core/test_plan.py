"""The plan's promises, each over random layouts: nothing lost, nothing twice, nothing that depends on the past."""

import gc
import json
import tracemalloc
from collections import Counter, defaultdict
from dataclasses import asdict, replace
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cogds.core.plan import UNEVENNESS, Origin, Plan
from cogds.errors import UserError

quick = settings(max_examples=60, deadline=None, derandomize=True)

FIXED = [
    (0, 1, 8, (8, 5)),
    (3, 1, 48, (39, 20, 5)),
    (0, 358208955, 3582089552, (4, 0)),
    (3, 358208955, 14328358212, (33, 15, 16)),
]

worlds = st.one_of(st.integers(1, 4), st.integers(5, 64))
accumulations = st.integers(1, 8)


@st.composite
def plans(draw, max_clips=50):
    """Uneven buckets (empty, single, smaller than the world), layouts up to 64 ranks x 8 x 4."""
    size = st.one_of(st.integers(0, 2), st.integers(0, max_clips))
    sizes = draw(st.lists(size, min_size=1, max_size=6).filter(any))
    batch_sizes = draw(st.lists(st.integers(1, 4), min_size=len(sizes), max_size=len(sizes)))
    return Plan(tuple(sizes), tuple(batch_sizes), draw(worlds), draw(accumulations), draw(st.integers(0, 99)))


layouts = st.tuples(worlds, accumulations, st.one_of(st.none(), st.integers(1, 4)))


def positions(micro):
    """All ranks' positions, one per slot."""
    return [k for rank in range(micro.world_size) for k in micro.positions_of(rank)]


def draws(micro):
    """{position: clip} of all ranks: each distinct position once, however many copies of it are trained."""
    drawn = {}
    for rank in range(micro.world_size):
        for position, clip in zip(micro.positions_of(rank), micro.clips_of(rank), strict=True):
            assert drawn.setdefault(position, clip) == clip
    return drawn


class Ledger:
    """Replays micro-batches in order and checks after each what must hold at every moment of a run."""

    def __init__(self, sizes):
        self.sizes, self.epoch = sizes, 0
        self.consumed = [0] * len(sizes)
        self.seen = [Counter(dict.fromkeys(range(n), 0)) for n in sizes]
        self.passes = defaultdict(list)

    def add(self, micro):
        assert micro.epoch >= self.epoch
        if micro.epoch > self.epoch:
            self.epoch = micro.epoch
            self.check(self.epoch - 1, self.epoch)
        drawn = draws(micro)
        # The stream goes on exactly where it stood: no position skipped, none twice.
        first = self.consumed[micro.bucket]
        assert sorted(drawn) == list(range(first, first + micro.num_draws))
        self.consumed[micro.bucket] += micro.num_draws
        self.seen[micro.bucket].update(drawn.values())
        for position, clip in drawn.items():
            self.passes[micro.bucket, position // self.sizes[micro.bucket]].append(clip)
        self.check(self.epoch - 1, self.epoch + 1)

    def check(self, fewest, most):
        for seen in self.seen:
            assert all(fewest <= times <= most for times in seen.values())

    def check_passes(self):
        for (bucket, number), clips in self.passes.items():
            assert len(set(clips)) == len(clips)
            if number < self.consumed[bucket] // self.sizes[bucket]:
                assert sorted(clips) == list(range(self.sizes[bucket]))


@given(plans())
@quick
def test_every_clip_once_a_pass_and_e_times_in_e_epochs(plan):
    ledger = Ledger(plan.sizes)
    step = 0
    while plan.epoch_of(step) < 3:
        for micro in plan.at(step):
            ledger.add(micro)
        step += 1
        assert plan.coverage(step) == tuple(ledger.consumed)
    ledger.check_passes()
    assert ledger.epoch >= 2


@given(plans(), st.integers(0, 10**12))
@quick
def test_one_shape_for_all_ranks(plan, step):
    for micro in plan.at(step):
        b, n = micro.bucket, plan.sizes[micro.bucket]
        lengths = {
            len(of(r)) for r in range(plan.world_size) for of in (micro.clips_of, micro.weights_of, micro.slots_of)
        }
        assert lengths == {micro.batch_size} == {plan.local_batch_sizes[b]}
        # As large as asked, unless the bucket is too small to give every slot a clip of its own.
        assert micro.batch_size == max(
            k for k in range(1, plan.batch_sizes[b] + 1) if k == 1 or k * plan.world_size <= n
        )
        copies = Counter(positions(micro))
        assert len(copies) == micro.num_draws == min(n, plan.world_size * micro.batch_size)
        assert max(copies.values()) - min(copies.values()) <= 1


@given(plans(), st.lists(st.integers(0, 10**6), min_size=2, max_size=6))
@quick
def test_a_step_does_not_depend_on_what_was_asked_before(plan, steps):
    asked = {step: plan.at(step) for step in steps}
    for step in reversed(steps):
        fresh = Plan(**{name: getattr(plan, name) for name in plan.__dataclass_fields__})
        assert plan.at(step) == fresh.at(step) == asked[step]


@given(plans(), st.lists(st.tuples(st.integers(0, 12), layouts), min_size=1, max_size=4), st.integers(0, 12))
@quick
def test_a_changed_layout_repeats_and_loses_nothing(plan, changes, last_steps):
    ledger = Ledger(plan.sizes)
    step = 0
    for num_steps, (world_size, accumulation, batch_size) in [*changes, (last_steps, (1, 1, None))]:
        for s in range(step, step + num_steps):
            for micro in plan.at(s):
                ledger.add(micro)
        step += num_steps
        batch_sizes = None if batch_size is None else [batch_size] * len(plan.sizes)
        plan = plan.resized(step, world_size, accumulation, batch_sizes)
        assert plan.coverage(step) == tuple(ledger.consumed)
        # Through a checkpoint and back.
        plan = replace(plan, origin=Origin(**json.loads(json.dumps(asdict(plan.origin)))))
        assert (plan.world_size, plan.accumulation) == (world_size, accumulation)
    end = plan.epoch_of(step) + 2
    while plan.epoch_of(step) < end:
        for micro in plan.at(step):
            ledger.add(micro)
        step += 1
    ledger.check_passes()


@given(plans(), st.integers(0, 30))
@quick
def test_resuming_with_the_same_layout_is_the_same_plan(plan, step):
    assert plan.resized(step, plan.world_size, plan.accumulation) is plan
    assert plan.resized(step, plan.world_size, plan.accumulation, list(plan.batch_sizes)) is plan


@given(plans(), st.integers(0, 40))
@quick
def test_every_clip_drawn_weighs_the_same_in_the_step(plan, step):
    micros = plan.at(step)
    num_draws = sum(len(set(positions(micro))) for micro in micros)
    for micro in micros:
        share = defaultdict(Fraction)
        for rank in range(plan.world_size):
            for k, weight in zip(micro.positions_of(rank), micro.weights_of(rank), strict=True):
                # The exact weight back from the nearest float: its denominator is at most 64 copies x 2048 draws.
                exact = Fraction(weight).limit_denominator(64 * 2048)
                assert float(exact) == weight
                share[k] += exact / (plan.world_size * plan.accumulation * micro.batch_size)
        assert set(share.values()) == {Fraction(1, num_draws)}
    if len({micro.num_draws for micro in micros}) == 1 and all(
        m.num_draws == plan.world_size * m.batch_size for m in micros
    ):
        assert {w for m in micros for rank in range(plan.world_size) for w in m.weights_of(rank)} == {1.0}


def test_weights_of_a_small_case():
    # Bucket 0: 3 ranks x 2 = 6 draws. Bucket 1: 2 clips for 3 ranks, so ranks 0 and 2 share clip 0.
    plan = Plan((6, 2), (2, 2), world_size=3, accumulation=2, seed=0)
    by_bucket = {micro.bucket: micro for micro in plan.at(0)}
    assert [by_bucket[0].weights_of(rank) for rank in range(3)] == [(12 / 8,) * 2] * 3
    assert [by_bucket[1].weights_of(rank) for rank in range(3)] == [(6 / 16,), (6 / 8,), (6 / 16,)]
    shared = [by_bucket[1].clips_of(rank) for rank in range(3)]
    assert shared[0] == shared[2] != shared[1]


@given(plans(), st.integers(0, 10**6))
@quick
def test_slots_number_the_whole_step(plan, step):
    micros = plan.at(step)
    slots = [slot for micro in micros for rank in range(plan.world_size) for slot in micro.slots_of(rank)]
    assert slots == list(range(sum(plan.world_size * micro.batch_size for micro in micros)))
    assert {micro.step_slots for micro in micros} == {len(slots)}


@given(st.lists(st.integers(0, 300), min_size=1, max_size=12).filter(any), st.integers(1, 3), st.integers(0, 99))
@quick
def test_buckets_take_turns_evenly(sizes, world_size, seed):
    assert_even(Plan(tuple(sizes), (1,) * len(sizes), world_size, 1, seed), epoch=seed % 3)


@pytest.mark.parametrize(
    "sizes",
    [
        # Fibonacci sizes chain the Huffman tree, where the errors of all levels add up.
        (1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377, 610),
        # A tree that is not Huffman's may hang the large bucket below all the small ones, and add up 100 errors.
        (*[1] * 100, 1000),
    ],
)
def test_buckets_take_turns_evenly_where_trees_are_deep(sizes):
    for seed in range(2):
        assert_even(Plan(sizes, (1,) * len(sizes), 1, 1, seed), epoch=1)


def assert_even(plan, epoch):
    start, end = plan.step_of_epoch(epoch), plan.step_of_epoch(epoch + 1)
    order = [plan.at(step)[0].bucket for step in range(start, end)]
    total, had = Counter(order), Counter()
    for num_turns, bucket in enumerate(order, start=1):
        had[bucket] += 1
        for b in total:
            assert abs(had[b] - num_turns * total[b] / len(order)) < UNEVENNESS


def test_two_equal_buckets_alternate():
    # The tightest case of evenness: never further apart than one.
    plan = Plan((500, 500), (1, 1), 1, 1, 0)
    order = [plan.at(step)[0].bucket for step in range(1000)]
    assert all(order[i] != order[i + 1] for i in range(0, 1000, 2))


def test_seeds_passes_and_buckets_have_their_own_order():
    def clips(seed, bucket, start):
        """One pass over a bucket of 60, as it is trained."""
        plan, order = Plan((60, 60), (1, 1), 1, 1, seed), {}
        for step in range(400):
            (micro,) = plan.at(step)
            if micro.bucket == bucket:
                order.update(draws(micro))
        return tuple(order[k] for k in range(start, start + 60))

    orders = {clips(seed, bucket, start) for seed in (0, 1) for bucket in (0, 1) for start in (0, 60, 120)}
    assert len(orders) == 12

    def turns(seed, epoch):
        plan = Plan((50, 40, 30), (1, 1, 1), 1, 1, seed)
        return tuple(plan.at(step)[0].bucket for step in range(120 * epoch, 120 * (epoch + 1)))

    assert len({turns(seed, epoch) for seed in (0, 1) for epoch in (0, 1, 2)}) == 6


def test_the_order_is_fixed_for_ever():
    # A run resumed with another version of this code must go on in the same order: change these and you break resume.
    plan = Plan((10, 3, 0, 40), (2, 2, 2, 3), world_size=4, accumulation=2, seed=7)
    assert [(m.bucket, m.epoch, m.start, m.clips_of(3)) for step in (3, 10**9) for m in plan.at(step)] == FIXED


@given(plans(), st.integers(0, 40))
@quick
def test_epochs_and_steps_agree(plan, epoch):
    step = plan.step_of_epoch(epoch)
    assert plan.epoch_of(step) >= epoch
    assert step == 0 or plan.epoch_of(step - 1) < epoch
    # Each of the buckets may be one micro-step behind the average.
    assert abs(step - epoch * plan.steps_per_epoch) <= len(plan.sizes) + 1
    # An epoch is one pass over all clips, give or take what one step draws of each.
    for drawn, n, d in zip(plan.coverage(step), plan.sizes, plan.num_draws):
        assert epoch * n - d < drawn <= epoch * n + d * plan.accumulation or n == 0


@given(plans(max_clips=10**7), st.integers(0, 10**13))
@quick
def test_far_steps_add_up(plan, step):
    before, after = plan.coverage(step), plan.coverage(step + 1)
    turns = [Fraction(drawn, d) for drawn, d in zip(before, plan.num_draws) if d]
    assert sum(turns) == step * plan.accumulation
    drawn = Counter()
    for micro in plan.at(step):
        assert micro.start == before[micro.bucket] + drawn[micro.bucket]
        drawn[micro.bucket] += micro.num_draws
    assert after == tuple(was + drawn[b] for b, was in enumerate(before))
    epoch = plan.epoch_of(step)
    assert all((epoch - 1) * n <= had <= (epoch + 1) * n for had, n in zip(before, plan.sizes))


def test_memory_does_not_grow_with_steps():
    plan = Plan(tuple(1_250_000 + 1000 * b for b in range(8)), (2,) * 8, 8, 1, 0)

    def traced(steps):
        for step in steps:
            micro = plan.at(step)[0]
            if step % 20 == 0:
                micro.clips_of(7)
        gc.collect()  # empties the interpreter's list of spare tuples, which is 100 kB of noise
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        before = traced(range(100))
        growth = traced(range(100, 10_100)) - before
    finally:
        tracemalloc.stop()
    assert growth < 10_000  # less than a byte a step


@pytest.mark.parametrize(
    "change, message",
    [
        ({"sizes": (3,)}, "1 buckets have 2 batch sizes"),
        ({"batch_sizes": (1, 0)}, "batch sizes must be at least 1, found 0"),
        ({"sizes": (3, -1)}, "cannot hold -1 clips"),
        ({"world_size": 0}, "world_size 0"),
        ({"accumulation": 0}, "accumulation 0"),
        ({"origin": Origin(0, 0, (1,))}, "origin has 1 buckets, the plan 2"),
        ({"origin": Origin(9, 2, (3, 10))}, "drawn 3 clips of bucket 0, which holds 5"),
        ({"origin": Origin(9, 0, (0, 8))}, "drawn 8 clips of bucket 1, which holds 7"),
    ],
)
def test_numbers_that_make_no_plan(change, message):
    valid = {"sizes": (5, 7), "batch_sizes": (1, 1), "world_size": 2, "accumulation": 1, "seed": 0}
    Plan(**valid)
    with pytest.raises(ValueError, match=message):
        Plan(**valid | change)


def test_nothing_to_train_on():
    with pytest.raises(UserError, match="none of the 2 buckets holds a clip"):
        Plan((0, 0), (1, 1), 1, 1, 0)


def test_what_lies_outside_the_plan():
    plan = Plan((5, 7), (1, 1), 2, 1, 0).resized(3, 1, 1)
    with pytest.raises(ValueError, match="step 2 lies before step 3"):
        plan.at(2)
    with pytest.raises(ValueError, match="step -1 lies before step 0"):
        Plan((5,), (1,), 1, 1, 0).at(-1)
    with pytest.raises(ValueError, match="rank 1 is not in a world of 1"):
        plan.at(3)[0].clips_of(1)
    with pytest.raises(ValueError, match="both count from 0"):
        Origin(step=-1)
