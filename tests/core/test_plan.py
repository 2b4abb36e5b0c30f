"""What the plan guarantees, over random layouts: no clip is lost or repeated, and no step depends on earlier calls."""

import gc
import hashlib
import importlib.util
import json
import sys
import tracemalloc
from collections import Counter, defaultdict
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cogds.core.plan import UNEVENNESS, Origin, Plan, max_batches_per_micro_step
from cogds.errors import UserError

quick = settings(max_examples=60, deadline=None, derandomize=True)

worlds = st.one_of(st.integers(1, 4), st.integers(5, 64))
accumulations = st.integers(1, 8)


@st.composite
def plans(draw, max_clips=50, modes=("bucket", "cost")):
    """Uneven buckets (empty, single clips, smaller than the world), up to 64 ranks x 8 x 4, with and without costs."""
    size = st.one_of(st.integers(0, 2), st.integers(0, max_clips))
    sizes = draw(st.lists(size, min_size=1, max_size=6).filter(any))
    batch_sizes = draw(st.lists(st.integers(1, 4), min_size=len(sizes), max_size=len(sizes)))
    costs = draw(costs_of(batch_sizes)) if draw(st.sampled_from(modes)) == "cost" else ()
    return Plan(
        tuple(sizes), tuple(batch_sizes), draw(worlds), draw(accumulations), draw(st.integers(0, 99)), costs=costs
    )


def costs_of(batch_sizes):
    """Costs that form groups, because some are within the tolerance of each other."""
    batch_costs = st.sampled_from([12.0, 12.2, 12.3, 6.0, 6.1])
    return st.tuples(*(batch_costs.map(lambda cost, b=b: cost / b) for b in batch_sizes))


layouts = st.tuples(worlds, accumulations, st.one_of(st.none(), st.integers(1, 4)), st.booleans())


def positions(micro):
    """(bucket, position) of every slot of all ranks."""
    return [(micro.bucket_of(rank), k) for rank in range(micro.world_size) for k in micro.positions_of(rank)]


def draws(micro):
    """{(bucket, position): clip} of all ranks. Copies of a position must have the same clip."""
    drawn = {}
    for rank in range(micro.world_size):
        for position, clip in zip(micro.positions_of(rank), micro.clips_of(rank), strict=True):
            assert drawn.setdefault((micro.bucket_of(rank), position), clip) == clip
    return drawn


def only(micro):
    """The part of a micro-step in which all ranks train the same bucket."""
    (part,) = micro.parts
    return part


class Ledger:
    """Replays micro-steps in order and checks the invariants of a run after each."""

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
        # Every stream continues at its position: none is skipped or repeated.
        expected = []
        for part in micro.parts:
            first = self.consumed[part.bucket]
            expected += [(part.bucket, k) for k in range(first, first + part.num_draws)]
            self.consumed[part.bucket] += part.num_draws
        assert list(drawn) == expected
        for (bucket, position), clip in drawn.items():
            self.seen[bucket][clip] += 1
            self.passes[bucket, position // self.sizes[bucket]].append(clip)
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
def test_every_clip_is_trained_once_per_pass_and_e_times_in_e_epochs(plan):
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
def test_a_rank_trains_one_shape_and_all_ranks_one_cost(plan, step):
    for micro in plan.at(step):
        for rank in range(plan.world_size):
            size = plan.local_batch_sizes[micro.bucket_of(rank)]
            assert size == micro.batch_size_of(rank) <= plan.batch_sizes[micro.bucket_of(rank)]
            assert {size} == {len(of(rank)) for of in (micro.clips_of, micro.weights_of, micro.slots_of)}
        buckets = {micro.bucket_of(rank) for rank in range(plan.world_size)}
        (group,) = [group for group in plan.groups if buckets & set(group)]
        assert buckets <= set(group)
        if len(group) > 1:
            batch_costs = [plan.costs[b] * plan.local_batch_sizes[b] for b in group]
            assert max(batch_costs) <= min(batch_costs) * (1 + plan.tolerance)
        copies = Counter(positions(micro))
        assert len(copies) == micro.num_draws
        assert max(copies.values()) - min(copies.values()) <= 1
        # Ranks train copies only if the micro-step draws the whole group in batches of one clip.
        if max(copies.values()) > 1:
            assert max(micro.batch_size_of(rank) for rank in range(plan.world_size)) == 1
            assert micro.num_draws == sum(plan.sizes[b] for b in group)


@given(plans(modes=("bucket",)), st.integers(0, 10**12))
@quick
def test_without_costs_all_ranks_train_the_same_bucket(plan, step):
    assert plan.groups == tuple((b,) for b in range(len(plan.sizes)))
    for micro in plan.at(step):
        part = only(micro)
        b, n = part.bucket, part.num_clips
        # The given batch size, unless the bucket is too small to give every slot its own clip.
        assert part.batch_size == max(
            k for k in range(1, plan.batch_sizes[b] + 1) if k == 1 or k * plan.world_size <= n
        )
        assert part.num_draws == min(n, plan.world_size * part.batch_size)


@given(plans(modes=("cost",)), st.integers(0, 400))
@quick
def test_a_clip_is_repeated_in_a_micro_step_only_at_the_end_of_a_pass(plan, step):
    for micro in plan.at(step):
        for part in micro.parts:
            passes = {k // part.num_clips for k in range(part.start, part.start + part.num_draws)}
            assert len(passes) <= 2
            # With batches of one clip, a bucket's share never exceeds the bucket.
            if all(p.batch_size == 1 for p in micro.parts):
                assert part.num_draws <= part.num_clips


def test_groups_are_few_and_exact():
    costs = (100.0, 97.0, 97.2, 50.0, 48.6, 1.0, 100.0)
    plan = Plan((9,) * 6 + (0,), (1, 1, 1, 2, 2, 1, 1), 4, 1, 0, costs=costs)
    # The batches cost 100, 97, 97.2, 100, 97.2 and 1. 100 / 97 - 1 is 3.09%.
    assert plan.groups == ((0, 2, 3, 4), (1,), (5,), (6,))
    assert len(replace(plan, tolerance=0.031).groups) == 3
    assert len(replace(plan, tolerance=0.0).groups) == 5


def test_a_small_group_gets_smaller_batches():
    # 40 clips make only 10 batches of 4, too few for 16 ranks. In batches of 2, both buckets still cost the same.
    plan = Plan((20, 20), (4, 4), 16, 1, 0, costs=(1.0, 1.01))
    assert (plan.groups, plan.local_batch_sizes) == (((0, 1),), (2, 2))
    # 4 clips of one bucket cost as much as 2 of the other, and so do halves of these batches.
    plan = Plan((30, 14), (4, 2), 20, 1, 0, costs=(1.0, 2.0))
    assert (plan.groups, plan.local_batch_sizes) == (((0, 1),), (2, 1))
    # Each bucket is smaller than the world, but together they fill it without copies.
    plan = Plan((5,) * 8, (1,) * 8, 32, 1, 0, costs=(1.0,) * 8)
    for step in range(10):
        (micro,) = plan.at(step)
        assert micro.num_batches == 32 == micro.num_draws
        assert {weight for rank in range(32) for weight in micro.weights_of(rank)} == {1.0}


@given(plans(), st.lists(st.integers(0, 10**6), min_size=2, max_size=6))
@quick
def test_a_step_does_not_depend_on_earlier_calls(plan, steps):
    before = {step: plan.at(step) for step in steps}
    for step in reversed(steps):
        assert plan.at(step) == replace(plan).at(step) == before[step]


@given(plans(), st.lists(st.tuples(st.integers(0, 12), layouts), min_size=1, max_size=4), st.integers(0, 12))
@settings(quick, max_examples=30)
def test_a_new_layout_repeats_and_loses_no_clip(plan, changes, last_steps):
    ledger = Ledger(plan.sizes)
    step = 0
    costs = plan.costs or (1.0,) * len(plan.sizes)
    for num_steps, (world_size, accumulation, batch_size, by_cost) in [*changes, (last_steps, (1, 1, None, False))]:
        for s in range(step, step + num_steps):
            for micro in plan.at(s):
                ledger.add(micro)
        step += num_steps
        batch_sizes = None if batch_size is None else [batch_size] * len(plan.sizes)
        plan = plan.resized(step, world_size, accumulation, batch_sizes, costs if by_cost else ())
        assert plan.coverage(step) == tuple(ledger.consumed)
        # The origin is saved in a checkpoint as JSON.
        plan = replace(plan, origin=Origin(**json.loads(json.dumps(asdict(plan.origin)))))
        assert (plan.world_size, plan.accumulation) == (world_size, accumulation)
    end = plan.epoch_of(step) + 2
    while plan.epoch_of(step) < end:
        for micro in plan.at(step):
            ledger.add(micro)
        step += 1
    ledger.check_passes()


@pytest.mark.parametrize(
    "sizes, batch_sizes, world_size, origin",
    [
        # When two buckets become a group, one lags an epoch behind the other. A micro-step draws nearly all of both.
        ((4, 20), (1, 1), 15, Origin(9, 1, (0, 40))),
        # Batches span two passes in a group with hardly more batches than ranks.
        ((9, 6, 20), (4, 4, 4), 8, Origin(14, 5, (41, 27, 96))),
    ],
)
def test_groups_of_buckets_with_very_different_progress(sizes, batch_sizes, world_size, origin):
    costs = tuple(1 / batch for batch in batch_sizes)
    plan = Plan(sizes, batch_sizes, world_size, 1, 0, origin, costs)
    for epoch in range(origin.epoch + 1, origin.epoch + 40):
        step = plan.step_of_epoch(epoch)
        assert plan.epoch_of(step) == epoch
        assert all((epoch - 1) * n <= drawn <= epoch * n for drawn, n in zip(plan.coverage(step), sizes))


@given(plans(), st.integers(0, 30))
@quick
def test_resuming_with_the_same_layout_is_the_same_plan(plan, step):
    assert plan.resized(step, plan.world_size, plan.accumulation) is plan
    assert plan.resized(step, plan.world_size, plan.accumulation, list(plan.batch_sizes), list(plan.costs)) is plan


@given(plans(), st.integers(0, 40))
@quick
def test_every_clip_drawn_has_the_same_weight_in_the_step(plan, step):
    micros = plan.at(step)
    num_draws = sum(len(set(positions(micro))) for micro in micros)
    for micro in micros:
        share = defaultdict(Fraction)
        for rank in range(plan.world_size):
            for k, weight in zip(micro.positions_of(rank), micro.weights_of(rank), strict=True):
                # The exact weight has a denominator of at most 64 copies x 2048 draws.
                exact = Fraction(weight).limit_denominator(64 * 2048)
                assert float(exact) == weight
                batch_size = micro.batch_size_of(rank)
                share[micro.bucket_of(rank), k] += exact / (plan.world_size * plan.accumulation * batch_size)
        assert set(share.values()) == {Fraction(1, num_draws)}
    sizes = {micro.batch_size_of(rank) for micro in micros for rank in range(plan.world_size)}
    if len(sizes) == 1 and all(micro.num_batches == plan.world_size for micro in micros):
        assert {w for m in micros for rank in range(plan.world_size) for w in m.weights_of(rank)} == {1.0}


def test_weights_of_copies():
    # Bucket 0: 3 ranks x 2 = 6 draws. Bucket 1: 2 clips for 3 ranks, so ranks 0 and 2 train the same clip.
    plan = Plan((6, 2), (2, 2), world_size=3, accumulation=2, seed=0)
    by_bucket = {micro.bucket_of(0): micro for micro in plan.at(0)}
    assert [by_bucket[0].weights_of(rank) for rank in range(3)] == [(12 / 8,) * 2] * 3
    assert [by_bucket[1].weights_of(rank) for rank in range(3)] == [(6 / 16,), (6 / 8,), (6 / 16,)]
    shared = [by_bucket[1].clips_of(rank) for rank in range(3)]
    assert shared[0] == shared[2] != shared[1]


def test_weights_of_ranks_with_different_batch_sizes():
    # Two clips of one bucket cost as much as a clip of the other. A micro-step of 3 ranks draws 4 or 5 clips.
    plan = Plan((60, 30), (2, 1), world_size=3, accumulation=1, seed=0, costs=(1.0, 2.0))
    cases = set()
    for step in range(20):
        (micro,) = plan.at(step)
        for rank in range(3):
            size = micro.batch_size_of(rank)
            cases.add((micro.num_draws, size))
            assert micro.weights_of(rank) == (3 * size / micro.num_draws,) * size
    assert len(cases) >= 3


@given(plans(), st.integers(0, 10**6))
@quick
def test_slots_are_numbered_over_the_whole_step(plan, step):
    micros = plan.at(step)
    slots = [slot for micro in micros for rank in range(plan.world_size) for slot in micro.slots_of(rank)]
    assert slots == list(range(sum(micro.num_slots for micro in micros)))
    assert {micro.step_slots for micro in micros} == {len(slots)}


@given(st.lists(st.integers(0, 99), min_size=1, max_size=12).filter(any), st.integers(1, 3), st.integers(0, 99))
@settings(quick, max_examples=40)
def test_buckets_take_turns_evenly(sizes, world_size, seed):
    assert_even(Plan(tuple(sizes), (1,) * len(sizes), world_size, 1, seed), epoch=seed % 3)


@pytest.mark.parametrize(
    "sizes",
    [
        # The Huffman tree of Fibonacci sizes is a chain, in which the errors of all levels add up.
        (1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377, 610),
        # In a tree that is not Huffman's, the large bucket may be below all small ones, with the sum of 100 errors.
        (*[1] * 100, 1000),
    ],
)
def test_buckets_take_turns_evenly_in_deep_trees(sizes):
    assert_even(Plan(sizes, (1,) * len(sizes), 1, 1, 0), epoch=1)


def assert_even(plan, epoch):
    start, end = plan.step_of_epoch(epoch), plan.step_of_epoch(epoch + 1)
    order = [plan.at(step)[0].bucket_of(0) for step in range(start, end)]
    total, drawn = Counter(order), Counter()
    for num_turns, bucket in enumerate(order, start=1):
        drawn[bucket] += 1
        for b in total:
            assert abs(drawn[b] - num_turns * total[b] / len(order)) < UNEVENNESS


def test_two_equal_buckets_alternate():
    plan = Plan((500, 500), (1, 1), 1, 1, 0)
    order = [plan.at(step)[0].bucket_of(0) for step in range(1000)]
    assert all(order[i] != order[i + 1] for i in range(0, 1000, 2))


def test_seeds_passes_and_buckets_have_their_own_order():
    def clips(seed, bucket, start):
        """The clips of a pass over a bucket of 60."""
        plan, order = Plan((60, 60), (1, 1), 1, 1, seed), {}
        for step in range(400):
            order |= draws(plan.at(step)[0])
        return tuple(order[bucket, k] for k in range(start, start + 60))

    orders = {clips(seed, bucket, start) for seed in (0, 1) for bucket in (0, 1) for start in (0, 60, 120)}
    assert len(orders) == 12

    def turns(seed, epoch):
        plan = Plan((50, 40, 30), (1, 1, 1), 1, 1, seed)
        return tuple(plan.at(step)[0].bucket_of(0) for step in range(120 * epoch, 120 * (epoch + 1)))

    assert len({turns(seed, epoch) for seed in (0, 1) for epoch in (0, 1, 2)}) == 6


# If the values of the next three tests change, a run cannot be resumed with a new version of cogds.


def test_the_order_does_not_change_between_versions():
    plan = Plan((10, 3, 0, 40), (2, 2, 2, 3), world_size=4, accumulation=2, seed=7)
    micros = [m for step in (3, 10**9) for m in plan.at(step)]
    assert [(only(m).bucket, m.epoch, only(m).start, m.clips_of(3)) for m in micros] == [
        (0, 1, 8, (8, 5)), (3, 1, 48, (39, 20, 5)),
        (0, 358208955, 3582089552, (4, 0)), (3, 358208955, 14328358212, (33, 15, 16)),
    ]  # fmt: skip
    assert [(m.bucket_of(0), m.clips_of(0)) for step in range(6) for m in plan.at(step)] == [
        (3, (27, 37, 35)), (3, (10, 2, 3)), (0, (3, 5)), (3, (24, 30, 7)), (1, (0,)), (3, (36, 17, 20)),
        (0, (9, 8)), (3, (37, 7, 34)), (3, (11, 23, 19)), (1, (2,)), (3, (13, 27, 2)), (0, (3, 6)),
    ]  # fmt: skip
    assert plan.resized(3, 2, 1).origin == Origin(3, 1, (8, 3, 0, 48))


@pytest.mark.parametrize(
    "layout, digest",
    [
        (((10, 3, 0, 40), (2, 2, 2, 3), 4, 2, 7), "09ba255f740c2892"),
        (((5, 100, 37), (1, 4, 2), 8, 1, 3), "bf725076d343f8da"),
        (((1, 2, 3, 500), (1, 1, 1, 2), 64, 3, 11), "b55be1542f30a06d"),
    ],
)
def test_every_value_of_every_rank_does_not_change_between_versions(layout, digest):
    state, first_plan = hashlib.blake2b(digest_size=8), Plan(*layout)
    for plan, steps in ((first_plan, (0, 1, 2, 3, 17, 10**9)), (first_plan.resized(5, 3, 2), (5, 6, 7, 30))):
        for micro in (micro for step in steps for micro in plan.at(step)):
            for r in range(plan.world_size):
                of_rank = (micro.positions_of(r), micro.clips_of(r), micro.weights_of(r), tuple(micro.slots_of(r)))
                part = only(micro)
                state.update(repr((part.bucket, micro.epoch, part.start, *of_rank, micro.step_slots)).encode())
        totals = (plan.coverage(steps[-1]), plan.step_of_epoch(4), plan.epoch_of(100), plan.steps_per_epoch)
        state.update(repr(totals).encode())
    assert state.hexdigest() == digest


def test_the_order_of_groups_does_not_change_between_versions():
    plan = Plan((10, 3, 0, 40), (2, 2, 2, 3), world_size=4, accumulation=1, seed=7, costs=(3.0, 3.0, 2.0, 2.0))
    batches = [[(m.bucket_of(r), *m.clips_of(r)) for r in range(4)] for step in (2, 10**9) for m in plan.at(step)]
    assert batches == [
        [(0, 4, 1), (3, 13, 11, 33), (3, 6, 0, 26), (3, 4, 28, 15)],
        [(1, 0, 1), (3, 27, 30, 31), (3, 25, 9, 0), (3, 10, 16, 13)],
    ]


@given(plans(), st.integers(0, 40))
@quick
def test_epochs_and_steps_agree(plan, epoch):
    step = plan.step_of_epoch(epoch)
    assert plan.epoch_of(step) >= epoch
    assert step == 0 or plan.epoch_of(step - 1) < epoch
    # Each group may be a micro-step behind the mean.
    assert abs(step - epoch * plan.steps_per_epoch) <= len(plan.groups) + 1
    # An epoch is a pass over all clips, up to the draws of one step.
    for group in plan.groups:
        drawn = sum(plan.coverage(step)[b] for b in group)
        n = sum(plan.sizes[b] for b in group)
        d = plan.world_size * max(plan.local_batch_sizes[b] for b in group)
        d += sum(plan.local_batch_sizes[b] - 1 for b in group)
        assert epoch * n - d < drawn <= epoch * n + d * plan.accumulation


@given(plans(max_clips=10**7), st.integers(0, 10**13))
@quick
def test_counts_of_distant_steps_add_up(plan, step):
    before, after = plan.coverage(step), plan.coverage(step + 1)
    drawn = Counter()
    for micro in plan.at(step):
        for part in micro.parts:
            assert part.start == before[part.bucket] + drawn[part.bucket]
            drawn[part.bucket] += part.num_draws
    assert after == tuple(num + drawn[b] for b, num in enumerate(before))
    num_batches = [Fraction(num, batch) for num, batch in zip(before, plan.local_batch_sizes)]
    assert all(num.denominator == 1 for num in num_batches)
    num_micro_steps = Fraction(0)
    for group in plan.groups:
        sizes, batch_sizes = ([values[b] for b in group] for values in (plan.sizes, plan.local_batch_sizes))
        if per_micro_step := min(plan.world_size, max_batches_per_micro_step(sizes, batch_sizes)):
            num_micro_steps += sum(num_batches[b] for b in group) / per_micro_step
    assert step * plan.accumulation == num_micro_steps
    epoch = plan.epoch_of(step)
    assert all((epoch - 1) * n <= num <= (epoch + 1) * n for num, n in zip(before, plan.sizes))


def test_the_simulation_finds_the_plan_better_than_its_alternatives():
    """benchmarks/plan.py"""
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "plan.py"
    spec = importlib.util.spec_from_file_location("benchmark_plan", path)
    assert spec
    assert spec.loader
    benchmark = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = benchmark  # dataclasses look up their module there
    spec.loader.exec_module(benchmark)
    ways = {result.way: result for result in benchmark.simulate(num_clips=300, num_ranks=16)}
    bucket, cost = ways["plan, bucket"], ways["plan, cost"]
    assert bucket.idle_share == pytest.approx(0, abs=1e-12)
    assert 0 < cost.idle_share < 0.03
    for plan in (bucket, cost):
        assert (plan.never_seen, plan.cropped_share > 0, plan.distorted_share) == (0, True, 0)
        assert plan.deviation <= 1
    assert cost.copies_share < bucket.copies_share
    # Each alternative has the flaw that its measure should show.
    assert ways["independent ranks"].idle_share > 0.1
    assert ways["one shape"].distorted_share > 0.3
    assert ways["truncated buckets"].never_seen > 100


def test_memory_does_not_grow_with_steps():
    plan = Plan(tuple(1_250_000 + 1000 * b for b in range(8)), (2,) * 8, 8, 1, 0)

    def allocated_after(steps):
        for step in steps:
            micro = plan.at(step)[0]
            if step % 20 == 0:
                micro.clips_of(7)
        gc.collect()  # empties the interpreter's list of unused tuples, up to 100 kB
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        before = allocated_after(range(100))
        growth = allocated_after(range(100, 600)) - before
    finally:
        tracemalloc.stop()
    assert growth < 2_000  # 4 bytes per step


@pytest.mark.parametrize(
    "change, message",
    [
        ({"sizes": (3,)}, "batch_sizes: 2 .* 1 "),
        ({"batch_sizes": (1, 0)}, r"batch_sizes \(1, 0\)"),
        ({"sizes": (3, -1)}, r"sizes \(3, -1\)"),
        ({"world_size": 0}, "world_size 0"),
        ({"accumulation": 0}, "accumulation 0"),
        ({"costs": (1.0,)}, "costs: 1 .* 2 "),
        ({"costs": (1.0, 0.0)}, r"costs \(1.0, 0.0\)"),
        ({"costs": (1.0, float("nan"))}, r"costs \(1.0, nan\)"),
        ({"tolerance": -0.1}, "tolerance -0.1"),
        ({"tolerance": float("nan")}, "tolerance nan"),
        ({"origin": Origin(0, 0, (1,))}, "origin has 1 .* 2"),
        ({"origin": Origin(9, 2, (3, 10))}, "3 clips of bucket 0, .* 5 "),
        ({"origin": Origin(9, 0, (0, 8))}, "8 clips of bucket 1, .* 7 "),
    ],
)
def test_invalid_plans_are_refused(change, message):
    valid = {"sizes": (5, 7), "batch_sizes": (1, 1), "world_size": 2, "accumulation": 1, "seed": 0}
    Plan(**valid)
    with pytest.raises(ValueError, match=message):
        Plan(**valid | change)


def test_empty_buckets_are_refused():
    with pytest.raises(UserError, match=r"data\.buckets: .* 2 "):
        Plan((0, 0), (1, 1), 1, 1, 0)


def test_steps_and_ranks_out_of_range():
    plan = Plan((5, 7), (1, 1), 2, 1, 0).resized(3, 1, 1)
    with pytest.raises(ValueError, match=r"step 2 .* 3$"):
        plan.at(2)
    with pytest.raises(ValueError, match=r"step -1 .* 0$"):
        Plan((5,), (1,), 1, 1, 0).at(-1)
    with pytest.raises(ValueError, match=r"rank 1 .* 1$"):
        plan.at(3)[0].clips_of(1)
    with pytest.raises(ValueError, match="step -1"):
        Origin(step=-1)
