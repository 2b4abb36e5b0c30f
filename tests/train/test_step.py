"""The inputs of a training step: dropouts, random draws, noise. For the values see test_parity.py."""

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

import cogds.train.step
from cogds.config.schema import ConditioningConfig
from cogds.core.condition_modes import MODES, ConditionSettings, condition_frames
from cogds.core.conditioning import sample_moments
from cogds.core.diffusion import add_noise, v_target
from cogds.core.geometry import ClipShape
from cogds.core.rng import generator
from cogds.model.load import TextEncoder, find_model, load_alphas_cumprod, load_vae
from cogds.train.step import Draws, StepBuilder, draw_dropouts, draw_modes, random_batch, to_device
from tests.published_model import V15

CAPTIONS = ["a red circle moves over a blue background", "two squares"]
NO_CONDITIONING_NOISE = {"image_noise": False, "image_dropout": 0.0, "caption_dropout": 0.0}


@pytest.fixture(scope="module")
def model(tiny_model):
    return find_model(str(tiny_model))


def pixels_of(shape, batch_size):
    size = (batch_size, shape.frames, 3, shape.height, shape.width)
    return torch.from_numpy(np.random.default_rng(3).integers(0, 256, size, dtype=np.uint8))


def make_builder(model, encoder, vae, **conditioning):
    return StepBuilder(
        vae,
        model.geometry,
        ConditioningConfig(**{**NO_CONDITIONING_NOISE, **conditioning}),
        load_alphas_cumprod(model),
        encoder.encode(""),
        torch.device("cpu"),
    )


def make_batch(shape, batch_size, encoder, vae):
    pixels = pixels_of(shape, batch_size)
    videos = [cogds.train.step.normalize_pixels(clip, vae.dtype).transpose(0, 1)[None] for clip in pixels]
    with torch.no_grad():
        moments = [vae.encode(video).latent_dist.parameters for video in videos]
    return {
        "moments": torch.cat(moments),
        "first_frame": pixels[:, 0],
        "text_states": torch.stack([encoder.encode(caption) for caption in CAPTIONS[:batch_size]]),
    }


def test_dropped_conditions(model):
    encoder, vae = TextEncoder(model, torch.float32, "cpu"), load_vae(model, torch.float32, "cpu")
    shape = ClipShape.parse("9x64x64")
    builder, batch = make_builder(model, encoder, vae), make_batch(shape, 2, encoder, vae)
    drops = torch.tensor([True, False]), torch.tensor([False, True])
    inputs, _ = builder.build(batch, shape, Draws(torch.tensor([10, 500]), *drops, 0, 0, (0, 1)))
    image = inputs["hidden_states"][:, :, inputs["hidden_states"].shape[2] // 2 :]
    assert (image[0] == 0).all()
    assert (image[1, 0] != 0).any()
    assert torch.equal(inputs["encoder_hidden_states"][0], batch["text_states"][0])
    assert torch.equal(inputs["encoder_hidden_states"][1], encoder.encode(""))


@pytest.fixture(scope="module")
def conditions(model):
    """A builder for all modes without image noise, a batch with a sample for each, and the pixels of its clips."""
    encoder, vae = TextEncoder(model, torch.float32, "cpu"), load_vae(model, torch.float32, "cpu")
    shape = ClipShape.parse("17x64x64")
    builder = make_builder(
        model, encoder, vae, modes=dict.fromkeys(MODES, 1 / len(MODES)), keyframe_times=(0.5, 1.0),
    )  # fmt: skip
    builder.settings = ConditionSettings(2, (6, 16))
    frames = condition_frames(MODES, shape.frames, model.geometry, builder.settings)
    pixels = pixels_of(shape, len(MODES))
    batch = {"first_frame": pixels[:, 0], "condition_frames": pixels[:, list(frames)]}
    return builder, batch, pixels, shape


@pytest.mark.parametrize("mode", MODES)
def test_a_condition_is_what_the_vae_makes_of_its_pixels(conditions, monkeypatch, mode):
    """Written out for 17 frames: 5 latent frames, and one of padding in front."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, _: self.mode())
    builder, batch, pixels, shape = conditions
    sample, num = MODES.index(mode), len(MODES)
    draws = Draws(torch.zeros(num), torch.zeros(num, dtype=torch.bool), None, 0, 0, range(num), MODES)
    condition = builder.condition(batch, shape, draws)[sample]

    def latents(first, last):
        video = (2 * pixels[sample, first : last + 1].float() / 255 - 1).transpose(0, 1)[None]
        return builder.vae.encode(video).latent_dist.mode()[0].transpose(0, 1) / builder.vae.config.scaling_factor

    expected = torch.zeros_like(condition)
    with torch.no_grad():
        if mode in ("first", "first_last"):
            expected[0] = latents(0, 0)
        if mode in ("last", "first_last", "keyframes"):
            expected[5] = latents(16, 16)
        if mode == "keyframes":
            expected[3] = latents(6, 6)
        if mode == "prefix":
            expected[1:3] = latents(0, 4)
            expected[0] = expected[1]
        if mode == "suffix":
            expected[4:6] = latents(12, 16)
    torch.testing.assert_close(condition, expected, atol=1e-6, rtol=1e-5)
    assert mode == "none" or condition.abs().sum() > 0


def test_a_random_batch_has_what_the_costliest_mode_needs(conditions):
    builder, _, _, shape = conditions
    batch = random_batch(shape, 2, builder.geometry, builder.empty_caption_states.shape[-1], "fp32")
    batch = builder.with_random_conditions(batch, shape)
    mode, dropped = builder.largest_mode(shape), torch.tensor([False, False])
    assert mode in ("prefix", "suffix")  # five frames in one piece
    inputs, _ = builder.build(batch, shape, Draws(torch.tensor([3, 4]), dropped, dropped, 0, 0, (0, 1), (mode, mode)))
    assert (inputs["hidden_states"][:, 1:3, builder.geometry.latent_channels :] != 0).any()


def test_the_mode_of_a_sample_depends_on_its_slot_alone():
    config = ConditioningConfig(modes={"first": 0.5, "prefix": 0.3, "none": 0.2})
    together = draw_modes(config, 0, 3, range(6000))
    assert together[4000:4010] == draw_modes(config, 0, 3, range(4000, 4010))
    assert together != draw_modes(config, 0, 4, range(6000))
    shares = {mode: together.count(mode) / 6000 for mode in config.modes}
    assert shares == pytest.approx(config.modes, abs=0.02)


def test_dropout_rates():
    config = ConditioningConfig(image_dropout=0.05, caption_dropout=0.1)
    image, caption = zip(*(draw_dropouts(config, 0, step, range(4)) for step in range(5000)))
    assert torch.cat(image).float().mean() == pytest.approx(0.05, abs=0.006)
    assert torch.cat(caption).float().mean() == pytest.approx(0.1, abs=0.008)


def test_image_and_caption_are_dropped_independently():
    config = ConditioningConfig(image_dropout=0.5, caption_dropout=0.5)
    image, caption = draw_dropouts(config, 0, 0, range(8000))
    joint = torch.bincount(2 * image + caption, minlength=4) / 8000
    assert joint.tolist() == pytest.approx([0.25] * 4, abs=0.02)


def test_image_noise_differs_by_step_and_sample_and_is_reproducible(model, monkeypatch):
    # So that the latents of an image depend on nothing else that is random.
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, _: self.mode())
    encoder, vae = TextEncoder(model, torch.float32, "cpu"), load_vae(model, torch.float32, "cpu")
    shape, no_dropout = ClipShape.parse("9x64x64"), torch.tensor([False])
    batch = make_batch(shape, 1, encoder, vae)

    def image(step, slot, image_noise=True):
        builder = make_builder(model, encoder, vae, image_noise=image_noise)
        draws = Draws(torch.tensor([500]), no_dropout, no_dropout, 0, step, [slot])
        hidden = builder.build(batch, shape, draws)[0]["hidden_states"]
        return hidden[:, :1, hidden.shape[2] // 2 :]

    assert torch.equal(image(3, 0), image(3, 0))
    assert not torch.equal(image(3, 0), image(4, 0))
    assert not torch.equal(image(3, 0), image(3, 1))
    assert torch.equal(image(3, 0, image_noise=False), image(4, 1, image_noise=False))
    assert not torch.equal(image(3, 0), image(3, 0, image_noise=False))


def test_each_random_draw_of_a_sample_has_its_own_generator(model):
    """The purposes must never change: a run that is resumed with another version must draw the same noise."""
    generators = {}

    class Recorded(Draws):
        def generators(self, purpose, device):
            generators[purpose] = super().generators(purpose, device)
            return generators[purpose]

    encoder, vae = TextEncoder(model, torch.float32, "cpu"), load_vae(model, torch.float32, "cpu")
    shape, no_dropout = ClipShape.parse("9x64x64"), torch.tensor([False])
    builder, batch = make_builder(model, encoder, vae, image_noise=True), make_batch(shape, 1, encoder, vae)
    inputs, target = builder.build(batch, shape, Recorded(torch.tensor([999]), no_dropout, no_dropout, 5, 3, [7]))
    assert sorted(generators) == ["image noise", "image posterior", "noise", "posterior"]
    assert len({random.initial_seed() for (random,) in generators.values()}) == 4
    # abar is 0 at the last timestep, so x_t is the noise and v = -x_0.
    noise, posterior = (generator(5, 3, 7, purpose) for purpose in ("noise", "posterior"))
    noisy = inputs["hidden_states"][:, :, : target.shape[2]]
    assert torch.equal(noisy[0], torch.randn(noisy.shape[1:], generator=noise))
    clip = sample_moments(batch["moments"], posterior)
    torch.testing.assert_close(-target[:, -clip.shape[1] :], clip * vae.config.scaling_factor)


def test_the_noise_of_a_sample_does_not_depend_on_its_batch(model):
    """So a run can continue on another number of ranks."""
    encoder, vae = TextEncoder(model, torch.float32, "cpu"), load_vae(model, torch.float32, "cpu")
    shape, no_dropout = ClipShape.parse("9x64x64"), torch.tensor([False, False])
    builder, batch = make_builder(model, encoder, vae, image_noise=True), make_batch(shape, 2, encoder, vae)
    timesteps = torch.tensor([500, 20])
    together, target = builder.build(batch, shape, Draws(timesteps, no_dropout, no_dropout, 0, 3, (4, 5)))
    for sample in range(2):
        single = {name: tensor[sample : sample + 1] for name, tensor in batch.items()}
        draws = Draws(timesteps[sample : sample + 1], no_dropout[:1], no_dropout[:1], 0, 3, [4 + sample])
        alone, single_target = builder.build(single, shape, draws)
        assert torch.equal(alone["hidden_states"][0], together["hidden_states"][sample])
        assert torch.equal(single_target[0], target[sample])
    assert not torch.equal(together["hidden_states"][0], together["hidden_states"][1])


def test_noise_and_target_agree_with_the_scheduler(model):
    """From x_t and v, the formula of the scheduler recovers x_0."""
    alphas_cumprod = load_alphas_cumprod(model)
    latents, noise = torch.randn(2, 4, 8, 2, 2), torch.randn(2, 4, 8, 2, 2)
    timesteps = torch.tensor([3, 700])
    noisy, target = (function(latents, noise, timesteps, alphas_cumprod) for function in (add_noise, v_target))
    abar = alphas_cumprod[timesteps].view(-1, 1, 1, 1, 1).float()
    torch.testing.assert_close(abar.sqrt() * noisy - (1 - abar).sqrt() * target, latents, atol=1e-5, rtol=0)


def test_random_batches_have_the_format_of_the_cache_and_are_reproducible():
    first, second = (random_batch(ClipShape(17, 64, 96), 2, V15, 8, "bf16") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in first.items()} == {
        "moments": ((2, 32, 5, 8, 12), torch.bfloat16), "first_frame": ((2, 3, 64, 96), torch.uint8),
        "text_states": ((2, 226, 8), torch.bfloat16),
    }  # fmt: skip


def test_a_tensor_of_another_stream_is_marked_as_in_use(monkeypatch):
    """Otherwise the encoder's thread could reuse its memory for the next clip while this step still reads it."""

    class GpuTensor:
        is_cuda, device, used_on = True, torch.device("cuda", 0), None

        def record_stream(self, stream):
            self.used_on = stream

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the stream of {device}")
    tensor = GpuTensor()
    assert to_device(tensor, tensor.device) is tensor
    assert tensor.used_on == "the stream of cuda:0"


def test_text_to_video_does_not_use_the_first_frame(family):
    """The VAE is not called, image dropout and image noise change nothing, and no draw is spent on an image."""
    model = find_model(str(family("5b")))
    encoder, shape = TextEncoder(model, torch.float32, "cpu"), ClipShape.parse("9x64x64")
    batch = random_batch(shape, 2, model.geometry, 32, "fp32")
    purposes = []

    class Recorded(Draws):
        def generators(self, purpose, device):
            purposes.append(purpose)
            return super().generators(purpose, device)

    def hidden(dropped, **conditioning):
        builder = make_builder(model, encoder, None, **conditioning)
        drops = torch.full((2,), dropped), torch.tensor([False, False])
        inputs, target = builder.build(batch, shape, Recorded(torch.tensor([10, 500]), *drops, 0, 0, (0, 1)))
        assert inputs["hidden_states"].shape == target.shape
        zeros, _ = builder.zero_inputs(shape, 2)
        assert {name: getattr(value, "shape", None) for name, value in zeros.items()} == {
            name: getattr(value, "shape", None) for name, value in inputs.items()
        }
        return inputs["hidden_states"]

    assert torch.equal(hidden(False), hidden(True, image_noise=True))
    assert set(purposes) == {"posterior", "noise"}
