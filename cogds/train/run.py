"""A run whose data is encoded: everything that training needs besides the engine."""

from dataclasses import dataclass
from typing import Any

from cogds.config.schema import RunConfig
from cogds.core.geometry import ClipShape
from cogds.core.plan import MicroBatch, Plan
from cogds.data.loading.dataset import ClipOrder
from cogds.data.loading.sampler import draws_of
from cogds.distributed.world import World
from cogds.encode.encoding_plan import EncodedData
from cogds.job import Job
from cogds.model.load import ModelFolder
from cogds.train.tuning import BucketExecution, Execution


@dataclass(frozen=True)
class Run:
    """A job with its data, the order of training and how it executes. first_step: number of steps already trained."""

    job: Job
    data: EncodedData
    plan: Plan
    execution: Execution
    first_step: int

    @property
    def cfg(self) -> RunConfig:
        return self.job.cfg

    @property
    def ds_config(self) -> dict[str, Any]:
        return self.job.ds_config

    @property
    def model(self) -> ModelFolder:
        return self.job.model

    @property
    def buckets(self) -> tuple[ClipShape, ...]:
        return self.job.buckets

    @property
    def world(self) -> World:
        return self.job.world

    @property
    def order(self) -> ClipOrder:
        """Maps positions in the plan to clips."""
        return ClipOrder(self.data.index, self.data.mixture)

    @property
    def used_buckets(self) -> list[tuple[int, ClipShape, BucketExecution]]:
        """The buckets that have clips: index, shape, execution."""
        return [
            (bucket, shape, self.execution.buckets[bucket])
            for bucket, (shape, sizes) in enumerate(zip(self.buckets, self.data.index.sizes))
            if sum(sizes)
        ]

    def clips(self, micro_batch: MicroBatch) -> list[str]:
        """Return the files that this rank trains in a micro-step, according to the plan."""
        choices = [next(self.order.choices(draw)) for draw in draws_of(micro_batch, self.world.data_rank)]
        return [self.data.index[choice.row].path for choice in choices]

    def describe(self, step: int) -> str:
        """Describe this rank's work in an optimizer step (0 is the first) for messages."""
        parts = [
            f"bucket {self.buckets[micro_batch.bucket_of(self.world.data_rank)]}: {', '.join(self.clips(micro_batch))}"
            for micro_batch in self.plan.at(step)
        ]
        return f"step {step + 1}, {'; '.join(parts)}"
