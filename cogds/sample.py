"""The sample verb: generate videos from prompts and first frames, with the diffusers pipeline and LoRAs."""

import argparse
import itertools
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from cogds.core.geometry import ClipShape
from cogds.data.video.media import write_video
from cogds.errors import UserError, refuse_to_run
from cogds.files import make_folders, whole_file
from cogds.model.cudnn import check_cudnn
from cogds.model.full_export import trained_metadata
from cogds.model.load import DTYPES, ModelFolder, TextEncoder, find_model
from cogds.model.lora.adapter import add_lora
from cogds.model.lora.convert import check_all_fit, check_scale, load_adapter
from cogds.model.lora.file import WeightedLora, describe_lora, read_loras
from cogds.model.pipelines import (
    Conditions,
    Denoising,
    apply_convention,
    count_transformer_calls,
    decode_frames,
    load_pipeline,
    sample_latents,
)
from cogds.process.activity import activity
from cogds.process.logs import RESULT
from cogds.process.progress import progress_bar
from cogds.videos.image_grid import add_label, evenly_spaced_frames, make_grid, shrink
from cogds.videos.prompts import PromptSpec, read_prompt_specs
from cogds.videos.sample_spec import load_first_frame, slug

logger = logging.getLogger(__name__)

NO_PROMPT = ""
CELL_WIDTH = 480  # pixels of a video in a grid
STRIP_FRAMES, STRIP_WIDTH = 6, 160  # frames in a strip, pixels of each frame


@dataclass(frozen=True)
class SampleJob:
    """All videos of one prompt: every seed at every LoRA scale."""

    prompt: PromptSpec
    shape: ClipShape
    pixels: np.ndarray | None
    seeds: Sequence[int]
    scales: Sequence[float]

    @property
    def num_videos(self) -> int:
        return len(self.seeds) * len(self.scales)


def label(seed: int, scale: float, has_loras: bool) -> str:
    """Return `seed 0, scale 1`, or only the seed without LoRAs."""
    return f"seed {seed}" + (f", scale {scale:g}" if has_loras else "")


@dataclass(frozen=True)
class OutputFiles:
    """The files to write: one mp4, or in a folder an mp4 for each video, and a grid for each prompt with several."""

    single: Path | None
    folder: Path

    def video(self, job: SampleJob, number: int, text: str) -> Path:
        """Return the file of a video. number: of the job, from 1. text: the video's label."""
        return self.single or self._file(job, number, text.replace(", ", "-").replace(" ", ""))

    def grid(self, job: SampleJob, number: int) -> Path:
        """Return the file of a grid, which also exists as a .png."""
        return self._file(job, number, "grid")

    def _file(self, job: SampleJob, number: int, name: str) -> Path:
        return self.folder / f"{number:02d}-{slug(job.prompt.prompt)}-{name}.mp4"

    def check_absent(self, jobs: Sequence[SampleJob], has_loras: bool) -> None:
        """Raise UserError if a file exists, so that no video is ever overwritten."""
        files = []
        for number, job in enumerate(jobs, 1):
            labels = [label(seed, scale, has_loras) for seed in job.seeds for scale in job.scales]
            files += [self.video(job, number, text) for text in labels]
            files += [self.grid(job, number)] if len(labels) > 1 else []
        if existing := next((file for file in files if os.path.lexists(file)), None):
            raise UserError(f"--output: {existing} already exists. Choose another name, or remove it.")


def output_files(output: str | None, is_single: bool) -> OutputFiles:
    """Return the files for `--output`. Without it, the first of sample.mp4, sample-2.mp4, ... that does not exist.

    A folder is named the same, without .mp4.
    """
    if output is None:
        suffix = ".mp4" if is_single else ""
        names = itertools.chain(["sample"], (f"sample-{number}" for number in itertools.count(2)))
        output = next(name for name in names if not os.path.lexists(name + suffix)) + ".mp4"
    path = Path(output)
    return OutputFiles(path, path.parent) if is_single else OutputFiles(None, path.with_suffix(""))


def main(args: argparse.Namespace) -> None:
    """Check the arguments, load the model, make the videos. Reports errors before any weight is loaded."""
    model = find_model(args.model)
    loras = read_weighted_loras(args.lora or [], args.lora_alpha, model)
    for lora in loras:
        logger.info("\n".join(describe_lora(lora.file, "--lora-alpha")))
    own_fps = trained_metadata(model).get("fps") if model.hub_id is None else None
    fps = args.fps or float(recorded_value(loras, "fps", own_fps or model.geometry.trained_fps))
    jobs = plan_jobs(args, loras, model)
    is_single = sum(job.num_videos for job in jobs) == 1
    output = output_files(args.output, is_single)
    output.check_absent(jobs, bool(loras))
    make_folders({"--output": str(output.folder)})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.offload and device.type == "cpu":
        raise UserError("--offload: there is no GPU to offload from. Leave the flag out.")

    dtype = DTYPES[args.precision or ("bf16" if device.type == "cuda" else "fp32")]
    check_cudnn(device, dtype)
    prompts = dict.fromkeys([NO_PROMPT, *(job.prompt.prompt for job in jobs)])
    with activity("encoding the prompts with T5"):
        states = encode_prompts(model, list(prompts), dtype, "cpu" if args.offload == "sequential" else device)
    with activity("loading the model"):
        pipeline = prepare_pipeline(model, dtype, loras, args, device)
    num_videos, num_steps = sum(job.num_videos for job in jobs), count_transformer_calls(pipeline, args.steps)
    bar = progress_bar("denoising", "step", num_videos * num_steps, leave=False, has_numbers=False)

    def on_step() -> None:
        bar.update()
        video, step = divmod(bar.n - 1, num_steps)
        bar.set_description_str(f"video {video + 1} of {num_videos}, {step + 1}/{num_steps}", refresh=False)

    denoising = Denoising(args.steps, args.guidance, states[NO_PROMPT], on_step)
    for number, job in enumerate(jobs, 1):
        rows: list[list[tuple[str, np.ndarray]]] = []
        for seed in job.seeds:
            rows.append([])
            for scale in job.scales:
                if loras:
                    names = [f"lora{index}" for index in range(len(loras))]
                    pipeline.set_adapters(names, [scale * lora.weight for lora in loras])
                latents = sample_latents(
                    pipeline, Conditions(job.pixels), states[job.prompt.prompt], job.shape, seed, denoising
                )
                with activity("decoding the video"):
                    frames = decode_frames(pipeline, latents, job.shape)
                text = label(seed, scale, bool(loras))
                _write(output.video(job, number, text), frames, fps)
                if not is_single:
                    rows[-1].append((text, shrink(frames.numpy(), CELL_WIDTH)))
        if job.num_videos > 1:
            _write_grid(output.grid(job, number), rows, fps)
    bar.close()


def plan_jobs(args: argparse.Namespace, loras: Sequence[WeightedLora], model: ModelFolder) -> list[SampleJob]:
    """Read the prompts and their first frames. Raises UserError, naming the flag or the line of the list."""
    recorded = recorded_value(loras, "buckets", [])
    buckets = [ClipShape.parse(text) for text in recorded] or [model.geometry.trained_size]
    scales = list(dict.fromkeys(args.lora_scale)) if loras else [1.0]
    jobs = []
    for prompt in read_prompt_specs(args.prompt or [], args.image or [], args.list, model.family.takes_image):
        size = prompt.size or args.size
        shape, pixels = load_first_frame(prompt.image, size, buckets, model.geometry, prompt.size_key)
        seeds = [prompt.seed] if prompt.seed is not None else list(dict.fromkeys(args.seed))
        jobs.append(SampleJob(prompt, shape, pixels, seeds, scales))
    return jobs


def prepare_pipeline(
    model: ModelFolder,
    dtype: torch.dtype,
    loras: Sequence[WeightedLora],
    args: argparse.Namespace,
    device: torch.device,
) -> Any:
    """Load the diffusers pipeline with all LoRAs, on the device or offloaded from it."""
    pipeline = load_pipeline(model, dtype)
    count_transformer_calls(pipeline, args.steps)  # raises if there are more steps than timesteps
    for number, lora in enumerate(loras):
        add_lora(pipeline.transformer, load_adapter(lora.file), f"lora{number}")
    convention = recorded_value(loras, "image_latents", "pipeline", if_missing="pipeline")
    if apply_convention(pipeline, convention) != 1.0:
        logger.info("image latents: scaled as this LoRA was trained (%s), not as in diffusers", convention)
    if args.offload == "sequential":
        pipeline.enable_sequential_cpu_offload()
    elif args.offload == "model":
        pipeline.enable_model_cpu_offload()
    else:
        pipeline.to(device)
    return pipeline


def read_weighted_loras(
    arguments: Sequence[Sequence[str]], alpha: float | None, model: ModelFolder
) -> list[WeightedLora]:
    """Read the LoRAs of the command line, each a path and an optional weight. Raises UserError if one does not fit."""
    weights = []
    for path, *words in arguments:
        try:
            weights.append(float(*words) if words else 1.0)
        except (TypeError, ValueError):
            raise UserError(
                f"--lora: {path} is followed by '{' '.join(words)}', which is not one number. Pass one weight after "
                "the path, and each further LoRA with its own --lora."
            ) from None
    for weight in weights:
        check_scale(weight, "--lora")
    files = read_loras([path for path, *_ in arguments], alpha, "--lora-alpha")
    check_all_fit(files, model)
    return [WeightedLora(file, weight) for file, weight in zip(files, weights, strict=True)]


def recorded_value(loras: Sequence[WeightedLora], name: str, default: Any, if_missing: Any = None) -> Any:
    """Return a setting that the trainer recorded in the LoRAs: that of the first LoRA. Warns if others differ.

    default: for no LoRA, or if none has recorded it. if_missing: the value of a LoRA that has not recorded it; None if
    that is unknown, so that this LoRA is skipped.
    """
    files = [lora.file for lora in loras]
    values = [
        (file.path, file.metadata.get(name, if_missing))
        for file in files
        if name in file.metadata or if_missing is not None
    ]
    for path, value in values[1:]:
        if value != values[0][1]:
            own, first = (", ".join(map(str, v)) if isinstance(v, list) else v for v in (value, values[0][1]))
            logger.warning(f"{values[0][0]} was trained with {name} {first}, {path} with {own}. Using {first}.")
    return values[0][1] if values else default


@torch.no_grad()
def encode_prompts(
    model: ModelFolder, prompts: Sequence[str], dtype: torch.dtype, device: torch.device | str
) -> dict[str, torch.Tensor]:
    """Return the T5 states of each prompt, on the CPU.

    T5 is freed before the transformer is loaded, because both together need 21 GB.
    """
    encoder = TextEncoder(model, dtype, device)
    states = {prompt: encoder.encode(prompt).cpu() for prompt in prompts}
    del encoder
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return states


def _write(path: Path, frames: torch.Tensor, fps: float) -> None:
    write_video(path, frames, fps)
    logger.log(RESULT, f"{path}: {len(frames)} frames, {frames.shape[1]}x{frames.shape[2]}, {fps:g} frames/s")


def _write_grid(file: Path, rows: Sequence[Sequence[tuple[str, np.ndarray]]], fps: float) -> None:
    """Write all videos of one prompt as one video, seeds in rows and scales in columns, and as strips in an image."""
    write_video(file, make_grid([[add_label(video, label) for label, video in row] for row in rows]), fps)
    strips = []
    for row in rows:
        for label, video in row:
            frames = evenly_spaced_frames(shrink(video, STRIP_WIDTH), STRIP_FRAMES)
            strips.append([add_label(make_grid([[frame[None] for frame in frames]]), label)])
    image = file.with_suffix(".png")
    with whole_file(image) as partial:
        Image.fromarray(make_grid(strips)[0]).save(partial)
    logger.log(RESULT, "grids: %s and %s", file, image)


if __name__ == "__main__":
    refuse_to_run("cogds.sample", "sample")
