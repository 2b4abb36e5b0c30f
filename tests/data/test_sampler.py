from torch.utils.data import DataLoader

from cogds.core.plan import Plan
from cogds.data.sampler import BucketBatchSampler

PLAN = Plan((5, 0, 7), (2, 1, 1), world_size=2, accumulation=2, seed=0)


def bucket_of(index):
    return 0 if index < 5 else 2


def test_batches_are_the_plans_clips_by_dataset_index():
    batches = list(BucketBatchSampler(PLAN, 1, 3, 9))
    micro_batches = [micro for step in range(3, 9) for micro in PLAN.at(step)]
    starts = {0: 0, 2: 5}
    assert batches == [[starts[m.bucket] + clip for clip in m.clips_of(1)] for m in micro_batches]
    assert len(BucketBatchSampler(PLAN, 1, 3, 9)) == len(batches) == 12


def test_all_ranks_are_in_the_same_bucket_at_every_micro_step():
    ranks = [list(BucketBatchSampler(PLAN, rank, 0, 20)) for rank in (0, 1)]
    for one, other in zip(*ranks):
        assert {bucket_of(i) for i in one} == {bucket_of(i) for i in other}
        assert len(one) == len(other)


def test_a_data_loader_takes_it():
    loader = DataLoader(list(range(12)), batch_sampler=BucketBatchSampler(PLAN, 0, 0, 6), num_workers=2)
    assert [batch.tolist() for batch in loader] == list(BucketBatchSampler(PLAN, 0, 0, 6))


def test_starting_later_is_the_same_as_having_gone_on():
    assert list(BucketBatchSampler(PLAN, 0, 4, 9)) == list(BucketBatchSampler(PLAN, 0, 0, 9))[8:]
