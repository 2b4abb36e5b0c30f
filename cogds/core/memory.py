"""GPU and host memory of one rank during training, calculated from shapes, without a GPU.

    zero = ZeroSettings.from_config(section)
    model = MemoryModel(geometry, transformer, trained, vae, zero, num_ranks, "bf16", buckets)
    model.estimate(shape, batch_size=1, checkpointing="none").total_bytes

The terms count the tensors that are alive at the peak. They leave out the allocator's rounding, caching and
fragmentation and the workspaces of cuDNN and cuBLAS. `tests/core/test_memory.py` compares the activations with the
tensors that the real classes allocate. The DeepSpeed terms follow the source of 0.19.8.
"""

import dataclasses
import mmap
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from cogds.core.checkpointing import CHECKPOINTING_MODES, BlockCheckpointing
from cogds.core.condition_modes import DEFAULT_MODES, ConditionSettings, Mode, condition_frames, pieces_of
from cogds.core.geometry import (
    ClipShape,
    ModelGeometry,
    cached_caption_bytes,
    cached_clip_bytes,
    num_tokens,
    padded_latent_frames,
    token_grid,
)
from cogds.core.vae_memory import VaeSize, vae_encode_bytes

# Bytes per element of the frozen and the trained weights and the activations.
ELEMENT_BYTES = {"bf16": 2, "fp32": 4}
# The share of a GPU's memory that an estimate may use. The rest is for fragmentation and other processes.
USABLE_SHARE = 0.92

# The CUDA context with the kernels of torch and NCCL takes 0.4 to 0.8 GB depending on GPU and driver. The rest is for
# workspaces. Assumed, not measured.
CUDA_CONTEXT_BYTES = 1_000_000_000

# Modules for which DeepSpeed prefetches weights between the last block's forward and backward pass: the norms, the
# projection and the transformer itself.
NUM_PREFETCHING_MODULES = 12


@dataclass(frozen=True)
class QuantizedFormat:
    """Storage of a quantized weight.

    weight_bytes: per element; scale_group: elements that share a float32 scale, None for one scale per row;
    unpacking_bytes: per element of the one weight that is unpacked at a time, in addition to the unpacked weight
    (torchao unpacks by way of float32).
    """

    weight_bytes: float
    scale_group: int | None
    unpacking_bytes: int


QUANTIZED_FORMATS = {
    "int8": QuantizedFormat(1, None, 4),
    "fp8": QuantizedFormat(1, None, 8),
    "nf4": QuantizedFormat(0.5, 64, 0),
}
# unpacking_bytes with fp8 matmuls: the backward pass unpacks the weight, transposes it and packs it again.
FP8_MATMUL_UNPACKING_BYTES = 15


@dataclass(frozen=True)
class TransformerSize:
    """Sizes of the transformer. num_parameters: without a LoRA; time_dim: of the time embedding."""

    num_parameters: int
    num_layers: int
    num_heads: int
    head_dim: int
    text_dim: int
    time_dim: int = 512

    @property
    def width(self) -> int:
        """The hidden size."""
        return self.num_heads * self.head_dim

    @property
    def block_weights(self) -> int:
        """Weight elements in a block's linear layers: attention 4 d^2, feed-forward 8 d^2, two modulations 6 d t."""
        return 12 * self.width**2 + 12 * self.width * self.time_dim

    @property
    def block_rows(self) -> int:
        """Output features of a block's linear layers, summed."""
        return (4 + 5 + 12) * self.width

    @classmethod
    def from_config(cls, config: Mapping[str, Any], num_parameters: int) -> "TransformerSize":
        """Read `transformer/config.json`."""
        return cls(
            num_parameters=num_parameters,
            num_layers=config["num_layers"],
            num_heads=config["num_attention_heads"],
            head_dim=config["attention_head_dim"],
            text_dim=config["text_embed_dim"],
            time_dim=config.get("time_embed_dim", 512),
        )


@dataclass(frozen=True)
class TrainedSize:
    """Sizes of what is trained: a LoRA, or weights of the transformer itself.

    rank: of the LoRA; 0 for weights of the transformer. block_layers: adapted or trained linear layers within a block,
    such as `attn1.to_q` or `ff.net.2`. If they differ between blocks, the layers of any block.
    """

    num_parameters: int
    rank: int
    block_layers: frozenset[str]

    @property
    def is_lora(self) -> bool:
        """Whether a LoRA is trained."""
        return self.rank > 0

    @property
    def num_in_transformer(self) -> int:
        """Trained parameters that are part of the transformer."""
        return 0 if self.is_lora else self.num_parameters

    @classmethod
    def from_targets(cls, targets: Collection[str], num_parameters: int, rank: int) -> "TrainedSize":
        """targets: full names of the adapted layers, such as `transformer_blocks.0.attn1.to_q`, or of the weights."""
        names = (name.removesuffix(".weight").split(".", 2) for name in targets)
        layers = {name[2] for name in names if name[0] == "transformer_blocks" and len(name) == 3}
        return cls(num_parameters, rank, frozenset(layers))


@dataclass(frozen=True)
class ZeroSettings:
    """The keys of DeepSpeed's `zero_optimization` section that decide memory. Defaults are those of DeepSpeed.

    Sizes are numbers of elements. offload_optimizer, offload_param: whether they are on the host (or on NVMe).
    """

    stage: int = 0
    overlap_comm: bool = False
    offload_optimizer: bool = False
    offload_param: bool = False
    reduce_bucket_size: int = 500_000_000
    max_live_parameters: int = 1_000_000_000
    max_reuse_distance: int = 1_000_000_000
    prefetch_bucket_size: int = 50_000_000
    param_persistence_threshold: int = 100_000

    @classmethod
    def from_config(cls, section: Mapping[str, Any]) -> "ZeroSettings":
        """Read a resolved section. Sizes may have the prefix `stage3_`; a size of "auto" counts as the default."""
        sizes = {}
        for name in (field.name for field in dataclasses.fields(cls)[4:]):
            value = section.get(name, section.get(f"stage3_{name}", "auto"))
            if value != "auto":
                sizes[name] = int(float(value))
        return cls(
            stage=int(section.get("stage", 0)),
            overlap_comm=bool(section.get("overlap_comm", False)),
            offload_optimizer=(section.get("offload_optimizer") or {}).get("device", "none") != "none",
            offload_param=(section.get("offload_param") or {}).get("device", "none") != "none",
            **sizes,
        )


@dataclass(frozen=True)
class OnTheFlyEncoding:
    """What a rank that encodes on the fly keeps on its GPU while it trains.

    num_text_parameters: of T5. tiled: the buckets that the VAE encodes in tiles. num_batches: encoded batches that
    exist in addition to the one that is trained.
    """

    num_text_parameters: int
    tiled: frozenset[ClipShape]
    num_batches: int


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one GPU while one bucket is trained. A term is 0 if its tensors are on the host or on other ranks.

    `condition_encode_bytes` (0 in text-to-video) and `optimizer_step_bytes` are needed before and after the backward
    pass, when there are no activations. All other terms coexist in the backward pass. `text_encoder_weights_bytes`,
    `second_vae_weights_bytes` and `clip_encode_bytes` are 0 unless clips are encoded on the fly.
    """

    base_weights_bytes: int
    gathered_weights_bytes: int
    unpacked_weight_bytes: int
    trained_weights_bytes: int
    trained_gradients_bytes: int
    optimizer_state_bytes: int
    moving_average_bytes: int
    reduce_buffers_bytes: int
    vae_weights_bytes: int
    text_encoder_weights_bytes: int
    second_vae_weights_bytes: int
    clip_encode_bytes: int
    rotary_tables_bytes: int
    inputs_and_loss_bytes: int
    cuda_context_bytes: int
    kept_activations_bytes: int
    block_activations_bytes: int
    condition_encode_bytes: int
    optimizer_step_bytes: int

    @property
    def activations_bytes(self) -> int:
        """All activations at the peak of the backward pass."""
        return self.kept_activations_bytes + self.block_activations_bytes

    @property
    def on_the_fly_bytes(self) -> int:
        """Everything that encoding on the fly adds."""
        return self.text_encoder_weights_bytes + self.second_vae_weights_bytes + self.clip_encode_bytes

    @property
    def total_bytes(self) -> int:
        """The peak: the resident tensors and the largest of backward pass, VAE encoding and optimizer step."""
        passing = self.condition_encode_bytes, self.optimizer_step_bytes
        resident = sum(self.terms().values()) - self.activations_bytes - sum(passing)
        return resident + max(self.activations_bytes, *passing)

    def fits(self, gpu_bytes: float) -> bool:
        """Whether a GPU of this size is enough, with `1 - USABLE_SHARE` of it to spare."""
        return self.total_bytes <= USABLE_SHARE * gpu_bytes

    def terms(self) -> dict[str, int]:
        """Map the name of each term, such as `base weights`, to its bytes."""
        return {name.removesuffix("_bytes").replace("_", " "): size for name, size in dataclasses.asdict(self).items()}


@dataclass(frozen=True)
class MemoryModel:
    """Everything that a rank's memory depends on, except the bucket, its batch size and its activation checkpointing.

    Attributes:
        num_ranks: ranks that ZeRO shards over.
        precision: a key of `ELEMENT_BYTES`.
        buckets: all buckets of the run, since the rotary tables of all of them stay on the GPU.
        quantization: of the base weights, "none" or a key of `QUANTIZED_FORMATS`.
        sequence_size: ranks that share a clip.
        on_the_fly: None if clips are encoded before training.
        ema_on_gpu: whether a moving average of the trained weights is kept on the GPU.
        modes: the condition modes that are used.
        condition: the settings of the modes.
    """

    geometry: ModelGeometry
    transformer: TransformerSize
    trained: TrainedSize
    vae: VaeSize
    zero: ZeroSettings
    num_ranks: int
    precision: str
    buckets: tuple[ClipShape, ...]
    quantization: str = "none"
    fp8_matmul: bool = False
    sequence_size: int = 1
    on_the_fly: OnTheFlyEncoding | None = None
    ema_on_gpu: bool = False
    modes: tuple[Mode, ...] = DEFAULT_MODES
    condition: ConditionSettings = dataclasses.field(default_factory=ConditionSettings)
    has_control: bool = False

    @property
    def element_bytes(self) -> int:
        """Bytes per element in the run's precision."""
        return ELEMENT_BYTES[self.precision]

    def estimate(self, shape: ClipShape, batch_size: int, checkpointing: BlockCheckpointing | str) -> MemoryEstimate:
        """Estimate the GPU memory of a rank that trains clips of this shape. checkpointing: a mode is for all blocks.

        For P frozen and L trained parameters, N ranks, e bytes per element (2 or 4), B clips of T tokens (a rank's
        share of them), hidden size d, and U = B T d e, the bytes of one hidden-state tensor:

            base weights       P e, less for quantized blocks (`base_weights_bytes`); / N at stage 3; 0 with
                               offload_param; plus learned or fixed position embeddings (`_position_bytes`)
            gathered weights   at stage 3: the blocks gathered at the same time (`_num_gathered_blocks`)
            unpacked weight    the largest, 4 d^2, if the base is quantized (`unpacked_weight_bytes`)
            trained weights    L e; at stage 3 L e / N, 0 with offload_param, plus L e if they are the matrices of a
                               LoRA below the persistence threshold
            trained gradients  L e; / N from stage 2; 0 with offload_optimizer from stage 2
            optimizer state    fp32 master weights and two Adam moments, 12 L (8 L at stage 0, which has no master
                               weights); / N from stage 1; 0 with offload_optimizer
            moving average     4 L / N if it is on the GPU
            condition encode   the VAE's, for the longest video of a mode (`_condition_encode_bytes`)
            optimizer step     fp32 copy of the gradients, 4 L / N from stage 1; 0 with offload_optimizer
            on the fly         the weights of T5 and of a second VAE, and `_clip_encode_bytes`
            reduce buffers     from stage 1: reduce_bucket_size e, twice if stage 1 or 2 overlaps communication; plus
                               the gradient of the largest weight, 4 d^2 e, until it is reduced, if the transformer's
                               own weights are trained
            kept activations   per block, by mode. none: the input and the tensors that autograd saves
                               (`saved_units`); selective: the input, attention's output and its statistic;
                               full: the input; full+offload: nothing, but two inputs on their way back to the GPU
            block activations  the tensors that a recomputed block saves and the gradients at the peak of its backward
                               pass (`_gradient_units`); with fp8 matmuls additionally `_fp8_matmul_units`, an upper
                               bound if the block is compiled; less what the blocks without recomputation have freed by
                               then (`_block_units`); at stage 3 at least the copy of a block's weights that DeepSpeed
                               takes out of the gathered buffer
        """
        zero, element_bytes, num_trained = self.zero, self.element_bytes, self.trained.num_parameters
        is_sharded = zero.stage == 3

        def shard(size: int, from_stage: int) -> int:
            return -(-size // self.num_ranks) if zero.stage >= from_stage else size

        on_gpu = 0 if is_sharded and zero.offload_param else 1
        block_bytes = self._gathered_block_size * element_bytes if is_sharded else 0
        whole_lora = num_trained if is_sharded and self._lora_persists else 0
        num_buffers = 2 if zero.stage in (1, 2) and zero.overlap_comm else 1
        blocks, unit = BlockCheckpointing.of(checkpointing), self._unit_bytes(shape, batch_size)
        gradients_offloaded = zero.offload_optimizer and zero.stage >= 2
        vae_weights, on_the_fly = self.vae.num_parameters * element_bytes, self.on_the_fly
        return MemoryEstimate(
            base_weights_bytes=shard(
                base_weights_bytes(self.transformer, self.quantization, element_bytes)
                - self.trained.num_in_transformer * element_bytes,
                3,
            )
            * on_gpu
            + self._position_bytes,
            gathered_weights_bytes=round(self._num_gathered_blocks * block_bytes) if is_sharded else 0,
            unpacked_weight_bytes=4 * self.transformer.width**2
            * unpacked_weight_bytes(self.quantization, self.fp8_matmul, element_bytes),
            trained_weights_bytes=(shard(num_trained, 3) * on_gpu + whole_lora) * element_bytes,
            trained_gradients_bytes=0 if gradients_offloaded else shard(num_trained, 2) * element_bytes,
            optimizer_state_bytes=0 if zero.offload_optimizer else shard(num_trained, 1) * (12 if zero.stage else 8),
            moving_average_bytes=shard(num_trained, 1) * 4 if self.ema_on_gpu else 0,
            reduce_buffers_bytes=(num_buffers * zero.reduce_bucket_size + self._largest_gradient) * element_bytes
            if zero.stage
            else 0,
            vae_weights_bytes=vae_weights,
            text_encoder_weights_bytes=on_the_fly.num_text_parameters * element_bytes if on_the_fly else 0,
            second_vae_weights_bytes=vae_weights if on_the_fly else 0,
            clip_encode_bytes=self._clip_encode_bytes(shape, batch_size, on_the_fly) if on_the_fly else 0,
            rotary_tables_bytes=sum(rotary_tables_bytes(bucket, self.geometry) for bucket in self.buckets),
            inputs_and_loss_bytes=batch_size * self._inputs_and_loss_bytes(shape),
            cuda_context_bytes=CUDA_CONTEXT_BYTES,
            kept_activations_bytes=round(unit * self._kept_units(blocks)),
            block_activations_bytes=max(round(unit * self._block_units(blocks)), block_bytes),
            condition_encode_bytes=self._condition_encode_bytes(shape, batch_size),
            optimizer_step_bytes=0 if zero.offload_optimizer or not zero.stage else shard(num_trained, 1) * 4,
        )  # fmt: skip

    def pinned_host_bytes(self, shape: ClipShape, batch_size: int, checkpointing: BlockCheckpointing | str) -> int:
        """Pinned host memory of a rank for activations: the inputs of blocks with full+offload, in whole pages.

        Does not include memory pinned by data loaders and by DeepSpeed's offload.
        """
        blocks = BlockCheckpointing.of(checkpointing)
        if blocks.mode != "full+offload":
            return 0
        num_pages = -(-self._unit_bytes(shape, batch_size) // mmap.PAGESIZE)
        return (self.transformer.num_layers - blocks.num_kept_blocks) * num_pages * mmap.PAGESIZE

    @property
    def offloaded_optimizer_bytes(self) -> int:
        """Host memory of a rank with offload_optimizer: float32 masters, two moments and gradients of its share."""
        share = -(-self.trained.num_parameters // self.num_ranks)
        return 16 * share if self.zero.offload_optimizer and self.zero.stage else 0

    def least_checkpointing(self, shape: ClipShape, batch_size: int, gpu_bytes: float) -> str:
        """The fastest checkpointing mode that fits a GPU of this size, or the smallest mode if none fits."""
        for mode in CHECKPOINTING_MODES:
            if self.estimate(shape, batch_size, mode).fits(gpu_bytes):
                return mode
        return CHECKPOINTING_MODES[-1]

    def best_checkpointing(self, shape: ClipShape, batch_size: int, gpu_bytes: float) -> BlockCheckpointing:
        """`least_checkpointing`, with as many blocks that keep all activations as fit as well."""
        mode, num_blocks = self.least_checkpointing(shape, batch_size, gpu_bytes), self.transformer.num_layers
        best = BlockCheckpointing(mode)
        for num_kept in range(1, num_blocks if mode != "none" else 1):
            blocks = BlockCheckpointing(mode, num_kept, num_blocks)
            if not self.estimate(shape, batch_size, blocks).fits(gpu_bytes):
                break
            best = blocks
        return best

    @cached_property
    def saved_units(self) -> float:
        """Tensors that autograd saves of one block besides its input, in U.

        The input of a linear layer is saved only if the layer is trained or a LoRA reads the input. In U:

            3 attention's q, k, v; 2 q and k before their norm; 1 attention's output; 1 input of the second norm;
            4 input of GELU                                                                            11, always
            1 input of q, k, v if one of them is trained (attention's output layer reads a tensor that is saved anyway;
            with sequence parallelism it reads a copy, 1); 1 input of the feed-forward; 4 of its second layer; 1 the
            gated tensor, for each trained layer that produces gates
            rank / d for every LoRA applied to the sequence
            float32 statistics: 2 per head for each norm of q and k, 1 per head for attention, 2 for each block norm

        This assumes an attention kernel that saves q, k, v, the output and one statistic per row (FlashAttention,
        cuDNN).
        """
        layers, transformer = self.trained.block_layers, self.transformer
        units = 11.0
        units += any(name in layers for name in ("attn1.to_q", "attn1.to_k", "attn1.to_v"))
        units += self.sequence_size > 1 and "attn1.to_out.0" in layers
        units += "ff.net.0.proj" in layers
        units += 4 * ("ff.net.2" in layers)
        units += sum(name in layers for name in ("norm1.linear", "norm2.linear"))
        units += self.trained.rank * sum(not name.startswith("norm") for name in layers) / transformer.width
        return units + 4 * (5 * transformer.num_heads + 4) / (transformer.width * self.element_bytes)

    def _unit_bytes(self, shape: ClipShape, batch_size: int) -> int:
        """U: bytes of one hidden-state tensor over a rank's tokens, such as a block's input."""
        num_rank_tokens = -(-num_tokens(shape, self.geometry) // self.sequence_size)
        return batch_size * num_rank_tokens * self.transformer.width * self.element_bytes

    @property
    def _attention_units(self) -> float:
        """Attention's output and its statistic per row and head, in U."""
        return 1 + 4 * self.transformer.num_heads / (self.transformer.width * self.element_bytes)

    def _kept_units(self, blocks: BlockCheckpointing) -> float:
        """Tensors that all blocks together keep until the backward pass, in U."""
        num_layers = self.transformer.num_layers - blocks.num_kept_blocks
        kept = {
            "none": num_layers * (1 + self.saved_units),
            "selective": num_layers * (1 + self._attention_units),
            "full": float(num_layers),
            "full+offload": float(min(2, num_layers)),
        }[blocks.mode]
        return kept + blocks.num_kept_blocks * (1 + self.saved_units)

    def _block_units(self, blocks: BlockCheckpointing) -> float:
        """Tensors at the peak of the backward pass in addition to `_kept_units`, in U.

        The peak is in a block without recomputation, or in one with recomputation, when the activations of all blocks
        without it have been freed. These are the last blocks.
        """

        def peak(mode: str) -> float:
            return (
                self._recomputed_units(mode)
                + self._gradient_units
                + (_fp8_matmul_units(mode) if self.fp8_matmul else 0.0)
            )

        if not blocks.num_kept_blocks:
            return peak(blocks.mode)
        return max(peak("none"), peak(blocks.mode) - blocks.num_kept_blocks * (1 + self.saved_units))

    def _recomputed_units(self, mode: str) -> float:
        """Tensors that a block saves when it is recomputed, in U."""
        if mode == "none":
            return 0.0
        return self.saved_units - (self._attention_units if mode == "selective" else 0.0)

    @property
    def _gradient_units(self) -> float:
        """Gradients at the peak of a block's backward pass, in addition to all tensors that the block saved, in U.

        The peak is at GELU: the gradient of the block's output (1), and of GELU's input and output (8). If the second
        feed-forward layer is trained, its saved input is freed by then. The peak is then at that layer: the gradients
        of the block's output (1), and of the layer's output (1) and input (4). In both cases, the tensor saved by the
        last gate (1) has been freed.
        """
        layers = self.trained.block_layers
        return (6 if "ff.net.2" in layers else 9) - ("norm2.linear" in layers)

    def _inputs_and_loss_bytes(self, shape: ClipShape) -> int:
        """Bytes per clip for text states, moments, and latents.

        In float32: the clean, noise, noisy, target and predicted latents and the difference. In the run's precision:
        the moments (2), the transformer's inputs (latents, and in image-to-video image latents) and its output (1).
        Of a control video: its latents in float32; in the run's precision its moments (2), the input and its patches.
        """
        geometry, num_inputs = self.geometry, 2 if self.geometry.family.takes_image else 1
        height, width = shape.height // geometry.vae_spatial, shape.width // geometry.vae_spatial
        latents = geometry.latent_channels * padded_latent_frames(shape.frames, geometry) * height * width
        text = geometry.text_tokens * self.transformer.text_dim
        control = latents * (4 + 4 * self.element_bytes) if self.has_control else 0
        return latents * (6 * 4 + (2 + num_inputs + 1) * self.element_bytes) + text * self.element_bytes + control

    def cached_clip_bytes(self, shape: ClipShape) -> int:
        """Bytes of an encoded clip with the frames that the condition modes need."""
        num_frames = self._num_condition_frames(shape)
        return cached_clip_bytes(shape, self.geometry, self.element_bytes, num_frames, self.has_control)

    def _num_condition_frames(self, shape: ClipShape) -> int:
        return len(condition_frames(self.modes, shape.frames, self.geometry, self.condition))

    def _condition_encode_bytes(self, shape: ClipShape, batch_size: int) -> int:
        """Bytes for encoding the condition: one image, or one prefix or suffix, at a time and without tiles.

        The batch's condition frames exist as uint8 and in the run's precision.
        """
        if not self.geometry.family.takes_image:
            return 0
        pieces = [
            piece for mode in self.modes for piece in pieces_of(mode, shape.frames, self.geometry, self.condition)
        ]
        if not pieces:
            return 0
        longest = dataclasses.replace(shape, frames=max(len(piece.frames) for piece in pieces))
        pixels = batch_size * self._num_condition_frames(shape) * 3 * shape.height * shape.width
        return vae_encode_bytes(longest, False, self.vae, self.element_bytes) + pixels * (1 + self.element_bytes)

    def _clip_encode_bytes(self, shape: ClipShape, batch_size: int, on_the_fly: OnTheFlyEncoding) -> int:
        """Bytes for encoding later clips while this one is trained, and for the encoded batches.

        The next clips may be of any bucket. T5 runs before and after the VAE, and needs less.
        """
        encode_bytes = max(
            vae_encode_bytes(bucket, bucket in on_the_fly.tiled, self.vae, self.element_bytes)
            for bucket in {shape, *self.buckets}
        )
        sample_bytes = self.cached_clip_bytes(shape)
        sample_bytes += cached_caption_bytes(self.geometry, self.transformer.text_dim, self.element_bytes)
        return encode_bytes + on_the_fly.num_batches * batch_size * sample_bytes

    @property
    def _position_bytes(self) -> int:
        """Learned and fixed position embeddings: a buffer on every rank, for the sample size and the caption."""
        if self.geometry.family.positions in ("rope_slice", "rope_resize"):
            return 0
        return num_tokens(self.geometry.sample_size, self.geometry) * self.transformer.width * self.element_bytes

    @property
    def _lora_persists(self) -> bool:
        """Whether ZeRO-3 keeps the LoRA matrices whole on every rank. Judged by the matrices of attention."""
        trained = self.trained
        return trained.is_lora and trained.rank * self.transformer.width <= self.zero.param_persistence_threshold

    @property
    def _lora_per_block(self) -> int:
        """Parameters of a LoRA in one block."""
        return self.trained.num_parameters // self.transformer.num_layers if self.trained.is_lora else 0

    @property
    def _largest_gradient(self) -> int:
        """Elements of the largest gradient of a weight of the transformer, 0 if a LoRA is trained."""
        return 0 if self.trained.is_lora else 4 * self.transformer.width**2

    @property
    def _gathered_block_size(self) -> int:
        """Elements that ZeRO-3 gathers for one block, without norms and biases (0.06%)."""
        return self.transformer.block_weights + (0 if self._lora_persists else self._lora_per_block)

    @property
    def _num_gathered_blocks(self) -> float:
        """Blocks whose weights are gathered at the same time under ZeRO-3, which gathers whole blocks (leaf modules).

        The peak is between the forward and the backward pass. DeepSpeed releases a block after its forward pass, unless
        its weights are used again within stage3_max_reuse_distance elements. DeepSpeed 0.19.8 counts the backward pass
        of the whole transformer, which precedes that of the last block, as a use of all weights. So the last blocks
        stay gathered, up to that distance. On top come prefetched weights: up to stage3_prefetch_bucket_size elements
        at each module between the passes, until stage3_max_live_parameters are gathered, which the last weight may
        exceed by at most 4 d^2. Read in partitioned_param_coordinator.py and confirmed on 12 small blocks.
        """
        zero, block = self.zero, self._gathered_block_size
        used = self.transformer.block_weights + self._lora_per_block
        waiting = max(1, -(-zero.max_reuse_distance // used)) * block
        ahead = min(zero.max_live_parameters - waiting, NUM_PREFETCHING_MODULES * zero.prefetch_bucket_size)
        live = waiting + (ahead + 4 * self.transformer.width**2 if ahead > 0 else 0)
        return min(float(self.transformer.num_layers), live / block)


def base_weights_bytes(transformer: TransformerSize, quantization: str, element_bytes: int) -> int:
    """All weights of the transformer, unsharded. With quantization, the linear layers of the blocks are quantized."""
    total = transformer.num_parameters * element_bytes
    if quantization == "none":
        return total
    packed, weights = QUANTIZED_FORMATS[quantization], transformer.block_weights
    num_scales = weights // packed.scale_group if packed.scale_group else transformer.block_rows
    saved = weights * element_bytes - round(weights * packed.weight_bytes) - 4 * num_scales
    return total - transformer.num_layers * saved


def unpacked_weight_bytes(quantization: str, fp8_matmul: bool, element_bytes: int) -> int:
    """Bytes per element of a quantized weight while it is unpacked for a matmul."""
    if quantization == "none":
        return 0
    unpacking = FP8_MATMUL_UNPACKING_BYTES if fp8_matmul else QUANTIZED_FORMATS[quantization].unpacking_bytes
    return element_bytes + unpacking


def rotary_tables_bytes(shape: ClipShape, geometry: ModelGeometry) -> int:
    """The two float32 tables [video tokens, head_dim] of a bucket. The trainer keeps them for every bucket."""
    time, height, width = token_grid(shape, geometry)
    return 2 * 4 * time * height * width * geometry.head_dim if geometry.family.has_rope else 0


def _fp8_matmul_units(mode: str) -> float:
    """Tensors that fp8 matmuls add to the peak of a block that is not compiled, in U.

    Rows are rounded by way of float32. At the width of the feed-forward, 4 U, that is 8 U and 2 U of codes. They exist
    in the block's forward pass or in the backward pass of the feed-forward's first layer. Without recomputation, less
    of the memory counted otherwise is alive then. Confirmed in runs on the meta device with the real shapes.
    """
    return 3.0 if mode == "none" else 8.0
