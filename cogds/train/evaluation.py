"""The evaluation loss: fixed clips, timesteps and noise and no dropout, so that weights can be compared by it.

`eval/loss` covers clips that are never trained (eval.held_out, eval.path), and `eval/train_loss` as many clips that are
trained. If they diverge, the run overfits. Both are also reported by timestep (`/t=...`) and by bucket (`/bucket=...`).
If the run trains condition modes other than the default, every clip is evaluated in each of them at each timestep, and
the losses are reported by mode (`/mode=...`), too. All modes weigh the same, whatever their probabilities.

The random draws of a sample depend only on the seed, the clip's cache key and the index of the timestep, so that the
modes have the same noise. So the loss
does not depend on the other clips or on the number of ranks. As in training, clips are drawn from the VAE's posterior.
Unlike in training, no noise is added to the first frame.

A run evaluates during training (`make_evaluation_callback`), and the evaluate verb evaluates a LoRA file. Both use
`Evaluation`.
"""

import contextlib
import copy
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cogds.core.condition_modes import DEFAULT_MODES, Mode, used_modes
from cogds.core.diffusion import v_loss
from cogds.core.flops import step_flops, training_flops
from cogds.core.geometry import ClipShape, num_tokens
from cogds.core.permutation import keyed_hash
from cogds.data.cache.store import Cache, DamagedEntryError
from cogds.data.loading.dataset import Item, collate, read_encoded
from cogds.data.loading.index import IndexedClip
from cogds.data.storage.location import display_name
from cogds.distributed.collectives import all_gather, any_rank
from cogds.distributed.world import World
from cogds.encode.encoding_plan import EncodedData
from cogds.errors import UserError, brief
from cogds.formatting import counted, percent
from cogds.job import Job
from cogds.metrics.jsonl import first_evaluation
from cogds.model.evaluation_mode import call_module, evaluation_mode
from cogds.process.progress import progress_bar
from cogds.train.callbacks import TrainContext
from cogds.train.memory_check import is_out_of_memory
from cogds.train.run import Run
from cogds.train.step import Draws, StepBuilder
from cogds.train.summary import labeled

logger = logging.getLogger(__name__)

# An evaluation that takes a larger share of the training time causes a warning.
MAX_SHARE = 0.05
# Shorter runs are trials, in which the cost of evaluation does not matter.
TRIAL_STEPS = 100

EMA_TAG = "eval_ema/"  # prefix of the losses of the moving average of the weights

Forward = Callable[[Mapping[str, Any]], torch.Tensor]
ShouldContinue = Callable[[int], bool]


@dataclass(frozen=True)
class EvalBatch:
    """The samples of one forward pass, all in one bucket. Each is a pair: index of the clip, index of the point."""

    bucket: int
    samples: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class EvalPoint:
    """What a clip is evaluated at. number: index of the timestep, for the random draws."""

    timestep: int
    number: int
    mode: Mode = "first"


def eval_points(timesteps: Sequence[int], modes: Sequence[Mode] = DEFAULT_MODES) -> tuple[EvalPoint, ...]:
    """Combine every mode with every timestep."""
    return tuple(EvalPoint(timestep, number, mode) for mode in modes for number, timestep in enumerate(timesteps))


def midpoints(num: int, num_timesteps: int) -> list[int]:
    """Return the midpoints of `num` equal parts of [0, num_timesteps)."""
    return [num_timesteps * (2 * part + 1) // (2 * num) for part in range(num)]


def make_eval_batches(buckets: Sequence[int], num_points: int, batch_sizes: Sequence[int]) -> list[EvalBatch]:
    """Combine every clip with every point, in batches of at most the training batch size of the bucket.

    The sizes of a bucket's batches differ by at most one. buckets: bucket of each clip. batch_sizes: of each bucket.
    """
    batches = []
    for bucket in sorted(set(buckets)):
        clips = [clip for clip, clip_bucket in enumerate(buckets) if clip_bucket == bucket]
        samples = [(clip, number) for clip in clips for number in range(num_points)]
        for part in np.array_split(np.arange(len(samples)), -(-len(samples) // batch_sizes[bucket])):
            batches.append(EvalBatch(bucket, tuple(samples[number] for number in part)))
    return batches


def schedule_rounds(batches: Sequence[EvalBatch], costs: Sequence[float], num_ranks: int) -> list[list[EvalBatch]]:
    """Split the batches into rounds of one batch per rank and about equal cost, the most expensive first.

    ZeRO stage 3 needs every rank in every forward pass, so in the last round idle ranks repeat its last batch. costs:
    cost of one sample in each bucket.
    """
    ordered = sorted(batches, key=lambda batch: -costs[batch.bucket] * len(batch.samples))
    rounds = [list(ordered[start : start + num_ranks]) for start in range(0, len(ordered), num_ranks)]
    return [batches + [batches[-1]] * (num_ranks - len(batches)) for batches in rounds]


def mean_losses(
    clips: Sequence[IndexedClip],
    num_held_out: int,
    points: Sequence[EvalPoint],
    losses: Mapping[tuple[int, int], float],
) -> dict[str, float]:
    """Return the mean losses by tag. The first `num_held_out` clips are `eval/loss`, the others `eval/train_loss`.

    losses: by indices of clip and point. Clips without losses are left out.
    """
    means: dict[str, float] = {}
    has_modes = any(point.mode not in DEFAULT_MODES for point in points)
    for tag, numbers in (("eval/loss", range(num_held_out)), ("eval/train_loss", range(num_held_out, len(clips)))):
        grouped: dict[str, list[float]] = {tag: []}
        for number, point in enumerate(points):
            point_losses = [losses[clip, number] for clip in numbers if (clip, number) in losses]
            grouped.setdefault(f"{tag}/t={point.timestep:03}", []).extend(point_losses)
            if has_modes:
                grouped.setdefault(f"{tag}/mode={point.mode}", []).extend(point_losses)
        for clip in numbers:
            clip_losses = [losses[clip, number] for number in range(len(points)) if (clip, number) in losses]
            grouped[tag] += clip_losses
            grouped.setdefault(f"{tag}/bucket={clips[clip].shape}", []).extend(clip_losses)
        means |= {name: math.fsum(values) / len(values) for name, values in grouped.items() if values}
    return means


@dataclass(frozen=True)
class Evaluation:
    """A fixed set of samples and how to evaluate them. The first `num_held_out` clips are never trained.

    rounds: see `schedule_rounds`, for `world.data_size` ranks.
    """

    clips: tuple[IndexedClip, ...]
    num_held_out: int
    points: tuple[EvalPoint, ...]
    rounds: list[list[EvalBatch]]
    builder: StepBuilder
    cache: Cache
    world: World
    seed: int

    def scalars(self, forward: Forward, should_continue: ShouldContinue = lambda _: True) -> dict[str, float]:
        """Return the mean losses by tag, the same on every rank. Collective. For the arguments see `losses`."""
        return mean_losses(self.clips, self.num_held_out, self.points, self.losses(forward, should_continue))

    @torch.no_grad()
    def losses(
        self, forward: Forward, should_continue: ShouldContinue = lambda _: True
    ) -> dict[tuple[int, int], float]:
        """Return the loss of each clip at each point, by their indices, the same on every rank. Collective.

        A clip whose inputs cannot be made is left out on all ranks, with a warning. A forward pass that fails on one
        rank ends the run, because at ZeRO stage 3 the other ranks wait in it.

        forward: returns the transformer's output for the inputs from `StepBuilder.build`. should_continue: called with
        the index of each forward pass before it. If it returns False, which all ranks must do alike, there are no
        losses.
        """
        own_batches, bad = [batches[self.world.data_rank] for batches in self.rounds], dict[int, str]()
        own_losses = []
        for number, batch in enumerate(own_batches):
            if not should_continue(number):
                return {}
            inputs, target = self._inputs(batch, bad)
            own_losses.append(v_loss(forward(inputs), target))
        # The only wait for the device. Ranks that share a clip have the same losses, so only one reports them.
        values = torch.cat(own_losses).double().tolist() if self.world.sequence_rank == 0 else []
        samples = [sample for batch in own_batches for sample in batch.samples]
        losses: dict[tuple[int, int], float] = {}
        all_bad: dict[int, str] = {}
        for rank_losses, rank_bad in all_gather(self.world, (list(zip(samples, values)), bad)):
            losses = dict(rank_losses) | losses  # of a repeated batch, the first rank's losses count
            all_bad |= rank_bad
        if self.world.rank == 0:
            for clip, reason in sorted(all_bad.items()):
                logger.warning(f"{display_name(self.clips[clip].path)}: left out of this evaluation: {reason}")
        return {sample: loss for sample, loss in losses.items() if sample[0] not in all_bad}

    def _inputs(self, batch: EvalBatch, bad: dict[int, str]) -> tuple[dict[str, Any], torch.Tensor]:
        """Return the transformer's arguments and the target.

        Clips that cannot be read are added to `bad`, and so are all clips of the batch if the VAE runs out of memory.
        Other clips or zeros replace them, because the other ranks wait for this one.
        """
        shape, items = self.clips[batch.samples[0][0]].shape, dict[int, Item]()
        for clip in dict.fromkeys(clip for clip, _ in batch.samples):
            try:
                items[clip] = Item(read_encoded(self.cache, self.clips[clip]))
            except (DamagedEntryError, UserError) as error:
                bad[clip] = str(error)
        if items:
            substitute = next(iter(items.values()))
            try:
                return self._build(batch, [items.get(clip, substitute) for clip, _ in batch.samples], shape)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                bad |= dict.fromkeys(items, brief(error))
        return self.builder.zero_inputs(shape, len(batch.samples))

    def _build(self, batch: EvalBatch, items: list[Item], shape: ClipShape) -> tuple[dict[str, Any], torch.Tensor]:
        no_dropout = torch.zeros(len(batch.samples), dtype=torch.bool)
        points = [self.points[number] for _, number in batch.samples]
        keys = [int(self.clips[clip].clip_key, 16) for clip, _ in batch.samples]
        slots = [keyed_hash("evaluation", key, point.number) for key, point in zip(keys, points, strict=True)]
        timesteps, modes = torch.tensor([point.timestep for point in points]), [point.mode for point in points]
        draws = Draws(timesteps, no_dropout, no_dropout, self.seed, 0, slots, modes)
        return self.builder.build(collate(items).tensors, shape, draws)

    def __str__(self) -> str:
        counts = {"held-out": self.num_held_out, "trained": len(self.clips) - self.num_held_out}
        kinds = " and ".join(f"{num} {kind}" for kind, num in counts.items() if num)
        noun = "clip" if len(self.clips) == 1 else "clips"
        timesteps, modes = ({getattr(point, name) for point in self.points} for name in ("timestep", "mode"))
        in_modes = f" in {counted(len(modes), 'condition mode')}" if modes != set(DEFAULT_MODES) else ""
        return f"{kinds} {noun} at {counted(len(timesteps), 'timestep')}{in_modes}"


def make_evaluation(job: Job, data: EncodedData, builder: StepBuilder, batch_sizes: Sequence[int]) -> Evaluation | None:
    """Return the evaluation of a run's data, or None if there are no clips to evaluate.

    builder: that of training, which is not changed. batch_sizes: largest batch of each bucket.
    """
    cfg, model = job.cfg, job.model
    held_out, trained = (
        [index[row] for row in range(len(index))] if index is not None else []
        for index in (data.held_out, data.trained)
    )
    clips = held_out + trained
    if not clips:
        return None
    eval_builder = copy.copy(builder)
    eval_builder.conditioning = builder.conditioning.model_copy(update={"image_noise": False})
    timesteps = midpoints(cfg.eval.num_timesteps, len(builder.alphas_cumprod))
    points = eval_points(timesteps, used_modes(cfg.conditioning.modes))
    costs = [
        step_flops(num_tokens(shape, model.geometry), model.num_layers, model.hidden_size).forward
        for shape in data.index.buckets
    ]
    batches = make_eval_batches([clip.bucket for clip in clips], len(points), batch_sizes)
    return Evaluation(
        tuple(clips),
        len(held_out),
        points,
        schedule_rounds(batches, costs, job.world.data_size),
        eval_builder,
        job.cache,
        job.world,
        cfg.seed,
    )


# ------------------------------------------------------------------------------------------------------ during training


def make_evaluation_callback(context: TrainContext) -> "EvaluationCallback | None":
    """Return the evaluation of a run, or None if eval.every is null or no clip can be evaluated.

    Rank 0 logs what is evaluated and what it costs.
    """
    run = context.run
    every, world = run.cfg.eval.every, run.world
    if every is None:
        return None
    evaluation = make_evaluation(run.job, run.data, context.builder, run.plan.local_batch_sizes)
    if evaluation is None:
        if world.rank == 0:
            logger.warning("eval.every: no clip to evaluate can be read, so the run is not evaluated")
        return None
    if world.rank == 0:
        line, warning = describe_cost(run, evaluation, every)
        logger.info(line)
        if warning:
            logger.warning(warning)
    first = first_evaluation(Path(run.cfg.output_dir) / "metrics.jsonl") if world.rank == 0 and run.first_step else {}
    return EvaluationCallback(context, evaluation, every, first)


class EvaluationCallback:
    """Records the evaluation losses during training (`callbacks.Callback`)."""

    name = "evaluating"
    at_start = True
    on_stop = False

    def __init__(self, context: TrainContext, evaluation: Evaluation, every: int, first: Mapping[str, float]):
        """first: the losses of the run's first evaluation; empty if there was none yet."""
        self.context, self.evaluation, self.every, self.first = context, evaluation, every, first

    def run(self, step: int) -> None:
        """Evaluate the weights after `step` optimizer steps. Collective."""
        start, world, engine = time.perf_counter(), self.evaluation.world, self.context.engine
        num_passes, when = len(self.evaluation.rounds), f"after step {step}" if step else "before step 1"
        bar = progress_bar(f"evaluating {when}", "pass", num_passes, world.rank == 0, leave=False)

        def should_continue(number: int) -> bool:
            self.context.watch(lambda: f"evaluating {when}, forward pass {number + 1} of {num_passes}")
            bar.update(number - bar.n)
            return not any_rank(world, self.context.is_stopping())[0]

        def forward(inputs: Mapping[str, Any]) -> torch.Tensor:
            return call_module(engine, world.device, inputs)[0]

        with evaluation_mode(engine.module, world.device), contextlib.closing(bar):
            scalars = self.evaluation.scalars(forward, should_continue)
            if scalars and step and self.context.ema:
                with self.context.ema.in_model():
                    averaged = self.evaluation.scalars(forward, should_continue)
                scalars |= {tag.replace("eval/", EMA_TAG, 1): loss for tag, loss in averaged.items()}
        if scalars:
            self.first = self.first or scalars
            if world.rank == 0:
                logger.info(describe_losses(self.first, scalars, when))
            self.context.monitor.add_scalars(step, scalars | {"eval/seconds": time.perf_counter() - start})


def describe_losses(first: Mapping[str, float], scalars: Mapping[str, float], when: str) -> str:
    """Return `eval 1.5129 -> 1.5090 after step 500`, with the run's first loss and this one, of held-out clips if any.

    first: the losses of the run's first evaluation.
    """
    tag = "eval/loss" if "eval/loss" in scalars else "eval/train_loss"
    before = f"{first[tag]:.4f} -> " if first is not scalars and tag in first else ""
    clips = "" if tag == "eval/loss" else " (trained clips; none are held out)"
    return f"eval {before}{scalars[tag]:.4f} {when}{clips}"


def share_of_training(run: Run, evaluation: Evaluation, num_steps: int) -> float:
    """Return the FLOPs of an evaluation divided by those of `num_steps` training steps, both of the transformer alone.

    An evaluation reads each clip and encodes its first frame once per batch; neither is counted.
    """
    memory, plan, geometry = run.job.memory, run.plan, run.model.geometry
    modes = [part.checkpointing for part in run.execution.buckets]
    flops = [training_flops(num_tokens(shape, geometry), memory.transformer, memory.trained) for shape in run.buckets]
    evaluation_flops = sum(
        max((flops[batch.bucket].forward + flops[batch.bucket].lora) * len(batch.samples) for batch in batches)
        for batches in evaluation.rounds
    )
    # A rank's micro-steps per epoch in each bucket. With fewer clips than ranks, several ranks train the same clip.
    sizes, counts = plan.local_batch_sizes, run.data.mixture.virtual_sizes
    micro_steps = [
        num / (size * min(max(1, num // size), run.world.data_size)) for num, size in zip(counts, sizes, strict=True)
    ]
    epoch_flops = [
        num * size * bucket_flops.hardware_flops(mode)
        for num, size, bucket_flops, mode in zip(micro_steps, sizes, flops, modes)
    ]
    return evaluation_flops / (plan.accumulation * sum(epoch_flops) / sum(micro_steps) * num_steps)


def describe_cost(run: Run, evaluation: Evaluation, every: int) -> tuple[str, str]:
    """Return a line about what is evaluated and its cost, and a warning if that is more than MAX_SHARE, else "".

    The line of a trial that evaluates for longer than it trains says what to change.
    """
    num_left = run.cfg.train.num_steps - run.first_step
    num_steps = max(1, min(every, num_left))
    share = share_of_training(run, evaluation, num_steps)
    cost = f"{percent(share)} of the training time"
    if share > 1:
        cost = "more time than training; to save time, raise eval.every or lower eval.num_clips or eval.num_timesteps"
    line = labeled("evaluation", f"{evaluation} every {counted(every, 'step')}, {cost}")
    if not evaluation.num_held_out:
        line += "; none held out"
    if share <= MAX_SHARE or run.cfg.train.num_steps < TRIAL_STEPS:
        return line, ""
    needed, fewer = math.ceil(num_steps * share / MAX_SHARE), int(run.cfg.eval.num_clips * MAX_SHARE / share)
    ways = [f"eval.every={needed}"] if needed <= num_left else []
    ways += [f"eval.num_clips={fewer}"] if fewer else ["a smaller eval.num_clips and eval.num_timesteps"]
    return line, (
        f"eval.every: evaluation takes more than {MAX_SHARE:.0%} of the training time. Set {' or '.join(ways)}, or "
        "turn it off with eval.every=null."
    )
