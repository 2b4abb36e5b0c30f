"""How much memory one GPU needs: arithmetic over shapes, each term named. An estimate; no GPU has been asked yet.

What the terms count are the tensors that are alive at the worst moment, not what the allocator rounds, caches or leaves
in holes, nor the workspaces of cuDNN and cuBLAS. The activations and the VAE's encoding were compared with the tensors
of the real classes (`tests/core/test_memory.py`); the DeepSpeed terms follow the sources of 0.19.8.
"""

import dataclasses
import mmap
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from cogds.core.geometry import ClipShape, ModelGeometry, latent_frames, num_tokens, padded_latent_frames, token_grid

# The CUDA context with torch's and NCCL's kernels: 0.4 to 0.8 GB by GPU and driver, and some for workspaces. A guess.
CUDA_CONTEXT_BYTES = 1_000_000_000

# diffusers' AutoencoderKLCogVideoX encodes this many frames at a time; what does not divide goes with the first ones.
VAE_FRAME_BATCH = 8
# Its convolutions split inputs that are larger than 2 GiB, counted at two bytes a number whatever the precision.
VAE_SPLIT_BYTES = 2 * 1024**3

# DeepSpeed's own defaults for what a file leaves out.
DEFAULT_BUCKET_NUMBERS = 500_000_000
DEFAULT_MAX_LIVE_NUMBERS = 1_000_000_000
DEFAULT_MAX_REUSE_NUMBERS = 1_000_000_000
DEFAULT_PREFETCH_NUMBERS = 50_000_000
DEFAULT_PERSISTENT_NUMBERS = 100_000
# Modules that DeepSpeed passes between the last block's forward and its backward pass: the norms, the projection, and
# the transformer itself.
MODULES_AT_TURN = 12

# Of quantized weights (`model.quantization`): bytes per number; numbers that share a float32 scale, None: one row;
# and bytes per number of the one weight that is dequantized at a time (torchao goes through float32).
QUANTIZED_BYTES: dict[str, tuple[float, int | None, int]] = {
    "int8": (1, None, 4),
    "fp8": (1, None, 8),
    "nf4": (0.5, 64, 0),
}
# The same of fp8 weights with fp8 matmul: the backward pass dequantizes, transposes and quantizes them again.
TURNED_BYTES = 15


@dataclass(frozen=True)
class TransformerSize:
    """What the transformer's config fixes: parameters without the adapter, blocks, width, heads, time embedding."""

    num_parameters: int
    num_layers: int
    num_heads: int
    head_dim: int
    text_dim: int
    time_dim: int = 512

    @property
    def width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def block_linear_numbers(self) -> int:
        """Weights of a block's linear layers: attention 4 d^2, the feed-forward 8 d^2, two modulations of 6 d t."""
        return 12 * self.width**2 + 12 * self.width * self.time_dim

    @property
    def block_linear_rows(self) -> int:
        """Outputs of one block's linear layers."""
        return (4 + 5 + 12) * self.width

    @classmethod
    def from_config(cls, config: Mapping[str, Any], num_parameters: int) -> "TransformerSize":
        """From `transformer/config.json`; num_parameters: of the frozen base."""
        return cls(
            num_parameters=num_parameters,
            num_layers=config["num_layers"],
            num_heads=config["num_attention_heads"],
            head_dim=config["attention_head_dim"],
            text_dim=config["text_embed_dim"],
            time_dim=config.get("time_embed_dim", 512),
        )


@dataclass(frozen=True)
class LoraSize:
    """The adapter: trainable numbers, rank, and the layers of one block that it sits on (`attn1.to_q`, `ff.net.2`)."""

    num_parameters: int
    rank: int
    block_layers: frozenset[str]

    @classmethod
    def from_targets(cls, targets: Collection[str], num_parameters: int, rank: int) -> "LoraSize":
        """targets: full names of the adapted layers, `transformer_blocks.0.attn1.to_q`."""
        names = (name.split(".", 2) for name in targets)
        layers = {name[2] for name in names if name[0] == "transformer_blocks" and len(name) == 3}
        return cls(num_parameters, rank, frozenset(layers))


@dataclass(frozen=True)
class VaeSize:
    """What the VAE's config fixes. tile_height, tile_width: of a tile in pixels, where it encodes in tiles."""

    num_parameters: int
    channels: tuple[int, ...]
    layers_per_block: int
    latent_channels: int
    temporal_compression: int
    tile_height: int
    tile_width: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any], num_parameters: int) -> "VaeSize":
        """From `vae/config.json`. The tiles are half the config's sample size, as `enable_tiling()` leaves them."""
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


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one GPU while one bucket is trained; 0 where a thing is elsewhere (sharded away or offloaded).

    All but the last three are there together in the backward pass. `first_frame_encode` and `optimizer_step` come
    before and after it, when the activations are not there.
    """

    base_weights_bytes: int
    gathered_weights_bytes: int
    unpacked_weight_bytes: int
    lora_weights_bytes: int
    lora_gradients_bytes: int
    optimizer_state_bytes: int
    reduce_buffers_bytes: int
    vae_weights_bytes: int
    rotary_tables_bytes: int
    inputs_and_loss_bytes: int
    cuda_context_bytes: int
    kept_activations_bytes: int
    block_activations_bytes: int
    first_frame_encode_bytes: int
    optimizer_step_bytes: int

    @property
    def total_bytes(self) -> int:
        """The worst moment: what is always there and the largest of backward pass, VAE and optimizer step."""
        terms = dataclasses.asdict(self)
        backward = terms.pop("kept_activations_bytes") + terms.pop("block_activations_bytes")
        passing = terms.pop("first_frame_encode_bytes"), terms.pop("optimizer_step_bytes")
        return sum(terms.values()) + max(backward, *passing)

    def terms(self) -> dict[str, int]:
        """Every term by its name in words -> bytes."""
        return {name.removesuffix("_bytes").replace("_", " "): size for name, size in dataclasses.asdict(self).items()}


def training_memory(
    shape: ClipShape,
    batch_size: int,
    geometry: ModelGeometry,
    transformer: TransformerSize,
    lora: LoraSize,
    vae: VaeSize,
    zero: Mapping[str, Any],
    num_ranks: int,
    precision: str,
    checkpointing: str,
    rotary_bytes: int = 0,
    quantization: str = "none",
    sequence_size: int = 1,
    fp8_matmul: bool = False,
) -> MemoryEstimate:
    """The memory of one rank that trains clips of this shape. An estimate, not yet compared with a GPU.

    zero: the `zero_optimization` section of a resolved DeepSpeed config; num_ranks: those that ZeRO shards over;
    precision: "bf16" or "fp32"; checkpointing: of `train.activation_checkpointing`; rotary_bytes: of the tables of all
    buckets, which stay on the device (`rotary_table_bytes` of each); quantization: "none" or of `QUANTIZED_BYTES`;
    sequence_size: ranks that share a clip; fp8_matmul: of `model`.

    With P base and L adapter parameters, N ranks, b bytes a number (2 or 4) and B x T x d tokens of the transformer's
    width, T being a rank's share of them, U = B T d b:

        base weights      P b, or as `QUANTIZED_BYTES` says for the blocks' linear layers; / N at stage 3; 0 with
        offload_param gathered weights  at stage 3: blocks that are whole at one time, see `_gathered_blocks`
        unpacked weight   the largest, 4 d^2, if the base is quantized, in b bytes and as many as `QUANTIZED_BYTES`
        says, or
                          `TURNED_BYTES` with fp8 matmul
        LoRA weights      L b; at stage 3 / N, and L b beside it where its matrices stay whole (persistence threshold);
                          0 for the share with offload_param
        LoRA gradients    L b; / N from stage 2; 0 with offload_optimizer from stage 2
        optimizer state   fp32 master and two Adam moments, 12 L (8 L at stage 0: no master); / N from stage 1;
                          0 with offload_optimizer
        optimizer step    fp32 copy of the gradients, 4 L / N from stage 1; 0 with offload_optimizer
        reduce buffers    from stage 1: reduce_bucket_size b, twice where stages 1 and 2 overlap communication
        kept activations  by checkpointing mode, a block: none: its input and what it saves (`saved_units`); selective:
        its
                          input, attention's output and statistics; full: its input; full+offload: nothing, but two
                          blocks' inputs on their way back from the host
        block activations what the recomputed block saves, where that is not kept already, and the gradients at its
                          worst moment (`_gradient_units`); at stage 3 at least the copy of a block's weights that
                          DeepSpeed takes out of the buffer they were gathered in; with fp8 matmul what it
                          adds, as in a block that is not compiled (`_fp8_units`): a compiled one takes less
    """
    bytes_each = 2 if precision == "bf16" else 4
    stage = int(zero.get("stage", 0))
    base_offloaded, optimizer_offloaded = _offloads(zero, "offload_param"), _offloads(zero, "offload_optimizer")

    def shard(numbers: int, from_stage: int) -> int:
        return -(-numbers // num_ranks) if stage >= from_stage else numbers

    num_buffers = 2 if stage in (1, 2) and zero.get("overlap_comm", False) else 1
    unit = _unit_bytes(shape, batch_size, geometry, transformer, bytes_each, sequence_size)
    saved = saved_units(transformer, lora, bytes_each, sequence_size)
    on_gpu = 0 if stage == 3 and base_offloaded else 1
    block_bytes = _block_numbers(transformer, lora, zero) * bytes_each if stage == 3 else 0
    whole_lora = lora.num_parameters if stage == 3 and _lora_persists(transformer, lora, zero) else 0
    in_block = _recomputed_units(checkpointing, saved, transformer, bytes_each) + _gradient_units(lora)
    in_block += _fp8_units(checkpointing) if fp8_matmul else 0.0
    return MemoryEstimate(
        base_weights_bytes=shard(base_bytes(transformer, quantization, bytes_each), 3) * on_gpu,
        gathered_weights_bytes=round(_gathered_blocks(transformer, lora, zero) * block_bytes) if stage == 3 else 0,
        unpacked_weight_bytes=4 * transformer.width**2 * unpacked_bytes(quantization, fp8_matmul, bytes_each),
        lora_weights_bytes=(shard(lora.num_parameters, 3) * on_gpu + whole_lora) * bytes_each,
        lora_gradients_bytes=0 if optimizer_offloaded and stage >= 2 else shard(lora.num_parameters, 2) * bytes_each,
        optimizer_state_bytes=0 if optimizer_offloaded else shard(lora.num_parameters, 1) * (12 if stage else 8),
        reduce_buffers_bytes=(
            num_buffers * _number(zero, "reduce_bucket_size", DEFAULT_BUCKET_NUMBERS) * bytes_each if stage else 0
        ),
        vae_weights_bytes=vae.num_parameters * bytes_each,
        rotary_tables_bytes=rotary_bytes,
        inputs_and_loss_bytes=batch_size * _inputs_and_loss_bytes(shape, geometry, transformer, bytes_each),
        cuda_context_bytes=CUDA_CONTEXT_BYTES,
        kept_activations_bytes=round(unit * _kept_units(checkpointing, saved, transformer, bytes_each)),
        block_activations_bytes=max(round(unit * in_block), block_bytes),
        first_frame_encode_bytes=vae_encode_bytes(dataclasses.replace(shape, frames=1), False, vae, bytes_each),
        optimizer_step_bytes=0 if optimizer_offloaded or not stage else shard(lora.num_parameters, 1) * 4,
    )


def _unit_bytes(
    shape: ClipShape,
    batch_size: int,
    geometry: ModelGeometry,
    transformer: TransformerSize,
    bytes_each: int,
    sequence_size: int,
) -> int:
    """U: one tensor of the transformer's width over a rank's tokens, such as a block's input."""
    return batch_size * -(-num_tokens(shape, geometry) // sequence_size) * transformer.width * bytes_each


def pinned_bytes(
    shape: ClipShape,
    batch_size: int,
    geometry: ModelGeometry,
    transformer: TransformerSize,
    precision: str,
    checkpointing: str,
    sequence_size: int = 1,
) -> int:
    """Pinned host memory of one rank that trains clips of this shape: with full+offload every block's input, U, in
    whole pages; else 0. What the loaders and DeepSpeed's offload pin is not in it.
    """
    if checkpointing != "full+offload":
        return 0
    bytes_each = 2 if precision == "bf16" else 4
    unit = _unit_bytes(shape, batch_size, geometry, transformer, bytes_each, sequence_size)
    return transformer.num_layers * -(-unit // mmap.PAGESIZE) * mmap.PAGESIZE


def base_bytes(transformer: TransformerSize, quantization: str, bytes_each: int) -> int:
    """The frozen weights, whole. quantization: "none", or of `QUANTIZED_BYTES`, for the linear layers of the blocks."""
    total = transformer.num_parameters * bytes_each
    if quantization == "none":
        return total
    each, group, _ = QUANTIZED_BYTES[quantization]
    numbers = transformer.block_linear_numbers
    scales = numbers // group if group else transformer.block_linear_rows
    return total - transformer.num_layers * (numbers * bytes_each - round(numbers * each) - 4 * scales)


def _lora_persists(transformer: TransformerSize, lora: LoraSize, zero: Mapping[str, Any]) -> bool:
    """Whether ZeRO-3 keeps the adapter's matrices whole on every rank: those of attention decide."""
    return lora.rank * transformer.width <= _number(zero, "param_persistence_threshold", DEFAULT_PERSISTENT_NUMBERS)


def _block_numbers(transformer: TransformerSize, lora: LoraSize, zero: Mapping[str, Any]) -> int:
    """What ZeRO-3 gathers for one block. (Norms and biases, 0.06% of it, are not counted.)"""
    adapter = 0 if _lora_persists(transformer, lora, zero) else lora.num_parameters // transformer.num_layers
    return transformer.block_linear_numbers + adapter


def _gathered_blocks(transformer: TransformerSize, lora: LoraSize, zero: Mapping[str, Any]) -> float:
    """How many blocks' weights are whole at once under ZeRO-3, a block being gathered as one (a leaf module).

    The worst moment is the turn from forward to backward pass. After its forward pass a block is released, but where
    its weights are used again within stage3_max_reuse_distance numbers. DeepSpeed 0.19.8 takes the backward pass of the
    whole transformer, which comes before that of the last block, for a use of all of them: so the last blocks stay, as
    many as make up that distance. Beside them is what is fetched ahead: up to stage3_prefetch_bucket_size numbers at
    each of the modules around the turn, until stage3_max_live_parameters are whole; the last weight may exceed that (by
    4 d^2 at most). Read in partitioned_param_coordinator.py, and seen so on 12 small blocks.
    """
    block = _block_numbers(transformer, lora, zero)
    distance = _number(zero, "max_reuse_distance", DEFAULT_MAX_REUSE_NUMBERS)
    used = transformer.block_linear_numbers + lora.num_parameters // transformer.num_layers
    waiting = max(1, -(-distance // used)) * block
    room = _number(zero, "max_live_parameters", DEFAULT_MAX_LIVE_NUMBERS) - waiting
    ahead = min(room, MODULES_AT_TURN * _number(zero, "prefetch_bucket_size", DEFAULT_PREFETCH_NUMBERS))
    live = waiting + (ahead + 4 * transformer.width**2 if ahead > 0 else 0)
    return min(float(transformer.num_layers), live / block)


def _attention_units(transformer: TransformerSize, bytes_each: int) -> float:
    """Attention's output and its statistic a row and head, in U."""
    return 1 + 4 * transformer.num_heads / (transformer.width * bytes_each)


def _kept_units(checkpointing: str, saved: float, transformer: TransformerSize, bytes_each: int) -> float:
    """What all blocks together keep for the backward pass, in U."""
    each = {"none": 1 + saved, "selective": 1 + _attention_units(transformer, bytes_each), "full": 1.0}
    return (
        min(2, transformer.num_layers)
        if checkpointing == "full+offload"
        else transformer.num_layers * each[checkpointing]
    )


def _recomputed_units(checkpointing: str, saved: float, transformer: TransformerSize, bytes_each: int) -> float:
    """What a block saves when it is computed anew, in U."""
    if checkpointing == "none":
        return 0.0
    return saved - (_attention_units(transformer, bytes_each) if checkpointing == "selective" else 0.0)


def _gradient_units(lora: LoraSize) -> float:
    """What a block's backward pass adds to all that the block saved, at its worst moment, in U.

    That is GELU's: the gradient of the block's output (1), and of what is before and behind GELU (8). Where the
    feed-forward's second layer is adapted, what it saved is gone by then, and the worst is its own: the gradients of
    its output (1) and its input (4) beside that of the block's (1). What the last gate saved (1) is gone in both.
    """
    return (6 if "ff.net.2" in lora.block_layers else 9) - ("norm2.linear" in lora.block_layers)


def _fp8_units(checkpointing: str) -> float:
    """What fp8 matmul adds to the worst moment of a block that is not compiled, in U.

    Their rows are rounded by way of float32: of the feed-forward's width, 4 U, that is 8 U, and 2 U of codes. It comes
    in the block's forward pass or in the backward pass of the feed-forward's first layer: beside less than what is
    counted without them where the forward pass is not run again. Seen in runs of the real shapes without numbers.
    """
    return 3.0 if checkpointing == "none" else 8.0


def unpacked_bytes(quantization: str, fp8_matmul: bool, bytes_each: int) -> int:
    """Bytes a number of a frozen weight while it is unpacked for a product."""
    if quantization == "none":
        return 0
    return bytes_each + (TURNED_BYTES if fp8_matmul else QUANTIZED_BYTES[quantization][2])


def saved_units(transformer: TransformerSize, lora: LoraSize, bytes_each: int, sequence_size: int = 1) -> float:
    """What autograd keeps of one block besides its input, as a multiple of U = tokens x width x bytes_each.

    The base is frozen, so a linear layer's input is kept only where an adapter reads it. In U:

        3 attention's q, k, v; 2 q and k before their norm; 1 attention's output; 1 input of the second norm;
        4 input of GELU                                                                    11, always
        1 input of q, k, v where one of them is adapted (attention's last layer reads attention's output itself; with
        sequence_size > 1 a copy of it, 1); 1 of the feed-forward; 4 of its second layer; 1 what is gated, where the
        layer that makes the gate is adapted
        rank / width for every adapter on a sequence
        float32 statistics: 2 a head for each of the norms of q and k, 1 a head for attention, 2 for each block norm

    Attention is a kernel that keeps q, k, v, the output and one statistic a row (FlashAttention, cuDNN).
    """
    layers = lora.block_layers
    units = 11.0
    units += any(name in layers for name in ("attn1.to_q", "attn1.to_k", "attn1.to_v"))
    units += sequence_size > 1 and "attn1.to_out.0" in layers
    units += "ff.net.0.proj" in layers
    units += 4 * ("ff.net.2" in layers)
    units += sum(name in layers for name in ("norm1.linear", "norm2.linear"))
    on_sequence = [name for name in layers if not name.startswith("norm")]
    units += lora.rank * len(on_sequence) / transformer.width
    return units + 4 * (5 * transformer.num_heads + 4) / (transformer.width * bytes_each)


def rotary_table_bytes(shape: ClipShape, geometry: ModelGeometry) -> int:
    """The two float32 tables [video tokens, head_dim] of a bucket, which the trainer keeps for every bucket."""
    time, height, width = token_grid(shape, geometry)
    return 2 * 4 * time * height * width * geometry.head_dim if geometry.rope else 0


def cached_clip_bytes(shape: ClipShape, geometry: ModelGeometry, bytes_each: int) -> int:
    """An encoded clip in the cache: moments [2C, F, h, w] and the first frame uint8 [3, H, W]. Headers not counted."""
    height, width = shape.height // geometry.vae_spatial, shape.width // geometry.vae_spatial
    moments = 2 * geometry.latent_channels * latent_frames(shape.frames, geometry) * height * width
    return moments * bytes_each + 3 * shape.height * shape.width


def cached_caption_bytes(geometry: ModelGeometry, text_dim: int, bytes_each: int) -> int:
    """The text states [text_tokens, text_dim] of one caption in the cache."""
    return geometry.text_tokens * text_dim * bytes_each


def vae_encode_bytes(shape: ClipShape, tiling: bool, vae: VaeSize = COGVIDEOX_VAE, bytes_each: int = 2) -> int:
    """Peak of the VAE's encoding of one clip, its weights and the CUDA context not counted.

    An estimate of live tensors for diffusers' AutoencoderKLCogVideoX, not yet compared with a GPU. tiling: with
    `enable_tiling()`, which encodes tile by tile where either side is longer than a tile.

    The encoder takes VAE_FRAME_BATCH frames at a time, the remainder with the first ones, and the worst moment is the
    last convolution of a down block. There are alive, per pixel of that block: 4 f + 2 frames of its channels (input,
    normed, padded by two frames, output), f of its input, two frames of the input of every convolution so far, which
    the next frames need, and all such frames of the batch before; and, where a convolution splits what is above 2 GiB,
    its pieces. Beside it the clip's pixels and the latents that are ready.
    """
    pixels = shape.height * shape.width
    tiled = tiling and (shape.height > vae.tile_height or shape.width > vae.tile_width)
    area = min(shape.height, vae.tile_height) * min(shape.width, vae.tile_width) if tiled else pixels
    num_batches = max(shape.frames // VAE_FRAME_BATCH, 1)
    first = shape.frames - (num_batches - 1) * VAE_FRAME_BATCH
    peak = _encoder_numbers(first, area, vae, first_batch=True)
    if num_batches > 1:
        peak = max(peak, _encoder_numbers(VAE_FRAME_BATCH, area, vae, first_batch=False))
    latents = 2 * vae.latent_channels * ((shape.frames - 1) // vae.temporal_compression + 1)
    latents = latents * pixels // 4 ** (len(vae.channels) - 1)
    # Tiles overlap by a fifth and a sixth: some latents are held twice until they are blended, and once more joined.
    return round((3 * shape.frames * pixels + peak + latents * (3 if tiled else 1)) * bytes_each)


def vae_can_encode(shape: ClipShape, tiling: bool, vae: VaeSize = COGVIDEOX_VAE) -> bool:
    """Whether the VAE can encode clips of this shape at all, whatever the memory.

    diffusers' convolutions split what is above 2 GiB over time, and fail where a piece is shorter than their three
    frames: from 2.8 million pixels on for one frame, from 3.4 million for a clip.
    """
    tiled = tiling and (shape.height > vae.tile_height or shape.width > vae.tile_width)
    area = (
        min(shape.height, vae.tile_height) * min(shape.width, vae.tile_width) if tiled else shape.height * shape.width
    )
    num_batches = max(shape.frames // VAE_FRAME_BATCH, 1)
    first = shape.frames - (num_batches - 1) * VAE_FRAME_BATCH
    batches = {first} | ({VAE_FRAME_BATCH} if num_batches > 1 else set())
    return all(_piece_length(frames, vae.channels[0], area) >= 3 for frames in batches)


def _encoder_numbers(frames: int, area: int, vae: VaeSize, first_batch: bool) -> float:
    """Numbers alive at the encoder's worst moment, for one batch of frames of `area` pixels."""
    cached = 2 * 3 * area  # of conv_in, which reads the pixels
    before = 0.0 if first_batch else _cached_numbers(area, vae)
    worst, channels_in, time_halvings = 0.0, vae.channels[0], vae.temporal_compression.bit_length() - 1
    for index, channels in enumerate(vae.channels):
        here = area / 4**index
        cached += _block_cache(channels_in, channels, vae.layers_per_block) * here
        # Where a block has one layer, its input is that layer's, not one more tensor.
        held = 4 if vae.layers_per_block > 1 else 3
        active = (held * frames + 2) * channels + frames * channels_in
        worst = max(worst, cached + active * here + _split_numbers(frames, channels, here))
        if index < time_halvings:
            frames = (frames + 1) // 2
        channels_in = channels
    return worst + before


def _block_cache(channels_in: int, channels: int, num_layers: int) -> int:
    """Numbers per pixel that a down block's convolutions keep for the next frames: two frames of each one's input."""
    return 2 * (channels_in + (2 * num_layers - 1) * channels)


def _cached_numbers(area: float, vae: VaeSize) -> float:
    """Numbers that the whole encoder keeps for the next frames."""
    total, channels_in = 2.0 * 3 * area, vae.channels[0]
    for index, channels in enumerate(vae.channels):
        total += _block_cache(channels_in, channels, vae.layers_per_block) * area / 4**index
        channels_in = channels
    # The middle: two layers of two convolutions, and conv_out.
    return total + 5 * 2 * vae.channels[-1] * area / 4 ** (len(vae.channels) - 1)


def _split_numbers(frames: int, channels: int, area: float) -> float:
    """Numbers in the pieces of a convolution that is split over time: inputs behind the first, and all outputs."""
    padded, length = frames + 2, _piece_length(frames, channels, area)
    if length == padded:
        return 0.0
    inputs = sum(min(length, padded - start) + 2 for start in range(length, padded, length))
    return (inputs + frames) * channels * area


def _piece_length(frames: int, channels: int, area: float) -> int:
    """Frames of the first piece that a convolution on this many frames, padded by two, is split into."""
    padded = frames + 2
    size = padded * channels * area * 2
    return padded if size <= VAE_SPLIT_BYTES else -(-padded // (int(size / VAE_SPLIT_BYTES) + 1))


def _inputs_and_loss_bytes(
    shape: ClipShape, geometry: ModelGeometry, transformer: TransformerSize, bytes_each: int
) -> int:
    """Per clip: text states, moments, and the latents as float32 (clean, noise, noisy, target, prediction, difference).

    The transformer's input (latents and image latents) and its output come in the transformer's precision.
    """
    height, width = shape.height // geometry.vae_spatial, shape.width // geometry.vae_spatial
    latents = geometry.latent_channels * padded_latent_frames(shape.frames, geometry) * height * width
    text = geometry.text_tokens * transformer.text_dim
    return latents * (6 * 4 + (2 + 2 + 1) * bytes_each) + text * bytes_each


def _offloads(zero: Mapping[str, Any], name: str) -> bool:
    return (zero.get(name) or {}).get("device", "none") != "none"


def _number(zero: Mapping[str, Any], name: str, default: int) -> int:
    value = zero.get(name, zero.get(f"stage3_{name}", default))
    return int(float(value)) if value != "auto" else default
