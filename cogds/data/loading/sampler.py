"""The bucketed distributed batch sampler: the plan as torch's DataLoader wants it.

All ranks' samplers are at the same micro-step at the same place; what a rank trains there, and in what order, is
`core.plan`'s business alone. There is no state and no list of clips: to resume, start at another step.
"""

from collections.abc import Iterator
from typing import NamedTuple

from torch.utils.data import Sampler

from cogds.core.plan import MicroBatch, Plan


class Draw(NamedTuple):
    """One slot of a batch: a position of a bucket's stream, and how many positions the micro-step takes of it.

    `core.mixture.Mixture.next_clips` turns it into a clip, and those that may stand in for it.
    """

    bucket: int
    position: int
    stride: int


def draws_of(micro_batch: MicroBatch, rank: int) -> list[Draw]:
    """What a rank trains in a micro-step."""
    part, _ = micro_batch.batch_of(rank)
    return [Draw(part.bucket, k, part.num_draws) for k in micro_batch.positions_of(rank)]


class BucketBatchSampler(Sampler[list[Draw]]):
    """One rank's batches, one per micro-step, from `first_step` up to `last_step` (exclusive)."""

    def __init__(self, plan: Plan, rank: int, first_step: int, last_step: int):
        self.plan, self.rank, self.first_step, self.last_step = plan, rank, first_step, last_step

    def __iter__(self) -> Iterator[list[Draw]]:
        for step in range(self.first_step, self.last_step):
            for micro_batch in self.plan.at(step):
                yield draws_of(micro_batch, self.rank)

    def __len__(self) -> int:
        return max(0, self.last_step - self.first_step) * self.plan.accumulation
