"""A loss with the noise taken out: fixed clips, timesteps and noise, nothing dropped. Weights are compared by it.

`eval/loss` is of clips that are never trained (eval.held_out, eval.path), `eval/train_loss` of as many that are: where
the two part, the run learns its clips by heart. Both also come by timestep (`/t=...`) and by bucket (`/bucket=...`).
What a sample draws follows from the seed, the clip's encoding and the number of the timestep, so the loss does not
depend on the other clips or on the ranks. Training draws from the VAE's posterior, so this does too; but it adds no
noise to the first frame, and drops nothing.

A run evaluates beside its training (`make_evaluation`), the command a LoRA file; both through `Evaluation`.
"""

import copy
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cogds.config.schema import RunConfig
from cogds.core.conditioning import image_condition, transformer_inputs
from cogds.core.diffusion import v_loss
from cogds.core.flops import step_flops
from cogds.core.geometry import ClipShape, latent_frames, num_tokens, padding_frames
from cogds.core.permutation import keyed_hash
from cogds.data.cache.store import Cache, DamagedEntryError
from cogds.data.loading.dataset import Item, collate, read_encoded
from cogds.data.loading.index import ClipIndex, IndexedClip
from cogds.distributed.collectives import all_gather, any_rank
from cogds.distributed.world import World
from cogds.encode.encoding_plan import EncodedData
from cogds.errors import UserError, brief
from cogds.formatting import counted
from cogds.metrics.monitor import Monitor
from cogds.model.evaluation_mode import call_aside, undisturbed
from cogds.model.load import ModelFolder
from cogds.train.memory_check import is_out_of_memory
from cogds.train.run import Run
from cogds.train.step import Draws, StepBuilder

logger = logging.getLogger(__name__)

# What evaluation may take of the training time before that is warned of.
MAX_SHARE = 0.05
# Shorter runs are trials, where evaluation may take what it takes.
TRIAL_STEPS = 100

Forward = Callable[[Mapping[str, Any]], torch.Tensor]


@dataclass(frozen=True)
class Task:
    """One forward pass: samples of one bucket, each a clip's number and a timestep's."""

    bucket: int
    samples: tuple[tuple[int, int], ...]


def middles(num: int, num_timesteps: int) -> list[int]:
    """The middles of `num` equal parts of [0, num_timesteps)."""
    return [num_timesteps * (2 * part + 1) // (2 * num) for part in range(num)]


def make_tasks(buckets: Sequence[int], num_timesteps: int, batch_sizes: Sequence[int]) -> list[Task]:
    """Every clip at every timestep, no more at a time than training has of the bucket.

    buckets: of every clip; batch_sizes: of every bucket. The tasks of a bucket are alike to a sample.
    """
    tasks = []
    for bucket in sorted(set(buckets)):
        clips = [clip for clip, one in enumerate(buckets) if one == bucket]
        samples = [(clip, number) for clip in clips for number in range(num_timesteps)]
        for part in np.array_split(np.arange(len(samples)), -(-len(samples) // batch_sizes[bucket])):
            tasks.append(Task(bucket, tuple(samples[number] for number in part)))
    return tasks


def deal_tasks(tasks: Sequence[Task], costs: Sequence[float], num_ranks: int) -> list[list[Task]]:
    """What the ranks do at the same moment, moment by moment: tasks of about one cost, the dearest first.

    costs: of a sample of every bucket. All ranks have something to do at every moment, as ZeRO-3 needs: those that are
    left over in the last do its last task over again.
    """
    ordered = sorted(tasks, key=lambda task: -costs[task.bucket] * len(task.samples))
    moments = [list(ordered[start : start + num_ranks]) for start in range(0, len(ordered), num_ranks)]
    return [moment + [moment[-1]] * (num_ranks - len(moment)) for moment in moments]


def mean_losses(
    clips: Sequence[IndexedClip], num_held_out: int, timesteps: Sequence[int], losses: Mapping[tuple[int, int], float]
) -> dict[str, float]:
    """Tags and means over clips and timesteps. The first `num_held_out` clips are `eval/loss`, the others
    `eval/train_loss`; clips without losses are left out."""
    found: dict[str, float] = {}
    for tag, numbers in (("eval/loss", range(num_held_out)), ("eval/train_loss", range(num_held_out, len(clips)))):
        grouped: dict[str, list[float]] = {tag: []}
        for number, timestep in enumerate(timesteps):
            grouped[f"{tag}/t={timestep:03}"] = [losses[clip, number] for clip in numbers if (clip, number) in losses]
        for clip in numbers:
            own = [losses[clip, number] for number in range(len(timesteps)) if (clip, number) in losses]
            grouped[tag] += own
            grouped.setdefault(f"{tag}/bucket={clips[clip].shape}", []).extend(own)
        found |= {name: math.fsum(values) / len(values) for name, values in grouped.items() if values}
    return found


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated, the same every time. The first `num_held_out` clips are never trained, the others are.

    moments: see `deal_tasks`, for `world.data_size` ranks.
    """

    clips: tuple[IndexedClip, ...]
    num_held_out: int
    timesteps: tuple[int, ...]
    moments: list[list[Task]]
    builder: StepBuilder
    cache: Cache
    world: World
    seed: int

    @classmethod
    def of(
        cls, cfg: RunConfig, data: EncodedData, builder: StepBuilder, batch_sizes: Sequence[int], model: ModelFolder,
        world: World,
    ) -> "Evaluation | None":  # fmt: skip
        """Of a run's data; None where there is nothing to evaluate. The builder is left as it is."""
        held_out, trained = ([] if one is None else list(_clips(one)) for one in (data.held_out, data.trained))
        clips = held_out + trained
        if not clips:
            return None
        plain = copy.copy(builder)
        plain.conditioning = builder.conditioning.model_copy(update={"image_noise": False})
        timesteps = middles(cfg.eval.num_timesteps, len(builder.alphas_cumprod))
        costs = [
            step_flops(num_tokens(shape, model.geometry), model.num_layers, model.hidden_size).forward
            for shape in data.index.buckets
        ]
        tasks = make_tasks([clip.bucket for clip in clips], len(timesteps), batch_sizes)
        return cls(
            tuple(clips),
            len(held_out),
            tuple(timesteps),
            deal_tasks(tasks, costs, world.data_size),
            plain,
            Cache(cfg.data.cache_dir),
            world,
            cfg.seed,
        )

    def scalars(self, forward: Forward, go_on: Callable[[int], bool] = lambda _: True) -> dict[str, float]:
        """Tags and losses, the same on every rank; none where `go_on` was false. Collective: see `losses`."""
        return mean_losses(self.clips, self.num_held_out, self.timesteps, self.losses(forward, go_on))

    @torch.no_grad()
    def losses(self, forward: Forward, go_on: Callable[[int], bool] = lambda _: True) -> dict[tuple[int, int], float]:
        """The loss of every clip at every timestep, by their numbers, the same on every rank. Collective.

        forward: the transformer's output for `StepBuilder.build`'s inputs. go_on: asked before every forward pass,
        given its number; where it is false, on all ranks alike, there are no losses. A clip that cannot be read, or
        made into inputs, is warned of and left out on all ranks alike. A forward pass that fails on one rank ends the
        run: at ZeRO-3 the others wait within it, for the weights that this one holds.
        """
        mine, bad = [moment[self.world.data_rank] for moment in self.moments], dict[int, str]()
        made = []
        for number, task in enumerate(mine):
            if not go_on(number):
                return {}
            inputs, target = self._inputs(task, bad)
            made.append(v_loss(forward(inputs), target))
        # The only wait for the device. Ranks that share a clip have the same losses: one of them tells.
        values = torch.cat(made).double().tolist() if self.world.sequence_rank == 0 else []
        samples = [sample for task in mine for sample in task.samples]
        found: dict[tuple[int, int], float] = {}
        unread: dict[int, str] = {}
        for pairs, theirs in all_gather(self.world, (list(zip(samples, values)), bad)):
            found = dict(pairs) | found  # done over again on a later rank: the first counts
            unread |= theirs
        if self.world.rank == 0:
            for clip, reason in sorted(unread.items()):
                logger.warning(f"{self.clips[clip].path} is left out of this evaluation: {reason}")
        return {sample: loss for sample, loss in found.items() if sample[0] not in unread}

    def _inputs(self, task: Task, bad: dict[int, str]) -> tuple[dict[str, Any], torch.Tensor]:
        """Return the transformer's arguments and the target.

        Clips that cannot be read are added to `bad`, and so are all clips of the task if the VAE runs out of memory.
        Other clips or zeros replace them, because the other ranks wait for this one.
        """
        shape, items = self.clips[task.samples[0][0]].shape, dict[int, Item]()
        for clip in dict.fromkeys(clip for clip, _ in task.samples):
            try:
                items[clip] = Item(read_encoded(self.cache, self.clips[clip]))
            except (DamagedEntryError, UserError) as error:
                bad[clip] = str(error)
        if items:
            another = next(iter(items.values()))
            try:
                return self._build(task, [items.get(clip, another) for clip, _ in task.samples], shape)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                bad |= dict.fromkeys(items, brief(error))
        return _stand_in(self.builder, shape, len(task.samples))

    def _build(self, task: Task, items: list[Item], shape: ClipShape) -> tuple[dict[str, Any], torch.Tensor]:
        batch = collate(items)
        kept = torch.zeros(len(task.samples), dtype=torch.bool)
        timesteps = torch.tensor([self.timesteps[number] for _, number in task.samples])
        places = [keyed_hash("evaluation", int(self.clips[clip].clip_key, 16), number) for clip, number in task.samples]
        return self.builder.build(batch.tensors, shape, Draws(timesteps, kept, kept, self.seed, 0, places))

    def __str__(self) -> str:
        num_trained = len(self.clips) - self.num_held_out
        parts = [f"{counted(self.num_held_out, 'clip')} held out (eval/loss)"] if self.num_held_out else []
        parts += [f"{counted(num_trained, 'clip')} of those trained (eval/train_loss)"] if num_trained else []
        return f"evaluating {' and '.join(parts)}, at {counted(len(self.timesteps), 'timestep')}"


def _stand_in(builder: StepBuilder, shape: ClipShape, batch_size: int) -> tuple[dict[str, Any], torch.Tensor]:
    """Inputs and a target of this shape, of zeros: as the builder's, but made without the cache and the VAE."""
    geometry = builder.geometry
    frames = latent_frames(shape.frames, geometry)
    frames += padding_frames(frames, geometry.patch_size_t)
    height, width = shape.height // geometry.vae_spatial, shape.width // geometry.vae_spatial
    latents = torch.zeros(batch_size, frames, geometry.latent_channels, height, width, device=builder.device)
    text = builder.empty_caption_states.expand(batch_size, -1, -1)
    timesteps = torch.zeros(batch_size, dtype=torch.int64, device=builder.device)
    image = image_condition(latents[:, :1], frames)
    return transformer_inputs(latents, image, text, timesteps, builder.rotary(shape), geometry), latents


def _clips(index: ClipIndex) -> Iterator[IndexedClip]:
    return (index[row] for row in range(len(index)))


# ------------------------------------------------------------------------------------------------------ beside training


def make_evaluation(
    run: Run,
    engine: Any,
    builder: StepBuilder,
    monitor: Monitor,
    watch: Callable[[Callable[[], str]], None] = lambda _: None,
    is_stopping: Callable[[], bool] = lambda: False,
) -> "EvaluationCallback | None":
    """The evaluation of a run; None if eval.every is null or no clip can be evaluated. Rank 0 prints its cost.

    watch: called with a description of each forward pass (`Watchdog.watch`). is_stopping: whether this rank was asked
    to stop, which ends an evaluation without a loss.
    """
    every, world = run.cfg.eval.every, run.world
    if every is None:
        return None
    evaluation = Evaluation.of(run.cfg, run.data, builder, run.plan.local_batch_sizes, run.model, world)
    if evaluation is None:
        if world.rank == 0:
            logger.warning("none of the clips to evaluate can be read: there is no evaluation")
        return None
    if world.rank == 0:
        line, too_much = cost_lines(run, evaluation, every)
        logger.info(line)
        if too_much:
            logger.warning(too_much)
    return EvaluationCallback(evaluation, every, engine, monitor, watch, is_stopping)


@dataclass(frozen=True)
class EvaluationCallback:
    """Records the evaluation losses during training (`callbacks.Callback`)."""

    evaluation: Evaluation
    every: int
    engine: Any
    monitor: Monitor
    watch: Callable[[Callable[[], str]], None]
    is_stopping: Callable[[], bool]
    name: str = "evaluating"
    at_start: bool = True
    on_stop: bool = False

    def run(self, step: int) -> None:
        """Evaluate the weights after `step` optimizer steps. Collective."""
        start, world = time.perf_counter(), self.evaluation.world

        def go_on(number: int) -> bool:
            self.watch(
                lambda: f"evaluating after step {step}, forward pass {number + 1} of {len(self.evaluation.moments)}"
            )
            return not any_rank(world, self.is_stopping())[0]

        with undisturbed(self.engine.module, world.device):
            scalars = self.evaluation.scalars(lambda inputs: call_aside(self.engine, world.device, inputs)[0], go_on)
        if scalars:
            self.monitor.add_scalars(step, scalars | {"eval/seconds": time.perf_counter() - start})


def share_of_training(run: Run, evaluation: Evaluation, num_steps: int) -> float:
    """What an evaluation takes, as a share of so many steps, both in the transformer's floating-point operations.

    Of an evaluation the VAE and the reading are not counted: a clip is read, and its first frame encoded, once for
    every batch of its timesteps.
    """
    model, plan, geometry = run.model, run.plan, run.model.geometry
    modes = [part.checkpointing for part in run.execution.buckets]
    num_lora = run.job.memory.lora.num_parameters
    flops = [
        step_flops(num_tokens(shape, geometry), model.num_layers, model.hidden_size, num_lora) for shape in run.buckets
    ]
    once = sum(
        max((flops[task.bucket].forward + flops[task.bucket].lora) * len(task.samples) for task in moment)
        for moment in evaluation.moments
    )
    # Of an epoch, a rank's micro-steps in every bucket: where there are fewer clips than ranks, copies are trained.
    sizes, counts = plan.local_batch_sizes, run.data.mixture.virtual_sizes
    micro_steps = [
        num / (size * min(max(1, num // size), run.world.data_size)) for num, size in zip(counts, sizes, strict=True)
    ]
    work = [num * size * one.done(mode) for num, size, one, mode in zip(micro_steps, sizes, flops, modes)]
    return once / (plan.accumulation * sum(work) / sum(micro_steps) * num_steps)


def cost_lines(run: Run, evaluation: Evaluation, every: int) -> tuple[str, str]:
    """What is evaluated and what that costs, for people; and what to do where it is more than MAX_SHARE, else ""."""
    rest = run.cfg.train.num_steps - run.first_step
    num_steps = max(1, min(every, rest))
    share = share_of_training(run, evaluation, num_steps)
    line = (
        f"{evaluation}, every {counted(every, 'step')}: about {100 * share:.1f}% of the training time, by arithmetic "
        "that counts the transformer alone"
    )
    if not evaluation.num_held_out:
        line += "; eval.held_out or eval.path would show overfitting"
    if share <= MAX_SHARE or run.cfg.train.num_steps < TRIAL_STEPS:
        return line, ""
    needed, fewer = math.ceil(num_steps * share / MAX_SHARE), int(run.cfg.eval.num_clips * MAX_SHARE / share)
    ways = [f"eval.every={needed}"] if needed <= rest else []
    ways += [f"eval.num_clips={fewer}"] if fewer else ["a smaller eval.num_clips and eval.num_timesteps"]
    return line, (
        f"evaluation takes more than {MAX_SHARE:.0%} of the training time: set {' or '.join(ways)}, or turn it off "
        "with eval.every=null"
    )
