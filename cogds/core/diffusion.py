"""The diffusion process in float32: noising, v-target, loss and timestep sampling.

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps            (Ho et al. 2020, eq. 4)
    v_t = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0            (Salimans & Ho 2022, appendix D)

Other trainers of this model compute the loss on x_0, weighted by 1 / (1 - abar_t). That equals the mean squared error
of v, but the weight grows without bound as abar_t approaches 1, and in bf16 sigma rounds to 0 at t = 0 and 1. cogds
computes the loss on v, in float32 throughout.
"""

from collections.abc import Iterable

import torch

from cogds.core.permutation import keyed_hash, permute


def _alpha_sigma(alphas_cumprod: torch.Tensor, timesteps: torch.Tensor, ndim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """sqrt(abar_t) and sqrt(1 - abar_t) as float32 [B, 1, 1, ...].

    The table may be float64, as it is for DDIM and DPM. 1 - abar is computed before the cast to float32, while exact.
    """
    abar = alphas_cumprod.to(timesteps.device)[timesteps].view(-1, *[1] * (ndim - 1))
    return abar.sqrt().float(), (1 - abar).sqrt().float()


def add_noise(
    latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, alphas_cumprod: torch.Tensor
) -> torch.Tensor:
    """x_t, float32 [B, F, C, H, W], for latents x_0 and noise eps of that shape and timesteps int64 [B]."""
    alpha, sigma = _alpha_sigma(alphas_cumprod, timesteps, latents.ndim)
    return alpha * latents.float() + sigma * noise.float()


def v_target(
    latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, alphas_cumprod: torch.Tensor
) -> torch.Tensor:
    """v_t, the transformer's training target: float32 [B, F, C, H, W]."""
    alpha, sigma = _alpha_sigma(alphas_cumprod, timesteps, latents.ndim)
    return alpha * noise.float() - sigma * latents.float()


def x0_from_v(
    noisy: torch.Tensor, velocity: torch.Tensor, timesteps: torch.Tensor, alphas_cumprod: torch.Tensor
) -> torch.Tensor:
    """x_0 = sqrt(abar_t) x_t - sqrt(1 - abar_t) v_t, float32 [B, F, C, H, W], for x_t and a (predicted) v_t."""
    alpha, sigma = _alpha_sigma(alphas_cumprod, timesteps, noisy.ndim)
    return alpha * noisy.float() - sigma * velocity.float()


def v_loss(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error per sample, float32 [B], of predictions and targets [B, F, C, H, W]."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


def stratified_timesteps(
    slots: Iterable[int], num_slots: int, num_timesteps: int, seed: int, step: int
) -> torch.Tensor:
    """Timesteps int64 [B] for the given slots of an optimizer step, each drawn from its own slice of [0, T).

    Explicit uniform sampling (CogVideoX paper, section 3.3): a global batch of any size covers [0, T) evenly. Slices
    are assigned to slots at random in every step, so that no rank, micro-step or bucket is tied to a part of [0, T).

    Args:
        slots: numbers in [0, num_slots).
        num_slots: slots of the whole optimizer step.
        num_timesteps: T.
    """
    slices = keyed_hash("timestep slices", seed, step)
    draws = []
    for slot in slots:
        within = keyed_hash("timestep", seed, step, slot) / 2**64
        draws.append(int((permute(slot, num_slots, slices) + within) / num_slots * num_timesteps))
    return torch.tensor(draws, dtype=torch.int64).clamp_(max=num_timesteps - 1)


def timestep_quarter(timesteps: torch.Tensor, num_timesteps: int) -> torch.Tensor:
    """The quarter of [0, T) that each timestep is in, int64 [B] from 0 to 3."""
    return timesteps * 4 // num_timesteps
