"""The micro-steps of one rank, as tensors on its device that are prepared ahead of time."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader

from cogds.config.schema import RunConfig
from cogds.core.diffusion import stratified_timesteps, timestep_quarter
from cogds.core.plan import MicroBatch
from cogds.data.loading.dataset import BadClip, Batch, ClipDataset, collate, ignore_stop_signals
from cogds.data.loading.fetch_ahead import FetchAhead, fetch
from cogds.data.loading.sampler import BucketBatchSampler
from cogds.distributed.world import World
from cogds.encode.on_the_fly import OnTheFlyModels, ahead, stream_batches
from cogds.errors import UserError
from cogds.job import BATCHES_AHEAD
from cogds.metrics.stopwatch import Stopwatch
from cogds.train.run import Run
from cogds.train.step import Draws, StepBuilder, draw_dropouts, draw_modes, to_device

PREFETCH_FACTOR = 2  # batches that each loader process prepares ahead

# Called with each batch before it is trained: optimizer step (0 is the first), micro-batch, tensors.
OnBatch = Callable[[int, MicroBatch, Batch], None]


def load_batches(run: Run, models: OnTheFlyModels | None = None) -> Iterator[Batch]:
    """Yield this rank's batches, one per micro-step, encoded on the fly by `models` or read from the cache.

    A UserError of a loader process is raised unchanged.
    """
    cfg, world = run.cfg, run.world
    sampler = BucketBatchSampler(run.plan, world.data_rank, run.first_step, cfg.train.num_steps)
    if models is not None:
        yield from ahead(stream_batches(sampler, run.order, run.job, models), BATCHES_AHEAD)
        return
    cache = run.job.cache
    loader = DataLoader(
        ClipDataset(run.order, cache),
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=cfg.data.num_workers,
        prefetch_factor=PREFETCH_FACTOR if cfg.data.num_workers else None,
        pin_memory=world.device.type == "cuda",
        worker_init_fn=ignore_stop_signals,
    )
    # Half of the local copy is for what was used: no entry is removed before it is used.
    max_bytes = int(cfg.data.local_cache_gb * 1e9 / 2 / world.local_size)
    try:
        if not cache.is_remote:
            yield from loader
            return
        # The loader processes find what they read first, and do not connect to the server (1 s each). They are forked
        # before there are threads.
        fetch(cache, run.order, itertools.islice(sampler, PREFETCH_FACTOR * max(1, cfg.data.num_workers)))
        batches = iter(loader)
        with FetchAhead(cache, run.order, sampler, max_bytes) as fetched:
            for batch in batches:
                fetched.mark_used()
                yield batch
    except UserError as error:
        # torch puts the traceback of a loader process before the message, which is the last line.
        raise UserError(str(error).strip().splitlines()[-1].partition("UserError: ")[2] or str(error)) from None


@dataclass(frozen=True)
class MicroStep:
    """The tensors of one micro-step, on the device.

    Attributes:
        inputs: keyword arguments of the transformer.
        target: v-target, float32 [B, F, C, H, W].
        weights: weight of each sample in the loss, float32 [B].
        quarters: quarter of the noise schedule that each timestep is in, int64 [B].
        bad: clips that could not be read.
        wait_s: time spent waiting for the loader.
    """

    micro_batch: MicroBatch
    bucket: int
    inputs: dict[str, Any]
    target: torch.Tensor
    weights: torch.Tensor
    quarters: torch.Tensor
    bad: Sequence[BadClip]
    wait_s: float


def make_micro_steps(
    run: Run, builder: StepBuilder, batches: Iterator[Batch], on_batch: OnBatch | None = None
) -> Iterator[MicroStep]:
    """Yield each micro-step of the run on this rank. Work on a GPU is queued, not waited for."""
    cfg, world, num_timesteps = run.cfg, run.world, len(builder.alphas_cumprod)
    for step in range(run.first_step, cfg.train.num_steps):
        for micro_batch in run.plan.at(step):
            stopwatch = Stopwatch()
            batch = next(batches)
            wait_s, bucket = stopwatch.lap(), micro_batch.bucket_of(world.data_rank)
            if on_batch:
                on_batch(step, micro_batch, batch)
            draws = make_draws(micro_batch, step, num_timesteps, cfg, world)
            inputs, target = builder.build(batch.tensors, run.buckets[bucket], draws)
            weights = to_device(torch.tensor(micro_batch.weights_of(world.data_rank)), world.device)
            quarters = timestep_quarter(inputs["timestep"], num_timesteps)
            yield MicroStep(micro_batch, bucket, inputs, target, weights, quarters, batch.bad, wait_s)


class Prefetcher:
    """Prepares the next micro-step while the GPU is busy with the current one."""

    def __init__(self, micro_steps: Iterator[MicroStep]):
        self._micro_steps = micro_steps
        self._next: MicroStep | None = None
        self._wait_s = 0.0

    def take(self) -> MicroStep:
        """Return the next micro-step. There must be one."""
        self.prepare()
        micro_step, self._next = self._next, None
        assert micro_step is not None
        return micro_step

    def prepare(self) -> None:
        """Prepare the next micro-step, unless it is already prepared or there is none."""
        if self._next is None and (micro_step := next(self._micro_steps, None)) is not None:
            self._next, self._wait_s = micro_step, self._wait_s + micro_step.wait_s

    def take_wait_s(self) -> float:
        """Return the time spent waiting for the loader since the last call [s]."""
        wait_s, self._wait_s = self._wait_s, 0.0
        return wait_s


def make_draws(micro_batch: MicroBatch, step: int, num_timesteps: int, cfg: RunConfig, world: World) -> Draws:
    """Return the random choices of this rank in a micro-step of optimizer step `step`."""
    slots = micro_batch.slots_of(world.data_rank)
    timesteps = stratified_timesteps(slots, micro_batch.step_slots, num_timesteps, cfg.seed, step)
    drop_image, drop_caption = draw_dropouts(cfg.conditioning, cfg.seed, step, slots)
    modes = draw_modes(cfg.conditioning, cfg.seed, step, slots)
    return Draws(timesteps, drop_image, drop_caption, cfg.seed, step, slots, modes)
