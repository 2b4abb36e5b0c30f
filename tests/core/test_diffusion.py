import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler

from cogds.core.diffusion import add_noise, stratified_timesteps, timestep_quarter, v_loss, v_target, x0_from_v

SETTINGS = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "snr_shift_scale": 1.0,
}


@pytest.fixture(params=[CogVideoXDDIMScheduler, CogVideoXDPMScheduler])
def scheduler(request):
    return request.param(**SETTINGS)


def test_noise_and_target_equal_the_scheduler_in_float64(scheduler):
    torch.manual_seed(0)
    latents, noise = torch.randn(2, 5, 3, 2, 4, 4, dtype=torch.float64)
    timesteps = torch.tensor([0, 1, 3, 500, 999])
    abar = scheduler.alphas_cumprod
    for ours, theirs in (
        (add_noise(latents, noise, timesteps, abar), scheduler.add_noise(latents, noise, timesteps)),
        (v_target(latents, noise, timesteps, abar), scheduler.get_velocity(latents, noise, timesteps)),
    ):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), theirs, atol=1e-6, rtol=0)


def test_x0_is_recovered_from_the_noisy_clip_and_v(scheduler):
    torch.manual_seed(0)
    latents, noise = torch.randn(2, 4, 3, 2, 4, 4)
    timesteps, abar = torch.tensor([0, 3, 500, 999]), scheduler.alphas_cumprod
    noisy, velocity = (function(latents, noise, timesteps, abar) for function in (add_noise, v_target))
    torch.testing.assert_close(x0_from_v(noisy, velocity, timesteps, abar), latents, atol=1e-5, rtol=0)


def test_the_weighted_x0_loss_equals_the_loss_on_v(scheduler):
    """CogVideo's trainers weight the loss on x_0 recovered from the prediction by 1 / (1 - abar)."""
    torch.manual_seed(0)
    latents, noise, prediction = torch.randn(3, 4, 3, 2, 4, 4, dtype=torch.float64)
    timesteps = torch.tensor([50, 300, 700, 950])
    abar = scheduler.alphas_cumprod.double()[timesteps].view(-1, 1, 1, 1, 1)
    recovered = scheduler.get_velocity(prediction, scheduler.add_noise(latents, noise, timesteps), timesteps)
    theirs = ((recovered - latents) ** 2 / (1 - abar)).flatten(1).mean(1)
    ours = v_loss(prediction, v_target(latents, noise, timesteps, scheduler.alphas_cumprod))
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=0)


def test_a_perfect_bf16_output_has_almost_no_loss_near_t_zero(scheduler):
    """Only rounding is left. In bf16, sigma would be 0 at these steps, and the loss 0.018 at t = 3."""
    torch.manual_seed(0)
    latents, noise = torch.randn(2, 1, 6, 8, 32, 32)
    for timestep in (0, 1, 3):
        target = v_target(latents, noise, torch.tensor([timestep]), scheduler.alphas_cumprod)
        assert v_loss(target.bfloat16(), target).item() < 1e-5


def test_loss_is_per_sample_and_in_float32():
    prediction, target = torch.zeros(2, 3, 1, 2, 2, dtype=torch.bfloat16), torch.ones(2, 3, 1, 2, 2)
    target[1] *= 2
    loss = v_loss(prediction, target)
    assert loss.tolist() == [1.0, 4.0]
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("num_slots", [1, 2, 7, 64])
def test_every_slot_draws_from_its_own_slice(num_slots):
    for step in range(20):
        drawn = stratified_timesteps(range(num_slots), num_slots, 1000, seed=1, step=step)
        # If num_slots does not divide 1000, the edge of a slice lies inside a timestep, hence int(low).
        edges = [slot * 1000 / num_slots for slot in range(num_slots + 1)]
        for low, high, t in zip(edges, edges[1:], sorted(drawn.tolist())):
            assert int(low) <= t < high


def test_slices_are_shuffled_over_slots_and_cover_the_schedule_evenly():
    drawn = torch.stack([stratified_timesteps(range(4), 4, 1000, seed=0, step=step) for step in range(4000)])
    for slot in range(4):  # without shuffling, a slot would draw from only a quarter of the schedule
        counts = torch.bincount(timestep_quarter(drawn[:, slot], 1000), minlength=4)
        assert (counts - 1000).abs().max() < 130
    hundredths = torch.bincount(drawn.flatten() // 10, minlength=100)
    assert (hundredths - 160).abs().max() < 60


def test_a_slot_draws_the_same_on_every_rank():
    whole = stratified_timesteps(range(6), 6, 1000, seed=5, step=9)
    assert torch.equal(stratified_timesteps([4, 5], 6, 1000, seed=5, step=9), whole[4:])


def test_timesteps_depend_on_seed_and_step():
    keys = [(seed, step) for seed in (0, 1) for step in (0, 1)]
    assert len({tuple(stratified_timesteps(range(4), 4, 1000, *key).tolist()) for key in keys}) == len(keys)
    # Not only the order of the slices differs, because a single slot has no order.
    assert len({stratified_timesteps([0], 1, 10**6, *key).item() for key in keys}) == len(keys)


def test_timesteps_do_not_change_between_versions():
    # If these values change, a run cannot be resumed with a new version of cogds.
    assert stratified_timesteps(range(6), 6, 1000, seed=5, step=9).tolist() == [260, 994, 587, 736, 495, 115]
    assert stratified_timesteps([70, 71, 511], 512, 1000, seed=0, step=10**6).tolist() == [653, 467, 886]


def test_quarters():
    assert timestep_quarter(torch.tensor([0, 249, 250, 999]), 1000).tolist() == [0, 0, 1, 3]
