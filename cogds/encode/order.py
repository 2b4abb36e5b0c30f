"""The order of training from the run's config: batch sizes and the plan."""

from collections.abc import Sequence

from cogds.config.schema import RunConfig
from cogds.core.cost import clip_flops
from cogds.core.geometry import ClipShape, num_tokens
from cogds.core.mixture import Mixture
from cogds.core.plan import Plan
from cogds.model.load import ModelFolder


def batch_sizes(cfg: RunConfig, buckets: Sequence[ClipShape], model: ModelFolder) -> tuple[int, ...]:
    """Clips per rank and micro-step in each bucket: one number, or as many as the token budget holds."""
    budget = cfg.train.tokens_per_batch
    if budget is None:
        return (cfg.train.batch_size,) * len(buckets)
    return tuple(max(1, budget // num_tokens(shape, model.geometry)) for shape in buckets)


def make_plan(
    cfg: RunConfig, mixture: Mixture, buckets: Sequence[ClipShape], model: ModelFolder, world_size: int
) -> Plan:
    """The order of training from its beginning."""
    tokens = [num_tokens(shape, model.geometry) for shape in buckets]
    costs = tuple(clip_flops(count, model.num_layers, model.hidden_size) for count in tokens)
    return Plan(
        mixture.virtual_sizes,
        batch_sizes(cfg, buckets, model),
        world_size,
        cfg.train.gradient_accumulation_steps,
        cfg.seed,
        costs=costs if cfg.data.sync == "cost" else (),
        tolerance=cfg.data.cost_tolerance,
    )
