"""One video through diffusers' pipeline: a first frame and a caption's states in, frames out.

`launch/sample.py` and the videos of a training run come this way, so that the same weights give the same frames. T5 is
not part of it: its states are given.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from diffusers import CogVideoXImageToVideoPipeline
from PIL import Image

from cogds.core.conditioning import convention_factor
from cogds.core.geometry import ClipShape
from cogds.errors import UserError
from cogds.model.load import ModelFolder


def load_pipeline(model: ModelFolder, dtype: torch.dtype) -> Any:
    """The folder's transformer, VAE and scheduler as diffusers has them, on the CPU, without T5."""
    pipeline = CogVideoXImageToVideoPipeline.from_pretrained(
        model.path, text_encoder=None, tokenizer=None, dtype=dtype, use_safetensors=True
    )
    pipeline.set_progress_bar_config(disable=None)  # a bar on a terminal only
    _end_at_the_last_timestep(pipeline.scheduler)
    return pipeline


def pipeline_of(model: ModelFolder, transformer: Any, vae: Any) -> Any:
    """A pipeline of parts that are there already, with the folder's scheduler. No progress bar.

    transformer: whatever is called as one, with `config` and `cache_context`.
    """
    parts: dict[str, None] = dict.fromkeys(("transformer", "vae", "text_encoder", "tokenizer"))
    scheduler = CogVideoXImageToVideoPipeline.from_pretrained(model.path, use_safetensors=True, **parts).scheduler
    pipeline = CogVideoXImageToVideoPipeline(None, None, vae, transformer, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    _end_at_the_last_timestep(scheduler)
    return pipeline


def num_calls(pipeline: Any, num_steps: int) -> int:
    """How often `sample_latents` calls the transformer. Raises UserError for more steps than there are timesteps."""
    most = pipeline.scheduler.config.num_train_timesteps
    if num_steps > most:
        raise UserError(
            f"{num_steps} denoising steps (sample.num_steps, --steps) are more than the model's {most} timesteps: ask "
            "for fewer"
        )
    pipeline.scheduler.set_timesteps(num_steps)
    return len(pipeline.scheduler.timesteps)


def _end_at_the_last_timestep(scheduler: Any) -> None:
    """For some numbers of steps (61, 103, 121, ...) diffusers' trailing spacing is rounded to one timestep more, -1.

    The schedule's table taken at -1 is pure noise, so that such a video would be the output of that call alone.
    """
    set_timesteps = scheduler.set_timesteps

    def set_real_timesteps(*args: Any, **kwargs: Any) -> None:
        set_timesteps(*args, **kwargs)
        scheduler.timesteps = scheduler.timesteps[scheduler.timesteps >= 0]

    scheduler.set_timesteps = set_real_timesteps


def use_convention(pipeline: Any, convention: str) -> float:
    """Let the pipeline scale image latents as a LoRA was trained; returns the factor on what it does by itself."""
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
    pipeline: Any,
    pixels: np.ndarray,
    states: torch.Tensor,
    no_caption: torch.Tensor,
    shape: ClipShape,
    num_steps: int,
    guidance: float,
    seed: int,
) -> torch.Tensor:
    """Latents [1, F, C, H, W] of one video, padding included, by `num_calls` calls of the transformer.

    pixels: the first frame, uint8 [H, W, 3]; states and no_caption [text_tokens, dim]: of the prompt and of the empty
    one. The noise is drawn on the CPU: any device starts from the same.
    """
    device = pipeline._execution_device  # diffusers moves what it makes itself, and not what it is given
    return pipeline(
        image=Image.fromarray(pixels),
        prompt_embeds=states[None].to(device),
        negative_prompt_embeds=no_caption[None].to(device) if guidance > 1 else None,
        num_frames=shape.frames,
        height=shape.height,
        width=shape.width,
        num_inference_steps=num_steps,
        guidance_scale=guidance,
        max_sequence_length=len(states),
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
    ).frames


@torch.no_grad()
def decode_frames(pipeline: Any, latents: torch.Tensor, shape: ClipShape) -> torch.Tensor:
    """The frames uint8 [F, H, W, 3], on the CPU, of what `sample_latents` gave, its padding dropped.

    Decoded in tiles, which takes less memory; the image was encoded whole, as in training.
    """
    padding = latents.shape[1] - ((shape.frames - 1) // pipeline.vae_scale_factor_temporal + 1)
    with _tiled(pipeline.vae):
        decoded = pipeline.decode_latents(latents[:, padding:])
    video = pipeline.video_processor.postprocess_video(decoded, output_type="pt")[0]
    # Where the number of latents is even, the VAE makes 4 frames of the first one instead of 1: the last one is it.
    video = video[-shape.frames :]
    return (video.float().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()


@contextmanager
def _tiled(vae: Any) -> Iterator[None]:
    before = vae.use_tiling
    vae.enable_tiling()
    try:
        yield
    finally:
        vae.use_tiling = before
