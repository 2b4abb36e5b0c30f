"""Tiny models of the CogVideoX family with random weights, made of the real classes, for laptop CPUs.

Each member has what its published model has (`MEMBERS`): channels of an image, OFS embedding, temporal patches,
position embeddings, scales, schedule, and T5 with a tokenizer. The default is CogVideoX1.5-5B-I2V. Because of their
random weights, they cannot generate real videos.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from cogds.files import whole_folder

WORDS = [
    "a", "an", "the", "and", "of", "over", "on", "in", "from", "to", "left", "right", "top", "bottom", "up",
    "down", "moves", "rolls", "falls", "grows", "turns", "slowly", "quickly", "red", "green", "blue", "yellow",
    "white", "black", "orange", "purple", "circle", "square", "triangle", "ball", "box", "star", "background",
    "gradient", "video",
]  # fmt: skip
LETTERS = "▁abcdefghijklmnopqrstuvwxyz.,-'"


@dataclass(frozen=True)
class Member:
    """What differs between the models, by diffusers' convert_cogvideox_to_diffusers.py, with a smaller sample size.

    transformer: changes to the config of CogVideoX1.5-5B-I2V.
    """

    transformer: dict = field(default_factory=dict)
    pipeline: type = CogVideoXImageToVideoPipeline
    scaling_factor: float = 0.7
    invert_scale_latents: bool = True
    scheduler: type = CogVideoXDDIMScheduler
    snr_shift_scale: float = 1.0


TEXT = {"in_channels": 8, "ofs_embed_dim": None}
V10 = {
    "patch_size_t": None, "patch_bias": True, "ofs_embed_dim": None,
    "sample_height": 8, "sample_width": 12, "sample_frames": 17,
}  # fmt: skip
MEMBERS = {
    "1.5-5b-i2v": Member(),
    "1.5-5b": Member(TEXT, CogVideoXPipeline),
    "5b-i2v": Member(
        V10 | {"use_learned_positional_embeddings": True},
        invert_scale_latents=False, scheduler=CogVideoXDPMScheduler,
    ),
    "5b": Member(V10 | TEXT, CogVideoXPipeline, invert_scale_latents=False, scheduler=CogVideoXDPMScheduler),
    "2b": Member(
        V10 | TEXT | {"use_rotary_positional_embeddings": False}, CogVideoXPipeline,
        scaling_factor=1.15258426, invert_scale_latents=False, snr_shift_scale=3.0,
    ),
}  # fmt: skip
FIXED_SIZE = "17x64x96"  # the only one of 5b-i2v


def _tokenizer() -> T5Tokenizer:
    """A tokenizer with the words of the drawn clips' captions, and letters for all other words."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    words = [(f"▁{word}", -4.0) for word in WORDS]
    return T5Tokenizer(vocab=[*special, *words, *((letter, -8.0) for letter in LETTERS)], extra_ids=0)


@torch.no_grad()
def _calibrate(vae: AutoencoderKLCogVideoX) -> None:
    """Scale the posterior like that of a trained VAE: latents with std 1 / scaling_factor and almost no variance.

    With random weights, the variance is about 1, so latents would be mostly noise and nothing could be learned.
    """
    out, channels = vae.encoder.conv_out.conv, vae.config.latent_channels
    out.weight[channels:] *= 0.01
    out.bias[channels:] = -12.0
    std = vae.encode(torch.rand(1, 3, 9, 64, 64) * 2 - 1).latent_dist.mean.std()
    for parameter in (out.weight, out.bias):
        parameter[:channels] /= std * vae.config.scaling_factor


def create_tiny_model(path: Path | str, seed: int = 0, sample_size: int = 60, name: str = "1.5-5b-i2v") -> None:
    """Write the model as a diffusers folder.

    sample_size: latent height and width of the rotary grid of 1.5 models (x 8 in pixels). name: one of MEMBERS. An
    existing folder is not changed. Several ranks may call this at once, since they all create the same model.
    """
    path, member = Path(path), MEMBERS[name]
    if path.exists():
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = {
            "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 16, "out_channels": 8,
            "time_embed_dim": 32, "ofs_embed_dim": 32, "text_embed_dim": 32, "num_layers": 2,
            "sample_width": sample_size, "sample_height": sample_size, "sample_frames": 81, "patch_size": 2,
            "patch_size_t": 2, "max_text_seq_length": 32, "use_rotary_positional_embeddings": True, "patch_bias": False,
        }  # fmt: skip
        transformer = CogVideoXTransformer3DModel(**config | member.transformer)
        if transformer.config.use_learned_positional_embeddings:
            # They start as sincos embeddings. Trained ones differ.
            transformer.patch_embed.pos_embedding.normal_(std=0.1)
        vae = AutoencoderKLCogVideoX(
            block_out_channels=(8, 8, 8, 8),
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
            latent_channels=8,
            layers_per_block=1,
            norm_num_groups=2,
            temporal_compression_ratio=4,
            scaling_factor=member.scaling_factor,
            invert_scale_latents=member.invert_scale_latents,
        )
        _calibrate(vae)
        tokenizer = _tokenizer()
        text_encoder = T5EncoderModel(
            T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2)
        )
    scheduler = member.scheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        snr_shift_scale=member.snr_shift_scale,
        set_alpha_to_one=True,
    )
    pipeline = member.pipeline(tokenizer, text_encoder, vae, transformer, scheduler)
    with whole_folder(path) as partial:
        pipeline.save_pretrained(partial)
