"""A loss with the noise taken out: fixed clips, timesteps and noise, nothing dropped. Weights are compared by it.

`eval/loss` is of clips that are never trained (eval.held_out, eval.path), `eval/train_loss` of as many that are: where
the two part, the run learns its clips by heart. Both also come by timestep (`/t=...`) and by bucket (`/bucket=...`).
What a sample draws follows from the seed, the clip's encoding and the number of the timestep, so the loss does not
depend on the other clips or on the ranks. Training draws from the VAE's posterior, so this does too; but it adds no
noise to the first frame, and drops nothing.

A run evaluates beside its training (`make_evaluation`), the command a LoRA file; both through `Evaluation`.
"""

import argparse
import copy
import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cogds.cli import parse_args
from cogds.config import RunConfig, load_config, replace
from cogds.core.conditioning import image_condition, transformer_inputs
from cogds.core.cost import step_flops
from cogds.core.diffusion import v_loss
from cogds.core.geometry import ClipShape, latent_frames, num_tokens, padding_frames
from cogds.core.permutation import keyed_hash
from cogds.data.cache import Cache, DamagedEntry
from cogds.data.dataset import Item, collate, read_encoded
from cogds.data.index import ClipIndex, IndexedClip
from cogds.errors import UserError, brief, refuse_to_run
from cogds.model.attention import use
from cogds.model.convert import check_all_fit, load_adapter
from cogds.model.load import DTYPES, ModelFolder, find_model, load_transformer
from cogds.model.lora import add_lora
from cogds.model.lora_file import LoraFile, describe_lora, read_loras
from cogds.model.quantize import check_base
from cogds.prepare.encoding import EncodedData, prepare
from cogds.prepare.order import batch_sizes
from cogds.prepare.survey import make_buckets
from cogds.runtime.monitor import Monitor
from cogds.runtime.outlet import warn
from cogds.runtime.world import World, all_gather, any_rank, connect, disconnect, read_world
from cogds.training.aside import call_aside, undisturbed
from cogds.training.execution import Sizes
from cogds.training.loop import Occasion
from cogds.training.rehearsal import is_out_of_memory
from cogds.training.run import Run
from cogds.training.step import Draws, StepBuilder, load_step_builder
from cogds.wording import counted

# What evaluation may take of the training time before that is warned of.
MAX_SHARE = 0.05
# Shorter runs are trials, where evaluation may take what it takes.
TRIAL_STEPS = 100
ALL_CLIPS = 2**31 - 1

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
        plain.conditioning = dataclasses.replace(builder.conditioning, image_noise=False)
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
                warn(f"{self.clips[clip].path} is left out of this evaluation: {reason}")
        return {sample: loss for sample, loss in found.items() if sample[0] not in unread}

    def _inputs(self, task: Task, bad: dict[int, str]) -> tuple[dict[str, Any], torch.Tensor]:
        """The transformer's arguments and the target. Unreadable clips join `bad`, as do all of the task if the
        VAE runs out of memory; others or zeros stand in for them, since the other ranks wait for this one.
        """
        shape, items = self.clips[task.samples[0][0]].shape, dict[int, Item]()
        for clip in dict.fromkeys(clip for clip, _ in task.samples):
            try:
                items[clip] = Item(read_encoded(self.cache, self.clips[clip]))
            except (DamagedEntry, UserError) as error:
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
    text = builder.no_caption_states.expand(batch_size, -1, -1)
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
    must_stop: Callable[[], bool] = lambda: False,
) -> Occasion | None:
    """The evaluation of a run, every eval.every steps; None where that is null. Rank 0 says what it will cost.

    watch: told what is being done, as of `Watchdog`; must_stop: whether this rank was asked to stop, which ends the
    evaluation without a loss.
    """
    every, world = run.cfg.eval.every, run.world
    if every is None:
        return None
    evaluation = Evaluation.of(run.cfg, run.data, builder, run.plan.local_batch_sizes, run.model, world)
    if evaluation is None:
        if world.rank == 0:
            warn("not one clip that should be evaluated can be read: there is no evaluation")
        return None
    if world.rank == 0:
        line, too_much = cost_lines(run, evaluation, every)
        print(line, flush=True)
        if too_much:
            warn(too_much)

    def forward(inputs: Mapping[str, Any]) -> torch.Tensor:
        return call_aside(engine, world.device, inputs)[0]

    def act(step: int) -> None:
        start = time.perf_counter()

        def go_on(number: int) -> bool:
            watch(lambda: f"evaluating after step {step}, forward pass {number + 1} of {len(evaluation.moments)}")
            return not any_rank(world, must_stop())[0]

        with undisturbed(engine.module, world.device):
            scalars = evaluation.scalars(forward, go_on)
        if scalars:
            monitor.note(step, scalars | {"eval/seconds": time.perf_counter() - start})

    return Occasion("evaluating", every, act)


def share_of_training(run: Run, evaluation: Evaluation, num_steps: int) -> float:
    """What an evaluation takes, as a share of so many steps, both in the transformer's floating-point operations.

    Of an evaluation the VAE and the reading are not counted: a clip is read, and its first frame encoded, once for
    every batch of its timesteps.
    """
    model, plan, geometry, levels = run.model, run.plan, run.model.geometry, run.execution.levels
    num_lora = Sizes.of(run.cfg, model).lora.num_parameters
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
    work = [num * size * one.done(level) for num, size, one, level in zip(micro_steps, sizes, flops, levels)]
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


# ---------------------------------------------------------------------------------------------------------- the command


def main(default_config: Path, argv: list[str] | None = None) -> None:
    """Print the evaluation losses of the run's model, with a LoRA or without, as one line of JSON.

    The tags are those of a run. Several ranks share the work; each holds the whole model, as ZeRO has no part in it.
    """
    args = parse_args(
        sys.argv[1:] if argv is None else argv,
        "Evaluate a model on its dataset with fixed timesteps and fixed noise, as a run does beside its training.",
        _add_arguments,
    )
    cfg, _ = load_config(args.config or str(default_config), args.overrides)
    loras = read_loras([args.lora] if args.lora else [], args.lora_alpha, "--lora-alpha")
    convention = loras[0].metadata.get("image_latents") if loras else None
    cfg = replace(
        cfg,
        {
            "data.encode": "on_the_fly",  # what is evaluated is encoded all the same, the rest is not
            "conditioning.image_latents": convention or cfg.conditioning.image_latents,  # as it was trained
            "eval.every": 1,
            "eval.num_clips": ALL_CLIPS if args.all else cfg.eval.num_clips,
        },
    )
    model = find_model(cfg.model.path, cfg.model.revision)
    check_all_fit(loras, model)
    buckets, world = make_buckets(cfg, model), read_world()
    if world.rank == 0:
        for lora in loras:
            print("\n".join(describe_lora(lora, "--lora-alpha")), file=sys.stderr)
    check_base(cfg.model.base, cfg.model.matmul, cfg.train.precision, 0, world.device)
    if world.size > 1:
        connect(world, cfg.train.timeout_s, cfg.network)
    data = prepare(cfg, model, buckets, world)
    transformer = load_evaluated(cfg, model, world.device, loras)
    builder = load_step_builder(
        model, cfg.conditioning, data.no_caption_states, DTYPES[cfg.train.precision], world.device
    )
    evaluation = Evaluation.of(cfg, data, builder, batch_sizes(cfg, buckets, model), model, world)
    if evaluation is None:
        raise UserError(f"not one of the clips of {cfg.data.path} that should be evaluated can be read: mend them")
    scalars = evaluation.scalars(lambda inputs: transformer(**inputs)[0])
    if world.rank == 0:
        print(json.dumps(scalars))
    if world.size > 1:
        disconnect()


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lora", metavar="LORA", help="a LoRA file or folder; none: the base model")
    parser.add_argument(
        "--lora-alpha", type=float, metavar="ALPHA", help="its alpha if the file names none; default: rank"
    )
    parser.add_argument("--all", action="store_true", help="evaluate every clip, not only eval.num_clips of them")


def load_evaluated(cfg: RunConfig, model: ModelFolder, device: torch.device, loras: Sequence[LoraFile] = ()) -> Any:
    """The whole transformer as the config has it, with a LoRA that fits it or without, ready to compute."""
    dtype = DTYPES[cfg.train.precision]
    transformer = load_transformer(model, dtype, device, cfg.model.base, cfg.model.matmul)
    for lora in loras:
        add_lora(transformer, load_adapter(lora))
    if cfg.model.attention != "auto":
        use(cfg.model.attention, device)
        transformer.set_kernel(cfg.model.attention)
    return transformer.eval()


if __name__ == "__main__":
    refuse_to_run("cogds.evaluate", "evaluate")
