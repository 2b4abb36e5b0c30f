import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.video_processor import VideoProcessor

from cogds.core.condition_modes import Piece
from cogds.core.conditioning import (
    add_image_noise,
    drop,
    image_latent_scale,
    normalize_pixels,
    pad_front,
    place_condition,
    sample_moments,
)
from cogds.errors import UserError


def test_posterior_sample_equals_diffusers():
    moments = torch.randn(2, 8, 3, 4, 4) * 20  # some log-variances are clamped
    theirs = DiagonalGaussianDistribution(moments).sample(torch.Generator().manual_seed(1))
    ours = sample_moments(moments, torch.Generator().manual_seed(1))
    assert torch.equal(ours, theirs.transpose(1, 2))


def test_pixel_range_equals_the_pipeline():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(3, -1, -1)
    theirs = VideoProcessor(vae_scale_factor=8).preprocess((pixels.float() / 255)[None])
    assert torch.equal(normalize_pixels(pixels, torch.float32), theirs[0])


@pytest.mark.parametrize("frames, patch, padded", [(5, 2, 6), (4, 2, 4), (1, 2, 2), (5, None, 5)])
def test_padding_copies_the_first_frame_to_the_front(frames, patch, padded):
    latents = torch.randn(2, frames, 3, 4, 4)
    result = pad_front(latents, patch)
    assert result.shape[1] == padded
    assert torch.equal(result[:, padded - frames :], latents)
    assert all(torch.equal(result[:, i], latents[:, 0]) for i in range(padded - frames))


@pytest.mark.parametrize(
    "convention, invert, scale",
    [("pipeline", True, 1 / 0.7), ("pipeline", False, 0.7), ("scaled", True, 0.7), ("unscaled", True, 1.0)],
)
def test_image_latent_scale(convention, invert, scale):
    assert image_latent_scale(0.7, invert, convention) == scale


def test_an_unknown_convention_is_refused():
    with pytest.raises(UserError, match=r"'newer' .* pipeline, scaled, unscaled"):
        image_latent_scale(0.7, True, "newer")


def test_pieces_are_placed_with_their_padding_and_zeros_elsewhere():
    prefix, image = torch.randn(2, 3, 4, 4), torch.randn(1, 3, 4, 4)
    condition = torch.zeros(7, 3, 4, 4)
    place_condition(condition, [(Piece(range(5), 1, padding=1), prefix), (Piece(range(20, 21), 6), image)])
    zeros = torch.zeros(3, 3, 4, 4)
    assert torch.equal(condition, torch.cat([prefix[:1], prefix, zeros, image]))


def test_image_noise_has_the_configured_distribution():
    generator = torch.Generator().manual_seed(0)
    noise = torch.cat([add_image_noise(torch.zeros(1, 3, 8, 8), -3.0, 0.5, generator) for _ in range(4000)])
    log_sigma = noise.flatten(1).std(1).log()
    assert log_sigma.mean() == pytest.approx(-3.0, abs=0.03)
    assert log_sigma.std() == pytest.approx(0.5, abs=0.03)


def test_image_noise_keeps_the_dtype():
    assert add_image_noise(torch.zeros(1, 3, 2, 2).bfloat16(), -3, 0.5, torch.Generator()).dtype == torch.bfloat16


def test_drop_replaces_whole_samples():
    condition, unconditional = torch.ones(3, 2, 2), torch.full((2, 2), 7.0)
    dropped = drop(condition, unconditional, torch.tensor([False, True, False]))
    assert dropped[:, 0, 0].tolist() == [1.0, 7.0, 1.0]
    assert torch.equal(dropped[1], unconditional)
