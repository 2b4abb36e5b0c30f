"""Train a LoRA: config -> data -> plan -> engine -> loop. The order of things, and nothing else, stands here."""

import contextlib
import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cogds.card import lora_facts, write_card
from cogds.cli import make_folders, parse_args
from cogds.config import RunConfig, load_config, replace, to_yaml
from cogds.core.geometry import ClipShape
from cogds.data.digest import digest, digest_files
from cogds.errors import Interrupted, refuse_to_run
from cogds.evaluate import make_evaluation
from cogds.files import whole_file
from cogds.model.load import DTYPES, ModelFolder, empty_transformer, find_model
from cogds.model.lora import INIT_ALPHA, check_start, describe_start, export, inject, resolve_targets, start_from
from cogds.model.lora_file import LoraFile, read_loras
from cogds.model.sequence import check_sequence
from cogds.prepare.demo import make_demo, only_own_demo
from cogds.prepare.encoding import prepare
from cogds.prepare.order import make_plan
from cogds.prepare.survey import Survey, make_buckets
from cogds.report.main import clip_table, run_report
from cogds.report.text import short_report
from cogds.runtime import checkpoint as checkpoints
from cogds.runtime.ds_config import load_ds_config, resolve
from cogds.runtime.engine import load_for_stage, start_engine
from cogds.runtime.interrupt import Interrupt, find_launchers
from cogds.runtime.lock import only_run
from cogds.runtime.metrics import rewind_metrics
from cogds.runtime.monitor import Monitor
from cogds.runtime.outlet import warn
from cogds.runtime.relay import relay_of
from cogds.runtime.sequence import share_clips
from cogds.runtime.state import TrainState, gather_state, restore_state, state_bytes, trainable
from cogds.runtime.ticker import BAR, LINES, QUIET
from cogds.runtime.watchdog import Watchdog
from cogds.runtime.world import World, connect, disconnect, on_rank0, read_world
from cogds.show.opening import FirstBatches, show_settings
from cogds.show.panel import show, summary
from cogds.show.terminal import hush, is_terminal, last_words
from cogds.training.execution import check_execution, choose_execution, memory_of, prepare_blocks
from cogds.training.loop import OCCASION, Occasion, finish_save, train_steps
from cogds.training.rehearsal import rehearse
from cogds.training.resume import check_matching, continued_plan, data_identity, identity, resumed_data
from cogds.training.run import Run
from cogds.training.step import load_step_builder
from cogds.videos.preview import make_previews


def main(default_deepspeed: Path, default_config: Path, argv: list[str] | None = None) -> None:
    """The whole command. Everything that can be wrong with the input is said before any weight is loaded."""
    args = parse_args(
        sys.argv[1:] if argv is None else argv,
        "Train a CogVideoX image-to-video LoRA with DeepSpeed.",
        lambda parser: (
            parser.add_argument("--dry-run", action="store_true", help="everything but training: data, checks, "
                                "model, engine, and the largest bucket tried; leaves no step and no checkpoint"),
            parser.add_argument("--quiet", action="store_true", help="errors, warnings and the final line only"),
        ),
    )  # fmt: skip
    if args.quiet:
        hush()
    cfg, explicit = load_config(args.config or str(default_config), args.overrides)
    if not args.config:
        cfg = only_own_demo(cfg, args.overrides)
    ds_path = args.deepspeed or str(default_deepspeed)
    ds_config = load_ds_config(ds_path)
    world = dataclasses.replace(read_world(), sequence=cfg.parallel.sequence)
    if args.dry_run:  # no clip is encoded for it, and the largest bucket is tried on a CPU too
        nothing = {"eval.every": None, "sample.every": None}
        cfg = replace(cfg, {"data.encode": "on_the_fly", "train.rehearse": "on", **nothing})
    make_demo(cfg)
    model = find_model(cfg.model.path, cfg.model.revision)
    check_sequence(world.sequence, world.size, model.transformer_config["num_attention_heads"])
    buckets = make_buckets(cfg, model)
    resolve_targets(empty_transformer(model), cfg.lora.target_modules)
    ds_config, cfg = resolve(ds_config, cfg, explicit, world.size, model.hidden_size, ds_path)
    check_execution(cfg, ds_config, world)
    interrupt = Interrupt(find_launchers())
    interrupt.listen()
    connect(world, cfg.train.timeout_s, cfg.network)
    on_rank0(world, lambda: make_folders({"output_dir": cfg.output_dir, "data.cache_dir": cfg.data.cache_dir}))
    try:
        with contextlib.nullcontext() if args.dry_run else only_run(world, Path(cfg.output_dir)):
            train(cfg, ds_config, model, buckets, world, interrupt, args.dry_run, args.quiet)
    except Interrupted:  # by all ranks together
        interrupt.ignore()
        disconnect()
        raise
    disconnect()
    interrupt.close()


def train(
    cfg: RunConfig,
    ds_config: dict[str, Any],
    model: ModelFolder,
    buckets: tuple[ClipShape, ...],
    world: World,
    interrupt: Interrupt,
    dry_run: bool = False,
    quiet: bool = False,
) -> None:
    """Prepare the data, then train up to `train.num_steps`, from scratch or from a checkpoint. Collective.

    dry_run: up to the first step, and nothing of the output folder is touched. quiet: no progress is shown.
    Raises Interrupted where a rank was asked to stop, once everything is saved.
    """
    output_dir = Path(cfg.output_dir)
    checkpoint_dir = output_dir / "checkpoints"
    saved = TrainState({})  # what a checkpoint brings, on rank 0

    def look() -> tuple[Path, dict[str, Any]] | None:
        nonlocal saved
        found = checkpoints.find(checkpoint_dir, cfg.checkpoint.resume)
        if found:
            saved = found[2]
        return found and found[:2]

    found, facts = on_rank0(world, look) or (None, {})
    init_from = bool(cfg.lora.init_from) and not found
    start = on_rank0(world, lambda: check_init(cfg, model)) if init_from else []

    def tell(survey: Survey) -> None:
        report = run_report(cfg, ds_config, model, survey, clip_table(survey), world.size, memory_of(world.device))
        print(short_report(report), flush=True)

    weights = on_rank0(world, lambda: weights_digest(cfg, model))
    fixed = identity(cfg, ds_config["optimizer"]["type"], weights, buckets)
    if found:  # before hours of encoding
        on_rank0(world, lambda: check_matching(found, facts, fixed))
    resume_from, facts = (None, {}) if dry_run else (found, facts)
    data = prepare(cfg, model, buckets, world, cfg.data.max_unusable, tell=tell)
    if resume_from:
        data = on_rank0(world, lambda: resumed_data(data, facts, cfg))
    plan = make_plan(cfg, data.mixture, buckets, model, world.data_size)
    fixed |= data_identity(data)
    if resume_from:
        on_rank0(world, lambda: check_matching(resume_from, facts, fixed))
        plan = continued_plan(plan, facts, resume_from)
    first_step = facts.get("step", 0)
    execution = choose_execution(cfg, ds_config, model, buckets, plan.local_batch_sizes, world)
    run = Run(cfg, ds_config, model, buckets, world, data, plan, execution, first_step)

    def begin() -> None:
        show([*summary(run, resume_from, dry_run), *start], "cogds")
        if dry_run:
            return
        checkpoints.check_space(output_dir, 0)  # before anything is moved
        if aside := checkpoints.set_aside(output_dir, resume_from, first_step):
            print(f"what an earlier run wrote is kept in {aside}")
        rewind_metrics(output_dir / "metrics.jsonl", first_step, made_again(cfg, first_step))
        for name, text in (("run.yaml", to_yaml(cfg)), ("ds_config.json", json.dumps(ds_config, indent=2))):
            with whole_file(output_dir / name) as partial:
                partial.write_text(text, encoding="utf-8")
        if data.unusable.file:
            with whole_file(output_dir / "unusable.jsonl") as partial:
                shutil.copyfile(data.unusable.file, partial)

    on_rank0(world, begin)
    if first_step >= cfg.train.num_steps:
        if world.rank == 0:
            print(f"already trained to step {first_step}; raise train.num_steps to go on")
            last_words(whereabouts(output_dir, first_step))
        return

    dtype = DTYPES[cfg.train.precision]
    transformer = load_for_stage(model, dtype, ds_config, world, cfg.model.base, cfg.model.matmul)
    parameters = inject(transformer, cfg.lora.rank, cfg.lora.alpha, cfg.lora.dropout, cfg.lora.target_modules, cfg.seed)
    if init_from:
        start_from(transformer, init_lora(cfg))
    transformer.train()
    prepare_blocks(transformer, execution)
    share_clips(transformer, world, cfg.train.timeout_s)
    engine = start_engine(transformer, parameters, ds_config)
    on_rank0(world, lambda: checkpoints.check_space(output_dir, space_needed(engine)))
    if resume_from:
        restore_state(engine, saved, world)
        saved = TrainState({})

    builder = load_step_builder(model, cfg.conditioning, data.no_caption_states, dtype, world.device)
    if dry_run:
        tried = rehearse(run, engine, builder)
        if world.rank == 0:
            last_words(f"{tried}\ndry run: ready to train, nothing was trained and nothing saved")
        return
    style = QUIET if quiet else BAR if cfg.monitor.progress_bar and is_terminal(sys.stderr) else LINES
    monitor = Monitor(
        world, output_dir, buckets, first_step, cfg.train.num_steps, cfg.monitor.every, style, relay_of(engine)
    )
    show_settings(run, monitor)
    saver, watchdog = checkpoints.Saver(), Watchdog(world.rank, cfg.train.step_timeout_s, output_dir)
    start_point = checkpoints.start_point(cfg.checkpoint.resume, facts)
    about = {"identity": fixed, "plan": dataclasses.asdict(plan), "index": data.index.path.name, "start": start_point}

    def save(step: int) -> None:
        began = time.perf_counter()
        finish_save(saver, world, monitor, step)  # the one before
        on_rank0(world, lambda: checkpoints.check_space(output_dir, space_needed(engine)))
        state = gather_state(engine, world)
        # Now: while the thread writes, videos of the base model may have the LoRA switched off.
        dtypes = {name: one.dtype for name, one in trainable(engine).items()}
        if world.rank == 0:

            def write() -> None:
                folder = output_dir / "lora" / checkpoints.step_name(step)
                export_adapter(transformer, state.weights(dtypes), run, folder)
                checkpoints.write(
                    checkpoint_dir, step, state, about, cfg.checkpoint.keep_last, cfg.checkpoint.keep_every
                )

            saver.start(write)
        monitor.note(step, {"checkpoint/pause_s": time.perf_counter() - began})

    watchdog.watch(lambda: "trying the largest bucket before the first step")
    if tried := rehearse(run, engine, builder):
        monitor.note(first_step, tried.scalars())
        if world.rank == 0:
            print(tried, flush=True)
    occasions: list[Occasion] = []
    if losses := make_evaluation(run, engine, builder, monitor, watchdog.watch, lambda: bool(interrupt.requested)):
        occasions.append(losses)
    if videos := make_previews(run, engine, builder, monitor, watchdog.watch, lambda: bool(interrupt.requested)):
        occasions.append(videos)
    interrupt.defer()
    show_first = FirstBatches(run, builder, monitor, warn).look if world.rank == 0 else None
    train_steps(run, engine, builder, monitor, saver, save, interrupt, watchdog, occasions, show_first)
    watchdog.close()
    if world.rank == 0:
        last_words(whereabouts(output_dir, cfg.train.num_steps))


def made_again(cfg: RunConfig, first_step: int) -> tuple[str, ...]:
    """Beginnings of the tags that a run which goes on at this step notes anew at its start (`loop.Occasion`)."""
    if first_step >= cfg.train.num_steps:
        return ()
    losses, videos = (every is not None and first_step % every == 0 for every in (cfg.eval.every, cfg.sample.every))
    return ("eval/",) * losses + (f"{OCCASION}/",) * (losses or videos)


def init_lora(cfg: RunConfig) -> LoraFile:
    """The LoRA of `lora.init_from`, which is set. Raises UserError if it is none."""
    assert cfg.lora.init_from
    return read_loras([cfg.lora.init_from], cfg.lora.init_alpha, INIT_ALPHA)[0]


def check_init(cfg: RunConfig, model: ModelFolder) -> list[str]:
    """What a run that begins with this LoRA begins with, for people. Raises UserError where it does not fit."""
    file, probe = init_lora(cfg), empty_transformer(model)
    inject(probe, cfg.lora.rank, cfg.lora.alpha, cfg.lora.dropout, cfg.lora.target_modules, cfg.seed)
    check_start(probe, file)
    return describe_start(file, cfg.conditioning.image_latents)


def weights_digest(cfg: RunConfig, model: ModelFolder) -> str:
    """Changes with the transformer's weights. Files that have not changed are not read again."""
    files = sorted(str(path) for path in (model.path / "transformer").iterdir() if path.is_file())
    return digest({"files": list(digest_files(files, Path(cfg.data.cache_dir) / "files.json").values())})


def space_needed(engine: Any) -> float:
    """Bytes that one save writes: the state, and the LoRA, at most a third of it."""
    return 4 / 3 * state_bytes(engine)


def export_adapter(transformer: Any, weights: Mapping[str, torch.Tensor], run: Run, folder: Path) -> None:
    """Write the LoRA's weights and its card into `folder`, complete or absent. weights: by parameter name, whole."""
    partial, facts = folder.with_name(folder.name + ".tmp"), lora_facts(run, checkpoints.step_of(folder))
    checkpoints.remove_partial(folder.parent)
    export(partial, transformer, weights, facts)
    write_card(partial, folder, facts)
    checkpoints.replace_folder(partial, folder)


def whereabouts(output_dir: Path, step: int) -> str:
    """Where what a finished run made is, and how to look at it."""
    lora = output_dir / "lora" / checkpoints.step_name(step)
    return f"LoRA: {lora}\nwatch: tensorboard --logdir {output_dir / 'tensorboard'}"


if __name__ == "__main__":
    refuse_to_run("cogds.train", "train")
