"""Memory that the VAE needs to encode one clip, calculated from shapes.

The formulas follow diffusers' `AutoencoderKLCogVideoX`. `tests/core/test_vae_memory.py` compares them with the
tensors that the real class allocates. They have not been compared with a GPU.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cogds.core.geometry import ClipShape

# diffusers' AutoencoderKLCogVideoX encodes this many frames at a time. A remainder is added to the first batch.
FRAME_BATCH = 8
# Its convolutions split inputs larger than 2 GiB, and assume two bytes per element at any precision.
SPLIT_BYTES = 2 * 1024**3
# Memory for an encoding if the GPU does not decide: what a 24 GB GPU has beside the CUDA context, the VAE's weights and
# what its allocator cannot use.
UNTILED_BYTES = 20e9


@dataclass(frozen=True)
class VaeSize:
    """Sizes of a VAE. tile_height, tile_width: of one tile in pixels, used when tiling is enabled."""

    num_parameters: int
    channels: tuple[int, ...]
    layers_per_block: int
    latent_channels: int
    temporal_compression: int
    tile_height: int
    tile_width: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any], num_parameters: int) -> "VaeSize":
        """Read `vae/config.json`. A tile is half the config's sample size, the default of `enable_tiling()`."""
        return cls(
            num_parameters=num_parameters,
            channels=tuple(config["block_out_channels"]),
            layers_per_block=config["layers_per_block"],
            latent_channels=config["latent_channels"],
            temporal_compression=int(config["temporal_compression_ratio"]),
            tile_height=config.get("sample_height", 480) // 2,
            tile_width=config.get("sample_width", 720) // 2,
        )


# The VAE of the published CogVideoX models, 1.0 and 1.5.
COGVIDEOX_VAE = VaeSize(
    num_parameters=215_583_907,
    channels=(128, 256, 256, 512),
    layers_per_block=3,
    latent_channels=16,
    temporal_compression=4,
    tile_height=240,
    tile_width=360,
)


def vae_encode_bytes(shape: ClipShape, tiling: bool, vae: VaeSize = COGVIDEOX_VAE, element_bytes: int = 2) -> int:
    """Peak bytes while the VAE encodes one clip, without its weights and the CUDA context.

    tiling: with `enable_tiling()`, which encodes tile by tile if either side is longer than a tile.

    The encoder processes FRAME_BATCH frames at a time. The peak is at the last convolution of a down block. At that
    moment the following are alive, for f frames and per pixel of that block: 4 f + 2 frames of its channels (input,
    normalized, padded by two frames, output); f frames of its input; two frames of the input of every convolution so
    far, cached for the next batch of frames; the same caches of the previous batch; and the pieces of a convolution
    that is split because its input exceeds 2 GiB. The clip's pixels and the finished latents come on top.
    """
    pixels, area = shape.height * shape.width, _tile_area(shape, tiling, vae)
    batches = _frame_batches(shape.frames)
    peak = max(_encoder_elements(frames, area, vae, is_first=not index) for index, frames in enumerate(batches))
    latents = 2 * vae.latent_channels * ((shape.frames - 1) // vae.temporal_compression + 1)
    latents = latents * pixels // 4 ** (len(vae.channels) - 1)
    # Tiles overlap by a fifth and a sixth: some latents exist twice until they are blended, and once more when joined.
    return round((3 * shape.frames * pixels + peak + latents * (3 if area < pixels else 1)) * element_bytes)


def vae_can_encode(shape: ClipShape, tiling: bool, vae: VaeSize = COGVIDEOX_VAE) -> bool:
    """Whether the VAE can encode clips of this shape with unlimited memory.

    diffusers' convolutions split inputs larger than 2 GiB over time and fail if a piece has fewer than three frames.
    That happens from 2.8 million pixels for one frame, from 3.4 million for a clip.
    """
    area = _tile_area(shape, tiling, vae)
    return all(_piece_length(frames, vae.channels[0], area) >= 3 for frames in _frame_batches(shape.frames))


def needs_tiles(shape: ClipShape, vae: VaeSize, element_bytes: int = 2, free_bytes: float = UNTILED_BYTES) -> bool:
    """Whether the VAE can encode clips of this shape only in tiles. free_bytes: memory beside the VAE's weights."""
    is_too_large = vae_encode_bytes(shape, False, vae, element_bytes) > free_bytes
    return is_too_large or not vae_can_encode(shape, tiling=False, vae=vae)


def _tile_area(shape: ClipShape, tiling: bool, vae: VaeSize) -> int:
    """Pixels that are encoded at once: one tile, or the whole picture."""
    if tiling and (shape.height > vae.tile_height or shape.width > vae.tile_width):
        return min(shape.height, vae.tile_height) * min(shape.width, vae.tile_width)
    return shape.height * shape.width


def _frame_batches(frames: int) -> list[int]:
    """Sizes of the first and the second batch of frames. All later ones are like the second."""
    num_batches = max(frames // FRAME_BATCH, 1)
    return [frames - (num_batches - 1) * FRAME_BATCH, *([FRAME_BATCH] if num_batches > 1 else [])]


def _encoder_elements(frames: int, area: int, vae: VaeSize, is_first: bool) -> float:
    """Peak number of elements while the encoder processes one batch of frames of `area` pixels."""
    cached = 2 * 3 * area  # of conv_in, which reads the pixels
    previous = 0.0 if is_first else _cached_elements(area, vae)
    peak, channels_in, time_halvings = 0.0, vae.channels[0], vae.temporal_compression.bit_length() - 1
    for index, channels in enumerate(vae.channels):
        block_area = area / 4**index
        cached += _block_cache(channels_in, channels, vae.layers_per_block) * block_area
        # In a block of one layer, the block's input is the layer's input, not an additional tensor.
        num_tensors = 4 if vae.layers_per_block > 1 else 3
        active = (num_tensors * frames + 2) * channels + frames * channels_in
        peak = max(peak, cached + active * block_area + _split_elements(frames, channels, block_area))
        if index < time_halvings:
            frames = (frames + 1) // 2
        channels_in = channels
    return peak + previous


def _block_cache(channels_in: int, channels: int, num_layers: int) -> int:
    """Elements per pixel that a down block caches for the next frames: two frames of each convolution's input."""
    return 2 * (channels_in + (2 * num_layers - 1) * channels)


def _cached_elements(area: float, vae: VaeSize) -> float:
    """Elements that the whole encoder caches for the next frames."""
    total, channels_in = 2.0 * 3 * area, vae.channels[0]
    for index, channels in enumerate(vae.channels):
        total += _block_cache(channels_in, channels, vae.layers_per_block) * area / 4**index
        channels_in = channels
    # The middle block (two layers of two convolutions each) and conv_out.
    return total + 5 * 2 * vae.channels[-1] * area / 4 ** (len(vae.channels) - 1)


def _split_elements(frames: int, channels: int, area: float) -> float:
    """Elements in the pieces of a convolution split over time: all inputs but the first piece's, and all outputs."""
    padded, length = frames + 2, _piece_length(frames, channels, area)
    if length == padded:
        return 0.0
    inputs = sum(min(length, padded - start) + 2 for start in range(length, padded, length))
    return (inputs + frames) * channels * area


def _piece_length(frames: int, channels: int, area: float) -> int:
    """Frames in the first piece of a convolution over this many frames, which are padded by two."""
    padded = frames + 2
    size = padded * channels * area * 2
    return padded if size <= SPLIT_BYTES else -(-padded // (int(size / SPLIT_BYTES) + 1))
