"""The sample verb: generate videos from prompts and first frames, with the diffusers pipeline and LoRAs."""

import argparse
import dataclasses
import itertools
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from cogds.core.condition_modes import pixel_frames
from cogds.core.geometry import ClipShape
from cogds.core.vae_memory import needs_tiles
from cogds.data.video.media import write_video
from cogds.errors import UserError, refuse_to_run
from cogds.files import make_folders, whole_file
from cogds.model.control import control_of, encode_control, given_control
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
from cogds.videos.conditions import ConditionFiles, context_latents, modes_of, read_conditions, untrained_warning
from cogds.videos.image_grid import add_label, evenly_spaced_frames, make_grid, shrink
from cogds.videos.prompts import PromptSpec, read_prompt_specs
from cogds.videos.sample_spec import load_first_frame, read_control, slug

logger = logging.getLogger(__name__)

NO_PROMPT = ""
CELL_WIDTH = 480  # pixels of a video in a grid
STRIP_FRAMES, STRIP_WIDTH = 6, 160  # frames in a strip, pixels of each frame


@dataclass(frozen=True)
class SampleJob:
    """All videos of one prompt: every seed at every LoRA scale.

    Attributes:
        segments: clips of each video; each continues the last `context` frames of the one before.
        loop: whether the last frame repeats the first, so that it is not written.
        control: the control video, uint8 [F, H, W, 3].
    """

    prompt: PromptSpec
    shape: ClipShape
    conditions: Conditions
    seeds: Sequence[int]
    scales: Sequence[float]
    segments: int = 1
    context: int = 0
    loop: bool = False
    control: np.ndarray | None = None

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
    model = find_model(args.model, named="--model")
    loras = read_weighted_loras(args.lora or [], args.lora_alpha, model)
    for lora in loras:
        logger.info("\n".join(describe_lora(lora.file, "--lora-alpha")))
    own = trained_metadata(model) if model.hub_id is None else {}
    fps = args.fps or float(recorded_value(loras, "fps", own.get("fps") or model.geometry.trained_fps))
    jobs = plan_jobs(args, loras, model, fps, own)
    if model.family.takes_image:
        warn_untrained(jobs, loras, own)
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
    num_steps = count_transformer_calls(pipeline, args.steps)
    num_clips, kind = sum(job.num_videos * job.segments for job in jobs), "video" if args.segments == 1 else "segment"
    bar = progress_bar("denoising", "step", num_clips * num_steps, leave=False, has_numbers=False)

    def on_step() -> None:
        bar.update()
        clip, step = divmod(bar.n - 1, num_steps)
        bar.set_description_str(f"{kind} {clip + 1} of {num_clips}, {step + 1}/{num_steps}", refresh=False)

    denoising = Denoising(args.steps, args.guidance, states[NO_PROMPT], on_step)
    of_shape = {job.shape: job for job in jobs}
    controls = {shape: encode_job_control(pipeline, job, model) for shape, job in of_shape.items()}
    for number, job in enumerate(jobs, 1):
        rows: list[list[tuple[str, np.ndarray]]] = []
        for seed in job.seeds:
            rows.append([])
            for scale in job.scales:
                if loras:
                    names = [f"lora{index}" for index in range(len(loras))]
                    pipeline.set_adapters(names, [scale * lora.weight for lora in loras])
                    set_control_scale(pipeline.transformer, loras, scale)
                with given_control(pipeline.transformer, controls[job.shape]):
                    frames = make_video(pipeline, job, states[job.prompt.prompt], seed, denoising)
                text = label(seed, scale, bool(loras))
                _write(output.video(job, number, text), frames, fps)
                if not is_single:
                    rows[-1].append((text, shrink(frames.numpy(), CELL_WIDTH)))
        if job.num_videos > 1:
            _write_grid(output.grid(job, number), rows, fps)
    bar.close()


def set_control_scale(transformer: Any, loras: Sequence[WeightedLora], scale: float) -> None:
    """Give the control embedding the strength of its LoRA. scale: of all LoRAs."""
    for lora in loras:
        if lora.file.control and (control := control_of(transformer)) is not None:
            control.scale = scale * lora.weight


def check_control(control: str | None, loras: Sequence[WeightedLora], num_segments: int) -> None:
    """Raise UserError if a control video is missing, or cannot be used."""
    trained = [lora.file.path for lora in loras if lora.file.control]
    if trained and control is None:
        raise UserError(f"--control: missing, and {trained[0]} was trained with control videos. Pass a video.")
    if control is not None and not trained:
        raise UserError("--control: no LoRA was trained with control videos. Leave it out, or pass such a LoRA.")
    if len(trained) > 1:
        raise UserError(
            f"--control: {trained[0]} and {trained[1]} were both trained with control videos. Pass one of them."
        )
    if control is not None and num_segments > 1:
        raise UserError(
            "--control: --segments is also given, but a control video is of one clip. Leave one of them out."
        )


def encode_job_control(pipeline: Any, job: SampleJob, model: ModelFolder) -> torch.Tensor | None:
    """Encode the control video of a job, on the CPU; in tiles if whole frames need too much memory."""
    if job.control is None:
        return None
    with activity("encoding the control video"):
        tiled = needs_tiles(job.shape, model.vae_size)
        latents = encode_control(
            pipeline.vae, torch.from_numpy(job.control), model.geometry.patch_size_t,
            device=pipeline._execution_device, tiled=tiled,
        )  # fmt: skip
        return latents.cpu()


def make_video(pipeline: Any, job: SampleJob, states: torch.Tensor, seed: int, denoising: Denoising) -> torch.Tensor:
    """Generate a video, uint8 [F, H, W, 3]. Segment k, from 0, uses the seed `seed` + k.

    A further segment begins with the last `context` frames of the one before, which are kept from that one.
    """
    frames = torch.empty(0)
    for segment in range(job.segments):
        conditions = job.conditions if segment == 0 else Conditions(video=frames[-job.context :].numpy())
        latents = sample_latents(pipeline, conditions, states, job.shape, seed + segment, denoising)
        with activity("decoding the video"):
            clip = decode_frames(pipeline, latents, job.shape)
        frames = clip if segment == 0 else torch.cat([frames, clip[job.context :]])
    return frames[:-1] if job.loop else frames


def plan_jobs(
    args: argparse.Namespace, loras: Sequence[WeightedLora], model: ModelFolder, fps: float, own: Mapping[str, Any]
) -> list[SampleJob]:
    """Read the prompts and the files of all conditions. Raises UserError, naming the flag or the line of the list.

    own: what a full fine-tuning run has recorded in the model.
    """
    recorded = recorded_value(loras, "buckets", own.get("buckets", []))
    buckets = [ClipShape.parse(text) for text in recorded] or [model.geometry.trained_size]
    scales = list(dict.fromkeys(args.lora_scale)) if loras else [1.0]
    check_control(args.control, loras, args.segments)
    flags = condition_files(args, model)
    trained_context = recorded_value(loras, "context_latents", own.get("context_latents"))
    context = context_latents(args.context, trained_context, fps, model.geometry)
    if trained_context not in (None, context) and (args.video or args.segments > 1):
        logger.warning(
            f"--context: {context} latent frames, but training continued {trained_context}. The video may not follow "
            "them."
        )
    jobs: list[SampleJob] = []
    controls: dict[ClipShape, np.ndarray] = {}  # the same for all prompts of a size
    has_conditions = flags.need_no_image
    takes_image = model.family.takes_image
    for prompt in read_prompt_specs(
        args.prompt or [], args.image or [], args.list, takes_image, has_conditions=has_conditions
    ):
        size = prompt.size or args.size
        files = dataclasses.replace(
            flags, last_image=prompt.last_image or flags.last_image, video=prompt.video or flags.video
        )
        sized_by = prompt.image or files.last_image or files.video or next((file for _, file in files.keyframes), None)
        shape, pixels = load_first_frame(sized_by, size, buckets, model.geometry, prompt.size_key)
        image = pixels if prompt.image else None
        try:
            conditions = read_conditions(image, files, context, shape, fps, model.geometry)
        except UserError as error:
            raise UserError(f"{prompt.place}: {error}" if prompt.place else str(error)) from None
        seeds = [prompt.seed] if prompt.seed is not None else list(dict.fromkeys(args.seed))
        num_context = pixel_frames(context, model.geometry)
        if args.control and shape not in controls:
            controls[shape] = read_control(args.control, shape, fps, "--control")
        segments, loop = files.segments, files.loop
        jobs.append(
            SampleJob(prompt, shape, conditions, seeds, scales, segments, num_context, loop, controls.get(shape))
        )
    return jobs


def condition_files(args: argparse.Namespace, model: ModelFolder) -> ConditionFiles:
    """Return the condition flags of the command line. Raises UserError if the model takes no images."""
    flags = {
        "--last-image": args.last_image, "--video": args.video, "--keyframe": args.keyframe, "--loop": args.loop,
        "--segments": args.segments > 1, "--context": args.context,
    }  # fmt: skip
    if not model.family.takes_image and (given := next((flag for flag, value in flags.items() if value), None)):
        raise UserError(f"{given}: this model makes videos from the prompt alone. Leave {given} out.")
    keyframes = []
    for text, file in args.keyframe or []:
        try:
            time_s = float(text)
        except ValueError:
            time_s = -1.0
        if not 0 <= time_s < float("inf"):
            raise UserError(
                f"--keyframe: '{text}' is not a time in seconds. Write, for example, --keyframe 2.5 {file}."
            )
        keyframes.append((time_s, file))
    return ConditionFiles(args.last_image, args.video, args.video_at, keyframes, args.context, args.loop, args.segments)


def warn_untrained(jobs: Sequence[SampleJob], loras: Sequence[WeightedLora], own: dict[str, Any]) -> None:
    """Warn once about each mode that neither a LoRA nor the model was trained with. own: metadata of the model.

    A model or LoRA that records none was trained with first images.
    """
    sources = [lora.file.metadata for lora in loras] or [own]
    trained = {mode: share for source in sources for mode, share in (source.get("modes") or {"first": 1.0}).items()}
    name = "the LoRA" if len(loras) == 1 else "the LoRAs" if loras else "the model"
    used = [modes_of(job.conditions) for job in jobs]
    used += [("prefix",) for job in jobs if job.segments > 1]
    for modes in dict.fromkeys(used):
        if warning := untrained_warning(modes, trained, name):
            logger.warning(warning)


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
