"""The init verb: look at a folder of clips and at the GPU, ask three questions, and write a run config."""

import argparse
import logging
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from cogds.arguments import RECIPE_PREFIX, find_config, shipped_config
from cogds.config.loading import show
from cogds.config.schema import KEYS, RunConfig, get
from cogds.core.flops import GPUS
from cogds.core.memory_advice import find_remedies
from cogds.distributed.world import World, gpu_memory
from cogds.encode.clip_set import load_clip_set
from cogds.encode.scan_data import scan_data
from cogds.errors import UserError, refuse_to_run
from cogds.files import whole_file
from cogds.formatting import counted, gigabytes
from cogds.job import Job, load_job
from cogds.model.load import find_model
from cogds.process.logs import RESULT
from cogds.report.analysis import Report
from cogds.report.main import clip_table, run_report
from cogds.report.text import short_report

logger = logging.getLogger(__name__)

LEARN = {
    "style": "a look, whatever is shown",
    "character": "a person, an animal or an object",
    "motion": "a movement, a camera move or an effect",
}
USE = {
    "diffusers": "diffusers and `cogds sample`",
    "comfyui": "ComfyUI",
    "both": "diffusers and ComfyUI",
}
# ComfyUI's nodes multiply the first frame's latents by the scaling factor, diffusers divides by it.
IMAGE_LATENTS = {"diffusers": "pipeline", "comfyui": "scaled", "both": "pipeline"}
MIN_CLIPS_TO_HOLD_OUT = 10
# Written even if they have their default, because they are what people change.
ALWAYS = ("conditioning.image_latents", "lora.rank", "lora.alpha", "optimizer.lr", "train.num_steps", "eval.held_out")


@dataclass(frozen=True)
class Answers:
    """What the user wants. gpu_bytes: memory of one GPU; device: its name, if it is known."""

    learn: str
    use: str
    gpu_bytes: float
    device: str | None


@dataclass(frozen=True)
class NewRun:
    """A run that fits clips and GPU.

    Attributes:
        extra_flags: for `cogds train`.
        num_clips: number of clips of each bucket, held-out clips included.
    """

    job: Job
    report: Report
    extra_flags: str = ""
    num_clips: Mapping[str, int] = field(default_factory=dict)

    @property
    def cfg(self) -> RunConfig:
        return self.job.cfg


def main(args: argparse.Namespace) -> None:
    """Write the config, and say what to run next."""
    output = Path(args.output)
    if output.exists():
        raise UserError(f"--output {output}: already exists. Remove it, or choose another file.")
    answers = ask(args)
    run = fit_run(args, answers)
    with whole_file(output) as partial:
        partial.write_text(config_text(run, answers, output), encoding="utf-8")
    logger.info(short_report(run.report))
    logger.log(RESULT, "wrote %s\n%s", output, next_steps(run, answers, output))


# --- questions


def ask(args: argparse.Namespace) -> Answers:
    """Return the answers from the flags, and from the terminal those that are missing."""
    learn = args.learn or _choose("--learn", "What should the LoRA learn?", LEARN)
    use = args.use or _choose("--use", "Where will it be used?", USE)
    found_bytes = gpu_memory(World(0, 1, 0, 1).device)
    if args.memory is None and found_bytes:
        return Answers(learn, use, found_bytes, torch.cuda.get_device_name())
    text = args.memory or _prompt("--memory", "Memory of the GPU to train on, in GB, or its name (such as h100): ")
    return Answers(learn, use, *parse_memory(text))


def parse_memory(text: str) -> tuple[float, str | None]:
    """Return the bytes and the device name for `24` or `rtx4090`. Raises UserError."""
    if gpu := GPUS.get(text.strip().lower()):
        return gpu.memory_bytes, gpu.device
    try:
        size = float(text.lower().removesuffix("gb"))
    except ValueError:
        size = 0.0
    if not 0 < size < float("inf"):
        raise UserError(
            f"--memory: not a size in GB or a known GPU: {text}. Pass for example 24, or {', '.join(GPUS)}."
        )
    return size * 1e9, None


def _choose(flag: str, question: str, choices: Mapping[str, str]) -> str:
    lines = [question, *(f"  {number}  {name}: {text}" for number, (name, text) in enumerate(choices.items(), 1))]
    names = list(choices)
    while True:
        answer = _prompt(flag, "\n".join([*lines, f"Number or name ({names[0]}): "])) or names[0]
        if answer in names:
            return answer
        if answer in map(str, range(1, len(names) + 1)):
            return names[int(answer) - 1]
        lines = [f"'{answer}' is none of these."]


def _prompt(flag: str, text: str) -> str:
    """Ask on the terminal. Raises UserError if there is none."""
    try:
        if not sys.stdin.isatty():
            raise EOFError
        return input(text).strip()
    except EOFError:
        raise UserError(
            f"{flag}: not given, and there is no terminal to ask. Pass {flag} (cogds init --help)."
        ) from None


# --- the run


def fit_run(args: argparse.Namespace, answers: Answers) -> NewRun:
    """Choose buckets for the clips, and settings for the memory."""
    overrides = [f"data.path={args.clips}"]
    overrides += model_overrides(args.model) if args.model else []
    if not args.model or find_model(args.model, named="--model").family.takes_image:
        overrides.append(f"conditioning.image_latents={IMAGE_LATENTS[answers.use]}")
    overrides += [f"data.caption_prefix={args.trigger}"] * bool(args.trigger)
    all_clips = [*overrides, "eval.held_out=0"]
    run = resolve(answers, all_clips)
    if suggestion := run.report.suggestion:
        run = resolve(answers, [*all_clips, f"data.buckets=[{','.join(suggestion.buckets)}]"])
    used = ",".join(str(bucket.shape) for bucket in run.report.used_buckets)
    few = run.report.num_clips < MIN_CLIPS_TO_HOLD_OUT
    chosen = [*(all_clips if few else overrides), f"data.buckets=[{used}]"]
    num_clips = {str(bucket.shape): bucket.num_clips for bucket in run.report.used_buckets}
    return replace(fit_memory(resolve(answers, chosen), answers, chosen), num_clips=num_clips)


def model_overrides(path: str) -> list[str]:
    """The settings of a model that the recipes are not for: 1.0 models were trained at one size and 8 frames/s."""
    geometry = find_model(path).geometry
    if geometry.patch_size_t:
        return [f"model.path={path}"]
    return [f"model.path={path}", f"data.buckets=[{geometry.trained_size}]", f"data.fps={geometry.trained_fps:g}"]


def resolve(answers: Answers, overrides: list[str]) -> NewRun:
    """Resolve a config and look at the clips. Raises UserError if none can be trained, whatever the buckets."""
    args = argparse.Namespace(
        config=[find_config(RECIPE_PREFIX + answers.learn, "run_configs", ".yaml")],
        deepspeed=str(shipped_config("ds_configs", "zero2.json")),
        overrides=overrides,
    )
    job = load_job(args, World(0, 1, 0, 1), num_ranks=max(1, torch.cuda.device_count()))
    clips = load_clip_set(job.cfg, scan_data(job.cfg, job.world), job.buckets)
    report = run_report(job, clips, clip_table(clips), answers.gpu_bytes, answers.device)
    if not report.suggestion:
        clips.check_not_empty()
    return NewRun(job, report)


def fit_memory(run: NewRun, answers: Answers, overrides: list[str]) -> NewRun:
    """Apply the smallest change that makes the largest bucket fit, if one is needed and known."""
    largest = run.report.largest
    if largest is None or not largest.shortfall:
        return run
    remedies = find_remedies(run.job.memory, largest.shape, largest.batch_size, answers.gpu_bytes)
    for remedy in sorted(remedies, key=lambda remedy: any("--" in argument for argument in remedy.arguments)):
        words = [word for argument in remedy.arguments for word in argument.split()]
        changed = resolve(answers, [*overrides, *(word for word in words if "=" in word)])
        flags = [word for word in words if "=" not in word]
        if flags or not changed.report.largest or not changed.report.largest.shortfall:
            return NewRun(changed.job, changed.report, " ".join(flags))
    return run


# --- the file


def config_text(run: NewRun, answers: Answers, output: Path) -> str:
    """Return the config as commented YAML: what differs from the defaults, and what people change."""
    cfg, report = run.cfg, run.report
    comments = {
        "model.path": "a hub id, or the folder of a downloaded model",
        "model.quantization": f"so that it fits into {gigabytes(answers.gpu_bytes)}",
        "data.caption_prefix": "put before every caption; write it into your prompts too",
        "conditioning.image_latents": {
            "pipeline": "as diffusers scales the first frame; ComfyUI's nodes: scaled",
            "scaled": "as ComfyUI's nodes scale the first frame; diffusers: pipeline",
        }.get(cfg.conditioning.image_latents, ""),
        "eval.held_out": "share of the clips that are only evaluated, which shows overfitting",
        "train.num_steps": "watch eval/loss and stop earlier if it rises",
    }
    lines = [
        f"# LoRA of a {answers.learn}, from {counted(report.num_clips + report.num_held_out, 'clip')}.",
        "# Made by cogds init; docs/configuration.md lists all keys.",
        "#",
        f"#   {report_command(output)}",
        f"#   {train_command(run, output)}",
        "",
        f"output_dir: {show(cfg.output_dir)}",
    ]
    for section in dict.fromkeys(name.partition(".")[0] for name in KEYS if "." in name):
        names = [name for name in KEYS if name.startswith(f"{section}.") and _is_written(run, name)]
        if names:
            lines += ["", f"{section}:"]
        for name in names:
            if name == "data.buckets":
                lines += bucket_lines(run.num_clips)
                continue
            comment = f"  # {comments[name]}" if comments.get(name) else ""
            lines.append(f"  {name.removeprefix(f'{section}.')}: {show(_plain(get(cfg, name)))}{comment}")
    return "\n".join(lines) + "\n"


def _is_written(run: NewRun, name: str) -> bool:
    cfg = run.cfg
    if name == "conditioning.image_latents" and not run.job.model.family.takes_image:
        return False
    if name.startswith("data.bucket_"):  # data.buckets replaces them
        return not cfg.data.buckets
    return name in ALWAYS or get(cfg, name) != KEYS[name].default


def _plain(value: Any) -> Any:
    if isinstance(value, float) and value == int(value):
        return int(value)
    return list(value) if isinstance(value, tuple) else value


def bucket_lines(num_clips: Mapping[str, int]) -> list[str]:
    """The buckets as YAML, each with the number of its clips."""
    return [
        "  # Frames x height x width. Each clip is trained in the bucket that crops it least.",
        "  buckets:",
        *(f"    - {bucket}  # {counted(number, 'clip')}" for bucket, number in num_clips.items()),
    ]


def report_command(output: Path) -> str:
    """The command that looks at the clips."""
    return f"cogds report --config {shlex.quote(str(output))} --html report.html"


def train_command(run: NewRun, output: Path) -> str:
    """The command that trains."""
    return " ".join(["cogds train --config", shlex.quote(str(output)), *([run.extra_flags] if run.extra_flags else [])])


def next_steps(run: NewRun, answers: Answers, output: Path) -> str:
    """Say what to do with the file, and how to use the LoRA where the user wants to."""
    lora = f"{run.cfg.output_dir}/lora/step-{run.cfg.train.num_steps:06d}"
    lines = [f"check:  {report_command(output)}", f"train:  {train_command(run, output)}"]
    family = run.job.model.family
    if answers.use != "comfyui":
        image = "--image IMAGE " if family.takes_image else ""
        model = shlex.quote(run.cfg.model.path)
        lines.append(f'use:    cogds sample --model {model} --lora {lora} {image}--prompt "PROMPT"')
    if answers.use != "diffusers":
        if not (family.takes_image and family.has_ofs):
            layout = "comfyui-wrapper"
        else:  # comfyui-merged corrects the scale of image latents
            layout = "comfyui" if answers.use == "comfyui" else "comfyui-merged"
        lines.append(f"use:    cogds export {lora} --to {layout} --output FOLDER (docs/using-the-lora.md)")
    if answers.learn == "motion" and any(bucket.shape.frames == 1 for bucket in run.report.used_buckets):
        lines.append("warning: images teach no motion. Move them out of the folder, and run cogds init again.")
    return "\n".join(lines)


if __name__ == "__main__":
    refuse_to_run("cogds.init", "init")
