"""Train a LoRA: config -> data -> plan -> engine -> loop. The order of things, and nothing else, stands here."""

import dataclasses
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from cogds.cli import make_folders, parse_args
from cogds.config import RunConfig, load_config, to_dict, to_yaml
from cogds.core.diffusion import stratified_timesteps, timestep_quarter, v_loss
from cogds.core.geometry import ClipShape, num_tokens
from cogds.core.mixture import Mixture
from cogds.core.plan import MicroBatch, Origin, Plan
from cogds.core.rng import seed_global
from cogds.core.schedule import learning_rate
from cogds.data.dataset import Batch, ClipDataset, ClipOrder, collate
from cogds.data.digest import digest, digest_files
from cogds.data.index import ClipIndex
from cogds.data.sampler import BucketBatchSampler
from cogds.demo import make_demo, only_own_demo
from cogds.encode import DTYPES, EncodedData, prepare
from cogds.errors import UserError
from cogds.model.load import ModelFolder, empty_transformer, find_model
from cogds.model.lora import export, inject, resolve_targets
from cogds.order import make_plan
from cogds.report.main import clip_table, run_report
from cogds.report.text import short_report
from cogds.runtime import checkpoint as checkpoints
from cogds.runtime.ds_config import load_ds_config, resolve
from cogds.runtime.engine import (
    adapter_tensors,
    load_for_stage,
    set_learning_rate,
    set_optimizer,
    start_engine,
    zero_stage,
)
from cogds.runtime.monitor import Monitor, StepLosses, Stopwatch, peak_memory_bytes
from cogds.runtime.quarantine import Quarantine
from cogds.runtime.world import World, connect, disconnect, on_rank0, read_world
from cogds.step import Draws, StepBuilder, draw_dropouts, load_step_builder
from cogds.stream import BATCHES_AHEAD, ahead, stream_batches
from cogds.survey import Survey, make_buckets


def main(default_deepspeed: Path, default_config: Path, argv: list[str] | None = None) -> None:
    """The whole command. Everything that can be wrong with the input is said before any weight is loaded."""
    args = parse_args(sys.argv[1:] if argv is None else argv, "Train a CogVideoX image-to-video LoRA with DeepSpeed.")
    cfg, explicit = load_config(args.config or str(default_config), args.overrides)
    if not args.config:
        cfg = only_own_demo(cfg, args.overrides)
    ds_path = args.deepspeed or str(default_deepspeed)
    ds_config = load_ds_config(ds_path)
    world = read_world()
    make_demo(cfg)
    model = find_model(cfg.model.path, cfg.model.revision)
    buckets = make_buckets(cfg, model)
    resolve_targets(empty_transformer(model), cfg.lora.target_modules)
    ds_config, cfg = resolve(ds_config, cfg, explicit, world.size, model.hidden_size, ds_path)
    connect(world, cfg.train.timeout_s)
    train(cfg, ds_config, model, buckets, world)
    disconnect()


def weights_digest(cfg: RunConfig, model: ModelFolder) -> str:
    """Changes with the transformer's weights. Files that have not changed are not read again."""
    files = sorted(str(path) for path in (model.path / "transformer").iterdir() if path.is_file())
    return digest({"files": list(digest_files(files, Path(cfg.data.cache_dir) / "files.json").values())})


def identity(cfg: RunConfig, ds_config: dict[str, Any], weights: str, data: EncodedData, plan: Plan) -> dict[str, Any]:
    """What must be the same when a run is resumed."""
    return {
        "model weights": weights,
        "lora": to_dict(cfg)["lora"],
        "conditioning": to_dict(cfg)["conditioning"],
        "seed": cfg.seed,
        "data": data.fingerprint,
        "buckets": [str(shape) for shape in data.index.buckets],
        "repeats": list(data.mixture.repeats),
        "sync": [cfg.data.sync, cfg.data.cost_tolerance] if cfg.data.sync == "cost" else [cfg.data.sync],
        "batch_sizes": list(plan.batch_sizes),
        "accumulation": plan.accumulation,
        "world_size": plan.world_size,
        "zero_stage": zero_stage(ds_config),
        "optimizer": ds_config["optimizer"]["type"],
        "precision": cfg.train.precision,
    }


def train(
    cfg: RunConfig, ds_config: dict[str, Any], model: ModelFolder, buckets: tuple[ClipShape, ...], world: World
) -> None:
    """Prepare the data, then train up to `train.num_steps`, from scratch or from a checkpoint. Collective."""
    output_dir = Path(cfg.output_dir)
    checkpoint_dir = output_dir / "checkpoints"
    on_rank0(world, lambda: make_folders({"output_dir": cfg.output_dir, "data.cache_dir": cfg.data.cache_dir}))
    resume_from = on_rank0(world, lambda: checkpoints.find(checkpoint_dir, cfg.checkpoint.resume))

    def tell(found: Survey) -> None:
        report = run_report(cfg, ds_config, model, found, clip_table(found), world.size)
        print(short_report(report), flush=True)

    data = prepare(cfg, model, buckets, world, cfg.data.max_unusable, tell=tell)
    state = on_rank0(world, lambda: checkpoints.read_state(resume_from)) if resume_from else {}
    if state:
        data = on_rank0(world, lambda: resumed_data(data, state, cfg))
    plan = make_plan(cfg, data.mixture, buckets, model, world.size)
    weights = on_rank0(world, lambda: weights_digest(cfg, model))
    first_step, fixed = 0, identity(cfg, ds_config, weights, data, plan)
    if resume_from:
        on_rank0(world, lambda: checkpoints.check_matching(resume_from, state, fixed))
        first_step = state["step"]
        plan = dataclasses.replace(plan, origin=Origin(**state["origin"]))

    def begin() -> None:
        if aside := checkpoints.set_aside(output_dir, resume_from, first_step):
            print(f"what an earlier run wrote is kept in {aside}")
        (output_dir / "run.yaml").write_text(to_yaml(cfg))
        (output_dir / "ds_config.json").write_text(json.dumps(ds_config, indent=2))
        if data.unusable.file:
            shutil.copyfile(data.unusable.file, output_dir / "unusable.jsonl")
        print(summary(cfg, ds_config, model, data, plan, resume_from), flush=True)

    on_rank0(world, begin)
    if first_step >= cfg.train.num_steps:
        if world.rank == 0:
            print(f"already trained to step {first_step}; raise train.num_steps to go on")
            print(whereabouts(output_dir, first_step))
        return

    dtype = DTYPES[cfg.train.precision]
    transformer = load_for_stage(model, dtype, ds_config, world.rank)
    parameters = inject(transformer, cfg.lora.rank, cfg.lora.alpha, cfg.lora.dropout, cfg.lora.target_modules, cfg.seed)
    transformer.train()
    if cfg.train.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    engine = start_engine(transformer, parameters, ds_config)
    if resume_from:
        checkpoints.load(engine, resume_from)
        set_optimizer(engine, ds_config)

    builder = load_step_builder(model, cfg.conditioning, data.no_caption_states, dtype, world.device)
    monitor = Monitor(
        world, output_dir, buckets, first_step, cfg.train.num_steps, cfg.monitor.every, cfg.monitor.progress_bar
    )
    monitor.text("config/run", to_yaml(cfg))
    monitor.text("config/deepspeed", json.dumps(ds_config, indent=2))

    def save(step: int) -> None:
        export_adapter(engine, cfg, buckets, output_dir / "lora" / checkpoints.step_name(step), world)
        saved = {
            "step": step,
            "identity": fixed,
            "origin": dataclasses.asdict(plan.origin),
            "index": data.index.path.name,
        }
        checkpoints.save(engine, world, checkpoint_dir, step, saved, cfg.checkpoint.keep_last)

    quarantine = Quarantine(world, output_dir, len(data.index), cfg.data.max_unusable)
    batches, clock = load_batches(data, cfg, plan, model, world, first_step), Stopwatch()
    for step in range(first_step, cfg.train.num_steps):
        train_step(engine, builder, batches, plan, step, cfg, buckets, world, monitor, quarantine, clock)
        if (step + 1) % cfg.monitor.every == 0 or step + 1 == cfg.train.num_steps:
            quarantine.settle()
        if (step + 1) % cfg.checkpoint.every == 0 or step + 1 == cfg.train.num_steps:
            monitor.flush()
            save(step + 1)
            clock.lap()  # saving is no part of the next step
    monitor.close()
    if world.rank == 0:
        print(whereabouts(output_dir, cfg.train.num_steps))


def resumed_data(data: EncodedData, state: Mapping[str, Any], cfg: RunConfig) -> EncodedData:
    """The data that a resumed run goes on with: as it was, if nothing happened to it but that clips have gone.

    Their encodings are read from the cache as before; those that are not there are replaced as the run meets them.
    Other changes are left for `check_matching` to refuse.
    """
    folder = data.index.path.parent
    saved = ClipIndex(folder / state.get("index", data.index.path.name))
    if data.fingerprint == state["identity"].get("data") or not saved.path.exists():
        return data
    then, now = saved.names(), data.index.names()
    if now - then or not then - now:
        print(f"of the clips of the run, {len(then - now)} are no longer in the data, and {len(now - then)} are new")
        return data
    print(f"{len(then - now)} clips of the run are no longer in the data: it goes on with them as long as it can")
    # By weight they follow from the sizes, and stay what they were.
    by_weight = bool(cfg.data.sets) and cfg.data.sets[0].weight is not None
    repeats = tuple(state["identity"]["repeats"]) if by_weight else data.mixture.repeats
    mixture = Mixture(saved.sizes, repeats, cfg.seed)
    return dataclasses.replace(data, index=saved, mixture=mixture, fingerprint=state["identity"]["data"])


def whereabouts(output_dir: Path, step: int) -> str:
    """Where what a finished run made is, and how to look at it."""
    lora = output_dir / "lora" / checkpoints.step_name(step)
    return f"LoRA: {lora}\nwatch: tensorboard --logdir {output_dir / 'tensorboard'}"


def load_batches(
    data: EncodedData,
    cfg: RunConfig,
    plan: Plan,
    model: ModelFolder,
    world: World,
    first_step: int,
) -> Iterator[Batch]:
    """This rank's batches, one per micro-step, made ahead of time: read from the cache, or encoded on the fly."""
    order = ClipOrder(data.index, data.mixture)
    sampler = BucketBatchSampler(plan, world.rank, first_step, cfg.train.num_steps)
    if cfg.data.encode == "on_the_fly":
        yield from ahead(stream_batches(sampler, order, cfg, model, world), BATCHES_AHEAD)
        return
    loader = DataLoader(
        ClipDataset(order, cfg.data.cache_dir),
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=cfg.data.num_workers,
        pin_memory=world.device.type == "cuda",
    )
    try:
        yield from loader
    except UserError as error:
        # Out of a worker it comes with the worker's traceback around it; the sentence is the last line.
        raise UserError(str(error).strip().splitlines()[-1].partition("UserError: ")[2] or str(error)) from None


def train_step(
    engine: Any,
    builder: StepBuilder,
    batches: Iterator[Batch],
    plan: Plan,
    step: int,
    cfg: RunConfig,
    buckets: tuple[ClipShape, ...],
    world: World,
    monitor: Monitor,
    quarantine: Quarantine,
    clock: Stopwatch,
) -> None:
    """One optimizer step: `accumulation` micro-steps of forward and backward, all ranks in buckets of one cost."""
    num_samples, tokens, data_wait_s = 0, 0, 0.0
    losses = StepLosses(len(buckets), world.device)
    num_timesteps = len(builder.alphas_cumprod)
    lr = learning_rate(
        step,
        cfg.optimizer.lr,
        cfg.optimizer.schedule,
        cfg.train.num_steps,
        cfg.optimizer.warmup_steps,
        cfg.optimizer.final_lr_ratio,
    )
    set_learning_rate(engine, lr)
    for number, micro_batch in enumerate(plan.at(step)):
        waiting = Stopwatch()
        batch = next(batches)
        data_wait_s += waiting.lap()
        quarantine.add(batch.bad)
        bucket = micro_batch.bucket_of(world.rank)
        draws = draw(micro_batch, step, number, num_timesteps, cfg, world)
        inputs, target = builder.build(batch.tensors, buckets[bucket], draws)
        seed_global(cfg.seed, draws.step, world.rank)
        per_sample = v_loss(engine(**inputs)[0], target)
        weights = torch.tensor(micro_batch.weights_of(world.rank), device=world.device)
        loss = (weights * per_sample).mean()
        engine.backward(loss)
        engine.step()
        share = loss.detach() / (world.size * plan.accumulation)
        losses.add(share, per_sample, bucket, timestep_quarter(draws.timesteps.to(world.device), num_timesteps))
        num_samples += micro_batch.num_slots
        tokens += sum(
            micro_batch.batch_size_of(rank) * num_tokens(buckets[micro_batch.bucket_of(rank)], builder.geometry)
            for rank in range(world.size)
        )
    step_s = clock.lap()
    monitor.record(
        step + 1,
        {
            "train/lr": lr,
            "train/grad_norm": engine.get_global_grad_norm(),
            "train/epoch": plan.epoch_of(step),
            "perf/step_s": step_s,
            "perf/data_wait_s": data_wait_s,
            "perf/samples_per_s": num_samples / step_s,
            "perf/tokens_per_s": tokens / step_s,
            "perf/peak_memory_gb": peak_memory_bytes(world.device) / 1e9,
        },
        losses,
    )


def draw(micro_batch: MicroBatch, step: int, number: int, num_timesteps: int, cfg: RunConfig, world: World) -> Draws:
    """The random choices of micro-step `number` of an optimizer step, on this rank."""
    micro_step = step * cfg.train.gradient_accumulation_steps + number
    timesteps = stratified_timesteps(
        micro_batch.slots_of(world.rank), micro_batch.step_slots, num_timesteps, cfg.seed, step
    )
    batch_size = micro_batch.batch_size_of(world.rank)
    drop_image, drop_caption = draw_dropouts(batch_size, cfg.conditioning, cfg.seed, micro_step, world.rank)
    return Draws(timesteps, drop_image, drop_caption, cfg.seed, micro_step, world.rank)


def export_adapter(engine: Any, cfg: RunConfig, buckets: tuple[ClipShape, ...], folder: Path, world: World) -> None:
    """Write the LoRA as it is now into `folder`, complete or absent. Collective."""
    tensors = adapter_tensors(engine)

    def write() -> None:
        partial = folder.with_name(folder.name + ".tmp")
        export(
            partial,
            engine.module,
            tensors,
            {
                "rank": cfg.lora.rank,
                "alpha": cfg.lora.alpha,
                "image_latents": cfg.conditioning.image_latents,
                "buckets": [str(shape) for shape in buckets],
                "fps": cfg.data.fps,
                "base_model": cfg.model.path,
                "step": checkpoints.step_of(folder),
            },
        )
        checkpoints.replace_folder(partial, folder)

    on_rank0(world, write)


def summary(
    cfg: RunConfig,
    ds_config: dict[str, Any],
    model: ModelFolder,
    data: EncodedData,
    plan: Plan,
    resume_from: Path | None,
) -> str:
    """What is about to be trained, for people."""
    lines = [
        f"model {cfg.model.path}",
        f"LoRA rank {cfg.lora.rank}, alpha {cfg.lora.alpha:g} on {', '.join(cfg.lora.target_modules)}",
        f"{plan.world_size} ranks, ZeRO stage {zero_stage(ds_config)}, {cfg.train.precision}, "
        f"{plan.accumulation} micro-steps a step, {plan.steps_per_epoch:.1f} steps an epoch",
    ]
    for shape, sets, local in zip(data.index.buckets, data.index.sizes, plan.local_batch_sizes):
        tokens = num_tokens(shape, model.geometry)
        lines.append(f"  {shape!s:>14}  {tokens:>6} tokens  {sum(sets):>5} clips  batch {local} a rank")
    if data.unusable.num:
        lines.append(f"{data.unusable.num} files cannot be trained, see {Path(cfg.output_dir) / 'unusable.jsonl'}:")
        lines += [f"  {path}: {reason}" for path, reason in data.unusable.examples]
    if resume_from:
        lines.append(f"resuming from {resume_from}")
    return "\n".join(lines)
