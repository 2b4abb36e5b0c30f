"""Extra input channels of the patch embedding, for the latents of a control video.

The patch embedding is linear, so more input channels are the same as a second linear projection of the control latents
whose output is added to the video tokens. Its weight starts at zero, so that the transformer equals the base model
bitwise. It is trained beside the LoRA and stored in its file. Both diffusers' class and ours (`forward.Transformer`)
take it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.embeddings import CogVideoXPatchEmbed
from torch import nn
from torch.nn import functional

from cogds.core.conditioning import mean_latents, normalize_pixels

CONTROL_WEIGHT = "patch_embed.control.weight"  # name in the transformer


class ControlEmbedding(nn.Module):
    """The projection of patches of control latents.

    weight: [D, C * patch_size_t * patch_size^2], in the order of further input channels of the patch embedding. scale:
    factor of the output; 0 for the base model. given: latents for callers that do not pass them (`given_control`). The
    weight is a plain parameter, so that it is no target of a LoRA.
    """

    def __init__(self, weight: torch.Tensor, channels: int, patch: tuple[int, int]):
        """patch: patch sizes in time and in space."""
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.channels, self.patch, self.scale = channels, patch, 1.0
        self.given: torch.Tensor | None = None

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """latents: [B, F, C, H, W] -> [B, video tokens, D]."""
        p_t, p = self.patch
        batch, frames, channels, height, width = latents.shape
        patches = latents.reshape(batch, frames // p_t, p_t, channels, height // p, p, width // p, p)
        patches = patches.permute(0, 1, 4, 6, 3, 2, 5, 7).flatten(4, 7).flatten(1, 3)
        return self.scale * functional.linear(patches, self.weight.to(patches.dtype))


class ControlPatchEmbed(CogVideoXPatchEmbed):
    """diffusers' patch embedding with a `ControlEmbedding`. A subclass, so that its weights keep their names."""

    control: ControlEmbedding
    in_channels: int  # without those of the control latents

    def forward(self, text_embeds: torch.Tensor, image_embeds: torch.Tensor) -> torch.Tensor:
        """As diffusers', with the channels of the control latents after the others, unless they are given."""
        if self.control.given is None:
            if image_embeds.shape[2] != self.in_channels + self.control.channels:
                raise ValueError("The LoRA was trained with control videos, but there is none. Pass `control_video`.")
            latents, control = image_embeds.split([self.in_channels, self.control.channels], 2)
        else:
            latents = image_embeds
            # Guidance makes two samples of each: first all without the prompts, then all with them.
            given = self.control.given.to(latents)
            control = given.repeat(len(latents) // len(given), 1, 1, 1, 1)
        embeds = super().forward(text_embeds, latents)
        video = self.control(control)
        text, rest = embeds.split([embeds.shape[1] - video.shape[1], video.shape[1]], 1)
        return torch.cat([text, rest + video], 1)


def control_inputs(channels: int, patch_size_t: int | None, patch_size: int) -> int:
    """Number of values of `channels` in a patch, which are inputs of the projection."""
    return channels * (patch_size_t or 1) * patch_size**2


def add_control(transformer: Any, channels: int, weight: torch.Tensor | None = None) -> nn.Parameter:
    """Give the transformer `channels` more input channels, and return their weight. weight: by default zero, to train.

    Call this after the LoRA is added, which freezes all other weights.
    """
    embed, config = transformer.patch_embed, transformer.config
    patch = (config.patch_size_t or 1, config.patch_size)
    like = embed.text_proj.base_layer.weight if hasattr(embed.text_proj, "base_layer") else embed.text_proj.weight
    if weight is None:
        # float32 as the LoRA, until DeepSpeed converts both.
        weight = torch.zeros(embed.embed_dim, control_inputs(channels, *patch))
    else:
        weight = weight.to(like.dtype)
    controlled = ControlPatchEmbed.__new__(ControlPatchEmbed)
    controlled.__dict__ = embed.__dict__
    controlled.control = ControlEmbedding(weight.to(like.device), channels, patch)
    controlled.in_channels = config.in_channels
    transformer.patch_embed = controlled
    return controlled.control.weight


def control_of(transformer: Any) -> ControlEmbedding | None:
    """The transformer's control embedding, None without one."""
    embed = transformer.patch_embed
    return embed.control if isinstance(embed, ControlPatchEmbed) else None


@contextmanager
def given_control(transformer: Any, latents: torch.Tensor | None) -> Iterator[None]:
    """Add control latents [B, F, C, H, W] to every call within the block, as for a pipeline, which passes none.

    One sample applies to all of a call. None for a transformer without a control embedding.
    """
    control = control_of(transformer)
    if (control is None) != (latents is None):
        raise ValueError(
            "A transformer with a control embedding needs a control video, and only such a transformer takes one. "
            "Call `load_control` for the LoRA, or leave the control video out."
        )
    if control is None:
        yield
        return
    control.given = latents
    try:
        yield
    finally:
        control.given = None


@torch.no_grad()
def encode_control(
    vae: Any, pixels: torch.Tensor, patch_size_t: int | None, *, device: torch.device, tiled: bool | None = None
) -> torch.Tensor:
    """Encode a control video, uint8 [F, H, W, 3], to the mean of its latents [1, F, C, H, W], scaled and padded.

    The mean needs no random numbers, so that a video has the same noise with any control. device: of the computation; a
    VAE that is offloaded is elsewhere until then. tiled: None leaves the VAE's setting.
    """
    before = vae.use_tiling
    if tiled is not None:
        (vae.enable_tiling if tiled else vae.disable_tiling)()
    try:
        video = normalize_pixels(pixels.to(device), vae.dtype).permute(3, 0, 1, 2)[None]
        moments = vae.encode(video).latent_dist.parameters
    finally:
        vae.use_tiling = before
    return mean_latents(moments, vae.config.scaling_factor, patch_size_t)
