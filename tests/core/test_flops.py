import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
from peft import LoraConfig, inject_adapter_in_model
from torch.utils.flop_counter import FlopCounterMode

from cogds.core.checkpointing import BlockCheckpointing
from cogds.core.flops import GPUS, PEAK_TFLOPS, estimate_seconds, forward_flops, step_flops, training_flops
from cogds.core.geometry import num_tokens, padded_latent_frames
from cogds.core.memory import TrainedSize
from tests.published_model import LORA, PUBLISHED, TRANSFORMER

TERA = 1e12
REAL = step_flops(45_104, 42, 3072, 132_120_576)


def test_operations_of_the_published_model():
    """Published counts for 42 layers of width 3072."""
    assert forward_flops(45_104, 42, 3072) == pytest.approx(1479e12, rel=1e-3)
    assert forward_flops(15_074, 42, 3072) == pytest.approx(261e12, rel=4e-3)
    assert forward_flops(9_674, 42, 3072) == pytest.approx(140e12, rel=4e-3)


def test_a_step_of_the_published_model():
    assert REAL.attention / REAL.forward == pytest.approx(0.71, abs=0.005)
    assert REAL.backward == pytest.approx((429 + 2 * 1050) * TERA, rel=1e-3)
    assert REAL.model_flops == pytest.approx(4008 * TERA, rel=1e-3)


def test_each_lora_parameter_is_used_once_per_token():
    layers, rank, width = 42 * 4, 128, 3072
    assert REAL.lora == 2 * 45_104 * layers * rank * 2 * width
    assert 3 * REAL.lora == pytest.approx(36 * TERA, rel=0.01)


def test_recomputation_counts_only_as_hardware_flops():
    none, kept, block = (REAL.hardware_flops(checkpointing) for checkpointing in ("none", "selective", "full"))
    assert none == pytest.approx(REAL.model_flops + 0.5 * REAL.attention + 3 * REAL.lora)
    assert kept - none == pytest.approx(REAL.linears + REAL.lora)
    assert block - none == pytest.approx(REAL.forward + REAL.lora)
    assert REAL.hardware_flops("full+offload") == block
    split = REAL.hardware_flops(BlockCheckpointing("selective", 30, 42))
    assert split - none == pytest.approx((kept - none) * 12 / 42)


def test_trained_weights_of_the_transformer_need_weight_gradients():
    whole = training_flops(45_104, TRANSFORMER, TrainedSize(TRANSFORMER.num_parameters, 0, frozenset()))
    half = training_flops(45_104, TRANSFORMER, TrainedSize(TRANSFORMER.num_parameters // 2, 0, frozenset()))
    assert whole.forward == REAL.forward
    assert whole.lora == 0
    assert whole.backward == pytest.approx(2 * whole.linears + 2 * whole.attention)
    assert half.backward == pytest.approx(1.5 * whole.linears + 2 * whole.attention)
    assert training_flops(45_104, TRANSFORMER, LORA) == REAL


def test_operations_of_a_block_counted_by_torch():
    """Forward and backward pass of a frozen block with a LoRA."""
    width, rank, num_text, num_video = 1024, 32, 96, 4000
    with torch.device("meta"):
        block = CogVideoXBlock(width, width // 64, 64, time_embed_dim=64).requires_grad_(False)
        inject_adapter_in_model(LoraConfig(r=rank, target_modules=["to_q", "to_k", "to_v", "to_out.0"]), block)
        num_lora = sum(parameter.numel() for parameter in block.parameters() if parameter.requires_grad)
        video, text = (torch.zeros(1, num, width, requires_grad=True) for num in (num_video, num_text))
        with FlopCounterMode(display=False) as forward:
            outs = block(video, text, torch.zeros(1, 64))
        with FlopCounterMode(display=False) as backward:
            torch.autograd.backward([out.sum() for out in outs])
    flops = step_flops(num_video + num_text, 1, width, num_lora)
    assert forward.get_total_flops() == pytest.approx(flops.forward + flops.lora, rel=1e-3)
    assert backward.get_total_flops() == pytest.approx(flops.backward + 2 * flops.lora, rel=1e-3)


@pytest.mark.parametrize("name", PUBLISHED)
def test_operations_of_every_member_counted_by_torch(name):
    """Forward pass at the size that it was trained for, of the whole transformer with two of its blocks."""
    geometry, num_heads = PUBLISHED[name], 30 if name == "CogVideoX-2b" else 48
    family, shape = geometry.family, geometry.trained_size
    channels, width = 32 if family.takes_image else 16, num_heads * geometry.head_dim
    size = (padded_latent_frames(shape.frames, geometry), channels, shape.height // 8, shape.width // 8)
    with torch.device("meta"):
        transformer = CogVideoXTransformer3DModel(
            num_attention_heads=num_heads, in_channels=channels, num_layers=2, patch_size_t=geometry.patch_size_t,
            ofs_embed_dim=512 if family.has_ofs else None, use_rotary_positional_embeddings=family.has_rope,
            use_learned_positional_embeddings=geometry.has_fixed_size, sample_height=geometry.sample_height,
            sample_width=geometry.sample_width, sample_frames=geometry.sample_frames,
        )  # fmt: skip
        num_video = num_tokens(shape, geometry) - geometry.text_tokens
        tables = (torch.zeros(num_video, geometry.head_dim), torch.zeros(num_video, geometry.head_dim))
        with FlopCounterMode(display=False) as forward, torch.no_grad():
            transformer(
                torch.zeros(1, *size), torch.zeros(1, geometry.text_tokens, 4096), torch.zeros(1),
                ofs=torch.zeros(1), image_rotary_emb=tables if family.has_rope else None,
            )  # fmt: skip
    assert forward.get_total_flops() == pytest.approx(forward_flops(num_tokens(shape, geometry), 2, width), rel=0.02)


def test_every_named_gpu_has_a_peak():
    assert {gpu.device for gpu in GPUS.values()} <= PEAK_TFLOPS.keys()
    assert estimate_seconds(989e12 * 4, GPUS["h100"].device) == pytest.approx(10)
