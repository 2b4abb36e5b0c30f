"""Parity: a training step passes the same inputs to the transformer as the model's diffusers pipeline.

For every member of the family, several buckets, batches of 1 and 2, in float32 and bf16. The tests also check that they
notice wrong inputs: what one member needs, planted into another.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import cogds.train.step
from cogds.config.schema import ConditioningConfig
from cogds.core.condition_modes import Piece
from cogds.core.geometry import ClipShape, latent_frames, padded_latent_frames
from cogds.model.load import ModelFolder, TextEncoder, find_model, load_alphas_cumprod, load_vae
from cogds.model.pipelines import load_whole_pipeline
from cogds.train.step import Draws, StepBuilder
from tests.tiny import FIXED_SIZE, MEMBERS

# Landscape, portrait, square; an odd (17, 9, 25, 1) or even (13, 21) number of latent frames: padded or not in 1.5.
SHAPES = ["17x64x96", "13x96x64", "9x64x64", "21x48x80", "25x80x48", "1x64x96"]
CAPTIONS = ["a red circle moves over a blue background", "two squares"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LATENT_CHANNELS = 8
# Enough to see each value used; the rest is slow.
QUICK = {("17x64x96", 1, "fp32"), ("13x96x64", 2, "fp32"), ("1x64x96", 1, "fp32"), ("17x64x96", 2, "bf16")}


def cases():
    for name in MEMBERS:
        for text in [FIXED_SIZE] if name == "5b-i2v" else SHAPES:
            for batch_size in (1, 2):
                for dtype in DTYPES:
                    is_quick = name == "1.5-5b-i2v" or (text, batch_size, dtype) in QUICK
                    marks = () if is_quick else pytest.mark.slow
                    yield pytest.param(name, text, batch_size, dtype, marks=marks)


@dataclass
class Parts:
    """A model in one dtype: the pipeline, and what training loads."""

    model: ModelFolder
    pipeline: Any
    encoder: TextEncoder
    vae: Any


@pytest.fixture(scope="module")
def load(family):
    """`load(name, dtype)` returns the parts of a member."""
    loaded = {}

    def parts_of(name, dtype="fp32"):
        if (name, dtype) not in loaded:
            model = find_model(str(family(name)))
            loaded[name, dtype] = Parts(
                model,
                load_whole_pipeline(model, DTYPES[dtype]),
                TextEncoder(model, DTYPES[dtype], "cpu"),
                load_vae(model, DTYPES[dtype], "cpu"),
            )
        return loaded[name, dtype]

    return parts_of


def pixels_of(shape, batch_size):
    size = (batch_size, 3, shape.height, shape.width)
    return torch.from_numpy(np.random.default_rng(3).integers(0, 256, size, dtype=np.uint8))


def make_batch(parts, shape, batch_size):
    """A batch of the cache: moments of the VAE's shape, first frames, and captions."""
    channels, side = 2 * LATENT_CHANNELS, parts.model.geometry.vae_spatial
    size = (latent_frames(shape.frames, parts.model.geometry), shape.height // side, shape.width // side)
    moments = torch.randn(batch_size, channels, *size, generator=torch.Generator().manual_seed(1))
    moments[:, LATENT_CHANNELS:] = -30  # no variance
    return {
        "moments": moments.to(parts.vae.dtype),
        "first_frame": pixels_of(shape, batch_size),
        "text_states": torch.stack([parts.encoder.encode(caption) for caption in CAPTIONS[:batch_size]]),
    }


class SeededDraws(Draws):
    def generators(self, _purpose, _device):
        # One for all samples, as in the pipeline. Its first draw is also the posterior of the image.
        return [torch.Generator().manual_seed(7)] * len(self.slots)


def our_inputs(parts, shape, batch_size=1, geometry=None, image_latents="pipeline"):
    """Return the inputs and the target of a training step at the last timestep, without image noise or dropout."""
    no_dropout = torch.zeros(batch_size, dtype=torch.bool)
    draws = SeededDraws(torch.full((batch_size,), 999), no_dropout, no_dropout, 0, 0, range(batch_size))
    builder = StepBuilder(
        parts.vae,
        geometry or parts.model.geometry,
        ConditioningConfig(image_latents=image_latents, image_noise=False),
        load_alphas_cumprod(parts.model),
        parts.encoder.encode(""),
        torch.device("cpu"),
    )
    return builder.build(make_batch(parts, shape, batch_size), shape, draws)


def pipeline_inputs(parts, shape, batch_size=1):
    """Return the keyword arguments that the pipeline passes to its transformer."""
    calls, pipeline = [], parts.pipeline
    forward = pipeline.transformer.forward
    image = {}
    if MEMBERS_WITH_IMAGE[type(pipeline).__name__]:
        frames = pixels_of(shape, batch_size).permute(0, 2, 3, 1).numpy()
        image = {"image": [Image.fromarray(frame) for frame in frames]}

    def record(**inputs):
        calls.append(inputs)
        return forward(**inputs)

    pipeline.transformer.forward = record
    try:
        pipeline(
            **image,
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


MEMBERS_WITH_IMAGE = {"CogVideoXImageToVideoPipeline": True, "CogVideoXPipeline": False}


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
    if name == "hidden_states":  # the first channels are noise in the pipeline and a noised clip in training
        return torch.equal(ours[:, :, LATENT_CHANNELS:], theirs[:, :, LATENT_CHANNELS:])
    return torch.equal(ours, theirs)


@pytest.mark.parametrize("name, text, batch_size, dtype", list(cases()))
def test_inputs_equal_those_of_the_pipeline(load, name, text, batch_size, dtype):
    parts, shape = load(name, dtype), ClipShape.parse(text)
    ours, _ = our_inputs(parts, shape, batch_size)
    theirs = pipeline_inputs(parts, shape, batch_size)
    assert differences(ours, theirs) == []
    if batch_size == 1:
        assert torch.equal(ours["encoder_hidden_states"], theirs["encoder_hidden_states"])
    parts.pipeline.transformer(**ours)


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("text", SHAPES)
def test_the_pipeline_decodes_the_clip_that_was_trained(load, name, text):
    parts = load(name)
    check_decoded_clip(parts, FIXED_SIZE if name == "5b-i2v" else text, parts.model.geometry)


def check_decoded_clip(parts, text, geometry):
    """The pipeline drops the first `additional_frames`, undoes the scale and decodes the rest."""
    shape = ClipShape.parse(text)
    inputs, target = our_inputs(parts, shape, geometry=geometry)
    noisy = inputs["hidden_states"][:, :, :LATENT_CHANNELS].float()
    latents = -target  # abar is 0 at the last timestep, so v = -x_0
    assert noisy.shape == latents.shape
    mean = make_batch(parts, shape, 1)["moments"].float()[:, :LATENT_CHANNELS]
    padded, unpadded = (count(shape.frames, parts.model.geometry) for count in (padded_latent_frames, latent_frames))
    assert latents.shape[1] == padded
    decoded = []
    vae = parts.pipeline.vae
    decode, vae.decode = vae.decode, lambda values: decoded.append(values) or decode(values[:, :, :1, :8, :8])
    try:
        parts.pipeline.decode_latents(latents[:, padded - unpadded :])
    finally:
        vae.decode = decode
    torch.testing.assert_close(decoded[0], mean, atol=1e-5, rtol=0)
    first = latents[:, padded - unpadded : padded - unpadded + 1]
    assert torch.equal(latents[:, : padded - unpadded], first.expand(-1, padded - unpadded, -1, -1, -1))


@pytest.mark.parametrize(
    "name, planted, wrong",
    [
        ("1.5-5b-i2v", {"has_ofs": False}, ["ofs"]),
        ("1.5-5b-i2v", {"takes_image": False}, ["hidden_states", "ofs"]),
        ("1.5-5b-i2v", {"invert_scale_latents": False}, ["hidden_states"]),
        ("1.5-5b-i2v", {"positions": "rope_resize"}, ["image_rotary_emb"]),
        ("1.5-5b", {"takes_image": True}, ["hidden_states", "ofs"]),
        ("1.5-5b", {"patch_size_t": None}, ["hidden_states", "image_rotary_emb"]),
        ("1.5-5b", {"positions": "sincos"}, ["image_rotary_emb"]),
        ("5b-i2v", {"invert_scale_latents": True}, ["hidden_states"]),
        ("5b-i2v", {"has_ofs": True}, ["ofs"]),
        ("5b", {"patch_size_t": 2}, ["hidden_states", "image_rotary_emb"]),
        ("5b", {"positions": "rope_slice"}, ["image_rotary_emb"]),
        ("5b", {"takes_image": True}, ["hidden_states", "ofs"]),
        ("2b", {"positions": "rope_resize"}, ["image_rotary_emb"]),
        ("2b", {"patch_size_t": 2}, ["hidden_states"]),
    ],
)
def test_what_belongs_to_another_member_is_detected(load, name, planted, wrong):
    parts, shape = load(name), ClipShape.parse(FIXED_SIZE if name == "5b-i2v" else "9x48x64")
    geometry = parts.model.geometry
    geometry = replace(geometry, family=replace(geometry.family, **planted))
    assert differences(our_inputs(parts, shape, geometry=geometry)[0], pipeline_inputs(parts, shape)) == wrong


def test_another_scale_of_the_latents_is_detected(load):
    geometry = load("2b").model.geometry
    wrong = replace(geometry, family=replace(geometry.family, scaling_factor=0.7))
    with pytest.raises(AssertionError, match="not close"):
        check_decoded_clip(load("2b"), "17x64x96", wrong)


@pytest.mark.parametrize("name", ["1.5-5b-i2v", "5b-i2v"])
def test_a_wrong_image_scale_is_detected(load, name):
    parts, shape = load(name), ClipShape.parse("17x64x96")
    theirs = pipeline_inputs(parts, shape)
    for convention in {"1.5-5b-i2v": ("scaled", "unscaled"), "5b-i2v": ("unscaled",)}[name]:
        ours, _ = our_inputs(parts, shape, image_latents=convention)
        assert differences(ours, theirs) == ["hidden_states"]


def test_padding_at_the_end_is_detected(load, monkeypatch):
    parts, shape = load("1.5-5b-i2v"), ClipShape.parse("17x64x96")

    def after_the_padding(*_):
        return (Piece(range(1), place=1),)

    def pad_end(latents, _patch_size_t):
        return torch.cat([latents, latents[:, -1:]], dim=1)

    monkeypatch.setattr(cogds.train.step, "pieces_of", after_the_padding)
    assert differences(our_inputs(parts, shape)[0], pipeline_inputs(parts, shape)) == ["hidden_states"]
    monkeypatch.undo()
    monkeypatch.setattr(cogds.train.step, "pad_front", pad_end)
    for name in ("1.5-5b-i2v", "1.5-5b"):
        with pytest.raises(AssertionError, match="not close"):
            check_decoded_clip(load(name), "17x64x96", load(name).model.geometry)


@pytest.mark.parametrize("name", MEMBERS)
def test_the_noise_schedule_is_that_of_the_pipeline(load, name):
    parts = load(name)
    table = load_alphas_cumprod(parts.model)
    assert torch.equal(table, parts.pipeline.scheduler.alphas_cumprod)
    assert type(parts.pipeline.scheduler).__name__ == parts.model.family.scheduler
    assert table[-1] == 0
    is_shifted = not torch.allclose(table, load_alphas_cumprod(load("1.5-5b-i2v").model))
    assert is_shifted is (name == "2b")  # snr_shift_scale is 3
