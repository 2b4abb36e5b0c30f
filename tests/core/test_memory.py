"""The memory model, compared with the bytes of all tensors that are alive while the real classes run."""

import dataclasses
import math
from itertools import pairwise

import pytest
import torch
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as estimate_zero3
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as estimate_zero2
from diffusers import AutoencoderKLCogVideoX
from peft import LoraConfig
from transformers import T5Config, T5EncoderModel

from cogds.core.checkpointing import CHECKPOINTING_MODES, BlockCheckpointing
from cogds.core.condition_modes import ConditionSettings
from cogds.core.flops import step_flops
from cogds.core.geometry import (
    ClipShape,
    cached_caption_bytes,
    cached_clip_bytes,
    num_tokens,
    padded_latent_frames,
    token_grid,
)
from cogds.core.memory import (
    CUDA_CONTEXT_BYTES,
    OnTheFlyEncoding,
    TrainedSize,
    TransformerSize,
    ZeroSettings,
    base_weights_bytes,
    rotary_tables_bytes,
)
from cogds.core.vae_memory import COGVIDEOX_VAE, vae_encode_bytes
from cogds.encode.encoder import encode_pixels
from cogds.model.transformer import checkpointing as checkpointing_module
from cogds.model.transformer import forward as transformer_module
from cogds.model.transformer import quantize
from cogds.model.transformer import sequence_parallel as sequence_module
from cogds.model.transformer.forward import Transformer
from cogds.model.transformer.quantize import FP8_MATMUL, Packed, PackedLinear, pack_block
from cogds.model.transformer.sequence_parallel import SequenceGroup
from tests.live_bytes import LiveBytes
from tests.published_model import ATTENTION, FULL, LORA, PUBLISHED, TRANSFORMER, V15, published_memory

FULL_UNIT = 45_106 * 3072 * 2  # bytes of the hidden states of a clip of shape FULL in bf16


class OffloadedTensor(checkpointing_module._OffloadedTensor):
    """A block's input on the "host", which is the same device here. It counts only while it is back on the "GPU"."""

    live: LiveBytes

    def __init__(self, tensor, stream, pool):
        super().__init__(tensor, stream, pool)
        self.live.discount(self.host)

    def prefetch(self, stream):  # noqa: ARG002
        if self.fetched is None:
            self.fetched = self.host.clone()

    def fetch(self, stream):
        self.prefetch(stream)
        tensor, self.fetched = self.fetched, None
        return tensor


def flash_attention(query, key, value, kernel):  # noqa: ARG001
    """FlashAttention's operator. Even without a GPU, torch knows the shapes that it returns and saves."""
    operation = torch.ops.aten._scaled_dot_product_flash_attention.default
    assert operation in checkpointing_module._ATTENTION
    return operation(*(tensor.transpose(1, 2) for tensor in (query, key, value)))[0].transpose(1, 2)


def pack_for_fp8_matmul(block):
    """Like `pack_block` for fp8 matmuls, without values."""
    pack_block(block, "none", True, fill=False)
    for layer in block.modules():
        if isinstance(layer, PackedLinear):
            rows, columns = layer.shape
            parts = [torch.empty(n, m, dtype=torch.float8_e4m3fn) for n, m in ((rows, columns), (columns, rows))]
            scales = [torch.empty(n, 1) for n in (rows, columns)]
            layer.packed = Packed(FP8_MATMUL, layer.shape, torch.bfloat16, (parts[0], scales[0], parts[1], scales[1]))


def train_once(monkeypatch, model, shape, checkpointing, device):
    """Train the real transformer, or a real LoRA on it, as `model` describes them, for one step on rank 0.

    Returns the live bytes after the forward pass and the peak of the backward pass, without weights and inputs.
    """
    size, dtype = model.transformer, {"bf16": torch.bfloat16, "fp32": torch.float32}[model.precision]
    geometry, family = model.geometry, model.geometry.family
    frames, height, width = padded_latent_frames(shape.frames, geometry), shape.height // 8, shape.width // 8
    channels = 32 if family.takes_image else 16
    with torch.device(device):
        transformer = Transformer(
            num_attention_heads=size.num_heads, attention_head_dim=size.head_dim, in_channels=channels, out_channels=16,
            time_embed_dim=32, ofs_embed_dim=32 if family.has_ofs else None, text_embed_dim=size.text_dim,
            num_layers=size.num_layers, sample_width=geometry.sample_width, sample_height=geometry.sample_height,
            sample_frames=geometry.sample_frames, patch_size=2, patch_size_t=geometry.patch_size_t,
            max_text_seq_length=geometry.text_tokens, use_rotary_positional_embeddings=family.has_rope,
            use_learned_positional_embeddings=geometry.has_fixed_size, patch_bias=False,
        ).requires_grad_(False)  # fmt: skip
        if model.fp8_matmul:
            for block in transformer.transformer_blocks:
                pack_for_fp8_matmul(block)
        if rank := model.trained.rank:
            targets = list(model.trained.block_layers)
            transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))
        else:
            transformer.requires_grad_()
            for parameter in transformer.parameters():  # as ZeRO, which reduces a gradient when it is there
                parameter.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", None))
        for parameter in transformer.parameters():
            parameter.data = parameter.data.to(dtype)
        transformer.train()
        transformer.set_checkpointing(checkpointing)
        if model.sequence_size > 1:
            transformer.share_sequence(SequenceGroup("a group without communication", model.sequence_size, 0))
        num_video_tokens = math.prod(token_grid(shape, geometry))
        inputs = {
            "hidden_states": torch.zeros(1, frames, channels, height, width, dtype=dtype),
            "encoder_hidden_states": torch.zeros(1, geometry.text_tokens, size.text_dim, dtype=dtype),
            "timestep": torch.zeros(1, dtype=torch.long),
            "ofs": torch.zeros(1, dtype=dtype),
        }
        tables = [torch.zeros(num_video_tokens, size.head_dim) for _ in range(2)]
        rotary = tuple(tables) if family.has_rope else None
        live = LiveBytes([*transformer.parameters(), *transformer.buffers(), *inputs.values(), *tables])
        monkeypatch.setattr(OffloadedTensor, "live", live, raising=False)
        monkeypatch.setattr(checkpointing_module, "_OffloadedTensor", OffloadedTensor)
        with live:
            output = transformer(**inputs, image_rotary_emb=rotary, return_dict=False)[0]
            kept, live.peak = live.live, 0
            output.float().square().mean().backward()
        return kept, live.peak


def four_blocks(layers=ATTENTION, **changes):
    """Memory model of four blocks of the published model, with a LoRA on these layers."""
    lora = TrainedSize(0, 128, frozenset(layers))
    return published_memory(transformer=dataclasses.replace(TRANSFORMER, num_layers=4), trained=lora, **changes)


FEED_FORWARD = (*ATTENTION, "ff.net.0.proj", "ff.net.2")
ALL_LAYERS = (*FEED_FORWARD, "norm1.linear", "norm2.linear")
CASES = [(ATTENTION, mode) for mode in CHECKPOINTING_MODES]
CASES += [(layers, mode) for layers in (ATTENTION[:1], FEED_FORWARD, ALL_LAYERS) for mode in ("none", "full")]
CASES += [
    (ATTENTION, BlockCheckpointing(mode, num, 4)) for mode, num in (("selective", 1), ("selective", 3), ("full", 2))
]
CASES += [(FEED_FORWARD, BlockCheckpointing("full", 1, 4)), (ATTENTION, BlockCheckpointing("full+offload", 2, 4))]


@pytest.mark.slow
@pytest.mark.parametrize("layers, blocks", CASES, ids=[f"{len(layers)}-{blocks}" for layers, blocks in CASES])
def test_activations_at_the_published_size(monkeypatch, layers, blocks):
    """On the meta device: within 4%."""
    monkeypatch.setattr(transformer_module, "attend", flash_attention)
    model = four_blocks(layers)
    kept, peak = train_once(monkeypatch, model, FULL, blocks, "meta")
    estimate = model.estimate(FULL, 1, blocks)
    # Two inputs are on the GPU while they are copied: on the way back, or if the next blocks keep everything, still on
    # the way to the host. The test's copies are done at once.
    copying = 2 * FULL_UNIT if "full+offload" in str(blocks) else 0
    is_done = copying if isinstance(blocks, BlockCheckpointing) else 0
    assert estimate.activations_bytes - is_done == pytest.approx(peak, rel=0.04)
    # After the forward pass, the last block's output and the head's input are alive too.
    assert estimate.kept_activations_bytes - copying + 2 * FULL_UNIT == pytest.approx(kept, rel=0.04)


@pytest.mark.parametrize("mode", [pytest.param("none", marks=pytest.mark.slow), "full"])
def test_activations_of_a_full_fine_tune(monkeypatch, mode):
    """On the meta device, with the gradient of one weight at a time: within 4%."""
    monkeypatch.setattr(transformer_module, "attend", flash_attention)
    four = dataclasses.replace(TRANSFORMER, num_layers=4)
    everything = published_memory(
        transformer=four, trained=TrainedSize(TRANSFORMER.num_parameters, 0, frozenset(ALL_LAYERS))
    )
    _, peak = train_once(monkeypatch, everything, FULL, mode, "meta")
    gradient = 2 * 4 * four.width**2
    assert everything.estimate(FULL, 1, mode).activations_bytes + gradient == pytest.approx(peak, rel=0.04)


def test_a_full_fine_tune_shards_weights_gradients_and_states():
    """By hand, and against DeepSpeed's own estimators of model states."""
    parameters, width = TRANSFORMER.num_parameters, TRANSFORMER.width
    trained = TrainedSize(parameters, 0, frozenset(ALL_LAYERS))
    for stage, offload in ((1, False), (2, False), (2, True), (3, False), (3, True)):
        zero = ZeroSettings(stage, offload_optimizer=offload, offload_param=offload and stage == 3)
        model = published_memory(trained=trained, zero=zero, num_ranks=8)
        found = model.estimate(FULL, 1, "full")
        assert found.base_weights_bytes == 0
        assert found.trained_weights_bytes == {3: 0 if offload else 2 * parameters / 8}.get(stage, 2 * parameters)
        assert found.trained_gradients_bytes == (0 if offload else 2 * parameters / (1 if stage == 1 else 8))
        assert found.optimizer_state_bytes == (0 if offload else 12 * parameters / 8)
        assert found.optimizer_step_bytes == (0 if offload else 4 * parameters / 8)
        assert model.offloaded_optimizer_bytes == (16 * parameters / 8 if offload else 0)
        assert found.reduce_buffers_bytes == 2 * (500_000_000 + 4 * width**2)
        states = sum(found.terms()[name] for name in ("trained weights", "trained gradients", "optimizer state",
                                                      "optimizer step"))  # fmt: skip
        if stage == 2:
            assert states == estimate_zero2(parameters, num_gpus_per_node=8, cpu_offload=offload)[1]
        if stage == 3:
            options = {"num_gpus_per_node": 8, "cpu_offload": offload, "cpu_offload_params": offload}
            # DeepSpeed's estimate leaves out the bf16 gradients, of which it makes the float32 ones.
            assert states == estimate_zero3(parameters, 0, **options)[1] + (0 if offload else 2 * parameters / 8)
    averaged = published_memory(trained=trained, zero=ZeroSettings(2), num_ranks=8, ema_on_gpu=True)
    assert averaged.estimate(FULL, 1, "full").moving_average_bytes == 4 * parameters / 8
    part = dataclasses.replace(trained, num_parameters=parameters // 4)
    found = published_memory(trained=part, zero=ZeroSettings(2), num_ranks=8).estimate(FULL, 1, "full")
    assert found.base_weights_bytes == 2 * (parameters - parameters // 4)


@pytest.mark.slow
@pytest.mark.parametrize("mode", CHECKPOINTING_MODES[:3])
@pytest.mark.parametrize("name", [name for name in PUBLISHED if PUBLISHED[name] != V15])
def test_activations_of_the_other_members(monkeypatch, name, mode):
    """At the size that each was trained for, on the meta device: within 4%."""
    monkeypatch.setattr(transformer_module, "attend", flash_attention)
    geometry = PUBLISHED[name]
    size = dataclasses.replace(TRANSFORMER, num_layers=4, num_heads=30 if name == "CogVideoX-2b" else 48)
    shape = geometry.trained_size
    model = four_blocks(geometry=geometry, buckets=(shape,))
    model = dataclasses.replace(model, transformer=size)
    _, peak = train_once(monkeypatch, model, shape, mode, "meta")
    assert model.estimate(shape, 1, mode).activations_bytes == pytest.approx(peak, rel=0.04)


@pytest.mark.parametrize(
    "name, num_parameters, gigabytes, tflop",
    [
        ("CogVideoX1.5-5B-I2V", 5_571_594_880, (44, 33), 4008),
        ("CogVideoX1.5-5B", 5_570_676_352, (44, 33), 4008),
        ("CogVideoX-5b-I2V", 5_570_479_680, (26, 22), 827),
        ("CogVideoX-5b", 5_570_283_072, (26, 22), 827),
        ("CogVideoX-2b", 1_693_783_872, (11, 9), 313),
    ],
)
def test_the_figures_of_every_member_in_the_docs(name, num_parameters, gigabytes, tflop):
    geometry, is_2b = PUBLISHED[name], name == "CogVideoX-2b"
    num_layers, num_heads = (30, 30) if is_2b else (42, 48)
    width, shape = 64 * num_heads, geometry.trained_size
    num_lora = num_layers * 4 * 2 * 128 * width
    model = published_memory(
        geometry=geometry, buckets=(shape,), trained=TrainedSize(num_lora, 128, frozenset(ATTENTION)),
        transformer=TransformerSize(num_parameters, num_layers, num_heads, 64, 4096),
        zero=ZeroSettings(stage=2, reduce_bucket_size=width**2),
    )  # fmt: skip
    sizes = [model.estimate(shape, 1, mode).total_bytes for mode in ("selective", "full")]
    assert [size / 1e9 for size in sizes] == pytest.approx(gigabytes, abs=0.55)
    flops = step_flops(num_tokens(shape, geometry), num_layers, width, num_lora)
    assert flops.model_flops / 1e12 == pytest.approx(tflop, rel=1e-3)


def test_what_text_to_video_does_not_need():
    image, text = (published_memory(geometry=PUBLISHED[name]) for name in ("CogVideoX1.5-5B-I2V", "CogVideoX1.5-5B"))
    image, text = (model.estimate(FULL, 1, "full") for model in (image, text))
    assert image.condition_encode_bytes > 0
    assert text.condition_encode_bytes == 0
    latents = 16 * 22 * 96 * 170 * 2  # those of the image
    assert image.inputs_and_loss_bytes - text.inputs_and_loss_bytes == latents
    sincos = published_memory(geometry=PUBLISHED["CogVideoX-2b"], buckets=(PUBLISHED["CogVideoX-2b"].trained_size,))
    sincos = sincos.estimate(sincos.buckets[0], 1, "full")
    assert sincos.rotary_tables_bytes == 0
    positions = (13 * 30 * 45 + 226) * TRANSFORMER.width * 2  # of 49x480x720
    assert sincos.base_weights_bytes - text.base_weights_bytes == positions


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_activations_with_sequence_parallelism(monkeypatch, mode):
    """On the meta device, where the collectives only return shapes: within 4%."""
    monkeypatch.setattr(sequence_module, "attend", flash_attention)
    model = four_blocks(sequence_size=2)
    _, peak = train_once(monkeypatch, model, FULL, mode, "meta")
    assert model.estimate(FULL, 1, mode).activations_bytes == pytest.approx(peak, rel=0.04)


@pytest.mark.slow
@pytest.mark.parametrize("layers", [ATTENTION, FEED_FORWARD], ids=["attention", "feed_forward"])
@pytest.mark.parametrize("mode", ["none", "full", BlockCheckpointing("full", 1, 4)], ids=str)
def test_activations_of_fp8_matmuls(monkeypatch, mode, layers):
    """In a block that is not compiled: within 5%."""
    monkeypatch.setattr(transformer_module, "attend", flash_attention)
    # peft reads the dtype and device of a weight. Nothing else unpacks it.
    monkeypatch.setattr(quantize, "_unpack", lambda _, shape, dtype, __: torch.empty(shape, dtype=dtype))
    model = four_blocks(layers, fp8_matmul=True)
    _, peak = train_once(monkeypatch, model, FULL, mode, "meta")
    assert model.estimate(FULL, 1, mode).activations_bytes == pytest.approx(peak, rel=0.05)


@pytest.mark.parametrize(
    "blocks",
    [*CHECKPOINTING_MODES, *(BlockCheckpointing(*split, 3) for split in (("selective", 1), ("full", 2)))],
    ids=str,
)
def test_activations_of_a_small_model_on_the_cpu(monkeypatch, blocks):
    """In float32 with torch's own attention kernel: within 3%."""
    size = TransformerSize(0, num_layers=4, num_heads=4, head_dim=64, text_dim=64)
    lora = TrainedSize(0, 4, frozenset(ATTENTION))
    model, shape = published_memory(transformer=size, trained=lora, precision="fp32"), ClipShape(21, 128, 160)
    _, peak = train_once(monkeypatch, model, shape, blocks, "cpu")
    assert model.estimate(shape, 1, blocks).activations_bytes == pytest.approx(peak, rel=0.03)


def test_saved_tensors_follow_the_adapted_layers():
    def units(*layers, rank=0):
        return published_memory(trained=TrainedSize(0, rank, frozenset(layers))).saved_units

    assert units(*ATTENTION[:3]) - units() == units("attn1.to_k") - units() == 1  # q, k and v read one tensor
    assert units(*ATTENTION, rank=1536) - units(*ATTENTION) == pytest.approx(4 * 1536 / 3072)
    assert units("attn1.to_out.0") == units()  # its input, attention's output, is saved anyway
    assert units("ff.net.2") - units() == 4


def estimate(num_ranks=1, batch_size=1, mode="full", shape=FULL, changes=None, **section):
    """Estimate for the published model with a `zero_optimization` section."""
    model = published_memory(zero=ZeroSettings.from_config(section), num_ranks=num_ranks, **(changes or {}))
    return model.estimate(shape, batch_size, mode)


def test_zero_stages_shard_their_tensors():
    zero1, zero2, zero3 = estimates = [estimate(8, stage=stage, reduce_bucket_size=1000) for stage in (1, 2, 3)]
    base, lora = TRANSFORMER.num_parameters, LORA.num_parameters
    assert [e.optimizer_state_bytes for e in estimates] == [12 * lora // 8] * 3
    assert [e.trained_gradients_bytes for e in estimates] == [2 * lora, 2 * lora // 8, 2 * lora // 8]
    assert [e.base_weights_bytes for e in estimates] == [2 * base, 2 * base, 2 * base // 8]
    assert [e.trained_weights_bytes for e in estimates] == [2 * lora, 2 * lora, 2 * lora // 8]
    assert zero1.gathered_weights_bytes == zero2.gathered_weights_bytes == 0 < zero3.gathered_weights_bytes
    assert len({e.kept_activations_bytes for e in estimates}) == 1
    assert estimate(8, stage=0).optimizer_state_bytes == 8 * lora
    # The LoRA matrices, 128 x 3072 elements, stay whole in addition to their shards.
    persistent = estimate(8, stage=3, stage3_param_persistence_threshold=400_000)
    assert persistent.trained_weights_bytes == 2 * lora // 8 + 2 * lora


def test_blocks_gathered_by_zero3():
    """As observed with DeepSpeed 0.19.8 on 12 small blocks with the same proportions."""
    block = TRANSFORMER.block_weights + LORA.num_parameters // 42

    def num_blocks(**zero):
        section = {f"stage3_{name}": int(size) for name, size in zero.items()}
        return estimate(8, stage=3, **section).gathered_weights_bytes / (2 * block)

    alone = {"max_reuse_distance": 0, "prefetch_bucket_size": 0}
    assert num_blocks(**alone) == 1
    assert [num_blocks(**alone | {"max_reuse_distance": n * block}) for n in (0.5, 1, 1.5, 3)] == [1, 1, 2, 3]
    assert num_blocks(**alone | {"max_reuse_distance": 1e12}) == 42
    # Without a limit on live parameters, a block is prefetched at every module between the passes.
    ahead = {"max_reuse_distance": 0, "prefetch_bucket_size": block}
    assert num_blocks(**ahead, max_live_parameters=1e12) == pytest.approx(1 + 12 + 4 * 3072**2 / block)
    assert num_blocks(**ahead, max_live_parameters=3 * block) == pytest.approx(3 + 4 * 3072**2 / block)
    assert num_blocks(**ahead, max_live_parameters=block) == 1
    assert num_blocks(max_reuse_distance=3 * block, max_live_parameters=2 * block, prefetch_bucket_size=block) == 3
    # The activations of a short clip's block are smaller than the copy of the block's weights.
    short = estimate(8, stage=3, shape=ClipShape(1, 64, 64))
    assert short.block_activations_bytes == 2 * block


def test_quantized_weights():
    """Compared with the linear layers of a real transformer."""
    with torch.device("meta"):
        empty = Transformer(
            num_attention_heads=8, attention_head_dim=64, num_layers=3, time_embed_dim=96, text_embed_dim=64,
            use_rotary_positional_embeddings=True, patch_size_t=2, sample_width=30, sample_height=30,
        )  # fmt: skip
    total = sum(parameter.numel() for parameter in empty.parameters())
    size = TransformerSize.from_config(empty.config, total)
    linear = [m for block in empty.transformer_blocks for m in block.modules() if isinstance(m, torch.nn.Linear)]
    weights, rows = sum(m.weight.numel() for m in linear), sum(m.out_features for m in linear)
    assert size.num_layers * size.block_weights == weights
    assert size.num_layers * size.block_rows == rows
    for element_bytes in (2, 4):
        rest = (total - weights) * element_bytes
        assert base_weights_bytes(size, "none", element_bytes) == total * element_bytes
        assert base_weights_bytes(size, "int8", element_bytes) == rest + weights + 4 * rows
        assert base_weights_bytes(size, "fp8", element_bytes) == rest + weights + 4 * rows
        assert base_weights_bytes(size, "nf4", element_bytes) == rest + weights // 2 + 4 * weights // 64
    full, nf4 = estimate(stage=2), estimate(stage=2, changes={"quantization": "nf4"})
    assert full.base_weights_bytes > 3.5 * nf4.base_weights_bytes
    assert full.unpacked_weight_bytes == 0 < nf4.unpacked_weight_bytes


def test_sequence_parallelism_divides_activations():
    one, two, four = (estimate(8, stage=2, changes={"sequence_size": size}) for size in (1, 2, 4))
    assert one.kept_activations_bytes == pytest.approx(2 * two.kept_activations_bytes, rel=1e-4)
    # The ranks receive attention's output for their tokens as a copy, which the output layer's LoRA saves.
    units = two.block_activations_bytes / (FULL_UNIT / 2)
    assert units == pytest.approx(one.block_activations_bytes / FULL_UNIT + 1, rel=1e-4)
    assert two.block_activations_bytes == pytest.approx(2 * four.block_activations_bytes, rel=1e-4)
    assert one.base_weights_bytes == four.base_weights_bytes


def test_offload_frees_gpu_memory():
    offload = {"device": "cpu"}
    both = estimate(2, stage=3, offload_optimizer=offload, offload_param=offload)
    assert both.base_weights_bytes == both.trained_weights_bytes == both.optimizer_state_bytes == 0
    assert both.trained_gradients_bytes == both.optimizer_step_bytes == 0
    assert both.gathered_weights_bytes > 0
    none = {"device": "none"}
    assert estimate(2, stage=3, offload_optimizer=none, offload_param=none) == estimate(2, stage=3)


def test_overlapping_communication_doubles_the_buffers():
    assert estimate(stage=2, reduce_bucket_size=10, overlap_comm=True).reduce_buffers_bytes == 40
    assert estimate(stage=2, reduce_bucket_size=10).reduce_buffers_bytes == 20
    assert estimate(stage=2, reduce_bucket_size="auto").reduce_buffers_bytes == 2 * 500_000_000


def test_the_total_is_the_largest_peak():
    backward = estimate(stage=2, reduce_bucket_size=1000)
    other_peaks = backward.condition_encode_bytes + backward.optimizer_step_bytes
    resident = sum(backward.terms().values()) - backward.activations_bytes - other_peaks
    assert backward.total_bytes == resident + backward.activations_bytes
    assert backward.terms()["cuda context"] == CUDA_CONTEXT_BYTES
    tiny = dataclasses.replace(backward, kept_activations_bytes=0, block_activations_bytes=0)
    assert tiny.total_bytes == resident + tiny.condition_encode_bytes
    assert backward.fits(backward.total_bytes / 0.91)
    assert not backward.fits(backward.total_bytes / 0.93)


def test_total_of_a_full_clip():
    """For other trainers, with other buffers, 32 and 35 GB have been published."""
    assert 28e9 < estimate(stage=2, reduce_bucket_size=9_437_184, overlap_comm=True).total_bytes < 38e9
    assert estimate(stage=2, mode="none").total_bytes > 150e9
    double = estimate(stage=2, batch_size=2)
    assert double.kept_activations_bytes == 2 * estimate(stage=2).kept_activations_bytes


def test_rotary_tables_of_all_buckets_are_counted():
    short = ClipShape(49, 480, 720)
    one, two = (published_memory(buckets=buckets).estimate(FULL, 1, "full") for buckets in ((FULL,), (FULL, short)))
    assert rotary_tables_bytes(FULL, V15) == one.rotary_tables_bytes == 2 * 4 * 44_880 * 64
    assert two.rotary_tables_bytes - one.rotary_tables_bytes == rotary_tables_bytes(short, V15)
    assert two.total_bytes > one.total_bytes


T5_XXL = T5Config(
    d_model=4096, d_ff=10240, num_layers=24, num_heads=64, d_kv=64, vocab_size=32128, feed_forward_proj="gated-gelu"
)  # fmt: skip
NUM_T5 = 4_762_310_656


@pytest.mark.parametrize(
    "size, is_tiled", [("17x480x720", False), pytest.param("17x768x1360", True, marks=pytest.mark.slow)]
)
def test_encoding_on_the_fly(size, is_tiled):
    """Published T5 and VAE on the meta device, as `on_the_fly` runs them: within 3%."""
    shape = ClipShape.parse(size)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"), torch.no_grad(), LiveBytes() as live:
            vae = AutoencoderKLCogVideoX(
                block_out_channels=COGVIDEOX_VAE.channels, down_block_types=("CogVideoXDownBlock3D",) * 4,
                up_block_types=("CogVideoXUpBlock3D",) * 4, latent_channels=16, layers_per_block=3,
            ).eval()  # fmt: skip
            text_encoder = T5EncoderModel(T5_XXL).eval()
            live.peak = weights = live.live
            batches = []
            for _ in range(3):
                pixels = torch.zeros(shape.frames, shape.height, shape.width, 3, dtype=torch.uint8)
                live.discount(pixels)  # in host memory
                moments = encode_pixels(vae, pixels, is_tiled)
                text_states = text_encoder(torch.zeros(1, V15.text_tokens, dtype=torch.long))[0][0]
                batches.append((moments, pixels[0].clone(), text_states))
    finally:
        torch.set_default_dtype(before)
    on_the_fly = OnTheFlyEncoding(NUM_T5, frozenset([shape] if is_tiled else []), len(batches))
    model = published_memory(buckets=(shape,), on_the_fly=on_the_fly)
    beside, cached = model.estimate(shape, 1, "full"), published_memory(buckets=(shape,)).estimate(shape, 1, "full")
    assert beside.text_encoder_weights_bytes + beside.second_vae_weights_bytes == pytest.approx(weights, rel=1e-3)
    assert beside.clip_encode_bytes == pytest.approx(live.peak - weights, rel=0.03)
    assert cached.on_the_fly_bytes == 0
    # It exists in every phase of a step.
    assert beside.total_bytes == cached.total_bytes + beside.on_the_fly_bytes
    assert beside.on_the_fly_bytes == sum(beside.terms().values()) - sum(cached.terms().values())


def test_the_next_clips_may_be_of_the_largest_bucket():
    short, on_the_fly = ClipShape(49, 480, 720), OnTheFlyEncoding(NUM_T5, frozenset(), 0)
    model = published_memory(buckets=(short, FULL), on_the_fly=on_the_fly)
    sizes = {model.estimate(shape, 1, "full").clip_encode_bytes for shape in model.buckets}
    assert sizes == {vae_encode_bytes(FULL, False)}
    tiled = dataclasses.replace(model, on_the_fly=dataclasses.replace(on_the_fly, tiled=frozenset([FULL])))
    assert tiled.estimate(FULL, 1, "full").clip_encode_bytes == vae_encode_bytes(short, False) < sizes.pop()


def test_pinned_host_memory():
    """The input of every block in whole pages."""
    pages = 42 * -(-FULL_UNIT // 4096) * 4096

    def pinned(mode="full+offload", batch_size=1, **changes):
        return published_memory(**changes).pinned_host_bytes(FULL, batch_size, mode)

    assert pinned() == pages == pytest.approx(11.64e9, rel=1e-3)
    assert [pinned(mode) for mode in CHECKPOINTING_MODES[:3]] == [0, 0, 0]
    assert pinned(BlockCheckpointing("full+offload", 2, 42)) == pages // 42 * 40
    assert pinned(batch_size=2) == pytest.approx(2 * pages, rel=1e-4)
    assert pinned(precision="fp32") == pytest.approx(2 * pages, rel=1e-4)
    assert pinned(sequence_size=2) == pytest.approx(pages / 2, rel=1e-4)


# ds_configs/*.json, resolved for a width of 3072.
ZERO2 = ZeroSettings(stage=2, reduce_bucket_size=3072**2)
ZERO2_OFFLOAD = dataclasses.replace(ZERO2, offload_optimizer=True)
ZERO3 = ZeroSettings(
    stage=3, reduce_bucket_size=3072**2, prefetch_bucket_size=14 * 3072**2, max_live_parameters=42 * 3072**2,
    max_reuse_distance=42 * 3072**2, param_persistence_threshold=200 * 3072,
)  # fmt: skip
ZERO3_OFFLOAD = dataclasses.replace(ZERO3, offload_optimizer=True, offload_param=True)


def gigabytes(model, mode):
    return round(model.estimate(FULL, 1, mode).total_bytes / 1e9, 1)


def test_the_published_model_on_80_gb():
    one_gpu, eight_gpus = published_memory(zero=ZERO2), published_memory(zero=ZERO2, num_ranks=8)
    assert one_gpu.least_checkpointing(FULL, 1, 80e9) == "selective"
    assert [gigabytes(one_gpu, mode) for mode in CHECKPOINTING_MODES] == [172.5, 44.2, 32.5, 21.4]
    assert [gigabytes(eight_gpus, mode) for mode in CHECKPOINTING_MODES] == [170.9, 42.6, 30.9, 19.8]
    sharded = published_memory(zero=ZERO3, num_ranks=8)
    assert [gigabytes(sharded, mode) for mode in CHECKPOINTING_MODES] == [162.0, 33.7, 21.9, 10.8]
    parallel = published_memory(zero=ZERO2, sequence_size=4, num_ranks=4)
    assert parallel.least_checkpointing(FULL, 1, 80e9) == "none"
    assert one_gpu.least_checkpointing(FULL, 1, 1e9) == "full+offload"  # nothing fits


def test_as_many_blocks_as_fit_keep_their_activations():
    """docs/training.md has these figures. An H100 reports 85 GB, and an H200 150 GB."""
    model = published_memory(zero=ZERO2)
    best = {size: model.best_checkpointing(FULL, 1, size * 1e9) for size in (20, 24, 48, 80, 85, 141, 150, 200)}
    kept = {size: (blocks.mode, blocks.num_kept_blocks) for size, blocks in best.items()}
    assert kept == {
        20: ("full+offload", 0), 24: ("full+offload", 1), 48: ("full", 4), 80: ("selective", 10),
        85: ("selective", 11), 141: ("selective", 28), 150: ("selective", 30), 200: ("none", 0),
    }  # fmt: skip
    assert [gigabytes(model, best[size]) for size in (80, 85, 141, 150)] == [72.4, 75.5, 128.7, 135.0]
    split = [model.estimate(FULL, 1, BlockCheckpointing("selective", num, 42)).total_bytes for num in range(42)]
    assert split[1] == pytest.approx(split[0], rel=1e-6)  # the last block would be recomputed at once
    assert [round((more - less) / 1e9, 2) for less, more in pairwise(split[1:])] == [3.13] * 40
    assert split[41] < model.estimate(FULL, 1, "none").total_bytes
    assert str(best[150]) == "selective, 30 of 42 blocks kept"
    assert str(best[200]) == "none"


@pytest.mark.parametrize(
    "zero, quantization, offloaded, on_gpu",
    [
        (ZERO2, "none", 21.4, 32.5), (ZERO2_OFFLOAD, "none", 19.5, 30.6), (ZERO2_OFFLOAD, "int8", 14.2, 25.3),
        (ZERO2, "nf4", 13.5, 24.6), (ZERO2_OFFLOAD, "nf4", 11.6, 22.7), (ZERO3_OFFLOAD, "none", 9.2, 20.3),
    ],
)  # fmt: skip
def test_settings_for_24_gb(zero, quantization, offloaded, on_gpu):
    """On one GPU, every setting fits with the blocks' inputs on the host; only ZeRO-3 with offload fits without."""
    model = published_memory(zero=zero, quantization=quantization)
    assert (gigabytes(model, "full+offload"), gigabytes(model, "full")) == (offloaded, on_gpu)
    assert model.least_checkpointing(FULL, 1, 24e9) == ("full" if zero is ZERO3_OFFLOAD else "full+offload")


def test_condition_modes_need_a_longer_encoding_and_more_pixels():
    first = published_memory()
    modes = dataclasses.replace(first, modes=("first", "last", "prefix"), condition=ConditionSettings(3))
    pixels = (9 + 1) * 3 * 768 * 1360  # frames 0 to 8 of the prefix, and the last
    prefix = vae_encode_bytes(ClipShape(9, 768, 1360), False)
    assert first.estimate(FULL, 2, "full").condition_encode_bytes == vae_encode_bytes(ClipShape(1, 768, 1360), False)
    assert modes.estimate(FULL, 2, "full").condition_encode_bytes == prefix + 2 * pixels * (1 + 2)
    assert modes.cached_clip_bytes(FULL) - first.cached_clip_bytes(FULL) == pixels
    assert dataclasses.replace(first, modes=("none",)).estimate(FULL, 2, "full").condition_encode_bytes == 0


def test_cache_sizes():
    assert cached_clip_bytes(FULL, V15, 2) == 2 * 16 * 21 * 96 * 170 * 2 + 3 * 768 * 1360
    assert cached_caption_bytes(V15, 4096, 2) == 226 * 4096 * 2


def test_sizes_from_configs_and_targets():
    config = {"num_layers": 42, "num_attention_heads": 48, "attention_head_dim": 64, "text_embed_dim": 4096}
    assert TransformerSize.from_config(config, TRANSFORMER.num_parameters) == TRANSFORMER
    targets = [f"transformer_blocks.{block}.{layer}" for block in range(42) for layer in ATTENTION]
    assert TrainedSize.from_targets([*targets, "proj_out"], 132_120_576, 128) == LORA
