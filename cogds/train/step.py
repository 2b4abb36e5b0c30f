"""One micro-step's tensors: a batch from the cache -> the transformer's keyword arguments and the v-target.

Training and evaluation share it; they differ only in where timesteps, noise and dropouts come from. The parity tests
compare what comes out with what the diffusers pipeline gives its transformer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cogds.config.schema import ConditioningConfig
from cogds.core.conditioning import (
    drop,
    image_condition,
    image_latent_scale,
    noise_first_frame,
    normalize_pixels,
    pad_front,
    sample_moments,
    transformer_inputs,
)
from cogds.core.diffusion import add_noise, v_target
from cogds.core.geometry import ClipShape, ModelGeometry, latent_frames
from cogds.core.rng import generator
from cogds.core.rope import RotaryTables, rotary_tables
from cogds.model.load import DTYPES, ModelFolder, load_alphas_cumprod, load_vae


@dataclass(frozen=True)
class Draws:
    """The random choices of a micro-step: timesteps int64 [B], what is dropped bool [B], where the noise comes from.

    seed, step, slots: the sample's places in the run that `core.rng.generator` makes generators from. A slot counts
    over all ranks and micro-steps of an optimizer step, so what a sample gets does not depend on who trains it.
    """

    timesteps: torch.Tensor
    drop_image: torch.Tensor
    drop_caption: torch.Tensor
    seed: int
    step: int
    slots: Sequence[int]

    def generators(self, purpose: str, device: torch.device) -> list[torch.Generator]:
        """One a sample."""
        return [generator(self.seed, self.step, slot, purpose, device) for slot in self.slots]


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on the device, without waiting for what the device has still to do: copied from pinned memory.

    One that is there already may have been made on another stream, which takes its memory back as soon as nobody holds
    it: it is marked as in use here (torch, "CUDA semantics: use tensors created on a side stream").
    """
    if tensor.is_cuda:
        tensor.record_stream(torch.cuda.current_stream(tensor.device))
        return tensor
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def draw_dropouts(
    conditioning: ConditioningConfig, seed: int, step: int, slots: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which samples lose their image and which their caption, bool [B] each."""
    uniform = torch.stack([torch.rand(2, generator=generator(seed, step, slot, "dropout")) for slot in slots], dim=1)
    return uniform[0] < conditioning.image_dropout, uniform[1] < conditioning.caption_dropout


def random_batch(
    shape: ClipShape, batch_size: int, geometry: ModelGeometry, text_dim: int, precision: str
) -> dict[str, torch.Tensor]:
    """A batch as the cache gives it, on the host, of random numbers that are always the same: see `StepBuilder.build`.

    precision: of `DTYPES`.
    """
    dtype, numbers = DTYPES[precision], torch.Generator().manual_seed(0)
    height, width = shape.height // geometry.vae_spatial, shape.width // geometry.vae_spatial

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(batch_size, *sizes, generator=numbers).to(dtype)

    moments = normal(2 * geometry.latent_channels, latent_frames(shape.frames, geometry), height, width)
    pixels = torch.randint(0, 256, (batch_size, 3, shape.height, shape.width), dtype=torch.uint8, generator=numbers)
    return {"moments": moments, "first_frame": pixels, "text_states": normal(geometry.text_tokens, text_dim)}


def load_step_builder(
    model: ModelFolder, conditioning: ConditioningConfig, empty_caption_states: torch.Tensor, dtype: torch.dtype,
    device: torch.device,
) -> "StepBuilder":  # fmt: skip
    """A StepBuilder with the model's own VAE, in the transformer's dtype as in the pipeline, and its schedule."""
    vae = load_vae(model, dtype, device)
    return StepBuilder(vae, model.geometry, conditioning, load_alphas_cumprod(model), empty_caption_states, device)


class StepBuilder:
    """What turns batches into transformer inputs: the VAE (for the noised first frame), the schedule, rotary tables."""

    def __init__(
        self,
        vae: Any,
        geometry: ModelGeometry,
        conditioning: ConditioningConfig,
        alphas_cumprod: torch.Tensor,
        empty_caption_states: torch.Tensor,
        device: torch.device,
    ):
        """empty_caption_states [text_tokens, dim]: the T5 states of the empty caption."""
        self.vae, self.geometry, self.conditioning, self.device = vae, geometry, conditioning, device
        self.alphas_cumprod = alphas_cumprod.to(device)
        self.empty_caption_states = empty_caption_states.to(device)
        self.scaling_factor = float(vae.config.scaling_factor)
        self.image_scale = image_latent_scale(
            self.scaling_factor, bool(vae.config.invert_scale_latents), conditioning.image_latents
        )
        self._rotary: dict[ClipShape, RotaryTables | None] = {}

    def rotary(self, shape: ClipShape) -> RotaryTables | None:
        """Tables of one bucket, made once."""
        if shape not in self._rotary:
            self._rotary[shape] = rotary_tables(shape, self.geometry, self.device)
        return self._rotary[shape]

    @torch.no_grad()
    def image_latents(self, first_frames: torch.Tensor, draws: Draws) -> torch.Tensor:
        """Scaled latents [B, 1, C, H, W] of first frames uint8 [B, 3, H, W], encoded one by one as in the pipeline."""
        pixels = normalize_pixels(to_device(first_frames, self.device), self.vae.dtype)
        if self.conditioning.image_noise:
            log_mean, log_std = self.conditioning.image_noise_log_mean, self.conditioning.image_noise_log_std
            noised = [
                noise_first_frame(frame[None], log_mean, log_std, generator)
                for frame, generator in zip(pixels, draws.generators("image noise", self.device))
            ]
            pixels = torch.cat(noised)
        latents = [
            self.vae.encode(frame[None, :, None]).latent_dist.sample(posterior)
            for frame, posterior in zip(pixels, draws.generators("image posterior", self.device))
        ]
        return self.image_scale * torch.cat(latents).transpose(1, 2)

    def build(
        self, batch: dict[str, torch.Tensor], shape: ClipShape, draws: Draws
    ) -> tuple[dict[str, Any], torch.Tensor]:
        """The transformer's keyword arguments, and the v-target float32 [B, F, C, H, W], F padded.

        batch: `moments` [B, 2C, F, H, W], `first_frame` uint8 [B, 3, H, W], `text_states` [B, text_tokens, dim].
        """
        timesteps = to_device(draws.timesteps, self.device)
        moments = to_device(batch["moments"], self.device)
        posteriors, noises = draws.generators("posterior", self.device), draws.generators("noise", self.device)
        sampled = [sample_moments(one[None], posterior) for one, posterior in zip(moments, posteriors)]
        latents = pad_front(self.scaling_factor * torch.cat(sampled), self.geometry.patch_size_t)
        noise = torch.stack([torch.randn(latents.shape[1:], generator=one, device=self.device) for one in noises])
        image = self.image_latents(batch["first_frame"], draws)
        image = drop(image, image.new_zeros(()), to_device(draws.drop_image, self.device))
        text = to_device(batch["text_states"], self.device)
        text = drop(text, self.empty_caption_states, to_device(draws.drop_caption, self.device))
        inputs = transformer_inputs(
            add_noise(latents, noise, timesteps, self.alphas_cumprod),
            image_condition(image, latents.shape[1]),
            text,
            timesteps,
            self.rotary(shape),
            self.geometry,
        )
        return inputs, v_target(latents, noise, timesteps, self.alphas_cumprod)
