"""Bucketed distributed batch sampler for torch's DataLoader.

It yields what `core.plan` determines for a rank, and has no state and no list of clips. To resume, start at a later
step.
"""

from collections.abc import Iterator
from typing import NamedTuple

from torch.utils.data import Sampler

from cogds.core.plan import MicroBatch, Plan


class Draw(NamedTuple):
    """One slot of a batch: a position in a bucket's stream, and the number of positions that the micro-step draws.

    `core.mixture.Mixture.next_visits` converts it to a clip and its possible substitutes.
    """

    bucket: int
    position: int
    stride: int


def draws_of(micro_batch: MicroBatch, rank: int) -> list[Draw]:
    """Return the draws of a rank in a micro-step."""
    part, _ = micro_batch.batch_of(rank)
    return [Draw(part.bucket, k, part.num_draws) for k in micro_batch.positions_of(rank)]


class BucketBatchSampler(Sampler[list[Draw]]):
    """Yields the batches of a rank, one per micro-step, from `first_step` up to `last_step` (exclusive)."""

    def __init__(self, plan: Plan, rank: int, first_step: int, last_step: int):
        self.plan, self.rank, self.first_step, self.last_step = plan, rank, first_step, last_step

    def __iter__(self) -> Iterator[list[Draw]]:
        for step in range(self.first_step, self.last_step):
            for micro_batch in self.plan.at(step):
                yield draws_of(micro_batch, self.rank)

    def __len__(self) -> int:
        return max(0, self.last_step - self.first_step) * self.plan.accumulation
