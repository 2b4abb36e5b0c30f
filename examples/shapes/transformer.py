"""Train the transformer of the shapes model, with the inputs that cogds and the diffusers pipeline give it."""

import copy
from pathlib import Path

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXTransformer3DModel
from muon import Muon
from ranks import Log, average_gradients
from text import TEXT_DIM, TEXT_TOKENS, CaptionEncoder
from vae import POOL_SIZE

from cogds.core.conditioning import (
    add_image_noise,
    drop,
    image_latent_scale,
    pad_front,
    transformer_inputs,
)
from cogds.core.diffusion import add_noise, v_loss, v_target
from cogds.core.geometry import ClipShape, ModelGeometry
from cogds.core.rope import rotary_tables
from cogds.shapes.world import SIZES, Numbers, random_scene

CLIPS = 400  # of each size, per rank
BATCH_SIZE = 24  # per rank
STEPS = 2000
HEADS, HEAD_DIM, LAYERS = 6, 32, 4
IMAGE_DROPOUT, CAPTION_DROPOUT = 0.03, 0.1
NOISE_BIAS = 0.65  # timesteps are T u ** NOISE_BIAS: more of them are noisy, where the motion is decided
AVERAGE = 0.995


def create(seed: int) -> CogVideoXTransformer3DModel:
    """Return a transformer whose blocks start nearly open and whose output starts at zero."""
    torch.manual_seed(seed)
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=32,
        out_channels=16,
        time_embed_dim=64,
        ofs_embed_dim=64,
        text_embed_dim=TEXT_DIM,
        num_layers=LAYERS,
        sample_width=POOL_SIZE // 8,
        sample_height=POOL_SIZE // 8,
        sample_frames=17,
        patch_size=2,
        patch_size_t=2,
        max_text_seq_length=TEXT_TOKENS,
        use_rotary_positional_embeddings=True,
        patch_bias=False,
    )
    width = HEADS * HEAD_DIM
    with torch.no_grad():
        for block in transformer.transformer_blocks:
            for norm in (block.norm1, block.norm2):
                norm.linear.weight.zero_()
                norm.linear.bias.zero_()
                for gate in (2, 5):  # shift, scale and gate of the video, then those of the text
                    norm.linear.bias[gate * width : (gate + 1) * width] = 0.5
        transformer.proj_out.weight.zero_()
        transformer.proj_out.bias.zero_()
    return transformer


def is_hidden(name: str, parameter: torch.nn.Parameter) -> bool:
    """Whether Muon trains a parameter: the matrices of attention and feed-forward layers."""
    return parameter.ndim == 2 and "transformer_blocks" in name and ("attn1" in name or "ff" in name)


@torch.no_grad()
def encode_clips(
    vae: AutoencoderKLCogVideoX, size: tuple[int, int, int], num_clips: int, numbers: Numbers
) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Draw clips of one size. Returns latents [N, F, C, H, W], first frames [N, 3, H, W] from -1 to 1, and captions."""
    latents, first_frames, captions = [], [], []
    while len(captions) < num_clips:
        scenes = [random_scene(numbers, size) for _ in range(10)]
        clips = torch.stack([scene.draw() for scene in scenes]) * 2 - 1
        latents.append(vae.encode(clips.transpose(1, 2)).latent_dist.mode().transpose(1, 2))
        first_frames.append(clips[:, 0])
        captions += [scene.caption for scene in scenes]
    return torch.cat(latents), torch.cat(first_frames), captions


def train(
    rank: int, folder: str, seed: int, scale: float, convention: str = "pipeline", start: str | None = None
) -> None:
    """Train on all ranks and write the transformer into the model's folder, which has everything else.

    scale: share of the steps. convention: the scale of the image latents, "pipeline" for the model that is shipped.
    start: folder of a transformer to start from.
    """
    log = Log(rank)
    vae = AutoencoderKLCogVideoX.from_pretrained(folder, subfolder="vae").eval()
    transformer = CogVideoXTransformer3DModel.from_pretrained(start) if start else create(seed)
    scheduler = CogVideoXDDIMScheduler.load_config(folder, subfolder="scheduler")
    geometry = ModelGeometry.from_configs(transformer.config, vae.config, scheduler)
    factor = image_latent_scale(vae.config.scaling_factor, vae.config.invert_scale_latents, convention)
    alphas_cumprod = load_alphas_cumprod_of(folder)
    captions_encoder = CaptionEncoder(folder)
    empty = captions_encoder([""])[0]
    numbers = Numbers(seed * 1000 + 2 + rank)  # every rank draws its own clips
    data = []
    for size in SIZES:
        latents, first_frames, captions = encode_clips(vae, size, max(BATCH_SIZE, round(CLIPS * scale)), numbers)
        data.append((pad_front(latents * vae.config.scaling_factor, geometry.patch_size_t), first_frames,
                     captions_encoder(captions), rotary_tables(ClipShape(*size), geometry)))  # fmt: skip
    average = copy.deepcopy(transformer).eval()
    parameters = list(transformer.parameters())
    optimizer = Muon(transformer.named_parameters(), is_hidden, lr=0.02, adam_lr=2e-3, weight_decay=0.01)
    steps = max(2, round(STEPS * scale))
    torch.manual_seed(seed + 20 + rank)
    noises = torch.Generator().manual_seed(seed + 40 + rank)
    log(
        f"{sum(parameter.numel() for parameter in parameters)} parameters, "
        f"{sum(len(latents) for latents, *_ in data)} clips per rank encoded"
    )
    recent: list[tuple[float, float, float]] = []
    for step in range(steps):
        share = step / steps
        latents, first_frames, states, rotary = data[step % len(data)]
        chosen = torch.randint(len(latents), (BATCH_SIZE,))
        clean = latents[chosen]
        with torch.no_grad():
            noised = add_image_noise(first_frames[chosen], -3.0, 0.5, noises)
            image = vae.encode(noised[:, :, None]).latent_dist.mode().transpose(1, 2) * factor
        image = drop(image, image.new_zeros(()), torch.rand(BATCH_SIZE) < IMAGE_DROPOUT)
        condition = torch.zeros_like(clean)
        condition[:, :1] = image
        text = drop(states[chosen], empty, torch.rand(BATCH_SIZE) < CAPTION_DROPOUT)
        spread = (torch.arange(BATCH_SIZE) + torch.rand(BATCH_SIZE)) / BATCH_SIZE
        timesteps = (spread**NOISE_BIAS * len(alphas_cumprod)).long().clamp(max=len(alphas_cumprod) - 1)
        noise = torch.randn_like(clean)
        inputs = transformer_inputs(
            add_noise(clean, noise, timesteps, alphas_cumprod), condition, text,
            timesteps, rotary, geometry,
        )  # fmt: skip
        losses = v_loss(transformer(**inputs)[0], v_target(clean, noise, timesteps, alphas_cumprod))
        losses.mean().backward()
        average_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step(min(1.0, (step + 1) / 30) * min(1.0, (1 - share) / 0.6) + 0.005)
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), parameters, 1 - min(AVERAGE, step / (step + 15)))
        losses = losses.detach()
        recent.append(
            (losses.mean().item(), losses[timesteps > 800].mean().item(), losses[timesteps < 400].mean().item())
        )
        if (step + 1) % 100 == 0:
            whole, noisy, clear = (sum(column) / len(column) for column in zip(*recent))
            log(f"step {step + 1}/{steps}: loss {whole:.4f}, above timestep 800 {noisy:.4f}, below 400 {clear:.4f}")
            recent.clear()
    if rank == 0:
        average.save_pretrained(Path(folder) / "transformer")
        log("transformer written")


def load_alphas_cumprod_of(folder: str) -> torch.Tensor:
    """The noise schedule of the model's scheduler."""
    return CogVideoXDDIMScheduler.from_pretrained(folder, subfolder="scheduler").alphas_cumprod
