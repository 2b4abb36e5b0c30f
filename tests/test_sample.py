"""A LoRA is sampled as it was trained: the scale of its image latents, its size and its frame rate."""

import pytest
import torch
from PIL import Image

import cogds.sample
from cogds.core.geometry import ClipShape
from cogds.model.load import TextEncoder, find_model, load_transformer, load_vae
from cogds.model.lora import export, inject
from cogds.sample import trained_size, use_convention
from tests.test_step import build_ours, differences, pipeline_inputs


@pytest.fixture(scope="module")
def model(tiny_model):
    return find_model(str(tiny_model))


@pytest.fixture
def pipeline(model):
    from diffusers import CogVideoXImageToVideoPipeline

    pipeline = CogVideoXImageToVideoPipeline.from_pretrained(model.path, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("convention, factor", [("pipeline", 1.0), ("scaled", 0.49), ("unscaled", 0.7)])
def test_the_pipeline_is_given_what_training_gave(model, pipeline, convention, factor):
    """Everything that the transformer sees at the first step, for a LoRA of each convention."""
    encoder, vae = TextEncoder(model, torch.float32, "cpu"), load_vae(model, torch.float32, "cpu")
    shape = ClipShape.parse("17x64x96")
    assert use_convention(pipeline, convention) == pytest.approx(factor)
    theirs = pipeline_inputs(pipeline, shape, 1)
    ours, _ = build_ours(model, encoder, vae, shape, 1, image_latents=convention)
    # 0.7 x latents and 0.49 x (latents / 0.7) differ in the last bits.
    assert differences(ours, theirs) == ([] if convention == "pipeline" else ["image latents"])
    channels = vae.config.latent_channels
    torch.testing.assert_close(
        ours["hidden_states"][:, :, channels:], theirs["hidden_states"][:, :, channels:], atol=0, rtol=1e-6
    )


@pytest.fixture
def sample(model, tmp_path, monkeypatch):
    """`sample(convention, *argv)`: the path, frames and frame rate that sample.py would write with such a LoRA."""
    transformer = load_transformer(model, torch.float32)
    inject(transformer, 4, 8, 0.0, ["to_q", "to_v"], seed=0)
    tensors = {
        name: torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1))
        for name, tensor in transformer.named_parameters()
        if tensor.requires_grad
    }
    Image.linear_gradient("L").convert("RGB").resize((100, 60)).save(tmp_path / "first.png")
    written = []
    monkeypatch.setattr(cogds.sample, "write_video", lambda *args: written.append(args))

    def sample(convention, *argv):
        metadata = {"image_latents": convention, "buckets": ["1x64x96", "9x64x64", "9x64x96"], "fps": 8.0}
        export(tmp_path / convention, transformer, tensors, metadata)
        cogds.sample.main(
            ["--model", str(model.path), "--lora", str(tmp_path / convention), "--image", str(tmp_path / "first.png"),
             "--prompt", "a red circle", "--steps", "1", *argv]
        )  # fmt: skip
        return written[-1]

    return sample


def test_another_convention_is_followed_and_said(sample, capsys):
    _, frames, fps = sample("pipeline")
    assert frames.shape == (9, 64, 96, 3)
    assert fps == 8
    assert "image latents" not in capsys.readouterr().out
    _, other, _ = sample("scaled")
    assert "this LoRA was trained with image latents 'scaled'" in capsys.readouterr().out
    assert not torch.equal(frames, other)


def test_size_frame_rate_and_strength_can_be_given(sample):
    path, frames, fps = sample("pipeline", "--size", "17x64x64", "--fps", "12", "--output", "here.mp4")
    assert (path, frames.shape, fps) == ("here.mp4", (17, 64, 64, 3), 12)
    _, weaker, _ = sample("pipeline", "--size", "17x64x64", "--lora-scale", "0")
    assert not torch.equal(frames, weaker)


def test_size_is_the_bucket_that_crops_the_image_least(tmp_path):
    metadata = {"buckets": ["1x64x64", "9x64x96", "9x96x64"]}
    for width, height, expected in ((90, 60, "9x64x96"), (60, 90, "9x96x64"), (90, 90, "9x64x96")):
        Image.new("RGB", (width, height)).save(tmp_path / "image.png")
        assert str(trained_size(str(tmp_path / "image.png"), metadata)) == expected
    assert str(trained_size(str(tmp_path / "image.png"), {})) == "81x768x1360"
