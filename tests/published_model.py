"""Sizes of the published CogVideoX-1.5-5B-I2V with a LoRA of rank 128, without its weights."""

import dataclasses

from cogds.core.geometry import ClipShape, ModelGeometry
from cogds.core.memory import MemoryModel, TrainedSize, TransformerSize, ZeroSettings
from cogds.core.vae_memory import COGVIDEOX_VAE

V15 = ModelGeometry(
    vae_spatial=8, vae_temporal=4, latent_channels=16, patch_size=2, patch_size_t=2, sample_height=300,
    sample_width=300, sample_frames=81, text_tokens=226, head_dim=64, rope=True, learned_positions=False, ofs=True,
)  # fmt: skip
ATTENTION = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0")
TRANSFORMER = TransformerSize(5_571_594_880, num_layers=42, num_heads=48, head_dim=64, text_dim=4096)
LORA = TrainedSize(132_120_576, 128, frozenset(ATTENTION))
FULL = ClipShape(81, 768, 1360)


def published_memory(**changes):
    """Return its memory model in bf16 on one rank with ZeRO-2 and one bucket, 81x768x1360. changes: other fields."""
    model = MemoryModel(V15, TRANSFORMER, LORA, COGVIDEOX_VAE, ZeroSettings(stage=2), 1, "bf16", (FULL,))
    return dataclasses.replace(model, **changes)
