"""Inputs of the transformer: scaled and padded latents, the first frame as a condition, OFS, and dropout.

Every function mirrors a line of diffusers' pipelines (`prepare_latents` and `__call__`). The tests compare the keyword
arguments for every model (`family`) and bucket. The model's latents are [B, F, C, H, W], those of the VAE
[B, C, F, H, W].

    video latents   x scaling_factor, then padded in front with copies of the first latent frame to a multiple of
                    `patch_size_t`, if the model has one
    image latents   x 1 / scaling_factor (if the VAE's config has `invert_scale_latents`) at frame 0 of the padded clip
                    (or where another mode places them, `condition_modes`), zeros elsewhere, concatenated after the
                    noisy latents on the channel axis; none in text-to-video
"""

from collections.abc import Iterable
from typing import Any

import torch

from cogds.core.condition_modes import Piece
from cogds.core.geometry import ModelGeometry, padding_frames
from cogds.core.rope import RotaryTables
from cogds.errors import UserError

IMAGE_LATENT_CONVENTIONS = ("pipeline", "scaled", "unscaled")
OFS_VALUE = 2.0  # the pipeline's constant, `latents.new_full((1,), fill_value=2.0)`


def normalize_pixels(pixels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Scale uint8 pixels to [-1, 1] as diffusers' VideoProcessor.preprocess does."""
    return (2.0 * (pixels.float() / 255.0) - 1.0).to(dtype)


def sample_moments(moments: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """Sample the VAE's posterior: moments [B, 2C, F, H, W] (mean, log-variance) -> float32 [B, F, C, H, W].

    Source: diffusers' DiagonalGaussianDistribution, including its clamp of the log-variance.
    """
    mean, log_variance = moments.float().chunk(2, dim=1)
    noise = torch.randn(mean.shape, generator=generator, device=mean.device)
    return (mean + (0.5 * log_variance.clamp(-30.0, 20.0)).exp() * noise).transpose(1, 2)


def pad_front(latents: torch.Tensor, patch_size_t: int | None) -> torch.Tensor:
    """Pad latents [B, F, C, H, W] in front with copies of frame 0 until F is a multiple of patch_size_t.

    Padding goes in front because the pipeline removes `additional_frames` from the front after sampling.
    """
    padding = padding_frames(latents.shape[1], patch_size_t)
    return torch.cat([latents[:, :1].expand(-1, padding, -1, -1, -1), latents], dim=1) if padding else latents


def image_latent_scale(scaling_factor: float, invert_scale_latents: bool, convention: str) -> float:
    """Return the factor that image latents are multiplied by.

    For CogVideoX-1.5 (scaling factor 0.7, inverted), the factors are 1.4286, 0.7 and 1.

    Args:
        convention: "pipeline": as in diffusers; "scaled": as in most trainers; "unscaled": 1.

    Raises:
        UserError: the convention is unknown.
    """
    pipeline_scale = 1 / scaling_factor if invert_scale_latents else scaling_factor
    scales = {"pipeline": pipeline_scale, "scaled": scaling_factor, "unscaled": 1.0}
    if convention not in scales:
        raise UserError(
            f"image latent convention '{convention}' is not one of {', '.join(scales)}. If a LoRA file names it, the "
            "LoRA was trained with a newer version of cogds: upgrade cogds."
        )
    return scales[convention]


def convention_factor(scaling_factor: float, invert_scale_latents: bool, convention: str) -> float:
    """Return the factor from the pipeline's image latents to those of a convention. 1 for "pipeline"."""
    scale, pipeline_scale = (
        image_latent_scale(scaling_factor, invert_scale_latents, name) for name in (convention, "pipeline")
    )
    return scale / pipeline_scale


def add_image_noise(pixels: torch.Tensor, log_mean: float, log_std: float, generator: torch.Generator) -> torch.Tensor:
    """Add noise with sigma = exp(N(log_mean, log_std)), one sigma per sample, to pixels [B, ..., H, W] in [-1, 1].

    CogVideoX's image-to-video models were trained this way. Encoding a slightly noisy first frame narrows the gap
    between the clean image given at inference and a video frame (CogVideoX paper, appendix on image-to-video).
    """
    shape = (len(pixels), *[1] * (pixels.ndim - 1))
    sigma = (log_mean + log_std * torch.randn(shape, generator=generator, device=pixels.device)).exp()
    noise = torch.randn(pixels.shape, generator=generator, device=pixels.device)
    return (pixels.float() + sigma * noise).to(pixels.dtype)


def place_condition(condition: torch.Tensor, pieces: Iterable[tuple[Piece, torch.Tensor]]) -> None:
    """Write the scaled latents [..., k, C, h, w] of each piece into a condition of zeros, [..., F, C, h, w].

    F includes the padding. Copies of a piece's first latent fill its own padding.
    """
    for piece, latents in pieces:
        end = piece.place + latents.shape[-4]
        condition[..., piece.place : end, :, :, :] = latents
        condition[..., piece.place - piece.padding : piece.place, :, :, :] = latents[..., :1, :, :, :]


def drop(condition: torch.Tensor, unconditional: torch.Tensor, dropped: torch.Tensor) -> torch.Tensor:
    """Replace the samples of `condition` [B, ...] for which dropped [B] is true by `unconditional` (broadcast)."""
    return torch.where(dropped.view(-1, *[1] * (condition.ndim - 1)), unconditional, condition)


def transformer_inputs(
    noisy_latents: torch.Tensor,
    image_latents: torch.Tensor | None,
    text_states: torch.Tensor,
    timesteps: torch.Tensor,
    rotary: RotaryTables | None,
    geometry: ModelGeometry,
) -> dict[str, Any]:
    """Return the transformer's keyword arguments as in the pipeline's denoising loop.

    All inputs except timesteps and rotary tables take the dtype of text_states, which is the model's.

    Args:
        noisy_latents, image_latents: [B, F, C, H, W], padded. image_latents is None in text-to-video.
        text_states: [B, text_tokens, dim].
        timesteps: int64 [B].
    """
    dtype = text_states.dtype
    latents = noisy_latents.to(dtype)
    inputs: dict[str, Any] = {
        "hidden_states": latents if image_latents is None else torch.cat([latents, image_latents.to(dtype)], dim=2),
        "encoder_hidden_states": text_states,
        "timestep": timesteps,
        "image_rotary_emb": rotary,
        "attention_kwargs": None,
        "return_dict": False,
    }
    if geometry.family.takes_image:  # the text-to-video pipeline does not pass this argument
        inputs["ofs"] = text_states.new_full((1,), fill_value=OFS_VALUE) if geometry.family.has_ofs else None
    return inputs


def mean_latents(moments: torch.Tensor, scaling_factor: float, patch_size_t: int | None) -> torch.Tensor:
    """Return the mean of moments [B, 2C, F, H, W] as scaled and padded latents, float32 [B, F, C, H, W]."""
    mean = moments.float().chunk(2, dim=1)[0].transpose(1, 2)
    return pad_front(scaling_factor * mean, patch_size_t)


def with_control(inputs: dict[str, Any], control: torch.Tensor) -> dict[str, Any]:
    """Append the latents of a control video to the transformer's input channels. control: [B, F, C, H, W], padded."""
    hidden = inputs["hidden_states"]
    return {**inputs, "hidden_states": torch.cat([hidden, control.to(hidden.dtype)], dim=2)}
