"""Video generation with diffusers' pipeline, from a caption's text states and, in image-to-video, given frames.

`cogds sample` and the samples during training both use this module, so the same weights give the same frames. The
pipeline does not include T5. Callers pass its states.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXImageToVideoPipeline, CogVideoXPipeline
from PIL import Image

from cogds.core.conditioning import convention_factor
from cogds.core.geometry import ClipShape
from cogds.errors import UserError
from cogds.model.conditioned_pipeline import ConditionedPipeline
from cogds.model.load import ModelFolder

Pipeline: TypeAlias = CogVideoXImageToVideoPipeline | CogVideoXPipeline


@dataclass(frozen=True)
class Denoising:
    """How videos are denoised.

    Attributes:
        guidance: classifier-free guidance scale; 1: off.
        empty_states: text states [text_tokens, dim] of the empty prompt.
        on_step: called after each step.
    """

    num_steps: int
    guidance: float
    empty_states: torch.Tensor
    on_step: Callable[[], None] | None = None


@dataclass(frozen=True)
class Conditions:
    """Frames that a clip is conditioned on (`ConditionedPipeline`), of its size; none in text-to-video.

    Attributes:
        image, last_image: uint8 [H, W, 3].
        video: uint8 [F, H, W, 3].
        keyframes: frame numbers and images, uint8 [H, W, 3].
    """

    image: np.ndarray | None = None
    last_image: np.ndarray | None = None
    video: np.ndarray | None = None
    video_at: Literal["start", "end"] = "start"
    keyframes: Mapping[int, np.ndarray] = field(default_factory=dict)

    def pipeline_arguments(self) -> dict[str, Any]:
        """Return the arguments of `ConditionedPipeline` for the conditions that are given."""
        arguments: dict[str, Any] = {}
        if self.image is not None:
            arguments["image"] = Image.fromarray(self.image)
        if self.last_image is not None:
            arguments["last_image"] = Image.fromarray(self.last_image)
        if self.video is not None:
            arguments |= {"video": [Image.fromarray(frame) for frame in self.video], "video_at": self.video_at}
        if self.keyframes:
            arguments["keyframes"] = {frame: Image.fromarray(image) for frame, image in self.keyframes.items()}
        return arguments


def pipeline_class(model: ModelFolder) -> type[Pipeline]:
    """Return the class for the model: diffusers' own, or its subclass that takes more conditions than a first frame."""
    return ConditionedPipeline if model.family.takes_image else CogVideoXPipeline


def load_pipeline(model: ModelFolder, dtype: torch.dtype) -> Pipeline:
    """Load the pipeline with transformer, VAE and scheduler on the CPU, without T5."""
    model.fetch("transformer", "vae")
    pipeline = pipeline_class(model).from_pretrained(
        model.path, text_encoder=None, tokenizer=None, dtype=dtype, use_safetensors=True
    )
    pipeline.set_progress_bar_config(disable=True)  # see `Denoising.on_step`
    _drop_negative_timesteps(pipeline.scheduler)
    return pipeline


def load_whole_pipeline(model: ModelFolder, dtype: torch.dtype = torch.float32) -> Pipeline:
    """Load diffusers' own pipeline with all its parts, unchanged, on the CPU."""
    diffusers_class = CogVideoXImageToVideoPipeline if model.family.takes_image else CogVideoXPipeline
    pipeline = diffusers_class.from_pretrained(model.path, dtype=dtype, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build_pipeline(model: ModelFolder, transformer: Any, vae: AutoencoderKLCogVideoX) -> Pipeline:
    """Build a pipeline from loaded parts and the folder's scheduler, without a progress bar.

    transformer: a callable with the transformer's arguments, with attributes `config` and `cache_context`.
    """
    parts: dict[str, None] = dict.fromkeys(("transformer", "vae", "text_encoder", "tokenizer"))
    create = pipeline_class(model)
    scheduler = create.from_pretrained(model.path, use_safetensors=True, **parts).scheduler
    pipeline = create(None, None, vae, transformer, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    _drop_negative_timesteps(scheduler)
    return pipeline


def count_transformer_calls(pipeline: Pipeline, num_steps: int) -> int:
    """Number of transformer calls in `sample_latents`. Raises UserError if the model has fewer timesteps than steps."""
    max_steps = pipeline.scheduler.config.num_train_timesteps
    if num_steps > max_steps:
        raise UserError(
            f"sample.num_steps (--steps): {num_steps} denoising steps, but the model has only {max_steps} timesteps. "
            "Use fewer steps."
        )
    pipeline.scheduler.set_timesteps(num_steps)
    return len(pipeline.scheduler.timesteps)


def _drop_negative_timesteps(scheduler: Any) -> None:
    """Remove the additional timestep -1 that diffusers adds for some numbers of steps (61, 103, 121, ...).

    Its trailing spacing adds it by rounding. At -1, the schedule's table has the value for pure noise, so the video
    would be the output of that single call.
    """
    set_timesteps = scheduler.set_timesteps

    def set_valid_timesteps(*args: Any, **kwargs: Any) -> None:
        set_timesteps(*args, **kwargs)
        scheduler.timesteps = scheduler.timesteps[scheduler.timesteps >= 0]

    scheduler.set_timesteps = set_valid_timesteps


def apply_convention(pipeline: Pipeline, convention: str) -> float:
    """Make the pipeline scale image latents as in a LoRA's training. Returns the factor relative to its own scale.

    Changes nothing in a text-to-video pipeline, which has no image latents.
    """
    if isinstance(pipeline, CogVideoXPipeline):
        return 1.0
    vae = pipeline.vae.config
    factor = convention_factor(vae.scaling_factor, vae.invert_scale_latents, convention)
    prepare_latents = pipeline.prepare_latents
    if factor != 1.0:

        def prepare_rescaled(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
            latents, image_latents = prepare_latents(*args, **kwargs)
            return latents, image_latents * factor

        pipeline.prepare_latents = prepare_rescaled
    return factor


def sample_latents(
    pipeline: Pipeline,
    conditions: Conditions,
    states: torch.Tensor,
    shape: ClipShape,
    seed: int,
    denoising: Denoising,
) -> torch.Tensor:
    """Generate the latents [1, F, C, H, W] of one video, including padding.

    The noise is drawn on the CPU, so it is the same for every device.

    Args:
        states: text states [text_tokens, dim] of the prompt.
    """
    device = pipeline._execution_device  # diffusers does not move embeddings that it is given
    return pipeline(
        **conditions.pipeline_arguments(),
        prompt_embeds=states[None].to(device),
        negative_prompt_embeds=denoising.empty_states[None].to(device) if denoising.guidance > 1 else None,
        num_frames=shape.frames,
        height=shape.height,
        width=shape.width,
        num_inference_steps=denoising.num_steps,
        guidance_scale=denoising.guidance,
        max_sequence_length=len(states),
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
        callback_on_step_end=_step_callback(denoising),
    ).frames


def _step_callback(denoising: Denoising) -> Callable[..., dict[str, Any]] | None:
    """Return diffusers' callback after each step; its result would replace tensors of the pipeline."""
    on_step = denoising.on_step
    if on_step is None:
        return None

    def callback(*_: Any) -> dict[str, Any]:
        on_step()
        return {}

    return callback


@torch.no_grad()
def decode_frames(pipeline: Pipeline, latents: torch.Tensor, shape: ClipShape) -> torch.Tensor:
    """Decode the latents of `sample_latents` without their padding to frames, uint8 [F, H, W, 3] on the CPU.

    Decoding is tiled, which takes less memory. The first frame was encoded without tiling, as in training.
    """
    padding = latents.shape[1] - ((shape.frames - 1) // pipeline.vae_scale_factor_temporal + 1)
    with _tiled(pipeline.vae):
        decoded = pipeline.decode_latents(latents[:, padding:])
    video = pipeline.video_processor.postprocess_video(decoded, output_type="pt")[0]
    # For an even number of latents, the VAE decodes the first one to 4 frames. Only the last of them is used.
    video = video[-shape.frames :]
    return (video.float().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()


@contextmanager
def _tiled(vae: AutoencoderKLCogVideoX) -> Iterator[None]:
    before = vae.use_tiling
    vae.enable_tiling()
    try:
        yield
    finally:
        vae.use_tiling = before
