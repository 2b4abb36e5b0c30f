"""What is about to be trained, for people: one panel on a terminal, the same lines elsewhere."""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from cogds.core.geometry import num_tokens
from cogds.report.text import gigabytes
from cogds.runtime.ds_config import zero_stage
from cogds.show.terminal import is_terminal
from cogds.training.execution import Sizes, execution_lines
from cogds.training.resume import layout_of
from cogds.training.run import Run

EXPORTED_BYTES = {"bf16": 2, "fp32": 4}  # of one number in the LoRA's file


def summary(run: Run, resume_from: Path | None) -> list[str]:
    """Model, LoRA, ranks, buckets, memory, where things are written, and what will not be trained: a fact a line."""
    cfg, plan, data, sizes = run.cfg, run.plan, run.data, Sizes.of(run.cfg, run.model)
    sharing = f", {run.world.sequence} to a clip" if run.world.sequence > 1 else ""
    num_numbers = sizes.lora.num_parameters
    lines = [
        f"model {cfg.model.path}, {count(sizes.transformer.num_parameters)} parameters",
        f"LoRA rank {cfg.lora.rank}, alpha {cfg.lora.alpha:g} on {', '.join(cfg.lora.target_modules)}: "
        f"{count(num_numbers)} parameters, {gigabytes(num_numbers * EXPORTED_BYTES[cfg.train.precision])}",
        f"{devices(run.world.device, run.world.size)}{sharing}, ZeRO stage {zero_stage(run.ds_config)}, "
        f"{cfg.train.precision}, "
        f"{plan.accumulation} micro-steps a step, {plan.steps_per_epoch:.1f} steps an epoch, "
        f"{cfg.train.num_steps:,} steps in all",
    ]
    for shape, sets, local in zip(data.index.buckets, data.index.sizes, plan.local_batch_sizes):
        tokens = num_tokens(shape, run.model.geometry)
        lines.append(f"  {shape!s:>14}  {tokens:>6} tokens  {sum(sets):>5} clips  batch {local} a rank")
    lines += execution_lines(run.execution, run.buckets, [sum(sets) for sets in data.index.sizes])
    lines.append(f"written to {cfg.output_dir}; watch: tensorboard --logdir {Path(cfg.output_dir) / 'tensorboard'}")
    if data.unusable.num:
        lines.append(f"{data.unusable.num} files cannot be trained, see {Path(cfg.output_dir) / 'unusable.jsonl'}:")
        lines += [f"  {path}: {reason}" for path, reason in data.unusable.examples]
    if resume_from:
        lines.append(f"resuming from {resume_from}")
        if plan.origin.step == run.first_step:
            lines.append(f"the layout is new from here: {layout_of(plan)}")
    return lines


def devices(device: torch.device, num_ranks: int) -> str:
    """`8 GPUs (NVIDIA H100 80GB HBM3)`, `2 ranks on CPUs`."""
    if device.type != "cuda":
        return f"{num_ranks} rank{'s' * (num_ranks > 1)} on CPUs"
    return f"{num_ranks} GPU{'s' * (num_ranks > 1)} ({torch.cuda.get_device_name(device)})"


def count(number: float) -> str:
    """A count of parameters: 5.57 B, 132.1 M, 40.3 k."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.2f} {unit}" if unit == "B" else f"{number / size:.1f} {unit}"
    return f"{number:.0f}"


def show(lines: Sequence[str], title: str, console: Console | None = None) -> None:
    """Print the lines, in a frame on a terminal. Never coloured or wrapped elsewhere: a log is searched by line."""
    if console is None and not is_terminal(sys.stdout):
        print("\n".join(lines), flush=True)
        return
    # Paths and reasons are data: Text keeps rich from reading [brackets] in them.
    (console or Console()).print(Panel(Text("\n".join(lines)), title=title, title_align="left", border_style="dim"))
