"""The published models of the family, and sizes of CogVideoX1.5-5B-I2V with a LoRA of rank 128, without weights."""

import dataclasses

from cogds.core.geometry import ClipShape, ModelGeometry
from cogds.core.memory import MemoryModel, TrainedSize, TransformerSize, ZeroSettings
from cogds.core.vae_memory import COGVIDEOX_VAE

# As convert_cogvideox_to_diffusers.py of diffusers writes them, and what the models have in common.
_VAE = {"block_out_channels": [128, 256, 256, 512], "temporal_compression_ratio": 4, "latent_channels": 16}
_TRANSFORMER = {"attention_head_dim": 64, "max_text_seq_length": 226, "patch_size": 2}
_V15 = {"patch_size_t": 2, "sample_height": 300, "sample_width": 300, "sample_frames": 81}
_V10 = {"patch_size_t": None, "sample_height": 60, "sample_width": 90, "sample_frames": 49}
_IMAGE, _TEXT = {"in_channels": 32}, {"in_channels": 16}
_ROPE, _SCHEDULER = {"use_rotary_positional_embeddings": True}, {"prediction_type": "v_prediction"}


def published(transformer, scaling_factor=0.7, scheduler="CogVideoXDPMScheduler"):
    """Return the geometry of a model. transformer: what its config has besides what all have."""
    vae = _VAE | {"scaling_factor": scaling_factor, "invert_scale_latents": transformer["patch_size_t"] == 2}
    return ModelGeometry.from_configs(_TRANSFORMER | transformer, vae, _SCHEDULER | {"_class_name": scheduler})


PUBLISHED = {
    "CogVideoX1.5-5B-I2V": published(_V15 | _IMAGE | _ROPE | {"ofs_embed_dim": 512}),
    "CogVideoX1.5-5B": published(_V15 | _TEXT | _ROPE),
    "CogVideoX-5b-I2V": published(_V10 | _IMAGE | _ROPE | {"use_learned_positional_embeddings": True}),
    "CogVideoX-5b": published(_V10 | _TEXT | _ROPE),
    "CogVideoX-2b": published(_V10 | _TEXT, 1.15258426, "CogVideoXDDIMScheduler"),
}
V15 = PUBLISHED["CogVideoX1.5-5B-I2V"]
ATTENTION = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0")
TRANSFORMER = TransformerSize(5_571_594_880, num_layers=42, num_heads=48, head_dim=64, text_dim=4096)
LORA = TrainedSize(132_120_576, 128, frozenset(ATTENTION))
FULL = ClipShape(81, 768, 1360)


def published_memory(**changes):
    """Return its memory model in bf16 on one rank with ZeRO-2 and one bucket, 81x768x1360. changes: other fields."""
    model = MemoryModel(V15, TRANSFORMER, LORA, COGVIDEOX_VAE, ZeroSettings(stage=2), 1, "bf16", (FULL,))
    return dataclasses.replace(model, **changes)
