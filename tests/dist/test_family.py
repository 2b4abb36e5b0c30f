"""Every member of the family is trained with the same command: 2 ranks, evaluated, with videos, and resumed."""

import pytest
import torch
from diffusers import CogVideoXImageToVideoPipeline, CogVideoXPipeline

from cogds.model.lora.file import read_lora
from tests.dist.conftest import adapter, losses, metrics, notes

pytestmark = [pytest.mark.dist, pytest.mark.slow]

ALL_BUCKETS = "data.buckets=[17x64x96, 9x96x64, 9x64x64, 1x64x64]"
# 5b-i2v has one size, and so no images.
BUCKETS = {"5b-i2v": "data.buckets=[17x64x96]"}


@pytest.fixture
def train_member(train_once, family, workshop):
    """`train_member(name, ds, *overrides, run="")`: the folder of a finished run of a tiny model."""

    def run(name, ds="zero2", *overrides, run=""):
        words = [f"model.path={family(name)}", BUCKETS.get(name, ALL_BUCKETS), "data.max_unusable=0.5"]
        words += [f"data.cache_dir={workshop / f'cache-{name}'}"]
        return train_once(f"{name}-{ds}{run}", ds, *words, *overrides)

    return run


@pytest.mark.parametrize("name", ["1.5-5b", "5b-i2v", "5b", "2b"])
def test_a_member_is_trained_evaluated_and_sampled(train_member, family, name):
    folder = train_member(name, "zero2", "eval.every=6", "sample.every=6", "sample.num_steps=1", run="-whole")
    assert len(losses(folder)) == 6
    lines = [line for line in notes(folder) if "eval/train_loss" in line]
    before, after = (line["eval/train_loss"] for line in lines)
    assert after < before
    has_image = name == "5b-i2v"
    videos = list(folder.glob("samples/step-000006/*.mp4"))
    assert len(videos) == 2
    assert all(video.stat().st_size for video in videos)
    assert (folder / "samples/first_frames").is_dir() is has_image
    metadata = read_lora(folder / "lora/step-000006").metadata
    assert metadata["task"] == ("image-to-video" if has_image else "text-to-video")
    assert ("image_latents" in metadata) is has_image
    pipeline_class = CogVideoXImageToVideoPipeline if has_image else CogVideoXPipeline
    assert pipeline_class.__name__ in (folder / "lora/step-000006/README.md").read_text()
    pipeline = pipeline_class.from_pretrained(family(name), use_safetensors=True)
    pipeline.load_lora_weights(folder / "lora/step-000006")
    assert any(line.get("train/loss/bucket=1x64x64") for line in metrics(folder)) is not has_image


@pytest.mark.parametrize("name", ["1.5-5b", "5b-i2v", "2b"])
def test_stage_3_gives_the_same_losses(train_member, name):
    """It builds the transformer in another way, and position embeddings are buffers that it must not change."""
    reference, run = train_member(name), train_member(name, "zero3")
    assert losses(run) == pytest.approx(losses(reference), rel=1e-6)
    for key, tensor in adapter(run).items():
        torch.testing.assert_close(tensor, adapter(reference)[key], atol=2e-4, rtol=1e-3)


def test_a_resumed_run_is_the_same(train_member, workshop):
    """Bitwise: 6 steps are 3 and, resumed, 3 more."""
    whole = train_member("1.5-5b", "zero2", "optimizer.schedule=constant", run="-constant")
    parts = [f"output_dir={workshop / 'parts'}", "optimizer.schedule=constant"]
    train_member("1.5-5b", "zero2", *parts, "train.num_steps=3", run="-3")
    train_member("1.5-5b", "zero2", *parts, run="-6")
    assert losses(workshop / "parts") == losses(whole)
    expected = adapter(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in adapter(workshop / "parts").items())


def test_bf16_and_clips_encoded_on_the_fly(train_member):
    reference = train_member("2b", "zero2", "train.precision=bf16", run="-bf16")
    run = train_member("2b", "zero2", "train.precision=bf16", "data.encode=on_the_fly", run="-fly")
    assert losses(run) == losses(reference)


def test_the_whole_transformer_of_a_text_to_video_model_is_trained(train_member):
    folder = train_member("2b", "zero3", "train.method=full", run="-full")
    assert len(losses(folder)) == 6
    model = folder / "model/step-000006"
    pipeline = CogVideoXPipeline.from_pretrained(model)
    assert all(parameter.isfinite().all() for parameter in pipeline.transformer.parameters())
    card = (model / "README.md").read_text()
    assert "CogVideoXPipeline" in card
    assert "text-to-video" in card
