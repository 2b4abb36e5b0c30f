"""What a run is made of, in one value."""

from dataclasses import dataclass
from typing import Any

from cogds.config.schema import RunConfig
from cogds.core.geometry import ClipShape
from cogds.core.plan import MicroBatch, Plan
from cogds.data.loading.dataset import ClipOrder
from cogds.data.loading.sampler import draws_of
from cogds.distributed.world import World
from cogds.encode.encoding_plan import EncodedData
from cogds.model.load import ModelFolder
from cogds.train.tuning import Execution


@dataclass(frozen=True)
class Run:
    """What a run is made of, from its first step to its last."""

    cfg: RunConfig
    ds_config: dict[str, Any]
    model: ModelFolder
    buckets: tuple[ClipShape, ...]
    world: World
    data: EncodedData
    plan: Plan
    execution: Execution
    first_step: int

    @property
    def order(self) -> ClipOrder:
        """Which clip a place of the plan stands for."""
        return ClipOrder(self.data.index, self.data.mixture)

    def clips(self, micro_batch: MicroBatch) -> list[str]:
        """The files that this rank trains in a micro-step, as the plan has it."""
        order = self.order
        return [self.data.index[next(order.rows(draw))].path for draw in draws_of(micro_batch, self.world.data_rank)]

    def describe(self, step: int) -> str:
        """What this rank does in an optimizer step, for people."""
        parts = [
            f"bucket {self.buckets[micro_batch.bucket_of(self.world.data_rank)]}: {', '.join(self.clips(micro_batch))}"
            for micro_batch in self.plan.at(step)
        ]
        return f"step {step + 1}, {'; '.join(parts)}"
