"""Measure the overhead of the training loop over a bare step, and of DeepSpeed over a plain torch loop.

    python benchmarks/loop.py [--sizes tiny,mid] [--bucket FxHxW] [--precision fp32|bf16] [--steps 12]

Trains models with random weights on drawn clips from a warm cache, with the real trainer: plan, loader processes,
random draws, inputs, forward, backward, optimizer, metrics, watchdog. After each of its steps, each of the others runs
once, on the same engine or the same base weights:

    loop       cogds.train.trainer.Trainer.train, from the start of one step to the start of the next
    bare       forward, loss, backward and step of the same engine, on prepared inputs
    inputs     preparation of the inputs: noising and encoding the first frame, noise, rotary tables
    plain      like bare, with torch's AdamW and clipping instead of DeepSpeed's engine

The first and the last step of the loop are not counted: loader processes start in the first, and the last prepares no
next step. The data wait is measured in a second run of as many steps without the others in between. The overhead is
loop / bare - 1, with and without the time for the inputs. Prints a table, then one line of JSON.
"""

import argparse
import dataclasses
import math
import statistics
import tempfile
import unittest.mock
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measuring  # noqa: F401 (before torch)
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from measuring import (
    CLOCKS,
    DTYPES,
    ROOT,
    SIZES,
    Size,
    join_process_group,
    machine,
    print_json,
    print_machine,
    share_weights,
    table,
    timed,
)

import cogds.train.trainer
from cogds.config.loading import replace
from cogds.core.diffusion import v_loss
from cogds.distributed.process_group import disconnect
from cogds.distributed.world import World, read_world
from cogds.encode.encoder import encode_dataset
from cogds.engine.start import start_engine
from cogds.job import load_job
from cogds.metrics.jsonl import step_lines
from cogds.model.load import load_transformer
from cogds.model.lora.adapter import inject
from cogds.model.transformer.forward import Transformer
from cogds.process.signals import StopRequest
from cogds.process.watchdog import Watchdog
from cogds.train.batches import load_batches, make_draws
from cogds.train.run import Run
from cogds.train.step import load_step_builder
from cogds.train.trainer import Trainer
from cogds.train.tuning import choose_execution, prepare_blocks
from tests.drawn import draw_clips
from tests.tiny import create_tiny_model

WAYS = ("loop", "bare", "inputs", "plain")


def model_folder(size: Size, folder: Path) -> Path:
    """Write a complete model with the size's transformer and VAE."""
    create_tiny_model(folder)
    if size.name != "tiny":
        torch.manual_seed(0)
        for part, of_class, config in (
            ("transformer", CogVideoXTransformer3DModel, size.transformer),
            ("vae", AutoencoderKLCogVideoX, size.vae),
        ):
            of_class.from_config(config).save_pretrained(folder / part)
    return folder


@dataclass
class PlainLoop:
    """A plain torch training loop that shares the base weights of the engine's transformer."""

    transformer: Any
    parameters: list[torch.nn.Parameter]
    optimizer: torch.optim.Optimizer

    @classmethod
    def sharing_weights(cls, other: Transformer, run: Run) -> "PlainLoop":
        """Train like `run`, with the weights of a transformer without LoRA."""
        transformer = share_weights(Transformer, run.model.transformer_config, other.state_dict())
        lora, cfg = run.cfg.lora, run.cfg.optimizer
        parameters = inject(transformer, lora.rank, lora.alpha, lora.dropout, lora.target_modules, run.cfg.seed)
        prepare_blocks(transformer.train(), run.execution)
        transformer.set_checkpointing(run.execution.buckets[0].checkpointing)
        optimizer = torch.optim.AdamW(
            parameters, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, weight_decay=cfg.weight_decay
        )
        return cls(transformer, parameters, optimizer)

    def step(self, inputs: dict[str, Any], target: torch.Tensor, max_grad_norm: float) -> None:
        """Run forward, backward, clipping and AdamW."""
        v_loss(self.transformer(**inputs)[0], target).mean().backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()


def timing_watchdog(clock: str, between: Callable[[], object], steps_s: list[float]) -> type[Watchdog]:
    """Return a watchdog class that records the time of each step, and calls `between` from one step to the next."""
    now, begun = CLOCKS[clock], [math.nan]

    class TimingWatchdog(Watchdog):
        def watch(self, describe: Callable[[], str]) -> None:
            steps_s.append(now() - begun[0])
            between()
            super().watch(describe)
            begun[0] = now()

    return TimingWatchdog


def measure(
    size: Size, bucket: str, precision: str, num_steps: int, clock: str, world: World, folder: Path
) -> dict[str, Any]:
    """Measure the seconds of each variant, and the loop's wait for data."""
    path = model_folder(size, folder / "model")
    draw_clips(folder / "clips")
    overrides = [
        f"model.path={path}", f"data.path={folder / 'clips'}", f"data.cache_dir={folder / 'cache'}",
        f"output_dir={folder / 'run'}", f"data.buckets=[{bucket}]", f"train.precision={precision}",
        f"lora.rank={size.lora_rank}", f"lora.alpha={size.lora_rank}", "metrics.progress_bar=false",
        "train.memory_check=off", "eval.every=null", f"train.num_steps={num_steps}",
    ]  # fmt: skip
    ds_path = str(ROOT / "ds_configs/zero2.json")
    job = load_job(Namespace(config=None, deepspeed=ds_path, overrides=overrides), world)
    cfg, model, buckets = job.cfg, job.model, job.buckets
    Path(cfg.output_dir).mkdir()
    data = encode_dataset(job)
    plan = job.plan(data.mixture)
    execution = choose_execution(job, plan.local_batch_sizes)
    whole = Run(job, data, plan, execution, 0)
    transformer: Any = load_transformer(model, DTYPES[precision], world.device)
    plain = PlainLoop.sharing_weights(transformer, whole)
    lora = cfg.lora
    parameters = inject(transformer, lora.rank, lora.alpha, lora.dropout, lora.target_modules, cfg.seed)
    prepare_blocks(transformer.train(), execution)
    engine = start_engine(transformer, parameters, job.ds_config)
    builder = load_step_builder(model, cfg.conditioning, data.empty_caption_states, DTYPES[precision], world.device)
    (micro_batch,) = plan.at(0)
    batch = next(iter(load_batches(whole))).tensors
    draws = make_draws(micro_batch, 0, len(builder.alphas_cumprod), cfg, world)
    inputs, target = builder.build(batch, buckets[0], draws)
    transformer.set_checkpointing(execution.buckets[0].checkpointing)

    def bare() -> None:
        loss = v_loss(engine(**inputs)[0], target).mean()
        engine.backward(loss)
        engine.step()

    def loop(first: int, between: Callable[[], object]) -> list[float]:
        longer = dataclasses.replace(job, cfg=replace(cfg, {"train.num_steps": first + num_steps}))
        steps_s: list[float] = []
        with unittest.mock.patch.object(cogds.train.trainer, "Watchdog", timing_watchdog(clock, between, steps_s)):
            Trainer(longer, StopRequest()).train(Run(longer, data, plan, execution, first), engine, builder, None, {})
        # Skips the times before the memory check, before step 1, and of step 1.
        return steps_s[3 : num_steps + 1]

    others: dict[str, Callable[[], object]] = {
        "bare": bare,
        "inputs": lambda: builder.build(batch, buckets[0], draws),
        "plain": lambda: plain.step(inputs, target, cfg.optimizer.max_grad_norm),
    }
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}

    def each_once() -> None:
        for way, call in others.items():
            seconds[way].append(timed(call, world.device, clock))

    each_once()  # allocates
    for every in seconds.values():
        every.clear()
    seconds["loop"] = loop(0, each_once)
    loop(num_steps, lambda: None)
    lines = step_lines((Path(cfg.output_dir) / "metrics.jsonl").read_text())
    records = lines[num_steps + 1 : 2 * num_steps - 1]
    wait = sum(line["perf/data_wait_s"] for line in records) / sum(line["perf/step_s"] for line in records)
    engine.destroy()
    medians = {way: round(statistics.median(every), 5) for way, every in seconds.items()}
    spread = {way: [round(min(every), 5), round(max(every), 5)] for way, every in seconds.items()}
    return {
        "size": size.name, "bucket": bucket, "checkpointing": str(execution.buckets[0].checkpointing),
        "median_s": medians, "spread_s": spread,
        "num_counted": len(seconds["loop"]),
        "loop_overhead": round(medians["loop"] / medians["bare"] - 1, 4),
        "loop_overhead_without_inputs": round((medians["loop"] - medians["inputs"]) / medians["bare"] - 1, 4),
        "data_wait_share": round(wait, 5),
        "engine_overhead": round(medians["bare"] / medians["plain"] - 1, 4),
    }  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Measure and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=lambda text: text.split(","), default=["tiny", "mid"], help="tiny, mid")
    parser.add_argument("--precision", default="fp32", choices=DTYPES)
    parser.add_argument("--bucket", help="FRAMESxHEIGHTxWIDTH (default: the size's own)")
    parser.add_argument("--steps", type=int, default=12, help="steps of the loop, at least 3; two are not counted")
    parser.add_argument("--clock", default="wall", choices=CLOCKS, help="cpu: for shared machines")
    args = parser.parse_args(argv)
    world = read_world()
    info = machine(world.device)
    join_process_group(world)
    print_machine(info)
    rows = []
    for name in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            size = SIZES[name]
            bucket = args.bucket or size.bucket
            rows.append(measure(size, bucket, args.precision, args.steps, args.clock, world, Path(folder)))
    head = ("size", "bucket", *(f"{way} s" for way in WAYS), "loop over bare", "less inputs", "data wait",
            "engine over plain")  # fmt: skip
    shares = ("loop_overhead", "loop_overhead_without_inputs", "data_wait_share", "engine_overhead")
    cells = [
        [row["size"], row["bucket"], *(f"{row['median_s'][way]:.4f}" for way in WAYS),
         *(f"{row[name]:.2%}" for name in shares)]
        for row in rows
    ]  # fmt: skip
    print(table(head, cells))
    print_json("loop", info, precision=args.precision, clock=args.clock, rows=rows)


if __name__ == "__main__":
    main()
    disconnect()
