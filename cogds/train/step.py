"""The tensors of one micro-step: from a batch of the cache to the transformer's keyword arguments and the v-target.

Training and evaluation share this code and differ only in their `Draws`. The parity tests compare the arguments with
those that the diffusers pipeline passes to its transformer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cogds.config.schema import ConditioningConfig
from cogds.core.condition_modes import (
    ConditionSettings,
    Mode,
    condition_frames,
    draw_mode,
    is_first_image,
    pieces_of,
    used_modes,
)
from cogds.core.conditioning import (
    add_image_noise,
    drop,
    image_latent_scale,
    normalize_pixels,
    pad_front,
    place_condition,
    sample_moments,
    transformer_inputs,
    with_control,
)
from cogds.core.diffusion import add_noise, v_target
from cogds.core.geometry import ClipShape, ModelGeometry, latent_frames, padded_latent_frames
from cogds.core.rng import generator
from cogds.core.rope import RotaryTables, rotary_tables
from cogds.model.load import DTYPES, ModelFolder, load_alphas_cumprod, load_vae


@dataclass(frozen=True)
class Draws:
    """The random choices of a micro-step.

    timesteps: int64 [B]. drop_image, drop_caption: bool [B]. seed, step, slots: arguments of `core.rng.generator`.
    Slots number the samples of an optimizer step over all ranks and micro-steps, so a sample's noise does not depend
    on the rank that trains it. modes: of conditioning, one per sample; empty: all `first`.
    """

    timesteps: torch.Tensor
    drop_image: torch.Tensor
    drop_caption: torch.Tensor
    seed: int
    step: int
    slots: Sequence[int]
    modes: Sequence[Mode] = ()

    def generators(self, purpose: str, device: torch.device) -> list[torch.Generator]:
        """Return one generator per sample."""
        return [generator(self.seed, self.step, slot, purpose, device) for slot in self.slots]


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Move a tensor to the device from pinned memory, without waiting for the device's queued work.

    A tensor that is already on the GPU may have been made on another stream, which would reuse its memory as soon as it
    is released, so it is marked as in use by this stream (torch docs, "CUDA semantics").
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
    """Return which samples lose their image and which lose their caption, bool [B] each."""
    uniform = torch.stack([torch.rand(2, generator=generator(seed, step, slot, "dropout")) for slot in slots], dim=1)
    return uniform[0] < conditioning.image_dropout, uniform[1] < conditioning.caption_dropout


def draw_modes(conditioning: ConditioningConfig, seed: int, step: int, slots: Sequence[int]) -> tuple[Mode, ...]:
    """Return the condition mode of each sample."""
    uniform = torch.stack([torch.rand((), generator=generator(seed, step, slot, "condition mode")) for slot in slots])
    return tuple(draw_mode(conditioning.modes, number) for number in uniform.tolist())


def random_batch(
    shape: ClipShape,
    batch_size: int,
    geometry: ModelGeometry,
    text_dim: int,
    precision: str,
) -> dict[str, torch.Tensor]:
    """Return a batch as it comes from the cache (see `StepBuilder.build`), of random numbers with a fixed seed.

    precision: a key of `DTYPES`. `StepBuilder.with_random_conditions` adds what other conditions need.
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
    device: torch.device, settings: ConditionSettings | None = None,
) -> "StepBuilder":  # fmt: skip
    """Return a StepBuilder with the model's VAE, in the transformer's dtype as in the pipeline, and its schedule."""
    vae = load_vae(model, dtype, device)
    alphas_cumprod = load_alphas_cumprod(model)
    return StepBuilder(vae, model.geometry, conditioning, alphas_cumprod, empty_caption_states, device, settings)


class StepBuilder:
    """Turns batches into transformer inputs, with the VAE (for the noised frames of the condition) and the schedule.

    In text-to-video, there is no condition, and `Draws.drop_image` has no effect.
    """

    def __init__(
        self,
        vae: Any,
        geometry: ModelGeometry,
        conditioning: ConditioningConfig,
        alphas_cumprod: torch.Tensor,
        empty_caption_states: torch.Tensor,
        device: torch.device,
        settings: ConditionSettings | None = None,
    ):
        """empty_caption_states: T5 states of the empty caption, [text_tokens, dim].

        settings: of the condition modes.
        """
        self.vae, self.geometry, self.conditioning, self.device = vae, geometry, conditioning, device
        self.settings = settings or ConditionSettings()
        self.alphas_cumprod = alphas_cumprod.to(device)
        self.empty_caption_states = empty_caption_states.to(device)
        family = geometry.family
        self.scaling_factor = family.scaling_factor
        self.image_scale = image_latent_scale(
            family.scaling_factor, family.invert_scale_latents, conditioning.image_latents
        )
        self._rotary: dict[ClipShape, RotaryTables | None] = {}

    def rotary(self, shape: ClipShape) -> RotaryTables | None:
        """Return the rotary tables of a bucket, which are computed once."""
        if shape not in self._rotary:
            self._rotary[shape] = rotary_tables(shape, self.geometry, self.device)
        return self._rotary[shape]

    def with_random_conditions(self, batch: dict[str, torch.Tensor], shape: ClipShape) -> dict[str, torch.Tensor]:
        """Return a batch of `random_batch` with the tensors that the condition modes and control videos need."""
        more = {}
        modes = used_modes(self.conditioning.modes) if self.geometry.family.takes_image else ()
        if numbers := condition_frames(modes, shape.frames, self.geometry, self.settings):
            more["condition_frames"] = batch["first_frame"][:, None].expand(-1, len(numbers), -1, -1, -1).contiguous()
        if self.conditioning.control:
            more["control_moments"] = batch["moments"].flip(0)
        return batch | more

    def largest_mode(self, shape: ClipShape) -> Mode:
        """Return the mode whose longest piece has the most frames, which needs the most memory."""
        modes = used_modes(self.conditioning.modes)
        return max(
            modes,
            key=lambda mode: max(
                (len(piece.frames) for piece in pieces_of(mode, shape.frames, self.geometry, self.settings)), default=0
            ),
        )

    def zero_inputs(
        self, shape: ClipShape, batch_size: int, dtype: torch.dtype = torch.float32
    ) -> tuple[dict[str, Any], torch.Tensor]:
        """Return inputs and a target of zeros, as `build`. Uses neither the cache nor the VAE."""
        geometry = self.geometry
        height, width = shape.height // geometry.vae_spatial, shape.width // geometry.vae_spatial
        sizes = (batch_size, padded_latent_frames(shape.frames, geometry), geometry.latent_channels, height, width)
        latents = torch.zeros(*sizes, dtype=dtype, device=self.device)
        text = self.empty_caption_states.expand(batch_size, -1, -1)
        timesteps = torch.zeros(batch_size, dtype=torch.int64, device=self.device)
        condition = latents if geometry.family.takes_image else None
        inputs = transformer_inputs(latents, condition, text, timesteps, self.rotary(shape), geometry)
        return with_control(inputs, latents) if self.conditioning.control else inputs, latents

    @torch.no_grad()
    def condition(self, batch: dict[str, torch.Tensor], shape: ClipShape, draws: Draws) -> torch.Tensor:
        """Return the condition latents of a batch, scaled and padded, [B, F, C, h, w]. For the batch see `build`.

        Images are encoded one by one, as in the pipeline, and a prefix or suffix as a video.
        """
        geometry, dtype = self.geometry, self.vae.dtype
        num_frames = padded_latent_frames(shape.frames, geometry)
        size = (shape.height // geometry.vae_spatial, shape.width // geometry.vae_spatial)
        first: Mode = "first"
        modes = draws.modes or (first,) * len(draws.slots)
        first_frames = normalize_pixels(to_device(batch["first_frame"], self.device), dtype)
        numbers = condition_frames(used_modes(self.conditioning.modes), shape.frames, geometry, self.settings)
        frames = normalize_pixels(to_device(batch["condition_frames"], self.device), dtype) if numbers else None
        condition = first_frames.new_zeros(len(modes), num_frames, geometry.latent_channels, *size)
        noises, posteriors = (
            draws.generators("image noise", self.device),
            draws.generators("image posterior", self.device),
        )
        for sample, (mode, noise, posterior) in enumerate(zip(modes, noises, posteriors, strict=True)):
            latents = []
            pieces = pieces_of(mode, shape.frames, geometry, self.settings)
            for piece in pieces:
                if frames is None or is_first_image(piece):
                    pixels = first_frames[sample, None]
                else:
                    pixels = frames[sample, [numbers.index(frame) for frame in piece.frames]]
                latents.append(self._encode(pixels, noise, posterior))
            place_condition(condition[sample], zip(pieces, latents))
        return condition

    def _encode(self, pixels: torch.Tensor, noise: torch.Generator, posterior: torch.Generator) -> torch.Tensor:
        """Encode frames [K, 3, H, W] in [-1, 1] as one video, with image noise. Returns scaled latents [k, C, h, w]."""
        if self.conditioning.image_noise:
            log_mean, log_std = self.conditioning.image_noise_log_mean, self.conditioning.image_noise_log_std
            pixels = add_image_noise(pixels[None], log_mean, log_std, noise)[0]
        video = pixels.transpose(0, 1)[None]  # [1, 3, K, H, W]
        return self.image_scale * self.vae.encode(video).latent_dist.sample(posterior)[0].transpose(0, 1)

    def build(
        self, batch: dict[str, torch.Tensor], shape: ClipShape, draws: Draws
    ) -> tuple[dict[str, Any], torch.Tensor]:
        """Return the transformer's keyword arguments and the v-target, float32 [B, F, C, H, W] with F padded.

        batch: `moments` [B, 2C, F, H, W], `first_frame` uint8 [B, 3, H, W], `text_states` [B, text_tokens, dim]. For
        modes that need more than the first frame, also `condition_frames` uint8 [B, K, 3, H, W], the pixel frames
        listed by `core.condition_modes.condition_frames`. With `conditioning.control`, also `control_moments`, as
        `moments`.
        """
        timesteps = to_device(draws.timesteps, self.device)
        moments = to_device(batch["moments"], self.device)
        noises = draws.generators("noise", self.device)
        latents = self._video_latents(moments, draws.generators("posterior", self.device))
        noise = torch.stack(
            [torch.randn(latents.shape[1:], generator=numbers, device=self.device) for numbers in noises]
        )
        condition = None
        if self.geometry.family.takes_image:
            condition = self.condition(batch, shape, draws)
            condition = drop(condition, condition.new_zeros(()), to_device(draws.drop_image, self.device))
        text = to_device(batch["text_states"], self.device)
        text = drop(text, self.empty_caption_states, to_device(draws.drop_caption, self.device))
        inputs = transformer_inputs(
            add_noise(latents, noise, timesteps, self.alphas_cumprod),
            condition,
            text,
            timesteps,
            self.rotary(shape),
            self.geometry,
        )
        if self.conditioning.control:
            control = to_device(batch["control_moments"], self.device)
            posteriors = draws.generators("control", self.device)
            inputs = with_control(inputs, self._video_latents(control, posteriors))
        return inputs, v_target(latents, noise, timesteps, self.alphas_cumprod)

    def _video_latents(self, moments: torch.Tensor, posteriors: Sequence[torch.Generator]) -> torch.Tensor:
        """Sample moments [B, 2C, F, H, W], scale and pad: float32 [B, F, C, H, W] with F padded."""
        sampled = [sample_moments(sample[None], posterior) for sample, posterior in zip(moments, posteriors)]
        return pad_front(self.scaling_factor * torch.cat(sampled), self.geometry.patch_size_t)
