"""Parity: a training step passes the same inputs to the transformer as the diffusers pipeline, for several buckets."""

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image

import cogds.train.step
from cogds.config.schema import ConditioningConfig
from cogds.core.conditioning import sample_moments
from cogds.core.diffusion import add_noise, v_target
from cogds.core.geometry import ClipShape, latent_frames, padded_latent_frames
from cogds.core.rng import generator
from cogds.model.load import TextEncoder, find_model, load_alphas_cumprod, load_vae
from cogds.train.step import Draws, StepBuilder, draw_dropouts, random_batch, to_device
from tests.published_model import V15

# Landscape, portrait, square; an odd (17, 9, 25, 1) or even (13, 21) number of latent frames: padded or not.
SHAPES = ["17x64x96", "13x96x64", "9x64x64", "21x48x80", "25x80x48", "1x64x96"]
CAPTIONS = ["a red circle moves over a blue background", "two squares"]
NO_CONDITIONING_NOISE = {"image_noise": False, "image_dropout": 0.0, "caption_dropout": 0.0}


@pytest.fixture(scope="module")
def model(tiny_model):
    return find_model(str(tiny_model))


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def parts(request, model):
    """The pipeline, the text encoder and the VAE in the same dtype."""
    from diffusers import CogVideoXImageToVideoPipeline

    dtype = request.param
    pipeline = CogVideoXImageToVideoPipeline.from_pretrained(model.path, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, TextEncoder(model, dtype, "cpu"), load_vae(model, dtype, "cpu")


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


class SeededDraws(Draws):
    def generators(self, _purpose, _device):
        # One for all samples, as in the pipeline. Its first draw is also the posterior of the image.
        return [torch.Generator().manual_seed(7)] * len(self.slots)


def build_ours(model, encoder, vae, shape, batch_size, **conditioning):
    no_dropout = torch.zeros(batch_size, dtype=torch.bool)
    draws = SeededDraws(torch.full((batch_size,), 999), no_dropout, no_dropout, 0, 0, range(batch_size))
    builder = make_builder(model, encoder, vae, **conditioning)
    return builder.build(make_batch(shape, batch_size, encoder, vae), shape, draws)


def pipeline_inputs(pipeline, shape, batch_size):
    """Return the keyword arguments that the pipeline passes to its transformer."""
    calls, forward = [], pipeline.transformer.forward

    def record(**inputs):
        calls.append(inputs)
        return forward(**inputs)

    pipeline.transformer.forward = record
    try:
        pipeline(
            image=[Image.fromarray(clip[0].permute(1, 2, 0).numpy()) for clip in pixels_of(shape, batch_size)],
            prompt=CAPTIONS[:batch_size],
            num_frames=shape.frames,
            height=shape.height,
            width=shape.width,
            num_inference_steps=1,
            guidance_scale=1.0,
            max_sequence_length=pipeline.transformer.config.max_text_seq_length,
            output_type="latent",
            generator=torch.Generator().manual_seed(7),
        )
    finally:
        pipeline.transformer.forward = forward
    return calls[0]


def differences(ours, theirs):
    """Return the names of the arguments that differ between a training step and the pipeline."""
    common = ours.keys() & theirs.keys()
    return sorted(
        (ours.keys() ^ theirs.keys()) | {name for name in common if not is_equal(name, ours[name], theirs[name])}
    )


def is_equal(name, ours, theirs):
    if name == "image_rotary_emb" and ours is not None and theirs is not None:
        return all(is_equal("rotary table", a, b) for a, b in zip(ours, theirs, strict=True))
    if not isinstance(ours, torch.Tensor) or not isinstance(theirs, torch.Tensor):
        return ours is theirs
    if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
        return False
    if name == "timestep":  # training may use another value
        return True
    if name == "encoder_hidden_states":  # in a batch, matrix products differ in the last bits
        return torch.allclose(ours.float(), theirs.float(), atol=1e-6 if ours.dtype == torch.float32 else 0.1)
    if name == "hidden_states":  # the first half of the channels is noise in the pipeline and a noised clip in training
        channels = ours.shape[2] // 2
        return torch.equal(ours[:, :, channels:], theirs[:, :, channels:])
    return torch.equal(ours, theirs)


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("text", SHAPES)
def test_inputs_equal_those_of_the_pipeline(parts, model, text, batch_size):
    pipeline, encoder, vae = parts
    shape = ClipShape.parse(text)
    ours, _ = build_ours(model, encoder, vae, shape, batch_size)
    theirs = pipeline_inputs(pipeline, shape, batch_size)
    assert differences(ours, theirs) == []
    if batch_size == 1:
        assert torch.equal(ours["encoder_hidden_states"], theirs["encoder_hidden_states"])


@pytest.mark.parametrize("text", SHAPES)
def test_the_clip_is_in_the_latent_frames_that_the_pipeline_decodes(parts, model, text):
    """The pipeline drops the first `additional_frames` and decodes the others."""
    _, encoder, vae = parts
    shape = ClipShape.parse(text)
    inputs, target = build_ours(model, encoder, vae, shape, 1)
    noisy = inputs["hidden_states"][:, :, : target.shape[2]].float()
    latents = -target  # abar is 0 at the last timestep, so v = -x_0
    assert noisy.shape == latents.shape
    moments = make_batch(shape, 1, encoder, vae)["moments"]
    expected = moments.float().chunk(2, dim=1)[0].transpose(1, 2) * vae.config.scaling_factor
    additional = padded_latent_frames(shape.frames, model.geometry) - latent_frames(shape.frames, model.geometry)
    assert latents.shape[1] == expected.shape[1] + additional
    torch.testing.assert_close(latents[:, additional:], expected, atol=0.03, rtol=0)
    torch.testing.assert_close(latents[:, :additional], expected[:, :additional], atol=0.03, rtol=0)


def test_a_wrong_image_scale_is_detected(parts, model):
    pipeline, encoder, vae = parts
    shape = ClipShape.parse("17x64x96")
    theirs = pipeline_inputs(pipeline, shape, 1)
    for convention in ("scaled", "unscaled"):
        ours, _ = build_ours(model, encoder, vae, shape, 1, image_latents=convention)
        assert differences(ours, theirs) == ["hidden_states"]


def test_padding_at_the_end_is_detected(parts, model, monkeypatch):
    pipeline, encoder, vae = parts
    shape = ClipShape.parse("17x64x96")

    def condition_at_the_end(image_latents, num_frames):
        return torch.cat([image_latents.new_zeros(1, 1, *image_latents.shape[2:]), image_latents,
                          image_latents.new_zeros(1, num_frames - 2, *image_latents.shape[2:])], dim=1)  # fmt: skip

    def pad_end(latents, _patch_size_t):
        return torch.cat([latents, latents[:, -1:]], dim=1)

    monkeypatch.setattr(cogds.train.step, "image_condition", condition_at_the_end)
    ours, _ = build_ours(model, encoder, vae, shape, 1)
    assert differences(ours, pipeline_inputs(pipeline, shape, 1)) == ["hidden_states"]
    monkeypatch.undo()
    monkeypatch.setattr(cogds.train.step, "pad_front", pad_end)
    with pytest.raises(AssertionError, match="not close"):
        test_the_clip_is_in_the_latent_frames_that_the_pipeline_decodes(parts, model, "17x64x96")


def test_a_missing_ofs_is_detected(parts, model, monkeypatch):
    pipeline, encoder, vae = parts
    shape = ClipShape.parse("17x64x96")
    inputs = cogds.train.step.transformer_inputs
    monkeypatch.setattr(cogds.train.step, "transformer_inputs", lambda *args: {**inputs(*args), "ofs": None})
    ours, _ = build_ours(model, encoder, vae, shape, 1)
    assert differences(ours, pipeline_inputs(pipeline, shape, 1)) == ["ofs"]


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
