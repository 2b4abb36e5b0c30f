"""The startup summary: what is about to be trained, on one screen. A panel on a terminal, plain lines elsewhere."""

import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from cogds.config.deepspeed import zero_stage
from cogds.config.schema import KEYS, METHOD_DEFAULTS, ConditioningConfig, RunConfig
from cogds.core.condition_modes import Mode, used_modes
from cogds.core.geometry import ModelGeometry, num_tokens
from cogds.data.storage.location import is_local_file
from cogds.formatting import counted, gigabytes, magnitude
from cogds.model.lora.adapter import ALL_LINEAR
from cogds.process.environment import command
from cogds.process.progress import is_terminal
from cogds.train.resume import InitialState, describe_layout
from cogds.train.run import Run

logger = logging.getLogger(__name__)

EXPORTED_BYTES = {"bf16": 2, "fp32": 4}  # per parameter in the LoRA's file
LABEL_WIDTH = 11
PATCH_EMBED = "patch_embed.proj"


def labeled(label: str, text: str) -> str:
    """Return a line of the summary, or one that a part of the run logs after it."""
    return f"{label:{LABEL_WIDTH}}{text}"


def learning_rate_warning(cfg: RunConfig) -> str | None:
    """Return a warning if a full fine-tune has the learning rate of a LoRA, as the shipped configs set it."""
    usual, of_lora = METHOD_DEFAULTS["full"]["optimizer.lr"], KEYS["optimizer.lr"].default
    if cfg.trains_lora or cfg.optimizer.lr < of_lora:
        return None
    return (
        f"optimizer.lr is {cfg.optimizer.lr:g}, which is usual for a LoRA. Full fine-tuning changes every weight and "
        f"usually needs about {usual:g} (docs/full-fine-tuning.md)."
    )


def condition_warning(cfg: RunConfig, geometry: ModelGeometry) -> str | None:
    """Return a warning if a LoRA is given conditions that the base model's patch embedding cannot read.

    With temporal patches, that layer has weights of its own for each latent frame of a token, and the base model has
    been trained with a condition at the first one only.
    """
    if (
        geometry.patch_size_t is None
        or not cfg.trains_lora
        or {*used_modes(cfg.conditioning.modes)} <= {"first", "none"}
    ):
        return None
    if any(target == ALL_LINEAR or f".{PATCH_EMBED}".endswith(f".{target}") for target in cfg.lora.target_modules):
        return None
    return (
        f"lora.target_modules: {PATCH_EMBED} is not among them, so other conditions than the first frame are hardly "
        "learned. Add it, or use [all-linear] (docs/conditioning.md)."
    )


def summary(run: Run, initial: InitialState, dry_run: bool = False) -> list[str]:
    """Return the lines of the summary: a label and the facts, aligned in columns."""
    cfg, plan, output = run.cfg, run.plan, Path(run.cfg.output_dir)
    base = run.job.memory.transformer
    quantization = "" if cfg.model.quantization == "none" else f", quantized to {cfg.model.quantization}"
    sections: list[tuple[str, Sequence[str]]] = [
        ("model", [f"{cfg.model.path}, {magnitude(base.num_parameters)} parameters{quantization}"]),
        ("LoRA" if cfg.trains_lora else "trained", [describe_trained(run)]),
        ("conditions", describe_modes(cfg.conditioning)),
        ("hardware", [f"{describe_ranks(run)}, ZeRO stage {zero_stage(run.ds_config)}, {cfg.train.precision}"]),
        ("execution", execution_lines(run)),
        (
            "schedule",
            [
                f"{counted(cfg.train.num_steps, 'step')} total, {counted(plan.steps_per_epoch, 'step')} per epoch, "
                f"gradient accumulation {plan.accumulation}"
            ],
        ),
        ("buckets", bucket_table(run)),
        ("output", [f"{output} (a dry run saves nothing)" if dry_run else str(output)]),
        ("watch", [] if dry_run else [watch_command(output)]),
        ("left out", unusable_lines(run, dry_run)),
        ("start", start_lines(run, initial)),
    ]
    lines = []
    for label, texts in sections:
        lines += [labeled("" if number else label, text) for number, text in enumerate(texts)]
    return lines


def describe_trained(run: Run) -> str:
    """Return a line about the LoRA, or about the weights of the transformer that are trained."""
    cfg, trained, num_all = run.cfg, run.job.memory.trained, run.job.memory.transformer.num_parameters
    number = f"{magnitude(trained.num_parameters)} parameters"
    if trained.is_lora:
        size = gigabytes(trained.num_parameters * EXPORTED_BYTES[cfg.train.precision])
        targets = ", ".join(cfg.lora.target_modules)
        return f"rank {cfg.lora.rank}, alpha {cfg.lora.alpha:g}, {number} ({size}), on {targets}"
    size = gigabytes(num_all * EXPORTED_BYTES[cfg.train.precision])
    parts = ", ".join(cfg.full.modules) or "the whole transformer"
    return f"{parts}, {number} ({trained.num_parameters / num_all:.0%}), saved as a model of {size}"


def describe_modes(conditioning: ConditioningConfig) -> list[str]:
    """Return a line with the probability of each condition mode; none if all clips are given their first frame."""
    modes = used_modes(conditioning.modes)
    if modes == ("first",):
        return []
    return [", ".join(f"{mode} {conditioning.modes[mode]:.0%}" for mode in modes)]


def watch_command(output: Path) -> str:
    """Return the command that shows a run in TensorBoard."""
    return f"{command('tensorboard', 'tensorboard.main')} --logdir {shlex.quote(str(output / 'tensorboard'))}"


def sample_command(run: Run, result: Path) -> str:
    """Return a command that makes a video with a LoRA or a model, from the run's first prompt or one of its clips.

    Clips in tar files and behind URLs are replaced by a placeholder, because `cogds sample` reads local files only.
    """
    sample, conditioning, index = run.cfg.sample, run.cfg.conditioning, run.data.held_out or run.data.index
    control: str | None
    if sample.prompts:
        example = sample.prompts[0]
        prompt, control = example.prompt, example.control
        files = (("--image", example.image), ("--last-image", example.last_image), ("--video", example.video))
        flags = [word for flag, file in files if file for word in (flag, file)]
    else:
        clip = index[0]
        video, image = local_or(clip.path, "VIDEO"), local_or(clip.image_path or clip.path, "IMAGE")
        control = local_or(clip.control_path, "CONTROL") if clip.control_path else None
        prompt = " ".join(clip.captions[0].text.split())
        modes: Sequence[Mode] = ("first",) if clip.kind == "image" else used_modes(conditioning.modes)
        mode = max(modes, key=lambda mode: conditioning.modes.get(mode, 0.0))
        flags = example_flags(mode, video, image, conditioning.keyframe_times)
    words = ["--model", *([run.cfg.model.path, "--lora"] if run.cfg.trains_lora else []), str(result)]
    words += flags if run.model.family.takes_image else []
    words += ["--control", control] if control else []
    words += ["--prompt", prompt]
    for flag, name in (("--steps", "num_steps"), ("--guidance", "guidance")):
        if (value := getattr(sample, name)) != KEYS[f"sample.{name}"].default:
            words += [flag, f"{value:g}"]
    return f"{command('cogds', 'cogds')} sample {shlex.join(words)}"


def local_or(path: str, placeholder: str) -> str:
    """Return the path of a local file, and the placeholder for one in a tar file or behind a URL."""
    return path if is_local_file(path) else placeholder


def example_flags(mode: Mode, video: str, image: str, keyframe_times: Sequence[float]) -> list[str]:
    """Return the flags of `cogds sample` for a mode, with the files of one clip. Each image is the same one."""
    return {
        "first": ["--image", image],
        "last": ["--last-image", image],
        "first_last": ["--image", image, "--last-image", image],
        "prefix": ["--video", video],
        "suffix": ["--video", video, "--video-at", "end"],
        "keyframes": [word for time_s in keyframe_times for word in ("--keyframe", f"{time_s:g}", image)],
        "none": ["--image", image],  # required by `cogds sample`
    }[mode]


def describe_ranks(run: Run) -> str:
    """Return `8 GPUs (NVIDIA H100 80GB HBM3)`, `2 ranks on CPUs`, or the same with `, 2 per clip`."""
    device, num_ranks, sequence_size = run.world.device, run.world.size, run.world.sequence_size
    sharing = f", {sequence_size} per clip" if sequence_size > 1 else ""
    if device.type != "cuda":
        return f"{counted(num_ranks, 'rank')} on CPUs{sharing}"
    return f"{counted(num_ranks, 'GPU')} ({torch.cuda.get_device_name(device)}){sharing}"


def execution_lines(run: Run) -> list[str]:
    """Return the attention kernel, whether blocks are compiled, and pinned host memory if there is any."""
    execution = run.execution
    lines = [f"attention kernel {execution.kernel}, blocks {'compiled' if execution.is_compiled else 'not compiled'}"]
    if pinned := max((part.pinned_host_bytes for _, _, part in run.used_buckets), default=0):
        ranks = execution.ranks_per_node
        per_node = f", {gigabytes(ranks * pinned)} per node of {ranks} GPUs" if ranks > 1 else ""
        lines.append(f"pinned host memory for activations {gigabytes(pinned)} per GPU{per_node}")
    return [*lines, *execution.notes]


def bucket_table(run: Run) -> list[str]:
    """Return a row for each bucket that has clips. GPU memory is a column only on GPUs."""
    gpu_bytes = run.execution.gpu_bytes
    header = ["FxHxW", "tokens", "clips", "batch size", "activation checkpointing"]
    rows = [header + (["GPU memory (estimate)"] if gpu_bytes else [])]
    for bucket, shape, part in run.used_buckets:
        row = [
            str(shape),
            f"{num_tokens(shape, run.model.geometry):,}",
            f"{sum(run.data.index.sizes[bucket]):,}",
            str(run.plan.local_batch_sizes[bucket]),
            str(part.checkpointing),
        ]
        if gpu_bytes:
            row.append(f"{gigabytes(part.estimate.total_bytes)} of {gigabytes(gpu_bytes)}")
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths)) for row in rows]


def unusable_lines(run: Run, dry_run: bool) -> list[str]:
    """Return the number of clips that are not trained, and examples with the reason; [] if there are none."""
    unusable = run.data.unusable
    if not unusable.num:
        return []
    place = "" if dry_run else f", listed in {Path(run.cfg.output_dir) / 'unusable.jsonl'}"
    return [f"{counted(unusable.num, 'file')}{place}", *(f"  {path}: {reason}" for path, reason in unusable.examples)]


def start_lines(run: Run, initial: InitialState) -> list[str]:
    """Return the checkpoint or LoRA that the run starts from; [] if it starts from scratch."""
    lines = list(initial.notes)
    if initial.checkpoint:
        lines.append(f"resuming from {initial.checkpoint}")
        if run.plan.origin.step == run.first_step:
            lines.append(f"new layout: {describe_layout(run.plan)}")
    return lines


def show(lines: Sequence[str], title: str, console: Console | None = None) -> None:
    """Log the lines, or print them in a panel on a terminal. Logs have no color and no wrapping, so grep finds them."""
    if console is None and not is_terminal(sys.stdout):
        logger.info("\n".join(lines))
        return
    # Text keeps rich from interpreting [brackets] in paths and reasons.
    if console or logger.isEnabledFor(logging.INFO):
        (console or Console()).print(Panel(Text("\n".join(lines)), title=title, title_align="left", border_style="dim"))
