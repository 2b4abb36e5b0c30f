import pytest
from torch.utils.data import DataLoader

from cogds.core.mixture import Mixture
from cogds.core.plan import Plan
from cogds.data.loading.sampler import BucketBatchSampler, Draw

PLAN = Plan((5, 0, 7), (2, 1, 1), world_size=2, accumulation=2, seed=0)
BY_COST = Plan((5, 0, 7), (2, 1, 1), world_size=2, accumulation=2, seed=0, costs=(1.0, 1.0, 2.0))


@pytest.mark.parametrize("plan", [PLAN, BY_COST])
def test_batches_equal_the_positions_of_the_plan(plan):
    batches = list(BucketBatchSampler(plan, 1, 3, 9))
    micro_batches = [micro for step in range(3, 9) for micro in plan.at(step)]
    assert [[draw.position for draw in batch] for batch in batches] == [list(m.positions_of(1)) for m in micro_batches]
    assert [{draw.bucket for draw in batch} for batch in batches] == [{m.bucket_of(1)} for m in micro_batches]
    assert len(BucketBatchSampler(plan, 1, 3, 9)) == len(batches) == 12


@pytest.mark.parametrize("plan", [PLAN, BY_COST])
def test_draws_are_converted_to_the_clips_of_the_plan(plan):
    mixture = Mixture(tuple((n,) for n in plan.sizes), (1.0,), plan.seed)
    for rank in (0, 1):
        micro_batches = [micro for step in range(9) for micro in plan.at(step)]
        for batch, micro in zip(BucketBatchSampler(plan, rank, 0, 9), micro_batches, strict=True):
            assert tuple(next(mixture.next_visits(*draw)).clip for draw in batch) == micro.clips_of(rank)


def test_without_costs_all_ranks_are_in_the_same_bucket_at_every_micro_step():
    batches = [list(BucketBatchSampler(PLAN, rank, 0, 20)) for rank in (0, 1)]
    for first, second in zip(*batches):
        assert len({draw.bucket for draw in first + second}) == 1
        assert len(first) == len(second)


def test_with_costs_ranks_may_be_in_different_buckets():
    batches = [list(BucketBatchSampler(BY_COST, rank, 0, 20)) for rank in (0, 1)]
    assert any(first[0].bucket != second[0].bucket for first, second in zip(*batches))


class Echo:
    """A dataset whose items are the draws."""

    def __getitem__(self, draw):
        return list(draw)


def test_the_sampler_works_with_a_data_loader():
    sampler = BucketBatchSampler(PLAN, 0, 0, 6)
    loader = DataLoader(Echo(), batch_sampler=sampler, collate_fn=list, num_workers=2)
    assert [[Draw(*item) for item in batch] for batch in loader] == list(sampler)


def test_starting_later_equals_an_uninterrupted_run():
    assert list(BucketBatchSampler(PLAN, 0, 4, 9)) == list(BucketBatchSampler(PLAN, 0, 0, 9))[8:]


def test_draws_of_a_micro_step_have_different_substitutes():
    plan = Plan((40,), (3,), world_size=4, accumulation=1, seed=0)
    draws = [draw for rank in range(4) for batch in BucketBatchSampler(plan, rank, 0, 1) for draw in batch]
    positions = {draw.position for draw in draws}
    substitutes = {draw.position + draw.stride for draw in draws}
    assert len(positions) == len(substitutes) == 12
    assert not positions & substitutes
