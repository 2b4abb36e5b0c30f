"""What the transformer is given: latents scaled and padded, the first frame as condition, OFS, dropouts.

Everything here mirrors one line of CogVideoXImageToVideoPipeline (`prepare_latents` and `__call__`); the tests compare
the keyword arguments, bucket by bucket. Latents in the model's order are [B, F, C, H, W]; the VAE's is [B, C, F, H, W].

    video latents   x scaling_factor, then padded in front with copies of the first latent frame
    image latents   x 1 / scaling_factor (where the VAE says `invert_scale_latents`) at frame 0 of the padded clip,
                    zeros after it, concatenated behind the noisy latents on the channel axis
"""

from typing import Any

import torch

from cogds.core.geometry import ModelGeometry, padding_frames
from cogds.core.rope import RotaryTables
from cogds.errors import UserError

IMAGE_LATENT_CONVENTIONS = ("pipeline", "scaled", "unscaled")
OFS_VALUE = 2.0  # the pipeline's constant, `latents.new_full((1,), fill_value=2.0)`


def normalize_pixels(pixels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """uint8 pixels -> [-1, 1], as diffusers' VideoProcessor.preprocess scales an image."""
    return (2.0 * (pixels.float() / 255.0) - 1.0).to(dtype)


def sample_moments(moments: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """One draw from the VAE's posterior: moments [B, 2C, F, H, W] (mean, log-variance) -> float32 [B, F, C, H, W].

    Source: diffusers' DiagonalGaussianDistribution, whose clamp of the log-variance is kept.
    """
    mean, log_variance = moments.float().chunk(2, dim=1)
    noise = torch.randn(mean.shape, generator=generator, device=mean.device)
    return (mean + (0.5 * log_variance.clamp(-30.0, 20.0)).exp() * noise).transpose(1, 2)


def pad_front(latents: torch.Tensor, patch_size_t: int | None) -> torch.Tensor:
    """Latents [B, F, C, H, W] with F brought to a multiple of patch_size_t by copies of frame 0, in front.

    In front, because that is where the pipeline drops `additional_frames` after sampling.
    """
    padding = padding_frames(latents.shape[1], patch_size_t)
    return torch.cat([latents[:, :1].expand(-1, padding, -1, -1, -1), latents], dim=1) if padding else latents


def image_latent_scale(scaling_factor: float, invert_scale_latents: bool, convention: str) -> float:
    """The factor on the image latent: as diffusers does (pipeline), as most trainers do (scaled), or none (unscaled).

    For CogVideoX-1.5 (0.7, inverted) these are 1.4286, 0.7 and 1. Raises UserError for another convention.
    """
    own = 1 / scaling_factor if invert_scale_latents else scaling_factor
    scales = {"pipeline": own, "scaled": scaling_factor, "unscaled": 1.0}
    if convention not in scales:
        raise UserError(
            f"image latents '{convention}' are none of {', '.join(scales)}: the LoRA was made by a newer version of "
            "this project"
        )
    return scales[convention]


def convention_factor(scaling_factor: float, invert_scale_latents: bool, convention: str) -> float:
    """What the pipeline's image latents are multiplied by to be those of a convention; 1 where it is the pipeline's."""
    wanted, own = (image_latent_scale(scaling_factor, invert_scale_latents, name) for name in (convention, "pipeline"))
    return wanted / own


def noise_first_frame(
    pixels: torch.Tensor, log_mean: float, log_std: float, generator: torch.Generator
) -> torch.Tensor:
    """Pixels [B, 3, H, W] in [-1, 1] plus noise of sigma = exp(N(log_mean, log_std)), one sigma per sample.

    As CogVideoX's image-to-video models were trained: the VAE sees a slightly noisy first frame, which narrows the gap
    between the clean image of inference and a frame of a video (CogVideoX paper, appendix on image-to-video).
    """
    shape = (pixels.shape[0], 1, 1, 1)
    sigma = (log_mean + log_std * torch.randn(shape, generator=generator, device=pixels.device)).exp()
    noise = torch.randn(pixels.shape, generator=generator, device=pixels.device)
    return (pixels.float() + sigma * noise).to(pixels.dtype)


def image_condition(image_latents: torch.Tensor, num_frames: int) -> torch.Tensor:
    """Scaled image latents [B, 1, C, H, W] at frame 0 of `num_frames` (padding included), zeros after it."""
    batch, _, channels, height, width = image_latents.shape
    zeros = image_latents.new_zeros(batch, num_frames - 1, channels, height, width)
    return torch.cat([image_latents, zeros], dim=1)


def drop(condition: torch.Tensor, unconditional: torch.Tensor, dropped: torch.Tensor) -> torch.Tensor:
    """`condition` [B, ...] with `unconditional` (broadcast) where dropped [B] is true."""
    return torch.where(dropped.view(-1, *[1] * (condition.ndim - 1)), unconditional, condition)


def transformer_inputs(
    noisy_latents: torch.Tensor,
    image_latents: torch.Tensor,
    text_states: torch.Tensor,
    timesteps: torch.Tensor,
    rotary: RotaryTables | None,
    geometry: ModelGeometry,
) -> dict[str, Any]:
    """The transformer's keyword arguments, as the pipeline's denoising loop gives them.

    noisy_latents, image_latents: [B, F, C, H, W], padded; text_states [B, text_tokens, dim]; timesteps int64 [B].
    The dtype of text_states, which is the model's, is the dtype of all inputs but timesteps and rotary tables.
    """
    dtype = text_states.dtype
    return {
        "hidden_states": torch.cat([noisy_latents.to(dtype), image_latents.to(dtype)], dim=2),
        "encoder_hidden_states": text_states,
        "timestep": timesteps,
        "ofs": text_states.new_full((1,), fill_value=OFS_VALUE) if geometry.ofs else None,
        "image_rotary_emb": rotary,
        "attention_kwargs": None,
        "return_dict": False,
    }
