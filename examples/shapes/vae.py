"""Train the VAE of the shapes model, a tiny AutoencoderKLCogVideoX.

End to end from random weights, such a VAE learns slowly. A linear codec teaches it first: the principal components of
4x8x8 pixel blocks. The encoder learns the codec's latents and the decoder learns to draw them; then both are trained
together, free of the codec.
"""

import copy
import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLCogVideoX
from muon import Muon
from ranks import Log, average_gradients

from cogds.shapes.world import COLORS, PHRASES, PURPLE, SHAPES, SIZE, SIZES, Numbers, random_scene

CHANNELS = 16
SCALING_FACTOR = 0.7  # as in CogVideoX-1.5; the latents have std 1 / SCALING_FACTOR
POOL, POOL_SIZE = 600, 64
POOL_SCENE = (17, POOL_SIZE, POOL_SIZE)
LOG_VARIANCE = -5.0  # of the posterior, for all latents
STEPS = 2000
TAUGHT_STEPS = 0.3  # share of the steps with the linear codec as teacher
LATENT_NOISE = 0.15  # highest std of the noise that the decoder learns to ignore
PULL = 0.02  # how much the teacher's latents still count afterwards: they keep the latents smooth and bounded


def draw_pool(seed: int) -> torch.Tensor:
    """Draw clips, uint8 [POOL, 17, 3, POOL_SIZE, POOL_SIZE]: the world's scenes, and more varied ones."""
    numbers = Numbers(seed)
    clips = []
    for index in range(POOL):
        scene = random_scene(numbers, POOL_SCENE, PHRASES)
        clip = scene.draw_background()[None]
        if index % 3:  # a scene of the world, anywhere in the picture
            scene = replace(scene, x=scene.x + numbers.between(-8, 8), y=scene.y + numbers.between(-8, 8))
            clip = scene.draw_over(clip)
        else:  # up to three shapes that turn, in any color, over any gradient
            if numbers.between(0, 1) < 0.4:
                ends = tuple(tuple(numbers.vector(0, 1).tolist()) for _ in range(2))
                clip = replace(scene, background=ends).draw_background()[None]
            for _ in range(numbers.choose((1, 1, 2, 3))):
                color = numbers.choose((*COLORS.values(), PURPLE))
                speed = numbers.between(-1.5, 1.5) if numbers.between(0, 1) < 0.4 else 0.0
                scene = replace(
                    random_scene(numbers, POOL_SCENE, PHRASES),
                    shape=numbers.choose(SHAPES),
                    x=numbers.between(8, POOL_SIZE - 8),
                    y=numbers.between(8, POOL_SIZE - 8),
                    radius=numbers.between(4, 11),
                    color=tuple(
                        numbers.vector(0, 1).tolist() if numbers.between(0, 1) < 0.4 else (c / 255 for c in color)
                    ),
                    rotation=lambda time, speed=speed: speed * time,
                )
                clip = scene.draw_over(clip)
        clips.append((clip * 255).round().to(torch.uint8))
    return torch.stack(clips)


class LinearCodec:
    """The principal components of blocks of 4 frames x 8 x 8 pixels. Latent frame 0 is frame 0 four times."""

    def __init__(self, clips: torch.Tensor):
        """clips: [N, F, 3, H, W] from -1 to 1."""
        blocks = self._blocks(clips).reshape(-1, 4 * 8 * 8 * 3)
        self.mean = blocks.mean(0)
        centered = blocks - self.mean
        values, vectors = torch.linalg.eigh(centered.T @ centered / len(blocks))
        self.components = vectors.flip(1)[:, :CHANNELS]
        # Half-way whitened: channels of more equal size are easier to learn.
        self.scale = values.flip(0)[:CHANNELS] ** -0.25
        self.scale /= (centered @ self.components * self.scale).std() * SCALING_FACTOR

    def encode(self, clips: torch.Tensor) -> torch.Tensor:
        """Return latents [N, C, F, H, W] of clips [N, F, 3, H, W]."""
        return ((self._blocks(clips) - self.mean) @ self.components * self.scale).permute(0, 4, 1, 2, 3).contiguous()

    @staticmethod
    def _blocks(clips: torch.Tensor) -> torch.Tensor:
        clips = torch.cat([clips[:, :1].expand(-1, 3, -1, -1, -1), clips], 1)
        n, f, _, h, w = clips.shape
        blocks = clips.reshape(n, f // 4, 4, 3, h // 8, 8, w // 8, 8)
        return blocks.permute(0, 1, 4, 6, 2, 3, 5, 7).reshape(n, f // 4, h // 8, w // 8, -1)


def create(seed: int) -> AutoencoderKLCogVideoX:
    """A VAE with random weights that suit its depth, and a posterior of constant variance."""
    torch.manual_seed(seed)
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(8, 16, 32, 32),
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        latent_channels=CHANNELS,
        layers_per_block=1,
        norm_num_groups=1,  # with few channels, more groups would be nearly instance norm, which loses brightness
        temporal_compression_ratio=4,
        scaling_factor=SCALING_FACTOR,
        invert_scale_latents=True,
        # Those of the real model. They decide the tiles for decoding: smaller tiles would give frames of a wrong size.
        sample_height=480,
        sample_width=720,
    )
    with torch.no_grad():
        for name, module in vae.named_modules():
            if isinstance(module, (torch.nn.Conv2d, torch.nn.Conv3d)):
                module.weight *= math.sqrt(3)
                module.bias.zero_()
                if "conv2" in name:
                    module.weight *= 0.3
                elif "conv_y" in name:
                    module.weight *= 0.1
                    module.bias.fill_(1.0)
                elif "conv_b" in name:
                    module.weight *= 0.2
        out = vae.encoder.conv_out.conv
        out.weight[CHANNELS:] = 0
        out.bias[CHANNELS:] = LOG_VARIANCE
    return vae


def is_hidden(name: str, parameter: torch.nn.Parameter) -> bool:
    """Whether Muon trains a parameter: 3x3 convolutions between hidden channels."""
    return parameter.ndim >= 4 and parameter.shape[-1] == 3 and min(parameter.shape[:2]) >= 8 and "conv_out" not in name


def random_batch(pool: torch.Tensor, batch_size: int, frames: int, height: int, width: int) -> torch.Tensor:
    """Cut clips out of the pool, float32 [B, F, 3, H, W] from -1 to 1, mirrored and with colors swapped at random."""
    clips = []
    for index in torch.randint(len(pool), (batch_size,)).tolist():
        start = torch.randint(17 - frames + 1, ()).item()
        top, left = (torch.randint(POOL_SIZE - side + 1, ()).item() for side in (height, width))
        clip = pool[index, start : start + frames, :, top : top + height, left : left + width]
        mirrored = [dim for dim, share in ((-1, torch.rand(())), (-2, torch.rand(()))) if share < 0.5]
        clip = clip.flip(mirrored)
        clips.append(clip[:, torch.randperm(3)] if torch.rand(()) < 0.3 else clip)
    return torch.stack(clips).float() / 127.5 - 1


def psnr(first: torch.Tensor, second: torch.Tensor) -> float:
    """Mean over clips of the PSNR of clips from -1 to 1."""
    return (10 * torch.log10(4 / (first.clamp(-1, 1) - second).square().flatten(1).mean(1))).mean().item()


def validation_clips(seed: int) -> list[torch.Tensor]:
    """Draw unseen clips of the world, four of each size: [4, F, 3, H, W] from -1 to 1."""
    numbers = Numbers(seed)
    return [torch.stack([random_scene(numbers, size, PHRASES).draw() for _ in range(4)]) * 2 - 1 for size in SIZES]


@torch.no_grad()
def check(vae: AutoencoderKLCogVideoX, clips: list[torch.Tensor]) -> tuple[float, float, float]:
    """Return the PSNR of reconstructed clips and of their first frames, and the latents' std."""
    values, latents = [], []
    for batch in clips:
        latent = vae.encode(batch.transpose(1, 2)).latent_dist.mode()
        decoded = vae.decode(latent).sample.transpose(1, 2)
        still = vae.decode(vae.encode(batch[:, :1].transpose(1, 2)).latent_dist.mode()).sample.transpose(1, 2)
        values.append((psnr(decoded, batch), psnr(still, batch[:, :1])))
        latents.append(latent.flatten())
    whole, first = (sum(column) / len(values) for column in zip(*values))
    return whole, first, torch.cat(latents).std().item()


def train(rank: int, folder: str, seed: int, scale: float) -> None:
    """Train on all ranks and write the VAE into a folder. scale: share of the steps."""
    log = Log(rank)
    pool = draw_pool(seed)
    codec = LinearCodec(pool[:200].float() / 127.5 - 1)
    clips = validation_clips(seed + 1)
    vae = create(seed)
    average = copy.deepcopy(vae)
    parameters = list(vae.parameters())
    optimizer = Muon(vae.named_parameters(), is_hidden, lr=0.02, adam_lr=2e-3)
    out = vae.encoder.conv_out.conv
    steps = max(2, round(STEPS * scale))
    torch.manual_seed(seed + 10 + rank)
    log(f"{sum(p.numel() for p in parameters)} parameters, {len(pool)} clips drawn")
    losses: list[float] = []
    for step in range(steps):
        share = step / steps
        is_taught = share < TAUGHT_STEPS
        if is_taught:
            sizes = (4, 9, 32, 32)
        else:
            frames, height, width = SIZES[step % len(SIZES)]
            sizes = (2, frames, height, width) if step % 4 == 0 else (4, 9, 32, 48) if step % 2 else (4, 17, 32, 32)
        batch = random_batch(pool, *sizes)
        if torch.rand(()) < 0.12:
            batch = random_batch(pool, 8, 1, SIZE, SIZE)  # a first frame alone, as it is encoded as a condition
        taught = codec.encode(batch)
        video = batch.transpose(1, 2)
        latents = vae.encode(video).latent_dist.mode()
        noise = LATENT_NOISE * torch.rand(len(video), 1, 1, 1, 1) * torch.randn_like(latents)
        pull = (latents - taught).square().mean()
        error = vae.decode((taught if is_taught else latents) + noise).sample - video
        # The pooled error brings large areas to the right brightness; the absolute error sharpens edges.
        pooled = F.avg_pool3d(error, (1, 4, 4)).square().mean()
        drawn = error.square().mean() + pooled + 0.05 * error.abs().mean()
        (drawn + (1 if is_taught else PULL) * pull).backward()
        out.weight.grad[CHANNELS:] = 0
        out.bias.grad[CHANNELS:] = 0
        average_gradients(parameters)
        optimizer.step(min(1.0, (step + 1) / 20) * min(1.0, (1 - share) / 0.7) + 0.005)
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), parameters, 1 - min(0.99, step / (step + 10)))
        losses.append(error.square().mean().item())
        if rank == 0 and (step + 1) % 200 == 0:
            whole, first, std = check(average, clips)
            recent = 10 * math.log10(4 / (sum(losses[-50:]) / len(losses[-50:])))
            log(
                f"step {step + 1}/{steps}: trained {recent:.1f} dB; unseen {whole:.2f} dB, first frame {first:.2f}, "
                f"std {std:.3f}"
            )
            average.save_pretrained(folder)
    if rank == 0:
        whole, first, std = check(average, clips)
        log(f"VAE: {whole:.2f} dB on unseen clips, {first:.2f} dB on first frames, latents' std {std:.3f}")
        average.save_pretrained(folder)
