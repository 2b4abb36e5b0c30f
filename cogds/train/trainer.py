"""One training run: data, model, engine, steps. Every rank runs the same `Trainer`.

Events on one rank (a signal, a failed save, a loss that is not finite) are shared with every rank at the end of the
same step, so that no rank waits for another forever.
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
from cogds.distributed.collectives import all_gather, any_rank, on_rank0
from cogds.encode.clip_set import ClipSet
from cogds.encode.encoder import encode_dataset
from cogds.engine import checkpoint as checkpoints
from cogds.engine.deepspeed_internals import detach_monitor
from cogds.engine.sequence_groups import share_clips
from cogds.engine.start import load_for_stage, set_learning_rate, start_engine
from cogds.engine.state import restore_state
from cogds.errors import Interrupted, UserError
from cogds.files import whole_file
from cogds.job import Job
from cogds.metrics.jsonl import rewind_metrics
from cogds.metrics.monitor import Monitor
from cogds.metrics.step_metrics import StepLosses
from cogds.metrics.trackers import Trackers
from cogds.model.lora.adapter import inject, start_from
from cogds.process.logs import RESULT
from cogds.process.signals import StopRequest
from cogds.process.watchdog import Watchdog
from cogds.report.main import clip_table, run_report
from cogds.report.text import short_report
from cogds.train.bad_samples import Quarantine
from cogds.train.batches import Prefetcher, load_batches, make_micro_steps
from cogds.train.callbacks import TAG, Callback, run_callbacks
from cogds.train.evaluation import make_evaluation
from cogds.train.first_look import FirstBatches, show_settings
from cogds.train.memory_check import check_memory
from cogds.train.meter import Meter
from cogds.train.resume import Start, check_matching, continued_plan, data_identity, find_start, identity, resumed_data
from cogds.train.run import Run
from cogds.train.samples import make_previews
from cogds.train.saving import CheckpointCallback, check_space
from cogds.train.step import load_step_builder
from cogds.train.summary import show, summary
from cogds.train.tuning import choose_execution, gpu_memory, prepare_blocks

logger = logging.getLogger(__name__)

# Clips that a message about a bad step names.
MAX_NAMED = 8


class Trainer:
    """Trains up to `train.num_steps`, from scratch or from a checkpoint. All methods are collective."""

    def __init__(self, job: Job, stop: StopRequest, dry_run: bool = False):
        """dry_run: stop before the first step and leave the output folder as it is."""
        self.job, self.stop, self.dry_run = job, stop, dry_run
        self.output_dir = Path(job.cfg.output_dir)

    def run(self) -> None:
        """Prepare, train and save. Raises Interrupted once everything is saved, if a rank was asked to stop."""
        start = find_start(self.job)
        run, start, header = self.prepare(start)
        on_rank0(run.world, lambda: self.announce(run, start))
        if run.first_step >= run.cfg.train.num_steps:
            logger.info("already trained to step %d; raise train.num_steps to train on", run.first_step)
            self.end(run)
            return
        engine = self.build(run, start)
        builder = load_step_builder(
            run.model, run.cfg.conditioning, run.data.empty_caption_states, self.job.dtype, run.world.device
        )
        if self.dry_run:
            tried = check_memory(run, engine, builder)
            logger.log(RESULT, "%s\ndry run: ready to train; nothing was trained or saved", tried)
            return
        self.train(run, engine, builder, header)
        self.end(run)

    # ------------------------------------------------------------------------------------------------- preparation

    def prepare(self, start: Start) -> tuple[Run, Start, dict[str, Any]]:
        """Scan and encode the data, plan the order, choose how to run. Returns the header of checkpoints too."""
        job, cfg, world = self.job, self.job.cfg, self.job.world
        fixed = identity(cfg, job.ds_config["optimizer"]["type"], on_rank0(world, job.weights_digest), job.buckets)
        if start.checkpoint:  # before hours of encoding
            on_rank0(world, lambda: check_matching(start, fixed))
        if self.dry_run:
            start = dataclasses.replace(start, checkpoint=None, facts={})
        data = encode_dataset(
            cfg, job.model, job.buckets, world, max_unusable=cfg.data.max_unusable, on_selected=self.report
        )
        if start.checkpoint:
            data = on_rank0(world, lambda: resumed_data(data, start.facts, cfg))
        plan = job.plan(data.mixture)
        fixed |= data_identity(data)
        if start.checkpoint:
            on_rank0(world, lambda: check_matching(start, fixed))
            plan = continued_plan(plan, start.facts, start.checkpoint)
        execution = choose_execution(job, plan.local_batch_sizes)
        run = Run(job, data, plan, execution, start.facts.get("step", 0))
        header = {
            "cogds_version": cogds.__version__,
            "identity": fixed,
            "plan": dataclasses.asdict(plan),
            "index": data.index.path.name,
            "start": checkpoints.start_point(cfg.checkpoint.resume, start.facts),
        }
        return run, start, header

    def report(self, clips: ClipSet) -> None:
        """Print what will be trained, on rank 0, before anything is encoded."""
        job = self.job
        logger.info(short_report(run_report(job, clips, clip_table(clips), gpu_memory(job.world.device))))

    def announce(self, run: Run, start: Start) -> None:
        """On rank 0: print the summary, and prepare the output folder."""
        show([*summary(run, start.checkpoint, self.dry_run), *start.notes], "cogds")
        if self.dry_run:
            return
        checkpoints.check_space(self.output_dir, 0)  # before anything is moved
        if previous := checkpoints.set_aside(self.output_dir, start.checkpoint, run.first_step):
            logger.info("moved the files of an earlier run to %s", previous)
        rewind_metrics(self.output_dir / "metrics.jsonl", run.first_step, tags_written_again(run))
        config = f"# cogds {cogds.__version__}\n{to_yaml(run.cfg)}"
        for name, text in (("run.yaml", config), ("ds_config.json", json.dumps(run.ds_config, indent=2))):
            with whole_file(self.output_dir / name) as partial:
                partial.write_text(text, encoding="utf-8")
        if run.data.unusable.file:
            with whole_file(self.output_dir / "unusable.jsonl") as partial:
                shutil.copyfile(run.data.unusable.file, partial)

    def build(self, run: Run, start: Start) -> Any:
        """The DeepSpeed engine around the transformer with its LoRA, with a checkpoint's state if there is one."""
        cfg, world = run.cfg, run.world
        transformer = load_for_stage(
            run.model, self.job.dtype, run.ds_config, world, cfg.model.quantization, cfg.model.fp8_matmul
        )
        lora = cfg.lora
        parameters = inject(transformer, lora.rank, lora.alpha, lora.dropout, lora.target_modules, cfg.seed)
        if start.init_from:
            start_from(transformer, start.init_from)
        transformer.train()
        prepare_blocks(transformer, run.execution)
        share_clips(transformer, world, cfg.train.timeout_s)
        engine = start_engine(transformer, parameters, run.ds_config)
        on_rank0(world, lambda: check_space(self.output_dir, engine))
        if start.checkpoint:
            restore_state(engine, start.state, world)
            start.release()
        return engine

    # ---------------------------------------------------------------------------------------------------- training

    def train(self, run: Run, engine: Any, builder: Any, header: dict[str, Any]) -> None:
        """Train from `run.first_step` to the last step. Raises Interrupted, and UserError for too many bad steps."""
        cfg, world = run.cfg, run.world
        monitor = self.monitor(run, engine)
        show_settings(run, monitor)
        watchdog = Watchdog(world.rank, cfg.train.step_timeout_s, self.output_dir)
        watchdog.watch(lambda: "trying the largest bucket before the first step")
        if tried := check_memory(run, engine, builder):
            monitor.add_scalars(run.first_step, tried.scalars())
            logger.info("%s", tried)
        saving = CheckpointCallback(run, engine, monitor, header)
        parts = (run, engine, builder, monitor, watchdog.watch, lambda: bool(self.stop.requested))
        optional: list[Callback | None] = [make_evaluation(*parts), make_previews(*parts)]
        callbacks = [callback for callback in (*optional, saving) if callback is not None]
        self.stop.defer()
        inspect = FirstBatches(run, builder, monitor).look if world.rank == 0 else None
        bad_samples = Quarantine(world, self.output_dir, len(run.data.index), cfg.data.max_unusable)
        at_start = [one for one in callbacks if one.at_start and run.first_step % one.every == 0]
        run_callbacks(at_start, run.first_step, watchdog, monitor, world)
        batches = Prefetcher(make_micro_steps(run, builder, load_batches(run), inspect))
        meter, num_bad = Meter(run, engine), 0
        for step in range(run.first_step, cfg.train.num_steps):
            watchdog.watch(functools.partial(run.describe, step))
            bad = train_step(run, engine, batches, step, monitor, bad_samples, meter)
            num_bad = num_bad + 1 if bad else 0
            is_stopped, is_written = any_rank(world, bool(self.stop.requested), saving.is_written)
            if is_written:
                saving.finish(step + 1)
            is_last = step + 1 == cfg.train.num_steps
            if (step + 1) % cfg.metrics.every == 0 or is_last or is_stopped:
                bad_samples.settle()
            if num_bad == cfg.train.max_bad_steps:
                monitor.close()
                raise too_many_bad_steps(bad, num_bad, world.rank)
            due = [
                one
                for one in callbacks
                if ((step + 1) % one.every == 0 or is_last or is_stopped) and (one.on_stop or not is_stopped)
            ]
            if due:
                monitor.flush()
                run_callbacks(due, step + 1, watchdog, monitor, world)
                meter.rest()  # callbacks are no part of the next step
            if is_stopped and not is_last:
                break
        saving.finish(step + 1)
        watchdog.rest()
        monitor.close()
        if not is_last:
            logger.info("stopped and saved after step %d: run the same command to train on", step + 1)
            raise Interrupted
        watchdog.close()

    def monitor(self, run: Run, engine: Any) -> Monitor:
        """What writes the metrics."""
        cfg, monitor = run.cfg, detach_monitor(engine)
        return Monitor(
            run.world, self.output_dir, run.buckets, run.first_step, cfg.train.num_steps, cfg.metrics.every,
            cfg.metrics.progress_bar, Trackers(monitor) if monitor else None,
        )  # fmt: skip

    def end(self, run: Run) -> None:
        """Log where the results are and how to watch them."""
        lora = self.output_dir / "lora" / checkpoints.step_name(max(run.first_step, run.cfg.train.num_steps))
        logger.log(RESULT, "LoRA: %s\nwatch: tensorboard --logdir %s", lora, self.output_dir / "tensorboard")


def tags_written_again(run: Run) -> tuple[str, ...]:
    """Prefixes of the tags that callbacks write again when a run resumes at this step."""
    cfg, step = run.cfg, run.first_step
    if step >= cfg.train.num_steps:
        return ()
    losses, videos = (every is not None and step % every == 0 for every in (cfg.eval.every, cfg.sample.every))
    return ("eval/",) * losses + (f"{TAG}/",) * (losses or videos)


def train_step(
    run: Run, engine: Any, batches: Prefetcher, step: int, monitor: Monitor, bad_samples: Quarantine, meter: Meter
) -> list[str]:
    """One optimizer step: `accumulation` micro-steps of forward and backward; all ranks train buckets of equal cost.

    If a loss or gradient is not finite on any rank, no weight changes, and the clips are returned as messages.
    """
    cfg, plan, world = run.cfg, run.plan, run.world
    micro_batches, losses = plan.at(step), StepLosses(len(run.buckets), world.device)
    trained: list[tuple[MicroBatch, torch.Tensor]] = []
    rates = cfg.optimizer
    lr = learning_rate(step, rates.lr, rates.schedule, cfg.train.num_steps, rates.warmup_steps, rates.final_lr_ratio)
    set_learning_rate(engine, lr)
    for number, micro_batch in enumerate(micro_batches):
        meter.begin("inputs")
        batch = batches.take()
        meter.begin("forward")
        bad_samples.add(batch.bad)
        # By the rank itself: ranks that share a clip must not drop the same positions of their parts.
        seed_global(cfg.seed, step * plan.accumulation + number, world.rank)
        engine.module.set_checkpointing(run.execution.buckets[batch.bucket].checkpointing)
        per_sample = v_loss(engine(**batch.inputs)[0], batch.target)
        loss = (batch.weights * per_sample).mean()
        meter.begin("backward")
        # The factor is 1 if the loss is finite. Otherwise it makes the gradient not finite too; DeepSpeed sees that on
        # all ranks and skips the step, and no rank has to wait for the value of a loss.
        engine.backward(loss * (1 + 0 * loss.detach()))
        meter.begin("inputs")
        # Here the GPU is still busy and DeepSpeed's step waits for it. Not earlier and not on another stream, which
        # would need the VAE's memory on top of the activations.
        batches.prepare()
        meter.begin("optimizer")
        if number + 1 == len(micro_batches):
            meter.before_update(step)
        engine.step()
        share = loss.detach() / (world.size * plan.accumulation)  # ranks that share a clip all add its loss
        losses.add(share, per_sample, batch.bucket, batch.quarters)
        trained.append((micro_batch, per_sample.detach()))
    is_skipped = not engine.was_step_applied()
    measured, own, norms = meter.read(step, micro_batches, batches.waited_s())
    scalars = {
        "train/lr": lr,
        "train/grad_norm": engine.get_global_grad_norm(),
        "train/skipped": float(is_skipped),
        "train/epoch": plan.epoch_of(step),
        **measured,
    }
    monitor.add_step(step + 1, scalars, losses, own, norms)
    return _name_bad(run, step, trained) if is_skipped else []


def _name_bad(run: Run, step: int, trained: list[tuple[MicroBatch, torch.Tensor]]) -> list[str]:
    """Print which clips' losses are not finite, or, if all are, which clips were trained; return that. Collective."""
    own = [
        (str(run.buckets[micro_batch.bucket_of(run.world.data_rank)]), clip, loss)
        for micro_batch, losses in (trained if run.world.sequence_rank == 0 else [])
        for clip, loss in zip(run.clips(micro_batch), losses.tolist())
    ]
    every = [(rank, *sample) for rank, samples in enumerate(all_gather(run.world, own)) for sample in samples]
    culprits = [sample for sample in every if not math.isfinite(sample[3])]
    named = [f"rank {rank}, bucket {bucket}, {clip} (loss {loss:g})" for rank, bucket, clip, loss in culprits or every]
    what = "loss" if culprits else "gradient (every loss is finite)"
    more = f" and {len(named) - MAX_NAMED} more" if len(named) > MAX_NAMED else ""
    logger.info("skipped step %d, its %s is not finite: %s%s", step + 1, what, "; ".join(named[:MAX_NAMED]), more)
    return named


def too_many_bad_steps(named: list[str], num_bad: int, rank: int) -> UserError:
    """The error that ends a run after `train.max_bad_steps` bad steps in a row."""
    return UserError(
        f"train.max_bad_steps: {num_bad} steps in a row had a loss or gradient that is not finite, the last one with "
        f"{'; '.join(named[:MAX_NAMED])}. Lower optimizer.lr, check these clips, and resume from the last checkpoint.",
        shared=rank > 0,
    )
