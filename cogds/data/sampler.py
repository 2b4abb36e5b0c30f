"""The bucketed distributed batch sampler: the plan as torch's DataLoader wants it.

All ranks' samplers name the same bucket and batch size at the same place; which clips, and in what order, is
`core.plan`'s business alone. There is no state: to resume, start at another step.
"""

from collections.abc import Iterator, Sequence

from torch.utils.data import Sampler

from cogds.core.plan import Plan


class BucketBatchSampler(Sampler[list[int]]):
    """Batches of dataset indices, one per micro-step, for one rank, from `first_step` up to `last_step` (exclusive).

    The dataset holds bucket 0's clips first, then bucket 1's, and so on: `plan.sizes` of each.
    """

    def __init__(self, plan: Plan, rank: int, first_step: int, last_step: int):
        self.plan, self.rank, self.first_step, self.last_step = plan, rank, first_step, last_step
        self.bucket_starts = _starts(plan.sizes)

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first_step, self.last_step):
            for micro_batch in self.plan.at(step):
                start = self.bucket_starts[micro_batch.bucket]
                yield [start + clip for clip in micro_batch.clips_of(self.rank)]

    def __len__(self) -> int:
        return max(0, self.last_step - self.first_step) * self.plan.accumulation


def _starts(sizes: Sequence[int]) -> list[int]:
    return [sum(sizes[:bucket]) for bucket in range(len(sizes))]
