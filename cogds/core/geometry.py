"""Clip shapes: conversion from pixels to latents and tokens, and the shapes that a model supports.

All divisions by VAE and patch factors are in this module. The factors come from the model's own configs
(`ModelGeometry.from_configs`), never from constants: 1.5 pads time to `patch_size_t`, 1.0 does not.

    81x768x1360 pixels -> 21 latent frames of 96x170 -> padded in front to 22 -> 11 x 48 x 85 = 44,880 tokens
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cogds.core.family import Family
from cogds.errors import UserError


@dataclass(frozen=True, order=True)
class ClipShape:
    """Frames, height and width of a clip or bucket in pixels, written as `81x768x1360`."""

    frames: int
    height: int
    width: int

    @classmethod
    def parse(cls, text: str, key: str = "data.buckets") -> "ClipShape":
        """Parse `FRAMESxHEIGHTxWIDTH`. Raises UserError for any other text, with the key or flag that holds it."""
        match = re.fullmatch(r"\s*(\d+)x(\d+)x(\d+)\s*", str(text))
        if not match or not all(int(n) for n in match.groups()):
            raise UserError(f"{key}: '{text}' is not FRAMESxHEIGHTxWIDTH. Write, for example, 81x768x1360.")
        return cls(*map(int, match.groups()))

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"


# Size and frame rate that CogVideoX-1.5 was trained for, which its configs do not contain.
TRAINED_SIZE, TRAINED_FPS = ClipShape(81, 768, 1360), 16.0


@dataclass(frozen=True)
class ModelGeometry:
    """Values of a CogVideoX model's configs that determine shapes.

    Attributes:
        sample_height, sample_width: in latent pixels.
        sample_frames: in video frames.
        text_tokens: length that every caption is padded to.
    """

    vae_spatial: int
    vae_temporal: int
    latent_channels: int
    patch_size: int
    sample_height: int
    sample_width: int
    sample_frames: int
    text_tokens: int
    head_dim: int
    family: Family

    @classmethod
    def from_configs(
        cls, transformer: Mapping[str, Any], vae: Mapping[str, Any], scheduler: Mapping[str, Any]
    ) -> "ModelGeometry":
        """Read the configs of `transformer/`, `vae/` and `scheduler/` in a diffusers model folder.

        Raises KeyError for a missing value, and UserError as `Family.from_configs`.
        """
        return cls(
            vae_spatial=2 ** (len(vae["block_out_channels"]) - 1),
            vae_temporal=int(vae["temporal_compression_ratio"]),
            latent_channels=vae["latent_channels"],
            patch_size=transformer["patch_size"],
            sample_height=transformer["sample_height"],
            sample_width=transformer["sample_width"],
            sample_frames=transformer["sample_frames"],
            text_tokens=transformer["max_text_seq_length"],
            head_dim=transformer["attention_head_dim"],
            family=Family.from_configs(transformer, vae, scheduler),
        )

    @property
    def patch_size_t(self) -> int | None:
        """Temporal patch size; None for 1.0 models."""
        return self.family.patch_size_t

    @property
    def sample_size(self) -> ClipShape:
        """The clip shape of the configs: of learned positions, and the largest sides of sliced rotary tables."""
        return ClipShape(
            self.sample_frames, self.sample_height * self.vae_spatial, self.sample_width * self.vae_spatial
        )

    @property
    def trained_size(self) -> ClipShape:
        """The largest clip shape that the model was trained for."""
        return TRAINED_SIZE if self.patch_size_t else self.sample_size

    @property
    def has_fixed_size(self) -> bool:
        """Whether the model supports only `sample_size`, and so no images."""
        return self.family.positions == "learned"

    @property
    def trained_fps(self) -> float:
        """The frame rate that the model was trained for. 1.0: its card."""
        return TRAINED_FPS if self.patch_size_t else 8.0

    @property
    def pixel_multiple(self) -> int:
        """Number of pixels that heights and widths must be a multiple of: VAE compression times patch size."""
        return self.vae_spatial * self.patch_size


def latent_frames(frames: int, geometry: ModelGeometry) -> int:
    """Number of latent frames of a clip: (F - 1) / 4 + 1 for CogVideoX."""
    return (frames - 1) // geometry.vae_temporal + 1


def padding_frames(num_latent_frames: int, patch_size_t: int | None) -> int:
    """Latent frames to add in front to reach a multiple of the patch size (`additional_frames` in the pipeline)."""
    return -num_latent_frames % patch_size_t if patch_size_t else 0


def padded_latent_frames(frames: int, geometry: ModelGeometry) -> int:
    """Number of latent frames in the transformer's input, including padding."""
    latents = latent_frames(frames, geometry)
    return latents + padding_frames(latents, geometry.patch_size_t)


def token_grid(shape: ClipShape, geometry: ModelGeometry) -> tuple[int, int, int]:
    """Number of video tokens along time, height and width."""
    return (
        padded_latent_frames(shape.frames, geometry) // (geometry.patch_size_t or 1),
        shape.height // geometry.pixel_multiple,
        shape.width // geometry.pixel_multiple,
    )


def num_tokens(shape: ClipShape, geometry: ModelGeometry) -> int:
    """Sequence length of one clip in the transformer: video tokens plus the padded caption."""
    time, height, width = token_grid(shape, geometry)
    return time * height * width + geometry.text_tokens


def check_shape(shape: ClipShape, geometry: ModelGeometry, key: str = "data.buckets") -> None:
    """Raise UserError, naming the nearest valid size, if the model does not support clips of this shape.

    key: the key or flag that sets the shape.
    """
    step, temporal = geometry.pixel_multiple, geometry.vae_temporal
    frames = max(1, round((shape.frames - 1) / temporal) * temporal + 1)
    height, width = (max(step, round(side / step) * step) for side in (shape.height, shape.width))
    if (frames, height, width) != (shape.frames, shape.height, shape.width):
        raise UserError(
            f"{key}: {shape} does not fit the model: frames must be {temporal}N+1, height and width multiples of "
            f"{step}. Use the nearest valid size, {frames}x{height}x{width}."
        )
    sample, positions = geometry.sample_size, geometry.family.positions
    if geometry.has_fixed_size and shape != sample:
        raise UserError(
            f"{key}: {shape} does not fit the model: its learned position embeddings support only {sample}. Use that "
            "size."
        )
    # A slice beyond the grid would silently have too few positions.
    if positions == "rope_slice" and (shape.height > sample.height or shape.width > sample.width):
        raise UserError(
            f"{key}: {shape} exceeds the model's rotary axes: the maximum is {sample.height} pixels high and "
            f"{sample.width} wide. Use a smaller size."
        )


def cached_clip_bytes(
    shape: ClipShape,
    geometry: ModelGeometry,
    element_bytes: int,
    num_condition_frames: int = 0,
    has_control: bool = False,
) -> int:
    """Bytes of an encoded clip without headers: moments [2C, F, h, w] and the first frame, uint8 [3, H, W].

    num_condition_frames: further frames in pixels, for condition modes. has_control: whether there are moments of a
    control video, too.
    """
    height, width = shape.height // geometry.vae_spatial, shape.width // geometry.vae_spatial
    moments = 2 * geometry.latent_channels * latent_frames(shape.frames, geometry) * height * width
    pixels = (1 + num_condition_frames) * 3 * shape.height * shape.width
    return moments * element_bytes * (2 if has_control else 1) + pixels


def cached_caption_bytes(geometry: ModelGeometry, text_dim: int, element_bytes: int) -> int:
    """Bytes of an encoded caption without headers: text states [text_tokens, text_dim]."""
    return geometry.text_tokens * text_dim * element_bytes
