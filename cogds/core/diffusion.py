"""The diffusion process, in float32: add noise, v-target, loss, timestep sampling.

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps            (Ho et al. 2020, eq. 4)
    v_t = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0            (Salimans & Ho 2022, appendix D)

Trainers of this model write the loss on x_0, weighted by 1 / (1 - abar_t): the same number as the plain mean square on
v, but undefined at the last step of a zero-terminal-SNR schedule's other end and inexact in bf16, where sigma rounds to
0 at t = 0 and 1. Here it is on v, and float32 throughout.
"""

from collections.abc import Iterable

import torch

from cogds.core.permutation import keyed_hash, permute


def _bar(alphas_cumprod: torch.Tensor, timesteps: torch.Tensor, ndim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """sqrt(abar_t) and sqrt(1 - abar_t) as float32 [B, 1, 1, ...].

    The table may be float64 (DDIM's and DPM's are): 1 - abar is taken before the cast, where it is still exact.
    """
    abar = alphas_cumprod.to(timesteps.device)[timesteps].view(-1, *[1] * (ndim - 1))
    return abar.sqrt().float(), (1 - abar).sqrt().float()


def add_noise(
    latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, alphas_cumprod: torch.Tensor
) -> torch.Tensor:
    """x_t, float32 [B, F, C, H, W], for latents x_0 and noise eps of that shape and timesteps int64 [B]."""
    alpha, sigma = _bar(alphas_cumprod, timesteps, latents.ndim)
    return alpha * latents.float() + sigma * noise.float()


def v_target(
    latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, alphas_cumprod: torch.Tensor
) -> torch.Tensor:
    """v_t, float32 [B, F, C, H, W]: what the transformer is trained to predict."""
    alpha, sigma = _bar(alphas_cumprod, timesteps, latents.ndim)
    return alpha * noise.float() - sigma * latents.float()


def x0_from_v(
    noisy: torch.Tensor, velocity: torch.Tensor, timesteps: torch.Tensor, alphas_cumprod: torch.Tensor
) -> torch.Tensor:
    """x_0 = sqrt(abar_t) x_t - sqrt(1 - abar_t) v_t, float32 [B, F, C, H, W], for x_t and a (predicted) v_t."""
    alpha, sigma = _bar(alphas_cumprod, timesteps, noisy.ndim)
    return alpha * noisy.float() - sigma * velocity.float()


def v_loss(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean square error of every sample, float32 [B], of predictions and targets [B, F, C, H, W]."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


def stratified_timesteps(
    slots: Iterable[int], num_slots: int, num_timesteps: int, seed: int, step: int
) -> torch.Tensor:
    """Timesteps int64 [B] for these slots of an optimizer step's `num_slots`, one draw from a slice of [0, T) each.

    Explicit uniform sampling (CogVideoX paper, section 3.3): the global batch covers [0, T) evenly whatever its
    size. Which slice a slot draws from is shuffled at every step, so that no rank and no micro-step (hence no bucket)
    keeps to its own part of the schedule.
    """
    slices = keyed_hash("timestep slices", seed, step)
    draws = []
    for slot in slots:
        within = keyed_hash("timestep", seed, step, slot) / 2**64
        draws.append(int((permute(slot, num_slots, slices) + within) / num_slots * num_timesteps))
    return torch.tensor(draws, dtype=torch.int64).clamp_(max=num_timesteps - 1)


def timestep_quarter(timesteps: torch.Tensor, num_timesteps: int) -> torch.Tensor:
    """Which quarter of [0, T) each timestep is in, int64 [B] of 0..3."""
    return timesteps * 4 // num_timesteps
