"""Extra input channels of the patch embedding, for the latents of a control video.

The patch embedding is linear, so more input channels are the same as a second linear projection of the control latents
whose output is added to the video tokens. Its weight starts at zero, so that the transformer equals the base model
bitwise. It is trained beside the LoRA and stored in its file. Both diffusers' class and ours (`forward.Transformer`)
take it.
"""

from typing import Any

import torch
from diffusers.models.embeddings import CogVideoXPatchEmbed
from torch import nn
from torch.nn import functional

CONTROL_WEIGHT = "patch_embed.control.weight"  # name in the transformer


class ControlEmbedding(nn.Module):
    """The projection of patches of control latents.

    weight: [D, C * patch_size_t * patch_size^2], in the order of further input channels of the patch embedding. scale:
    factor of the output; 0 for the base model. A plain parameter, so that it is no target of a LoRA.
    """

    def __init__(self, weight: torch.Tensor, channels: int, patch: tuple[int, int]):
        """patch: patch sizes in time and in space."""
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.channels, self.patch, self.scale = channels, patch, 1.0

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

    def forward(self, text_embeds: torch.Tensor, image_embeds: torch.Tensor) -> torch.Tensor:
        """As diffusers', with the channels of the control latents after the others: [B, F, C, H, W]."""
        latents, control = image_embeds.split([image_embeds.shape[2] - self.control.channels, self.control.channels], 2)
        embeds = super().forward(text_embeds, latents)
        video = self.control(control)
        text, rest = embeds.split([embeds.shape[1] - video.shape[1], video.shape[1]], 1)
        return torch.cat([text, rest + video], 1)


def add_control(transformer: Any, channels: int, weight: torch.Tensor | None = None) -> nn.Parameter:
    """Give the transformer `channels` more input channels, and return their weight. weight: by default zero, to train.

    Call this after the LoRA is added, which freezes all other weights.
    """
    embed, config = transformer.patch_embed, transformer.config
    patch = (config.patch_size_t or 1, config.patch_size)
    like = embed.text_proj.base_layer.weight if hasattr(embed.text_proj, "base_layer") else embed.text_proj.weight
    num_inputs = channels * patch[0] * patch[1] ** 2
    if weight is None:
        weight = torch.zeros(embed.embed_dim, num_inputs)  # float32 as the LoRA, until DeepSpeed converts both
    else:
        weight = weight.to(like.dtype)
    controlled = ControlPatchEmbed.__new__(ControlPatchEmbed)
    controlled.__dict__ = embed.__dict__
    controlled.control = ControlEmbedding(weight.to(like.device), channels, patch)
    transformer.patch_embed = controlled
    return controlled.control.weight


def control_of(transformer: Any) -> ControlEmbedding | None:
    """The transformer's control embedding, None without one."""
    embed = transformer.patch_embed
    return embed.control if isinstance(embed, ControlPatchEmbed) else None
