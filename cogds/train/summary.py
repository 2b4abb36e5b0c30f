"""What is about to be trained, for people: one panel on a terminal, the same lines elsewhere."""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from cogds.config.deepspeed import zero_stage
from cogds.core.geometry import num_tokens
from cogds.formatting import counted, gigabytes, magnitude
from cogds.process.progress import is_terminal
from cogds.train.resume import layout_of
from cogds.train.run import Run
from cogds.train.tuning import execution_lines

logger = logging.getLogger(__name__)

EXPORTED_BYTES = {"bf16": 2, "fp32": 4}  # of one number in the LoRA's file


def summary(run: Run, resume_from: Path | None, dry_run: bool = False) -> list[str]:
    """Model, LoRA, ranks, buckets, memory, where things are written, and what will not be trained: a fact a line."""
    cfg, plan, data = run.cfg, run.plan, run.data
    transformer, lora = run.job.memory.transformer, run.job.memory.lora
    sharing = f", {run.world.sequence_size} to a clip" if run.world.sequence_size > 1 else ""
    num_numbers = lora.num_parameters
    lines = [
        f"model {cfg.model.path}, {magnitude(transformer.num_parameters)} parameters",
        f"LoRA rank {cfg.lora.rank}, alpha {cfg.lora.alpha:g} on {', '.join(cfg.lora.target_modules)}: "
        f"{magnitude(num_numbers)} parameters, {gigabytes(num_numbers * EXPORTED_BYTES[cfg.train.precision])}",
        f"{devices(run.world.device, run.world.size)}{sharing}, ZeRO stage {zero_stage(run.ds_config)}, "
        f"{cfg.train.precision}, "
        f"{counted(plan.accumulation, 'micro-step')} a step, {plan.steps_per_epoch:.1f} steps an epoch, "
        f"{counted(cfg.train.num_steps, 'step')} in all",
    ]
    for shape, sets, local in zip(data.index.buckets, data.index.sizes, plan.local_batch_sizes):
        tokens = num_tokens(shape, run.model.geometry)
        lines.append(f"  {shape!s:>14}  {tokens:>6} tokens  {counted(sum(sets), 'clip'):>13}  batch {local} a rank")
    lines += execution_lines(run.execution, run.buckets, [sum(sets) for sets in data.index.sizes])
    written = f"written to {cfg.output_dir}; watch: tensorboard --logdir {Path(cfg.output_dir) / 'tensorboard'}"
    lines.append(f"a run would be {written}" if dry_run else written)
    if data.unusable.num:
        listed = "" if dry_run else f", see {Path(cfg.output_dir) / 'unusable.jsonl'}"
        lines.append(f"{counted(data.unusable.num, 'file')} cannot be trained{listed}:")
        lines += [f"  {path}: {reason}" for path, reason in data.unusable.examples]
    if resume_from:
        lines.append(f"resuming from {resume_from}")
        if plan.origin.step == run.first_step:
            lines.append(f"the layout is new from here: {layout_of(plan)}")
    return lines


def devices(device: torch.device, num_ranks: int) -> str:
    """`8 GPUs (NVIDIA H100 80GB HBM3)`, `2 ranks on CPUs`."""
    if device.type != "cuda":
        return f"{counted(num_ranks, 'rank')} on CPUs"
    return f"{counted(num_ranks, 'GPU')} ({torch.cuda.get_device_name(device)})"


def show(lines: Sequence[str], title: str, console: Console | None = None) -> None:
    """Print the lines, in a frame on a terminal. Never coloured or wrapped elsewhere: a log is searched by line."""
    if console is None and not is_terminal(sys.stdout):
        logger.info("\n".join(lines))
        return
    # Paths and reasons are data: Text keeps rich from reading [brackets] in them.
    if console or logger.isEnabledFor(logging.INFO):
        (console or Console()).print(Panel(Text("\n".join(lines)), title=title, title_align="left", border_style="dim"))
