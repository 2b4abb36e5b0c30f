"""One training run, from its data to the last step. Every rank runs the same `Trainer`.

What happens on one rank (a signal, a failed save, a loss that is not finite) is shared with all ranks at the end of the
step, so no rank waits for another forever.
"""

import dataclasses
import functools
import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import torch

import cogds
from cogds.config.loading import to_yaml
from cogds.core.diffusion import v_loss
from cogds.core.lr_schedule import learning_rate
from cogds.core.plan import MicroBatch
from cogds.core.rng import seed_global
from cogds.distributed.collectives import all_gather, any_rank, on_all_ranks, on_rank0
from cogds.distributed.deepspeed_internals import detach_monitor
from cogds.distributed.world import gpu_memory
from cogds.encode.clip_set import ClipSet
from cogds.encode.encoder import encode_dataset
from cogds.encode.on_the_fly import OnTheFlyModels, load_on_the_fly_models
from cogds.encode.tiling import choose_tiling
from cogds.engine import checkpoint as checkpoints
from cogds.engine.ema import Ema
from cogds.engine.sequence_groups import share_clips
from cogds.engine.shards import restore_shards
from cogds.engine.start import load_for_stage, set_learning_rate, start_engine
from cogds.engine.state import restore_state
from cogds.errors import Interrupted, UserError
from cogds.files import whole_file
from cogds.job import Job
from cogds.metrics.jsonl import rewind_metrics
from cogds.metrics.monitor import Monitor
from cogds.metrics.step_metrics import StepLosses
from cogds.metrics.trackers import Trackers
from cogds.model.load import WEIGHT_PARTS
from cogds.model.lora.adapter import load_initial_lora
from cogds.process.activity import activity
from cogds.process.logs import RESULT
from cogds.process.signals import StopRequest
from cogds.process.watchdog import Watchdog
from cogds.report.main import clip_table, run_report
from cogds.report.text import short_report
from cogds.train.bad_samples import BadSamples
from cogds.train.batches import Prefetcher, load_batches, make_micro_steps
from cogds.train.callbacks import TAG, Callback, TrainContext, due_after, due_at_start, run_callbacks
from cogds.train.evaluation import make_evaluation_callback
from cogds.train.memory_check import check_memory
from cogds.train.overview import FirstBatchLogger, log_overview
from cogds.train.resume import (
    InitialState,
    check_identity,
    data_identity,
    find_initial_state,
    resume_data,
    resume_plan,
    run_identity,
    saved_held_out_limit,
)
from cogds.train.run import Run
from cogds.train.samples import make_sample_callback
from cogds.train.saving import CheckpointCallback, check_space, export_folder
from cogds.train.step import StepBuilder, load_step_builder
from cogds.train.step_meter import StepMeter
from cogds.train.summary import condition_warning, learning_rate_warning, sample_command, show, summary, watch_command
from cogds.train.trained_part import add_trained_part, loaded_as_trained
from cogds.train.tuning import choose_execution, prepare_blocks

logger = logging.getLogger(__name__)

# Number of clips that a message about a bad step names.
MAX_NAMED = 8


class Trainer:
    """Trains up to `train.num_steps`, from scratch, from a LoRA or from a checkpoint. All methods are collective."""

    def __init__(self, job: Job, stop: StopRequest, dry_run: bool = False):
        """dry_run: stop before the first step and write nothing to the output folder."""
        self.job, self.stop, self.dry_run = job, stop, dry_run
        self.output_dir = Path(job.cfg.output_dir)
        self.watchdog: Watchdog | None = None
        self.ema: Ema | None = None

    def run(self) -> None:
        """Prepare, train and save. Raises Interrupted once everything is saved, if a rank was asked to stop."""
        initial = find_initial_state(self.job)
        run, initial, header = self.prepare(initial)
        on_rank0(run.world, lambda: self.announce(run, initial))
        if run.first_step >= run.cfg.train.num_steps:
            logger.info("already trained to step %d; to continue, set train.num_steps higher", run.first_step)
            self.log_results(run)
            return
        engine = self.build(run, initial)
        with activity("loading the VAE"):
            builder = load_step_builder(
                run.model, run.cfg.conditioning, run.data.empty_caption_states, self.job.dtype, run.world.device,
                self.job.condition_settings,
            )  # fmt: skip
            models = load_on_the_fly_models(self.job)  # before the memory check, which then counts them
        if self.dry_run:
            with activity("trying the largest bucket"):
                logger.log(RESULT, "%s", check_memory(run, engine, builder))
            logger.log(RESULT, "dry run: ready to train; nothing was trained or saved")
            return
        with activity(lambda: self.watchdog.describe() if self.watchdog else "starting the training"):
            self.train(run, engine, builder, models, header)
        self.log_results(run)

    # ------------------------------------------------------------------------------------------------- preparation

    def prepare(self, initial: InitialState) -> tuple[Run, InitialState, dict[str, Any]]:
        """Encode the data, plan the order of training, choose the execution.

        Returns the run, its initial state, and the header of its checkpoints.
        """
        job = choose_tiling(self.job, initial.header)
        self.job = job = dataclasses.replace(job, held_out_limit=saved_held_out_limit(initial.header))
        cfg, world = job.cfg, job.world
        if initial.checkpoint:  # check before encoding, which may take hours
            identity = self.model_identity()
            on_rank0(world, lambda: check_identity(initial, identity))
        if self.dry_run:
            initial = dataclasses.replace(initial, checkpoint=None, header={})
        data = encode_dataset(job, max_unusable=cfg.data.max_unusable, on_selected=self.report, parts=WEIGHT_PARTS)
        if initial.checkpoint:
            data = on_rank0(world, lambda: resume_data(data, initial.header, cfg))
        plan = job.plan(data.mixture)
        identity = self.model_identity() | data_identity(data)
        if initial.checkpoint:
            on_rank0(world, lambda: check_identity(initial, identity))
            plan = resume_plan(plan, initial.header, initial.checkpoint)
        with activity("choosing the attention kernel"):
            execution = choose_execution(job, plan.local_batch_sizes, initial.header.get("kernel"))
        run = Run(job, data, plan, execution, initial.header.get("step", 0))
        header = {
            "cogds_version": cogds.__version__,
            "identity": identity,
            "plan": dataclasses.asdict(plan),
            "index": data.index.path.name,
            "kernel": execution.kernel if world.device.type == "cuda" else None,  # a CPU does not choose
            "tiled": sorted(map(str, job.tiled)),
            "held_out_limit": data.held_out_limit,
            "start": checkpoints.start_point(cfg.checkpoint.resume, initial.header),
        }
        return run, initial, header

    def model_identity(self) -> dict[str, Any]:
        """Return the identity of the run without its data. Collective; downloads the transformer if it is missing."""
        job = self.job
        with activity("fetching the model"):
            on_all_ranks(job.world, lambda: job.model.fetch("transformer"))
        with activity("hashing the weights of the model"):
            weights_digest = on_rank0(job.world, job.weights_digest)
        return run_identity(job.cfg, job.ds_config["optimizer"]["type"], weights_digest, job.buckets)

    def report(self, clips: ClipSet) -> None:
        """Log what will be trained, on rank 0, before anything is encoded."""
        job, device = self.job, self.job.world.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
        logger.info(short_report(run_report(job, clips, clip_table(clips), gpu_memory(device), name)))

    def announce(self, run: Run, initial: InitialState) -> None:
        """Show the summary and prepare the output folder, on rank 0."""
        show(summary(run, initial, self.dry_run), "cogds")
        for _, _, part in run.used_buckets:
            if part.shortfall:
                logger.warning(part.shortfall)
        for warning in (learning_rate_warning(run.cfg), condition_warning(run.cfg, run.model.geometry)):
            if warning:
                logger.warning(warning)
        if self.dry_run:
            return
        checkpoints.remove_all_partial(self.output_dir)
        checkpoints.check_space(self.output_dir, 0)  # before any file is moved
        if previous := checkpoints.set_aside(self.output_dir, initial.checkpoint, run.first_step):
            logger.info("moved the files of an earlier run to %s", previous)
        rewind_metrics(self.output_dir / "metrics.jsonl", run.first_step, tags_written_again(run))
        config = f"# cogds {cogds.__version__}\n{to_yaml(run.cfg)}"
        for name, text in (("run.yaml", config), ("ds_config.json", json.dumps(run.ds_config, indent=2))):
            with whole_file(self.output_dir / name) as partial:
                partial.write_text(text, encoding="utf-8")
        if run.data.unusable.file:
            with whole_file(self.output_dir / "unusable.jsonl") as partial:
                shutil.copyfile(run.data.unusable.file, partial)

    @activity("loading the transformer and starting DeepSpeed")
    def build(self, run: Run, initial: InitialState) -> Any:
        """Load the transformer, choose what is trained, start the engine and restore the checkpoint if there is one."""
        cfg, world = run.cfg, run.world
        transformer = load_for_stage(
            run.model, self.job.dtype, run.ds_config, world, cfg.model.quantization, cfg.model.fp8_matmul,
            loaded_as_trained(run.job),
        )  # fmt: skip
        parameters = add_trained_part(transformer, run.job)
        if initial.init_from:
            load_initial_lora(transformer, initial.init_from)
        transformer.train()
        prepare_blocks(transformer, run.execution)
        share_clips(transformer, world, cfg.train.timeout_s)
        engine = start_engine(transformer, parameters, run.ds_config)
        on_rank0(world, lambda: check_space(run, engine))
        if cfg.full.ema_decay is not None:
            device = world.device if cfg.full.ema_device == "gpu" else torch.device("cpu")
            self.ema = Ema(engine, cfg.full.ema_decay, device)
        if initial.checkpoint and cfg.trains_lora:
            restore_state(engine, initial.state, world)
            initial.release()
        elif initial.checkpoint:
            restore_shards(engine, initial.checkpoint, initial.header, self.ema)
        return engine

    # ---------------------------------------------------------------------------------------------------- training

    def train(
        self, run: Run, engine: Any, builder: StepBuilder, models: OnTheFlyModels | None, header: dict[str, Any]
    ) -> None:
        """Train from `run.first_step` to the last step.

        Raises Interrupted after saving, if a rank was asked to stop, and UserError after too many bad steps in a row.
        """
        cfg, world = run.cfg, run.world
        monitor = self.make_monitor(run, engine)
        log_overview(run, monitor)
        self.watchdog = watchdog = Watchdog(world.rank, cfg.train.step_timeout_s, self.output_dir)
        watchdog.watch(lambda: "trying the largest bucket before the first step")
        if result := check_memory(run, engine, builder):
            monitor.add_scalars(run.first_step, result.scalars())
            logger.info("%s", result)

        context = TrainContext(
            run, engine, builder, monitor, watchdog.watch, lambda: bool(self.stop.requested), self.ema
        )
        saving = CheckpointCallback(context, header)
        optional: list[Callback | None] = [make_evaluation_callback(context), make_sample_callback(context)]
        callbacks = [callback for callback in (*optional, saving) if callback is not None]
        self.stop.defer()
        on_batch = FirstBatchLogger(run, builder, monitor).log if world.rank == 0 else None
        bad_samples = BadSamples(world, self.output_dir, len(run.data.index), cfg.data.max_unusable)
        run_callbacks(due_at_start(callbacks, run.first_step), run.first_step, watchdog, monitor, world)

        batches = Prefetcher(make_micro_steps(run, builder, load_batches(run, models), on_batch))
        meter, num_bad_steps = StepMeter(run, engine), 0
        for step in range(run.first_step, cfg.train.num_steps):
            watchdog.watch(functools.partial(run.describe, step))
            bad_clips = train_step(context, batches, step, bad_samples, meter)
            num_bad_steps = num_bad_steps + 1 if bad_clips else 0
            if self.ema and not bad_clips:
                self.ema.update(step)
            is_stopped, is_busy = any_rank(world, bool(self.stop.requested), saving.is_busy)
            is_last = step + 1 == cfg.train.num_steps
            if not is_busy:
                saving.advance(step + 1)
            if (step + 1) % cfg.metrics.every == 0 or is_last or is_stopped:
                bad_samples.sync()
            if num_bad_steps == cfg.train.max_bad_steps:
                monitor.close()
                raise too_many_bad_steps(bad_clips, num_bad_steps, world.rank)
            due = due_after(callbacks, step + 1, is_last=is_last, is_stopped=is_stopped)
            if due:
                monitor.flush()
                run_callbacks(due, step + 1, watchdog, monitor, world)
                meter.restart()
            if is_stopped and not is_last:
                break
        saving.finish(step + 1)
        watchdog.rest()
        monitor.close()
        if not is_last:
            logger.info("stopped and saved after step %d; run the same command to continue", step + 1)
            raise Interrupted
        watchdog.close()

    def make_monitor(self, run: Run, engine: Any) -> Monitor:
        """Return the writer of metrics, with the trackers that the DeepSpeed config enables."""
        cfg, monitor = run.cfg, detach_monitor(engine)
        steps = range(run.first_step, cfg.train.num_steps)
        return Monitor(
            run.world, self.output_dir, run.buckets, steps, cfg.metrics, Trackers(monitor) if monitor else None
        )

    def log_results(self, run: Run) -> None:
        """Log the path of the LoRA or the model, how to watch the run, and how to make a video."""
        step = checkpoints.step_name(max(run.first_step, run.cfg.train.num_steps))
        result = self.output_dir / export_folder(run.cfg) / step
        label = "LoRA" if run.cfg.trains_lora else "model"
        logger.log(RESULT, "%s: %s\nwatch: %s", label, result, watch_command(self.output_dir))
        logger.log(RESULT, "next: %s", sample_command(run, result))


def tags_written_again(run: Run) -> tuple[str, ...]:
    """Return the prefixes of the tags that callbacks write again when a run resumes at its first step."""
    cfg, step = run.cfg, run.first_step
    if step >= cfg.train.num_steps:
        return ()
    losses, videos = (every is not None and step % every == 0 for every in (cfg.eval.every, cfg.sample.every))
    return ("eval/",) * losses + (f"{TAG}/",) * (losses or videos)


def train_step(
    context: TrainContext, batches: Prefetcher, step: int, bad_samples: BadSamples, meter: StepMeter
) -> list[str]:
    """Run one optimizer step: `accumulation` micro-steps of forward and backward, then the update. Collective.

    If a loss or gradient is not finite on any rank, no weight changes, and descriptions of the clips are returned.
    """
    run, engine = context.run, context.engine
    cfg, plan, world = run.cfg, run.plan, run.world
    micro_batches, losses = plan.at(step), StepLosses(len(run.buckets), world.device)
    trained: list[tuple[MicroBatch, torch.Tensor]] = []
    opt = cfg.optimizer
    lr = learning_rate(step, opt.lr, opt.schedule, cfg.train.num_steps, opt.warmup_steps, opt.final_lr_ratio)
    set_learning_rate(engine, lr)
    for number, micro_batch in enumerate(micro_batches):
        meter.begin("inputs")
        batch = batches.take()
        meter.begin("forward")
        bad_samples.add(batch.bad)
        # Seeded by rank, not data rank: ranks that share a clip must not drop the same positions of their parts.
        seed_global(cfg.seed, step * plan.accumulation + number, world.rank)
        engine.module.set_checkpointing(run.execution.buckets[batch.bucket].checkpointing)
        per_sample = v_loss(engine(**batch.inputs)[0], batch.target)
        loss = (batch.weights * per_sample).mean()
        meter.begin("backward")
        # The factor is 1 if the loss is finite. Otherwise it makes the gradient not finite too, so DeepSpeed skips the
        # step on all ranks, and no rank has to wait for the value of a loss.
        engine.backward(loss * (1 + 0 * loss.detach()))
        meter.begin("inputs")
        # The GPU is still busy, and DeepSpeed's step would wait for it. Preparing earlier, or on another stream, would
        # need the VAE's memory on top of the activations.
        batches.prepare()
        meter.begin("optimizer")
        if number + 1 == len(micro_batches):
            meter.before_update(step)
        engine.step()
        share = loss.detach() / (world.size * plan.accumulation)  # all ranks that share a clip add its loss
        losses.add(share, per_sample, batch.bucket, batch.quarters)
        trained.append((micro_batch, per_sample.detach()))
    is_skipped = not engine.was_step_applied()
    measured, rank_values, norms = meter.finish_step(step, micro_batches, batches.take_wait_s())
    scalars = {
        "train/lr": lr,
        "train/grad_norm": engine.get_global_grad_norm(),
        "train/skipped": float(is_skipped),
        "train/epoch": plan.epoch_of(step),
        **measured,
    }
    context.monitor.add_step(step + 1, scalars, losses, rank_values, norms)
    return _describe_bad_step(run, step, trained) if is_skipped else []


def _describe_bad_step(run: Run, step: int, trained: list[tuple[MicroBatch, torch.Tensor]]) -> list[str]:
    """Log and return the clips whose loss is not finite, or all clips if every loss is finite. Collective."""
    own = [
        (str(run.buckets[micro_batch.bucket_of(run.world.data_rank)]), clip, loss)
        for micro_batch, losses in (trained if run.world.sequence_rank == 0 else [])
        for clip, loss in zip(run.clips(micro_batch), losses.tolist())
    ]
    all_samples = [(rank, *sample) for rank, samples in enumerate(all_gather(run.world, own)) for sample in samples]
    culprits = [sample for sample in all_samples if not math.isfinite(sample[3])]
    named = [
        f"rank {rank}, bucket {bucket}, {clip} (loss {loss:g})" for rank, bucket, clip, loss in culprits or all_samples
    ]
    cause = "loss" if culprits else "gradient (every loss is finite)"
    more = f"; and {len(named) - MAX_NAMED} more" if len(named) > MAX_NAMED else ""
    logger.info("step %d skipped, %s not finite: %s%s", step + 1, cause, "; ".join(named[:MAX_NAMED]), more)
    return named


def too_many_bad_steps(named: list[str], num_bad: int, rank: int) -> UserError:
    """Return the error that ends a run after `train.max_bad_steps` bad steps in a row."""
    return UserError(
        f"train.max_bad_steps: {num_bad} steps in a row had a loss or gradient that is not finite, the last with "
        f"{'; '.join(named[:MAX_NAMED])}. Check these clips, or lower optimizer.lr, then resume.",
        shared=rank > 0,
    )
