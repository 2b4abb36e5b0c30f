"""The loop: optimizer steps one after another, and what may happen in between.

Whatever one rank meets (a signal, a save that failed, a loss that is not finite), all ranks learn of at the end of the
same step, so that none of them is ever left waiting.
"""

import functools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from cogds.config.schema import RunConfig
from cogds.core.diffusion import stratified_timesteps, timestep_quarter, v_loss
from cogds.core.plan import MicroBatch
from cogds.core.rng import seed_global
from cogds.core.schedule import learning_rate
from cogds.data.loading.dataset import Bad, Batch, ClipDataset, collate, ignore_stop_signals
from cogds.data.loading.sampler import BucketBatchSampler
from cogds.distributed.collectives import all_gather, any_rank
from cogds.distributed.world import World
from cogds.encode.on_the_fly import BATCHES_AHEAD, ahead, stream_batches
from cogds.engine.checkpoint import Saver
from cogds.engine.start import set_learning_rate
from cogds.errors import Interrupted, UserError
from cogds.metrics.monitor import Monitor
from cogds.metrics.step_metrics import StepLosses, peak_memory_bytes, reset_peak_memory
from cogds.metrics.stopwatch import Stopwatch
from cogds.process.signals import Interrupt
from cogds.process.watchdog import Watchdog
from cogds.train.bad_samples import Quarantine
from cogds.train.meter import Meter
from cogds.train.run import Run
from cogds.train.step import Draws, StepBuilder, draw_dropouts, to_device

logger = logging.getLogger(__name__)

# So many clips are named where a step went wrong.
MAX_NAMED = 8

# Before the tags of what is noted of occasions.
OCCASION = "occasion"

# Is shown every batch before it is trained: optimizer step from 0, micro-step, its tensors.
Look = Callable[[int, MicroBatch, Batch], None]


@dataclass(frozen=True)
class Occasion:
    """Something that all ranks do together beside training, such as an evaluation.

    what: for people, as in "evaluating"; every: optimizer steps; act: given the steps trained so far. It is due before
    the first step (and where a run goes on at one of its steps), every so many steps, and after the last.
    """

    what: str
    every: int
    act: Callable[[int], None]


def train_steps(
    run: Run,
    engine: Any,
    builder: StepBuilder,
    monitor: Monitor,
    saver: Saver,
    save: Callable[[int], None],
    interrupt: Interrupt,
    watchdog: Watchdog,
    occasions: Sequence[Occasion] = (),
    look: Look | None = None,
) -> None:
    """Train from `run.first_step` to the last. Collective.

    save: starts saving the state after so many steps. look: is shown every batch that this rank trains.

    Raises Interrupted, once all is saved, where a rank was asked to stop; UserError where a save fails, or too many
    steps in a row are not finite.
    """
    cfg, world = run.cfg, run.world
    quarantine = Quarantine(world, Path(cfg.output_dir), len(run.data.index), cfg.data.max_unusable)
    meet([one for one in occasions if run.first_step % one.every == 0], run.first_step, watchdog, monitor, world)
    upcoming = Upcoming(micro_steps(run, builder, load_batches(run), look))
    meter, num_bad = Meter(run, engine), 0
    for step in range(run.first_step, cfg.train.num_steps):
        watchdog.watch(functools.partial(run.describe, step))
        bad = train_step(run, engine, upcoming, step, monitor, quarantine, meter)
        num_bad = num_bad + 1 if bad else 0
        stop, written = any_rank(world, bool(interrupt.requested), saver.done)
        if written:
            finish_save(saver, world, monitor, step + 1)
        last = step + 1 == cfg.train.num_steps
        if (step + 1) % cfg.monitor.every == 0 or last or stop:
            quarantine.settle()
        if num_bad == cfg.train.max_bad_steps:
            monitor.close()
            raise _too_many(bad, num_bad, world)
        # Before the save, so that a run which goes on from it has had them. One that must stop does not wait for them.
        if not stop and (due := [one for one in occasions if last or (step + 1) % one.every == 0]):
            monitor.flush()
            meet(due, step + 1, watchdog, monitor, world)
            meter.rest()
        if (step + 1) % cfg.checkpoint.every == 0 or last or stop:
            watchdog.watch(functools.partial("saving after step {}".format, step + 1))
            monitor.flush()
            save(step + 1)
            meter.rest()  # saving is no part of the next step
        if stop and not last:
            break
    finish_save(saver, world, monitor, step + 1)
    watchdog.rest()
    monitor.close()
    if not last:
        if world.rank == 0:
            logger.info(f"stopped and saved after step {step + 1}: the same command goes on")
        raise Interrupted


def meet(occasions: Sequence[Occasion], step: int, watchdog: Watchdog, monitor: Monitor, world: World) -> None:
    """What is due when `step` steps are trained, one after another. Collective.

    On a GPU their own peak of memory is noted, rank 0's, and training's begins anew: see `Meter`. The peak of the
    process on the host cannot be restarted: what an occasion takes there stays in training's.
    """
    if occasions:
        reset_peak_memory(world.device)
    for one in occasions:
        watchdog.watch(functools.partial("{} after step {}".format, one.what, step))
        one.act(step)
    if occasions and world.device.type == "cuda":
        monitor.add_scalars(step, {f"{OCCASION}/peak_memory_gb": peak_memory_bytes(world.device) / 1e9})
        reset_peak_memory(world.device)


def finish_save(saver: Saver, world: World, monitor: Monitor, step: int) -> None:
    """Wait for what is being saved, if anything is, and note how long it took. What failed raises. Collective."""
    seconds = saver.finish(world)
    if seconds is not None:
        monitor.add_scalars(step, {"checkpoint/write_s": seconds})


def load_batches(run: Run) -> Iterator[Batch]:
    """This rank's batches, one per micro-step, made ahead of time: read from the cache, or encoded on the fly."""
    cfg, world = run.cfg, run.world
    sampler = BucketBatchSampler(run.plan, world.data_rank, run.first_step, cfg.train.num_steps)
    if cfg.data.encode == "on_the_fly":
        yield from ahead(stream_batches(sampler, run.order, cfg, run.model, world), BATCHES_AHEAD)
        return
    loader = DataLoader(
        ClipDataset(run.order, cfg.data.cache_dir),
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=cfg.data.num_workers,
        pin_memory=world.device.type == "cuda",
        worker_init_fn=ignore_stop_signals,
    )
    try:
        yield from loader
    except UserError as error:
        # Out of a worker it comes with the worker's traceback around it; the sentence is the last line.
        raise UserError(str(error).strip().splitlines()[-1].partition("UserError: ")[2] or str(error)) from None


@dataclass(frozen=True)
class MicroStep:
    """One micro-step's tensors, on the device: the transformer's inputs, the v-target, and of each sample its weight
    float32 [B] and its quarter of the timesteps int64 [B].

    bad: clips that could not be read; wait_s: how long the loader was waited for.
    """

    micro_batch: MicroBatch
    bucket: int
    inputs: dict[str, Any]
    target: torch.Tensor
    weights: torch.Tensor
    quarters: torch.Tensor
    bad: Sequence[Bad]
    wait_s: float


def micro_steps(
    run: Run, builder: StepBuilder, batches: Iterator[Batch], look: Look | None = None
) -> Iterator[MicroStep]:
    """Every micro-step of the run on this rank, made when it is asked for. On a GPU it is queued and not waited for."""
    cfg, world, num_timesteps = run.cfg, run.world, len(builder.alphas_cumprod)
    for step in range(run.first_step, cfg.train.num_steps):
        for micro_batch in run.plan.at(step):
            waiting = Stopwatch()
            batch = next(batches)
            wait_s, bucket = waiting.lap(), micro_batch.bucket_of(world.data_rank)
            if look:
                look(step, micro_batch, batch)
            draws = draw(micro_batch, step, num_timesteps, cfg, world)
            inputs, target = builder.build(batch.tensors, run.buckets[bucket], draws)
            weights = to_device(torch.tensor(micro_batch.weights_of(world.data_rank)), world.device)
            quarters = timestep_quarter(inputs["timestep"], num_timesteps)
            yield MicroStep(micro_batch, bucket, inputs, target, weights, quarters, batch.bad, wait_s)


class Upcoming:
    """Micro-steps, of which the next can be made ready while the GPU is busy with this one."""

    def __init__(self, items: Iterator[MicroStep]):
        self._items = items
        self._ready: MicroStep | None = None
        self._wait_s = 0.0

    def take(self) -> MicroStep:
        """The next one, made ready now if it has not been."""
        self.make_ready()
        item, self._ready = self._ready, None
        assert item is not None  # the loop takes as many as there are
        return item

    def make_ready(self) -> None:
        """Make the next one, if there is one."""
        if self._ready is None and (item := next(self._items, None)) is not None:
            self._ready, self._wait_s = item, self._wait_s + item.wait_s

    def waited_s(self) -> float:
        """How long the loader has been waited for since this was last asked."""
        wait_s, self._wait_s = self._wait_s, 0.0
        return wait_s


def train_step(
    run: Run,
    engine: Any,
    upcoming: Upcoming,
    step: int,
    monitor: Monitor,
    quarantine: Quarantine,
    meter: Meter,
) -> list[str]:
    """One optimizer step: `accumulation` micro-steps of forward and backward, all ranks in buckets of one cost.

    Where a loss or gradient is not finite on any rank, no rank's weights change, and what is known of it is returned.
    """
    cfg, plan, world, micro_batches = run.cfg, run.plan, run.world, run.plan.at(step)
    losses = StepLosses(len(run.buckets), world.device)
    trained: list[tuple[MicroBatch, torch.Tensor]] = []
    lr = learning_rate(
        step,
        cfg.optimizer.lr,
        cfg.optimizer.schedule,
        cfg.train.num_steps,
        cfg.optimizer.warmup_steps,
        cfg.optimizer.final_lr_ratio,
    )
    set_learning_rate(engine, lr)
    for micro_batch in micro_batches:
        meter.begin("inputs")
        this = upcoming.take()
        meter.begin("forward")
        quarantine.add(this.bad)
        # By the rank itself: those that share a clip must not drop the same places of their parts.
        seed_global(cfg.seed, step * plan.accumulation + len(trained), world.rank)
        engine.module.set_level(run.execution.levels[this.bucket])
        per_sample = v_loss(engine(**this.inputs)[0], this.target)
        loss = (this.weights * per_sample).mean()
        meter.begin("backward")
        # The factor is 1 where the loss is finite. Where it is not, it makes the gradient so too, which DeepSpeed sees
        # on all ranks and skips the step: nobody has to wait for the value of a loss.
        engine.backward(loss * (1 + 0 * loss.detach()))
        meter.begin("inputs")
        # While the GPU still works on what is queued: DeepSpeed's step waits for it. Not earlier and not on a stream of
        # its own, which would need the VAE's memory on top of the activations'.
        upcoming.make_ready()
        meter.begin("optimizer")
        if len(trained) + 1 == len(micro_batches):
            meter.before_update(step)
        engine.step()
        share = loss.detach() / (world.size * plan.accumulation)  # ranks that share a clip all add its loss
        losses.add(share, per_sample, this.bucket, this.quarters)
        trained.append((micro_batch, per_sample.detach()))
    skipped = not engine.was_step_applied()
    measured, own, norms = meter.read(step, micro_batches, upcoming.waited_s())
    monitor.add_step(
        step + 1,
        {
            "train/lr": lr,
            "train/grad_norm": engine.get_global_grad_norm(),
            "train/skipped": float(skipped),
            "train/epoch": plan.epoch_of(step),
            **measured,
        },
        losses,
        own,
        norms,
    )
    return _name_bad(run, step, trained) if skipped else []


def draw(micro_batch: MicroBatch, step: int, num_timesteps: int, cfg: RunConfig, world: World) -> Draws:
    """The random choices of a micro-step of optimizer step `step`, on this rank."""
    slots = micro_batch.slots_of(world.data_rank)
    timesteps = stratified_timesteps(slots, micro_batch.step_slots, num_timesteps, cfg.seed, step)
    drop_image, drop_caption = draw_dropouts(cfg.conditioning, cfg.seed, step, slots)
    return Draws(timesteps, drop_image, drop_caption, cfg.seed, step, slots)


def _name_bad(run: Run, step: int, trained: list[tuple[MicroBatch, torch.Tensor]]) -> list[str]:
    """Say which clips' losses are not finite, or, where all are, which clips were trained. Collective."""
    own = [
        (str(run.buckets[micro_batch.bucket_of(run.world.data_rank)]), clip, loss)
        for micro_batch, losses in (trained if run.world.sequence_rank == 0 else [])
        for clip, loss in zip(run.clips(micro_batch), losses.tolist())
    ]
    every = [(rank, *one) for rank, ones in enumerate(all_gather(run.world, own)) for one in ones]
    culprits = [one for one in every if not math.isfinite(one[3])]
    named = [f"rank {rank}, bucket {bucket}, {clip} (loss {loss:g})" for rank, bucket, clip, loss in culprits or every]
    if run.world.rank == 0:
        what = "loss" if culprits else "gradient (every loss is finite)"
        more = f" and {len(named) - MAX_NAMED} more" if len(named) > MAX_NAMED else ""
        logger.info(f"step {step + 1} was skipped, its {what} is not finite: {'; '.join(named[:MAX_NAMED])}{more}")
    return named


def _too_many(named: list[str], num_bad: int, world: World) -> UserError:
    return UserError(
        f"{num_bad} steps in a row had a loss or gradient that is not finite (train.max_bad_steps), the last one with "
        f"{'; '.join(named[:MAX_NAMED])}: lower optimizer.lr, look at these clips, and resume from the last checkpoint",
        shared=world.rank > 0,
    )
